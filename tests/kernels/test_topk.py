"""The exact top-k: every cut-off and mask against a stable sort, whatever was predicted."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

# At the end of the path: the folder's modules have names of their own.
sys.path.append(str(Path(__file__).parent))

from cases.topk import CASES, VALUES, Case, assert_cuts, hinted, tensors

from tritonsparse.kernels.select import _keys, masks, topk
from tritonsparse.kernels.select._keys import order_keys
from tritonsparse.kernels.select.masks import cutoff_masks
from tritonsparse.kernels.select.topk import topk_cutoff

FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_masks_are_the_head_of_a_stable_sort(case: Case) -> None:
    assert_cuts(tensors(case, torch.bfloat16), case.kept, case.magnitude, hint=hinted(case.predicted))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    parts=st.lists(st.lists(st.sampled_from(VALUES) | st.floats(-4, 4, width=16), max_size=12), min_size=1, max_size=4),
    dtype=st.sampled_from(FLOATS),
    magnitude=st.booleans(),
    predicted=st.none() | st.integers(-(2**31), 2**31 - 1),
    data=st.data(),
)
def test_so_they_are_of_numbers_that_are_chosen_to_be_hard(
    parts: list[list[float]], dtype: torch.dtype, magnitude: bool, predicted: int | None, data: st.DataObject
) -> None:
    n = sum(map(len, parts))
    kept = data.draw(st.sampled_from([0, min(1, n), n]) | st.integers(0, n))
    weights = [torch.tensor(part, dtype=torch.float64).to(dtype) for part in parts]
    assert_cuts(weights, kept, magnitude, hint=hinted(predicted))


@pytest.mark.parametrize("magnitude", [True, False])
@pytest.mark.parametrize("kept", [0, 1, 40, 1000, 25_000, 50_000, 99_990, 100_000])
def test_a_sample_predicts_and_the_result_is_exact_all_the_same(
    monkeypatch: pytest.MonkeyPatch, kept: int, magnitude: bool
) -> None:
    # Chunks small enough that the elements are many of them, and that a list can overflow.
    for module in (_keys, topk, masks):
        monkeypatch.setattr(module, "CHUNK", 1000)
    assert_cuts([torch.randn(300, 200), torch.randn(20_000).mul(4).round(), torch.zeros(100, 200)], kept, magnitude)


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
    weights = [torch.randn(100_000)]
    hint = topk_cutoff(weights, 10_000, magnitude=True)
    reads.clear()
    assert topk_cutoff(weights, 9_900, magnitude=True, hint=hint).above + 1 == 9_900
    assert len(reads) == 1
    # 40 % of the elements lie between: once more for each of four digits.
    assert topk_cutoff(weights, 50_000, magnitude=True, hint=hint).above + 1 == 50_000
    assert len(reads) == 2 + 4


def test_a_bracket_too_full_for_the_list_is_no_obstacle() -> None:
    # All within 1 % of one another, so inside one bracket.
    assert_cuts([torch.linspace(1.0, 1.01, 2**20).flip(0), torch.tensor([-3.0, 1.005])], 1000, True)


@pytest.mark.parametrize("kept", [1000, 2**20 + 1, 2**20 + 2])
def test_a_million_equal_values_are_one_number(reads: list[Any], kept: int) -> None:
    assert_cuts([torch.full((2**20,), -2.0), torch.tensor([-3.0, 2.0, 2.01, 1.99])], kept, True)
    # The sample, and the one pass.
    assert len(reads) == 2


def test_strided_tensors_are_ranked_in_the_order_of_their_flat_index() -> None:
    for kept in (1, 300, 900):
        assert_cuts([torch.randn(40, 30).mul(2).round().T, torch.randn(50, 20).round()[1::3, ::2]], kept, True)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("magnitude", [True, False])
def test_keys_are_in_the_order_of_the_values_and_zeros_share_one(dtype: torch.dtype, magnitude: bool) -> None:
    values = torch.tensor(VALUES, dtype=torch.float64).to(dtype)
    ranked = values.abs() if magnitude else values
    keys = order_keys(values, magnitude=magnitude)
    assert keys.dtype == (torch.int64 if dtype == torch.float64 else torch.int32)
    assert torch.equal(keys[:, None] < keys, ranked[:, None] < ranked)
    assert torch.equal(keys[:, None] == keys, ranked[:, None] == ranked)


def test_tensors_of_several_dtypes_are_compared_by_value() -> None:
    some = [torch.randn(50).bfloat16(), torch.randn(50), torch.randn(50).half(), torch.randn(50).double()]
    assert_cuts(some[:3], 60, False)
    assert_cuts(some, 60, False)


def test_masks_are_written_where_they_are_asked_for() -> None:
    weights = [torch.tensor([[1.0, 2.0], [2.0, 0.0]]), torch.tensor([2.0])]
    out = [torch.ones(2, 2, dtype=torch.bool), torch.ones(1, dtype=torch.bool)]
    cutoff = topk_cutoff(weights, 2, magnitude=True)
    assert cutoff_masks(weights, cutoff, magnitude=True, out=out)[0] is out[0]
    assert [mask.tolist() for mask in out] == [[[False, True], [True, False]], [False]]


@pytest.mark.parametrize("nan", [math.nan, -math.nan])
@pytest.mark.parametrize("magnitude", [True, False])
def test_nan_is_refused_or_counted(magnitude: bool, nan: float) -> None:
    weights = [torch.tensor([1.0, nan, -math.inf]), torch.tensor([nan, math.inf])]
    cutoff = topk_cutoff(weights, 2, magnitude=magnitude, check=False)
    assert (cutoff.nans, cutoff.total) == (2, 5)
    for predicted in (None, 0, 2**31 - 1):
        with pytest.raises(ValueError, match="got NaN; the weights have diverged"):
            topk_cutoff(weights, 2, magnitude=magnitude, hint=hinted(predicted))


ONES = torch.ones(3)
CUTOFF = topk_cutoff([ONES], 1, magnitude=True)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: topk_cutoff([ONES], -1, magnitude=True), "0 <= kept <= 3, got -1; correct the count"),
        (lambda: topk_cutoff([ONES], 4, magnitude=True), "0 <= kept <= 3, got 4; correct the count"),
        (lambda: topk_cutoff([], 0, magnitude=True), "at least one tensor, got none; pass an empty one"),
        (
            lambda: topk_cutoff([ONES, ONES.long()], 1, magnitude=True),
            r"got torch\.int64 on cpu beside torch\.float32 on cpu; cast or move it",
        ),
        (lambda: topk_cutoff([ONES], 1, magnitude=True, backend="cuda"), "got 'cuda'; pass either"),
        (
            lambda: topk_cutoff([ONES, ONES.half()], 1, magnitude=True, backend="triton"),
            r"got torch\.float32 and torch\.float16; cast them to float32",
        ),
        (
            lambda: topk_cutoff([ONES.double()], 1, magnitude=True, backend="triton"),
            r"got torch\.float64; pass backend",
        ),
        (
            lambda: cutoff_masks([ONES], CUTOFF, magnitude=True, out=[]),
            "expected 1 masks in out, got 0; pass one for each tensor",
        ),
        (
            lambda: cutoff_masks([ONES], CUTOFF, magnitude=True, out=[ONES]),
            r"bool \[3\] on cpu, contiguous, got float32 \[3\] on cpu; make it",
        ),
    ],
)
def test_what_cannot_be_ranked_is_refused(call: Callable[[], object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call()
    assert torch.equal(ONES, torch.ones(3))
