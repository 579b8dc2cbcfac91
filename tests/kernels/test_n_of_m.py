"""The definition of N:M masks and what it refuses, without Triton."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

# At the end of the path: the folder's modules have names of their own.
sys.path.append(str(Path(__file__).parent))

from cases.n_of_m import CASES, Case, assert_masks

from tritonsparse.kernels.select.n_of_m import n_of_m_mask


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_score_is_kept_where_fewer_than_n_of_its_group_come_before_it(case: Case) -> None:
    assert_masks(case, "torch", torch.bfloat16)


def test_two_rows_by_hand() -> None:
    scores = torch.tensor([[3.0, 1, 2, 0, 5, 5, 5, 5], [-1, 0, -4, 2, 0.0, -0.0, 0, 1]])
    assert n_of_m_mask(scores, 2, 4).int().tolist() == [[1, 0, 1, 0, 1, 1, 0, 0], [0, 1, 0, 1, 1, 0, 0, 1]]
    assert n_of_m_mask(scores, 1, 4, magnitude=True).int().tolist() == [
        [1, 0, 0, 0, 1, 0, 0, 0],
        [0, 0, 1, 0, 0, 0, 0, 1],
    ]


SCORES, NAN = torch.zeros(2, 8), float("nan")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"backend": "cuda"}, r'^n_of_m_mask: expected backend "torch" or "triton", got \'cuda\'; pass either'),
        ({"n": 0}, "expected 0 < n < m, got n=0 and m=4; pass for example n=2"),
        ({"n": 4}, "expected 0 < n < m, got n=4 and m=4"),
        ({"m": 3}, r"rows are a multiple of 3, got float32 \[2, 8\] on cpu; choose a group that divides them"),
        ({"scores": SCORES[0]}, "a floating-point matrix .*choose a group"),
        ({"scores": SCORES.int()}, "a floating-point matrix"),
        ({"scores": SCORES.double() + NAN}, "^n_of_m_mask: expected scores without NaN, .*have diverged"),
        ({"scores": SCORES + NAN, "function": "choose_masks"}, "^choose_masks: expected scores without NaN"),
        ({"scores": SCORES.double(), "backend": "triton"}, 'float16, bfloat16 or float32 .*pass backend="torch"'),
        ({"scores": torch.zeros(1, 65), "m": 65, "backend": "triton"}, 'groups of at most 64 .*pass backend="torch"'),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused_with_a_remedy(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        n_of_m_mask(**{"scores": SCORES, "n": 2, "m": 4} | change)
