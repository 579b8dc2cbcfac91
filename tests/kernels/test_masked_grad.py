"""The definition of the fused gradient of the weight and what it refuses, without Triton."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tritonsparse.kernels.fused.bits import pack_bits
from tritonsparse.kernels.fused.grad import fused_grad_weight
from tritonsparse.kernels.fused.linear import masked_linear

F64 = torch.float64
M, N, K = 6, 5, 7


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("restricted", [False, True])
@pytest.mark.parametrize("kind", ["soft", "soft per row", "hard", "mask"])
def test_the_gradients_are_those_of_the_layer_s_op(kind: str, restricted: bool, transposed: bool) -> None:
    shape = (K, N) if transposed else (N, K)
    weight = torch.randn(shape, dtype=F64, requires_grad=True)
    x, grad_y = torch.randn(M, K, dtype=F64), torch.randn(M, N, dtype=F64)
    name = kind.removesuffix(" per row")
    threshold = torch.rand(shape[0] if "per row" in kind else 1, dtype=F64, requires_grad=True)
    given: dict[str, Any] = {
        "kind": name,
        "threshold": None if name == "mask" else threshold,
        "mask": torch.rand(shape) < 0.5 if name == "mask" else None,
        "grad_mask": torch.rand(shape) < 0.5 if restricted else None,
        "alpha": torch.tensor(0.25),
        "transposed": transposed,
    }
    y = masked_linear(x, weight, **given)
    expected = torch.autograd.grad(y, [weight, threshold], grad_y, allow_unused=True)
    with torch.no_grad():
        grad_weight, grad_threshold = fused_grad_weight(grad_y, x, weight, **given)
    torch.testing.assert_close(grad_weight, expected[0], rtol=1e-12, atol=1e-12)
    if name == "mask":
        assert grad_threshold.shape == (0,) and grad_threshold.dtype == torch.float32
        packed = given | {"mask": pack_bits(given["mask"])}
        packed["grad_mask"] = pack_bits(given["grad_mask"]) if restricted else None
        with torch.no_grad():
            assert torch.equal(grad_weight, fused_grad_weight(grad_y, x, weight, **packed)[0])
    else:
        torch.testing.assert_close(grad_threshold, expected[1], rtol=1e-12, atol=1e-12)


def test_a_row_by_hand() -> None:
    # G = 2 x = [4, 8, 16, 2]. T = sigmoid(0) = 1/2 keeps 1 and -1; -1/4 is pruned, and 0 is 0.
    # m G = [4, 8/2, 16, 0]; ds = -1/4 (4 - 4 - 16) = 4.
    weight = torch.tensor([[1.0, -0.25, -1.0, 0.0]])
    x = torch.tensor([[2.0, 4.0, 8.0, 1.0]])
    grad_weight, grad_threshold = fused_grad_weight(
        torch.tensor([[2.0]]), x, weight, kind="soft", threshold=torch.zeros(1), alpha=torch.tensor(0.5)
    )
    assert grad_weight.tolist() == [[4.0, 4.0, 16.0, 0.0]] and grad_threshold.tolist() == [4.0]


X, G, W = torch.zeros(2, 3), torch.zeros(2, 4), torch.zeros(4, 3)
SOFT: dict[str, Any] = {"kind": "soft", "threshold": torch.zeros(1)}


@pytest.mark.parametrize(
    ("operands", "expected", "remedy"),
    [
        ({"grad_y": X}, "grad_y to be a floating-point matrix [M, 4]", "flatten the leading axes"),
        ({"x": G}, "x to be a floating-point matrix [M, 3]", "flatten the leading axes"),
        ({"x": torch.zeros(3, 3)}, "the rows and the dtype of x, 3 and torch.float32", "as the forward's product left"),
        ({"x": X.half()}, "the rows and the dtype of x, 2 and torch.float16", "as the forward's product left"),
        ({"kind": "step"}, 'got "step"', "threshold_backward"),
        ({"alpha": torch.zeros(2)}, "alpha to be one float32 value", "keep the schedule's value"),
        ({"grad_mask": torch.zeros(4, 2, dtype=torch.int32)}, "packed grad_mask to be int32 [4, 1]", "with pack_bits"),
        ({"grad_mask": torch.zeros(4, 3)}, "grad_mask to be bool [4, 3]", "of the weight's shape"),
        ({"threshold": torch.zeros(2, 3)}, "threshold of shape [1] or [4]", "threshold_cast"),
    ],
)
def test_what_does_not_fit_is_refused_with_a_remedy(operands: dict[str, Any], expected: str, remedy: str) -> None:
    given: dict[str, Any] = {"grad_y": G, "x": X, "weight": W} | SOFT | operands
    with pytest.raises(ValueError) as error:
        fused_grad_weight(**given)
    message = str(error.value)
    assert message.startswith("fused_grad_weight: expected ") and expected in message and remedy in message
