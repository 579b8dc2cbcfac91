"""The references of the fused products: what they are, and what they refuse."""

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases.fused import CASES, Case, answer, by_columns, by_rows, operands, products
from cases.weight_exact import EXACT, check_exact

from tritonsparse.kernels.fused.gemm import fused_forward, fused_grad_input
from tritonsparse.kernels.fused.grad import fused_grad_weight
from tritonsparse.kernels.fused.linear import fused_linear
from tritonsparse.kernels.weight.reference import effective_weight_reference
from tritonsparse.kernels.weight.view import View


@pytest.mark.parametrize("case", CASES, ids=str)
def test_in_float64_products_are_autograd_of_published_code(case: Case) -> None:
    given = operands(case).double()
    exact, terms = answer(given)
    for name, value in products(given, "torch").items():
        torch.testing.assert_close(value, exact[name], rtol=1e-11, atol=1e-12 * (1 + terms), msg=name)


@pytest.mark.parametrize("name", [name for name in EXACT if not name.startswith("step")])
def test_by_hand(name: str) -> None:
    check_exact(EXACT[name], partial(by_columns, backend="torch"), partial(by_rows, backend="torch"))


def test_a_product_is_the_dense_one_of_the_effective_weight_bit_for_bit_also_under_autocast() -> None:
    x, grad_y, weight, view, bias, _ = operands(Case(9, 20, 37, "soft", product="fp32"))
    w_hat = effective_weight_reference(weight, view, torch.float32)
    forward = view._replace(grad_mask=None, alpha=None)
    expected = F.linear(x, w_hat, bias), grad_y @ w_hat
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            found = fused_forward(x, weight, forward, bias), fused_grad_input(grad_y, weight, forward)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


X, G, W = torch.zeros(2, 3), torch.zeros(2, 4), torch.zeros(4, 3)
SOFT, BLOCKS, STEP = View("soft", torch.zeros(1)), View("soft", torch.zeros(2, 3)), View("step", torch.zeros(1))
FLATTEN = "flatten the leading axes"


def grad_weight(**changed: Any) -> object:
    return fused_grad_weight(**{"grad_y": G, "x": X, "weight": W, "view": SOFT, **changed})


@pytest.mark.parametrize(("call", "expected", "remedy"), [
    (lambda: fused_forward(torch.zeros(2, 4), W, SOFT), "x to be a floating-point matrix [M, 3]", FLATTEN),
    (lambda: fused_forward(torch.zeros(1, 2, 3), W, SOFT), "x to be a floating-point matrix [M, 3]", FLATTEN),
    (lambda: fused_forward(X.long(), W, SOFT), "x to be a floating-point matrix [M, 3] on cpu", FLATTEN),
    (lambda: fused_forward(X, W, BLOCKS), "threshold of shape [1] or [4], got [2, 3]", "effective_weight"),
    (lambda: fused_forward(X, W, View("soft")), 'kind "mask" with a mask', "pass only what the kind reads"),
    (lambda: fused_forward(X, W, SOFT, torch.zeros(3)), "bias to be torch.float32 [4]", "cast the bias with x"),
    (lambda: fused_forward(X, W, SOFT, out_dtype=torch.int8), "a floating-point out_dtype", "leave it out"),
    (lambda: fused_forward(X, W, SOFT, backend="cuda"), 'backend "torch" or "triton"', "pass either"),
    (lambda: fused_forward(X.double(), W, SOFT, backend="triton"), "x in float16, bfloat16 or", 'pass backend="torch"'),
    (lambda: fused_grad_input(X, W, SOFT), "grad_y to be a floating-point matrix [M, 4]", FLATTEN),
    (lambda: grad_weight(grad_y=X), "grad_y to be a floating-point matrix [M, 4]", FLATTEN),
    (lambda: grad_weight(x=G), "x to be a floating-point matrix [M, 3]", FLATTEN),
    (lambda: grad_weight(x=torch.zeros(3, 3)), "the rows and the dtype of x, 3 and torch.float32", "pass both as"),
    (lambda: grad_weight(x=X.half()), "the rows and the dtype of x, 2 and torch.float16", "pass both as"),
    (lambda: grad_weight(view=STEP), 'got "step"', "threshold_backward"),
    (lambda: grad_weight(view=BLOCKS), "threshold of shape [1] or [4]", "effective_weight"),
    (lambda: fused_linear(X, W, STEP), 'kind "soft", "hard" or "mask", got "step"', "effective_weight"),
    (lambda: fused_linear(X, W, BLOCKS, backend="torch"), "threshold of shape [1] or [4]", "effective_weight"),
    (lambda: fused_linear(X, W, SOFT, w_hat=W.half(), backend="torch"),
     "w_hat to be torch.float32 [4, 3] on cpu, got float16 [4, 3]", "every product is fused"),
    (lambda: fused_linear(X.double(), W, SOFT, backend="torch"), "x in torch.float32", "torch.autocast"),
    (lambda: fused_linear(G, W, SOFT, backend="torch"), "x of shape [..., 3]", "check the layer's input"),
    (lambda: fused_linear(X[0, 0], W, SOFT, backend="torch"), "x of shape [..., 3]", "check the layer's input"),
])  # fmt: skip
def test_what_does_not_fit_is_refused_with_a_remedy(call: Any, expected: str, remedy: str) -> None:
    with pytest.raises(ValueError) as error:
        call()
    message = str(error.value)
    assert message.startswith("fused_") and ": expected " in message and expected in message and remedy in message
