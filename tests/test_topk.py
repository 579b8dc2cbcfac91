"""Counts and ties of top-k masks."""

from __future__ import annotations

import math
from decimal import Decimal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tritonsparse.masks.topk import kept_count, topk_mask, topk_masks

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
