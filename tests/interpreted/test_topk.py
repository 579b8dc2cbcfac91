"""The exact top-k's kernels against their reference, bit for bit, through the interpreter."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tritonsparse.kernels.select import _keys as _order_keys
from tritonsparse.kernels.select import _select as topk_select
from tritonsparse.kernels.select._keys import tile_table
from tritonsparse.kernels.select.masks import cutoff_masks
from tritonsparse.kernels.select.topk import Cutoff, topk_cutoff

pytestmark = pytest.mark.usefixtures("poisoned_memory")

TILE = _order_keys.TILE
# Nothing, one element, and either side of one and two tiles.
sizes = st.lists(st.sampled_from([0, 1, 7, 100, TILE - 1, TILE, TILE + 1, 2 * TILE + 3]), min_size=1, max_size=4)
dtypes = st.sampled_from([torch.float32, torch.float16])


def values(size: int, kind: str, random: torch.Generator) -> Tensor:
    """Distinct numbers, a few numbers many times, or bits at random: denormals, infinities, both zeros."""
    if kind == "distinct":
        return torch.randn(size, generator=random)
    if kind == "tied":
        return torch.randn(size, generator=random).mul(2).round()
    bits = torch.randint(-(2**31), 2**31, (size,), generator=random, dtype=torch.int64).to(torch.int32)
    return bits.view(torch.float32).nan_to_num(nan=0.0, posinf=math.inf, neginf=-math.inf)


def assert_same(tensors: list[Tensor], kept: int, magnitude: bool, hint: Cutoff | None = None) -> Cutoff:
    expected = topk_cutoff(tensors, kept, magnitude=magnitude)
    actual = topk_cutoff(tensors, kept, magnitude=magnitude, hint=hint, backend="triton")
    assert actual == expected and all(field.dtype == torch.int64 for field in actual)
    masks = cutoff_masks(tensors, actual, magnitude=magnitude, backend="triton")
    for mask, other in zip(masks, cutoff_masks(tensors, expected, magnitude=magnitude), strict=True):
        assert torch.equal(mask, other) and mask.dtype == torch.bool
    return actual


@given(
    sizes=sizes,
    kind=st.sampled_from(["distinct", "tied", "bits"]),
    dtype=dtypes,
    magnitude=st.booleans(),
    share=st.sampled_from([0.0, 0.001, 0.1, 0.5, 0.999, 1.0]),
    predicted=st.none() | st.integers(-(2**31), 2**31 - 1),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=20)
def test_cutoff_and_masks_equal_the_reference(
    sizes: list[int], kind: str, dtype: torch.dtype, magnitude: bool, share: float, predicted: int | None, seed: int
) -> None:
    random = torch.Generator().manual_seed(seed)
    tensors = [values(size, kind, random).to(dtype) for size in sizes]
    none = torch.tensor(0)
    hint = None if predicted is None else Cutoff(torch.tensor(predicted), none, none, none, none)
    assert_same(tensors, round(share * sum(sizes)), magnitude, hint)


@pytest.mark.parametrize("magnitude", [True, False])
@pytest.mark.parametrize("kept", [0, 100, 10_000, 20_000])
def test_a_sample_predicts_and_the_result_is_exact_all_the_same(
    monkeypatch: pytest.MonkeyPatch, kept: int, magnitude: bool
) -> None:
    # 11 tiles are many, and every third is the sample.
    monkeypatch.setattr(topk_select, "SAMPLE_FROM", 1000)
    monkeypatch.setattr(topk_select, "STEP", 3)
    random = torch.Generator().manual_seed(0)
    tensors = [torch.randn(100, 100, generator=random), torch.zeros(5000), torch.randn(5000, generator=random)]
    assert_same(tensors, kept, magnitude)


def test_an_earlier_cutoff_is_a_hint_for_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(topk_select, "SAMPLE_FROM", 1000)
    tensors = [torch.randn(15_000, generator=torch.Generator().manual_seed(0))]
    first = assert_same(tensors, 3000, True)
    for kept in (3000, 2990, 7500):
        assert_same(tensors, kept, True, first)


def test_a_bracket_too_full_for_the_list_is_no_obstacle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(topk_select, "SAMPLE_FROM", 1000)
    # All within 1 % of one another, so inside one bracket; then equal, which is one number.
    for values in (torch.linspace(1.0, 1.01, 20_000).flip(0), torch.full((20_000,), -2.0)):
        tensors = [values, torch.tensor([-3.0, 1.005, 2.0, 2.01])]
        assert_same(tensors, 5000, True, topk_cutoff(tensors, 5000, magnitude=True))


def test_strided_and_unaligned_tensors_are_ranked_by_their_flat_index() -> None:
    random = torch.Generator().manual_seed(0)
    tensors = [torch.randn(70, 90, generator=random).mul(4).round().T, torch.randn(5000, generator=random).round()[1:]]
    assert tensors[1].data_ptr() % 16
    for kept in (1, 3000, 11_000):
        assert_same(tensors, kept, True)


def test_one_table_serves_many_calls_and_other_tensors_are_refused() -> None:
    tensors = [torch.randn(100, 50), torch.randn(7)]
    out = [torch.ones(100, 50, dtype=torch.bool), torch.ones(7, dtype=torch.bool)]
    table = tile_table(tensors, out)
    for kept in (10, 5000):
        cutoff = topk_cutoff(tensors, kept, magnitude=True, table=table, backend="triton")
        cutoff_masks(tensors, cutoff, magnitude=True, out=out, table=table, backend="triton")
        assert sum(int(mask.sum()) for mask in out) == kept
        tensors[0].neg_().add_(1.0)
    with pytest.raises(
        ValueError, match="expected the table of these tensors and masks, got that of others; make it anew"
    ):
        topk_cutoff(tensors[::-1], 10, magnitude=True, table=table, backend="triton")
    with pytest.raises(ValueError, match="expected the table of these tensors and masks"):
        cutoff_masks(tensors, cutoff, magnitude=True, out=[out[0], out[1].clone()], table=table, backend="triton")
    with pytest.raises(ValueError, match=r"expected contiguous tensors, .*copy it first"):
        tile_table([tensors[0].T])


@pytest.mark.parametrize("nan", [math.nan, -math.nan])
@pytest.mark.parametrize("magnitude", [True, False])
def test_nan_is_refused_or_counted(magnitude: bool, nan: float) -> None:
    tensors = [torch.tensor([1.0, nan, -math.inf]), torch.tensor([nan, math.inf])]
    with pytest.raises(ValueError, match="got NaN; the weights have diverged"):
        topk_cutoff(tensors, 2, magnitude=magnitude, backend="triton")
    cutoff = topk_cutoff(tensors, 2, magnitude=magnitude, check=False, backend="triton")
    assert (cutoff.nans, cutoff.total) == (2, 5)


def test_a_pass_is_one_launch_however_many_the_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors, launches = [torch.randn(10) for _ in range(50)], []

    class Counted:
        def __init__(self, name: str) -> None:
            self.name, self.kernel = name, getattr(topk_select, name)

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            launches.append(self.name)
            return self.kernel[grid]

    for name in ("_bracket_kernel", "_histogram_kernel", "_narrow_kernel"):
        monkeypatch.setattr(topk_select, name, Counted(name))
    assert_same(tensors, 100, True)
    assert launches == ["_bracket_kernel"] + 4 * ["_histogram_kernel", "_narrow_kernel"]
