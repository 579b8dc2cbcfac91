"""Y = conv(X, S(W)) and dX = conv_transposed(dY, S(W)) as matrix products whose rows are gathered, channels-last.

    forward     Y[b, o, f]  = b[f] + sum over t, c of X[b, o s - p + t d, c] S(W)[f, (t, c)]
    grad input  dX[b, h, c] =        sum over t, f of dY[b, o, f] S(W)[f, (t, c)]       where  o s = h + p - t d

with o, s, p, t, d and h pairs along the two axes of the image, t a kernel position. Both are the product of
`fused/gemm.py`, S(W) computed as W is loaded and taken from registers, over a reduction in which every tile stays
inside one kernel position: the tile of X is then a row of addresses, moved by one number a position. A strided dX is
computed a phase at a time (`geometry.py`), so that no position is multiplied that contributes nothing.

With blocks the reduction visits those that their index lists: a block column is a kernel position and a block of
channels, and dX walks the index of the flags turned over (`Geometry.input_flags`).
"""

# F output channels   C input channels   T kernel positions

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_input

from .._operands import expect
from .._tiles import GROUP, input_precision, limits_of
from .._triton import INTERPRETED, require, tl, triton
from ..block.topology import sections
from ..fused.gemm import SUM_TILE, _sum_splits_kernel
from ..weight.forward import strides
from ..weight.reference import effective_weight_reference
from ..weight.view import View
from ._gemm_kernel import _conv_gemm_kernel
from ._operands import (
    Blocks,
    as_image,
    channels_last,
    check_blocks,
    check_conv,
    check_image,
    image_like,
    padded,
)
from ._tiles import ConvShape, conv_tiles
from .geometry import Geometry, Walks

__all__ = ["conv_forward", "conv_grad_input"]


def conv_forward_reference(x: Tensor, weight: Tensor, view: View, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """The definition of `conv_forward`: `effective_weight_reference`, then the dense library convolution."""
    w_hat = as_image(effective_weight_reference(weight, view, x.dtype), geometry)
    with torch.autocast(x.device.type, enabled=False):
        y = F.conv2d(padded(x, geometry), w_hat, bias, geometry.stride, 0, geometry.dilation, geometry.groups)
    return image_like(y, y.shape[1], geometry.output(x.shape[2:])).copy_(y)


def conv_grad_input_reference(
    grad_y: Tensor, weight: Tensor, view: View, image: tuple[int, int], geometry: Geometry
) -> Tensor:
    """The definition of `conv_grad_input`: `effective_weight_reference`, then the dense transposed convolution."""
    w_hat = as_image(effective_weight_reference(weight, view, grad_y.dtype), geometry)
    channels = geometry.groups * w_hat.shape[1]
    top, left, bottom, right = geometry.padding
    # Of the padded image, whose edges are then dropped.
    shape = (grad_y.shape[0], channels, image[0] + top + bottom, image[1] + left + right)
    with torch.autocast(grad_y.device.type, enabled=False):
        grad_x = conv2d_input(shape, w_hat, grad_y, geometry.stride, 0, geometry.dilation, geometry.groups)
    inner = grad_x[:, :, top : top + image[0], left : left + image[1]]
    return image_like(grad_y, channels, image).copy_(inner)


def _launch(
    y: Tensor,
    x: Tensor,
    weight: Tensor,
    view: View,
    bias: Tensor | None,
    walks: Walks,
    blocks: Blocks | None,
) -> Tensor:
    """Writes the walked results of x into y, which is channels-last; of `walks.exchanged` y is dX, x is dY."""
    if not y.numel():
        return y
    geometry, threshold = walks.geometry, view.threshold
    # Blocks are kept whole: their index says all that the mask does.
    mask = view.mask if blocks is None else None
    # In the kernel's letters: dX reduces over what the forward results in.
    n, k = weight.shape[0] // geometry.groups, weight.shape[1] // geometry.taps
    (stride_wn, stride_wk), (stride_mn, stride_mk) = strides(weight), strides(mask)
    stride_wg, stride_wt, stride_mg, stride_mt = n * stride_wn, k * stride_wk, n * stride_mn, k * stride_mk
    listed: tuple[Tensor | None, ...] = (None, None, None)
    block = None
    if blocks is not None:
        grid = blocks.input_grid(weight, geometry) if walks.exchanged else blocks.grid(weight)
        lists = sections(blocks.index, *grid)
        listed, block = (lists.row_start, lists.row_block, lists.row_order), blocks.sides
    if walks.exchanged:
        n, k, stride_wn, stride_wk, stride_mn, stride_mk = k, n, stride_wk, stride_wn, stride_mk, stride_mn
        block = None if block is None else (block[1], block[0])
    x = channels_last(x)
    precision = input_precision(x.dtype)
    batch, _, height, width = y.shape
    per_phase = batch * -(-height // walks.down[0].every) * -(-width // walks.along[0].every)
    taps = max(walk.taps for walk in walks.down) * max(walk.taps for walk in walks.along)
    tiles = conv_tiles(
        ConvShape(per_phase, n, k, taps, geometry.groups), weight_bytes=weight.element_size(),
        x_bytes=x.element_size(), masked=mask is not None, precision=precision, limits=limits_of(x.device),
        block=block,
    )  # fmt: skip
    # One threshold for the matrix is read at stride 0, along whichever axis.
    per_row = threshold is not None and threshold.numel() > 1
    # Half of what 32 bits reach: what lies beyond an edge is computed, too, before it is masked.
    reach = max(
        sum(size * step for size, step in zip(each.shape, each.stride(), strict=True)) for each in (x, y, weight)
    )
    into = y
    if tiles.splits > 1:
        parts = y.new_empty((tiles.splits, batch, height, width, y.shape[1]), dtype=torch.float32)
        into = parts[0].permute(0, 3, 1, 2)
    with torch.cuda.device_of(x):
        for down, along in ((down, along) for down in walks.down for along in walks.along):
            part = into[:, :, down.first :: down.every, along.first :: along.every]
            m = batch * part.shape[2] * part.shape[3]
            grid_size = triton.cdiv(m, tiles.m) * triton.cdiv(n, tiles.n) * geometry.groups * tiles.splits
            if not grid_size:
                continue
            _conv_gemm_kernel[(grid_size,)](
                part, x, weight, threshold, mask, bias, *listed, m, n, k, geometry.groups,
                part.shape[2], part.shape[3], x.shape[2], x.shape[3],
                part.stride(0), part.stride(2), part.stride(3), x.stride(0), x.stride(2), x.stride(3),
                stride_wg, stride_wn, stride_wk, stride_wt,
                threshold.stride(0) if threshold is not None and per_row else 0,
                stride_mg, stride_mn, stride_mk, stride_mt,
                down.mul, down.offset, down.step, along.mul, along.offset, along.step,
                down.taps * along.taps, max(along.taps, 1),
                down.tap * geometry.kernel[1] + along.tap, down.tap_step * geometry.kernel[1], along.tap_step,
                y.numel(), SOFT=view.kind == "soft", THRESHOLD_ALONG_K=walks.exchanged and per_row,
                DIVISOR_H=down.divisor, DIVISOR_W=along.divisor, INPUT_PRECISION=precision, UPCAST=INTERPRETED,
                BLOCK_N=None if block is None else block[0], BLOCK_K=None if block is None else block[1],
                FLAT=tiles.flat, SPLITS=tiles.splits, TILE_M=tiles.m, TILE_N=tiles.n, TILE_K=tiles.k, GROUP=GROUP,
                OFFSET=tl.int32 if reach < 2**30 else tl.int64, SMALL=max(geometry.kernel) <= 16,
                num_warps=tiles.num_warps, num_stages=tiles.num_stages,
            )  # fmt: skip
        if tiles.splits > 1:
            _sum_splits_kernel[(triton.cdiv(y.numel(), SUM_TILE),)](
                y, parts, bias, y.numel(), y.shape[1], SPLITS=tiles.splits, SUM_TILE=SUM_TILE, num_warps=4
            )
    return y


def conv_forward(
    x: Tensor,
    weight: Tensor,
    view: View,
    bias: Tensor | None,
    geometry: Geometry,
    blocks: Blocks | None = None,
    *,
    backend: str = "torch",
) -> Tensor:
    """Y = conv2d(X, S(W)) + bias, S(W) computed as W is loaded.

    Rounding, precision of float32 operands and repeatability are `fused_forward`'s. Capturable in a CUDA graph.

    Args:
        x: `[B, C, H, W]`, float16/bfloat16/float32 (float64 with the torch back end); channels-last, or it is copied.
        weight: `[F, kh kw C/groups]`, columns in the order (kh, kw, in), any of these dtypes, any strides: the master.
        view: of this weight, kind "soft", "hard" or "mask" with a threshold for the matrix or a row, or a mask.
        bias: `[F]`, dtype of x, or None.
        geometry: kernel, stride, padding, dilation and groups.
        blocks: of the kept blocks, on which the view's mask is True and outside of which it is False: which is trusted,
            and the others are neither read nor multiplied. Their sides, output by input channels, are multiples of 16
            that divide those of a group. None = no block is skipped.
        backend: "torch" (the reference, any device; reads the mask, not the blocks) or "triton" (a GPU, or the
            interpreter).

    Returns:
        `[B, F, OH, OW]`, dtype of x, channels-last, newly allocated.

    Raises:
        ValueError: an operand is missing, superfluous, or of the wrong shape, dtype or device.
        RuntimeError: backend "triton" without triton, or off the GPU.

    Example:
        >>> import torch
        >>> from tritonsparse.kernels.conv.gemm import conv_forward
        >>> from tritonsparse.kernels.conv.geometry import Geometry
        >>> from tritonsparse.kernels.weight.view import View
        >>> x, weight = torch.tensor([[[[1.0, 2.0, 4.0]]]]), torch.tensor([[0.75, -0.25]])
        >>> conv_forward(x, weight, View("hard", torch.tensor([0.5])), None, Geometry((1, 2)))
        tensor([[[[0.7500, 1.5000]]]])
    """
    function = "conv_forward"
    check_conv(function, weight, view, geometry, blocks, backend)
    check_image(function, "x", x, geometry.groups * weight.shape[1] // geometry.taps, weight, backend)
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
    if blocks is not None:
        check_blocks(function, weight, blocks, blocks.grid(weight))
    if backend == "torch":
        return conv_forward_reference(x, weight, view, bias, geometry)
    require(function, weight)
    y = image_like(x, weight.shape[0], geometry.output(x.shape[2:]))
    return _launch(y, x, weight, view, bias, Walks.forward(geometry), blocks)


def conv_grad_input(
    grad_y: Tensor,
    weight: Tensor,
    view: View,
    image: tuple[int, int],
    geometry: Geometry,
    blocks: Blocks | None = None,
    *,
    backend: str = "torch",
) -> Tensor:
    """dX of `conv_forward`, S(W) computed as W is loaded; rounding and repeatability as there.

    Args:
        grad_y: `[B, F, OH, OW]`, float16/bfloat16/float32 (float64 with the torch back end); channels-last, or it is
            copied.
        weight, view, geometry: as given to `conv_forward`.
        image: (H, W) of x.
        blocks: as in `conv_forward`, but the index is that of `Geometry.input_flags` of their flags.
        backend: "torch" (the reference, any device) or "triton" (a GPU, or the interpreter).

    Returns:
        `[B, C, H, W]`, dtype of grad_y, channels-last, newly allocated.

    Raises:
        ValueError: an operand is missing, superfluous, or of the wrong shape, dtype or device.
        RuntimeError: backend "triton" without triton, or off the GPU.

    Example:
        >>> import torch
        >>> from tritonsparse.kernels.conv.gemm import conv_grad_input
        >>> from tritonsparse.kernels.conv.geometry import Geometry
        >>> from tritonsparse.kernels.weight.view import View
        >>> grad_y, weight = torch.tensor([[[[1.0, 2.0]]]]), torch.tensor([[0.75, -1.0]])
        >>> conv_grad_input(grad_y, weight, View("hard", torch.tensor([0.5])), (1, 3), Geometry((1, 2)))
        tensor([[[[ 0.7500,  0.5000, -2.0000]]]])
    """
    function = "conv_grad_input"
    check_conv(function, weight, view, geometry, blocks, backend)
    check_image(function, "grad_y", grad_y, weight.shape[0], weight, backend)
    expect(
        tuple(grad_y.shape[2:]) == geometry.output(image),
        function,
        f"grad_y to be {list(geometry.output(image))} pixels, of images of {list(image)}",
        grad_y,
        "pass the height and width of x",
    )
    if blocks is not None:
        check_blocks(function, weight, blocks, blocks.input_grid(weight, geometry))
    if backend == "torch":
        return conv_grad_input_reference(grad_y, weight, view, image, geometry)
    require(function, weight)
    x = image_like(grad_y, geometry.groups * weight.shape[1] // geometry.taps, image)
    return _launch(x, grad_y, weight, view, None, Walks.grad_input(geometry, blocks is None), blocks)
