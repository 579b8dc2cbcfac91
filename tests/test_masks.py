"""Masks: counts and ties of top-k, units of the patterns, and how one sparsity or number of units is divided."""

from __future__ import annotations

import math
from decimal import Decimal
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import tensor

from tritonsparse.masks import units
from tritonsparse.masks.distribution import apportion, divide, erk, uniform
from tritonsparse.masks.topk import kept_count, topk_mask, topk_masks
from tritonsparse.masks.units import choose_masks, drop_grow, random_score, to_units, unit_count
from tritonsparse.pattern import NM, Block, Channel, Pattern, Unstructured

quick = settings(max_examples=100, deadline=None, derandomize=True)


def listed(*masks: torch.Tensor) -> list[Any]:
    return [mask.int().tolist() for mask in masks]


def test_kept_is_the_exact_share_rounded_half_up_and_at_least_one() -> None:
    cases = (
        # Binary floats miss these: (1 - .9) 10 = .9999999999999998, and AC/DC's code keeps 19 of 100 at .8.
        (100, 0.8, 20), (10, 0.9, 1), (100, 0.98, 2), (100, 0.95, 5), (1000, 0.999, 1), (100, 0.57, 43),
        # A half rounds up: 2.5, 8.5 (banker's rounding would give 8), .5. Never fewer than 1, never more than n.
        (5, 0.5, 3), (10, 0.15, 9), (1, 0.5, 1), (10, 0.999, 1), (7, 0.0, 7), (1, 0.99, 1),
    )  # fmt: skip
    assert [(n, sparsity, kept_count(n, sparsity)) for n, sparsity, _ in cases] == list(cases)


@given(st.integers(1, 10**9), st.decimals(0, "0.999", places=3))
@quick
def test_kept_is_within_half_of_the_exact_share(n: int, sparsity: Decimal) -> None:
    kept, exact = kept_count(n, float(sparsity)), (1 - sparsity) * n
    assert 1 <= kept <= n
    assert kept == 1 or Decimal("-0.5") < kept - exact <= Decimal("0.5")


def test_ties_go_to_the_lowest_index_and_the_earlier_tensor_and_dtypes_compete_by_value() -> None:
    score = tensor([[0.5, 2.0, 0.5], [0.5, 1.0, 0.5]])
    assert listed(topk_mask(score, 4), topk_mask(torch.zeros(2, 2), 1)) == [[[1, 1, 1], [0, 1, 0]], [[1, 0], [0, 0]]]
    assert listed(*topk_masks([tensor([1.0, 3.0]), tensor([[1.0], [2.0]])], 3)) == [[1, 1], [[0], [1]]]
    masks = choose_masks({"a": torch.ones(1, 2), "b": torch.ones(1, 2)}, 0.25, Unstructured(), "global")
    assert listed(masks["a"], masks["b"]) == [[[1, 1]], [[1, 0]]]
    scores = [tensor([1.0, -3.0]).bfloat16(), tensor([0.5, 1.25]), tensor([1.0]).double()]
    assert listed(*topk_masks(scores, 2)) == [[1, 0], [0, 1], [0]]
    assert listed(*topk_masks(scores[:2], 3)) == [[1, 0], [1, 1]]


@given(st.lists(st.sampled_from([-math.inf, -1.0, 0.0, 0.25, 1.0, 1.5, math.inf]), min_size=1), st.data())
@quick
def test_topk_is_the_head_of_a_stable_sort(values: list[float], data: st.DataObject) -> None:
    kept = data.draw(st.integers(0, len(values)))
    order = sorted(range(len(values)), key=lambda i: -values[i])  # Python's sort is stable
    assert topk_mask(tensor(values), kept).nonzero().flatten().tolist() == sorted(order[:kept])


def test_blocks_are_scored_by_their_sum_channels_by_their_mean_and_n_of_m_by_group_and_kept_whole() -> None:
    score = tensor([[1.0, 0, 5, 0], [0, 1, 0, 0], [3, 0, 0, 0], [0, 0, 0, 1]])
    # Sums: [[2, 5], [3, 1]]; the two largest are 5 and 3.
    assert to_units(score, Block(2, 2)).tolist() == [[2, 5], [3, 1]]
    mask = choose_masks({"w": score}, 0.5, Block(2, 2))["w"]
    assert listed(mask) == [[[0, 0, 1, 1], [0, 0, 1, 1], [1, 1, 0, 0], [1, 1, 0, 0]]]
    scores = {"narrow": tensor([[4.0, 4.0], [1.0, 1.0]]), "wide": tensor([[3.0, 3, 3, 3], [2, 2, 2, 2]])}
    masks = choose_masks(scores, 0.5, Channel(), "global")
    assert listed(masks["narrow"], masks["wide"]) == [[[1, 1], [0, 0]], [[1, 1, 1, 1], [0, 0, 0, 0]]]
    tile = tensor([[9.0, 8.0], [7.0, 1.0]])
    for score, pattern, expected in (
        (tensor([[3.0, 1, 2, 0, 5, 5, 5, 5]]), NM(2, 4), [[1, 0, 1, 0, 1, 1, 0, 0]]),  # the first of equals
        (tile, NM(1, 2), [[1, 0], [1, 0]]),
        (tile, NM(1, 2, transposable=True), [[0, 1], [1, 0]]),
    ):
        assert listed(choose_masks({"w": score}, 0.0, pattern)["w"]) == [expected]


@quick
@given(
    st.integers(1, 5), st.integers(1, 5), st.sampled_from([Unstructured(), Block(2, 3), Block(4, 1), Channel()]),
    st.floats(0, 0.99), st.integers(0, 3),
)  # fmt: skip
def test_counts_are_exact_in_units(rows: int, columns: int, pattern: Pattern, sparsity: float, seed: int) -> None:
    shape = (4 * rows, 6 * columns)
    # Few distinct scores: most are ties.
    score = torch.randint(0, 4, shape, generator=torch.Generator().manual_seed(seed)).float()
    mask = choose_masks({"w": score}, round(sparsity, 3), pattern)["w"]
    kept, count = to_units(mask.float(), pattern), unit_count(shape, pattern)
    assert set(kept.unique().tolist()) <= {0.0, float(mask.numel() // count)}
    assert int((kept > 0).sum()) == kept_count(count, round(sparsity, 3))
    chosen, left = (to_units(score, pattern)[each] for each in (kept > 0, kept == 0))
    assert not left.numel() or chosen.min() >= left.max()
    assert torch.equal(units.from_units(kept > 0, pattern, shape), mask) and mask.is_contiguous()


def test_dropping_and_growing_keeps_the_count_by_scores_that_may_be_random() -> None:
    mask, weight = tensor([[True, True, True, False, False, False]]), tensor([[0.1, 0.5, 0.3, 0.0, 0.0, 0.0]])
    gradient = tensor([[9.0, 0.0, 0.0, 1.0, 3.0, 2.0]])
    # Dropped: 0.1 (the smallest). Grown: 3 among what was not kept; 9 where the dropped may come back.
    for count, regrow, expected in (
        *((1, False, [0, 1, 1, 0, 1, 0]), (1, True, [1, 1, 1, 0, 0, 0])),
        *((3, False, [0, 0, 0, 1, 1, 1]), (0, False, [1, 1, 1, 0, 0, 0])),
    ):
        found = drop_grow(mask, weight, gradient, count, Unstructured(), allow_regrow=regrow)
        assert found.dtype == torch.bool and listed(found) == [[expected]]
    # A full mask has nothing else to grow.
    full, score = torch.ones(1, 3, dtype=torch.bool), tensor([[1.0, 2.0, 3.0]])
    assert torch.equal(drop_grow(full, score, score, 1, Unstructured(), allow_regrow=True), full)
    # Random scores depend on seed and key alone.
    first = random_score((3, 4), 5, "set", "layer", 7)
    torch.manual_seed(123)
    assert torch.equal(first, random_score((3, 4), 5, "set", "layer", 7))
    others = [random_score((3, 4), 6, "set", "layer", 7), random_score((3, 4), 5, "set", "layer", 8)]
    assert not any(torch.equal(first, other) for other in others)


def shared(total: int, shares: list[float], room: list[int], size: list[int] | None = None) -> list[int]:
    each = (dict(enumerate(values)) for values in (shares, room, size or [1] * len(room)))
    return list(apportion(total, *each).values())  # type: ignore[arg-type]


def test_units_are_shared_out_by_largest_remainder_within_room_and_size() -> None:
    # 10 by 5 : 3 : 2; then 10 by thirds, the remainder to the first.
    assert shared(10, [0.5, 0.3, 0.2], [10, 10, 10]) == [5, 3, 2]
    assert shared(10, [1.0, 1.0, 1.0], [10, 10, 10]) == [4, 3, 3]
    # 3.75, 2.5, 1.25 of 7.5: floors 3, 2, 1, of 7 the one left goes to .75.
    assert shared(7, [3.0, 2.0, 1.0], [9, 9, 9]) == [4, 2, 1]
    # The first is full at 2; the other 8 are shared 3 : 2, 4.8 and 3.2.
    assert shared(10, [0.5, 0.3, 0.2], [2, 10, 10]) == [2, 5, 3]
    # Only layers without a share have room left; no shares at all are equal shares; nothing to give.
    assert shared(6, [1.0, 0.0, 0.0], [2, 3, 9]) == [2, 2, 2]
    assert shared(4, [0.0, 0.0], [9, 9]) == [2, 2]
    assert shared(0, [1.0, 2.0], [9, 9]) == [0, 0] == shared(-3, [1.0, 2.0], [9, 9])
    # 20 elements in rows of 8 and 3: 10 each are 1 row and 3 rows; 3 elements are left, one row of 3.
    assert shared(20, [1.0, 1.0], [9, 9], [8, 3]) == [1, 4]


@quick
@given(st.lists(st.tuples(st.floats(0, 10), st.integers(0, 50)), min_size=1, max_size=6), st.floats(0, 1))
def test_nothing_is_lost_and_no_room_overrun(layers: list[tuple[float, int]], share: float) -> None:
    shares, room = [each for each, _ in layers], [each for _, each in layers]
    given_out = shared(round(share * sum(room)), shares, room)
    assert sum(given_out) == round(share * sum(room))
    assert all(0 <= count <= limit for count, limit in zip(given_out, room, strict=True))


def test_erk_divides_by_the_sum_over_the_product_of_dimensions_and_uniform_is_uniform() -> None:
    # raw: 8/16, 10/16. Budget 8 + 8 kept; eps = 16/(8 + 10) = 8/9; densities 4/9 and 5/9.
    assert erk({"a": (4, 4), "b": (2, 8)}, 0.5) == pytest.approx({"a": 5 / 9, "b": 4 / 9})
    # Small layers are dense, the others give for them. raw: .2, 1.5; zeros asked 50 + 1. First eps = 51/(20 + 3)
    # = 2.2 makes b denser than 1: b is dense. Then eps = (50 - 1)/20 = 2.45: a keeps 49, b 2, the 51 of the budget.
    assert erk({"a": (10, 10), "b": (2, 1)}, 0.5) == pytest.approx({"a": 0.51, "b": 0.0})
    assert erk({"a": (10, 10), "b": (2, 8), "c": (3, 3, 3)}, 0.0) == pytest.approx({"a": 0.0, "b": 0.0, "c": 0.0})
    assert uniform({"a": (2, 2), "b": (3,)}, 0.5) == {"a": 0.5, "b": 0.5}


shapes = st.lists(st.tuples(st.integers(1, 64), st.integers(1, 64)), min_size=1, max_size=6)


@given(shapes, st.sampled_from([0.1, 0.5, 0.8, 0.9, 0.99]))
@quick
def test_erk_spends_the_budget_of_uniform(sizes: list[tuple[int, int]], sparsity: float) -> None:
    shapes = {str(i): size for i, size in enumerate(sizes)}
    divided = erk(shapes, sparsity)
    assert all(-1e-12 <= p <= 1 for p in divided.values())
    zeros = sum(divided[name] * math.prod(shape) for name, shape in shapes.items())
    asked = sum(int(Decimal(str(sparsity)) * math.prod(shape)) for shape in shapes.values())
    assert zeros == pytest.approx(asked, abs=1e-6)


REFUSED: list[tuple[Any, str]] = [
    (lambda: topk_mask(tensor([1.0, math.nan]), 1), "got NaN; the weights have diverged"),
    (lambda: topk_mask(torch.zeros(2), -1), "0 <= kept <= 2, got -1; correct the count"),
    (lambda: topk_mask(torch.zeros(2), 3), "0 <= kept <= 2, got 3; correct the count"),
    (lambda: shared(5, [1.0, 1.0], [2, 2]), "apportion: expected a total of at most 4, the room there is, got 5"),
    (lambda: divide("er", {}, 0.5), "expected one of uniform, erk, got 'er'; choose one of them"),
    (lambda: units.check_pattern("gmp", {"fc": (48, 64)}, Block(32, 32)),
     r"blocks of 32x32, got fc of shape \[48, 64\]; use 'block:24x32' or exclude"),
    (lambda: units.check_pattern("gmp", {"fc": (8, 410)}, NM(2, 4)),
     r"a multiple of 4 for pattern '2:4', got fc of shape \[8, 410\]; exclude"),
    (lambda: units.check_pattern("gmp", {"fc": (410, 8)}, NM(2, 4, transposable=True)),
     r"rows and columns of a multiple of 4 for pattern '2:4:trans.* got fc"),
]  # fmt: skip


def test_what_has_no_order_no_room_no_name_or_does_not_divide_is_refused() -> None:
    for call, words in REFUSED:
        with pytest.raises(ValueError, match=words):
            call()
    units.check_pattern("gmp", {"fc": (410, 8)}, NM(2, 4))
    units.check_pattern("gmp", {"fc": (48, 64)}, Block(16, 64))
