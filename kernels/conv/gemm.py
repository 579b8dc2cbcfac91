"""Y = conv(X, S(W)) and dX = conv_transposed(dY, S(W)) as matrix products whose rows are gathered, channels-last.

    forward     Y[b, o, f]  = b[f] + sum over t, c of X[b, o s - p + t d, c] S(W)[f, (t, c)]
    grad input  dX[b, h, c] =        sum over t, f of dY[b, o, f] S(W)[f, (t, c)]       where o s = h + p - t d

with o, s, p, t, d and h pairs along the two axes of the image, t a kernel position. Both are the product of
`fused/gemm.py`, S(W) computed as W is loaded and taken from registers, over a reduction in which every tile stays
inside one kernel position: the tile of X is then a row of addresses, moved by one number a position. A strided dX is
computed a phase at a time (`_tiles.py`), so that no position is multiplied that contributes nothing.

With an index (`block/topology.py`) the reduction visits the listed blocks alone: a block column is a kernel position
and a block of channels, and dX walks the index of the flags turned over (`_conv_operands.input_flags`).
"""

# F output channels   C input channels   T kernel positions

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_input

from .._operands import FLOATS, check_triton_dtype, expect
from .._triton import require
from ..block.topology import check_index
from ._operands import (
    Block,
    as_image,
    blocks_of,
    check_conv_view,
    check_image,
    conv_view,
    image_like,
    input_blocks,
    input_flags,
    kept_blocks,
)
from ._product import launch_conv
from ._tiles import ConvTiles, Geometry, forward_walk, phases

__all__ = ["conv_forward", "conv_grad_input", "padded"]


def padded(x: Tensor, geometry: Geometry) -> Tensor:
    """x with the convolution's zeros around it."""
    top, left, bottom, right = geometry.padding
    return F.pad(x, (left, right, top, bottom)) if any(geometry.padding) else x


def conv_forward_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    geometry: Geometry,
    threshold: Tensor | None,
    mask: Tensor | None,
    flags: Tensor | None,
    block: Block | None,
    kind: str,
    out_dtype: torch.dtype,
) -> Tensor:
    """The definition of `conv_forward`: `conv_view`, then the vendor's convolution."""
    w_hat = as_image(conv_view(weight, threshold, mask, flags, block, kind, x.dtype), geometry)
    with torch.autocast(x.device.type, enabled=False):
        y = F.conv2d(
            padded(x, geometry), w_hat, bias,
            stride=geometry.stride, dilation=geometry.dilation, groups=geometry.groups,
        )  # fmt: skip
    return image_like(x, y.shape[0], y.shape[1], (y.shape[2], y.shape[3]), out_dtype).copy_(y)


def conv_grad_input_reference(
    grad_y: Tensor,
    weight: Tensor,
    image: tuple[int, int],
    geometry: Geometry,
    threshold: Tensor | None,
    mask: Tensor | None,
    flags: Tensor | None,
    block: Block | None,
    kind: str,
    out_dtype: torch.dtype,
) -> Tensor:
    """The definition of `conv_grad_input`: `conv_view`, then the vendor's transposed convolution."""
    w_hat = as_image(conv_view(weight, threshold, mask, flags, block, kind, grad_y.dtype), geometry)
    channels = geometry.groups * w_hat.shape[1]
    top, left, bottom, right = geometry.padding
    # Of the padded image, whose edges are then dropped.
    shape = (grad_y.shape[0], channels, image[0] + top + bottom, image[1] + left + right)
    with torch.autocast(grad_y.device.type, enabled=False):
        grad_x = conv2d_input(
            shape, w_hat, grad_y, stride=geometry.stride, dilation=geometry.dilation, groups=geometry.groups
        )
    inner = grad_x[:, :, top : top + image[0], left : left + image[1]]
    return image_like(grad_y, grad_y.shape[0], channels, image, out_dtype).copy_(inner)


def _check_out_dtype(function: str, out_dtype: torch.dtype, backend: str) -> None:
    if out_dtype not in FLOATS:
        raise ValueError(f"{function}: expected a floating-point out_dtype, got {out_dtype}; omit it for that of x")
    check_triton_dtype(function, "out_dtype", out_dtype, backend)


def conv_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    geometry: Geometry,
    kind: str,
    threshold: Tensor | None = None,
    mask: Tensor | None = None,
    index: Tensor | None = None,
    block: Block | None = None,
    out_dtype: torch.dtype | None = None,
    backend: str = "torch",
    tiles: ConvTiles | None = None,
) -> Tensor:
    """Y = conv2d(X, S(W)) + bias, the view computed inside the product.

    Rounding, precision of float32 operands and repeatability are `fused_linear`'s. Capturable in a CUDA graph.

    Args:
        x: `[B, C, H, W]`, float16/bfloat16/float32 (float64 with the torch back end); channels-last, or it is copied.
        weight: `[F, kh kw C/groups]`, columns in the order (kh, kw, in), any of these dtypes, any strides: the master.
        bias: `[F]`, dtype of x, or None.
        geometry: kernel, stride, padding, dilation and groups.
        kind: "soft", "hard" or "mask" (`weight/forward.py`).
        threshold: `[1]` or `[F]`, float32; for kinds "soft" and "hard".
        mask: for kind "mask": bool of the weight's shape, True = kept; with an index also None = all listed blocks.
        index: `block/topology.py`'s of the blocks that are kept, F/r by kh kw C/(groups c) of them; S(W) is zero, and
            nothing is read or multiplied, in the others. None = none are skipped.
        block: (r, c) of the index: output by input channels, multiples of 16 that divide those of a group.
        out_dtype: dtype of Y; that of x if None.
        backend: "torch" (the reference, any device) or "triton" (a GPU, or the interpreter).
        tiles: configuration of the Triton kernel; computed from the shapes if None.

    Returns:
        `[B, F, OH, OW]`, channels-last, newly allocated.

    Raises:
        ValueError: an operand is missing, superfluous, or of the wrong shape, dtype or device.
        RuntimeError: backend "triton" without triton, or off the GPU.

    Example:
        >>> import torch
        >>> from tritonsparse.kernels.conv._tiles import Geometry
        >>> from tritonsparse.kernels.conv.gemm import conv_forward
        >>> x, weight = torch.tensor([[[[1.0, 2.0, 4.0]]]]), torch.tensor([[0.75, -0.25]])
        >>> conv_forward(x, weight, geometry=Geometry((1, 2)), kind="hard", threshold=torch.tensor([0.5]))
        tensor([[[[0.7500, 1.5000]]]])
    """
    out_dtype = x.dtype if out_dtype is None else out_dtype
    function = "conv_forward"
    check_conv_view(function, weight, threshold, {"mask": mask}, index, block, geometry, kind, backend)
    check_image(function, "x", x, geometry.groups * weight.shape[1] // geometry.taps, weight, backend)
    _check_out_dtype(function, out_dtype, backend)
    if min(geometry.output(x.shape[2:])) < 1:
        raise ValueError(
            f"{function}: expected x with an image of at least the dilated kernel, got {list(x.shape)}; add padding"
        )
    if bias is not None:
        expect(
            bias.shape == (weight.shape[0],) and bias.dtype == x.dtype and bias.device == x.device,
            function,
            f"bias to be {x.dtype} [{weight.shape[0]}] on {x.device}",
            bias,
            "cast the bias with x",
        )
    if index is not None and block is not None:
        check_index(function, index, *blocks_of(weight, block))
    if backend == "torch":
        flags = None if index is None or block is None else kept_blocks(index, *blocks_of(weight, block))
        return conv_forward_reference(x, weight, bias, geometry, threshold, mask, flags, block, kind, out_dtype)
    require(function, weight)
    down, along = (
        forward_walk(geometry.kernel[axis], geometry.stride[axis], geometry.padding[axis], geometry.dilation[axis])
        for axis in (0, 1)
    )
    y = image_like(x, x.shape[0], weight.shape[0], geometry.output(x.shape[2:]), out_dtype)
    walks = ([down], [along])
    return launch_conv(y, x, weight, bias, walks, geometry, threshold, mask, index, block, kind, False, tiles)


def conv_grad_input(
    grad_y: Tensor,
    weight: Tensor,
    image: tuple[int, int],
    *,
    geometry: Geometry,
    kind: str,
    threshold: Tensor | None = None,
    mask: Tensor | None = None,
    index: Tensor | None = None,
    block: Block | None = None,
    out_dtype: torch.dtype | None = None,
    backend: str = "torch",
    tiles: ConvTiles | None = None,
) -> Tensor:
    """dX of `conv_forward`, the view computed inside the product; rounding and repeatability as there.

    Args:
        grad_y: `[B, F, OH, OW]`, float16/bfloat16/float32 (float64 with the torch back end); channels-last, or it is
            copied.
        weight, geometry, kind, threshold, mask, block: as given to `conv_forward`.
        image: (H, W) of x.
        index: that of `_conv_operands.input_flags` of the flags whose index the forward was given.
        out_dtype: dtype of dX; that of grad_y if None.
        backend: "torch" (the reference, any device) or "triton" (a GPU, or the interpreter).
        tiles: configuration of the Triton kernel; computed from the shapes if None. The kernel's n are input channels,
            its k output channels.

    Returns:
        `[B, C, H, W]`, channels-last, newly allocated.

    Raises:
        ValueError: an operand is missing, superfluous, or of the wrong shape, dtype or device.
        RuntimeError: backend "triton" without triton, or off the GPU.

    Example:
        >>> import torch
        >>> from tritonsparse.kernels.conv._tiles import Geometry
        >>> from tritonsparse.kernels.conv.gemm import conv_grad_input
        >>> grad_y, weight = torch.tensor([[[[1.0, 2.0]]]]), torch.tensor([[0.75, -1.0]])
        >>> view = {"kind": "hard", "threshold": torch.tensor([0.5])}
        >>> conv_grad_input(grad_y, weight, (1, 3), geometry=Geometry((1, 2)), **view)
        tensor([[[[ 0.7500,  0.5000, -2.0000]]]])
    """
    out_dtype = grad_y.dtype if out_dtype is None else out_dtype
    function = "conv_grad_input"
    check_conv_view(function, weight, threshold, {"mask": mask}, index, block, geometry, kind, backend)
    check_image(function, "grad_y", grad_y, weight.shape[0], weight, backend)
    _check_out_dtype(function, out_dtype, backend)
    expect(
        tuple(grad_y.shape[2:]) == geometry.output(image),
        function,
        f"grad_y to be {list(geometry.output(image))} pixels, of images of {list(image)}",
        grad_y,
        "pass the height and width of x",
    )
    if index is not None and block is not None:
        check_index(function, index, *input_blocks(weight, block, geometry))
    if backend == "torch":
        flags = None
        if index is not None and block is not None:
            flags = input_flags(kept_blocks(index, *input_blocks(weight, block, geometry)), geometry)
        return conv_grad_input_reference(
            grad_y, weight, image, geometry, threshold, mask, flags, block, kind, out_dtype
        )
    require(function, weight)
    down, along = (
        phases(
            geometry.kernel[axis], geometry.stride[axis], geometry.padding[axis], geometry.dilation[axis], index is None
        )
        for axis in (0, 1)
    )
    x = image_like(grad_y, grad_y.shape[0], geometry.groups * weight.shape[1] // geometry.taps, image, out_dtype)
    walks = (down, along)
    return launch_conv(x, grad_y, weight, None, walks, geometry, threshold, mask, index, block, kind, True, tiles)
