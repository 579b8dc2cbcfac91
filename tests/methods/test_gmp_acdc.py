"""GMP's cubic and AC/DC's phases: at steps computed by hand, exact at the end, and the paper's tables."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from method_runs import Run, linear
from torch import nn

from tritonsparse.masks.distribution import erk
from tritonsparse.masks.topk import kept_count
from tritonsparse.methods import ACDC, GMP, PHASES, Phases

TURNS = Phases([(0, "dense"), (1, "sparse"), (2, "dense"), (3, "sparse")], 4)


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
    # An initial sparsity holds from the first forward.
    assert Run(ladder(), GMP(sparsity=0.8, initial_sparsity=0.3), total_steps=100).view.kept_count() == 70


@pytest.mark.parametrize("update_every", [1, 7, 1000])
@pytest.mark.parametrize(("begin", "end"), [(0.0, 0.75), (0.3, 0.3), (0.0, 0.0), (1.0, 1.0)])
def test_the_final_sparsity_is_exact_whatever_the_schedule(update_every: int, begin: float, end: float) -> None:
    for sparsity, kept in ((0.9, 10), (0.995, 1), (0.12, 88)):
        method = GMP(sparsity=sparsity, begin=begin, end=end, update_every=update_every)
        run = Run(ladder(), method, total_steps=20)
        for _ in range(20):
            run.step()
        assert int(torch.count_nonzero(run.view.weight)) == run.kept()[0] == kept


def test_what_is_pruned_gets_no_gradient_never_returns_and_its_momentum_is_gone() -> None:
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
    run.view.weight.grad = None
    run.model(torch.randn(3, 10)).backward(torch.randn(3, 1))
    assert (run.view.weight.grad != 0).tolist() == kept.tolist()
    # A kept weight that happens to be zero ranks before the pruned ones.
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


def spans(*pairs: tuple[int, int]) -> list[int]:
    return [epoch for first, last in pairs for epoch in range(first, last + 1)]


# Peste et al., figure 1 and the published configurations; epochs from 0.
@pytest.mark.parametrize(
    ("name", "sparse", "count"),
    [
        ("imagenet100", spans(*((start, start + 4) for start in range(10, 80, 10)), (85, 99)), 50),
        ("imagenet150", spans(*((start, start + 4) for start in range(10, 130, 10)), (135, 149)), 75),
        ("imagenet200", spans(*((start, start + 4) for start in range(10, 180, 10)), (185, 199)), 100),
        ("cifar100", spans((10, 29), (50, 69), (90, 109), (130, 149), (170, 199)), 110),
        ("transfoxl48", spans((5, 7), (11, 13), (17, 19), (23, 25), (29, 31), (39, 47)), 24),
    ],
)
def test_the_papers_tables_epoch_by_epoch(name: str, sparse: list[int], count: int) -> None:
    table = PHASES[name]
    steps = [step for step in range(7 * int(table.epochs)) if table.at(step, 7) == "sparse"]
    # A phase holds for all steps of its epochs.
    assert steps == [7 * epoch + step for epoch in sparse for step in range(7)] and len(steps) == 7 * count


def test_a_table_scales_to_another_length_and_has_to_rise_from_zero() -> None:
    short = PHASES["transfoxl48"].scaled(12)
    # A quarter of 48: sparse from epoch 1.25 and from 9.75, exact at 4 steps an epoch.
    assert [short.at(step, 4) for step in (4, 5, 7, 8)] == ["dense", "sparse", "sparse", "dense"]
    assert (short.at(38, 4), short.at(39, 4), short.at(47, 4)) == ("dense", "sparse", "sparse")
    wrong: Any = ([], [(1, "dense")], [(0, "dense"), (0, "sparse")], [(0, "dense"), (4, "sparse")], [(0, "d")])
    for starts in wrong:
        with pytest.raises(ValueError, match="correct the table"):
            Phases(starts, 4)


def start(gradients: tuple[float, ...], **fields: Any) -> Run:
    """Layers "a" and "b" after steps with these gradients, two steps an epoch."""
    model = nn.ModuleDict({"a": linear([0.5, -0.1, 0.3, 0.2]), "b": linear([-0.9, 0.05])})
    method = ACDC(sparsity=0.5, phases=TURNS, **fields)
    run = Run(model, method, lr=0.1, momentum=0.5, total_steps=8, steps_per_epoch=2)
    for gradient in gradients:
        run.step(gradient, gradient)
    return run


def close(weights: list[float]) -> Any:
    return [pytest.approx(weights)]


def test_the_update_by_hand() -> None:
    run = start((0.0,))
    sparsifier, a = run.sparsifier, run.model["a"].weight
    assert {view.kind for view in run.views} == {"dense"}
    run.step(0.0, 0.0)
    # The sparse phase begins: of .5 .1 .3 .2 | .9 .05 the three largest over both layers are .9, .5, .3.
    assert {view.kind for view in run.views} == {"mask"}
    assert run.masks() == [[[1, 0, 1, 0]], [[1, 0]]]
    # The dense twin is still there, and the view is the sparse model.
    assert a.tolist() == close([0.5, -0.1, 0.3, 0.2]) == sparsifier.trained_state_dict()["a.weight"].tolist()
    assert sparsifier.finalized_state_dict()["a.weight"].tolist() == close([0.5, 0.0, 0.3, 0.0])
    run.step(0.0, 0.0)
    assert a.tolist() == close([0.5, 0.0, 0.3, 0.0]) == sparsifier.trained_state_dict()["a.weight"].tolist()
    run.step(-1.0, -1.0)
    # Dense again: what was pruned is 0 and is trained from there.
    assert {view.kind for view in run.views} == {"dense"}
    assert a.tolist() == close([0.6, 0.0, 0.4, 0.0])
    run.step(-1.0, -1.0)
    # No momentum from before the phase: 0.1 each, not 0.15, which it is where moments are kept.
    assert a.tolist() == close([0.7, 0.1, 0.5, 0.1])
    kept = start((0.0, 0.0, 0.0, -1.0), reset_moments=False)
    before = kept.views[0].weight[0, 0].item()
    kept.step(-1.0, -1.0)
    assert kept.views[0].weight[0, 0].item() - before == pytest.approx(0.15)
    # Of SGD the momentum is all there is.
    again = start((0.0, 0.0, 0.0, -1.0), reset_moments="momentum")
    before = again.views[0].weight[0, 0].item()
    again.step(-1.0, -1.0)
    assert again.views[0].weight[0, 0].item() - before == pytest.approx(0.1)
    # Uniform scope prunes each layer alike; strict keeps one less, as the published code.
    assert start((0.0, 0.0), scope="uniform").kept() == [2, 1]
    # k = ceil(6 x .5) = 3: what lies strictly above the third largest.
    assert start((0.0, 0.0), strict=True).masks() == [[[1, 0, 0, 0]], [[1, 0]]]


def test_statistics_tell_how_masks_change_and_what_stays_dead() -> None:
    run = start((0.0,) * 6)
    # No gradient revived a, b's pruned weights: 3 of 6 are exactly 0 when the second mask is chosen, the same one.
    expected = {"dead at step 2": 0.0, "dead at step 6": 0.5, "mask change at step 6": 0.0}
    other = start(())
    other.sparsifier.load_state_dict(run.sparsifier.state_dict())
    assert run.method.statistics() == other.method.statistics() == expected
