"""Units of the patterns: exact counts, lowest index first, and refusals that say which block would fit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tritonsparse.masks.topk import kept_count
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

BLOCK = Block(2, 2)


def test_blocks_are_scored_by_their_sum_and_kept_whole() -> None:
    score = torch.tensor([[1.0, 0, 5, 0], [0, 1, 0, 0], [3, 0, 0, 0], [0, 0, 0, 1]])
    # Sums: [[2, 5], [3, 1]]; the two largest are 5 and 3.
    assert to_units(score, BLOCK).tolist() == [[2, 5], [3, 1]]
    mask = choose_masks({"w": score}, 0.5, BLOCK)["w"]
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


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 5),
    st.integers(1, 5),
    st.sampled_from([Unstructured(), Block(2, 3), Block(4, 1), Channel()]),
    st.floats(0, 0.99),
    st.integers(0, 3),
)
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
