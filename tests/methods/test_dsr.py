"""DSR: one reallocation by hand, the adaptive threshold, and the periods that double."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from method_runs import Run, two
from torch import nn

from tritonsparse.clock import Clock
from tritonsparse.methods import DSR

KEPT = torch.tensor([[True, True, True, False, False, False]])


def start(**fields: Any) -> Run:
    method = DSR(**{"sparsity": 0.5, "drop_fraction": 0.5, "threshold_init": 0.15, "update_every": 1, **fields})
    run = Run(two(6), method, momentum=0.5, total_steps=100, seed=3)
    for view, weights in zip(run.views, ([0.9, 0.1, -0.2, 0, 0, 0], [0.05, -0.1, 0.3, 0, 0, 0]), strict=True):
        view.mask.copy_(KEPT)
        view.weight.data = torch.tensor([weights])
    return run


def test_a_reallocation_by_hand() -> None:
    run = start()
    run.step(1.0, 1.0)
    # Below .15: one weight of layer 0, two of layer 1. What remains is 2 and 1, so of the 3, layer 0 grows 2.
    first, second = (view.mask[0] for view in run.views)
    assert first[[0, 2]].all() and not first[1] and int(first[3:].sum()) == 2
    assert second[2] and not second[[0, 1]].any() and int(second[3:].sum()) == 1
    # Grown weights start at 0 without a past, dropped ones are 0; the others have not moved.
    assert run.views[0].weight[0].tolist() == pytest.approx([0.9, 0.0, -0.2, 0.0, 0.0, 0.0])
    assert run.views[1].weight[0].tolist() == pytest.approx([0.0, 0.0, 0.3, 0.0, 0.0, 0.0])
    assert run.momentum()[0].tolist() == [1.0, 0.0, 1.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("drop_fraction", "threshold"),
    # K = 3 of 6: N_p = 3 is met, 1 is passed, 6 is not reached.
    [(0.5, 0.15), (1 / 6, 0.075), (1.0, 0.3)],
)
def test_the_threshold_is_halved_or_doubled_where_the_count_is_off_by_a_tenth(
    drop_fraction: float, threshold: float
) -> None:
    run = start(drop_fraction=drop_fraction)
    run.step(1.0, 1.0)
    assert run.sparsifier.state_dict()["method_state"] == {"threshold": pytest.approx(threshold)}


def test_the_threshold_finds_the_number_to_drop() -> None:
    model = nn.ModuleList([nn.Linear(64, 32, bias=False), nn.Linear(64, 32, bias=False)])
    run = Run(model, DSR(sparsity=0.5, drop_fraction=0.1, threshold_init=1e-5, update_every=1), lr=0.1, total_steps=100)
    moved = []
    for _ in range(40):
        before = [view.mask.clone() for view in run.views]
        run.step(*(0.1 * torch.randn(32, 64) for _ in range(2)))
        moved.append(sum(int((old & ~view.mask).sum()) for old, view in zip(before, run.views, strict=True)))
        assert sum(run.kept()) == 2048
    assert moved[0] < 20
    # H moves by factors of two, so the count stays around N_p = 204.8, not on it.
    assert 0.4 * 204.8 < sum(moved[-20:]) / 20 < 2.5 * 204.8


def test_a_layer_keeps_its_largest_weight_whatever_the_threshold() -> None:
    run = start(threshold_init=10.0)
    run.step(1.0, 1.0)
    assert run.views[0].mask[0, 0] and run.views[1].mask[0, 2] and sum(run.kept()) == 6


def test_the_count_holds_where_more_is_dropped_than_there_is_room() -> None:
    run = Run(two(6), DSR(sparsity=0.2, threshold_init=10.0, update_every=1), total_steps=10)
    run.step(0.0, 0.0)
    assert sum(run.kept()) == 10


def test_the_period_doubles_at_the_papers_epochs() -> None:
    method, clock = DSR(sparsity=0.5, update_every=10), Clock(0, 1000, None)
    # Of 1000 steps: every 10 to 250, every 20 to 500, every 40 to 750, every 80 to 950.
    due = [step for step in range(1000) if method._due(step, clock)]
    assert due == [
        *range(10, 250, 10), *range(260, 500, 20), *range(520, 750, 40), *range(800, 950, 80)
    ]  # fmt: skip


def test_growth_differs_from_step_to_step() -> None:
    run, masks = start(), set()
    for _ in range(6):
        run.step(1.0, 1.0)
        masks.add(str(run.masks()))
    assert len(masks) > 1
