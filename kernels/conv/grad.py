"""dW of a convolution = m * G in one product of gathered rows: the multiplier and the threshold's gradient end it.

    G[f, (t, c)] = sum over b, o of dY[b, o, f] X[b, o s - p + t d, c]
    dW           = m * G           m: 1 kept, alpha pruned, 0 outside B and in blocks that are not visited
    ds           = -sigma'(s) sum(sign(W) m G)             soft only (AutoSparse, eqs. 6-8, arXiv:2304.06941)

with o, s, p, t and d as in `gemm.py`. The definition is `weight/reference.py`'s on the dense library's G; here G stays
in float32 from the product to the multiplier. The kernels are in `_grad_kernel.py`.
"""

# F output channels   C input channels   T kernel positions

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.grad import conv2d_weight

from .._operands import expect
from .._tiles import GROUP, input_precision, limits_of
from .._triton import INTERPRETED, require, triton
from ..block.topology import sections
from ..weight.forward import strides
from ..weight.reference import threshold_backward_reference
from ..weight.view import View
from ._grad_kernel import _conv_grad_kernel, _finish_splits_kernel
from ._operands import Blocks, channels_last, check_blocks, check_conv, check_image, padded
from ._tiles import ConvShape, conv_grad_tiles
from .geometry import Geometry

__all__ = ["conv_grad_weight"]

# Sides of a tile of the second kernel, at most.
SUM_ROWS, SUM_COLUMNS = 16, 64


def conv_grad_weight_reference(
    grad_y: Tensor, x: Tensor, weight: Tensor, view: View, geometry: Geometry
) -> tuple[Tensor, Tensor | None]:
    """The definition of `conv_grad_weight`: the dense library's G, then the multiplier."""
    shape = (weight.shape[0], weight.shape[1] // geometry.taps, *geometry.kernel)
    how = (geometry.stride, 0, geometry.dilation, geometry.groups)
    with torch.autocast(x.device.type, enabled=False):
        image = conv2d_weight(padded(x, geometry), shape, grad_y, *how)
    return threshold_backward_reference(image.permute(0, 2, 3, 1).flatten(1), weight, view)


def _launch(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor,
    view: View,
    geometry: Geometry,
    blocks: Blocks | None,
) -> tuple[Tensor, Tensor | None]:
    kind, threshold, mask, grad_mask, alpha = view
    rows, columns = weight.shape
    n, k, taps = rows // geometry.groups, columns // geometry.taps, geometry.taps
    grad_y, x = channels_last(grad_y), channels_last(x)
    m = grad_y.shape[0] * grad_y.shape[2] * grad_y.shape[3]
    precision = input_precision(x.dtype)
    listed: tuple[Tensor | None, ...] = (None, None, None)
    sides: tuple[int | None, int | None] = (None, None)
    if blocks is not None:
        lists = sections(blocks.index, *blocks.grid(weight))
        listed, sides = (lists.row_start, lists.row_block, lists.row_order), blocks.sides
        if alpha is None:
            # Nothing is due but in listed blocks, whole; with alpha the mask tells kept from pruned.
            mask = grad_mask = None
    tiles = conv_grad_tiles(
        ConvShape(m, n, k, taps, geometry.groups), operand_bytes=x.element_size(), precision=precision,
        limits=limits_of(x.device), block=None if blocks is None else blocks.sides,
    )  # fmt: skip
    # Of blocks that are not listed nobody writes anything.
    allocate = weight.new_empty if blocks is None else weight.new_zeros
    grad_weight = allocate((rows, columns))
    split = tiles.splits > 1
    tile_n, tile_k = (min(tiles.n, SUM_ROWS), min(tiles.k, SUM_COLUMNS)) if split else (tiles.n, tiles.k)
    along_k = triton.cdiv(columns, tile_k) if tiles.flat else taps * triton.cdiv(k, tile_k)
    row_sums = weight.new_empty((along_k, rows), dtype=torch.float32) if kind == "soft" else None
    parts = x.new_empty((tiles.splits, rows, columns), dtype=torch.float32) if split else None
    operands = (weight, threshold, mask, grad_mask, alpha, *listed)
    steps = (
        *strides(weight), 0 if threshold is None else threshold.expand(rows).stride(0), *strides(mask),
        *strides(grad_mask),
    )  # fmt: skip
    constants = {"SOFT": kind == "soft", "BLOCK_N": sides[0], "BLOCK_K": sides[1], "FLAT": tiles.flat, "GROUP": GROUP}
    if weight.numel():
        tiles_n = geometry.groups * triton.cdiv(n, tiles.n)
        tiles_k = triton.cdiv(columns, tiles.k) if tiles.flat else taps * triton.cdiv(k, tiles.k)
        with torch.cuda.device_of(weight):
            _conv_grad_kernel[(tiles_n * tiles_k * tiles.splits,)](
                grad_weight, row_sums, parts, grad_y, x, *operands, m, n, k, geometry.groups, taps, geometry.kernel[1],
                tiles.splits, grad_y.shape[2], grad_y.shape[3], x.shape[2], x.shape[3],
                grad_y.stride(0), grad_y.stride(2), grad_y.stride(3), x.stride(0), x.stride(2), x.stride(3), *steps,
                geometry.stride[0], -geometry.padding[0], geometry.dilation[0],
                geometry.stride[1], -geometry.padding[1], geometry.dilation[1],
                **constants, INPUT_PRECISION=precision, UPCAST=INTERPRETED, SUBTILES=tiles.subtiles,
                TILE_M=tiles.m, TILE_N=tiles.n, TILE_K=tiles.k, num_warps=tiles.num_warps, num_stages=tiles.num_stages,
            )  # fmt: skip
            if split:
                _finish_splits_kernel[(geometry.groups * triton.cdiv(n, tile_n) * along_k,)](
                    grad_weight, row_sums, parts, *operands, n, k, geometry.groups, taps, tiles.splits, *steps,
                    **constants, TILE_N=tile_n, TILE_K=tile_k, num_warps=4,
                )  # fmt: skip
    if threshold is None:
        return grad_weight, None
    if row_sums is None:
        return grad_weight, torch.zeros_like(threshold)
    return grad_weight, row_sums.sum_to_size(1, threshold.numel()).flatten()


def conv_grad_weight(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor,
    view: View,
    geometry: Geometry,
    blocks: Blocks | None = None,
    *,
    backend: str = "torch",
) -> tuple[Tensor, Tensor | None]:
    """dW = m * G and ds, the multiplier applied as the product leaves its registers, or as its parts are summed.

    Where m = 0 the result is a selected 0: a NaN or infinity of the product there reaches neither dW nor ds. Sums
    are in float32 (float64 where all is float64) and in a fixed order: repeated calls agree bit for bit. float32
    operands are multiplied in full float32 unless torch allows tf32. Capturable in a CUDA graph.

    Args:
        grad_y: `[B, F, OH, OW]`, float16/bfloat16/float32 (float64 with the torch back end); channels-last, or it is
            copied.
        x: `[B, C, H, W]`, dtype of grad_y; likewise.
        weight: `[F, kh kw C/groups]`, columns in the order (kh, kw, in), any of these dtypes, any strides: the master.
        view: of this weight, kind "soft", "hard" or "mask" with a threshold for the matrix or a row, or a mask.
        geometry: kernel, stride, padding, dilation and groups.
        blocks: outside of which m is 0 by the view's masks: the kept ones, or with alpha those of the set B as well.
            That is trusted, and the others are not computed. None = all are.
        backend: "torch" (the reference, any device; reads the masks, not the blocks) or "triton" (a GPU, or the
            interpreter).

    Returns:
        `grad_weight`: the weight's shape and dtype, contiguous, newly allocated; exact zeros outside the blocks.
        `grad_threshold`: shape and dtype of the threshold, zeros for "hard"; None for "mask".

    Raises:
        ValueError: an operand is missing, superfluous, or of the wrong shape, dtype or device.
        RuntimeError: backend "triton" without triton, or off the GPU.

    Example:
        >>> import torch
        >>> from tritonsparse.kernels.conv.geometry import Geometry
        >>> from tritonsparse.kernels.conv.grad import conv_grad_weight
        >>> from tritonsparse.kernels.weight.view import View
        >>> grad_y, x = torch.tensor([[[[1.0, 2.0]]]]), torch.tensor([[[[1.0, 2.0, 4.0]]]])
        >>> weight, view = torch.tensor([[0.75, -0.25]]), View("hard", torch.tensor([0.5]), alpha=torch.tensor(0.5))
        >>> conv_grad_weight(grad_y, x, weight, view, Geometry((1, 2)))
        (tensor([[5., 5.]]), tensor([0.]))
    """
    function = "conv_grad_weight"
    check_conv(function, weight, view, geometry, blocks, backend)
    check_image(function, "grad_y", grad_y, weight.shape[0], weight, backend)
    check_image(function, "x", x, geometry.groups * weight.shape[1] // geometry.taps, weight, backend)
    expect(
        grad_y.shape[0] == x.shape[0]
        and tuple(grad_y.shape[2:]) == geometry.output(x.shape[2:])
        and grad_y.dtype == x.dtype,
        function,
        f"grad_y to be {x.dtype} of {x.shape[0]} images of {list(geometry.output(x.shape[2:]))}",
        grad_y,
        "pass both as the forward had them",
    )
    if blocks is not None:
        check_blocks(function, weight, blocks, blocks.grid(weight))
    if backend == "torch":
        return conv_grad_weight_reference(grad_y, x, weight, view, geometry)
    require(function, weight)
    return _launch(grad_y, x, weight, view, geometry, blocks)
