"""RigL and SET: one update by hand, exact counts, and the step that RigL's update replaces."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from method_runs import Run
from torch import nn

from tritonsparse.methods import SET, RigL, Static


def start(method: Any) -> Run:
    return Run(nn.Linear(6, 1), method, lr=0.1, momentum=0.5, total_steps=100, seed=3)


def train(run: Run, steps: int) -> None:
    generator = torch.Generator().manual_seed(run.sparsifier.step)

    def loss() -> torch.Tensor:
        x = torch.randn(8, 6, generator=generator)
        return (run.model(x) - x.sum(1, keepdim=True)).square().mean()

    run.train(steps, loss)


def test_rigls_update_by_hand() -> None:
    run = start(RigL(sparsity=0.5, drop_fraction=0.7, update_every=1, distribution="uniform"))
    layer = run.view
    # f(1) = .35 (1 + cos(pi / 75)) = .6997: int(.6997 x 3) = 2 weights move.
    layer.mask.copy_(torch.tensor([[True, True, True, False, False, False]]))
    layer.weight.data = torch.tensor([[0.9, -0.1, 0.2, 0.0, 0.0, 0.0]])
    layer.bias.grad = torch.ones(1)
    run.step(0.0)  # step 0: no update yet, the bias moves
    assert layer.bias.grad is not None and run.sparsifier.step == 1
    assert float(layer.alpha) == 1.0, "dW must be dense where the update reads it"
    bias = layer.bias.item()
    layer.bias.grad = torch.ones(1)
    run.step([0.0, 5.0, 0.0, -4.0, 1.0, 2.0])
    # Dropped: -.1 and .2. Grown among all others: |5| (just dropped, it comes back with its value) and |-4|.
    assert run.masks() == [[[1, 1, 0, 1, 0, 0]]]
    assert layer.weight[0].tolist() == pytest.approx([0.9, -0.1, 0.0, 0.0, 0.0, 0.0])
    # The update took the place of the step, for every parameter, and counted.
    assert layer.bias.item() == bias and layer.bias.grad is None and run.sparsifier.step == 2


def test_the_dense_gradient_is_computed_on_update_steps_only() -> None:
    run = start(RigL(sparsity=0.5, update_every=3, stop_at=0.08, distribution="uniform"))
    dense = []
    for number in range(12):
        run.model(torch.randn(4, 6)).sum().backward()
        if (run.view.weight.grad[~run.view.mask] != 0).any():
            dense.append(number)
        run.step()
        run.optimizer.zero_grad()
    # Updates at steps 3 and 6; 9 is past .08 x 100.
    assert dense == [3, 6]


def test_grown_weights_start_from_zero_without_a_past() -> None:
    run = start(SET(sparsity=0.5, drop_fraction=0.5, update_every=4, distribution="uniform"))
    before = run.view.mask.clone()
    train(run, 4)
    grown = run.view.mask & ~before
    assert int(grown.sum()) == int((before & ~run.view.mask).sum()) == 1
    assert run.view.weight[grown].item() == 0.0
    assert run.momentum()[~run.view.mask | grown].abs().sum() == 0.0


@pytest.mark.parametrize("cls", [RigL, SET])
def test_the_count_never_changes(cls: Any) -> None:
    run, seen = start(cls(sparsity=0.5, drop_fraction=0.7, update_every=2, distribution="uniform")), set()
    for _ in range(10):
        train(run, 2)
        assert run.kept() == [3]
        seen.add(str(run.masks()))
    assert len(seen) > 1


def test_without_dropping_rigl_is_static() -> None:
    runs = []
    for method in (RigL(sparsity=0.5, drop_fraction=0.0, update_every=1000), Static(sparsity=0.5)):
        run = start(method)
        run.view.weight.data = torch.linspace(-1, 1, 6)[None] + 0.05
        run.view.mask.copy_(torch.tensor([[True, False, True, False, True, False]]))
        run.view.bias.data.zero_()
        train(run, 6)
        runs.append(run.view.weight.detach().clone())
    assert torch.equal(runs[0], runs[1])


def test_training_cost_has_one_dense_gradient_a_period() -> None:
    run = start(RigL(sparsity=0.5, update_every=100, distribution="uniform"))
    # (3 f_S Delta T + 2 f_S + f_D) / (Delta T + 1), a third of it a pass.
    expected = (3 * 0.5 * 100 + 2 * 0.5 + 1) / 101 / 3
    assert run.method.densities(run.view, 0.5).training == pytest.approx(expected)


def test_a_layer_without_a_gradient_at_an_update_is_named() -> None:
    run = start(RigL(sparsity=0.5, update_every=1, distribution="uniform"))
    train(run, 1)
    run.view.bias.grad = torch.ones(1)
    with pytest.raises(RuntimeError, match="the gradient of"):
        run.step()
