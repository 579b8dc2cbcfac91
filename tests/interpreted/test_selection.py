"""The kernels of the exact top-k and of N:M masks through the interpreter."""

from typing import Any

import pytest
import torch
from cases import selection

from tritonsparse.kernels.select import _select
from tritonsparse.kernels.select._keys import tile_table
from tritonsparse.kernels.select.masks import cutoff_masks
from tritonsparse.kernels.select.n_of_m import n_of_m_mask
from tritonsparse.kernels.select.topk import topk_cutoff

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.mark.parametrize("case", selection.TOPK, ids=str)
def test_the_masks_of_a_top_k_are_the_head_of_a_stable_sort(case: selection.TopK) -> None:
    selection.assert_topk(case, "triton")


@pytest.mark.parametrize("case", selection.N_OF_M, ids=str)
def test_a_score_is_kept_where_fewer_than_n_of_its_group_come_before_it(case: selection.NOfM) -> None:
    selection.assert_n_of_m(case, "triton")


def test_nan_is_refused_or_counted() -> None:
    selection.assert_nan_is_refused_or_counted("triton")
    for place, nan in ((0, float("nan")), (2049, -float("nan")), (4095, float("nan"))):
        scores = torch.randn(8, 512)
        scores.view(-1)[place] = nan
        with pytest.raises(ValueError, match="without NaN"):
            n_of_m_mask(scores, 2, 4, backend="triton")


def test_one_table_serves_many_calls_and_other_tensors_are_refused() -> None:
    tensors = [torch.randn(100, 50), torch.randn(7)]
    out = [torch.ones(100, 50, dtype=torch.bool), torch.ones(7, dtype=torch.bool)]
    table = tile_table(tensors, out)
    for kept in (10, 5000):
        cutoff = topk_cutoff(tensors, kept, magnitude=True, table=table, backend="triton")
        cutoff_masks(tensors, cutoff, magnitude=True, out=out, table=table, backend="triton")
        assert sum(int(mask.sum()) for mask in out) == kept
        tensors[0].neg_().add_(1.0)
    words = "expected the table of these tensors and masks, got that of others; make it anew"
    with pytest.raises(ValueError, match=words):
        topk_cutoff(tensors[::-1], 10, magnitude=True, table=table, backend="triton")
    with pytest.raises(ValueError, match=words):
        cutoff_masks(tensors, cutoff, magnitude=True, out=[out[0], out[1].clone()], table=table, backend="triton")
    with pytest.raises(ValueError, match=r"expected contiguous tensors, .*copy it first"):
        tile_table([tensors[0].T])


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
    topk_cutoff([torch.randn(10) for _ in range(50)], 100, magnitude=True, backend="triton")
    assert launches == ["_bracket_kernel"] + 4 * ["_histogram_kernel", "_narrow_kernel"]
