"""The threshold kernels on a GPU: bfloat16, odd shapes, graphs, and offsets beyond 2^31.

A bound is 1.1 times the error that the reference makes on the same data in the dtypes of the case, at least that of
`tolerances.py`: relative RMS against the reference in float64.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tolerances import ELEMENTWISE
from torch import Tensor

from tritonsparse.kernels.weight.backward import threshold_backward, threshold_backward_reference
from tritonsparse.kernels.weight.forward import threshold_cast, threshold_cast_reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.usefixtures("poisoned_memory"),
]

DEVICE = "cuda"
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# (master, product)
DTYPES = [(FP32, BF16), (FP32, FP16), (FP32, FP32), (BF16, BF16), (FP16, FP16), (BF16, FP32)]
# One element, one column, around tiles of 64, nothing divisible, a layer.
SHAPES = [(1, 1), (1, 129), (257, 1), (64, 64), (65, 63), (127, 513), (1000, 511), (2048, 512)]
VIEWS = ["soft", "soft per row", "mask"]


def operands(shape: tuple[int, int], view: str, master: torch.dtype, product: torch.dtype) -> dict[str, Any]:
    """Random operands of one case; no weight so close to its threshold that rounding could prune it."""
    random = torch.Generator(DEVICE).manual_seed(0)
    weight = torch.randn(shape, generator=random, device=DEVICE)
    s = torch.randn(shape[0] if view == "soft per row" else 1, generator=random, device=DEVICE)
    cutoff = s.sigmoid()[:, None]
    weight = torch.where((weight.to(master).float().abs() / cutoff - 1).abs() < 1e-4, 1.1 * weight, weight)
    weight[torch.rand(shape, generator=random, device=DEVICE) < 0.1] = 0.0
    soft = view != "mask"
    return {
        "weight": weight.to(master),
        "threshold": s if soft else None,
        "mask": None if soft else torch.rand(shape, generator=random, device=DEVICE) < 0.3,
        "grad": torch.randn(shape, generator=random, device=DEVICE).to(product),
        "grad_mask": torch.rand(shape, generator=random, device=DEVICE) < 0.5,
        "alpha": torch.tensor(0.25, device=DEVICE),
        "kind": "soft" if soft else "mask",
    }


def forward(case: dict[str, Any], product: torch.dtype, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    return threshold_cast(
        case["weight"], case["threshold"], case["mask"], kind=case["kind"], out_dtype=product, backend=backend
    )


def backward(case: dict[str, Any], backend: str) -> tuple[Tensor, Tensor]:
    return threshold_backward(**case, backend=backend)


def error(actual: Tensor, exact: Tensor) -> float:
    scale = exact.norm().item()
    return (actual.double() - exact).norm().item() / (scale or 1.0)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize(("master", "product"), DTYPES, ids=str)
def test_the_cast_equals_the_reference(
    shape: tuple[int, int], view: str, master: torch.dtype, product: torch.dtype
) -> None:
    case = operands(shape, view, master, product)
    threshold = None if case["threshold"] is None else case["threshold"].double()
    exact, kept, occupancy = threshold_cast_reference(
        case["weight"].double(), threshold, case["mask"], case["kind"], torch.float64
    )
    bound = max(1.1 * error(forward(case, product, "torch")[0], exact), ELEMENTWISE)
    actual = forward(case, product, "triton")
    assert actual[0].dtype == product and actual[0].is_contiguous()
    assert error(actual[0], exact) <= bound
    assert torch.equal(actual[1], kept) and torch.equal(actual[2], occupancy)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize(("master", "product"), DTYPES, ids=str)
def test_the_backward_equals_the_reference(
    shape: tuple[int, int], view: str, master: torch.dtype, product: torch.dtype
) -> None:
    case = operands(shape, view, master, product)
    names = ("grad", "weight", "threshold", "alpha")
    double = {name: case[name].double() for name in names if case[name] is not None}
    exact, exact_s = threshold_backward_reference(**{**case, **double})
    bound = max(1.1 * error(backward(case, "torch")[0], exact), ELEMENTWISE)
    grad_weight, grad_s = backward(case, "triton")
    assert grad_weight.dtype == master and grad_weight.is_contiguous()
    assert error(grad_weight, exact) <= bound
    # ds is a sum of both signs: its error is measured against the terms, which sigmoid' <= 1/4 scales.
    assert grad_s.shape == exact_s.shape and grad_s.dtype == FP32
    if grad_s.numel():
        assert (grad_s.double() - exact_s).abs().max().item() <= ELEMENTWISE * (0.25 * exact.norm().item() + 1e-30)


@pytest.mark.parametrize("view", VIEWS)
def test_results_repeat_bit_for_bit(view: str) -> None:
    case = operands((2048, 1500), view, FP32, BF16)
    first = (*forward(case, BF16, "triton"), *backward(case, "triton"))
    for _ in range(20):
        again = (*forward(case, BF16, "triton"), *backward(case, "triton"))
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("view", VIEWS)
def test_a_captured_graph_follows_alpha_threshold_and_mask(view: str) -> None:
    case = operands((300, 500), view, FP32, BF16)

    def both() -> tuple[Tensor, ...]:
        return (*forward(case, BF16, "triton"), *backward(case, "triton"))

    both()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = both()
    for alpha, shift in ((0.0, -1.0), (1.0, 0.5), (0.25, 2.0)):
        case["alpha"].fill_(alpha)
        if case["threshold"] is not None:
            case["threshold"].add_(shift)
        else:
            case["mask"].logical_xor_(torch.rand_like(case["grad"], dtype=FP32) < 0.2)
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(captured, both(), strict=True))


def test_offsets_beyond_two_to_the_31_reach_their_elements() -> None:
    """Both passes over 2^31 + elements; reference in bands of rows, for memory."""
    n, k, band = 32_777, 65_600, 1024
    assert n * k > 2**31 + 2 * band * k // 16
    if torch.cuda.mem_get_info()[0] < 36 * 2**30:
        pytest.skip("needs 36 GiB of free GPU memory")
    random = torch.Generator(DEVICE).manual_seed(0)
    weight = torch.empty(n, k, device=DEVICE, dtype=FP16).normal_(generator=random)
    grad = torch.empty(n, k, device=DEVICE, dtype=FP16).normal_(generator=random)
    s, alpha = torch.zeros(n, device=DEVICE), torch.tensor(0.5, device=DEVICE)
    w_hat, kept, occupancy = threshold_cast(weight, s, kind="soft", backend="triton")
    grad_weight, grad_s = threshold_backward(grad, weight, s, alpha=alpha, kind="soft", backend="triton")
    assert int(occupancy.sum(dtype=torch.int64)) == int(kept)
    counted = 0
    for start in range(0, n, band):
        rows = slice(start, min(n, start + band))
        expected = threshold_cast_reference(weight[rows], s[rows], None, "soft", FP16)
        counted += int(expected[1])
        assert torch.equal(w_hat[rows], expected[0]), f"w_hat, rows {rows}"
        expected = threshold_backward_reference(grad[rows], weight[rows], s[rows], None, None, alpha, "soft")
        assert torch.equal(grad_weight[rows], expected[0]), f"grad_weight, rows {rows}"
        # 65,600 terms of about 0.25 each, in two orders of summation.
        assert (grad_s[rows] - expected[1]).abs().max().item() <= 1e-5 * 0.25 * k**0.5
    assert counted == int(kept)
