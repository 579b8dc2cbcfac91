"""GMP: the cubic at steps computed by hand, exact at the end, and nothing returns."""

from __future__ import annotations

import pytest
import torch
from method_runs import Run, linear
from torch import nn

from tritonsparse.masks.distribution import erk
from tritonsparse.masks.topk import kept_count
from tritonsparse.methods import GMP


def ladder(n: int = 100) -> nn.Linear:
    """|W| = 1, 2, ..., n, with alternating signs, in one row."""
    return linear([(-1) ** number * (number + 1.0) for number in range(n)])


def test_the_mask_follows_the_cubic_and_rests_before_between_and_after() -> None:
    run = Run(ladder(), GMP(sparsity=0.8, begin=0.1, end=0.5, update_every=10), total_steps=100)
    kept = [run.view.kept_count()]
    for _ in range(100):
        run.step()
        kept.append(run.view.kept_count())
    # t_0 = 10, t_1 = 50: p = .8 (1 - (1 - (t - 10)/40)^3) = 0, .4625, .7, .7875, .8 at t = 10, 20, ..., 50
    assert kept == [100] * 20 + [54] * 10 + [30] * 10 + [21] * 10 + [20] * 51
    assert run.view.weight.abs().flatten().tolist() == [0.0] * 80 + [float(i) for i in range(81, 101)]
    assert run.sparsifier.sparsity() == 0.8


@pytest.mark.parametrize("update_every", [1, 7, 1000])
@pytest.mark.parametrize(("begin", "end"), [(0.0, 0.75), (0.3, 0.3), (0.0, 0.0), (1.0, 1.0)])
def test_the_final_sparsity_is_exact_whatever_the_schedule(update_every: int, begin: float, end: float) -> None:
    for sparsity, kept in ((0.9, 10), (0.995, 1), (0.12, 88)):
        method = GMP(sparsity=sparsity, begin=begin, end=end, update_every=update_every)
        run = Run(ladder(), method, total_steps=20)
        for _ in range(20):
            run.step()
        assert int(torch.count_nonzero(run.view.weight)) == run.kept()[0] == kept


def test_initial_sparsity_holds_from_the_first_forward() -> None:
    assert Run(ladder(), GMP(sparsity=0.8, initial_sparsity=0.3), total_steps=100).view.kept_count() == 70


def test_what_is_pruned_never_returns_and_its_momentum_is_gone() -> None:
    method = GMP(sparsity=0.5, begin=0.2, end=0.4, update_every=1)
    run = Run(ladder(10), method, lr=1.0, momentum=0.9, total_steps=10)
    kept = run.view.mask.clone()
    for _ in range(10):
        # Every weight is pushed up by far more than any is large, the small ones most.
        run.step(-1000.0 / torch.arange(1.0, 11.0))
        assert not (run.view.mask & ~kept).any()
        kept = run.view.mask.clone()
        assert not run.view.weight[~kept].any() and not run.momentum()[~kept].any()
    assert int(kept.sum()) == 5


def test_a_kept_weight_that_happens_to_be_zero_ranks_before_the_pruned_ones() -> None:
    run = Run(ladder(4), GMP(sparsity=0.75, initial_sparsity=0.5, end=1.0, update_every=1), total_steps=2)
    assert run.masks() == [[[0, 0, 1, 1]]]
    run.view.weight.data[0, 2:] = 0.0
    run.step()  # p = .75 - .25/8 = .71875: 1.125 kept, rounded to 1, the lower index of the two zeros
    assert run.masks() == [[[0, 0, 1, 0]]]


def test_tiles_lose_what_they_keep_and_gain_nothing() -> None:
    method = GMP(sparsity=0.5, update_every=1)
    run = Run(nn.Linear(16, 8, bias=False), method, lr=0.5, pattern="2:4:transposable", total_steps=40)
    kept, counts = run.view.mask.clone(), set()
    for _ in range(40):
        run.train(1, lambda: run.model(torch.randn(4, 16)).square().mean())
        mask = run.view.mask
        assert not (mask & ~kept).any()
        # As many of every four of a row and of a column: four, then three, then two.
        rows, columns = mask.reshape(-1, 4).sum(1), mask.t().reshape(-1, 4).sum(1)
        assert rows.unique().tolist() == columns.unique().tolist() and len(rows.unique()) == 1
        counts.add(int(rows[0]))
        kept = mask.clone()
    assert counts == {4, 3, 2}


def test_erk_reaches_each_layers_own_sparsity() -> None:
    model = nn.Sequential(nn.Linear(40, 30), nn.Linear(30, 20), nn.Linear(20, 2))
    run = Run(model, GMP(sparsity=0.8, distribution="erk", update_every=1), total_steps=8)
    for _ in range(8):
        run.step()
    shapes = {name: tuple(layer.weight.shape) for name, layer in run.sparsifier.layers.items()}
    kept = {name: int(torch.count_nonzero(layer.weight)) for name, layer in run.sparsifier.layers.items()}
    sparsities = erk(shapes, 0.8)
    assert kept == {name: kept_count(shapes[name][0] * shapes[name][1], p) for name, p in sparsities.items()}
    assert sparsities["2"] < sparsities["1"] < sparsities["0"]


def test_masked_weights_get_no_gradient() -> None:
    view = Run(ladder(10), GMP(sparsity=0.8, end=0.0), total_steps=10).view
    view(torch.randn(3, 10)).backward(torch.randn(3, 1))
    assert (view.weight.grad != 0).tolist() == view.mask.tolist()
