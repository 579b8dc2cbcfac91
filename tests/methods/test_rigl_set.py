"""RigL and SET: one update by hand, exact counts, and the step that RigL's update replaces."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import tritonsparse as ts
from tritonsparse.methods import SET, RigL, Static


def start(method: Any, momentum: float = 0.5, **options: Any) -> tuple[nn.Linear, torch.optim.Optimizer, ts.Sparsifier]:
    layer = nn.Linear(6, 1)
    sparsifier = ts.sparsify(layer, method, total_steps=100, seed=3, **options)
    optimizer = torch.optim.SGD(sparsifier.param_groups(lr=0.1), momentum=momentum)
    sparsifier.attach(optimizer)
    return layer, optimizer, sparsifier


def train(layer: nn.Linear, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for number in range(steps):
        generator = torch.Generator().manual_seed(number)
        x = torch.randn(8, 6, generator=generator)
        (layer(x) - x.sum(1, keepdim=True)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def test_rigls_update_by_hand() -> None:
    layer, optimizer, sparsifier = start(RigL(sparsity=0.5, drop_fraction=0.7, update_every=1, distribution="uniform"))
    view = sparsifier.layers[""]
    # f(1) = .35 (1 + cos(pi / 75)) = .6997: int(.6997 x 3) = 2 weights move.
    view.mask.copy_(torch.tensor([[True, True, True, False, False, False]]))
    layer.weight.data = torch.tensor([[0.9, -0.1, 0.2, 0.0, 0.0, 0.0]])
    layer.weight.grad, layer.bias.grad = torch.zeros(1, 6), torch.ones(1)
    optimizer.step()  # step 0: no update yet, the bias moves
    assert layer.bias.grad is not None and sparsifier.step == 1
    assert float(view.alpha) == 1.0, "dW must be dense where the update reads it"
    bias = layer.bias.item()
    layer.weight.grad, layer.bias.grad = torch.tensor([[0.0, 5.0, 0.0, -4.0, 1.0, 2.0]]), torch.ones(1)
    optimizer.step()
    # Dropped: -.1 and .2. Grown among all others: |5| (just dropped, it comes back with its value) and |-4|.
    assert view.mask.int().tolist() == [[1, 1, 0, 1, 0, 0]]
    assert layer.weight[0].tolist() == pytest.approx([0.9, -0.1, 0.0, 0.0, 0.0, 0.0])
    # The update took the place of the step, for every parameter, and counted.
    assert layer.bias.item() == bias and layer.bias.grad is None and sparsifier.step == 2


def test_the_dense_gradient_is_computed_on_update_steps_only() -> None:
    layer, optimizer, sparsifier = start(RigL(sparsity=0.5, update_every=3, stop_at=0.08, distribution="uniform"))
    dense = []
    for _ in range(12):
        (layer(torch.randn(4, 6))).sum().backward()
        dense.append(bool((layer.weight.grad[~sparsifier.layers[""].mask] != 0).any()))
        optimizer.step()
        optimizer.zero_grad()
    # Updates at steps 3 and 6; 9 is past .08 x 100.
    assert [number for number, full in enumerate(dense) if full] == [3, 6]


def test_grown_weights_start_from_zero_without_a_past() -> None:
    layer, optimizer, sparsifier = start(SET(sparsity=0.5, drop_fraction=0.5, update_every=4, distribution="uniform"))
    view = sparsifier.layers[""]
    before = view.mask.clone()
    train(layer, optimizer, 4)
    grown = view.mask & ~before
    assert int(grown.sum()) == int((before & ~view.mask).sum()) == 1
    assert layer.weight[grown].item() == 0.0
    assert optimizer.state[layer.weight]["momentum_buffer"][~view.mask | grown].abs().sum() == 0.0


@pytest.mark.parametrize("cls", [RigL, SET])
def test_the_count_never_changes(cls: Any) -> None:
    layer, optimizer, sparsifier = start(cls(sparsity=0.5, drop_fraction=0.7, update_every=2, distribution="uniform"))
    seen = set()
    for _ in range(10):
        train(layer, optimizer, 2)
        assert int(sparsifier.layers[""].mask.sum()) == 3
        seen.add(tuple(sparsifier.layers[""].mask[0].tolist()))
    assert len(seen) > 1


def test_without_dropping_rigl_is_static() -> None:
    runs = []
    for method in (RigL(sparsity=0.5, drop_fraction=0.0, update_every=1000), Static(sparsity=0.5)):
        layer, optimizer, sparsifier = start(method)
        layer.weight.data = torch.linspace(-1, 1, 6)[None] + 0.05
        view = sparsifier.layers[""]
        view.mask.copy_(torch.tensor([[True, False, True, False, True, False]]))
        layer.bias.data.zero_()
        train(layer, optimizer, 6)
        runs.append(layer.weight.detach().clone())
    assert torch.equal(runs[0], runs[1])


def test_training_cost_has_one_dense_gradient_a_period() -> None:
    _, _, sparsifier = start(RigL(sparsity=0.5, update_every=100, distribution="uniform"))
    found = sparsifier.method.densities(sparsifier.layers[""], 0.5)
    # (3 f_S Delta T + 2 f_S + f_D) / (Delta T + 1), a third of it a pass.
    assert found.training == pytest.approx((3 * 0.5 * 100 + 2 * 0.5 + 1) / 101 / 3)


def test_a_layer_without_a_gradient_at_an_update_is_named() -> None:
    layer, optimizer, _ = start(RigL(sparsity=0.5, update_every=1, distribution="uniform"))
    train(layer, optimizer, 1)
    layer.bias.grad = torch.ones(1)
    with pytest.raises(RuntimeError, match="the gradient of"):
        optimizer.step()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"drop_fraction": 1.5}, r"drop_fraction in \[0, 1\]"),
        ({"update_every": 0}, "update_every of at least 1"),
        ({"stop_at": 2.0}, r"stop_at in \[0, 1\]"),
        ({"distribution": "even"}, "one of uniform, erk"),
    ],
)
def test_fields_that_do_not_fit_are_refused(fields: dict[str, Any], words: str) -> None:
    for cls in (RigL, SET):
        with pytest.raises(ValueError, match=words):
            cls(sparsity=0.5, **fields)


def test_n_of_m_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"method 'rigl' supports \(block, channel, unstructured\), got '2:4'"):
        ts.sparsify(nn.Linear(4, 4), RigL(sparsity=0.5), pattern="2:4", total_steps=5)
