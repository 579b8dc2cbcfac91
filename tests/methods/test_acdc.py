"""AC/DC: the paper's phase tables epoch by epoch, its update by hand, and the dense twin."""

from __future__ import annotations

from typing import Any

import pytest
from method_runs import Run, linear
from torch import nn

from tritonsparse.methods import ACDC, PHASES, Phases

TURNS = Phases([(0, "dense"), (1, "sparse"), (2, "dense"), (3, "sparse")], 4)


def spans(*pairs: tuple[int, int]) -> set[int]:
    return {epoch for first, last in pairs for epoch in range(first, last + 1)}


@pytest.mark.parametrize(
    ("name", "sparse", "count"),
    [
        # Peste et al., figure 1 and the published configurations; epochs from 0.
        ("imagenet100", spans(*((start, start + 4) for start in range(10, 80, 10)), (85, 99)), 50),
        ("imagenet150", spans(*((start, start + 4) for start in range(10, 130, 10)), (135, 149)), 75),
        ("imagenet200", spans(*((start, start + 4) for start in range(10, 180, 10)), (185, 199)), 100),
        ("cifar100", spans((10, 29), (50, 69), (90, 109), (130, 149), (170, 199)), 110),
        ("transfoxl48", spans((5, 7), (11, 13), (17, 19), (23, 25), (29, 31), (39, 47)), 24),
    ],
)
def test_the_papers_tables_epoch_by_epoch(name: str, sparse: set[int], count: int) -> None:
    table = PHASES[name]
    steps = [step for step in range(7 * int(table.epochs)) if table.at(step, 7) == "sparse"]
    # A phase holds for all steps of its epochs.
    assert steps == [7 * epoch + step for epoch in sorted(sparse) for step in range(7)]
    assert sum(table.at(epoch, 1) == "sparse" for epoch in range(int(table.epochs))) == count


def test_a_table_scales_to_another_length() -> None:
    short = PHASES["transfoxl48"].scaled(12)
    # A quarter of 48: sparse from epoch 1.25 and from 9.75, exact at 4 steps an epoch.
    assert [short.at(step, 4) for step in (4, 5, 7, 8)] == ["dense", "sparse", "sparse", "dense"]
    assert (short.at(38, 4), short.at(39, 4), short.at(47, 4)) == ("dense", "sparse", "sparse")


@pytest.mark.parametrize(
    "starts",
    [[], [(1, "dense")], [(0, "dense"), (0, "sparse")], [(0, "dense"), (4, "sparse")], [(0, "d")]],
    ids=str,
)
def test_a_table_that_does_not_rise_from_zero_is_refused(starts: list[Any]) -> None:
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
    # No momentum from before the phase: 0.1 each, not 0.15.
    assert a.tolist() == close([0.7, 0.1, 0.5, 0.1])


@pytest.mark.parametrize(("reset", "expected"), [(True, 0.1), (False, 0.15)])
def test_moments_are_reset_only_where_a_dense_phase_starts_and_only_if_asked(reset: bool, expected: float) -> None:
    run = start((0.0, 0.0, 0.0, -1.0), reset_moments=reset)
    before = run.views[0].weight[0, 0].item()
    run.step(-1.0, -1.0)
    assert run.views[0].weight[0, 0].item() - before == pytest.approx(expected)


def test_uniform_scope_prunes_each_layer_alike_and_strict_keeps_one_less_as_the_published_code() -> None:
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
