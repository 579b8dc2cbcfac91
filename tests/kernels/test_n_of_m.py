"""The definition of N:M masks and what it refuses, without Triton."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tritonsparse.kernels.select.n_of_m import n_of_m_mask


@settings(deadline=None, max_examples=60)
@given(
    st.integers(0, 4),
    st.integers(1, 4),
    st.integers(2, 9).flatmap(lambda m: st.tuples(st.integers(1, m - 1), st.just(m))),
    st.booleans(),
    st.integers(0, 9),
)
def test_a_score_is_kept_where_fewer_than_n_of_its_group_come_before_it(
    rows: int, groups: int, pattern: tuple[int, int], magnitude: bool, seed: int
) -> None:
    n, m = pattern
    # Few distinct scores: most are ties.
    scores = torch.randint(-2, 3, (rows, groups * m), generator=torch.Generator().manual_seed(seed)).float()
    mask = n_of_m_mask(scores, n, m, magnitude=magnitude)
    for i in range(rows):
        for j in range(groups * m):
            first = j // m * m
            group = scores[i, first : first + m].abs() if magnitude else scores[i, first : first + m]
            mine = j - first
            before = int((group > group[mine]).sum() + (group[:mine] == group[mine]).sum())
            assert mask[i, j].item() == (before < n)


def test_two_rows_by_hand() -> None:
    scores = torch.tensor([[3.0, 1, 2, 0, 5, 5, 5, 5], [-1, 0, -4, 2, 0.0, -0.0, 0, 1]])
    assert n_of_m_mask(scores, 2, 4).int().tolist() == [[1, 0, 1, 0, 1, 1, 0, 0], [0, 1, 0, 1, 1, 0, 0, 1]]
    assert n_of_m_mask(scores, 1, 4, magnitude=True).int().tolist() == [
        [1, 0, 0, 0, 1, 0, 0, 0],
        [0, 0, 1, 0, 0, 0, 0, 1],
    ]


SCORES = torch.zeros(2, 8)


@pytest.mark.parametrize(
    ("given", "expected", "remedy"),
    [
        ({"backend": "cuda"}, 'backend "torch" or "triton", got \'cuda\'', "pass either"),
        ({"n": 0}, "0 < n < m, got n=0 and m=4", "for example n=2"),
        ({"n": 4}, "0 < n < m, got n=4 and m=4", "for example n=2"),
        ({"m": 3}, "rows are a multiple of 3, got float32 [2, 8]", "choose a group that divides them"),
        ({"scores": SCORES[0]}, "a floating-point matrix", "choose a group"),
        ({"scores": SCORES.int()}, "a floating-point matrix", "choose a group"),
        ({"scores": torch.full((1, 4), float("nan"))}, "without NaN", "have diverged"),
        ({"scores": SCORES.double(), "backend": "triton"}, "float16, bfloat16 or float32", 'backend="torch"'),
        ({"scores": torch.zeros(1, 65), "m": 65, "backend": "triton"}, "groups of at most 64", 'backend="torch"'),
    ],
)
def test_what_does_not_fit_is_refused_with_a_remedy(given: dict[str, Any], expected: str, remedy: str) -> None:
    with pytest.raises(ValueError) as error:
        n_of_m_mask(**{"scores": SCORES, "n": 2, "m": 4} | given)
    message = str(error.value)
    assert message.startswith("n_of_m_mask: expected ") and expected in message and remedy in message


def test_errors_bear_the_name_of_whoever_was_called() -> None:
    with pytest.raises(ValueError, match=r"^choose_masks: expected scores without NaN"):
        n_of_m_mask(torch.tensor([[1.0, float("nan")]]), 1, 2, function="choose_masks")
