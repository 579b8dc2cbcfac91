"""The fused products on a GPU: bfloat16, odd shapes, tf32, graphs, and offsets beyond 2^31.

A bound is 1.1 times the error that the reference makes on the same data in the dtypes of the case, at least that of
`tolerances.py`: relative RMS against the reference in float64.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tolerances import CANCELLING, product_bound
from torch import Tensor

from tritonsparse.kernels.fused.bits import pack_bits
from tritonsparse.kernels.fused.gemm import fused_grad_input, fused_linear
from tritonsparse.kernels.fused.grad import fused_grad_weight

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.usefixtures("poisoned_memory"),
]

DEVICE = "cuda"
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# (master, product)
DTYPES = [(FP32, BF16), (FP32, FP16), (FP32, FP32), (BF16, BF16)]
# (rows, N, K): decoding, odd sizes, one tile, several tiles, a split reduction, wide tiles of dW.
SHAPES = [(1, 257, 513), (7, 64, 64), (16, 1024, 4096), (129, 127, 65), (513, 1000, 511), (512, 4096, 2816)]
VIEWS = ["soft", "soft per row", "hard", "mask", "bits"]


def operands(
    m: int, n: int, k: int, kind: str, transposed: bool, master: torch.dtype, x: torch.dtype
) -> dict[str, Any]:
    """Random operands of one case; no weight so close to its threshold that rounding could prune it."""
    random = torch.Generator(DEVICE).manual_seed(0)
    shape = (k, n) if transposed else (n, k)
    weight = torch.randn(shape, generator=random, device=DEVICE)
    threshold = torch.randn(shape[0] if kind == "soft per row" else 1, generator=random, device=DEVICE)
    name = kind.removesuffix(" per row")
    cutoff = (threshold.sigmoid() if name == "soft" else threshold.abs_())[:, None]
    weight = torch.where((weight.to(master).float().abs() / cutoff - 1).abs() < 1e-2, 1.1 * weight, weight)
    mask = torch.rand(shape, generator=random, device=DEVICE) < 0.3
    return {
        "weight": weight.to(master),
        "kind": "mask" if name == "bits" else name,
        "threshold": threshold if name in ("soft", "hard") else None,
        "mask": {"mask": mask, "bits": pack_bits(mask, backend="triton")}.get(name),
        "transposed": transposed,
        "x": torch.randn(m, k, generator=random, device=DEVICE).to(x),
        "grad_y": torch.randn(m, n, generator=random, device=DEVICE).to(x),
        "bias": torch.randn(n, generator=random, device=DEVICE).to(x),
        "grad_mask": torch.rand(shape, generator=random, device=DEVICE) < 0.5,
        "alpha": torch.tensor(0.25, device=DEVICE),
    }


def products(case: dict[str, Any], backend: str) -> dict[str, Tensor]:
    view = {name: case[name] for name in ("weight", "kind", "threshold", "mask", "transposed")} | {"backend": backend}
    rows = {"grad_y": case["grad_y"], "x": case["x"], "grad_mask": case["grad_mask"], "alpha": case["alpha"]}
    grad_weight, grad_threshold = fused_grad_weight(**rows, **view)
    return {
        "y": fused_linear(case["x"], bias=case["bias"], **view),
        "grad_x": fused_grad_input(case["grad_y"], **view),
        "grad_weight": grad_weight,
        **({"grad_threshold": grad_threshold} if case["kind"] == "soft" else {}),
    }


def exact(case: dict[str, Any]) -> dict[str, Any]:
    return case | {name: t.double() for name, t in case.items() if torch.is_tensor(t) and t.is_floating_point()}


def error(actual: Tensor, expected: Tensor) -> float:
    return ((actual.double() - expected).norm() / expected.norm()).item()


@pytest.fixture(params=["full float32", "tf32"])
def precision(request: pytest.FixtureRequest) -> Iterator[str]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if request.param == "tf32" else "highest")
    yield request.param
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("kind", VIEWS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_product_is_as_exact_as_the_two_steps_of_the_reference(
    shape: tuple[int, int, int], kind: str, dtypes: tuple[torch.dtype, torch.dtype], transposed: bool, precision: str
) -> None:
    if precision == "tf32" and dtypes[1] != FP32:
        pytest.skip("16 bits are exact either way")
    case = operands(*shape, kind, transposed, *dtypes)
    expected = products(exact(case), "torch")
    reference, actual, again = products(case, "torch"), products(case, "triton"), products(case, "triton")
    m, n, k = shape
    for name, value in actual.items():
        bound = 1.1 * error(reference[name], expected[name])
        if name == "grad_threshold":
            # A sum that cancels: measured against its terms, sigmoid' <= 1/4 of what |dW| sums to.
            bound = max(bound, CANCELLING * product_bound(dtypes[1], FP32, m, precision))
            scale = expected["grad_weight"].norm() / 4
            assert (value - expected[name]).norm() <= bound * scale, name
        else:
            length = {"y": k, "grad_x": n, "grad_weight": m}[name]
            bound = max(bound, product_bound(dtypes[1], value.dtype, length, precision))
            assert error(value, expected[name]) <= bound, name
        assert torch.equal(value, again[name]), f"{name}: another result the second time"


def test_products_replay_in_a_graph() -> None:
    case = operands(64, 1024, 512, "soft per row", False, FP32, BF16)
    expected = products(case, "triton")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = products(case, "triton")
    for tensor in captured.values():
        tensor.fill_(float("nan"))
    graph.replay()
    assert all(torch.equal(captured[name], expected[name]) for name in expected)


def test_offsets_beyond_two_to_the_31_reach_their_element() -> None:
    n, k = 70_000, 32_768
    assert n * k > 2**31
    weight = torch.zeros(n, k, device=DEVICE, dtype=BF16)
    # Ones at the far corner and one element beyond 2^31; everything else is pruned.
    far = divmod(2**31 + 5, k)
    weight[-1, -1] = weight[far] = 1.0
    view: dict[str, Any] = {"kind": "hard", "threshold": torch.tensor([0.5], device=DEVICE), "backend": "triton"}
    x = torch.zeros(2, k, device=DEVICE, dtype=BF16)
    x[0, -1], x[1, far[1]] = 3.0, 5.0
    y = fused_linear(x, weight, **view)
    assert y.count_nonzero() == 2 and y[0, -1] == 3.0 and y[1, far[0]] == 5.0
    grad_x = fused_grad_input(y, weight, **view)
    assert torch.equal(grad_x, x)
    # dW = dY^T X is 9 and 25 where kept, and 0 where pruned: row n - 1 holds no other x.
    grad_weight, _ = fused_grad_weight(y, x, weight, **view)
    assert grad_weight.count_nonzero() == 2 and grad_weight[-1, -1] == 9.0 and grad_weight[far] == 25.0
