"""Schedules at points whose values are computed by hand."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tritonsparse.schedules import SCHEDULES, cosine, cubic, exponential, linear, sigmoid

SIX, THREE = (1 / (1 + math.exp(x)) for x in (6, 3))
QUARTERS = {  # at i/n = 0, 1/4, 1/2, 3/4, 1
    "constant": [1, 1, 1, 1, 1],
    "linear": [1, 0.75, 0.5, 0.25, 0],
    # (1 + cos 45 degrees)/2 = (2 + sqrt 2)/4
    "cosine": [1, (2 + math.sqrt(2)) / 4, 0.5, (2 - math.sqrt(2)) / 4, 0],
    # 1 - sigma(-6), 1 - sigma(-3), 1 - sigma(0), 1 - sigma(3), 1 - sigma(6)
    "sigmoid": [1 - SIX, 1 - THREE, 0.5, THREE, SIX],
    # the larger of the two above: .953 > .854 at 1/4, .146 > .047 at 3/4, .0025 > 0 at 1
    "sigmoid_cosine": [1, 1 - THREE, 0.5, (2 - math.sqrt(2)) / 4, SIX],
}


def test_at_the_quarters_of_the_span_and_where_sigmoid_cosine_is_the_sigmoid() -> None:
    for name, values in QUARTERS.items():
        found = [SCHEDULES[name](i, 8) for i in (0, 2, 4, 6, 8)]
        assert found == pytest.approx(values, rel=1e-12, abs=1e-15), name
    assert [i for i in range(101) if sigmoid(i, 100) > cosine(i, 100)] == [*range(5, 50), *range(96, 101)]


def test_exponential_counts_epochs_and_cubic_falls_short_by_the_cube_of_what_remains() -> None:
    assert [exponential(i, n) for i, n in ((0, 0), (1, 7), (2, 1))] == [1, math.exp(-1), math.exp(-2)]
    assert exponential(2, 0, beta=0.5) == math.exp(-1)
    # .9 + (.1 - .9)(1 - 1/2)^3 = .9 - .1
    assert [cubic(i, 10, 0.1, 0.9) for i in (0, 5)] == pytest.approx([0.1, 0.8])
    # Outside the span a schedule stands still, and a span of no length is over.
    assert cubic(-3, 10, 0.2, 0.9) == pytest.approx(0.2) and linear(20, 10) == 0.0
    assert cubic(10, 10, 0.1, 0.9) == cubic(99, 10, 0.2, 0.9) == cubic(0, 0, 0.2, 0.9) == 0.9


@given(st.sampled_from(sorted(SCHEDULES)), st.integers(1, 500), st.data())
@settings(max_examples=100, deadline=None, derandomize=True)
def test_annealing_starts_near_1_and_never_rises(name: str, n: int, data: st.DataObject) -> None:
    schedule, i = SCHEDULES[name], data.draw(st.integers(0, n - 1))
    assert 0.997 < schedule(0, n) <= 1.0
    assert 0.0 <= schedule(i + 1, n) <= schedule(i, n) + 1e-15
