"""Masks that are N:M along rows and columns: all of them counted, the best one found, and what is refused."""

from __future__ import annotations

import doctest
import importlib
import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tritonsparse.kernels.select.transposable import tile_masks, transposable_mask

PATTERNS = [(1, 2), (1, 3), (2, 3), (1, 4), (2, 4), (3, 4)]


@pytest.mark.parametrize(("n", "m", "count"), [(1, 2, 2), (1, 3, 6), (2, 3, 6), (1, 4, 24), (2, 4, 90), (3, 4, 24)])
def test_every_mask_of_a_tile_is_tried(n: int, m: int, count: int) -> None:
    found = tile_masks(n, m)
    # By looking at every one of 2^(m m) tiles.
    every = set()
    for bits in itertools.product((0, 1), repeat=m * m):
        tile = torch.tensor(bits).view(m, m)
        if bool((tile.sum(0) == n).all() and (tile.sum(1) == n).all()):
            every.add(bits)
    assert len(found) == count and set(found) == every
    assert list(found) == sorted(found, reverse=True)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 3), st.integers(1, 3), st.sampled_from(PATTERNS), st.booleans(), st.integers(0, 9))
def test_no_other_mask_of_a_tile_keeps_more(
    rows: int, columns: int, pattern: tuple[int, int], magnitude: bool, seed: int
) -> None:
    n, m = pattern
    # Few distinct scores: ties, which go to the first.
    scores = torch.randint(-3, 4, (rows * m, columns * m), generator=torch.Generator().manual_seed(seed)).float()
    mask = transposable_mask(scores, n, m, magnitude=magnitude)
    assert mask.shape == scores.shape and mask.is_contiguous()
    worth = scores.abs() if magnitude else scores
    for i, j in itertools.product(range(0, rows * m, m), range(0, columns * m, m)):
        tile, kept = worth[i : i + m, j : j + m].flatten(), mask[i : i + m, j : j + m].flatten()
        sums = [float((tile * torch.tensor(each)).sum()) for each in tile_masks(n, m)]
        assert tuple(kept.int().tolist()) == tile_masks(n, m)[sums.index(max(sums))]


def test_more_tiles_than_are_tried_at_once_are_all_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = torch.rand(20, 28, generator=torch.Generator().manual_seed(0))
    expected = transposable_mask(scores, 2, 4)
    monkeypatch.setattr(importlib.import_module("tritonsparse.kernels.select.transposable"), "CHUNK", 8)
    assert torch.equal(transposable_mask(scores, 2, 4), expected)
    assert torch.equal(transposable_mask(scores.t(), 2, 4).sum(0), torch.full((20,), 14))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_dtype_and_strides(dtype: torch.dtype) -> None:
    scores = torch.randn(8, 24, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert torch.equal(transposable_mask(scores[:, ::2], 2, 4), transposable_mask(scores[:, ::2].float(), 2, 4))


SCORES = torch.zeros(4, 8)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"n": 0}, "0 < n < m <= 4, got n=0 and m=4; pass n=2, m=4"),
        ({"n": 4, "m": 8}, "0 < n < m <= 4, got n=4 and m=8; pass n=2, m=4"),
        ({"scores": SCORES[:2]}, r"sides are multiples of 4, got float32 \[2, 8\] on cpu; exclude the layer"),
        ({"scores": SCORES.int()}, "a floating-point matrix .*exclude the layer"),
        ({"scores": torch.full((4, 4), float("nan"))}, "finite scores, .*have diverged"),
        ({"scores": torch.full((4, 4), float("inf"))}, "finite scores, .*have diverged"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused_with_a_remedy(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=f"^transposable_mask: expected .*{words}"):
        transposable_mask(**{"scores": SCORES, "n": 2, "m": 4} | change)


def test_the_example_holds() -> None:
    result = doctest.testmod(importlib.import_module("tritonsparse.kernels.select.transposable"))
    assert result.attempted >= 1 and result.failed == 0
