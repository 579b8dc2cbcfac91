"""How one sparsity is divided over layers, and units shared out: proportions, remainders, room, and sizes."""

from __future__ import annotations

import math
from decimal import Decimal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tritonsparse.masks.distribution import apportion, divide, erk, uniform

quick = settings(max_examples=100, deadline=None, derandomize=True)


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
