"""`transformers.Trainer` with the callback: attached, logged, saved, resumed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import Build, assert_same
from transformers import Trainer, TrainingArguments

import tritonsparse as ts
from tritonsparse.methods import GMP, AutoSparse, RigL

METHODS = {
    "autosparse": AutoSparse(threshold_init=-3.5, alpha=0.5, alpha_schedule="linear", threshold_weight_decay=0.1),
    "gmp": GMP(sparsity=0.75, update_every=1, end=1.0),
}
# 8 examples in batches of 2: 4 steps an epoch, 2 epochs.
DATA = [{"input_ids": (ids := torch.randint(2, 30, (6,))), "labels": ids} for _ in range(8)]


def trainer(
    model: Any, method: Any, folder: Path, groups: Callable[[ts.Sparsifier], Any] | None = None, **options: Any
) -> tuple[Trainer, ts.Sparsifier]:
    compact = options.pop("compact", False)
    sparsifier = ts.sparsify(model, method, total_steps=8, steps_per_epoch=4, **options)
    chosen = groups(sparsifier) if groups else sparsifier.param_groups(weight_decay=0.01)
    arguments = TrainingArguments(
        str(folder), num_train_epochs=2, per_device_train_batch_size=2, logging_steps=1, save_steps=5,
        report_to="none", use_cpu=True, disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    optimizer = torch.optim.AdamW(chosen, lr=0.01)
    callback = ts.SparsityCallback(sparsifier, compact=compact)
    return Trainer(model, arguments, train_dataset=DATA, callbacks=[callback], optimizers=(optimizer, None)), sparsifier


def logged(run: Trainer) -> list[dict[str, Any]]:
    return [entry for entry in run.state.log_history if "loss" in entry]


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_resumed_from_a_checkpoint_it_ends_where_the_unbroken_run_ends_and_logs_what_it_did(
    gpt2: Build, tmp_path: Path, method: Any
) -> None:
    unbroken, first = trainer(gpt2(), method, tmp_path)
    unbroken.train()
    assert first.step == 8
    folder = tmp_path / "checkpoint-5"
    assert (folder / "tritonsparse.safetensors").is_file()
    resumed, second = trainer(gpt2(seed=7), method, tmp_path)
    resumed.train(resume_from_checkpoint=str(folder))
    assert second.step == 8
    assert_same([resumed.model.state_dict(), second.state_dict()["tensors"]],
                [unbroken.model.state_dict(), first.state_dict()["tensors"]])  # fmt: skip
    logs = logged(unbroken)
    assert len(logs) == 8
    sparsities = [entry["sparsity"] for entry in logs]
    if method.name == "gmp":
        assert all("alpha" not in entry and "threshold" not in entry for entry in logs)
        assert sparsities == sorted(sparsities) and sparsities[-1] == 0.75
        return
    # The log of step n is written after it, when alpha is that of step n + 1: .5 (1 - epoch/2)
    assert [entry["alpha"] for entry in logs] == [0.5] * 3 + [0.25] * 4 + [0.0]
    assert sparsities[-1] == pytest.approx(first.sparsity(), abs=1e-12)
    thresholds = [torch.sigmoid(layer.threshold).item() for layer in first.layers.values()]
    assert logs[-1]["threshold"] == pytest.approx(sum(thresholds) / len(thresholds))
    assert logs[-1]["threshold"] != logs[0]["threshold"]


def test_packed_blocks_are_saved_as_dense_weights_and_resumed_from_them(gpt2: Build, tmp_path: Path) -> None:
    runs = []
    for seed, options in ((0, {}), (7, {"resume_from_checkpoint": str(tmp_path / "checkpoint-5")})):
        method = RigL(sparsity=0.75, update_every=3)
        run, sparsifier = trainer(gpt2(seed=seed), method, tmp_path, pattern="block:8", compact=True)
        run.train(**options)
        assert sparsifier.step == 8 and all(layer.compacted for layer in sparsifier.layers.values())
        sparsifier.expand()
        runs.append({**run.model.state_dict()})
    assert_same(runs[1], runs[0])
    stock = type(gpt2()).from_pretrained(tmp_path / "checkpoint-8").state_dict()
    finalized = {key: value for key, value in runs[0].items() if not key.endswith(".mask")}
    assert_same({key: stock[key] for key in finalized}, finalized)


def test_losses_are_observed_for_every_epoch(gpt2: Build, tmp_path: Path) -> None:
    run, sparsifier = trainer(gpt2(), "dense", tmp_path)
    run.train()
    losses = [entry["loss"] for entry in logged(run)]
    # The Trainer logs a step's loss after the step: an epoch's mean lacks its last loss and has the one before it.
    assert sparsifier.epoch_losses == pytest.approx([sum(losses[:3]) / 3, sum(losses[3:7]) / 4], rel=1e-5)


@pytest.mark.parametrize("own", [False, True], ids=["the user's", "the Trainer's own"])
def test_an_optimizer_with_thresholds_among_the_weights_is_refused_when_training_begins(
    gpt2: Build, tmp_path: Path, own: bool
) -> None:
    run, _ = trainer(gpt2(), METHODS["autosparse"], tmp_path, lambda sparsifier: sparsifier.model.parameters())
    if own:
        run.optimizer = None
    with pytest.raises(ValueError, match=r"got .*\.threshold in group \d.*build the optimizer from sparsifier"):
        run.train()
