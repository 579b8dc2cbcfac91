"""The loop: a loss a token, whatever the micro-batches; complete records; no step on a broken loss."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

import tritonsparse as ts
from tritonsparse.flops import TrainingMeter
from tritonsparse.layers import SparseLayer
from tritonsparse.methods import GMP, STR, AutoSparse
from tritonsparse.train.run.loop import Loop, Settings

DATA = torch.Generator().manual_seed(1)
INPUTS, TARGETS = torch.randn(24, 8, generator=DATA), torch.randn(24, 4, generator=DATA)


@dataclass
class Rows:
    """Rows of the data above; each counts as one token."""

    indices: list[int]

    @property
    def weight(self) -> int:
        return len(self.indices)


@dataclass
class Steps:
    """The same steps every epoch."""

    steps: list[list[Rows]]

    @property
    def steps_per_epoch(self) -> int:
        return len(self.steps)

    def step_batches(self, epoch: int, step: int) -> list[Rows]:
        return self.steps[step]


def split(*sizes: int) -> list[Rows]:
    starts = [sum(sizes[:number]) for number in range(len(sizes))]
    return [Rows(list(range(start, start + size))) for start, size in zip(starts, sizes, strict=True)]


def squared_error(model: nn.Module, rows: Rows) -> Tensor:
    return ((model(INPUTS[rows.indices]) - TARGETS[rows.indices]) ** 2).sum()


Make = Callable[..., Loop]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """A run on 8 -> 16 -> 4: "0" has 128 weights, "2" has 64."""

    def build(steps: list[list[Rows]], method: Any = "dense", total: int = 4, lr: float = 0.05, **changes: Any) -> Loop:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
        sparsifier = ts.sparsify(model, method, total_steps=total, steps_per_epoch=len(steps))
        optimizer = torch.optim.SGD(sparsifier.param_groups(lr=lr))
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        accelerator = Accelerator(cpu=True)
        prepared, wrapped = accelerator.prepare(model, optimizer)
        sparsifier.attach(wrapped)
        sparsifier.register(accelerator)
        options = {"max_grad_norm": 0.0, "logging_steps": 1, "checkpointing_steps": None} | changes
        settings = Settings(tmp_path, total, checkpoints_total_limit=None, configuration={}, **options)
        return Loop(
            accelerator, prepared, wrapped, scheduler, sparsifier, TrainingMeter(sparsifier), Steps(steps),
            squared_error, lambda: {"bleu": 1.0}, settings,
        )  # fmt: skip

    return build


@pytest.mark.parametrize("sizes", [(12, 12), (23, 1), (1, 2, 3, 18)])
@pytest.mark.parametrize("clip", [0.0, 0.1])
def test_micro_batches_are_one_batch_of_their_tokens(make: Make, sizes: tuple[int, ...], clip: float) -> None:
    whole, parts = make([split(24)], max_grad_norm=clip), make([split(*sizes)], max_grad_norm=clip)
    whole.run()
    parts.run()
    for one, other in zip(whole.model.parameters(), parts.model.parameters(), strict=True):
        torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-6)
    losses = [row["loss"] for row in whole.history]
    assert [row["loss"] for row in parts.history] == pytest.approx(losses, rel=1e-5)
    assert losses[-1] < losses[0]


def test_clipping_holds_the_whole_step_and_a_row_makes_effective_weights_once(make: Make, monkeypatch: Any) -> None:
    loop = make([split(20, 4)], total=1, max_grad_norm=0.1)
    before = [parameter.detach().clone() for parameter in loop.model.parameters()]
    loop.run()
    moved = [(old - new.detach()) / 0.05 for old, new in zip(before, loop.model.parameters(), strict=True)]
    assert math.sqrt(sum(float((change**2).sum()) for change in moved)) == pytest.approx(0.1, rel=1e-3)
    # A row makes the effective weights once.
    loop, made, effective_weight = make([split(8)] * 2, STR(threshold_init=-1.0), 1), [], SparseLayer.effective_weight
    monkeypatch.setattr(SparseLayer, "effective_weight", lambda layer: (made.append(layer), effective_weight(layer))[1])
    loop.run()
    assert len(loop.history) == 1 and made == list(loop.sparsifier.layers.values())


def test_losses_are_means_over_the_tokens_since_the_last_row_and_over_the_steps_of_an_epoch(make: Make) -> None:
    # Learning rate 0: every step sees the first weights, so the mean over the window is a plain sum.
    loop = make([split(3, 5), split(1), split(10), split(2, 2)], total=8, lr=0.0, logging_steps=3)
    sums = [float(sum(squared_error(loop.model, rows) for rows in step).detach()) for step in loop.batches.steps]
    loop.run()
    assert [row["step"] for row in loop.history] == [3, 4, 6, 8]
    assert loop.history[0]["loss"] == pytest.approx(sum(sums[:3]) / (8 + 1 + 10), rel=1e-5)
    assert loop.history[1]["loss"] == pytest.approx(sums[3] / 4, rel=1e-5)
    # Observed once a step, however it is accumulated.
    mean = sum(loss / tokens for loss, tokens in zip(sums, (8, 1, 10, 4), strict=True)) / 4
    assert loop.sparsifier.epoch_losses == pytest.approx([mean, mean], rel=1e-5)


def test_a_row_is_complete_and_rows_come_at_logging_steps_and_epoch_ends(make: Make) -> None:
    loop, dense = make([split(8)] * 3, AutoSparse(threshold_init=-1.0), 7, logging_steps=2), make([split(8)])
    loop.run()
    dense.run()
    keys = "step epoch loss learning_rate tokens_per_second sparsity layer_sparsity train_flops_fraction"
    for row in loop.history:
        assert list(row) == [*keys.split(), "thresholds", "alpha"]
        assert set(row["layer_sparsity"]) == set(row["thresholds"]) == {"0", "2"}
        kept = 128 * (1 - row["layer_sparsity"]["0"]) + 64 * (1 - row["layer_sparsity"]["2"])
        assert row["sparsity"] == pytest.approx(1 - kept / 192)
    for row in dense.history:
        assert list(row) == keys.split() and (row["train_flops_fraction"], row["sparsity"]) == (1.0, 0.0)
    assert [row["step"] for row in loop.history] == [2, 3, 4, 6, 7]
    assert [row["epoch"] for row in loop.history] == pytest.approx([2 / 3, 1, 4 / 3, 2, 7 / 3])
    # The rate of the step to come: lr0 / (1 + steps taken).
    assert loop.history[0]["learning_rate"] == pytest.approx(0.05 / 3)
    places = ((0, 3), (1, 6), (2, 7))
    assert loop.evaluations == [{"epoch": e, "step": s, "phase": "sparse", "bleu": 1.0} for e, s in places]


@pytest.mark.parametrize("method", [GMP(sparsity=0.5, initial_sparsity=0.5, update_every=1), STR(threshold_init=-1.0)])
def test_the_flops_fraction_is_the_mean_density_over_the_steps(make: Make, method: Any) -> None:
    loop = make([split(8)] * 4, method)
    first = 1 - loop.sparsifier.sparsity()
    loop.run()
    # All three passes have the density of the view, and a step that of the views before and after it in the mean.
    densities = [1 - row["sparsity"] for row in loop.history]
    steps = [(before + after) / 2 for before, after in pairwise([first, *densities])]
    means = [sum(steps[: n + 1]) / (n + 1) for n in range(4)]
    assert [row["train_flops_fraction"] for row in loop.history] == pytest.approx(means)
    assert all(density < 1 for density in densities) and (method.name == "str" or set(densities) == {0.5})


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_before_the_checkpoint(make: Make, tmp_path: Path, broken: float) -> None:
    loop = make([split(8)] * 4, checkpointing_steps=1)
    loop.loss = lambda model, rows: squared_error(model, rows) * (broken if loop.step == 2 else 1.0)
    with pytest.raises(FloatingPointError, match=r"expected a finite loss, got (nan|inf) before step 3; lower --learn"):
        loop.run()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_1", "step_2"]
