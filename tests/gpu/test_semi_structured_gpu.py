"""2:4 products on a GPU that has them: output and both gradients, through torch.compile as well.

A bound is 1.1 times the error that the reference makes on the same data, at least that of `tolerances.py`: relative RMS
against it in float64.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tolerances import product_bound
from torch import Tensor

from tritonsparse.kernels.select.n_of_m import n_of_m_mask
from tritonsparse.kernels.select.transposable import transposable_mask
from tritonsparse.kernels.semi_structured import (
    pack_semi_structured,
    semi_structured_linear,
    semi_structured_reason,
)


def _missing() -> str | None:
    if not torch.cuda.is_available():
        return "needs a GPU"
    return semi_structured_reason(torch.zeros(8, 64, device="cuda").half(), torch.zeros(64, 64, device="cuda"))


pytestmark = [pytest.mark.gpu, pytest.mark.skipif(_missing() is not None, reason=str(_missing()))]

DEVICE = "cuda"
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# (rows, N, K): fewer rows than a tile, no multiple of 8, the least weight, a layer's.
SHAPES = [(1, 64, 64), (13, 192, 320), (512, 1024, 4096), (2048, 4096, 1024)]


def operands(
    m: int, n: int, k: int, dtype: torch.dtype, transposed: bool = False, master: torch.dtype = FP32
) -> dict[str, Any]:
    random = torch.Generator(DEVICE).manual_seed(0)
    weight = torch.randn(n, k, generator=random, device=DEVICE).to(master)
    mask = n_of_m_mask(weight, 2, 4, magnitude=True, backend="triton")
    if transposed:
        weight, mask = weight.t().contiguous(), mask.t().contiguous()
    return {
        "x": torch.randn(m, k, generator=random, device=DEVICE).to(dtype),
        "weight": weight,
        "bias": torch.randn(n, generator=random, device=DEVICE).to(dtype),
        "mask": mask,
        "grad_mask": torch.rand(weight.shape, generator=random, device=DEVICE) < 0.5,
        "alpha": torch.tensor(0.25, device=DEVICE),
        "transposed": transposed,
    }


def results(given: dict[str, Any], backend: str, function: Any = semi_structured_linear) -> dict[str, Tensor]:
    leaves = {name: given[name].clone().requires_grad_() for name in ("x", "weight", "bias")}
    y = function(**(given | leaves), backend=backend)
    random = torch.Generator(DEVICE).manual_seed(1)
    grad_y = torch.randn(y.shape, generator=random, device=DEVICE).to(given["x"].dtype).to(y.dtype)
    return {"y": y.detach()} | dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), grad_y), strict=True))


def exact(given: dict[str, Any]) -> dict[str, Any]:
    # The view is rounded to the dtype of x, in either.
    rounded = given | {"weight": given["weight"].to(given["x"].dtype)}
    return rounded | {name: t.double() for name, t in rounded.items() if torch.is_tensor(t) and t.is_floating_point()}


def error(actual: Tensor, expected: Tensor) -> float:
    return ((actual.double() - expected).norm() / expected.norm()).item()


def bound(shape: tuple[int, int, int], dtype: torch.dtype, name: str, reference: Tensor, expected: Tensor) -> float:
    m, n, k = shape
    length = {"y": k, "x": n, "weight": m, "bias": m}[name]
    return max(1.1 * error(reference, expected), product_bound(dtype, reference.dtype, length))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtypes", [(FP32, BF16), (FP32, FP16), (BF16, BF16)], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_output_and_both_gradients_are_as_exact_as_the_masked_product_s(
    shape: tuple[int, int, int], dtypes: tuple[torch.dtype, torch.dtype], transposed: bool
) -> None:
    given = operands(*shape, dtypes[1], transposed, dtypes[0])
    assert semi_structured_reason(given["x"], given["weight"], given["mask"], transposed=transposed) is None
    expected = results(exact(given), "torch")
    reference, actual = results(given, "torch"), results(given, "semi_structured")
    for name, value in expected.items():
        assert actual[name].dtype == reference[name].dtype
        assert error(actual[name], value) <= bound(shape, dtypes[1], name, reference[name], value), name


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_transposable_mask_has_a_sparse_grad_input_too(shape: tuple[int, int, int], transposed: bool) -> None:
    given = operands(*shape, BF16, transposed) | {"sparse_grad_input": True}
    given["mask"] = transposable_mask(given["weight"], 2, 4, magnitude=True)
    x, weight, mask = given["x"], given["weight"], given["mask"]
    assert semi_structured_reason(x, weight, mask, transposed=transposed, sparse_grad_input=True) is None
    expected = results(exact(given), "torch")
    reference, actual = results(given, "torch"), results(given, "semi_structured")
    for name, value in expected.items():
        assert actual[name].dtype == reference[name].dtype
        assert error(actual[name], value) <= bound(shape, BF16, name, reference[name], value), name


def test_a_view_that_the_caller_keeps_gives_the_same() -> None:
    given = operands(256, 512, 1024, BF16)
    w_hat = (given["weight"] * given["mask"]).to(BF16)
    kept = given | {"w_hat": w_hat, "packed": pack_semi_structured(w_hat)}
    actual, expected = results(kept, "semi_structured"), results(given, "semi_structured")
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


def test_inputs_of_any_strides_are_multiplied() -> None:
    given = operands(64, 128, 256, FP16)
    expected = semi_structured_linear(**given, backend="semi_structured")
    for x in (given["x"].t().contiguous().t(), torch.cat([given["x"]] * 2, 1)[:, :256]):
        assert torch.equal(semi_structured_linear(**given | {"x": x}, backend="semi_structured"), expected)


def test_the_op_compiles_into_one_graph() -> None:
    given = operands(64, 128, 256, FP16)
    compiled = torch.compile(semi_structured_linear, fullgraph=True, backend="aot_eager")
    actual, expected = results(given, "semi_structured", compiled), results(given, "semi_structured")
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


def test_a_mask_of_three_in_four_is_told_apart() -> None:
    given = operands(8, 64, 64, FP16)
    given["mask"][3, :4] = torch.tensor([True, True, True, False], device=DEVICE)
    reason = semi_structured_reason(given["x"], given["weight"], given["mask"])
    assert reason is not None and reason.startswith("the mask keeps more than 2")
