"""How units are shared out over layers: proportions, remainders, room, and sizes."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tritonsparse.masks.distribution import apportion


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


@settings(max_examples=100, deadline=None, derandomize=True)
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
