"""The language-modelling program from its command line to what it leaves behind."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tritonsparse.eval.perplexity import main as evaluate
from tritonsparse.eval.perplexity import segment_perplexity
from tritonsparse.models.transfo_xl import TransfoXLLMHeadModel, Vocabulary
from tritonsparse.train.run import checkpoints
from tritonsparse.train.text import language_presets

PHASES = '{"phases": {"starts": [[0, "dense"], [1, "sparse"], [2, "dense"], [3, "sparse"]], "epochs": 4}}'
SHORT = '{"phases": {"starts": [[0, "dense"], [1, "sparse"]], "epochs": 3}}'
ACDC = ("--method=acdc", "--sparsity=0.8", "--num_train_epochs=4", "--save_twins", f"--method_args={PHASES}")


@pytest.fixture(scope="module")
def acdc(language: Any, tmp_path_factory: Any) -> tuple[Path, dict[str, Any]]:
    options = (*ACDC, "--checkpointing_steps=epoch", "--test_tgt_len=5", "--test_mem_len=20", "--test_clamp_len=9")
    finished = language.finished(tmp_path_factory.mktemp("acdc"), *options, "--test_same_length", plots=True)
    return finished.folder, finished.document


def test_a_run_leaves_a_model_its_vocabulary_its_numbers_and_its_pictures(acdc: Any) -> None:
    folder, document = acdc
    for name in ("training.png", "layer_sparsity.png", "perplexity.png", "vocabulary.txt", "tritonsparse.safetensors"):
        assert (folder / name).stat().st_size > 0
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert isinstance(model, TransfoXLLMHeadModel)
    layers = [module for module in model.transformer.layers.modules() if type(module) is torch.nn.Linear]
    zeros = sum(int((layer.weight == 0).sum()) for layer in layers)
    total = sum(layer.weight.numel() for layer in layers)
    assert len(layers) == 2 * 5 and zeros == round(0.8 * total)
    assert document["sparsity"] == pytest.approx(zeros / total)
    # Embeddings and the softmax are dense.
    assert not any("word_emb" in layer["name"] or "crit" in layer["name"] for layer in document["layers"])
    assert document["method"] == "acdc" and document["split"] == "test"


def test_the_perplexity_of_a_run_is_its_saved_model_s(acdc: Any, texts: dict[str, Path], capsys: Any) -> None:
    folder, document = acdc
    assert document["perplexity_settings"] == {
        "tgt_len": 5, "mem_len": 20, "clamp_len": 9, "same_length": True, "same_length_rule": "nvidia", "columns": 1,
        "vocabulary": 27 - 1,
    }  # fmt: skip
    options = ["--tgt_len=5", "--mem_len=20", "--clamp_len=9", "--same_length", "--device=cpu"]
    assert evaluate([f"--model={folder}", f"--text_file={texts['test']}", *options]) == 0
    measured = json.loads(capsys.readouterr().out.strip().rpartition("\n")[2])
    assert measured["perplexity"] == pytest.approx(document["perplexity"], rel=1e-6)
    assert measured["tokens"] == document["tokens_scored"]
    # The trained settings are the model's own again.
    config = AutoModelForCausalLM.from_pretrained(folder).config
    assert (config.mem_len, config.clamp_len, config.same_length) == (8, -1, False)


def test_the_best_of_each_phase_is_kept(acdc: Any, texts: dict[str, Path]) -> None:
    folder, document = acdc
    evaluations = document["evaluations"]
    assert [each["phase"] for each in evaluations] == ["dense", "sparse", "dense", "sparse"]
    assert [each["sparsity"] > 0.7 for each in evaluations] == [False, True, False, True]
    stream = Vocabulary.load(folder / "vocabulary.txt").encode(texts["validation"].read_text().splitlines())
    for phase in ("dense", "sparse"):
        best = min((each for each in evaluations if each["phase"] == phase), key=lambda each: each["perplexity"])
        twin = document["twins"][phase]
        assert (twin["epoch"], twin["perplexity"]) == (best["epoch"], best["perplexity"])
        assert checkpoints.read_run(folder / f"best_{phase}")["step"] == best["step"]
        model = AutoModelForCausalLM.from_pretrained(folder / f"best_{phase}" / "pretrained")
        found = segment_perplexity(model, stream, tgt_len=8, batch_size=2)
        assert found.perplexity == pytest.approx(best["perplexity"], rel=1e-5)
    assert document["twins"]["dense"]["test"]["settings"] == document["perplexity_settings"]


def test_the_dense_twin_is_fine_tuned_without_masks(acdc: Any, language: Any, tmp_path: Path) -> None:
    folder, document = acdc
    first = document["twins"]["dense"]["step"]
    assert first < 60
    options = ("--method=dense", "--num_train_epochs=4", "--save_twins", "--checkpointing_steps=epoch")
    tuned = language.train(tmp_path, *options, f"--resume_from_checkpoint={folder / 'best_dense'}")
    # It went on from the twin's step: what is before is the record of the first run.
    before = [row for row in document["history"] if row["step"] <= first]
    assert tuned["history"][: len(before)] == before and tuned["history"][len(before)]["step"] > first
    assert tuned["method"] == "dense" and tuned["steps"] == 60
    after = [each for each in tuned["evaluations"] if each["step"] > first]
    assert after and all(each["phase"] == "dense" and each["sparsity"] < 0.01 for each in after)
    # The twin that is kept is of this run, not what it went on from.
    assert set(tuned["twins"]) == {"dense"} and tuned["twins"]["dense"]["step"] > first
    # The schedule goes on where it was, to its end.
    assert [row["step"] for row in tuned["history"]][-1] == 60
    assert tuned["history"][-1]["learning_rate"] == pytest.approx(document["history"][-1]["learning_rate"])


def test_the_cosine_warms_up_and_ends_where_it_is_told(language: Any, tmp_path: Path) -> None:
    options = ("--method=dense", "--max_train_steps=12", "--num_warmup_steps=4", "--min_learning_rate=0.001")
    document = language.train(tmp_path, *options, "--logging_steps=1", "--optim=lamb")
    rates = [row["learning_rate"] for row in document["history"]]
    # The rate of the step to come: 0.01 k / 4, then 0.001 + 0.009 (1 + cos(pi (k - 4) / 8)) / 2.
    assert rates[:4] == pytest.approx([0.0025, 0.005, 0.0075, 0.01])
    assert rates[7] == pytest.approx(0.0055) and rates[11] == pytest.approx(0.001)
    assert document["arguments"]["optim"] == "lamb" and document["arguments"]["max_grad_norm"] == 0.25


@pytest.mark.parametrize(
    "options",
    [
        ("--method=autosparse", '--method_args={"threshold_init": -3}'),
        ("--method=topkast", "--sparsity=0.8", '--method_args={"backward_sparsity": 0.6}'),
        ("--method=acdc", "--sparsity=0.5", "--pattern=block:8", f"--method_args={SHORT}"),
        ("--method=rigl", "--sparsity=0.5", '--method_args={"update_every": 5}'),
        ("--method=gmp", "--sparsity=0.5", "--pattern=2:4"),
    ],
    ids=["autosparse", "topkast", "acdc in blocks", "rigl", "gmp 2:4"],
)
def test_methods_and_patterns(language: Any, tmp_path: Path, options: tuple[str, ...]) -> None:
    document = language.train(tmp_path, *options, "--num_train_epochs=3")
    assert document["sparsity"] > 0.02
    assert document["evaluations"][-1]["perplexity"] < 26


def test_any_causal_model_trains_on_blocks_of_subwords(language: Any, texts: dict[str, Path], tmp_path: Path) -> None:
    options = ("--preset=gpt2-tiny", "--vocab_size=270", "--batch_size=6", "--method=gmp", "--sparsity=0.5")
    document = language.train(tmp_path / "first", *options, "--max_train_steps=10", "--eval_stride=5")
    assert document["perplexity_settings"] == {"window": 16, "stride": 5, "vocabulary": 270}
    words = sum(len(line.split()) + 1 for line in texts["test"].read_text().splitlines())
    total = document["nll"] * document["tokens_scored"]
    assert document["word_perplexity"] == pytest.approx(math.exp(total / words))
    again = ("--batch_size=6", "--method=dense", "--max_train_steps=4", "--block_size=12")
    tuned = language.train(tmp_path / "second", f"--model_name_or_path={tmp_path / 'first'}", *again)
    assert tuned["evaluations"][-1]["perplexity"] < 270 and tuned["perplexity_settings"]["window"] == 12


def test_a_saved_model_goes_on_or_is_refused(acdc: Any, language: Any, tmp_path: Path) -> None:
    document = language.train(tmp_path, f"--model_name_or_path={acdc[0]}", "--method=dense", "--max_train_steps=3")
    assert (tmp_path / "vocabulary.txt").read_text() == (acdc[0] / "vocabulary.txt").read_text()
    assert document["perplexity_settings"]["mem_len"] == 8

    def refused(model: Path, *options: str) -> str:
        saved = (f"--model_name_or_path={model}", f"--cache_dir={tmp_path / 'cache'}")
        return language.refusal(tmp_path / "out", *saved, "--max_train_steps=2", "--method=dense", *options)

    folder, model = acdc[0], tmp_path / "model"
    shutil.copytree(folder, model, ignore=shutil.ignore_patterns("best_*", "epoch_*", "tokens"))
    vocabulary = Vocabulary.load(folder / "vocabulary.txt")
    Vocabulary([*vocabulary.words, "more"]).save(model / "vocabulary.txt")
    assert f"vocabulary of the model's {len(vocabulary)} types, got {len(vocabulary) + 1}" in refused(model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "d_inner": 64}))
    assert "expected a complete checkpoint, got " in refused(model)
    (tmp_path / "other.txt").write_text("unheard of\n" * 100)
    assert "got 'unheard' in line 1" in refused(folder, f"--test_file={tmp_path}/other.txt")


def test_checkpoints_and_twins_of_another_run_are_refused(acdc: Any, language: Any, tmp_path: Path) -> None:
    folder, _ = acdc
    cache = f"--cache_dir={tmp_path / 'cache'}"
    # A dense method goes on from a dense twin only.
    dense = ("--method=dense", "--num_train_epochs=4", f"--resume_from_checkpoint={folder / 'best_sparse'}")
    assert "expected a checkpoint of a run with" in language.refusal(tmp_path / "out", *dense, cache)
    assert "without twins of an earlier run, got best_sparse" in language.refusal(folder, *ACDC, cache)
    # A run goes on from a checkpoint of its own shape only.
    wider = dataclasses.replace(language.sizes[0][2], d_inner=48)
    other = dataclasses.replace(language, sizes=((language_presets.TRANSFO_XL, "transfoxl-tiny", wider),))
    line = other.refusal(tmp_path / "out", *ACDC, f"--resume_from_checkpoint={folder / 'epoch_1'}", cache)
    assert "expected a checkpoint of this model (transformer.layers" in line
