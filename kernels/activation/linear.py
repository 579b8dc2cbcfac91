"""A linear product that keeps a packed input: Y = X W_hat^T + b with X dense, dW_hat from X's largest elements.

    forward    Y      = X W_hat^T + b             [M, N]
               X_hat  = X where not |X| < T       [M, K]   packed (packing.py)
    backward   dX     = dY W_hat                  [M, K]
               dW_hat = dY^T X_hat                [N, K]   grad_weight.py
               db     = sum_M dY                  [N]

SWAT (arXiv:2001.01969, algorithm 1). X is not saved: between the passes the op holds bits, the values of X_hat and
W_hat, the effective weight, whose own backward multiplies dW_hat on its way to W (weight/op.py).
"""

# M rows of x (tokens)   N output features   K input features

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._eager import as_dtype, is_eager, outside_autocast
from .._operands import FLOATS, check_input, refuse
from .compress import check_backend
from .grad_weight import packed_grad_weight
from .packing import Packing, check_packing, fake_packed, pack_input

__all__ = ["sparse_input_linear"]


def _forward(
    x: Tensor, w_hat: Tensor, bias: Tensor | None, packing: Packing, transposed: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    packed = pack_input("sparse_input_linear", x, packing, backend)
    with outside_autocast(x, bias):
        return F.linear(x, w_hat.t() if transposed else w_hat, bias), *packed


@torch.library.custom_op("tritonsparse::sparse_input_linear", mutates_args=())
def _forward_op(
    x: Tensor,
    w_hat: Tensor,
    bias: Tensor | None,
    cutoff: Tensor | None,
    row_mask: Tensor | None,
    density: float,
    scope: str,
    slack: float,
    transposed: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _forward(x, w_hat, bias, Packing(density, scope, slack, cutoff, row_mask), transposed, backend)


@_forward_op.register_fake
def _(
    x: Tensor,
    w_hat: Tensor,
    bias: Tensor | None,
    cutoff: Tensor | None,
    row_mask: Tensor | None,
    density: float,
    scope: str,
    slack: float,
    transposed: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    k = x.shape[-1]
    rows = x.shape[:-1].numel()
    y = x.new_empty((*x.shape[:-1], w_hat.shape[1 if transposed else 0]))
    return y, *fake_packed(rows, k, x, Packing(density, scope, slack, cutoff, row_mask))


def _gradients(
    grad_y: Tensor,
    w_hat: Tensor,
    bits: Tensor,
    values: Tensor,
    row_offsets: Tensor,
    transposed: bool,
    backend: str,
    need_x: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor]:
    """Those of x and of w_hat; empty where not needed, for a schema has no optional results."""
    rows = grad_y.reshape(bits.shape[0], grad_y.shape[-1])
    grad_x, grad_w_hat = grad_y.new_empty(0), w_hat.new_empty(0)
    with outside_autocast(grad_y):
        if need_x:
            grad_x = torch.mm(rows, w_hat.t() if transposed else w_hat)
            grad_x = grad_x.reshape(*grad_y.shape[:-1], grad_x.shape[-1])
        if need_weight:
            k = w_hat.shape[0 if transposed else 1]
            grad_w_hat = packed_grad_weight(rows, bits, values, row_offsets, k, transposed=transposed, backend=backend)
    return grad_x, grad_w_hat


_backward_op = torch.library.custom_op("tritonsparse::sparse_input_linear_backward", _gradients, mutates_args=())


@_backward_op.register_fake
def _(
    grad_y: Tensor,
    w_hat: Tensor,
    bits: Tensor,
    values: Tensor,
    row_offsets: Tensor,
    transposed: bool,
    backend: str,
    need_x: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor]:
    k = w_hat.shape[0 if transposed else 1]
    grad_x = grad_y.new_empty((*grad_y.shape[:-1], k) if need_x else 0)
    return grad_x, w_hat.new_empty(w_hat.shape if need_weight else 0)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, w_hat, bias, *_, transposed, backend = inputs
    y, bits, values, row_offsets, fresh, overflow = output
    ctx.save_for_backward(w_hat, bits, values, row_offsets)
    ctx.mark_non_differentiable(bits, values, row_offsets, fresh, overflow)
    ctx.set_materialize_grads(False)
    ctx.y_shape, ctx.how = y.shape, (transposed, backend)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx: Any, grad_y: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
    if grad_y is None:
        grad_y = saved[0].new_zeros(ctx.y_shape)
    # The op has no derivative: under create_graph it is in the graph, so that asking for one is an error.
    eager = is_eager(grad_y, saved[0]) and not torch.is_grad_enabled()
    gradients: Any = _gradients if eager else _backward_op
    grad_x, grad_w_hat = gradients(grad_y, *saved, *ctx.how, need_x, need_weight)
    return (
        grad_x if need_x else None,
        grad_w_hat if need_weight else None,
        as_dtype(grad_y.reshape(-1, grad_y.shape[-1]).sum(0), ctx.bias_dtype) if need_bias else None,
        *[None] * 7,
    )


_forward_op.register_autograd(_backward, setup_context=_setup_context)


class _SparseInputLinear(torch.autograd.Function):
    """The op as eager code runs it (`_eager.py`); what gets no gradient is one argument, for each costs time."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w_hat: Tensor, bias: Tensor | None, rest: tuple[Any, ...]) -> tuple[Tensor, ...]:
        output = _forward(x, w_hat, bias, *rest)
        _setup_context(ctx, (x, w_hat, bias, *rest), output)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return _backward(ctx, *grads)[:4]


def sparse_input_linear(
    x: Tensor,
    w_hat: Tensor,
    bias: Tensor | None,
    packing: Packing,
    *,
    transposed: bool = False,
    backend: str = "torch",
) -> tuple[Tensor, Tensor, Tensor]:
    """Y = x w_hat^T + bias, with w_hat's gradient from the largest elements of x.

    A host sync reads whether the values fit, unless slack density >= 1 makes room for all of x. An overflow changes
    a shape: where torch.compile does not take that in a full graph, make that room, or set
    `torch._dynamo.config.capture_dynamic_output_shape_ops`. Packs whether or not a gradient will be asked for.

    Args:
        x: `[..., K]`, any strides.
        w_hat: `[N, K]` (`[K, N]` when `transposed`), dtype of x, float16/bfloat16/float32/float64: the effective
            weight. It is saved as it is, so nobody may write to it before the backward.
        bias: `[N]`, dtype of x, or None.
        packing: what of x is kept, and its room.
        transposed: `w_hat` is stored `[K, N]`, as transformers' Conv1D does.
        backend: "torch" (the reference, any device) or "triton" (a GPU, or Triton's interpreter).

    Returns:
        `y`: `[..., N]`, dtype of x; aliases nothing.
        `cutoff`: T as used; packing's own where it was given.
        `overflow`: 0-dim bool on the CPU: more was kept than slack allowed for, and has been saved all the same.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together, or the back end is unknown.
        RuntimeError: `backend="triton"` where Triton cannot run, or a CUDA graph capture without room for all.
    """
    if w_hat.dim() != 2 or w_hat.dtype not in FLOATS:
        expected = "w_hat to be a floating-point matrix [N, K]"
        refuse("sparse_input_linear", expected, w_hat, "pass the effective weight")
    check_input("sparse_input_linear", x, w_hat.shape[0 if transposed else 1], w_hat.dtype)
    check_backend("sparse_input_linear", x, backend)
    check_packing("sparse_input_linear", packing, x.shape[:-1], x)
    if not is_eager(x, w_hat):
        y, *_, fresh, overflow = _forward_op(
            x, w_hat, bias, packing.cutoff, packing.row_mask,
            float(packing.density), packing.scope, float(packing.slack), transposed, backend,
        )  # fmt: skip
    elif torch.is_grad_enabled():
        y, *_, fresh, overflow = _SparseInputLinear.apply(x, w_hat, bias, (packing, transposed, backend))
    else:
        y, *_, fresh, overflow = _forward(x, w_hat, bias, packing, transposed, backend)
    return y, fresh if packing.cutoff is None else packing.cutoff, overflow
