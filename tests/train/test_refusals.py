"""What the user can mend is one sentence on stderr, exit status 2, and nothing is written."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

TRANSLATION = [
    ("--method=gmp", "missing 1 required keyword-only argument: 'sparsity'"),
    ("--pattern=2:4", "method 'autosparse' supports (block, unstructured), got '2:4'"),
    ("--method=dense --sparsity=0.5", "fields of --method dense"),
    ('--method_args={"alfa":1}', "unexpected keyword argument 'alfa'"),
    ('--method_args={"alpha":2}', "expected alpha in [0, 1], got 2"),
    ('--method_args={"alpha":"much"}', "expected alpha as a finite number, got 'much'"),
    ("--method=dense --auto_tune=nowhere.json", "expected all_results.json of a run with --method dense"),
    ("--model_name_or_path=some/model --preset=transformer-big", "no --preset beside --model_name_or_path"),
    ("--vocab_size=20000", "pass --vocab_size"),
    ("--vocab_size=20", "pass a larger --vocab_size"),
    ("--max_tokens_per_batch=5", "raise --max_tokens_per_batch"),
    ("--max_source_length=2", "raise --max_source_length"),
    ("--gradient_accumulation_steps=1000", "or --gradient_accumulation_steps"),
    ("--include no_such_*", "no_such_*"),
    ("--bleu_tokenize=moses", "translation: expected tokenize to be one of 13a, "),
    ("--source_lang=fr", "en-de or de-en for dataset_name 'embedded', got fr-de"),
    ("--report_to=comet_ml", "expected an installed tracker, got 'comet_ml'"),
    ("--report_to=abacus", "abacus"),
    ("--recipe=nothing", "expected a .toml file or one of"),
    ("--source_lang=de", "two languages, got --source_lang and --target_lang 'de'"),
    ("--checkpointing_steps=1 --average_checkpoints=3", "--average_checkpoints of at most 2, the checkpoints that 2"),
    ("--method=dense --record_reference_losses={folder}/r.json", "a run of an epoch, "),
    ("--method=dense --record_reference_losses={folder}", "--record_reference_losses as a file that can be written"),
    ("--mixed_precision=fp16", "a --mixed_precision that cpu has, got 'fp16'"),
    ("--max_source_length=999 --train_file={folder}/long.tsv --validation_file={folder}/whole.tsv "
     "--model_name_or_path={marian}", "at most 128 tokens, the model's positions, got one of"),
    ("--resume_from_checkpoint=no/step_4", "name a step_N or epoch_N folder, or 'latest'"),
    ("--train_file={folder}/nowhere.jsonl", "{folder}/nowhere.jsonl"),
    ("--train_file={folder}/none.jsonl", "{folder}/none.jsonl, got an empty file"),
    ("--train_file={folder}/a.de", "got 3 and 2; align the two files line by line"),
    ("--train_file={folder}/whole.tsv", "expected a validation split, got none; pass --validation_file"),
    ("--train_file={folder}/whole.tsv --dataset_name=embedded", "either dataset_name or local files"),
    ("--dataset_name=nobody/no-such-corpus", "error: load_parallel: expected a dataset that can be loaded, got "
     "'nobody/no-such-corpus' ... or read local files with --train_file and --validation_file"),
    *((f"--model_name_or_path={name}", "error: translation: expected a seq2seq checkpoint (a local folder or a "
       f"reachable hub id), got {name!r} ... pass another")
      for name in ("nobody/no-such-model", "./no-such-folder")),
]  # fmt: skip
LANGUAGE = [
    ("--min_learning_rate=1", "expected --min_learning_rate of at most --learning_rate"),
    ("--min_learning_rate=0 --learning_rate=0", "--learning_rate, above 0, with"),
    ("--min_learning_rate=0 --lr_scheduler_type=linear", "with --lr_scheduler_type cosine, got 0.0, 0.01 and linear"),
    ("--test_mem_len=0 --test_same_length", "--test_mem_len above 0 with same_length"),
    ("--cache_dir={folder}/none.jsonl", "--cache_dir as a folder that can be written"),
    ("--tgt_len=200", "expected a text of at least one segment a column"),
    ("--mem_len=150", "expected a memory shorter than a column"),
    ("--batch_size=3 --gradient_accumulation_steps=2", "1 process(es) x 2 accumulation steps divide, got 3"),
    ("--eval_tgt_len=100", "expected a validation text of at least one segment a column"),
    ("--test_tgt_len=500", "expected a test text of at least one segment a column"),
    ("--block_size=8", "expected no --block_size for a Transformer-XL"),
    ("--preset=gpt2-tiny --tgt_len=8", "expected no --tgt_len for a causal model without a memory"),
    ("--preset=gpt2-tiny --vocab_size=300 --block_size=17", "at most the model's 16 positions"),
    ("--preset=gpt2-tiny --vocab_size=200", "expected vocab_size above 257"),
    ("--model_name_or_path=nowhere/at/all --preset=gpt2-tiny", "expected no --preset beside --model_name_or_path"),
    ("--train_file=/no/such/text", "expected a file, got /no/such/text, which does not exist"),
    ("--recipe=demo", "expected arguments of this program as keys"),
]
IMAGES = [
    ("--augmentation=imagenet", "--image_size"),
    ("--data_dir=nowhere", "folders of classes"),
    ("--data_dir=nowhere --dataset_name=embedded", "a dataset's name or a folder"),
    ("--model_name_or_path=x --preset=resnet20", "no --preset beside --model_name_or_path"),
    ('--method=acdc --sparsity=0.9 --method_args={"phases":"imagenet100"}', "a run of 100 epochs"),
    ("--max_train_samples=1", "at least 2 images"),
    ("--lr_scheduler_type=multistep", "rising --lr_milestones in epochs, got none"),
    ("--lr_scheduler_type=multistep --lr_milestones 2 1", "rising --lr_milestones in epochs, got [2.0, 1.0]"),
    ("--lr_milestones 1", "--lr_scheduler_type multistep, got them with 'cosine'"),
    ("--lr_gamma=0.1", "or name multistep"),
    ("--nesterov --momentum=0", "a --momentum above 0 beside --nesterov"),
    ("--nesterov --optimizer=adamw", "--optimizer sgd with"),
    ("--warmup_epochs=1 --num_warmup_steps=3", "one of --warmup_epochs and --num_warmup_steps"),
    ("--image_size=8 --eval_resize=7", "--eval_resize of at least --image_size 8, got 7"),
    ("--data_dir={folder}", "a train split and a validation or test split, got train"),
]


@pytest.fixture
def given(tmp_path: Path, monkeypatch: Any) -> Path:
    """A folder of files that some rows name: an empty one, unequal halves, a training set with nothing held out."""
    for module in ("huggingface_hub.constants", "datasets.config"):
        monkeypatch.setattr(importlib.import_module(module), "HF_HUB_OFFLINE", True)
    for name, text in {
        "none.jsonl": "",
        "a.en": "a\nb\nc\n",
        "a.de": "a\nb\n",
        "whole.tsv": "a\tb\n",
        "long.tsv": "The number is four. " * 90 + "\tb\n",
    }.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    np.savez(tmp_path / "train.npz", images=np.zeros((4, 8, 8), np.uint8), labels=np.arange(4) % 2)
    return tmp_path


@pytest.mark.parametrize(
    ("program", "options", "words"),
    [
        *(("translation", f"--max_train_steps=2 {options}", words) for options, words in TRANSLATION),
        *(("language", f"--max_train_steps=2 --method=dense {options}", words) for options, words in LANGUAGE),
        *(("images", f"--num_train_epochs=1 {options}", words) for options, words in IMAGES),
    ],
    indirect=["program"],
)
def test_an_argument_that_does_not_fit_is_one_sentence(
    program: Any, given: Path, options: str, words: str, saved_marian: Any
) -> None:
    options = options.replace("{folder}", str(given))
    options = options.replace("{marian}", str(saved_marian(0.1))) if "{marian}" in options else options
    line = program.refusal(given / "out", *options.split(" "))
    for part in words.replace("{folder}", str(given)).split(" ... "):
        assert part in line


def test_a_file_as_output_dir_and_a_loss_that_is_not_finite(translation: Any, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "file").touch()
    assert str(tmp_path / "file") in translation.refusal(tmp_path / "file", "--max_train_steps=2")
    rates = ("--learning_rate=1e30", "--num_warmup_steps=1", "--logging_steps=1", "--method=dense")
    with translation.small():
        assert translation.module.main(translation.words(tmp_path / "out", *rates, "--max_train_steps=9")) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert line.endswith("lower --learning_rate or clip with --max_grad_norm")
    assert list((tmp_path / "out").iterdir()) == []
