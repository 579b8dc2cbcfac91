"""The exact top-k against a stable sort, N:M masks and those that are N:M both ways: what they choose and refuse."""

import importlib.util
import itertools
import math
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import selection
from cases.selection import N_OF_M, TOPK, VALUES, NOfM, TopK, assert_cuts, hinted
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tritonsparse.kernels.select import _keys, topk, transposable
from tritonsparse.kernels.select._keys import order_keys
from tritonsparse.kernels.select.masks import cutoff_masks
from tritonsparse.kernels.select.n_of_m import n_of_m_mask
from tritonsparse.kernels.select.topk import topk_cutoff
from tritonsparse.kernels.select.transposable import tile_masks, transposable_mask

FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.mark.parametrize("case", TOPK, ids=str)
def test_the_masks_of_a_top_k_are_the_head_of_a_stable_sort(case: TopK) -> None:
    selection.assert_topk(case, "torch", torch.bfloat16)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    parts=st.lists(
        st.tuples(st.lists(st.sampled_from(VALUES) | st.floats(-4, 4, width=16), max_size=12), st.sampled_from(FLOATS)),
        min_size=1, max_size=4,
    ),
    magnitude=st.booleans(), predicted=st.none() | st.integers(-(2**31), 2**31 - 1), data=st.data(),
)  # fmt: skip
def test_so_they_are_of_hard_numbers_and_of_tensors_of_several_dtypes(
    parts: list[tuple[list[float], torch.dtype]], magnitude: bool, predicted: int | None, data: st.DataObject
) -> None:
    n = sum(len(values) for values, _ in parts)
    kept = data.draw(st.sampled_from([0, min(1, n), n]) | st.integers(0, n))
    tensors = [torch.tensor(values, dtype=torch.float64).to(dtype) for values, dtype in parts]
    assert_cuts(tensors, kept, magnitude, hint=None if predicted is None else hinted(predicted))


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """One entry for each time the tensors, or a sample of them, are gone through for a cut-off."""
    reads: list[Any] = []

    def counted(*args: Any) -> Iterator[Tensor]:
        reads.append(args)
        return _keys.key_chunks(*args)

    monkeypatch.setattr(topk, "key_chunks", counted)
    return reads


def test_a_bracket_that_holds_reads_the_tensors_once(monkeypatch: pytest.MonkeyPatch, reads: list[Any]) -> None:
    monkeypatch.setattr(topk, "CHUNK", 1000)
    tensors = [torch.randn(100_000)]
    hint = topk_cutoff(tensors, 10_000, magnitude=True)
    reads.clear()
    assert topk_cutoff(tensors, 9_900, magnitude=True, hint=hint).above + 1 == 9_900
    assert len(reads) == 1
    # 40 % of the elements lie between: once more for each of four digits.
    assert topk_cutoff(tensors, 50_000, magnitude=True, hint=hint).above + 1 == 50_000
    assert len(reads) == 2 + 4


@pytest.mark.parametrize("kept", [1000, 2**20 + 1, 2**20 + 2])
def test_a_million_equal_values_are_one_number(reads: list[Any], kept: int) -> None:
    assert_cuts([torch.full((2**20,), -2.0), torch.tensor([-3.0, 2.0, 2.01, 1.99])], kept, True)
    assert len(reads) == 2


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("magnitude", [True, False])
def test_keys_are_in_the_order_of_the_values_and_zeros_share_one(dtype: torch.dtype, magnitude: bool) -> None:
    values = torch.tensor(VALUES, dtype=torch.float64).to(dtype)
    ranked, keys = values.abs() if magnitude else values, order_keys(values, magnitude=magnitude)
    assert keys.dtype == (torch.int64 if dtype == torch.float64 else torch.int32)
    assert torch.equal(keys[:, None] < keys, ranked[:, None] < ranked)
    assert torch.equal(keys[:, None] == keys, ranked[:, None] == ranked)


@pytest.mark.parametrize("case", N_OF_M, ids=str)
def test_a_score_is_kept_where_fewer_than_n_of_its_group_come_before_it(case: NOfM) -> None:
    selection.assert_n_of_m(case, "torch", torch.bfloat16)


def test_nan_is_refused_or_counted_and_two_rows_by_hand() -> None:
    selection.assert_nan_is_refused_or_counted("torch")
    scores = torch.tensor([[3.0, 1, 2, 0, 5, 5, 5, 5], [-1, 0, -4, 2, 0.0, -0.0, 0, 1]])
    assert n_of_m_mask(scores, 2, 4).int().tolist() == [[1, 0, 1, 0, 1, 1, 0, 0], [0, 1, 0, 1, 1, 0, 0, 1]]


@pytest.mark.parametrize(("n", "m", "count"), [(1, 2, 2), (1, 3, 6), (2, 3, 6), (1, 4, 24), (2, 4, 90), (3, 4, 24)])
def test_no_mask_that_is_n_of_m_both_ways_keeps_more(n: int, m: int, count: int) -> None:
    # Every tile mask, by looking at each of 2^(m m).
    every = torch.tensor(list(itertools.product((1, 0), repeat=m * m))).view(-1, m, m)
    every = every[((every.sum(1) == n) & (every.sum(2) == n)).all(1)]
    assert len(every) == count and torch.equal(torch.tensor(tile_masks(n, m)).view(-1, m, m), every)
    # Few distinct scores: ties, which go to the first. An empty matrix, and one behind strides.
    for rows, columns, magnitude in ((0, 2, False), (3, 1, True), (2, 3, False)):
        scores = torch.randint(-3, 4, (rows * m, 2 * columns * m)).float()[:, ::2]
        mask = transposable_mask(scores, n, m, magnitude=magnitude)
        assert mask.shape == scores.shape and mask.is_contiguous()
        for dtype in (torch.float16, torch.bfloat16, torch.float64):
            assert torch.equal(transposable_mask(scores.to(dtype), n, m, magnitude=magnitude), mask)
        for i, j in itertools.product(range(0, rows * m, m), range(0, columns * m, m)):
            tile = (scores.abs() if magnitude else scores)[i : i + m, j : j + m]
            assert torch.equal(mask[i : i + m, j : j + m], every[(tile * every).sum((1, 2)).argmax()].bool())


def test_more_tiles_than_are_tried_at_once_are_all_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = torch.rand(20, 28)
    expected = transposable_mask(scores, 2, 4)
    monkeypatch.setattr(transposable, "CHUNK", 8)
    assert torch.equal(transposable_mask(scores, 2, 4), expected)


ONES, SCORES, NAN = torch.ones(3), torch.zeros(4, 8), math.nan


def cut(tensors: list[Tensor], kept: int = 1, backend: str = "torch") -> Callable[[], object]:
    return lambda: topk_cutoff(tensors, kept, magnitude=True, backend=backend)


def into(out: list[Tensor]) -> Callable[[], object]:
    return lambda: cutoff_masks([ONES], topk_cutoff([ONES], 1, magnitude=True), magnitude=True, out=out)


def n_of_m(scores: Tensor = SCORES, n: int = 2, m: int = 4, **options: Any) -> Callable[[], object]:
    return lambda: n_of_m_mask(scores, n, m, **options)


def both(scores: Tensor = SCORES, n: int = 2, m: int = 4) -> Callable[[], object]:
    return lambda: transposable_mask(scores, n, m)


@pytest.mark.parametrize(("call", "words"), [
    (cut([ONES], -1), "topk_cutoff: expected 0 <= kept <= 3, got -1; correct the count"),
    (cut([ONES], 4), "topk_cutoff: expected 0 <= kept <= 3, got 4; correct the count"),
    (cut([], 0), "topk_cutoff: expected at least one tensor, got none; pass an empty one"),
    (cut([ONES, ONES.long()]), r".*got torch\.int64 on cpu beside torch\.float32 on cpu; cast or move it"),
    (cut([ONES], backend="cuda"), "topk_cutoff: .*got 'cuda'; pass either"),
    (cut([ONES, ONES.half()], backend="triton"), r".*got torch\.float32 and torch\.float16; cast them to float32"),
    (cut([ONES.double()], backend="triton"), r".*got torch\.float64; pass backend"),
    (into([]), "cutoff_masks: expected 1 masks in out, got 0; pass one for each tensor"),
    (into([ONES]), r"cutoff_masks: expected a mask in out to be bool \[3\] on cpu, contiguous, got float32"),
    (n_of_m(backend="cuda"), 'n_of_m_mask: expected backend "torch" or "triton", got \'cuda\'; pass either'),
    (n_of_m(n=0), "n_of_m_mask: expected 0 < n < m, got n=0 and m=4; pass for example n=2"),
    (n_of_m(n=4), "n_of_m_mask: expected 0 < n < m, got n=4 and m=4"),
    (n_of_m(m=3), r".*rows are a multiple of 3, got float32 \[4, 8\] on cpu; choose a group that divides them"),
    (n_of_m(SCORES[0]), "n_of_m_mask: expected scores to be a floating-point matrix .*choose a group"),
    (n_of_m(SCORES.int()), "n_of_m_mask: expected scores to be a floating-point matrix"),
    (n_of_m(SCORES.double() + NAN), "n_of_m_mask: expected scores without NaN, .*have diverged"),
    (n_of_m(SCORES + NAN, function="choose_masks"), "choose_masks: expected scores without NaN"),
    (n_of_m(SCORES.double(), backend="triton"), '.*float16, bfloat16 or float32 .*pass backend="torch"'),
    (n_of_m(torch.zeros(1, 65), m=65, backend="triton"), '.*groups of at most 64 .*pass backend="torch"'),
    (both(n=0), "transposable_mask: expected 0 < n < m <= 4, got n=0 and m=4; pass n=2, m=4"),
    (both(n=4, m=8), "transposable_mask: expected 0 < n < m <= 4, got n=4 and m=8; pass n=2, m=4"),
    (both(SCORES[:2]), r"transposable_mask: .*multiples of 4, got float32 \[2, 8\] on cpu; exclude the layer"),
    (both(SCORES.int()), "transposable_mask: .*a floating-point matrix .*exclude the layer"),
    (both(SCORES + NAN), "transposable_mask: expected finite scores, .*have diverged"),
    (both(SCORES + math.inf), "transposable_mask: expected finite scores"),
])  # fmt: skip
def test_what_does_not_fit_is_refused_with_a_remedy(call: Callable[[], object], words: str) -> None:
    with pytest.raises(ValueError, match=f"^{words}"):
        call()


def test_every_rank_finds_the_cutoff_and_its_part_of_the_masks_of_one_stable_sort() -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1", "TRITON_INTERPRET": "1"}
    command = [sys.executable, str(Path(__file__).with_name("selection_worker.py"))]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    # Two for each count and kind, and 2 refusals, on each of three ranks, then on two of them.
    expected = {"torch 18": 3 + 2, "triton 10": 3, "triton 6": 2}
    installed = importlib.util.find_spec("triton") is not None
    assert Counter(run.stdout.splitlines()) == {k: v for k, v in expected.items() if installed or "torch" in k}
