"""SNFS: one update of two layers by hand, what moves between layers, and where momentum is kept."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import tritonsparse as ts
from tritonsparse.methods import SNFS

Start = tuple[nn.ModuleList, torch.optim.Optimizer, ts.Sparsifier]


def start(optimizer: Any = None, **fields: Any) -> Start:
    model = nn.ModuleList(nn.Linear(6, 1, bias=False) for _ in range(2))
    method = SNFS(**{"sparsity": 0.5, "drop_fraction": 0.4, "update_every": 1, **fields})
    sparsifier = ts.sparsify(model, method, total_steps=100, seed=3)
    make = optimizer or (lambda groups: torch.optim.SGD(groups, momentum=0.5))
    chosen = make(sparsifier.param_groups(lr=0.0))
    sparsifier.attach(chosen)
    return model, chosen, sparsifier


def by_hand(run: Start) -> None:
    """Masks, weights and gradients of the example; a first step of lr 0 makes the gradient the momentum."""
    _, optimizer, sparsifier = run
    for layer, weights, gradient in (
        ("0", [0.9, -0.1, 0.2, 0.0, 0.0, 0.0], [3.0, -3.0, 3.0, 4.0, -5.0, 0.0]),
        ("1", [0.5, 0.6, -0.7, 0.0, 0.0, 0.0], [1.0, -1.0, 1.0, 0.0, 0.5, 0.25]),
    ):
        view = sparsifier.layers[layer]
        view.mask.copy_(torch.tensor([[True, True, True, False, False, False]]))
        view.weight.data = torch.tensor([weights])
        view.weight.grad = torch.tensor([gradient])
    optimizer.step()


def test_an_update_of_two_layers_by_hand() -> None:
    run = start()
    by_hand(run)
    model, optimizer, sparsifier = run
    # f(1) = .005 + .395 (1 + cos(pi / 100)) / 2 = .3999: ceil(.3999 x 3) = 2 of each layer's 3 go, the smallest.
    # Mean momentum of the kept: 3 and 1. Of the 4, layer 0 grows 3 and layer 1 grows 1.
    # Layer 0: |-5|, |4|, then 3 at the lower index, which has just gone and comes back with its value.
    assert sparsifier.layers["0"].mask.int().tolist() == [[1, 1, 0, 1, 1, 0]]
    assert model[0].weight[0].tolist() == pytest.approx([0.9, -0.1, 0.0, 0.0, 0.0, 0.0])
    assert sparsifier.layers["1"].mask.int().tolist() == [[1, 0, 1, 0, 0, 0]]
    assert model[1].weight[0].tolist() == pytest.approx([0.5, 0.0, -0.7, 0.0, 0.0, 0.0])
    # Momentum is whole, inside the masks and outside.
    assert optimizer.state[model[0].weight]["momentum_buffer"][0].tolist() == [3.0, -3.0, 3.0, 4.0, -5.0, 0.0]


def test_adams_momentum_is_divided_by_the_root_of_its_square() -> None:
    run = start(lambda groups: torch.optim.Adam(groups))
    by_hand(run)
    # After one step m / sqrt(v) = .1 g / sqrt(.001 g^2) has one size wherever g is not 0: both layers ask alike, 2
    # each; the ties of layer 0 go to the lowest index; where g is 0 nothing grows.
    assert run[2].layers["0"].mask.int().tolist() == [[1, 1, 1, 0, 0, 0]]
    assert run[2].layers["1"].mask.int().tolist() == [[1, 1, 1, 0, 0, 0]]


def test_a_layer_that_is_nearly_dense_and_wants_more_turns_over_its_zeros_only() -> None:
    _, optimizer, sparsifier = start(sparsity=0.1, drop_fraction=0.5)
    for name, momentum in (("0", 5.0), ("1", 1.0)):
        view = sparsifier.layers[name]
        view.mask.copy_(torch.tensor([[True, True, True, True, True, False]]))
        view.weight.data = torch.tensor([[0.1, 0.2, 0.3, 0.4, 0.5, 0.0]])
        view.weight.grad = torch.full((1, 6), momentum)
    optimizer.step()
    # Layer 0 is 1/6 sparse and asks for more than its half: ceil(5/6) = 1 goes. Layer 1: ceil(.4999 x 5) = 3.
    # Of the 4, layer 0 may take floor(.99 x 2) = 1, so layer 1 grows 3: nothing has moved between them.
    assert [int(sparsifier.layers[name].mask.sum()) for name in "01"] == [5, 5]
    assert sparsifier.layers["0"].mask.int().tolist() == [[1, 1, 1, 1, 1, 0]]


def test_weights_move_to_the_layer_that_learns_and_the_total_stays() -> None:
    torch.manual_seed(0)
    model = nn.ModuleList([nn.Linear(16, 8, bias=False), nn.Linear(16, 8, bias=False)])
    sparsifier = ts.sparsify(model, SNFS(sparsity=0.8, update_every=5), total_steps=200, seed=1)
    optimizer = torch.optim.SGD(sparsifier.param_groups(lr=0.05), momentum=0.9)
    sparsifier.attach(optimizer)
    truth = torch.randn(8, 16)
    total = sum(layer.kept_count() for layer in sparsifier.layers.values())
    for _ in range(60):
        x = torch.randn(32, 16)
        # The second layer's task is a hundredth of the first's.
        loss = (model[0](x) - x @ truth.t()).square().mean() + (
            0.1 * (model[1](x) - 0.1 * x @ truth.t())
        ).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        assert sum(int(layer.mask.sum()) for layer in sparsifier.layers.values()) == total == 52
    kept = [int(layer.mask.sum()) for layer in sparsifier.layers.values()]
    assert kept[0] > 1.5 * kept[1], kept


def test_dw_is_dense_until_the_last_update_and_masked_after_it() -> None:
    model, optimizer, sparsifier = start(stop_at=0.03)
    dense, densities = [], []
    for _ in range(6):
        sum(layer(torch.randn(4, 6)).square().sum() for layer in model).backward()
        view = sparsifier.layers["0"]
        dense.append(bool((view.weight.grad[~view.mask] != 0).any()))
        densities.append(sparsifier.method.densities(view, 0.5).grad_weight)
        optimizer.step()
        optimizer.zero_grad()
        assert not view.weight[~view.mask].any()
    assert dense == [True, True, True, False, False, False]
    assert densities == [1.0, 1.0, 1.0, 0.5, 0.5, 0.5]
    # The past of what is pruned for good is cleared, or it would move.
    for layer in model:
        mask = sparsifier.layers["0" if layer is model[0] else "1"].mask
        assert not optimizer.state[layer.weight]["momentum_buffer"][~mask].any()


def test_an_optimizer_without_momentum_is_refused_at_the_update() -> None:
    model, optimizer, sparsifier = start(lambda groups: torch.optim.SGD(groups))
    masks = [layer.mask.clone() for layer in sparsifier.layers.values()]
    for layer in model:
        layer.weight.grad = torch.ones(1, 6)
    with pytest.raises(RuntimeError, match=r"momentum of 0, got none; train every sparse layer with SGD\(momentum"):
        optimizer.step()
    assert all(torch.equal(layer.mask, mask) for layer, mask in zip(sparsifier.layers.values(), masks, strict=True))


def test_n_of_m_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"'snfs' supports \(block, channel, unstructured\), got '2:4'"):
        ts.sparsify(nn.Linear(8, 8), SNFS(sparsity=0.5), pattern="2:4", total_steps=10)
