"""A convolution that keeps a packed input: Y = conv(X, W_hat) + b with X dense, dW_hat from X's largest elements.

    forward    Y      = conv(X, W_hat) + b              [B, F, OH, OW]
               X_hat  = X where not |X| < T             [B, C, H, W]    packed as [B C, H W] (packing.py)
    backward   dX     = conv_transposed(dY, W_hat)
               dW_hat = conv_weight(dY, X_hat)          [F, C/groups, kh, kw]
               db     = sum dY                          [F]

SWAT (arXiv:2001.01969, algorithm 1) for convolutions. The products are those of the dense library (cuDNN, MKL), so that
X_hat is unpacked for the time of one of them; between the passes the op holds bits, values and W_hat, which comes with
a gradient of its own (weight/op.py).
"""
# B samples   C input channels   F output channels

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._eager import as_dtype, is_eager, outside_autocast
from .._operands import refuse
from .compress import check_backend, unpack_activation
from .packing import Packing, check_packing, fake_packed, pack_input

__all__ = ["sparse_input_conv2d"]


Steps = tuple[list[int], list[int], list[int], int]  # stride, padding, dilation, groups


def _forward(
    x: Tensor, w_hat: Tensor, bias: Tensor | None, packing: Packing, steps: Steps, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    packed = pack_input("sparse_input_conv2d", x.reshape(*x.shape[:2], -1), packing, backend)
    with outside_autocast(x, bias):
        return F.conv2d(x, w_hat, bias, *steps), *packed


@torch.library.custom_op("tritonsparse::sparse_input_conv2d", mutates_args=())
def _forward_op(
    x: Tensor,
    w_hat: Tensor,
    bias: Tensor | None,
    cutoff: Tensor | None,
    row_mask: Tensor | None,
    density: float,
    scope: str,
    slack: float,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    packing = Packing(density, scope, slack, cutoff, row_mask)
    return _forward(x, w_hat, bias, packing, (stride, padding, dilation, groups), backend)


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
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    y = F.conv2d(x, w_hat, bias, stride, padding, dilation, groups)
    packing = Packing(density, scope, slack, cutoff, row_mask)
    return y, *fake_packed(x.shape[0] * x.shape[1], x.shape[2] * x.shape[3], x, packing)


def _gradients(
    grad_y: Tensor,
    w_hat: Tensor,
    bits: Tensor,
    values: Tensor,
    row_offsets: Tensor,
    x_shape: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    backend: str,
    need_x: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor]:
    """Those of x and of w_hat; empty where not needed, for a schema has no optional results."""
    with outside_autocast(grad_y):
        x_hat = unpack_activation(bits, values, row_offsets, x_shape[2] * x_shape[3], backend).view(x_shape)
        grad_x, grad_w_hat, _ = torch.ops.aten.convolution_backward(
            grad_y, x_hat, w_hat, None, stride, padding, dilation, False, [0, 0], groups, [need_x, need_weight, False]
        )
    # What was not asked for is undefined, and memory formats are the library's choice.
    return (
        grad_x.contiguous() if need_x else grad_y.new_empty(0),
        grad_w_hat.contiguous() if need_weight else w_hat.new_empty(0),
    )


_backward_op = torch.library.custom_op("tritonsparse::sparse_input_conv2d_backward", _gradients, mutates_args=())


@_backward_op.register_fake
def _(
    grad_y: Tensor,
    w_hat: Tensor,
    bits: Tensor,
    values: Tensor,
    row_offsets: Tensor,
    x_shape: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    backend: str,
    need_x: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor]:
    return grad_y.new_empty(x_shape if need_x else 0), w_hat.new_empty(w_hat.shape if need_weight else 0)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, w_hat, bias, *_, stride, padding, dilation, groups, backend = inputs
    y, bits, values, row_offsets, fresh, overflow = output
    ctx.save_for_backward(w_hat, bits, values, row_offsets)
    ctx.mark_non_differentiable(bits, values, row_offsets, fresh, overflow)
    ctx.set_materialize_grads(False)
    ctx.y_shape, ctx.how = y.shape, (list(x.shape), stride, padding, dilation, groups, backend)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx: Any, grad_y: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
    grad_y = saved[0].new_zeros(ctx.y_shape) if grad_y is None else grad_y.contiguous()
    # The op has no derivative: under create_graph it is in the graph, so that asking for one is an error.
    eager = is_eager(grad_y, saved[0]) and not torch.is_grad_enabled()
    gradients: Any = _gradients if eager else _backward_op
    grad_x, grad_w_hat = gradients(grad_y, *saved, *ctx.how, need_x, need_weight)
    return (
        grad_x if need_x else None,
        grad_w_hat if need_weight else None,
        as_dtype(grad_y.sum((0, 2, 3)), ctx.bias_dtype) if need_bias else None,
        *[None] * 10,
    )


_forward_op.register_autograd(_backward, setup_context=_setup_context)


class _SparseInputConv2d(torch.autograd.Function):
    """The op as eager code runs it (`_eager.py`); what gets no gradient is one argument, for each costs time."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w_hat: Tensor, bias: Tensor | None, rest: tuple[Any, ...]) -> tuple[Tensor, ...]:
        packing, steps, backend = rest
        output = _forward(x, w_hat, bias, packing, steps, backend)
        _setup_context(ctx, (x, w_hat, bias, *steps, backend), output)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return _backward(ctx, *grads)[:4]


def sparse_input_conv2d(
    x: Tensor,
    w_hat: Tensor,
    bias: Tensor | None,
    packing: Packing,
    *,
    stride: tuple[int, ...] = (1, 1),
    padding: tuple[int, ...] = (0, 0),
    dilation: tuple[int, ...] = (1, 1),
    groups: int = 1,
    backend: str = "torch",
) -> tuple[Tensor, Tensor, Tensor]:
    """Y = conv2d(x, w_hat) + bias, with w_hat's gradient from the largest elements of x.

    Syncs with the host, packs and compiles as `sparse_input_linear` does.

    Args:
        x: `[B, C, H, W]`, any strides.
        w_hat: `[F, C/groups, kh, kw]`, dtype of x: the effective weight. It is saved as it is, so nobody may write to
            it before the backward.
        bias: `[F]`, dtype of x, or None.
        packing: what of x is kept, and its room; scope "plane" and one cut-off a row mean a sample's channel.
        stride, padding, dilation, groups: as `torch.nn.functional.conv2d`; padding in numbers.
        backend: "torch" (the reference, any device) or "triton" (a GPU, or Triton's interpreter).

    Returns:
        `y`: `[B, F, OH, OW]`, dtype of x; aliases nothing.
        `cutoff`: T as used; packing's own where it was given.
        `overflow`: 0-dim bool on the CPU: more was kept than slack allowed for, and has been saved all the same.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together, or the back end is unknown.
        RuntimeError: `backend="triton"` where Triton cannot run, or a CUDA graph capture without room for all.
    """
    function = "sparse_input_conv2d"
    if w_hat.dim() != 4 or x.dim() != 4 or x.dtype != w_hat.dtype or x.shape[1] != w_hat.shape[1] * groups:
        channels = w_hat.shape[1] * groups if w_hat.dim() == 4 else "C"
        expected = f"x to be {w_hat.dtype} [B, {channels}, H, W] beside w_hat [F, C/groups, kh, kw]"
        refuse(function, expected, x, "check the layer's input")
    check_backend(function, x, backend)
    check_packing(function, packing, x.shape[:2], x)
    steps = (list(stride), list(padding), list(dilation), groups)
    if not is_eager(x, w_hat):
        y, *_, fresh, overflow = _forward_op(
            x, w_hat, bias, packing.cutoff, packing.row_mask,
            float(packing.density), packing.scope, float(packing.slack), *steps, backend,
        )  # fmt: skip
    elif torch.is_grad_enabled():
        y, *_, fresh, overflow = _SparseInputConv2d.apply(x, w_hat, bias, (packing, steps, backend))
    else:
        y, *_, fresh, overflow = _forward(x, w_hat, bias, packing, steps, backend)
    return y, fresh if packing.cutoff is None else packing.cutoff, overflow
