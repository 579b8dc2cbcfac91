"""GMP: the cubic at steps computed by hand, exact at the end, and nothing returns."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import tritonsparse as ts
from tritonsparse.masks.distribution import erk
from tritonsparse.masks.topk import kept_count
from tritonsparse.methods import GMP


def ladder(n: int = 100) -> nn.Linear:
    """|W| = 1, 2, ..., n, with alternating signs, in one row."""
    layer = nn.Linear(n, 1, bias=False)
    layer.weight.data = torch.arange(1.0, n + 1) * torch.tensor([1.0, -1.0]).repeat(n // 2)[None]
    return layer


def start(model: nn.Module, method: GMP, total_steps: int, lr: float = 0.0) -> tuple[ts.Sparsifier, Any]:
    sparsifier = ts.sparsify(model, method, total_steps=total_steps)
    optimizer = torch.optim.SGD(sparsifier.param_groups(lr=lr), momentum=0.9)
    sparsifier.attach(optimizer)
    return sparsifier, optimizer


def test_the_mask_follows_the_cubic_and_rests_before_between_and_after() -> None:
    layer = ladder()
    sparsifier, optimizer = start(layer, GMP(sparsity=0.8, begin=0.1, end=0.5, update_every=10), 100)
    kept = [layer.kept_count()]
    for _ in range(100):
        optimizer.step()
        kept.append(layer.kept_count())
    # t_0 = 10, t_1 = 50: p = .8 (1 - (1 - (t - 10)/40)^3) = 0, .4625, .7, .7875, .8 at t = 10, 20, ..., 50
    assert kept == [100] * 20 + [54] * 10 + [30] * 10 + [21] * 10 + [20] * 51
    assert layer.weight.abs().flatten().tolist() == [0.0] * 80 + [float(i) for i in range(81, 101)]
    assert sparsifier.sparsity() == 0.8


@pytest.mark.parametrize("update_every", [1, 7, 1000])
@pytest.mark.parametrize(("begin", "end"), [(0.0, 0.75), (0.3, 0.3), (0.0, 0.0), (1.0, 1.0)])
@pytest.mark.parametrize(("sparsity", "kept"), [(0.9, 10), (0.995, 1), (0.12, 88)])
def test_the_final_sparsity_is_exact_whatever_the_schedule(
    update_every: int, begin: float, end: float, sparsity: float, kept: int
) -> None:
    layer = ladder()
    method = GMP(sparsity=sparsity, begin=begin, end=end, update_every=update_every)
    _, optimizer = start(layer, method, 20)
    for _ in range(20):
        optimizer.step()
    assert int(torch.count_nonzero(layer.weight)) == int(layer.mask.sum()) == kept


def test_initial_sparsity_holds_from_the_first_forward() -> None:
    layer = ladder()
    start(layer, GMP(sparsity=0.8, initial_sparsity=0.3), 100)
    assert layer.kept_count() == 70


def test_what_is_pruned_never_returns_and_its_momentum_is_gone() -> None:
    layer = ladder(10)
    _, optimizer = start(layer, GMP(sparsity=0.5, begin=0.2, end=0.4, update_every=1), 10, lr=1.0)
    kept = layer.mask.clone()
    for _ in range(10):
        # Every weight is pushed up by far more than any is large, the small ones most.
        layer.weight.grad = -1000.0 / torch.arange(1.0, 11.0)[None]
        optimizer.step()
        assert not (layer.mask & ~kept).any()
        kept = layer.mask.clone()
        assert not layer.weight[~kept].any()
        assert not optimizer.state[layer.weight]["momentum_buffer"][~kept].any()
    assert int(kept.sum()) == 5


def test_a_kept_weight_that_happens_to_be_zero_ranks_before_the_pruned_ones() -> None:
    layer = ladder(4)
    _, optimizer = start(layer, GMP(sparsity=0.75, initial_sparsity=0.5, end=1.0, update_every=1), 2)
    assert layer.mask.tolist() == [[False, False, True, True]]
    layer.weight.data[0, 2:] = 0.0
    optimizer.step()  # p = .75 - .25/8 = .71875: 1.125 kept, rounded to 1, the lower index of the two zeros
    assert layer.mask.tolist() == [[False, False, True, False]]


def test_tiles_lose_what_they_keep_and_gain_nothing() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(16, 8, bias=False)
    sparsifier = ts.sparsify(layer, GMP(sparsity=0.5, update_every=1), pattern="2:4:transposable", total_steps=40)
    optimizer = torch.optim.SGD(sparsifier.param_groups(lr=0.5))
    sparsifier.attach(optimizer)
    kept, counts = sparsifier.layers[""].mask.clone(), set()
    for _ in range(40):
        layer(torch.randn(4, 16)).square().mean().backward()
        optimizer.step()
        mask = sparsifier.layers[""].mask
        assert not (mask & ~kept).any()
        # As many of every four of a row and of a column: four, then three, then two.
        rows, columns = mask.reshape(-1, 4).sum(1), mask.t().reshape(-1, 4).sum(1)
        assert rows.unique().tolist() == columns.unique().tolist() and len(rows.unique()) == 1
        counts.add(int(rows[0]))
        kept = mask.clone()
    assert counts == {4, 3, 2}


def test_erk_reaches_each_layers_own_sparsity() -> None:
    model = nn.Sequential(nn.Linear(40, 30), nn.Linear(30, 20), nn.Linear(20, 2))
    sparsifier, optimizer = start(model, GMP(sparsity=0.8, distribution="erk", update_every=1), 8)
    for _ in range(8):
        optimizer.step()
    shapes = {name: tuple(layer.weight.shape) for name, layer in sparsifier.layers.items()}
    kept = {name: int(torch.count_nonzero(layer.weight)) for name, layer in sparsifier.layers.items()}
    sparsities = erk(shapes, 0.8)
    assert kept == {name: kept_count(shapes[name][0] * shapes[name][1], p) for name, p in sparsities.items()}
    assert sparsities["2"] < sparsities["1"] < sparsities["0"]


def test_masked_weights_get_no_gradient() -> None:
    layer = ladder(10)
    start(layer, GMP(sparsity=0.8, end=0.0), 10)
    layer(torch.randn(3, 10)).backward(torch.randn(3, 1))
    assert (layer.weight.grad != 0).tolist() == layer.mask.tolist()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"sparsity": 0.5, "initial_sparsity": 0.6}, "initial_sparsity of at most sparsity = 0.5, got 0.6"),
        ({"sparsity": 0.5, "begin": 0.5, "end": 0.4}, "0 <= begin <= end <= 1 .fractions of total_steps"),
        ({"sparsity": 0.5, "end": 100}, "0 <= begin <= end <= 1 .fractions of total_steps"),
        ({"sparsity": 0.5, "update_every": 0}, "update_every of at least 1"),
    ],
    ids=str,
)
def test_a_field_out_of_range_is_refused_when_the_method_is_made(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=f"gmp: expected {words}"):
        GMP(**fields)
