"""The exact top-k's kernels through the interpreter."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

# At the end of the path: the folder's modules have names of their own.
sys.path.append(str(Path(__file__).parents[1] / "kernels"))

from cases.topk import CASES, Case, assert_cuts, hinted, tensors

from tritonsparse.kernels.select import _select
from tritonsparse.kernels.select._keys import tile_table
from tritonsparse.kernels.select.masks import cutoff_masks
from tritonsparse.kernels.select.topk import topk_cutoff

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_masks_are_the_head_of_a_stable_sort(case: Case) -> None:
    assert_cuts(tensors(case), case.kept, case.magnitude, "triton", hinted(case.predicted))


@pytest.mark.parametrize("magnitude", [True, False])
@pytest.mark.parametrize("kept", [0, 100, 20_000])
def test_a_sample_predicts_and_the_result_is_exact_all_the_same(
    monkeypatch: pytest.MonkeyPatch, kept: int, magnitude: bool
) -> None:
    # 11 tiles are many, and every third is the sample.
    monkeypatch.setattr(_select, "SAMPLE_FROM", 1000)
    monkeypatch.setattr(_select, "STEP", 3)
    assert_cuts([torch.randn(100, 100), torch.zeros(5000), torch.randn(5000)], kept, magnitude, "triton")


def test_an_earlier_cutoff_is_a_hint_for_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_select, "SAMPLE_FROM", 1000)
    weights = [torch.randn(15_000)]
    first = assert_cuts(weights, 3000, True, "triton")
    for kept in (3000, 2990, 7500):
        assert_cuts(weights, kept, True, "triton", first)


def test_a_bracket_too_full_for_the_list_is_no_obstacle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_select, "SAMPLE_FROM", 1000)
    # All within 1 % of one another, so inside one bracket; then equal, which is one number.
    for values in (torch.linspace(1.0, 1.01, 20_000).flip(0), torch.full((20_000,), -2.0)):
        weights = [values, torch.tensor([-3.0, 1.005, 2.0, 2.01])]
        assert_cuts(weights, 5000, True, "triton", topk_cutoff(weights, 5000, magnitude=True))


def test_strided_and_unaligned_tensors_are_ranked_by_their_flat_index() -> None:
    weights = [torch.randn(70, 90).mul(4).round().T, torch.randn(5000).round()[1:]]
    assert weights[1].data_ptr() % 16
    for kept in (1, 3000, 11_000):
        assert_cuts(weights, kept, True, "triton")


def test_one_table_serves_many_calls_and_other_tensors_are_refused() -> None:
    weights = [torch.randn(100, 50), torch.randn(7)]
    out = [torch.ones(100, 50, dtype=torch.bool), torch.ones(7, dtype=torch.bool)]
    table = tile_table(weights, out)
    for kept in (10, 5000):
        cutoff = topk_cutoff(weights, kept, magnitude=True, table=table, backend="triton")
        cutoff_masks(weights, cutoff, magnitude=True, out=out, table=table, backend="triton")
        assert sum(int(mask.sum()) for mask in out) == kept
        weights[0].neg_().add_(1.0)
    words = "expected the table of these tensors and masks, got that of others; make it anew"
    with pytest.raises(ValueError, match=words):
        topk_cutoff(weights[::-1], 10, magnitude=True, table=table, backend="triton")
    with pytest.raises(ValueError, match=words):
        cutoff_masks(weights, cutoff, magnitude=True, out=[out[0], out[1].clone()], table=table, backend="triton")
    with pytest.raises(ValueError, match=r"expected contiguous tensors, .*copy it first"):
        tile_table([weights[0].T])


@pytest.mark.parametrize("nan", [math.nan, -math.nan])
@pytest.mark.parametrize("magnitude", [True, False])
def test_nan_is_refused_or_counted(magnitude: bool, nan: float) -> None:
    weights = [torch.tensor([1.0, nan, -math.inf]), torch.tensor([nan, math.inf])]
    with pytest.raises(ValueError, match="got NaN; the weights have diverged"):
        topk_cutoff(weights, 2, magnitude=magnitude, backend="triton")
    cutoff = topk_cutoff(weights, 2, magnitude=magnitude, check=False, backend="triton")
    assert (cutoff.nans, cutoff.total) == (2, 5)


def test_a_pass_is_one_launch_however_many_the_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    launches: list[str] = []

    class Counted:
        def __init__(self, name: str) -> None:
            self.name, self.kernel = name, getattr(_select, name)

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            launches.append(self.name)
            return self.kernel[grid]

    for name in ("_bracket_kernel", "_histogram_kernel", "_narrow_kernel"):
        monkeypatch.setattr(_select, name, Counted(name))
    assert_cuts([torch.randn(10) for _ in range(50)], 100, True, "triton")
    assert launches == ["_bracket_kernel"] + 4 * ["_histogram_kernel", "_narrow_kernel"]
