"""The exact top-k: every cut-off and mask against a stable sort, whatever was predicted."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tritonsparse.kernels.select import _keys as _order_keys
from tritonsparse.kernels.select import masks as topk_masks
from tritonsparse.kernels.select import topk as topk
from tritonsparse.kernels.select._keys import order_keys
from tritonsparse.kernels.select.masks import cutoff_masks
from tritonsparse.kernels.select.topk import Cutoff, topk_cutoff

quick = settings(max_examples=60, deadline=None, derandomize=True)

FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
# Ties, both zeros, infinities, and what is a denormal in float32, float16 or bfloat16.
VALUES = [0.0, -0.0, 0.5, -0.5, 1.0, -1.0, 2.5, math.inf, -math.inf, 1e-42, -1e-42, 6e-8, -6e-8, 3e38, -3e38]


def sorted_masks(tensors: list[Tensor], kept: int, magnitude: bool) -> list[Tensor]:
    """The definition: the head of a stable descending sort."""
    values = torch.cat([tensor.reshape(-1).double() for tensor in tensors])
    values = values.abs() if magnitude else values
    mask = torch.zeros(values.numel(), dtype=torch.bool)
    mask[values.argsort(descending=True, stable=True)[:kept]] = True
    parts = mask.split([tensor.numel() for tensor in tensors])
    return [part.reshape(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


def assert_cuts(tensors: list[Tensor], kept: int, magnitude: bool, cutoff: Cutoff) -> None:
    masks = sorted_masks(tensors, kept, magnitude)
    keys = order_keys(torch.cat([tensor.reshape(-1) for tensor in tensors]), magnitude=magnitude)
    assert cutoff.above == (keys > cutoff.key).sum()
    assert cutoff.above + cutoff.ties_kept == kept
    if kept:
        assert cutoff.key == keys[torch.cat([mask.reshape(-1) for mask in masks])].min()
    written = cutoff_masks(tensors, cutoff, magnitude=magnitude)
    assert all(torch.equal(a, b) for a, b in zip(written, masks, strict=True))


@given(
    parts=st.lists(st.lists(st.sampled_from(VALUES) | st.floats(-4, 4, width=16), max_size=12), min_size=1, max_size=4),
    dtype=st.sampled_from(FLOATS),
    magnitude=st.booleans(),
    predicted=st.none() | st.integers(-(2**31), 2**31 - 1),
    data=st.data(),
)
@quick
def test_the_masks_are_the_head_of_a_stable_sort(
    parts: list[list[float]], dtype: torch.dtype, magnitude: bool, predicted: int | None, data: st.DataObject
) -> None:
    tensors = [torch.tensor(part, dtype=torch.float64).to(dtype) for part in parts]
    n = sum(map(len, parts))
    kept = data.draw(st.sampled_from([0, min(1, n), n]) | st.integers(0, n))
    none = torch.tensor(0)
    hint = None if predicted is None else Cutoff(torch.tensor(predicted), none, none, none, none)
    assert_cuts(tensors, kept, magnitude, topk_cutoff(tensors, kept, magnitude=magnitude, hint=hint))


@pytest.mark.parametrize("magnitude", [True, False])
@pytest.mark.parametrize("kept", [0, 1, 40, 1000, 25_000, 50_000, 99_990, 100_000])
def test_a_sample_predicts_and_the_result_is_exact_all_the_same(
    monkeypatch: pytest.MonkeyPatch, kept: int, magnitude: bool
) -> None:
    # Chunks small enough that the elements are many of them, and that a list can overflow.
    for module in (_order_keys, topk, topk_masks):
        monkeypatch.setattr(module, "CHUNK", 1000)
    tensors = [torch.randn(300, 200), torch.randn(20_000).mul(4).round(), torch.zeros(100, 200)]
    assert_cuts(tensors, kept, magnitude, topk_cutoff(tensors, kept, magnitude=magnitude))


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """One entry for each time the tensors, or a sample of them, are gone through for a cut-off."""
    reads: list[Any] = []

    def counted(*args: Any) -> Iterator[Tensor]:
        reads.append(args)
        return _order_keys.key_chunks(*args)

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


def test_a_bracket_too_full_for_the_list_is_no_obstacle() -> None:
    # All within 1 % of one another, so inside one bracket.
    tensors = [torch.linspace(1.0, 1.01, 2**20).flip(0), torch.tensor([-3.0, 1.005])]
    assert_cuts(tensors, 1000, True, topk_cutoff(tensors, 1000, magnitude=True))


@pytest.mark.parametrize("kept", [1000, 2**20 + 1, 2**20 + 2])
def test_a_million_equal_values_are_one_number(reads: list[Any], kept: int) -> None:
    tensors = [torch.full((2**20,), -2.0), torch.tensor([-3.0, 2.0, 2.01, 1.99])]
    assert_cuts(tensors, kept, True, topk_cutoff(tensors, kept, magnitude=True))
    # The sample, and the one pass.
    assert len(reads) == 2


def test_strided_tensors_are_ranked_in_the_order_of_their_flat_index() -> None:
    tensors = [torch.randn(40, 30).mul(2).round().T, torch.randn(50, 20).round()[1::3, ::2]]
    for kept in (1, 300, 900):
        assert_cuts(tensors, kept, True, topk_cutoff(tensors, kept, magnitude=True))


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
    tensors = [torch.randn(50).bfloat16(), torch.randn(50), torch.randn(50).half(), torch.randn(50).double()]
    for some in (tensors[:3], tensors):
        assert_cuts(some, 60, False, topk_cutoff(some, 60, magnitude=False))


def test_masks_are_written_where_they_are_asked_for() -> None:
    tensors = [torch.tensor([[1.0, 2.0], [2.0, 0.0]]), torch.tensor([2.0])]
    out = [torch.ones(2, 2, dtype=torch.bool), torch.ones(1, dtype=torch.bool)]
    cutoff = topk_cutoff(tensors, 2, magnitude=True)
    assert cutoff_masks(tensors, cutoff, magnitude=True, out=out)[0] is out[0]
    assert [mask.tolist() for mask in out] == [[[False, True], [True, False]], [False]]


@pytest.mark.parametrize("nan", [math.nan, -math.nan])
@pytest.mark.parametrize("magnitude", [True, False])
def test_nan_is_refused_or_counted(magnitude: bool, nan: float) -> None:
    tensors = [torch.tensor([1.0, nan, -math.inf]), torch.tensor([nan, math.inf])]
    with pytest.raises(ValueError, match="got NaN; the weights have diverged"):
        topk_cutoff(tensors, 2, magnitude=magnitude)
    cutoff = topk_cutoff(tensors, 2, magnitude=magnitude, check=False)
    assert (cutoff.nans, cutoff.total) == (2, 5)
    for predicted in (0, 2**31 - 1):
        hint = cutoff._replace(key=torch.tensor(predicted))
        with pytest.raises(ValueError, match="got NaN; the weights have diverged"):
            topk_cutoff(tensors, 2, magnitude=magnitude, hint=hint)


def test_what_cannot_be_ranked_is_refused() -> None:
    weight = torch.ones(3)
    for kept in (-1, 4):
        with pytest.raises(ValueError, match=f"0 <= kept <= 3, got {kept}; correct the count"):
            topk_cutoff([weight], kept, magnitude=True)
    with pytest.raises(ValueError, match="at least one tensor, got none; pass an empty one"):
        topk_cutoff([], 0, magnitude=True)
    with pytest.raises(ValueError, match=r"got torch\.int64 on cpu beside torch\.float32 on cpu; cast or move it"):
        topk_cutoff([weight, torch.ones(3, dtype=torch.int64)], 1, magnitude=True)
    with pytest.raises(ValueError, match="got 'cuda'; pass either"):
        topk_cutoff([weight], 1, magnitude=True, backend="cuda")
    with pytest.raises(ValueError, match=r"got torch\.float32 and torch\.float16; cast them to float32"):
        topk_cutoff([weight, weight.half()], 1, magnitude=True, backend="triton")
    with pytest.raises(ValueError, match=r"got torch\.float64; pass backend"):
        topk_cutoff([weight.double()], 1, magnitude=True, backend="triton")
    cutoff = topk_cutoff([weight], 1, magnitude=True)
    with pytest.raises(ValueError, match="expected 1 masks in out, got 0; pass one for each tensor"):
        cutoff_masks([weight], cutoff, magnitude=True, out=[])
    with pytest.raises(ValueError, match=r"bool \[3\] on cpu, contiguous, got float32 \[3\] on cpu; make it"):
        cutoff_masks([weight], cutoff, magnitude=True, out=[weight])
    assert torch.equal(weight, torch.ones(3))
