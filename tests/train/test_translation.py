"""The translation program: what its options do to a run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForSeq2SeqLM

from tritonsparse.train.run import checkpoints
from tritonsparse.train.text import translation_presets

SOFT = ("--method_args", '{"threshold_init": -3}')


def test_auto_tuning_takes_its_reference_from_a_dense_run(translation: Any, tmp_path: Path) -> None:
    losses, epochs = tmp_path / "reference" / "losses.json", ("--max_tokens_per_batch=1600", "--num_train_epochs=2")
    dense = translation.train(tmp_path / "dense", "--method=dense", *epochs, f"--record_reference_losses={losses}")
    assert (dense["sparsity"], dense["train_flops_fraction"], dense["test_flops_fraction"]) == (0.0, 1.0, 1.0)
    assert len(dense["epoch_losses"]) == len(dense["evaluations"]) == 2
    assert dense["epoch_losses"][1] < dense["epoch_losses"][0] and "thresholds" not in dense["history"][-1]
    document = translation.train(tmp_path / "tuned", f"--auto_tune={losses}", *epochs, "--logging_steps=1")
    tune = document["method_fields"]["auto_tune"]
    assert tune["reference_losses"] == dense["epoch_losses"][:1]
    # Algorithm 1: alpha_0 in the epoch that is compared, then 5 % more or 0.5 % less.
    worse = document["epoch_losses"][0] > 1.01 * tune["reference_losses"][0]
    per_epoch = document["steps"] // 2
    alphas = [row["alpha"] for row in document["history"]]
    assert alphas[: per_epoch - 1] == [0.5] * (per_epoch - 1)
    assert alphas[per_epoch:-1] == [pytest.approx(0.5 * (1.05 if worse else 0.995))] * (per_epoch - 1)


def test_str_runs_with_alpha_zero_and_is_costed_by_the_convention_it_names(translation: Any, tmp_path: Path) -> None:
    document = translation.train(tmp_path, "--method=str", *SOFT, "--max_train_steps=2", "--flops_convention=swat")
    assert document["sparsity"] > 0.05
    assert {row["alpha"] for row in document["history"]} == {0.0}
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


def test_the_last_checkpoints_are_averaged_as_masters_and_thresholds(translation: Any, tmp_path: Path) -> None:
    options = ("--checkpointing_steps=2", "--average_checkpoints=2", "--checkpoints_total_limit=2")
    document = translation.train(tmp_path, *SOFT, "--max_train_steps=6", *options)
    assert document["averaged_checkpoints"] == ["step_4", "step_6"]
    mean = checkpoints.average_weights([tmp_path / "step_4", tmp_path / "step_6"])
    sidecar, name = load_file(tmp_path / "tritonsparse.safetensors"), document["layers"][0]["name"]
    assert torch.equal(sidecar[f"master.{name}"], mean[f"{name}.weight"])
    assert torch.equal(sidecar[f"threshold.{name}"], mean[f"{name}.threshold"])
    # Half of the supports' intersection would be lost by averaging what the views show.
    assert document["sparsity"] > 0.05


def test_the_sinusoids_of_a_saved_model_stay_constant(saved_marian: Callable[[float], Path]) -> None:
    """transformers gives them back as trainable, and two processes would wait for their gradients."""
    _, model = translation_presets.load_model(str(saved_marian(0.1)))
    constant = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert constant == {"model.encoder.embed_positions.weight", "model.decoder.embed_positions.weight"}


def test_acdc_is_evaluated_as_the_twin_that_each_epoch_trained_and_keeps_both(translation: Any, tmp_path: Path) -> None:
    document = translation.train(
        tmp_path, "--method=acdc", "--sparsity=0.8", "--num_train_epochs=2", "--max_tokens_per_batch=1600",
        '--method_args={"phases": {"starts": [[0, "dense"], [1, "sparse"]], "epochs": 2}}', "--save_twins",
    )  # fmt: skip
    found = [(each["phase"], round(each["sparsity"], 2)) for each in document["evaluations"]]
    assert found == [("dense", 0.0), ("sparse", 0.8)] and round(document["sparsity"], 2) == 0.8
    # Half of the steps were dense, the others cost what inference does.
    assert document["train_flops_fraction"] == pytest.approx((1 + document["test_flops_fraction"]) / 2, abs=0.005)
    zeros = {}
    for phase in ("dense", "sparse"):
        folder = tmp_path / f"best_{phase}"
        assert checkpoints.read_run(folder)["evaluations"][-1]["phase"] == phase
        model = AutoModelForSeq2SeqLM.from_pretrained(folder / "pretrained").model
        weights = [module.weight for module in model.modules() if type(module) is nn.Linear]
        zeros[phase] = sum(int((weight == 0).sum()) for weight in weights) / sum(weight.numel() for weight in weights)
    assert zeros["sparse"] == pytest.approx(document["sparsity"], abs=1e-3) and zeros["dense"] < 0.01
    final, best = (load_file(folder / "model.safetensors") for folder in (tmp_path, folder / "pretrained"))
    assert all(torch.equal(final[name], best[name]) for name in best)
