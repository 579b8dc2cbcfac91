"""MEST: one update by hand, its stages, and the importance that the published code loses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from method_runs import Run, linear

from tritonsparse.methods import MEST


def start(**fields: Any) -> Run:
    layer = linear([0.0] * 10)
    run = Run(layer, MEST(**{"sparsity": 0.5, "update_every": 1, **fields}), total_steps=8, seed=1)
    run.view.mask.copy_(torch.tensor([[True] * 5 + [False] * 5]))
    layer.weight.data = torch.tensor([[0.5, -0.1, 0.2, 0.4, 0.3, 0, 0, 0, 0, 0]])
    return run


def test_an_update_prunes_too_much_and_grows_back_at_random() -> None:
    run = start(mutation=(0.2, 0.0), softness=(0.0, 0.0), stages=(0.5,))
    run.step(0.0)  # step 0: no update
    assert run.view.mask[0, :5].all()
    run.step(0.0)
    mask = run.view.mask[0]
    # To .7: .1 and .2 go, three stay; back to .5: two of the other seven, at value 0.
    assert mask[[0, 3, 4]].all() and int(mask.sum()) == 5
    assert run.view.weight[0].tolist() == pytest.approx([0.5, 0.0, 0.0, 0.4, 0.3, 0, 0, 0, 0, 0])


@pytest.mark.parametrize(("weight", "value"), [(0.0, 0.0), (0.1, -0.1)])
def test_the_gradient_counts_in_the_importance(weight: float, value: float) -> None:
    """The published code takes it after zero_grad."""
    run = start(mutation=(0.1, 0.0), softness=(0.0, 0.0), stages=(0.5,), gradient_weight=weight)
    run.step(0.0)
    run.step([0.0, 5.0, *[0.0] * 8])
    # |-.1| + .1 x 5 = .6 is the largest, |-.1| alone the smallest: gone, and 0 even if chance grows it again.
    assert run.view.weight[0, 1].item() == pytest.approx(value)


def test_soft_memory_falls_to_the_sparsity_and_freezes() -> None:
    run = start(softness=(0.3, 0.1, 0.0), mutation=(0.0, 0.0, 0.0), stages=(0.5, 0.75))
    masks = []
    for _ in range(8):
        run.step(0.0)
        masks.append(run.view.mask.clone())
    # Stages begin at steps 4 and 6: 10 x (1 - .5 + .3) = 8, then 6, then 5 for good.
    assert [int(mask.sum()) for mask in masks] == [5, 8, 8, 8, 6, 6, 5, 5]
    assert torch.equal(masks[6], masks[7])
