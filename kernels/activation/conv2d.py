"""A convolution that keeps a packed input: Y = conv(X, Ŵ) + b with X dense, dŴ from X̂, the largest elements of X.

    forward    Y  = conv(X, Ŵ) + b                   [B, F, OH, OW]
               X̂  = X where not |X| < T              [B, C, H, W]    packed as [B C, H W] (compress.py)
    backward   dX = conv_transposed(dY, Ŵ)
               dŴ = conv_weight(dY, X̂)               [F, C/groups, kh, kw]
               db = Σ dY                             [F]

SWAT (arXiv:2001.01969, algorithm 1) for convolutions; the linear layer's is linear.py, which also says what the
capacity of the packed values is and that nothing is lost beyond it. The products are the vendor's, so that X̂ is
unpacked for the time of one of them; between the passes the layer holds bits, values and Ŵ. Ŵ comes with a gradient of
its own (weight/op.py). Called by `tritonsparse.conv`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._operands import compute_dtype, expect
from .compress import check_backend, pack_activation, unpack_activation
from .cutoff import SCOPES, activation_cutoff, check_density
from .linear import packed_share, refuse_capture

__all__ = ["packed_conv2d"]


@torch.library.custom_op("tritonsparse::packed_conv2d", mutates_args=())
def _forward_op(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    cutoff: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    backend: str,
    density: float,
    slack: float,
    scope: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    share = packed_share(density, slack)
    refuse_capture("packed_conv2d", x, share, backend)
    planes = x.reshape(*x.shape[:2], -1)
    fresh = x.new_empty(0, dtype=compute_dtype(x))
    if cutoff is None:
        cutoff = fresh = activation_cutoff(planes, density, scope, backend=backend)
    rows = planes.flatten(0, 1)
    capacity = max(1, math.ceil(share * rows.numel()))
    bits, values, row_offsets, flag = pack_activation(rows, cutoff, None, capacity, backend=backend)
    # The one host sync, and none where everything fits.
    overflow = share < 1 and bool(flag)
    if overflow:
        values = pack_activation(rows, cutoff, None, int(row_offsets[-1]), backend=backend)[1]
    with torch.autocast(x.device.type, enabled=False):
        y = F.conv2d(x, weight, bias, stride, padding, dilation, groups)
    return y, fresh, bits, values, row_offsets, torch.tensor(overflow)


@_forward_op.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    cutoff: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    backend: str,
    density: float,
    slack: float,
    scope: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    rows, k = x.shape[0] * x.shape[1], x.shape[2] * x.shape[3]
    fresh = 0 if cutoff is not None else 1 if scope == "batch" else rows
    capacity = rows * k if packed_share(density, slack) == 1 else torch.library.get_ctx().new_dynamic_size()
    return (
        F.conv2d(x, weight, bias, stride, padding, dilation, groups),
        x.new_empty(fresh, dtype=compute_dtype(x)),
        x.new_empty((rows, (k + 31) // 32), dtype=torch.int32),
        x.new_empty(capacity),
        x.new_empty(rows + 1, dtype=torch.int64),
        torch.empty((), dtype=torch.bool, device="cpu"),
    )


@torch.library.custom_op("tritonsparse::packed_conv2d_backward", mutates_args=())
def _backward_op(
    grad_y: Tensor,
    weight: Tensor,
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
    with torch.autocast(grad_y.device.type, enabled=False):
        rows = unpack_activation(bits, values, row_offsets, x_shape[2] * x_shape[3], backend=backend)
        grad_x, grad_weight, _ = torch.ops.aten.convolution_backward(
            grad_y, rows.view(x_shape), weight, None, stride, padding, dilation, False, [0, 0], groups,
            [need_x, need_weight, False],
        )  # fmt: skip
    # The vendor leaves what was not asked for undefined, and picks memory formats of its own.
    return (
        grad_x.contiguous() if need_x else grad_y.new_empty(0),
        grad_weight.contiguous() if need_weight else weight.new_empty(0),
    )


@_backward_op.register_fake
def _(
    grad_y: Tensor,
    weight: Tensor,
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
    return grad_y.new_empty(x_shape if need_x else 0), weight.new_empty(weight.shape if need_weight else 0)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, _, stride, padding, dilation, groups, backend, *_ = inputs
    y, fresh, bits, values, row_offsets, overflow = output
    ctx.save_for_backward(weight, bits, values, row_offsets)
    ctx.mark_non_differentiable(fresh, bits, values, row_offsets, overflow)
    ctx.how = (list(x.shape), stride, padding, dilation, groups, backend)
    ctx.bias_dtype, ctx.y_shape = None if bias is None else bias.dtype, y.shape
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_y: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
    if grad_y is None:
        grad_y = saved[0].new_zeros(ctx.y_shape)
    grad_x, grad_weight = torch.ops.tritonsparse.packed_conv2d_backward(
        grad_y.contiguous(), *saved, *ctx.how, need_x, need_weight
    )
    return (
        grad_x if need_x else None,
        grad_weight if need_weight else None,
        grad_y.sum((0, 2, 3)).to(ctx.bias_dtype) if need_bias else None,
        *[None] * 9,
    )


_forward_op.register_autograd(_backward, setup_context=_setup_context)


def packed_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: tuple[int, ...] = (1, 1),
    padding: tuple[int, ...] = (0, 0),
    dilation: tuple[int, ...] = (1, 1),
    groups: int = 1,
    density: float,
    cutoff: Tensor | None = None,
    scope: str = "batch",
    slack: float = 1.25,
    backend: str = "torch",
) -> tuple[Tensor, Tensor, Tensor]:
    """Y = conv2d(x, weight) + bias, with the weight's gradient from the largest elements of x.

    A host sync reads whether the values fit, unless slack · density >= 1 makes room for all of x.

    Args:
        x: `[B, C, H, W]`, the weight's dtype; any strides.
        weight: `[F, C/groups, kh, kw]`, Ŵ; it is saved as it is.
        bias: `[F]`, the weight's dtype, or None.
        stride, padding, dilation, groups: as `torch.nn.functional.conv2d`; padding in numbers.
        density: in (0, 1], the fraction of x that the weight's gradient sees.
        cutoff: T, `[1]`, or `[B C]` for one a plane, float32; None = the exact k-th magnitude of this x.
        scope: "batch", "sample" or "plane" (a sample's channel): what a fresh cut-off is the k-th magnitude of.
        slack: at least 1; room for slack · density of x. math.inf: for all of it.
        backend: "torch" (the reference, any device) or "triton" (a GPU, or Triton's interpreter).

    Returns:
        `y`: `[B, F, OH, OW]`.
        `cutoff`: T as used; the argument itself where it was given.
        `overflow`: 0-dim bool on the CPU: more was kept than slack allowed for, and has been saved all the same.

    Raises:
        ValueError: shapes or dtypes do not fit together, or an option is unknown or out of range.
        RuntimeError: `backend="triton"` where Triton cannot run, or a CUDA graph capture without room for all.
    """
    function = "packed_conv2d"
    check_density(function, density)
    if scope not in SCOPES:
        raise ValueError(f'{function}: expected scope "batch", "sample" or "plane", got {scope!r}; pass one')
    if not slack >= 1:
        raise ValueError(f"{function}: expected slack of at least 1, got {slack!r}; pass 1.25 for a quarter more room")
    expect(
        x.dim() == 4 and weight.dim() == 4 and x.dtype == weight.dtype and x.shape[1] == weight.shape[1] * groups,
        function,
        f"x to be {weight.dtype} [B, {weight.shape[1] * groups if weight.dim() == 4 else 'C'}, H, W]",
        x,
        "check the layer's input",
    )
    check_backend(function, x, backend)
    if cutoff is not None:
        rows = x.shape[0] * x.shape[1]
        expect(
            cutoff.shape in ((1,), (rows,)) and cutoff.dtype in (torch.float32, compute_dtype(x)),
            function,
            f"cutoff to be float32 [1] or [{rows}]",
            cutoff,
            'remember one for the batch, or leave it out with scope "sample" and "plane"',
        )
    y, fresh, _, _, _, overflow = _forward_op(
        x, weight, bias, cutoff, list(stride), list(padding), list(dilation), groups, backend,
        float(density), float(slack), scope,
    )  # fmt: skip
    return y, fresh if cutoff is None else cutoff, overflow
