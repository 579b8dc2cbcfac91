"""SNFS: one update of two layers by hand, what moves between layers, and where momentum is kept."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from method_runs import Run, two
from torch import nn

from tritonsparse.methods import SNFS


def start(**given: Any) -> Run:
    fields = {key: given.pop(key) for key in ("sparsity", "drop_fraction", "stop_at") if key in given}
    method = SNFS(**{"sparsity": 0.5, "drop_fraction": 0.4, "update_every": 1, **fields})
    return Run(two(6), method, total_steps=100, seed=3, **{"momentum": 0.5, **given})


def updated(run: Run) -> Run:
    """After the example's update; a first step of lr 0 makes the gradient the momentum."""
    for view, weights in zip(run.views, ([0.9, -0.1, 0.2, 0, 0, 0], [0.5, 0.6, -0.7, 0, 0, 0]), strict=True):
        view.mask.copy_(torch.tensor([[True, True, True, False, False, False]]))
        view.weight.data = torch.tensor([weights])
    run.step([3.0, -3.0, 3.0, 4.0, -5.0, 0.0], [1.0, -1.0, 1.0, 0.0, 0.5, 0.25])
    return run


def test_an_update_of_two_layers_by_hand() -> None:
    run = updated(start())
    # f(1) = .005 + .395 (1 + cos(pi / 100)) / 2 = .3999: ceil(.3999 x 3) = 2 of each layer's 3 go, the smallest.
    # Mean momentum of the kept: 3 and 1. Of the 4, layer 0 grows 3 and layer 1 grows 1.
    # Layer 0: |-5|, |4|, then 3 at the lower index, which has just gone and comes back with its value.
    assert run.masks() == [[[1, 1, 0, 1, 1, 0]], [[1, 0, 1, 0, 0, 0]]]
    assert run.views[0].weight[0].tolist() == pytest.approx([0.9, -0.1, 0.0, 0.0, 0.0, 0.0])
    assert run.views[1].weight[0].tolist() == pytest.approx([0.5, 0.0, -0.7, 0.0, 0.0, 0.0])
    # Momentum is whole, inside the masks and outside.
    assert run.momentum()[0].tolist() == [3.0, -3.0, 3.0, 4.0, -5.0, 0.0]


def test_adams_momentum_is_divided_by_the_root_of_its_square() -> None:
    # After one step m / sqrt(v) = .1 g / sqrt(.001 g^2) has one size wherever g is not 0: both layers ask alike, 2
    # each; the ties of layer 0 go to the lowest index; where g is 0 nothing grows.
    run = updated(start(optimizer=torch.optim.Adam))
    assert run.masks() == [[[1, 1, 1, 0, 0, 0]], [[1, 1, 1, 0, 0, 0]]]


def test_a_layer_that_is_nearly_dense_and_wants_more_turns_over_its_zeros_only() -> None:
    run = start(sparsity=0.1, drop_fraction=0.5)
    for view in run.views:
        view.mask.copy_(torch.tensor([[True, True, True, True, True, False]]))
        view.weight.data = torch.tensor([[0.1, 0.2, 0.3, 0.4, 0.5, 0.0]])
    run.step(5.0, 1.0)
    # Layer 0 is 1/6 sparse and asks for more than its half: ceil(5/6) = 1 goes. Layer 1: ceil(.4999 x 5) = 3.
    # Of the 4, layer 0 may take floor(.99 x 2) = 1, so layer 1 grows 3: nothing has moved between them.
    assert run.kept() == [5, 5] and run.masks()[0] == [[1, 1, 1, 1, 1, 0]]


def test_weights_move_to_the_layer_that_learns_and_the_total_stays() -> None:
    model = nn.ModuleList([nn.Linear(16, 8, bias=False), nn.Linear(16, 8, bias=False)])
    run = Run(model, SNFS(sparsity=0.8, update_every=5), lr=0.05, momentum=0.9, total_steps=200, seed=1)
    truth = torch.randn(8, 16)

    def loss() -> torch.Tensor:
        x = torch.randn(32, 16)
        # The second layer's task is a hundredth of the first's.
        errors = model[0](x) - x @ truth.t(), 0.1 * (model[1](x) - 0.1 * x @ truth.t())
        return errors[0].square().mean() + errors[1].square().mean()

    for _ in range(60):
        run.train(1, loss)
        assert sum(run.kept()) == 52
    kept = run.kept()
    assert kept[0] > 1.5 * kept[1], kept


def test_dw_is_dense_until_the_last_update_and_masked_after_it() -> None:
    run = start(stop_at=0.03)
    view, dense, densities = run.views[0], [], []
    for _ in range(6):
        sum(layer(torch.randn(4, 6)).square().sum() for layer in run.model).backward()
        dense.append(bool((view.weight.grad[~view.mask] != 0).any()))
        densities.append(run.method.densities(view, 0.5).grad_weight)
        run.step()
        run.optimizer.zero_grad()
        assert not view.weight[~view.mask].any()
    assert dense == [True, True, True, False, False, False]
    assert densities == [1.0, 1.0, 1.0, 0.5, 0.5, 0.5]
    # The past of what is pruned for good is cleared, or it would move.
    assert not any(run.momentum(number)[~view.mask].any() for number, view in enumerate(run.views))


def test_an_optimizer_without_momentum_is_refused_at_the_update() -> None:
    run = start(momentum=0.0)
    masks = run.masks()
    with pytest.raises(RuntimeError, match=r"momentum of 0, got none; train every sparse layer with SGD\(momentum"):
        run.step(1.0, 1.0)
    assert run.masks() == masks
