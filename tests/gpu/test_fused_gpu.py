"""The fused products on a GPU: bfloat16, odd shapes, tf32, graphs, and offsets beyond 2^31."""

from functools import partial

import pytest
import torch
from cases.fused import CASES, LARGE, Case, by_columns, by_rows, check, operands, products
from cases.weight_exact import EXACT, check_exact
from graphs import captured
from tolerances import product_bound

from tritonsparse.kernels.fused.gemm import fused_forward, fused_grad_input
from tritonsparse.kernels.fused.grad import fused_grad_weight
from tritonsparse.kernels.weight.view import View

pytestmark = pytest.mark.usefixtures("poisoned_memory")

DEVICE = "cuda"
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@pytest.mark.parametrize("half", [BF16, FP16], ids=str)
@pytest.mark.parametrize("case", CASES + LARGE, ids=str)
def test_products_are_as_exact_as_the_references(case: Case, half: torch.dtype) -> None:
    check(case, product_bound, DEVICE, half, computed_tiles=True)


@pytest.mark.parametrize("case", [case for case in LARGE if case.product == "fp32"], ids=str)
def test_float32_products_are_so_in_both_precisions(case: Case, precision: str) -> None:
    check(case, partial(product_bound, precision=precision), DEVICE, BF16, computed_tiles=True)


@pytest.mark.parametrize("name", [name for name in EXACT if not name.startswith("step")])
def test_by_hand(name: str) -> None:
    check_exact(EXACT[name], partial(by_columns, backend="triton"), partial(by_rows, backend="triton"), DEVICE)


def test_products_replay_in_a_graph() -> None:
    given = operands(Case(64, 1024, 512, "soft per row"), DEVICE, BF16)
    expected, (graph, found) = products(given, "triton"), captured(lambda: products(given, "triton"))
    for tensor in found.values():
        tensor.fill_(float("nan"))
    graph.replay()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_offsets_beyond_two_to_the_31_reach_their_element() -> None:
    n, k = 70_000, 32_768
    assert n * k > 2**31
    weight = torch.zeros(n, k, device=DEVICE, dtype=BF16)
    # Ones at the far corner and one element beyond 2^31; everything else is pruned.
    far = divmod(2**31 + 5, k)
    weight[-1, -1] = weight[far] = 1.0
    view = View("hard", torch.tensor([0.5], device=DEVICE))
    x = torch.zeros(2, k, device=DEVICE, dtype=BF16)
    x[0, -1], x[1, far[1]] = 3.0, 5.0
    y = fused_forward(x, weight, view, backend="triton")
    assert y.count_nonzero() == 2 and y[0, -1] == 3.0 and y[1, far[0]] == 5.0
    grad_x = fused_grad_input(y, weight, view, backend="triton")
    assert torch.equal(grad_x, x)
    # dW = dY^T X is 9 and 25 where kept, and 0 where pruned: row n - 1 holds no other x.
    grad_weight, _ = fused_grad_weight(y, x, weight, view, backend="triton")
    assert grad_weight.count_nonzero() == 2 and grad_weight[-1, -1] == 9.0 and grad_weight[far] == 25.0
