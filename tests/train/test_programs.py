"""What a finished run leaves behind: its numbers agree with what is saved, and others can load that."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from transformers import AutoModelForImageClassification, AutoModelForSeq2SeqLM

import tritonsparse as ts
from tritonsparse.eval.accuracy import accuracy
from tritonsparse.eval.image_sets import load_images
from tritonsparse.eval.preprocessing import Preprocessing
from tritonsparse.masks.topk import kept_count
from tritonsparse.train import translation as translation_program
from tritonsparse.train.run import results

BOTH = pytest.mark.parametrize("program", ["translation", "images"], indirect=True)
SHARED = {
    "method", "method_fields", "split", "sparsity", "block_sparsity", "exploitable", "flops_convention",
    "method_statistics", "train_flops_fraction", "train_flops", "test_flops_fraction", "steps", "averaged_checkpoints",
    "training_seconds", "epoch_losses", "evaluations", "layers", "history", "arguments", "environment",
}  # fmt: skip
TRANSLATION = {"bleu", "bleu_line", "bleu_signature", "num_beams", "length_penalty"}
IMAGES = {"top1", "top5", "eval_loss", "preprocessing"}
INPUTS = {"input_ids": [[9, 10, 11, 1], [12, 13, 1, 0]], "decoder_input_ids": [[1, 20, 21], [1, 30, 31]]}


@pytest.fixture(scope="module")
def translated(translation: Any, tmp_path_factory: Any) -> Any:
    """AutoSparse for eight steps: T = sigma(-3) = 0.047; the 16 x 16 weights are uniform up to sqrt(6 / 32) = 0.43."""
    options = ("--method_args", '{"threshold_init": -3}', "--max_train_steps", "8", "--report_to", "tensorboard")
    return translation.finished(tmp_path_factory.mktemp("translated"), *options, plots=True)


@pytest.fixture(scope="module")
def classified(images: Any, tmp_path_factory: Any) -> Any:
    """Two epochs under AutoSparse, channels-last, with augmentation and threads."""
    fields = ("--method_args", '{"threshold_init": -2.5, "threshold_weight_decay": 0.01}', "--num_train_epochs=2")
    options = (*fields, "--channels_last", "--augmentation=crop", "--workers=2")
    return images.finished(tmp_path_factory.mktemp("classified"), *options, plots=True)


@pytest.fixture(params=["translated", "classified"])
def finished(request: Any) -> tuple[bool, Any]:
    """Whether it translates, and the run."""
    return request.param == "translated", request.getfixturevalue(request.param)


def test_the_results_agree_with_themselves_and_with_the_zeros_in_the_folder(finished: tuple[bool, Any]) -> None:
    translates, document = finished[0], finished[1].document
    steps = 8 if translates else 20
    assert set(document) == SHARED | (TRANSLATION if translates else IMAGES)
    assert (document["method"], document["split"], document["steps"]) == ("autosparse", "test", steps)
    last, evaluated = document["history"][-1], document["evaluations"][-1]
    assert [row["step"] for row in document["history"]] == list(range(2, steps + 1, 2))
    assert (document["sparsity"], document["train_flops_fraction"]) == (last["sparsity"], last["train_flops_fraction"])
    assert {row["name"]: row["sparsity"] for row in document["layers"]} == last["layer_sparsity"]
    assert (evaluated["step"], evaluated["sparsity"]) == (steps, document["sparsity"])
    assert "output_dir" not in document["arguments"]
    assert 0 < document["test_flops_fraction"] < document["train_flops_fraction"] < 1
    assert document["flops_convention"] == "autosparse" and document["exploitable"] == 0.0
    if translates:
        assert document["num_beams"] == 1 and document["method_fields"]["threshold_init"] == -3.0
        assert document["bleu_signature"].startswith("nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:")
    else:
        # Epochs and the end are evaluated on the same split.
        assert [row["epoch"] for row in document["evaluations"]] == [0, 1]
        assert {key: evaluated[key] for key in ("top1", "top5", "eval_loss")}.items() <= document.items()
        assert document["preprocessing"]["crop"] is None and len(document["preprocessing"]["mean"]) == 1
    translates, folder, document = finished[0], finished[1].folder, finished[1].document
    shared = {"all_results.json", "config.json", "model.safetensors", "tritonsparse.safetensors"}
    plots = {"training.png", "layer_sparsity.png"}
    own = {"generation_config.json", "logs", "tokenizer.json", "tokenizer_config.json"}
    own = own if translates else {"preprocessor_config.json"}
    assert {path.name for path in folder.iterdir()} == shared | plots | own
    assert {(folder / plot).read_bytes()[:8] for plot in plots} == {b"\x89PNG\r\n\x1a\n"}
    saved, layers = load_file(folder / "model.safetensors"), document["layers"]
    zeros = {row["name"]: int((saved[f"{row['name']}.weight"] == 0).sum()) for row in layers}
    assert {row["name"]: row["numel"] - row["kept"] for row in layers} == zeros
    total = sum(row["numel"] for row in layers)
    assert (len(zeros), total) == ((16, 5120) if translates else (8, 2420))
    assert document["sparsity"] == pytest.approx(sum(zeros.values()) / total, abs=1e-12)
    assert sum(zeros.values()) > 300 and not any(key.endswith("threshold") for key in saved)


# A process that cannot import tritonsparse, with the folder of a checkpoint as its first argument.
STRANGER = f"""
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "tritonsparse":
            raise ImportError("tritonsparse is blocked")
sys.meta_path.insert(0, Blocked())
import torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer
model = AutoModelForSeq2SeqLM.from_pretrained(sys.argv[1]).eval()
assert {{type(m).__module__.split(".")[0] for m in model.modules()}} == {{"torch", "transformers"}}
inputs = {{key: torch.tensor(value) for key, value in {INPUTS!r}.items()}}
with torch.no_grad():
    torch.save(model(**inputs).logits, sys.argv[2])
print(AutoTokenizer.from_pretrained(sys.argv[1])("Die Zahl ist 18,28.")["input_ids"])
"""


@torch.no_grad()
def test_a_process_without_this_package_gets_the_logits_of_the_trained_model(translated: Any, tmp_path: Path) -> None:
    inputs = {key: torch.tensor(value) for key, value in INPUTS.items()}
    sparsifier = translated.run.loop.sparsifier
    expected = sparsifier.model.eval()(**inputs).logits
    command = [sys.executable, "-c", STRANGER, str(translated.folder), str(tmp_path / "logits.pt")]
    offline = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=offline, timeout=600)
    assert done.returncode == 0, done.stderr
    # To rounding: where a process lays its tensors out in memory may change the order a CPU library adds in.
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), expected, rtol=1e-5, atol=1e-5)
    assert json.loads(done.stdout) == translated.run.tokenizer("Die Zahl ist 18,28.")["input_ids"]
    assert f"BLEU on test (1 beams): {translated.document['bleu']:.2f}" in translated.out
    reloaded, _ = ts.load(translated.folder, AutoModelForSeq2SeqLM)
    torch.testing.assert_close(reloaded.eval()(**inputs).logits, expected, rtol=1e-5, atol=1e-5)
    stock = load_file(translated.folder / "model.safetensors")
    for name, layer in sparsifier.layers.items():
        assert torch.equal(stock[f"{name}.weight"], layer.effective_weight()), name


def test_others_get_the_accuracy_reported(classified: Any) -> None:
    folder, document = classified.folder, classified.document
    tests, preprocessing = load_images("embedded")["test"].subset(torch.arange(60)), Preprocessing.load(folder)
    found = accuracy(AutoModelForImageClassification.from_pretrained(folder), tests, preprocessing)
    assert (found.top1, found.top5, found.images) == (document["top1"], document["top5"], 60)
    again, _ = ts.load(folder, AutoModelForImageClassification)
    assert accuracy(again, tests, preprocessing).top1 == document["top1"]
    assert f"test: top-1 {found.top1:.2%}, top-5 {found.top5:.2%}" in classified.out and "of dense" in classified.out


def test_the_tracker_gets_loss_sparsity_alpha_thresholds_and_flops(translated: Any) -> None:
    (file,) = (translated.folder / "logs").rglob("events.out.tfevents.*.0")
    events = EventAccumulator(str(file)).Reload()
    tags = set(events.Tags()["scalars"])
    names = [row["name"] for row in translated.document["layers"]]
    assert {"loss", "sparsity", "alpha", "train_flops_fraction", "learning_rate", "eval_bleu"} <= tags
    assert {f"{group}/{name}" for group in ("thresholds", "layer_sparsity") for name in names} <= tags
    for tag in ("loss", "sparsity", "alpha", "train_flops_fraction"):
        logged = [(event.step, event.value) for event in events.Scalars(tag)]
        assert logged == [(row["step"], pytest.approx(row[tag])) for row in translated.document["history"]]


@BOTH
def test_gmp_ends_at_the_sparsity_asked_for_to_one_element(program: Any, tmp_path: Path) -> None:
    adamw = ("--optimizer=adamw", "--learning_rate=0.001") if "--preset=tiny" in program.from_scratch else ()
    fields = ("--method=gmp", "--sparsity=0.8", '--method_args={"update_every": 2}')
    document = program.train(tmp_path, *fields, "--max_train_steps=4", *adamw)
    assert [row["kept"] for row in document["layers"]] == [kept_count(row["numel"], 0.8) for row in document["layers"]]
    assert document["sparsity"] == document["history"][-1]["sparsity"] == pytest.approx(0.8, abs=2e-3)


@BOTH
def test_bfloat16_trains_and_keeps_masters_in_float32(program: Any, tmp_path: Path) -> None:
    larger = () if "--preset=tiny" in program.from_scratch else ("--max_tokens_per_batch=1600",)
    document = program.train(tmp_path, "--mixed_precision=bf16", "--max_train_steps=8", *larger)
    assert document["environment"]["mixed_precision"] == "bf16"
    assert document["history"][-1]["loss"] < document["history"][0]["loss"]
    tensors = load_file(tmp_path / "model.safetensors").values()
    assert {tensor.dtype for tensor in tensors if tensor.is_floating_point()} == {torch.float32}


@BOTH
def test_a_saved_model_is_trained_on(program: Any, saved_marian: Callable[[float], Path], tmp_path: Path) -> None:
    saved = tmp_path / "saved"
    if "--preset=tiny" in program.from_scratch:
        program.sizes[0][2](num_channels=1, image_size=8).save_pretrained(saved)
    else:
        saved = saved_marian(0.1)
    options = ("--method=dense", "--max_train_steps=1", "--learning_rate=0")
    program.train(tmp_path / "out", f"--model_name_or_path={saved}", *options)
    before, after = (load_file(folder / "model.safetensors") for folder in (saved, tmp_path / "out"))
    assert before.keys() == after.keys()
    # Norms count what they see whatever the learning rate.
    assert all(torch.equal(before[key], after[key]) for key in before if "running" not in key and "batches" not in key)


DOCUMENT = {
    "train_flops_fraction": 0.75, "test_flops_fraction": 0.5, "split": "test", "num_beams": 4, "bleu": 12.345,
    "bleu_line": "BLEU|... = 12.3", "bleu_signature": "nrefs:1|tok:13a", "flops_convention": "autosparse",
}  # fmt: skip


def test_results_are_replaced_as_a_whole(tmp_path: Path, monkeypatch: Any) -> None:
    path = tmp_path / "all_results.json"
    results.write({"bleu": 1.0}, path)
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    for value, error in ((object(), TypeError), (2.0, OSError)):
        with pytest.raises(error):
            results.write({"bleu": value}, path)
        assert json.loads(path.read_text(encoding="utf-8")) == {"bleu": 1.0}


def test_the_environment_says_on_what_and_with_what_the_run_was_made(tmp_path: Path, monkeypatch: Any) -> None:
    found = results.environment(Accelerator(cpu=True))
    assert set(found) == {
        "device", "cpu_threads", "processes", "mixed_precision", "python", "torch", "transformers", "accelerate",
        "commit",
    }  # fmt: skip
    assert (found["processes"], found["mixed_precision"]) == (1, "no") and found["device"] and json.dumps(found)
    # A copy outside a git checkout has no commit.
    monkeypatch.setattr(ts, "__file__", str(tmp_path / "tritonsparse" / "__init__.py"))
    assert results.environment(Accelerator(cpu=True))["commit"] is None


def test_the_summary_shows_translations_spread_over_the_set_and_the_costs(capsys: Any, tmp_path: Path) -> None:
    layers = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    report = ts.sparsify(layers, "gmp", sparsity=0.5, total_steps=4).report()
    for count, shown in {10: [0, 2, 4, 6, 8], 5: [0, 1, 2, 3, 4], 3: [0, 1, 2]}.items():
        pairs = [(f"source-{number}.", f"reference-{number}.") for number in range(count)]
        hypotheses = [f"hypothesis-{number}." for number in range(count)]
        translation_program.show(DOCUMENT, report, pairs, hypotheses, tmp_path)
        out = capsys.readouterr().out
        for kind in ("source", "reference", "hypothesis"):
            found = [line.split()[-1] for line in out.splitlines() if f" {kind}-" in line]
            assert found == [f"{kind}-{number}." for number in shown]
    assert "BLEU on test (4 beams): 12.35" in out or "BLEU on test (4 beams): 12.34" in out
    for words in (
        str(report), "signature: nrefs:1|tok:13a", str(tmp_path),
        "FLOPs by the convention 'autosparse' (linear and convolution layers): ",
        "training 75.0% of dense (25.0% saved), inference 50.0% of dense (50.0% saved)",
    ):  # fmt: skip
        assert words in out


def test_reference_losses_are_those_of_the_first_tenth_of_a_dense_run(tmp_path: Path) -> None:
    def read(content: str) -> list[float]:
        (tmp_path / "all_results.json").write_text(content, encoding="utf-8")
        return results.read_epoch_losses(str(tmp_path / "all_results.json"))

    for epochs, count in {1: 1, 4: 1, 10: 1, 11: 2, 44: 5}.items():
        losses = [1.0 / (1 + epoch) for epoch in range(epochs)]
        assert read(json.dumps({"method": "dense", "epoch_losses": losses})) == losses[:count]
    none = "auto_tune: expected all_results.json of a run with --method dense, got .*; run the dense model first"
    for content, words in (
        ("{", none),
        ('{"method": "dense", "bleu": 1.0}', none),
        ('{"method": "gmp", "epoch_losses": [1.0]}', "a run with --method dense, got one of 'gmp'"),
        ('{"method": "dense", "epoch_losses": []}', "got none; the dense run ended within an epoch"),
    ):
        with pytest.raises(ValueError, match=words):
            read(content)
    with pytest.raises(ValueError, match=none):
        results.read_epoch_losses(str(tmp_path / "nowhere.json"))
