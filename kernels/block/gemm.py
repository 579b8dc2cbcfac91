"""Y = X W^T and dX = dY W for a weight in blocks, where pruned blocks are neither read nor multiplied.

    forward       Y[M, N]  = sum over kept blocks j of block row i: X[:, j] W[i, j]^T + b    for every i
    grad input    dX[M, K] = sum over kept blocks i of block column j: dY[:, i] W[i, j]      for every j

Both are one kernel (`_gemm_kernel.py`): dX walks the columns of the index (`topology.py`) as the forward walks the
rows. The weight stays the dense matrix that the optimizer knows, or is packed, block after block.
"""

# M rows of x (tokens)   N results   K the reduction; a line is a block row (forward) or a block column (dX)

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._operands import check_out_dtype
from .._tiles import input_precision, is_aligned, limits_of
from .._triton import INTERPRETED, TensorDescriptor, require, triton
from ..fused._operands import check_rows
from ..fused.gemm import SUM_TILE
from ._gemm_kernel import _block_gemm_kernel, _sum_line_parts_kernel
from ._gemm_tiles import BlockTiles, block_tiles
from ._index import sections
from ._layout import BlockLayout, check_bias, check_weight
from .storage import dense_weight

__all__ = ["BlockLayout", "block_forward", "block_grad_input"]


def block_forward_reference(
    x: Tensor, weight: Tensor, layout: BlockLayout, bias: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    """The definition of `block_forward`: the dense library product with `dense_weight`."""
    with torch.autocast(x.device.type, enabled=False):
        return F.linear(x, dense_weight(weight, layout).to(x.dtype), bias).to(out_dtype)


def block_grad_input_reference(grad_y: Tensor, weight: Tensor, layout: BlockLayout, out_dtype: torch.dtype) -> Tensor:
    """The definition of `block_grad_input`."""
    with torch.autocast(grad_y.device.type, enabled=False):
        return (grad_y @ dense_weight(weight, layout).to(grad_y.dtype)).to(out_dtype)


def _launch(
    x: Tensor,
    weight: Tensor,
    layout: BlockLayout,
    bias: Tensor | None,
    along_columns: bool,
    out_dtype: torch.dtype,
    tiles: BlockTiles | None,
) -> Tensor:
    index, block, (n, k), packed = layout.index, layout.block, layout.shape, layout.count is not None
    m, (rows, columns) = x.shape[0], layout.grid
    # The matrix that holds the weight's values, and the kernel's N and K in it: a packed one is blocks atop each other.
    matrix = weight.reshape(-1, block[1]) if packed else weight.t() if layout.transposed else weight
    size_n, size_k = matrix.shape
    (side_n, side_k), (stride_wn, stride_wk) = block, matrix.stride()
    if along_columns:
        n, k, side_n, side_k, stride_wn, stride_wk = k, n, side_k, side_n, stride_wk, stride_wn
        size_n, size_k = size_k, size_n
    y = x.new_empty((m, n), dtype=out_dtype)
    if not y.numel():
        return y
    if not weight.numel():
        # Packed values of no block at all: no descriptor describes them, and nothing is to be read.
        return y.zero_() if bias is None else y.copy_(bias)
    precision, limits = input_precision(x.dtype), limits_of(x.device)
    even_n, even_k = n % side_n == 0, k % side_k == 0
    if tiles is None:
        # Rows of x that lie apart, and what stands beyond the edge of a packed block, are for pointers.
        aligned = is_aligned(x, matrix) and x.stride(1) == 1 and (not packed or (even_n and even_k))
        tiles = block_tiles(
            (m, n, k), block=(side_n, side_k), weight_bytes=weight.element_size(), x_bytes=x.element_size(),
            precision=precision, aligned=aligned, limits=limits,
        )  # fmt: skip
    n_first = stride_wk == 1
    p_x: Any = x
    p_weight: Any = weight
    if tiles.descriptors:
        p_x = TensorDescriptor(x, [m, k], [x.stride(0), 1], [tiles.m, tiles.k])
        p_weight = (
            TensorDescriptor(weight, [size_n, size_k], [stride_wn, 1], [tiles.n, tiles.k])
            if n_first
            else TensorDescriptor(weight, [size_k, size_n], [stride_wk, 1], [tiles.k, tiles.n])
        )
    items = triton.cdiv(m, tiles.m) * (columns if along_columns else rows) * (side_n // tiles.n) * tiles.splits
    programs = min(items, tiles.persistent * limits.multiprocessors) if tiles.persistent else items
    split = tiles.splits > 1
    y_parts = x.new_empty((tiles.splits, m, n), dtype=torch.float32) if split else None
    with torch.cuda.device_of(x):
        _block_gemm_kernel[(programs,)](
            y, y_parts, p_x, p_weight, bias, index, m, n, k, rows, columns, *x.stride(), stride_wn, stride_wk,
            ALONG_COLUMNS=along_columns, PACKED=packed, DESCRIPTORS=tiles.descriptors, N_FIRST=n_first,
            EVEN_N=even_n, EVEN_K=even_k, INPUT_PRECISION=precision, UPCAST=INTERPRETED,
            SIDE_N=side_n, SIDE_K=side_k, SPLITS=tiles.splits, TILE_M=tiles.m, TILE_N=tiles.n, TILE_K=tiles.k,
            SUBTILES=tiles.subtiles, GROUP=tiles.group, num_warps=tiles.num_warps, num_stages=tiles.num_stages,
        )  # fmt: skip
        if split:
            parts = sections(index, rows, columns)
            p_start, lines = (parts.column_start, columns) if along_columns else (parts.row_start, rows)
            _sum_line_parts_kernel[(triton.cdiv(m * n, SUM_TILE),)](
                y, y_parts, bias, p_start, m * n, n, lines, triton.cdiv(m, tiles.m) * (side_n // tiles.n), programs,
                SIDE_N=side_n, TILES_K=side_k // tiles.k, SPLITS=tiles.splits,
                SUM_TILE=SUM_TILE, num_warps=4,
            )  # fmt: skip
    return y


def block_forward(
    x: Tensor,
    weight: Tensor,
    layout: BlockLayout,
    bias: Tensor | None = None,
    *,
    out_dtype: torch.dtype | None = None,
    backend: str = "torch",
    tiles: BlockTiles | None = None,
) -> Tensor:
    """Y = X W^T + bias over the kept blocks of W.

    Each tile of the weight is rounded to the dtype of x, products are summed in float32 (float64 where all is float64)
    with the bias before the one rounding to `out_dtype`. float32 operands are multiplied in full float32 unless torch
    allows tf32 (`_tiles.input_precision`). Pruned blocks are not read: what they hold cannot matter. Where no block of
    a row is kept, Y is the bias. Deterministic, capturable in a CUDA graph; launches depend on shapes only, so the
    index may be rewritten between replays.

    Args:
        x: `[M, K]`, float16/bfloat16/float32 (float64 with the torch back end), any strides.
        weight: as `layout` says, any of these dtypes; a matrix of any strides, packed blocks contiguous.
        layout: which blocks are kept, and how the weight is stored.
        bias: `[N]`, dtype of x, or None.
        out_dtype: dtype of Y; that of x if None.
        backend: "torch" (the reference, any device) or "triton" (a GPU, or the interpreter).
        tiles: configuration of the Triton kernel; computed from the shapes if None.

    Returns:
        `[M, N]`, contiguous, newly allocated.

    Raises:
        ValueError: an operand is of the wrong shape, dtype, device or layout, or an option is unknown.
        RuntimeError: backend "triton" without triton, or off the GPU.

    Example:
        >>> import torch
        >>> from tritonsparse.kernels.block.gemm import BlockLayout, block_forward
        >>> from tritonsparse.kernels.block.topology import build_index_reference
        >>> index = build_index_reference(torch.tensor([[True, False], [False, False]]))
        >>> weight = torch.tensor([[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0]])
        >>> block_forward(torch.ones(1, 4), weight, BlockLayout(index, (1, 2), (2, 4)), torch.tensor([0.5, 0.5]))
        tensor([[3.5000, 0.5000]])
    """
    out_dtype = x.dtype if out_dtype is None else out_dtype
    check_weight("block_forward", weight, layout, backend)
    n, k = layout.shape
    check_rows("block_forward", "x", x, k, weight, backend)
    check_out_dtype("block_forward", "out_dtype", out_dtype, backend)
    check_bias("block_forward", bias, n, x)
    if backend == "torch":
        return block_forward_reference(x, weight, layout, bias, out_dtype)
    require("block_forward", weight)
    return _launch(x, weight, layout, bias, False, out_dtype, tiles)


def block_grad_input(
    grad_y: Tensor,
    weight: Tensor,
    layout: BlockLayout,
    *,
    out_dtype: torch.dtype | None = None,
    backend: str = "torch",
    tiles: BlockTiles | None = None,
) -> Tensor:
    """dX = dY W over the kept blocks of W; rounding, repeatability and what is read as in `block_forward`.

    Args:
        grad_y: `[M, N]`, float16/bfloat16/float32 (float64 with the torch back end), any strides.
        weight, layout: as given to `block_forward`.
        out_dtype: dtype of dX; that of grad_y if None.
        backend: "torch" (the reference, any device) or "triton" (a GPU, or the interpreter).
        tiles: configuration of the Triton kernel; computed from the shapes if None. The kernel's n is dX's K, its k
            dY's N.

    Returns:
        `[M, K]`, contiguous, newly allocated.

    Raises:
        ValueError: an operand is of the wrong shape, dtype, device or layout, or an option is unknown.
        RuntimeError: backend "triton" without triton, or off the GPU.

    Example:
        >>> import torch
        >>> from tritonsparse.kernels.block.gemm import BlockLayout, block_grad_input
        >>> from tritonsparse.kernels.block.topology import build_index_reference
        >>> layout = BlockLayout(build_index_reference(torch.tensor([[True, False]])), (1, 2), (1, 4))
        >>> block_grad_input(torch.tensor([[2.0]]), torch.tensor([[1.0, 2.0, 3.0, 4.0]]), layout)
        tensor([[2., 4., 0., 0.]])
    """
    out_dtype = grad_y.dtype if out_dtype is None else out_dtype
    check_weight("block_grad_input", weight, layout, backend)
    check_rows("block_grad_input", "grad_y", grad_y, layout.shape[0], weight, backend)
    check_out_dtype("block_grad_input", "out_dtype", out_dtype, backend)
    if backend == "torch":
        return block_grad_input_reference(grad_y, weight, layout, out_dtype)
    require("block_grad_input", weight)
    return _launch(grad_y, weight, layout, None, True, out_dtype, tiles)
