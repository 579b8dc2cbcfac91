"""A fused sparse convolution: Y = conv(X, S(W)) + b, S(W) computed as W is loaded, and dW multiplied as it is written.

    forward    Y  = conv(X, S(W)) + b                [B, F, OH, OW]    gemm.py
    backward   dX = conv_transposed(dY, S(W))        [B, C, H, W]      gemm.py
               dW = m * G, and the threshold's gradient     G = conv_weight(dY, X), grad.py
               db = sum over b, o of dY              [F]

W is the dense master as a matrix [F, kh kw C/groups] and is only read; S(W) is never stored, so the op saves X and W
alone. By `backend`:

    "torch"    the references, on the dense library's convolution
    "triton"   the kernels; a 1 x 1 convolution at every pixel is the matrix product of fused/gemm.py, and its dW
               fused/grad.py's where that has a tile for every multiprocessor

With a topology the products visit its blocks alone. Unfused, a convolution multiplies by `weight/op.py`'s effective
weight. Images are channels-last; others are copied.
"""

# B images of C x H x W   F output channels   OH x OW pixels of the result

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._tiles import limits_of
from ..block.topology import Topology
from ..fused.gemm import fused_forward, fused_grad_input
from ..fused.grad import fused_grad_weight
from ..weight.view import View
from ._operands import Blocks, check_blocks, check_conv, image_like
from .gemm import conv_forward, conv_grad_input
from .geometry import Geometry
from .grad import conv_grad_weight

__all__ = ["conv_op_name", "fused_conv2d"]


def _rows(image: Tensor) -> Tensor:
    """Pixels by channels; a view where the image is channels-last."""
    return image.permute(0, 2, 3, 1).reshape(-1, image.shape[1])


def _image(rows: Tensor, like: Tensor) -> Tensor:
    """`_rows` undone, for as many pixels as another image has."""
    return rows.view(like.shape[0], *like.shape[2:], rows.shape[1]).permute(0, 3, 1, 2)


def _blocks(index: Tensor | None, block: list[int]) -> Blocks | None:
    return None if index is None else Blocks(index, (block[0], block[1]))


def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    threshold: Tensor | None,
    mask: Tensor | None,
    grad_mask: Tensor | None,
    alpha: Tensor | None,
    index: Tensor | None,
    input_index: Tensor | None,
    grad_index: Tensor | None,
    geometry: list[int],
    block: list[int],
    kind: str,
    backend: str,
) -> Tensor:
    # grad_mask, alpha and two of the indices are the backward's; they pass here because autograd saves op inputs only.
    view, shape = View(kind, threshold, mask), Geometry.of_numbers(geometry)
    if backend == "triton" and shape.is_product and index is None:
        return _image(fused_forward(_rows(x), weight, view, bias, backend=backend), x)
    return conv_forward(x, weight, view, bias, shape, _blocks(index, block), backend=backend)


_forward_op = torch.library.custom_op("tritonsparse::fused_conv2d", _forward, mutates_args=())


@_forward_op.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    threshold: Tensor | None,
    mask: Tensor | None,
    grad_mask: Tensor | None,
    alpha: Tensor | None,
    index: Tensor | None,
    input_index: Tensor | None,
    grad_index: Tensor | None,
    geometry: list[int],
    block: list[int],
    kind: str,
    backend: str,
) -> Tensor:
    return image_like(x, weight.shape[0], Geometry.of_numbers(geometry).output(x.shape[2:]))


@torch.library.custom_op("tritonsparse::fused_conv2d_backward", mutates_args=())
def _backward_op(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor,
    threshold: Tensor | None,
    mask: Tensor | None,
    grad_mask: Tensor | None,
    alpha: Tensor | None,
    index: Tensor | None,
    input_index: Tensor | None,
    grad_index: Tensor | None,
    geometry: list[int],
    block: list[int],
    kind: str,
    backend: str,
    need_x: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    shape, view = Geometry.of_numbers(geometry), View(kind, threshold, mask, grad_mask, alpha)
    is_product = backend == "triton" and shape.is_product and index is None
    grad_x, grad_weight, of_threshold = x.new_empty(0), weight.new_empty(0), None
    if need_x and is_product:
        grad_x = _image(fused_grad_input(_rows(grad_y), weight, view, backend=backend), x)
    elif need_x:
        image, visited = (x.shape[2], x.shape[3]), _blocks(input_index, block)
        grad_x = conv_grad_input(grad_y, weight, view, image, shape, visited, backend=backend)
    tiles = -(-weight.shape[0] // 128) * -(-weight.shape[1] // 128)
    if need_weight and is_product and tiles >= limits_of(x.device).multiprocessors:
        grad_weight, of_threshold = fused_grad_weight(_rows(grad_y), _rows(x), weight, view, backend=backend)
    elif need_weight:
        # With alpha pruned blocks get a gradient: those of the set B, or all. Of a 1 x 1 convolution without a tile for
        # every multiprocessor too: that kernel alone cuts the pixels into parts.
        due = _blocks(index if alpha is None else grad_index, block)
        grad_weight, of_threshold = conv_grad_weight(grad_y, x, weight, view, shape, due, backend=backend)
    # A schema has no optional results.
    return grad_x, grad_weight, weight.new_empty(0) if of_threshold is None else of_threshold


@_backward_op.register_fake
def _(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor,
    threshold: Tensor | None,
    mask: Tensor | None,
    grad_mask: Tensor | None,
    alpha: Tensor | None,
    index: Tensor | None,
    input_index: Tensor | None,
    grad_index: Tensor | None,
    geometry: list[int],
    block: list[int],
    kind: str,
    backend: str,
    need_x: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_x = image_like(x, x.shape[1], (x.shape[2], x.shape[3])) if need_x else x.new_empty(0)
    if need_weight and threshold is not None:
        return grad_x, weight.new_empty(weight.shape), threshold.new_empty(threshold.shape)
    return grad_x, weight.new_empty(weight.shape if need_weight else 0), weight.new_empty(0)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, threshold, mask, grad_mask, alpha, index, input_index, grad_index, *ctx.how = inputs
    ctx.save_for_backward(x, weight, threshold, mask, grad_mask, alpha, index, input_index, grad_index)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
    need_x, need_weight, need_bias, need_threshold = ctx.needs_input_grad[:4]
    grad_x, grad_weight, of_threshold = _backward_op(
        grad_y, *ctx.saved_tensors, *ctx.how, need_x, need_weight or need_threshold
    )
    return (
        grad_x if need_x else None,
        grad_weight if need_weight else None,
        grad_y.sum((0, 2, 3)).to(ctx.bias_dtype) if need_bias else None,
        # DDP waits for every parameter: a threshold gets a gradient, zeros included, never None.
        of_threshold if need_threshold else None,
        *[None] * 10,
    )


_forward_op.register_autograd(_backward, setup_context=_setup_context)


def fused_conv2d(
    x: Tensor,
    weight: Tensor,
    view: View,
    bias: Tensor | None,
    geometry: Geometry,
    topology: Topology | None = None,
    *,
    dtype: torch.dtype | None = None,
    backend: str = "torch",
) -> Tensor:
    """Y = conv2d(x, S(W)) + bias, differentiable in x, the weight, the bias and the view's threshold.

    Args:
        x: `[B, C, H, W]`, `dtype`; channels-last, or it is copied.
        weight: `[F, kh kw C/groups]`, float16/bfloat16/float32/float64, columns in the order (kh, kw, in): the master.
        view: of this matrix, kind "soft", "hard" or "mask", with a threshold for the matrix or a row.
        bias: `[F]`, `dtype`, or None.
        geometry: kernel, stride, padding, dilation and groups.
        topology: of the view's masks, made with `turn=geometry.input_flags`: the products skip pruned blocks. Kind
            "mask"; blocks are output by input channels, multiples of 16 that divide those of a group. The masks are
            trusted to be whole blocks. dW is on the kept blocks, with alpha and a grad_mask on those of both masks,
            with alpha alone dense. None = no block is skipped.
        dtype: of the products and of Y; the weight's by default.
        backend: "torch" (the references, any device) or "triton" (a GPU, or Triton's interpreter).

    Returns:
        `[B, F, OH, OW]`, `dtype`, channels-last; aliases nothing.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together, or the products do not take this view or topology.
        RuntimeError: `backend="triton"` where Triton cannot run.
    """
    function, dtype = "fused_conv2d", dtype or weight.dtype
    blocks = None if topology is None else Blocks(topology.index, topology.block)
    check_conv(function, weight, view, geometry, blocks, backend)
    if x.dtype != dtype:
        raise ValueError(
            f"{function}: expected x in {dtype} (the weight's dtype outside autocast), got {x.dtype}; "
            f"cast x or run under torch.autocast"
        )
    indices: tuple[Tensor | None, ...] = (None, None, None)
    sides: list[int] = []
    if topology is not None:
        _check_topology(function, weight, view, geometry, topology)
        grad_index = None if view.grad_mask is None else topology.grad_index
        indices, sides = (topology.index, topology.input_index, grad_index), list(topology.block)
    kind, threshold, mask, grad_mask, alpha = view
    y: Tensor = _forward_op(
        x, weight, bias, threshold, mask, grad_mask, alpha, *indices, geometry.numbers, sides, kind, backend
    )
    return y


def _check_topology(function: str, weight: Tensor, view: View, geometry: Geometry, topology: Topology) -> None:
    """Refuse a topology without an index that a gradient walks, or of another weight."""
    if topology.input_index is None or (view.grad_mask is not None and topology.grad_index is None):
        missing = "an input_index" if topology.input_index is None else "a grad_index"
        raise ValueError(
            f"{function}: expected a topology with {missing}, got one without; make it by Topology.of with the "
            f"view's masks and turn=geometry.input_flags"
        )
    of_inputs = Blocks(topology.input_index, topology.block)
    check_blocks(function, weight, of_inputs, of_inputs.input_grid(weight, geometry))
    for index in (topology.index, topology.grad_index):
        if index is not None:
            visited = Blocks(index, topology.block)
            check_blocks(function, weight, visited, visited.grid(weight))


def conv_op_name(op: str, geometry: Geometry) -> str:
    """What `plan.py` calls a convolution's product: "conv_forward 3x3/2x1", dilation and groups where they are not 1.

    Example:
        >>> from tritonsparse.kernels.conv.conv2d import conv_op_name
        >>> from tritonsparse.kernels.conv.geometry import Geometry
        >>> conv_op_name("conv_forward", Geometry((3, 3), stride=(2, 2), groups=4))
        'conv_forward 3x3/2x2 groups 4'
    """
    (kh, kw), (sh, sw), (dh, dw) = geometry.kernel, geometry.stride, geometry.dilation
    dilated = f" dilation {dh}x{dw}" if (dh, dw) != (1, 1) else ""
    grouped = f" groups {geometry.groups}" if geometry.groups > 1 else ""
    return f"{op} {kh}x{kw}/{sh}x{sw}{dilated}{grouped}"
