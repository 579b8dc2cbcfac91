"""The definition of the fused products and what they refuse, without Triton."""

from __future__ import annotations

import doctest
import importlib
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tritonsparse.kernels.fused.bits import pack_bits, unpack_bits
from tritonsparse.kernels.fused.gemm import fused_grad_input, fused_linear
from tritonsparse.kernels.fused.linear import masked_linear

F64 = torch.float64
M, N, K = 4, 5, 37


def view(kind: str, shape: tuple[int, int]) -> dict[str, Any]:
    name = kind.removesuffix(" per row")
    if name == "mask":
        return {"kind": "mask", "mask": torch.rand(shape) < 0.5}
    return {"kind": name, "threshold": torch.rand(shape[0] if "per row" in kind else 1, dtype=F64)}


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("kind", ["soft", "soft per row", "hard", "hard per row", "step", "mask"])
def test_forward_and_grad_input_are_those_of_the_layer_s_op(kind: str, transposed: bool) -> None:
    shape = (K, N) if transposed else (N, K)
    weight, bias = torch.randn(shape, dtype=F64), torch.randn(N, dtype=F64)
    x = torch.randn(M, K, dtype=F64, requires_grad=True)
    given = view(kind, shape)
    y = masked_linear(x, weight, bias, **given, transposed=transposed)
    grad_y = torch.randn_like(y)
    (grad_x,) = torch.autograd.grad(y, x, grad_y)
    actual = fused_linear(x.detach(), weight, bias, **given, transposed=transposed)
    torch.testing.assert_close(actual, y.detach(), rtol=1e-12, atol=1e-12)
    actual = fused_grad_input(grad_y, weight, **given, transposed=transposed)
    torch.testing.assert_close(actual, grad_x, rtol=1e-12, atol=1e-12)
    if kind == "mask":
        packed = {"kind": "mask", "mask": pack_bits(given["mask"]), "transposed": transposed}
        assert torch.equal(actual, fused_grad_input(grad_y, weight, **packed))


@pytest.mark.parametrize(("name", "apply"), [("relu", F.relu), ("gelu", F.gelu), ("silu", F.silu)])
def test_the_activation_follows_the_bias(name: str, apply: Any) -> None:
    x, weight, bias = torch.randn(M, K), torch.randn(N, K), torch.randn(N)
    given = view("mask", (N, K))
    plain = fused_linear(x, weight, bias, **given)
    assert torch.equal(fused_linear(x, weight, bias, **given, activation=name), apply(plain))


def test_autocast_around_a_product_changes_nothing() -> None:
    x, weight = torch.randn(M, K), torch.randn(N, K)
    given = view("mask", (N, K))
    with torch.autocast("cpu", torch.bfloat16):
        inside = fused_linear(x, weight, **given), fused_grad_input(x[:, :N], weight, **given)
    outside = fused_linear(x, weight, **given), fused_grad_input(x[:, :N], weight, **given)
    assert all(torch.equal(a, b) for a, b in zip(inside, outside, strict=True))


X, W, S = torch.zeros(2, 3), torch.zeros(4, 3), torch.zeros(1)
MASK = torch.ones(4, 3, dtype=torch.bool)
SOFT: dict[str, Any] = {"kind": "soft", "threshold": S}


@pytest.mark.parametrize(
    ("operands", "expected", "remedy"),
    [
        ({"x": torch.zeros(2, 4), **SOFT}, "x to be a floating-point matrix [M, 3]", "flatten the leading axes"),
        ({"x": torch.zeros(1, 2, 3), **SOFT}, "x to be a floating-point matrix [M, 3]", "flatten the leading axes"),
        ({"x": torch.zeros(2, 3, dtype=torch.int64), **SOFT}, "floating-point matrix [M, 3]", "flatten"),
        ({"kind": "soft", "threshold": torch.zeros(2, 3)}, "threshold of shape [1] or [4]", "threshold_cast"),
        ({"kind": "soft", "threshold": torch.zeros(3)}, "threshold to be float32 [1], [4]", "beside the weight"),
        ({"kind": "soft", "mask": MASK}, 'kind "mask" with a mask', "pass only what the kind reads"),
        ({"kind": "mask", "mask": MASK[:, :2]}, "mask to be bool [4, 3]", "of the weight's shape"),
        ({"kind": "mask", "mask": pack_bits(MASK.T)}, "packed mask to be int32 [4, 1]", "with pack_bits"),
        ({**SOFT, "bias": torch.zeros(3)}, "bias to be torch.float32 [4]", "cast the bias with x"),
        ({**SOFT, "activation": "tanh"}, "activation to be one of", "pass None and apply it to the result"),
        ({**SOFT, "out_dtype": torch.int8}, "a floating-point out_dtype", "omit it"),
        ({**SOFT, "backend": "cuda"}, 'backend "torch" or "triton"', "pass either"),
        ({**SOFT, "x": X.double(), "backend": "triton"}, "x in float16, bfloat16 or float32", 'pass backend="torch"'),
    ],
)
def test_what_does_not_fit_is_refused_with_a_remedy(operands: dict[str, Any], expected: str, remedy: str) -> None:
    given: dict[str, Any] = {"x": X, "weight": W} | operands
    with pytest.raises(ValueError) as error:
        fused_linear(**given)
    message = str(error.value)
    assert message.startswith("fused_linear: expected ") and expected in message and remedy in message


def test_a_gradient_of_the_wrong_width_is_refused() -> None:
    with pytest.raises(ValueError, match=r"fused_grad_input: expected grad_y .* \[M, 4\]"):
        fused_grad_input(X, W, **SOFT)
    assert fused_grad_input(X, W, **SOFT, transposed=True).shape == (2, 4)


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_triton_off_the_gpu_is_an_error() -> None:
    with pytest.raises(RuntimeError, match='pass backend="torch"'):
        fused_linear(X, W, **SOFT, backend="triton")


# One word, its sign bit alone; then 33 columns, whose last stands alone in a second word.
@pytest.mark.parametrize(("columns", "kept", "words"), [(32, 31, [-(2**31)]), (33, 32, [0, 1]), (3, 1, [2])])
def test_bit_k_of_a_word_is_column_k(columns: int, kept: int, words: list[int]) -> None:
    mask = torch.zeros(2, columns, dtype=torch.bool)
    mask[1, kept] = True
    bits = pack_bits(mask)
    assert bits.tolist() == [[0] * len(words), words] and bits.dtype == torch.int32
    assert torch.equal(unpack_bits(bits, columns), mask)
    assert torch.equal(unpack_bits(bits.view(torch.uint32), columns), mask)


def test_words_of_another_number_of_columns_are_refused() -> None:
    with pytest.raises(ValueError, match=r"unpack_bits: expected int32 or uint32 words \[N, 2\]"):
        unpack_bits(torch.zeros(2, 1, dtype=torch.int32), 33)
    with pytest.raises(ValueError, match="pack_bits: expected mask to be a bool matrix"):
        pack_bits(torch.zeros(2, 2))


@pytest.mark.parametrize("name", ["fused.bits", "fused.gemm", "fused.grad", "plan"])
def test_the_examples_in_the_docstrings_hold(name: str) -> None:
    result = doctest.testmod(importlib.import_module(f"tritonsparse.kernels.{name}"))
    assert result.attempted >= 3 and result.failed == 0
