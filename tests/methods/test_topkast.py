"""Top-KAST: its two sets and its penalty by hand, and what annealing makes of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import tritonsparse as ts
from tritonsparse.methods import TopKAST


def start(**fields: Any) -> tuple[nn.Linear, torch.optim.Optimizer, ts.Sparsifier]:
    layer = nn.Linear(4, 1, bias=False)
    layer.weight.data = torch.tensor([[4.0, -3.0, 2.0, 1.0]])
    sparsifier = ts.sparsify(layer, TopKAST(**{"sparsity": 0.75, "penalty": 0.0, **fields}))
    optimizer = torch.optim.SGD(sparsifier.param_groups(lr=1.0))
    sparsifier.attach(optimizer)
    return layer, optimizer, sparsifier


def gradient(layer: nn.Linear) -> list[float]:
    (layer(torch.tensor([[1.0, 10.0, 100.0, 1000.0]])) * 1.0).sum().backward()
    assert layer.weight.grad is not None
    return layer.weight.grad[0].tolist()


def test_forward_sees_a_and_the_gradient_reaches_b() -> None:
    layer, _, _ = start(backward_sparsity=0.5)
    # A = {4}, B = {4, -3}.
    assert layer(torch.tensor([[1.0, 10.0, 100.0, 1000.0]])).item() == 4.0
    assert gradient(layer) == [1.0, 10.0, 0.0, 0.0]


def test_backward_sparsity_zero_reaches_everything_and_alpha_anneals_it() -> None:
    assert gradient(start()[0]) == [1.0, 10.0, 100.0, 1000.0]
    assert gradient(start(alpha=0.5)[0]) == [1.0, 5.0, 50.0, 500.0]
    # alpha = 0 is Top-KAST with B = A.
    assert gradient(start(alpha=0.0)[0]) == gradient(start(backward_sparsity=0.75)[0]) == [1.0, 0.0, 0.0, 0.0]


def test_the_penalty_is_one_on_a_and_one_over_the_density_on_the_rest_of_b() -> None:
    layer, optimizer, sparsifier = start(backward_sparsity=0.5, penalty=0.1)
    layer.weight.grad = torch.zeros(1, 4)
    optimizer.step()
    # A: 4 - .1 x 4; B \ A: -3 - .1 x (1 / .25) x -3; outside B nothing.
    assert layer.weight[0].tolist() == pytest.approx([3.6, -1.8, 2.0, 1.0])
    assert sparsifier.layers[""].mask.int().tolist() == [[1, 0, 0, 0]]
    # B is chosen anew: 2 has overtaken -1.8.
    assert sparsifier.layers[""].grad_mask.int().tolist() == [[1, 0, 1, 0]]


def test_the_penalty_is_scaled_where_gradients_are() -> None:
    layer, optimizer, sparsifier = start(penalty=0.1)
    layer.weight.grad = torch.zeros(1, 4)
    sparsifier.method.before_step(sparsifier.layers, sparsifier.clock, optimizer, torch.tensor(8.0))
    assert layer.weight.grad[0].tolist() == pytest.approx([3.2, -9.6, 6.4, 3.2])


def test_a_weight_outside_a_comes_back_when_it_has_grown() -> None:
    layer, optimizer, sparsifier = start()
    layer.weight.grad = torch.tensor([[0.0, 0.0, -9.0, 0.0]])
    optimizer.step()
    assert layer.weight[0].tolist() == [4.0, -3.0, 11.0, 1.0]
    assert sparsifier.layers[""].mask.int().tolist() == [[0, 0, 1, 0]]


def test_sets_are_refreshed_every_so_many_steps() -> None:
    layer, optimizer, sparsifier = start(refresh_every=2)
    for expected in ([[1, 0, 0, 0]], [[0, 0, 1, 0]]):
        layer.weight.grad = torch.tensor([[0.0, 0.0, -9.0, 0.0]])
        optimizer.step()
        assert sparsifier.layers[""].mask.int().tolist() == expected


@pytest.mark.parametrize(
    ("backward", "alpha", "training"),
    # METHODS' check of AutoSparse's table: D = .25 here, (2 D + |B|) / 3.
    [(0.0, 1.0, (0.5 + 1.0) / 3), (0.5, 1.0, (0.5 + 0.5) / 3), (0.0, 0.0, 0.75 / 3)],
)
def test_training_cost_counts_the_gradient_set(backward: float, alpha: float, training: float) -> None:
    _, _, sparsifier = start(backward_sparsity=backward, alpha=alpha)
    assert sparsifier.method.densities(sparsifier.layers[""], 0.25).training == pytest.approx(training)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"backward_sparsity": 0.8}, "backward_sparsity of at most sparsity = 0.75"),
        ({"alpha": 1.5}, r"alpha in \[0, 1\]"),
        ({"penalty": -1.0}, "a penalty of at least 0"),
        ({"refresh_every": 0}, "refresh_every of at least 1"),
    ],
)
def test_fields_that_do_not_fit_are_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        TopKAST(**{"sparsity": 0.75, **fields})


def test_n_of_m_has_no_superset() -> None:
    with pytest.raises(ValueError, match="backward_sparsity 0 with pattern '2:4'"):
        ts.sparsify(nn.Linear(4, 4), TopKAST(sparsity=0.5, backward_sparsity=0.25), pattern="2:4")
    with pytest.raises(ValueError, match=r"sparsity 0\.5, which pattern '2:4' has, got 0\.75"):
        ts.sparsify(nn.Linear(4, 4), TopKAST(sparsity=0.75), pattern="2:4")
