"""The kernels of the exact top-k, of N:M masks and of packed activations through the interpreter."""

from typing import Any

import pytest
import torch
from cases import activation, selection, sparse_input

from tritonsparse.kernels.activation.cutoff import activation_cutoff
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
    given = {"magnitude": True, "table": table, "backend": "triton"}
    with pytest.raises(ValueError, match=words):
        topk_cutoff(tensors[::-1], 10, **given)
    with pytest.raises(ValueError, match=words):
        cutoff_masks(tensors, cutoff, out=[out[0], out[1].clone()], **given)
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


# NumPy's of products with the infinities and NaN of the cases.
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("case", activation.CASES, ids=str)
def test_what_is_packed_unpacked_and_multiplied_is_what_the_definition_keeps(case: activation.Case) -> None:
    # Sums over at most 33 rows; float16 results are rounded once.
    assert activation.packed_errors(case, "triton")[0] <= (5e-4 if case.half else 1e-6)


def test_a_cutoff_selected_without_sorting_is_the_same() -> None:
    x, tied = torch.randn(3, 5, 41), torch.ones(4, 8)
    few = [(x, 0.001, "batch"), (x.half(), 0.2, "batch"), (x, 1.0, "batch"), (tied, 0.5, "batch")]
    for each, density, scope in (*few, (x, 0.2, "plane"), (x, 0.2, "sample")):
        cutoff = activation_cutoff(each, density, scope)
        assert torch.equal(activation_cutoff(each, density, scope, backend="triton"), cutoff)


@pytest.mark.parametrize("case", sparse_input.CASES[::3], ids=str)
def test_the_ops_equal_their_answer_in_float64(case: sparse_input.Case) -> None:
    p = sparse_input.product(case, torch.float32)
    wrong = p.errors(p.run("triton"))
    assert max(wrong.values()) <= 1e-6, wrong
