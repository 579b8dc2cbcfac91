"""The gradient of kept blocks on a GPU: bfloat16, odd shapes, tf32, graphs, and offsets beyond 2^31.

A bound is 1.1 times the error that torch's own product makes on the same data, at least that of `tolerances.py`:
relative RMS against the reference in float64.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tolerances import product_bound
from torch import Tensor

from tritonsparse.kernels.block.grad import block_grad_weight
from tritonsparse.kernels.block.topology import build_index_reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.usefixtures("poisoned_memory"),
]

DEVICE = "cuda"
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# (rows, N, K, block): one tile, ragged edges, odd blocks, tall and wide ones, a split reduction, wide tiles.
SHAPES = [
    (7, 64, 64, (64, 64)),
    (129, 1000, 712, (32, 32)),
    (300, 480, 960, (48, 48)),
    (513, 1024, 2048, (16, 16)),
    (1024, 512, 768, (16, 128)),
    (1024, 768, 512, (128, 32)),
    (4096, 512, 512, (128, 128)),
    (2048, 4096, 8192, (128, 128)),
    (2048, 4096, 8192, (64, 64)),
]


def case(
    m: int, n: int, k: int, block: tuple[int, int], form: str, dtype: torch.dtype, density: float = 0.2
) -> dict[str, Any]:
    random = torch.Generator(DEVICE).manual_seed(0)
    grid = -(-n // block[0]), -(-k // block[1])
    listed = torch.rand(grid, generator=random, device=DEVICE) < density
    # Of a single block too something is left to compare with.
    listed[:1, :1] = True
    capacity = int(listed.sum()) + 3 if form == "packed" else None
    stored = {"dense": (n, k), "transposed": (k, n), "packed": (capacity, *block)}[form]
    return {
        "grad_y": torch.randn(m, n, generator=random, device=DEVICE).to(dtype),
        "x": torch.randn(m, k, generator=random, device=DEVICE).to(dtype),
        "index": build_index_reference(listed),
        "block": block,
        "shape": (n, k),
        "kept": listed & (torch.rand(grid, generator=random, device=DEVICE) < 0.7),
        "alpha": torch.tensor(0.25, device=DEVICE),
        "transposed": form == "transposed",
        "packed": form == "packed",
        "capacity": capacity,
        "weight": torch.randn(stored, generator=random, device=DEVICE),
    }


def exact(operands: dict[str, Any]) -> dict[str, Any]:
    floats = {name: t.double() for name, t in operands.items() if torch.is_tensor(t) and t.is_floating_point()}
    return operands | floats | {"out_dtype": torch.float64}


def error(actual: Tensor, expected: Tensor) -> float:
    return ((actual.double() - expected).norm() / expected.norm()).item()


@pytest.fixture(params=["full float32", "tf32"])
def precision(request: pytest.FixtureRequest) -> Iterator[str]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if request.param == "tf32" else "highest")
    yield request.param
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("form", ["dense", "transposed", "packed"])
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_gradient_is_as_exact_as_the_dense_product(
    shape: tuple[int, int, int, tuple[int, int]], dtype: torch.dtype, form: str, precision: str
) -> None:
    if precision == "tf32" and dtype != FP32:
        pytest.skip("16 bits are exact either way")
    operands = case(*shape, form, dtype)
    expected, expected_inner = block_grad_weight(**exact(operands))
    reference = block_grad_weight(**operands)[0]
    bound = max(1.1 * error(reference, expected), product_bound(dtype, reference.dtype, shape[0], precision))
    actual, inner = block_grad_weight(**operands, backend="triton")
    assert error(actual, expected) <= bound
    assert torch.equal(actual != 0, expected != 0)
    assert inner is not None and expected_inner is not None
    assert torch.equal(inner != 0, expected_inner != 0)
    # A sum that cancels: measured against the gradients and weights it sums.
    terms = expected.norm() * operands["weight"].double().norm() / 0.25
    assert (inner.double() - expected_inner).norm() <= bound * terms
    again, inner_again = block_grad_weight(**operands, backend="triton")
    assert torch.equal(actual, again) and inner_again is not None and torch.equal(inner, inner_again)
    if dtype == BF16:
        # All of the index kept, no weight, out in bfloat16: one rounding more.
        plain = {name: value for name, value in operands.items() if name not in ("kept", "alpha", "weight")}
        actual, none = block_grad_weight(**plain, out_dtype=BF16, backend="triton")
        bound = product_bound(BF16, BF16, shape[0])
        assert none is None and error(actual, block_grad_weight(**exact(plain))[0]) <= bound


def test_the_gradient_replays_in_a_graph_after_the_topology_moved() -> None:
    operands = case(2048, 1024, 2048, (64, 64), "dense", BF16)
    block_grad_weight(**operands, backend="triton")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured, inner = block_grad_weight(**operands, backend="triton")
    moved = torch.rand(16, 32, device=DEVICE) < 0.5
    operands["index"].copy_(build_index_reference(moved))
    operands["kept"].copy_(moved)
    captured.fill_(float("nan"))
    graph.replay()
    expected, expected_inner = block_grad_weight(**operands, backend="triton")
    assert torch.equal(captured, expected) and inner is not None and expected_inner is not None
    assert torch.equal(inner, expected_inner)


def test_nothing_waits_for_the_host() -> None:
    operands = case(256, 1024, 2048, (64, 64), "packed", BF16)
    block_grad_weight(**operands, backend="triton")
    torch.cuda.set_sync_debug_mode("error")
    try:
        block_grad_weight(**operands, backend="triton")
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_offsets_beyond_two_to_the_31_reach_their_element() -> None:
    n, k = 70_016, 32_768
    assert n * k > 2**31
    listed = torch.zeros(n // 64, k // 64, dtype=torch.bool, device=DEVICE)
    listed[-1, -1] = listed[0, 0] = True
    x, grad_y = (torch.zeros(16, size, device=DEVICE, dtype=BF16) for size in (k, n))
    x[0, -1], grad_y[0, -1], grad_y[0, 0] = 3.0, 5.0, 7.0
    grad, _ = block_grad_weight(
        grad_y, x, build_index_reference(listed), block=(64, 64), shape=(n, k), out_dtype=BF16, backend="triton"
    )
    assert grad[-1, -1] == 15.0 and grad.count_nonzero() == 1
