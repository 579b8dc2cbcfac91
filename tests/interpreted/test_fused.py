"""The fused products, through the interpreter."""

from functools import partial
from typing import Any

import pytest
import torch
from cases.fused import CASES, Case, by_columns, by_rows, check, operands, products
from cases.matrices import error
from cases.weight_exact import EXACT, check_exact

from tritonsparse.kernels._tiles import grouped_tile
from tritonsparse.kernels._triton import tl, triton
from tritonsparse.kernels.fused.gemm import fused_forward, fused_grad_input
from tritonsparse.kernels.fused.linear import fused_linear
from tritonsparse.kernels.weight.view import View

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def bound(operands: torch.dtype, out: torch.dtype, length: int) -> float:
    """Sums in float32 of terms that are exact in it."""
    return 2e-6


@pytest.mark.parametrize("case", CASES, ids=str)
def test_products_are_as_exact_as_the_references(case: Case) -> None:
    check(case, bound)


@pytest.mark.parametrize("m", [7, 65])
def test_computed_configurations_are_so_too(m: int) -> None:
    check(Case(m, 70, 130, "mask", product="fp32"), bound, computed_tiles=True)


@pytest.mark.parametrize("name", [name for name in EXACT if not name.startswith("step")])
def test_by_hand(name: str) -> None:
    check_exact(EXACT[name], partial(by_columns, backend="triton"), partial(by_rows, backend="triton"))


@pytest.mark.parametrize("master", ["fp32", "half"])
@pytest.mark.parametrize("kind", ["soft", "mask"])
def test_bfloat16_operands_are_upcast_for_the_interpreter(kind: str, master: str) -> None:
    given = operands(Case(40, 20, 33, kind, master=master, bias=False), half=torch.bfloat16)
    actual, expected = products(given, "triton"), products(given.double(), "torch")
    for name, value in actual.items():
        # The interpreter truncates where a cast to bfloat16 should round; products of bfloat16 are exact in float32.
        loose = value.dtype == torch.bfloat16 or (name in ("y", "grad_x"))
        assert error(value, expected[name]) <= (1e-2 if loose else 2e-6), name


def test_the_result_may_be_wider_than_the_operands() -> None:
    x, weight = torch.randn(5, 40).half(), torch.randn(40, 40).half()
    given: dict[str, Any] = {"view": View("hard", torch.tensor([0.5])), "out_dtype": torch.float32}
    # Products of float16 are exact in float32, and nothing is rounded to float16 on the way.
    for function in (fused_forward, fused_grad_input):
        actual = function(x, weight, **given, backend="triton")
        expected = function(x.double(), weight.double(), **given)
        assert actual.dtype == torch.float32 and error(actual, expected) <= 1e-6


@pytest.mark.parametrize("shape", [(0, 5, 3), (2, 0, 3), (2, 5, 0)])
@pytest.mark.parametrize("transposed", [False, True])
def test_an_empty_axis_gives_what_the_reference_gives(shape: tuple[int, int, int], transposed: bool) -> None:
    given = operands(Case(*shape, "soft per row", transposed=transposed, product="fp32"))
    expected = products(given, "torch")
    for name, value in products(given, "triton").items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("leading", [(3, 5), (0,), (1,), ()], ids=str)
@pytest.mark.parametrize("transposed", [False, True], ids=["Linear", "Conv1D"])
@pytest.mark.parametrize("kind", ["soft per row", "hard", "mask"])
@pytest.mark.parametrize("given_w_hat", [False, True], ids=["", "w_hat"])
def test_the_op_has_its_gradients(kind: str, transposed: bool, leading: tuple[int, ...], given_w_hat: bool) -> None:
    found = {}
    for backend in ("torch", "triton"):
        case = Case(1, 40, 24, kind, transposed=transposed, product="fp32")
        _, _, weight, view, bias, _ = operands(case)
        x = torch.linspace(-1, 2, 24 * torch.Size(leading).numel()).view(*leading, 24)
        leaves = [x, weight, bias, *([view.threshold] if kind == "soft per row" else [])]
        for leaf in leaves:
            leaf.requires_grad_()
        w_hat = torch.where(weight > 0, weight, 0.0).detach() if given_w_hat else None
        y = fused_linear(x, weight, view, bias, w_hat=w_hat, transposed=transposed, backend=backend)
        found[backend] = [y, *torch.autograd.grad(y, leaves, torch.linspace(-1, 1, y.numel()).view(y.shape))]
    torch.testing.assert_close(found["triton"], found["torch"], rtol=1e-5, atol=1e-5)


@triton.jit
def _order_of_tiles(order, tiles_m, tiles_n, GROUP: tl.constexpr):  # type: ignore[no-untyped-def]
    program = tl.program_id(0).to(tl.int64)
    i_m, i_n = grouped_tile(program, tiles_m, tiles_n, GROUP)
    tl.store(order + i_m * tiles_n + i_n, program)


def order_of_tiles(tiles_m: int, tiles_n: int, group: int) -> torch.Tensor:
    order = torch.full((tiles_m, tiles_n), -1)
    _order_of_tiles[(tiles_m * tiles_n,)](order, tiles_m, tiles_n, GROUP=group)
    return order


def test_one_program_computes_each_tile_and_they_go_down_a_group_of_rows_before_they_go_along() -> None:
    # Groups of two rows of three tiles; the last group has one row.
    assert order_of_tiles(3, 3, 2).tolist() == [[0, 2, 4], [1, 3, 5], [6, 7, 8]]
    for m, n in ((1, 1), (1, 6), (9, 1), (8, 3), (9, 6)):
        for group in (1, 4, 8):
            assert order_of_tiles(m, n, group).flatten().sort().values.tolist() == list(range(m * n)), (m, n, group)
