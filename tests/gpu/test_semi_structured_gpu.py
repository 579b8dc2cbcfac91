"""2:4 products on a GPU that has them: output and all gradients, through torch.compile as well.

A bound is 1.1 times the error that the reference makes on the same data, at least that of `tolerances.py`: relative RMS
against it in float64.
"""

import pytest
import torch
from cases.product import equal
from cases.semi_structured import CASES, LARGE, Case, product
from tolerances import product_bound

from tritonsparse.kernels.semi_structured import semi_structured_linear, semi_structured_reason


def _missing() -> str | None:
    if not torch.cuda.is_available():
        return "needs a GPU"
    return semi_structured_reason(torch.zeros(8, 64, device="cuda").half(), torch.zeros(64, 64, device="cuda"))


pytestmark = [pytest.mark.skipif(_missing() is not None, reason=str(_missing()))]

DEVICE = "cuda"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", [*CASES, *LARGE], ids=str)
def test_the_output_and_all_gradients_are_as_exact_as_the_dense_product_s(case: Case, dtype: torch.dtype) -> None:
    p = product(case, dtype, DEVICE)
    assert semi_structured_reason(p.x, p.w_hat, p.w_hat != 0, **p.options) is None
    reference, rows = p.errors(p.run("torch")), p.x.numel() // case.k
    lengths = {"y": case.k, "dx": case.n, "dw_hat": rows, "db": rows}
    for name, error in p.errors(p.run()).items():
        assert error <= max(1.1 * reference[name], product_bound(dtype, dtype, lengths[name])), name


def test_inputs_of_any_strides_are_multiplied() -> None:
    p = product(Case((64,), 128, 256), torch.float16, DEVICE)
    expected = semi_structured_linear(p.x, p.w_hat, p.bias, backend="semi_structured")
    for x in (p.x.t().contiguous().t(), torch.cat([p.x] * 2, 1)[:, :256]):
        assert torch.equal(semi_structured_linear(x, p.w_hat, p.bias, backend="semi_structured"), expected)


@pytest.mark.parametrize("both", [False, True])
def test_the_op_compiles_into_one_graph(both: bool) -> None:
    p = product(Case((64,), 128, 256, both=both), torch.float16, DEVICE)
    assert equal(p.run(function=torch.compile(semi_structured_linear, fullgraph=True, backend="aot_eager")), p.run())


def test_a_mask_of_three_in_four_is_told_apart() -> None:
    p = product(Case((8,), 64, 64), torch.float16, DEVICE)
    mask = p.w_hat != 0
    mask[3, :4] = torch.tensor([True, True, True, False], device=DEVICE)
    reason = semi_structured_reason(p.x, p.w_hat, mask)
    assert reason is not None and reason.startswith("the mask keeps more than 2")
