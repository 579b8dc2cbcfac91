"""What the user can mend is one sentence on stderr, exit status 2, and nothing is written."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tritonsparse.train import translation

Refusal = Callable[..., str]
LOCAL = "--train_file and --validation_file"


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.import_module("huggingface_hub.constants"), "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(importlib.import_module("datasets.config"), "HF_HUB_OFFLINE", True)


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--method=gmp", "--sparsity=1.0"), "gmp: expected a sparsity in [0, 1), the fraction of zeros, got 1.0"),
        (("--method=gmp", "--sparsity=-0.1"), "got -0.1"),
        (("--method=gmp",), "missing 1 required keyword-only argument: 'sparsity'"),
        (("--pattern=2:4",), "method 'autosparse' supports (block, unstructured), got '2:4'"),
        (
            ("--method=magic",),
            "topkast, got 'magic'; choose one",
        ),
        (("--flops_convention=macs",), "a FLOPs convention of autosparse, rigl, acdc, swat, got 'macs'; choose one"),
        (("--method=dense", "--sparsity=0.5"), "fields of method 'dense'"),
        (("--method_args", '{"alfa": 1}'), "unexpected keyword argument 'alfa'"),
        (("--method_args", '{"alpha": 2}'), "expected alpha in [0, 1], got 2"),
        (("--method_args", '{"alpha": "much"}'), "fields of method 'autosparse'"),
        (("--method=dense", "--auto_tune=nowhere.json"), "expected all_results.json of a run with --method dense"),
        (("--model_name_or_path=some/model", "--preset=transformer-big"), "no --preset beside --model_name_or_path"),
        (("--preset=huge",), "a preset among transformer-tiny"),
        (("--vocab_size=20000",), "pass --vocab_size"),
        (("--vocab_size=20",), "pass a larger --vocab_size"),
        (("--max_tokens_per_batch=5",), "raise --max_tokens_per_batch"),
        (("--max_source_length=2",), "raise --max_source_length"),
        (("--gradient_accumulation_steps=1000",), "or --gradient_accumulation_steps"),
        (("--include", "no_such_*"), "no_such_*"),
        (("--lr_scheduler_type=steep",), "steep"),
        (("--source_lang=fr",), "en-de or de-en for dataset_name 'embedded', got fr-de"),
        (("--report_to=comet_ml",), "expected an installed tracker, got 'comet_ml'"),
        (("--report_to=abacus",), "abacus"),
        (("--recipe=nothing",), "expected a .toml file or one of"),
        (("--num_train_epochs=3",), "got both; give one"),
        (("--resume_from_checkpoint=no/step_4",), "name a step_N or epoch_N folder, or 'latest'"),
    ],
)
def test_an_argument_that_does_not_fit_is_one_sentence(
    refusal: Refusal, tmp_path: Path, options: tuple[str, ...], words: str
) -> None:
    assert words in refusal(tmp_path / "out", "--max_train_steps=2", *options)


def test_a_missing_file_is_named(refusal: Refusal, tmp_path: Path) -> None:
    missing = str(tmp_path / "nowhere.jsonl")
    assert missing in refusal(tmp_path / "out", "--max_train_steps=2", "--train_file", missing)


def test_an_empty_file_is_named(refusal: Refusal, tmp_path: Path) -> None:
    empty = write(tmp_path / "train.jsonl", "")
    line = refusal(tmp_path / "out", "--max_train_steps=2", "--train_file", empty)
    assert empty in line
    assert "empty" in line


def test_parallel_files_of_unequal_length_are_counted(refusal: Refusal, tmp_path: Path) -> None:
    write(tmp_path / "train.en", "a\nb\nc\n")
    german = write(tmp_path / "train.de", "a\nb\n")
    line = refusal(tmp_path / "out", "--max_train_steps=2", "--train_file", german)
    assert "got 3 and 2; align the two files line by line" in line


def test_training_text_without_validation_text_is_refused(refusal: Refusal, corpus_files: Any, tmp_path: Path) -> None:
    line = refusal(tmp_path / "out", "--max_train_steps=2", corpus_files[0])
    assert "expected a validation split, got none; pass --validation_file" in line


def test_a_dataset_and_files_together_are_refused(refusal: Refusal, corpus_files: Any, tmp_path: Path) -> None:
    line = refusal(tmp_path / "out", "--max_train_steps=2", "--dataset_name=embedded", *corpus_files)
    assert "either dataset_name or local files" in line


@pytest.mark.usefixtures("offline")
def test_an_unknown_dataset_offline_names_the_local_files(refusal: Refusal, tmp_path: Path) -> None:
    line = refusal(tmp_path / "out", "--max_train_steps=2", "--dataset_name=nobody/no-such-corpus")
    assert "'nobody/no-such-corpus'" in line
    assert LOCAL in line


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("name", ["nobody/no-such-model", "./no-such-folder"])
def test_a_model_that_cannot_be_had_is_named(refusal: Refusal, tmp_path: Path, name: str) -> None:
    line = refusal(tmp_path / "out", "--max_train_steps=2", "--model_name_or_path", name)
    assert line.startswith("error: translation: expected a seq2seq checkpoint (a local folder or a reachable hub id)")
    assert repr(name) in line
    assert line.endswith("pass another --model_name_or_path")


def test_an_output_dir_that_is_a_file_is_refused(refusal: Refusal, tmp_path: Path) -> None:
    path = tmp_path / "out"
    path.touch()
    assert str(path) in refusal(path, "--max_train_steps=2")


def test_a_loss_that_is_not_finite_ends_with_status_1_and_no_results(
    small_program: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--preset=transformer-tiny", "--vocab_size=200", "--max_train_samples=300", "--max_train_steps=9"]
    rates = ["--learning_rate=1e30", "--num_warmup_steps=1", "--logging_steps=1", "--method=dense"]
    assert translation.main([*options, *rates, "--output_dir", str(tmp_path / "out")]) == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert len(lines) == 1
    assert lines[0].endswith("lower --learning_rate or clip with --max_grad_norm")
    assert list((tmp_path / "out").iterdir()) == []
