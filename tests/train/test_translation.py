"""The translation program end to end: what it writes, that it is what was trained, and that others can load it."""

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
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForSeq2SeqLM

import tritonsparse as ts
from tritonsparse.masks.topk import kept_count
from tritonsparse.train import translation
from tritonsparse.train.run import checkpoints
from tritonsparse.train.text import translation_presets as presets

Train = Callable[..., dict[str, Any]]
SOFT = '{"threshold_init": -3}'  # T = sigma(-3) = 0.047; the 16 x 16 weights are uniform up to sqrt(6 / 32) = 0.43
INPUTS = {"input_ids": [[9, 10, 11, 1], [12, 13, 1, 0]], "decoder_input_ids": [[1, 20, 21], [1, 30, 31]]}
KEYS = {
    "method", "method_fields", "bleu", "bleu_line", "bleu_signature", "split", "num_beams", "length_penalty",
    "sparsity", "block_sparsity", "exploitable", "flops_convention", "method_statistics",
    "train_flops_fraction", "train_flops", "test_flops_fraction", "steps", "averaged_checkpoints",
    "training_seconds", "epoch_losses", "evaluations", "layers", "history", "arguments", "environment",
}  # fmt: skip

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


@pytest.fixture(scope="module")
def sparse(train: Train, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], translation.Run]:
    """A whole run under AutoSparse with plots and a tracker: its folder, its results, and the run itself."""
    folder = tmp_path_factory.mktemp("sparse")
    runs: list[translation.Run] = []
    finish = translation.finish
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(translation, "finish", lambda run: (runs.append(run), finish(run)))
        options = ("--method_args", SOFT, "--max_train_steps", "8", "--report_to", "tensorboard")
        return folder, train(folder, *options, plots=True), runs[0]


@pytest.fixture(scope="module")
def dense(train: Train, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Two whole epochs of the dense model."""
    folder = tmp_path_factory.mktemp("dense")
    return folder, train(
        folder, "--method=dense", "--max_tokens_per_batch=1600", "--num_train_epochs=2",
        f"--record_reference_losses={folder}/reference/losses.json",
    )  # fmt: skip


def test_the_results_file_has_these_keys(sparse: Any) -> None:
    _, document, _ = sparse
    assert set(document) == KEYS
    assert (document["method"], document["split"], document["num_beams"], document["steps"]) == (
        "autosparse",
        "test",
        1,
        8,
    )
    assert document["method_fields"]["threshold_init"] == -3.0
    assert document["bleu_signature"].startswith("nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:")
    assert [row["step"] for row in document["history"]] == [2, 4, 6, 8]
    assert len(document["layers"]) == 16
    assert document["evaluations"][-1]["step"] == 8
    assert "output_dir" not in document["arguments"]
    assert 0 < document["test_flops_fraction"] < document["train_flops_fraction"] < 1
    assert document["flops_convention"] == "autosparse" and document["exploitable"] == 0.0


def test_the_figures_at_the_end_agree_with_the_last_row_of_the_record(sparse: Any) -> None:
    _, document, _ = sparse
    last = document["history"][-1]
    for key in ("sparsity", "train_flops_fraction"):
        assert document[key] == last[key]
    assert {row["name"]: row["sparsity"] for row in document["layers"]} == last["layer_sparsity"]
    assert document["evaluations"][-1]["sparsity"] == document["sparsity"]


def test_the_folder_holds_checkpoint_sidecar_plots_and_no_leftovers(sparse: Any) -> None:
    folder, _, _ = sparse
    assert {path.name for path in folder.iterdir()} == {
        "all_results.json", "config.json", "generation_config.json", "layer_sparsity.png", "logs", "model.safetensors",
        "tokenizer.json", "tokenizer_config.json", "training.png", "tritonsparse.safetensors",
    }  # fmt: skip
    for name in ("training.png", "layer_sparsity.png"):
        assert (folder / name).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_the_exact_zeros_on_disk_are_the_reported_sparsity(sparse: Any) -> None:
    folder, document, _ = sparse
    saved = load_file(folder / "model.safetensors")
    zeros = {row["name"]: int((saved[f"{row['name']}.weight"] == 0).sum()) for row in document["layers"]}
    assert {row["name"]: row["numel"] - row["kept"] for row in document["layers"]} == zeros
    assert document["sparsity"] == pytest.approx(sum(zeros.values()) / 5120, abs=1e-12)
    assert sum(zeros.values()) > 500
    assert not any(name.endswith("threshold") for name in saved)


def test_a_process_without_this_package_gets_the_logits_of_the_trained_model(sparse: Any, tmp_path: Path) -> None:
    folder, _, run = sparse
    model = run.loop.sparsifier.model.eval()
    with torch.no_grad():
        expected = model(**{key: torch.tensor(value) for key, value in INPUTS.items()}).logits
    command = [sys.executable, "-c", STRANGER, str(folder), str(tmp_path / "logits.pt")]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"}, timeout=600
    )
    assert done.returncode == 0, done.stderr
    # To rounding: where a process lays its tensors out in memory may change the order a CPU library adds in.
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), expected, rtol=1e-5, atol=1e-5)
    assert json.loads(done.stdout) == run.tokenizer("Die Zahl ist 18,28.")["input_ids"]
    reloaded, _ = ts.load(folder, AutoModelForSeq2SeqLM)
    with torch.no_grad():
        again = reloaded.eval()(**{key: torch.tensor(value) for key, value in INPUTS.items()}).logits
    torch.testing.assert_close(again, expected, rtol=1e-5, atol=1e-5)
    stock = load_file(folder / "model.safetensors")
    for name, layer in run.loop.sparsifier.layers.items():
        assert torch.equal(stock[f"{name}.weight"], layer.effective_weight()), name


def test_the_tracker_gets_loss_sparsity_alpha_thresholds_and_flops(sparse: Any) -> None:
    folder, document, _ = sparse
    (file,) = (folder / "logs").rglob("events.out.tfevents.*.0")
    events = EventAccumulator(str(file)).Reload()
    tags = set(events.Tags()["scalars"])
    names = [row["name"] for row in document["layers"]]
    assert {"loss", "sparsity", "alpha", "train_flops_fraction", "learning_rate", "eval_bleu"} <= tags
    assert {f"{group}/{name}" for group in ("thresholds", "layer_sparsity") for name in names} <= tags
    for tag in ("loss", "sparsity", "alpha", "train_flops_fraction"):
        logged = [(event.step, event.value) for event in events.Scalars(tag)]
        assert logged == [(row["step"], pytest.approx(row[tag])) for row in document["history"]]


def test_dense_has_no_zeros_and_records_a_loss_an_epoch(dense: Any) -> None:
    _, document = dense
    assert (document["sparsity"], document["train_flops_fraction"], document["test_flops_fraction"]) == (0.0, 1.0, 1.0)
    assert len(document["epoch_losses"]) == len(document["evaluations"]) == 2
    assert document["epoch_losses"][1] < document["epoch_losses"][0]
    assert "thresholds" not in document["history"][-1]


def test_auto_tuning_takes_its_reference_from_a_dense_run(train: Train, dense: Any, tmp_path: Path) -> None:
    folder, reference = dense
    document = train(
        tmp_path, "--auto_tune", str(folder / "reference" / "losses.json"), "--max_tokens_per_batch=1600",
        "--num_train_epochs=2", "--logging_steps=1",
    )  # fmt: skip
    tune = document["method_fields"]["auto_tune"]
    assert tune["reference_losses"] == reference["epoch_losses"][:1]
    # Algorithm 1: alpha_0 in the epoch that is compared, then 5 % more or 0.5 % less.
    worse = document["epoch_losses"][0] > 1.01 * tune["reference_losses"][0]
    per_epoch = document["steps"] // 2
    alphas = [row["alpha"] for row in document["history"]]
    assert alphas[: per_epoch - 1] == [0.5] * (per_epoch - 1)
    assert alphas[per_epoch:-1] == [pytest.approx(0.5 * (1.05 if worse else 0.995))] * (per_epoch - 1)


def test_gmp_ends_at_the_sparsity_asked_for_to_one_element(train: Train, tmp_path: Path) -> None:
    document = train(tmp_path, "--method=gmp", "--sparsity=0.8", "--max_train_steps=4")
    assert {row["name"]: row["kept"] for row in document["layers"]} == {
        row["name"]: kept_count(row["numel"], 0.8) for row in document["layers"]
    }
    assert document["sparsity"] == pytest.approx(0.8, abs=2e-3)
    assert document["history"][-1]["sparsity"] == document["sparsity"]


def test_str_runs_with_alpha_zero(train: Train, tmp_path: Path) -> None:
    document = train(tmp_path, "--method=str", "--method_args", SOFT, "--max_train_steps=2")
    assert document["sparsity"] > 0.05
    assert {row["alpha"] for row in document["history"]} == {0.0}


def test_a_run_is_costed_by_the_convention_it_names(train: Train, tmp_path: Path) -> None:
    options = ("--method=str", "--method_args", SOFT, "--max_train_steps=2", "--flops_convention=swat")
    document = train(tmp_path, *options)
    assert document["flops_convention"] == "swat"
    spent = document["train_flops"]
    assert (spent["unit"], spent["steps"]) == ("multiply-adds", 2)
    for row in document["layers"]:
        # counted once, after the second step: both steps cost what the last did; by SWAT dW sees half of the input
        half = {"forward": 2 * row["macs_kept"], "grad_input": 2 * row["macs_kept"], "grad_weight": row["macs"]}
        assert spent["layers"][row["name"]] == pytest.approx(half)
    dense = 3 * sum(layer["grad_weight"] * (1 if name == "lm_head" else 2) for name, layer in spent["layers"].items())
    total = sum(spent[name] for name in ("forward", "grad_input", "grad_weight"))
    assert document["train_flops_fraction"] == pytest.approx(total / dense)


def test_bfloat16_trains_and_keeps_masters_in_float32(train: Train, tmp_path: Path) -> None:
    document = train(tmp_path, "--mixed_precision=bf16", "--max_train_steps=6", "--max_tokens_per_batch=1600")
    assert document["environment"]["mixed_precision"] == "bf16"
    assert document["history"][-1]["loss"] < document["history"][0]["loss"]
    assert {tensor.dtype for tensor in load_file(tmp_path / "model.safetensors").values()} == {torch.float32}


def test_the_last_checkpoints_are_averaged_as_masters_and_thresholds(train: Train, tmp_path: Path) -> None:
    options = ("--checkpointing_steps=2", "--average_checkpoints=2", "--checkpoints_total_limit=2")
    document = train(tmp_path, "--method_args", SOFT, "--max_train_steps=6", *options)
    assert document["averaged_checkpoints"] == ["step_4", "step_6"]
    mean = checkpoints.average_weights([tmp_path / "step_4", tmp_path / "step_6"])
    sidecar, name = load_file(tmp_path / "tritonsparse.safetensors"), document["layers"][0]["name"]
    assert torch.equal(sidecar[f"master.{name}"], mean[f"{name}.weight"])
    assert torch.equal(sidecar[f"threshold.{name}"], mean[f"{name}.threshold"])
    # Half of the supports' intersection would be lost by averaging what the views show.
    assert document["sparsity"] > 0.05


def test_a_saved_model_is_trained_on(train: Train, saved_marian: Any, tmp_path: Path) -> None:
    folder = saved_marian(0.1)
    options = ("--model_name_or_path", str(folder), "--method=dense", "--max_train_steps=1", "--learning_rate=0")
    train(tmp_path, *options)
    before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_the_sinusoids_of_a_saved_model_stay_constant(saved_marian: Any) -> None:
    """transformers gives them back as trainable, and two processes would wait for their gradients."""
    _, model = presets.load_model(str(saved_marian(0.1)))
    constant = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert constant == {"model.encoder.embed_positions.weight", "model.decoder.embed_positions.weight"}


def test_what_the_run_prints_is_for_people(train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    document = train(tmp_path, "--max_train_steps=1", "--method_args", SOFT)
    out = capsys.readouterr().out
    assert out.count("  translation ") == 4  # as many as --max_test_samples, five at most
    assert f"BLEU on test (1 beams): {document['bleu']:.2f}" in out
    assert document["bleu_signature"] in out
    assert "model.decoder.layers.0.fc2" in out
    assert "of dense" in out


def test_acdc_is_evaluated_as_the_twin_that_each_epoch_trained(train: Train, tmp_path: Path) -> None:
    phases = {"starts": [[0, "dense"], [1, "sparse"], [2, "dense"], [3, "sparse"]], "epochs": 4}
    document = train(
        tmp_path, "--method=acdc", "--sparsity=0.8", f"--method_args={json.dumps({'phases': phases})}",
        "--max_tokens_per_batch=1600", "--num_train_epochs=4",
    )  # fmt: skip
    found = [round(evaluation["sparsity"], 2) for evaluation in document["evaluations"]]
    # What the sparse phase left at 0 may still be so after the dense one.
    assert found[0] == 0.0 and found[1] == 0.8 and found[2] < 0.1 and found[3] == 0.8
    assert round(document["sparsity"], 2) == 0.8
    # Half of the steps were dense, the others cost what inference does.
    assert document["train_flops_fraction"] == pytest.approx((1 + document["test_flops_fraction"]) / 2, abs=0.005)
