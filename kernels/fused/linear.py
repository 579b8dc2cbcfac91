"""A fused linear layer: Y = X S(W)^T + b with S(W) computed inside the products, and the multiplier on dW.

    forward    Y  = X S(W)^T + b             [M, N]   gemm.py
    backward   dX = dY S(W)                  [M, K]   gemm.py
               dW = m * (dY^T X)             [N, K]   grad.py, and the threshold's gradient
               db = sum_M dY                 [N]

W is the dense master and is only read; S(W) is never stored, so the op saves X and W alone. Where the caller has made
S(W) already (`w_hat`), the forward and dX are dense library products of it, and dW alone is fused: `plan.py` says which
way is faster.
"""

# M rows of x (tokens)   N output features   K input features

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._eager import as_dtype, is_eager, outside_autocast
from .._operands import check_input, refuse
from .._triton import require
from ..weight.view import View
from ._operands import check_fused
from .gemm import product
from .grad import product_gradient

__all__ = ["fused_linear"]


def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    threshold: Tensor | None,
    mask: Tensor | None,
    grad_mask: Tensor | None,
    alpha: Tensor | None,
    w_hat: Tensor | None,
    kind: str,
    transposed: bool,
    backend: str,
    dtype: torch.dtype,
) -> Tensor:
    # grad_mask and alpha are the backward's; they pass through here because autograd saves op inputs only.
    if w_hat is not None:
        with outside_autocast(x, bias):
            return F.linear(x, w_hat.t() if transposed else w_hat, bias)
    view = View(kind, threshold, mask)
    y = product(_matrix(x), weight, view, bias, transposed, dtype, backend)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[-1])


_forward_op = torch.library.custom_op("tritonsparse::fused_linear", _forward, mutates_args=())


@_forward_op.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    threshold: Tensor | None,
    mask: Tensor | None,
    grad_mask: Tensor | None,
    alpha: Tensor | None,
    w_hat: Tensor | None,
    kind: str,
    transposed: bool,
    backend: str,
    dtype: torch.dtype,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[1 if transposed else 0]), dtype=dtype)


def _matrix(tensor: Tensor) -> Tensor:
    return tensor if tensor.dim() == 2 else tensor.reshape(-1, tensor.shape[-1])


def _gradients(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor,
    threshold: Tensor | None,
    mask: Tensor | None,
    grad_mask: Tensor | None,
    alpha: Tensor | None,
    w_hat: Tensor | None,
    kind: str,
    transposed: bool,
    backend: str,
    need_x: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Those of x, the weight and the threshold; empty where not needed, for a schema has no optional results."""
    rows, view = _matrix(grad_y), View(kind, threshold, mask, grad_mask, alpha)
    grad_x, grad_weight, of_threshold = x.new_empty(0), weight.new_empty(0), None
    if need_x and w_hat is None:
        grad_x = product(rows, weight, view, None, not transposed, x.dtype, backend).view(x.shape)
    elif need_x and w_hat is not None:
        with outside_autocast(x):
            grad_x = torch.mm(rows, w_hat.t() if transposed else w_hat).reshape(x.shape)
    if need_weight:
        grad_weight, of_threshold = product_gradient(rows, _matrix(x), weight, view, transposed, backend)
    return grad_x, grad_weight, weight.new_empty(0) if of_threshold is None else of_threshold


_backward_op = torch.library.custom_op("tritonsparse::fused_linear_backward", _gradients, mutates_args=())


@_backward_op.register_fake
def _(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor,
    threshold: Tensor | None,
    mask: Tensor | None,
    grad_mask: Tensor | None,
    alpha: Tensor | None,
    w_hat: Tensor | None,
    kind: str,
    transposed: bool,
    backend: str,
    need_x: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_x = x.new_empty(x.shape if need_x else 0)
    if need_weight and threshold is not None:
        return grad_x, weight.new_empty(weight.shape), threshold.new_empty(threshold.shape)
    return grad_x, weight.new_empty(weight.shape if need_weight else 0), weight.new_empty(0)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, threshold, mask, grad_mask, alpha, w_hat, *ctx.how, _ = inputs
    ctx.save_for_backward(x, weight, threshold, mask, grad_mask, alpha, w_hat)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
    need_x, need_weight, need_bias, need_threshold = ctx.needs_input_grad[:4]
    saved = ctx.saved_tensors  # Read once: a checkpoint unpacks them once.
    # The op has no derivative: under create_graph it is in the graph, so that asking for one is an error.
    eager = is_eager(grad_y, saved[1]) and not torch.is_grad_enabled()
    gradients: Any = _gradients if eager else _backward_op
    grad_x, grad_weight, of_threshold = gradients(grad_y, *saved, *ctx.how, need_x, need_weight or need_threshold)
    return (
        grad_x if need_x else None,
        grad_weight if need_weight else None,
        as_dtype(_matrix(grad_y).sum(0), ctx.bias_dtype) if need_bias else None,
        # DDP waits for every parameter: a threshold gets a gradient, zeros included, never None.
        of_threshold if need_threshold else None,
        *[None] * 8,
    )


_forward_op.register_autograd(_backward, setup_context=_setup_context)


class _FusedLinear(torch.autograd.Function):
    """The op as eager code runs it (`_eager.py`); what gets no gradient is one argument, for each costs time."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        threshold: Tensor | None,
        rest: tuple[Any, ...],
    ) -> Tensor:
        inputs = (x, weight, bias, threshold, *rest)
        y = _forward(*inputs)
        _setup_context(ctx, inputs, y)
        return y

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        return _backward(ctx, grad_y)[:5]


def fused_linear(
    x: Tensor,
    weight: Tensor,
    view: View,
    bias: Tensor | None = None,
    *,
    w_hat: Tensor | None = None,
    transposed: bool = False,
    dtype: torch.dtype | None = None,
    backend: str = "triton",
) -> Tensor:
    """Y = x S(W)^T + bias, differentiable in x, the weight, the bias and the view's threshold.

    Args:
        x: `[..., K]`, `dtype`; any strides.
        weight: `[N, K]` (`[K, N]` when `transposed`), float16/bfloat16/float32: the dense master.
        view: kind "soft", "hard" or "mask", with a threshold for the matrix or a row of the stored weight.
        bias: `[N]`, `dtype`, or None.
        w_hat: S(W) itself, shape of `weight`, in `dtype`, if the caller has made it; it is trusted, and gets no
            gradient: W does.
        transposed: `weight` is stored `[K, N]`, as transformers' Conv1D does.
        dtype: of the matrix products and of Y; the weight's by default.
        backend: "triton" (a GPU, or Triton's interpreter) or "torch" (the references, any device).

    Returns:
        `[..., N]`, `dtype`; aliases nothing.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together, or the product does not take this view.
        RuntimeError: `backend="triton"` where Triton cannot run.
    """
    dtype = dtype or weight.dtype
    if view.kind == "step":
        raise ValueError(
            'fused_linear: expected kind "soft", "hard" or "mask", got "step"; multiply by effective_weight'
        )
    check_fused("fused_linear", weight, view, backend)
    check_input("fused_linear", x, weight.shape[0 if transposed else 1], dtype)
    if backend == "triton":
        require("fused_linear", weight)
    if w_hat is not None and not (
        w_hat.shape == weight.shape and w_hat.dtype == dtype and w_hat.device == weight.device
    ):
        expected = f"w_hat to be {dtype} {list(weight.shape)} on {weight.device}"
        refuse("fused_linear", expected, w_hat, "leave it out, and every product is fused")
    kind, threshold, mask, grad_mask, alpha = view
    rest = (mask, grad_mask, alpha, w_hat, kind, transposed, backend, dtype)
    if not is_eager(x, weight):
        return _forward_op(x, weight, bias, threshold, *rest)
    if not torch.is_grad_enabled():
        return _forward(x, weight, bias, threshold, *rest)
    y: Tensor = _FusedLinear.apply(x, weight, bias, threshold, rest)
    return y
