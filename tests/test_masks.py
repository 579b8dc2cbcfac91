"""Masks: counts and ties of top-k, units of the patterns, and how one sparsity or number of units is divided."""

from __future__ import annotations

import math
from decimal import Decimal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tritonsparse.masks.distribution import apportion, divide, erk, uniform
from tritonsparse.masks.topk import kept_count, topk_mask, topk_masks
from tritonsparse.masks.units import (
    check_pattern,
    choose_masks,
    drop_grow,
    from_units,
    random_score,
    to_units,
    unit_count,
)
from tritonsparse.pattern import NM, Block, Channel, Pattern, Unstructured

quick = settings(max_examples=100, deadline=None, derandomize=True)


@pytest.mark.parametrize(
    ("n", "sparsity", "kept"),
    [
        # Binary floats miss these: (1 - .9) 10 = .9999999999999998, and AC/DC's code keeps 19 of 100 at .8.
        (100, 0.8, 20), (10, 0.9, 1), (100, 0.98, 2), (100, 0.95, 5), (1000, 0.999, 1), (100, 0.57, 43),
        # a half rounds up: 2.5, 8.5 (banker's rounding would give 8), .5
        (5, 0.5, 3), (10, 0.15, 9), (1, 0.5, 1),
        # never fewer than 1, never more than n
        (10, 0.999, 1), (7, 0.0, 7), (1, 0.99, 1),
    ],
)  # fmt: skip
def test_kept_is_the_exact_share_rounded_half_up_and_at_least_one(n: int, sparsity: float, kept: int) -> None:
    assert kept_count(n, sparsity) == kept


@given(st.integers(1, 10**9), st.decimals(0, "0.999", places=3))
@quick
def test_kept_is_within_half_of_the_exact_share(n: int, sparsity: Decimal) -> None:
    kept, exact = kept_count(n, float(sparsity)), (1 - sparsity) * n
    assert 1 <= kept <= n
    assert kept == 1 or Decimal("-0.5") < kept - exact <= Decimal("0.5")


def test_ties_go_to_the_lowest_index() -> None:
    score = torch.tensor([[0.5, 2.0, 0.5], [0.5, 1.0, 0.5]])
    assert topk_mask(score, 4).tolist() == [[True, True, True], [False, True, False]]
    assert topk_mask(torch.zeros(2, 2), 1).tolist() == [[True, False], [False, False]]


def test_globally_ties_go_to_the_earlier_tensor() -> None:
    masks = topk_masks([torch.tensor([1.0, 3.0]), torch.tensor([[1.0], [2.0]])], 3)
    assert [mask.tolist() for mask in masks] == [[True, True], [[False], [True]]]


def test_scores_of_several_dtypes_compete_by_value() -> None:
    scores = [torch.tensor([1.0, -3.0]).bfloat16(), torch.tensor([0.5, 1.25]), torch.tensor([1.0]).double()]
    assert [mask.tolist() for mask in topk_masks(scores, 2)] == [[True, False], [False, True], [False]]
    assert [mask.tolist() for mask in topk_masks(scores[:2], 3)] == [[True, False], [True, True]]


@given(st.lists(st.sampled_from([-math.inf, -1.0, 0.0, 0.25, 1.0, 1.5, math.inf]), min_size=1), st.data())
@quick
def test_topk_is_the_head_of_a_stable_sort(values: list[float], data: st.DataObject) -> None:
    kept = data.draw(st.integers(0, len(values)))
    order = sorted(range(len(values)), key=lambda i: -values[i])  # Python's sort is stable
    chosen = topk_mask(torch.tensor(values), kept)
    assert chosen.nonzero().flatten().tolist() == sorted(order[:kept])


def test_scores_without_an_order_and_counts_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="got NaN; the weights have diverged"):
        topk_mask(torch.tensor([1.0, math.nan]), 1)
    for kept in (-1, 3):
        with pytest.raises(ValueError, match=f"0 <= kept <= 2, got {kept}; correct the count"):
            topk_mask(torch.zeros(2), kept)


def test_blocks_are_scored_by_their_sum_and_kept_whole() -> None:
    score = torch.tensor([[1.0, 0, 5, 0], [0, 1, 0, 0], [3, 0, 0, 0], [0, 0, 0, 1]])
    # Sums: [[2, 5], [3, 1]]; the two largest are 5 and 3.
    assert to_units(score, Block(2, 2)).tolist() == [[2, 5], [3, 1]]
    mask = choose_masks({"w": score}, 0.5, Block(2, 2))["w"]
    assert mask.int().tolist() == [[0, 0, 1, 1], [0, 0, 1, 1], [1, 1, 0, 0], [1, 1, 0, 0]]


def test_n_of_m_keeps_the_largest_of_each_group_and_the_first_of_equals() -> None:
    score = torch.tensor([[3.0, 1, 2, 0, 5, 5, 5, 5]])
    assert choose_masks({"w": score}, 0.0, NM(2, 4))["w"].int().tolist() == [[1, 0, 1, 0, 1, 1, 0, 0]]
    tile = torch.tensor([[9.0, 8.0], [7.0, 1.0]])
    assert choose_masks({"w": tile}, 0.0, NM(1, 2))["w"].int().tolist() == [[1, 0], [1, 0]]
    assert choose_masks({"w": tile}, 0.0, NM(1, 2, transposable=True))["w"].int().tolist() == [[0, 1], [1, 0]]


def test_channels_of_layers_compete_by_their_mean() -> None:
    scores = {"narrow": torch.tensor([[4.0, 4.0], [1.0, 1.0]]), "wide": torch.tensor([[3.0, 3, 3, 3], [2, 2, 2, 2]])}
    masks = choose_masks(scores, 0.5, Channel(), "global")
    assert masks["narrow"].int().tolist() == [[1, 1], [0, 0]]
    assert masks["wide"].int().tolist() == [[1, 1, 1, 1], [0, 0, 0, 0]]


def test_a_global_choice_gives_ties_to_the_earlier_layer() -> None:
    masks = choose_masks({"a": torch.ones(1, 2), "b": torch.ones(1, 2)}, 0.25, Unstructured(), "global")
    assert (masks["a"].int().tolist(), masks["b"].int().tolist()) == ([[1, 1]], [[1, 0]])


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
    units = to_units(mask.float(), pattern)
    size = mask.numel() // unit_count(shape, pattern)
    assert set(units.unique().tolist()) <= {0.0, float(size)}
    assert int((units > 0).sum()) == kept_count(unit_count(shape, pattern), round(sparsity, 3))
    chosen = to_units(score, pattern)[units > 0]
    left = to_units(score, pattern)[units == 0]
    assert not left.numel() or chosen.min() >= left.max()
    assert torch.equal(from_units(units > 0, pattern, shape), mask) and mask.is_contiguous()


def test_dropping_and_growing_keeps_the_count() -> None:
    mask = torch.tensor([[True, True, True, False, False, False]])
    weight = torch.tensor([[0.1, 0.5, 0.3, 0.0, 0.0, 0.0]])
    gradient = torch.tensor([[9.0, 0.0, 0.0, 1.0, 3.0, 2.0]])
    # Dropped: 0.1 (the smallest). Grown: 3 among what was not kept; 9 where the dropped may come back.
    fresh = drop_grow(mask, weight, gradient, 1, Unstructured(), allow_regrow=False)
    assert fresh.int().tolist() == [[0, 1, 1, 0, 1, 0]]
    again = drop_grow(mask, weight, gradient, 1, Unstructured(), allow_regrow=True)
    assert torch.equal(again, mask)
    most = drop_grow(mask, weight, gradient, 3, Unstructured(), allow_regrow=False)
    assert most.int().tolist() == [[0, 0, 0, 1, 1, 1]]
    assert torch.equal(drop_grow(mask, weight, gradient, 0, Unstructured(), allow_regrow=False), mask)


def test_a_full_mask_has_nothing_else_to_grow() -> None:
    mask = torch.ones(1, 3, dtype=torch.bool)
    score = torch.tensor([[1.0, 2.0, 3.0]])
    assert torch.equal(drop_grow(mask, score, score, 1, Unstructured(), allow_regrow=True), mask)


def test_random_scores_depend_on_seed_and_key_alone() -> None:
    first = random_score((3, 4), 5, "set", "layer", 7)
    torch.manual_seed(123)
    assert torch.equal(first, random_score((3, 4), 5, "set", "layer", 7))
    others = [random_score((3, 4), 6, "set", "layer", 7), random_score((3, 4), 5, "set", "layer", 8)]
    assert not any(torch.equal(first, other) for other in others)


def test_a_block_that_does_not_divide_a_layer_is_refused_with_one_that_does() -> None:
    with pytest.raises(ValueError, match=r"blocks of 32x32, got fc of shape \[48, 64\]; use 'block:24x32' or exclude"):
        check_pattern("gmp", {"fc": (48, 64)}, Block(32, 32))
    with pytest.raises(ValueError, match=r"a multiple of 4 for pattern '2:4', got fc of shape \[8, 410\]; exclude"):
        check_pattern("gmp", {"fc": (8, 410)}, NM(2, 4))
    both = NM(2, 4, transposable=True)
    with pytest.raises(ValueError, match=r"rows and columns of a multiple of 4 for pattern '2:4:trans.* got fc"):
        check_pattern("gmp", {"fc": (410, 8)}, both)
    check_pattern("gmp", {"fc": (410, 8)}, NM(2, 4))
    check_pattern("gmp", {"fc": (48, 64)}, Block(16, 64))


def units(total: int, shares: list[float], room: list[int], size: list[int] | None = None) -> list[int]:
    names = [str(number) for number in range(len(shares))]
    sizes = dict(zip(names, size or [1] * len(names), strict=True))
    return list(
        apportion(total, dict(zip(names, shares, strict=True)), dict(zip(names, room, strict=True)), sizes).values()
    )


def test_units_are_shared_out_by_largest_remainder_within_room() -> None:
    # 10 by 5 : 3 : 2; then 10 by thirds, the remainder to the first.
    assert units(10, [0.5, 0.3, 0.2], [10, 10, 10]) == [5, 3, 2]
    assert units(10, [1.0, 1.0, 1.0], [10, 10, 10]) == [4, 3, 3]
    # 3.75, 2.5, 1.25 of 7.5: floors 3, 2, 1, of 7 the one left goes to .75.
    assert units(7, [3.0, 2.0, 1.0], [9, 9, 9]) == [4, 2, 1]
    # The first is full at 2; the other 8 are shared 3 : 2, 4.8 and 3.2.
    assert units(10, [0.5, 0.3, 0.2], [2, 10, 10]) == [2, 5, 3]
    # Only layers without a share have room left; no shares at all are equal shares; nothing to give.
    assert units(6, [1.0, 0.0, 0.0], [2, 3, 9]) == [2, 2, 2]
    assert units(4, [0.0, 0.0], [9, 9]) == [2, 2]
    assert units(0, [1.0, 2.0], [9, 9]) == [0, 0] == units(-3, [1.0, 2.0], [9, 9])


def test_units_of_several_sizes_fit_into_the_total() -> None:
    # 20 elements in rows of 8 and 3: 10 each are 1 row and 3 rows; 3 elements are left, one row of 3.
    assert units(20, [1.0, 1.0], [9, 9], [8, 3]) == [1, 4]


@quick
@given(
    layers=st.lists(st.tuples(st.floats(0, 10), st.integers(0, 50)), min_size=1, max_size=6),
    share=st.floats(0, 1),
)
def test_nothing_is_lost_and_no_room_overrun(layers: list[tuple[float, int]], share: float) -> None:
    shares, room = [each for each, _ in layers], [each for _, each in layers]
    total = round(share * sum(room))
    given_out = units(total, shares, room)
    assert sum(given_out) == total
    assert all(0 <= count <= limit for count, limit in zip(given_out, room, strict=True))


def test_more_than_there_is_room_for_is_refused() -> None:
    with pytest.raises(ValueError, match=r"apportion: expected a total of at most 4, the room there is, got 5"):
        units(5, [1.0, 1.0], [2, 2])


def test_erk_divides_by_the_sum_over_the_product_of_dimensions() -> None:
    # raw: 8/16, 10/16. Budget 8 + 8 kept; eps = 16/(8 + 10) = 8/9; densities 4/9 and 5/9.
    assert erk({"a": (4, 4), "b": (2, 8)}, 0.5) == pytest.approx({"a": 5 / 9, "b": 4 / 9})


def test_erk_makes_small_layers_dense_and_takes_their_weights_from_the_others() -> None:
    # raw: .2, 1.5; zeros asked 50 + 1. First eps = 51/(20 + 3) = 2.2 makes b denser than 1: b is dense.
    # Then eps = (50 - 1)/20 = 2.45: a keeps 49, b 2, together the 51 of the budget.
    assert erk({"a": (10, 10), "b": (2, 1)}, 0.5) == pytest.approx({"a": 0.51, "b": 0.0})


def test_erk_of_no_sparsity_is_dense() -> None:
    assert erk({"a": (10, 10), "b": (2, 8), "c": (3, 3, 3)}, 0.0) == pytest.approx({"a": 0.0, "b": 0.0, "c": 0.0})


@given(
    st.lists(st.tuples(st.integers(1, 64), st.integers(1, 64)), min_size=1, max_size=6),
    st.sampled_from([0.1, 0.5, 0.8, 0.9, 0.99]),
)
@quick
def test_erk_spends_the_budget_of_uniform(sizes: list[tuple[int, int]], sparsity: float) -> None:
    shapes = {str(i): size for i, size in enumerate(sizes)}
    divided = erk(shapes, sparsity)
    assert all(-1e-12 <= p <= 1 for p in divided.values())
    zeros = sum(divided[name] * math.prod(shape) for name, shape in shapes.items())
    asked = sum(int(Decimal(str(sparsity)) * math.prod(shape)) for shape in shapes.values())
    assert zeros == pytest.approx(asked, abs=1e-6)


def test_uniform_is_uniform_and_an_unknown_distribution_is_named() -> None:
    assert uniform({"a": (2, 2), "b": (3,)}, 0.5) == {"a": 0.5, "b": 0.5}
    with pytest.raises(ValueError, match="expected one of uniform, erk, got 'er'; choose one of them"):
        divide("er", {}, 0.5)
