"""Top-KAST: its two sets and its penalty by hand, and what annealing makes of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from method_runs import Run, linear

from tritonsparse.methods import TopKAST

X = torch.tensor([[1.0, 10.0, 100.0, 1000.0]])


def start(**fields: Any) -> Run:
    return Run(linear([4.0, -3.0, 2.0, 1.0]), TopKAST(**{"sparsity": 0.75, "penalty": 0.0, **fields}), lr=1.0)


def gradient(**fields: Any) -> list[float]:
    run = start(**fields)
    run.model(X).sum().backward()
    return run.view.weight.grad[0].tolist()


def test_forward_sees_a_and_the_gradient_reaches_b() -> None:
    # A = {4}, B = {4, -3}.
    assert start(backward_sparsity=0.5).model(X).item() == 4.0
    assert gradient(backward_sparsity=0.5) == [1.0, 10.0, 0.0, 0.0]
    # Backward sparsity 0 reaches everything, and alpha anneals it.
    assert gradient() == [1.0, 10.0, 100.0, 1000.0]
    assert gradient(alpha=0.5) == [1.0, 5.0, 50.0, 500.0]
    # alpha = 0 is Top-KAST with B = A.
    assert gradient(alpha=0.0) == gradient(backward_sparsity=0.75) == [1.0, 0.0, 0.0, 0.0]


def test_the_penalty_is_one_on_a_and_one_over_the_density_on_the_rest_of_b() -> None:
    run = start(backward_sparsity=0.5, penalty=0.1)
    run.step(0.0)
    # A: 4 - .1 x 4; B \ A: -3 - .1 x (1 / .25) x -3; outside B nothing.
    assert run.view.weight[0].tolist() == pytest.approx([3.6, -1.8, 2.0, 1.0])
    assert run.masks() == [[[1, 0, 0, 0]]]
    # B is chosen anew: 2 has overtaken -1.8.
    assert run.view.grad_mask.int().tolist() == [[1, 0, 1, 0]]


def test_the_penalty_is_scaled_where_gradients_are() -> None:
    run = start(penalty=0.1)
    run.give(0.0)
    run.before_step(8.0)
    assert run.view.weight.grad[0].tolist() == pytest.approx([3.2, -9.6, 6.4, 3.2])


def test_a_weight_outside_a_comes_back_when_it_has_grown() -> None:
    run = start()
    run.step([0.0, 0.0, -9.0, 0.0])
    assert run.view.weight[0].tolist() == [4.0, -3.0, 11.0, 1.0]
    assert run.masks() == [[[0, 0, 1, 0]]]


def test_sets_are_refreshed_every_so_many_steps() -> None:
    run = start(refresh_every=2)
    for expected in ([1, 0, 0, 0], [0, 0, 1, 0]):
        run.step([0.0, 0.0, -9.0, 0.0])
        assert run.masks() == [[expected]]


@pytest.mark.parametrize(
    ("backward", "alpha", "training"),
    # METHODS' check of AutoSparse's table: D = .25 here, (2 D + |B|) / 3.
    [(0.0, 1.0, (0.5 + 1.0) / 3), (0.5, 1.0, (0.5 + 0.5) / 3), (0.0, 0.0, 0.75 / 3)],
)
def test_training_cost_counts_the_gradient_set(backward: float, alpha: float, training: float) -> None:
    run = start(backward_sparsity=backward, alpha=alpha)
    assert run.method.densities(run.view, 0.25).training == pytest.approx(training)
