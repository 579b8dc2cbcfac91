"""Y = X W^T and dX = dY W for a weight in blocks, where pruned blocks are neither read nor multiplied.

    forward       Y[M, N]  = act(sum over kept blocks j of block row i: X[:, j] W[i, j]^T + b)    for every i
    grad input    dX[M, K] = sum over kept blocks i of block column j: dY[:, i] W[i, j]           for every j

Both are one kernel: dX walks the columns of the index (`block_topology.py`) as the forward walks the rows. The weight
stays the dense matrix that the optimizer knows, or is packed, block after block.

A work item is one tile of the result: part of a block row and TILE_M rows of x. Items go longest row first, so that
programs end together whoever takes them, and a group of tiles of x stays in the L2 while it passes through all rows.
The index of the next block is carried in a loop variable: loaded where it is used it would halve the copies of a tile
that Triton's pipeline holds in flight (`tests/kernels/compile_kernels.py` holds it to as many as stages). W is the
right operand, of which Hopper's matrix instruction takes any multiple of 8 columns: narrow blocks fit.
"""

# M rows of x (tokens)   N results   K the reduction; a line is a block row (forward) or a block column (dX)

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._block_tiles import BlockTiles, block_tiles
from ._block_weight import check_block_weight, dense_weight
from ._fused_operands import check_rows
from ._operands import expect
from ._tiles import grouped_tile, input_precision, is_aligned, limits_of, split_columns
from ._triton import INTERPRETED, TensorDescriptor, require, tl, triton
from .block_topology import grid_of
from .masked_gemm import ACTIVATIONS, SUM_TILE, _activate, _check_out_dtype, _sum_splits_kernel

__all__ = ["block_grad_input", "block_linear"]


@triton.jit(do_not_specialize=["ROWS", "COLUMNS"])
def _block_gemm_kernel(  # type: ignore[no-untyped-def]
    y,
    x,
    weight,
    bias,
    index,
    M,
    N,
    K,
    ROWS,
    COLUMNS,
    stride_xm,
    stride_xk,
    stride_wn,
    stride_wk,
    ALONG_COLUMNS: tl.constexpr,
    PACKED: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    N_FIRST: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    ACTIVATION: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    SIDE_N: tl.constexpr,
    SIDE_K: tl.constexpr,
    SPLITS: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_K: tl.constexpr,
    SUBTILES: tl.constexpr,
    GROUP: tl.constexpr,
):
    TILES_N: tl.constexpr = SIDE_N // TILE_N
    TILES_K: tl.constexpr = SIDE_K // TILE_K
    # Sections of the index, in the order of `block_topology.Sections`.
    entries = tl.cast(ROWS, tl.int64) * COLUMNS + 1
    p_start, p_order = index, index + (ROWS + 1) + entries + (COLUMNS + 1) + 2 * entries
    p_block, lines = p_start + ROWS + 1, ROWS
    p_position = p_block
    if ALONG_COLUMNS:
        p_start, p_order = index + (ROWS + 1) + entries, p_order + ROWS
        p_block, lines = p_start + COLUMNS + 1, COLUMNS
        p_position = p_block + entries

    tiles_m, tiles_n = tl.cdiv(M, TILE_M), lines * TILES_N
    for item in range(tl.program_id(0), tiles_m * tiles_n * SPLITS, tl.num_programs(0)):
        i_split = item % SPLITS
        i_m, i_n = grouped_tile(item // SPLITS, tiles_m, tiles_n, GROUP)
        line = tl.load(p_order + i_n // TILES_N)
        # Within the line's blocks; of the result.
        o_side = i_n % TILES_N * TILE_N
        i_n = line * SIDE_N + o_side
        o_m = tl.cast(i_m, tl.int64) * TILE_M + tl.arange(0, TILE_M)
        o_n = i_n.to(tl.int64) + tl.arange(0, TILE_N)
        o_k = tl.arange(0, TILE_K)
        in_m, in_n = o_m < M, o_n < N

        first = tl.load(p_start + line)
        steps = (tl.load(p_start + line + 1) - first) * TILES_K
        share = tl.cdiv(steps, SPLITS)
        begin = i_split * share
        end = tl.minimum(begin + share, steps)
        if not DESCRIPTORS:
            # Rows beyond the last are read as the last, and not stored.
            p_x = x + tl.minimum(o_m, M - 1)[:, None] * stride_xm + o_k.to(tl.int64)[None, :] * stride_xk
            p_w = weight + o_k.to(tl.int64)[:, None] * stride_wk
            p_w += tl.arange(0, TILE_N).to(tl.int64)[None, :] * stride_wn

        # [TILE_M, TILE_N]
        product = tl.zeros((TILE_M, TILE_N), dtype=tl.float32)
        block = tl.load(p_block + first + begin // TILES_K)
        position = tl.load(p_position + first + begin // TILES_K) if PACKED and ALONG_COLUMNS else block
        for step in range(begin, end):
            i_side = step % TILES_K * TILE_K
            i_k = block * SIDE_K + i_side
            w_n, w_k = i_n, i_k
            if PACKED and ALONG_COLUMNS:
                w_n, w_k = o_side, position * SIDE_K + i_side
            elif PACKED:
                w_n, w_k = (first + step // TILES_K) * SIDE_N + o_side, i_side
            ahead = first + (step + 1) // TILES_K
            block = tl.load(p_block + ahead)
            if PACKED and ALONG_COLUMNS:
                position = tl.load(p_position + ahead)

            if DESCRIPTORS:
                x_tile = x.load([i_m * TILE_M, i_k])
                w = weight.load([w_n, w_k]).T if N_FIRST else weight.load([w_k, w_n])
            else:
                p_w_tile = p_w + (tl.cast(w_n, tl.int64) * stride_wn + tl.cast(w_k, tl.int64) * stride_wk)
                p_x_tile = p_x + i_k.to(tl.int64) * stride_xk
                in_k = i_k + o_k < K
                if EVEN_K:
                    x_tile = tl.load(p_x_tile)
                    w = tl.load(p_w_tile) if EVEN_N else tl.load(p_w_tile, mask=in_n[None, :], other=0.0)
                else:
                    x_tile = tl.load(p_x_tile, mask=in_k[None, :], other=0.0)
                    w = tl.load(p_w_tile, mask=in_k[:, None] & in_n[None, :], other=0.0)
            w = w.to(x_tile.dtype)
            if UPCAST:
                x_tile, w = x_tile.to(tl.float32), w.to(tl.float32)
            product = tl.dot(x_tile, w, product, input_precision=INPUT_PRECISION)

        parts = split_columns(product, SUBTILES)
        for i_part in tl.static_range(SUBTILES):
            o_n = i_n.to(tl.int64) + i_part * (TILE_N // SUBTILES) + tl.arange(0, TILE_N // SUBTILES)
            in_n = o_n < N
            part = parts[i_part]
            if SPLITS == 1:
                if bias is not None:
                    part += tl.load(bias + o_n, mask=in_n, other=0.0).to(tl.float32)[None, :]
                part = _activate(part, ACTIVATION)
            # A split product leaves its parts [SPLITS, M, N] in fp32 for _sum_splits_kernel.
            p_y = y + (tl.cast(i_split, tl.int64) * M + o_m)[:, None] * N + o_n[None, :]
            tl.store(p_y, part, mask=in_m[:, None] & in_n[None, :])


def block_linear_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    index: Tensor,
    activation: str | None,
    out_dtype: torch.dtype,
    **layout: Any,
) -> Tensor:
    """The definition of `block_linear`: the vendor's product with `dense_weight`."""
    w = dense_weight(weight, index, **layout).to(x.dtype)
    with torch.autocast(x.device.type, enabled=False):
        y = F.linear(x, w, bias)
    return ACTIVATIONS[activation](y).to(out_dtype)


def block_grad_input_reference(
    grad_y: Tensor, weight: Tensor, index: Tensor, out_dtype: torch.dtype, **layout: Any
) -> Tensor:
    """The definition of `block_grad_input`."""
    with torch.autocast(grad_y.device.type, enabled=False):
        return (grad_y @ dense_weight(weight, index, **layout).to(grad_y.dtype)).to(out_dtype)


def _launch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    index: Tensor,
    block: tuple[int, int],
    shape: tuple[int, int],
    along_columns: bool,
    transposed: bool,
    packed: bool,
    activation: str | None,
    out_dtype: torch.dtype,
    tiles: BlockTiles | None,
) -> Tensor:
    m, (rows, columns) = x.shape[0], grid_of("block_linear", shape, block)
    # The matrix that holds the weight's values, and the kernel's N and K in it: a packed one is blocks atop each other.
    matrix = weight.reshape(-1, block[1]) if packed else weight.t() if transposed else weight
    size_n, size_k = matrix.shape
    (n, k), (side_n, side_k), (stride_wn, stride_wk) = shape, block, matrix.stride()
    if along_columns:
        n, k, side_n, side_k, stride_wn, stride_wk = k, n, side_k, side_n, stride_wk, stride_wn
        size_n, size_k = size_k, size_n
    y = x.new_empty((m, n), dtype=out_dtype)
    if not y.numel():
        return y
    precision, limits = input_precision(x.dtype), limits_of(x.device)
    even_n, even_k = n % side_n == 0, k % side_k == 0
    if tiles is None:
        # Rows of x that lie apart, and what stands beyond the edge of a packed block, are for pointers.
        aligned = is_aligned(x, matrix) and x.stride(1) == 1 and (not packed or (even_n and even_k))
        tiles = block_tiles(
            m, n, k, block=(side_n, side_k), weight_bytes=weight.element_size(), x_bytes=x.element_size(),
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
    parts = x.new_empty((tiles.splits, m, n), dtype=torch.float32) if split else y
    with torch.cuda.device_of(x):
        _block_gemm_kernel[(programs,)](
            parts, p_x, p_weight, bias, index, m, n, k, rows, columns, *x.stride(), stride_wn, stride_wk,
            ALONG_COLUMNS=along_columns, PACKED=packed, DESCRIPTORS=tiles.descriptors, N_FIRST=n_first,
            EVEN_N=even_n, EVEN_K=even_k, ACTIVATION=activation, INPUT_PRECISION=precision, UPCAST=INTERPRETED,
            SIDE_N=side_n, SIDE_K=side_k, SPLITS=tiles.splits, TILE_M=tiles.m, TILE_N=tiles.n, TILE_K=tiles.k,
            SUBTILES=tiles.subtiles, GROUP=tiles.group, num_warps=tiles.num_warps, num_stages=tiles.num_stages,
        )  # fmt: skip
        if split:
            _sum_splits_kernel[(triton.cdiv(m * n, SUM_TILE),)](
                y, parts, bias, m * n, n, ACTIVATION=activation, SPLITS=tiles.splits, SUM_TILE=SUM_TILE, num_warps=4
            )
    return y


def block_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    index: Tensor,
    *,
    block: tuple[int, int],
    shape: tuple[int, int] | None = None,
    transposed: bool = False,
    activation: str | None = None,
    out_dtype: torch.dtype | None = None,
    packed: bool = False,
    backend: str = "torch",
    tiles: BlockTiles | None = None,
) -> Tensor:
    """Y = act(X W^T + bias) over the kept blocks of W.

    Each tile of the weight is rounded to the dtype of x, products are summed in float32 (float64 where all is float64)
    with bias and activation before the one rounding to `out_dtype`. float32 operands are multiplied in full float32
    unless torch allows tf32 (`_tiles.input_precision`). Pruned blocks are not read: what they hold cannot matter. Where
    no block of a row is kept, Y is act(bias). Deterministic, capturable in a CUDA graph; launches depend on shapes
    only, so the index may be rewritten between replays.

    Args:
        x: `[M, K]`, float16/bfloat16/float32 (float64 with the torch back end), any strides.
        weight: `[N, K]` (`[K, N]` when `transposed`), any of these dtypes and any strides; or, with `packed`, values
            `[at least the number kept, r, c]`, contiguous, the kept blocks row by row of blocks.
        bias: `[N]`, dtype of x, or None.
        index: int32, which blocks are kept, from `block_topology.build_indices`.
        block: r and c, rows and columns of a block of W as [N, K]; multiples of 16 for the Triton back end. Blocks at
            the far edges may be smaller.
        shape: N and K, for packed values.
        transposed: `weight` is stored `[K, N]`, as transformers' Conv1D does.
        activation: None, "relu", "gelu" (exact) or "silu".
        out_dtype: dtype of Y; that of x if None.
        packed: `weight` holds the values of kept blocks only.
        backend: "torch" (the reference, any device) or "triton" (a GPU, or the interpreter).
        tiles: configuration of the Triton kernel; computed from the shapes if None.

    Returns:
        `[M, N]`, contiguous, newly allocated.

    Raises:
        ValueError: an operand is of the wrong shape, dtype, device or layout, or an option is unknown.
        RuntimeError: backend "triton" without triton, or off the GPU.

    Example:
        >>> import torch
        >>> from tritonsparse.kernels.block_gemm import block_linear
        >>> from tritonsparse.kernels.block_topology import build_index_reference
        >>> index = build_index_reference(torch.tensor([[True, False], [False, False]]))  # 1 x 2 blocks of [2, 4]
        >>> weight = torch.tensor([[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0]])
        >>> block_linear(torch.ones(1, 4), weight, torch.tensor([0.5, 0.5]), index, block=(1, 2))
        tensor([[3.5000, 0.5000]])
    """
    function = "block_linear"
    out_dtype = x.dtype if out_dtype is None else out_dtype
    n, k = check_block_weight(function, weight, index, block, shape, transposed, packed, backend)
    check_rows(function, "x", x, k, weight, backend)
    _check_out_dtype(function, out_dtype, backend)
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"{function}: expected activation to be one of {list(ACTIVATIONS)}, got {activation!r}; "
            f"pass None and apply it to the result"
        )
    if bias is not None:
        expect(
            bias.shape == (n,) and bias.dtype == x.dtype and bias.device == x.device,
            function,
            f"bias to be {x.dtype} [{n}] on {x.device}",
            bias,
            "cast the bias with x",
        )
    if backend == "torch":
        layout = {"block": block, "shape": shape, "transposed": transposed, "packed": packed}
        return block_linear_reference(x, weight, bias, index, activation, out_dtype, **layout)
    require(function, weight)
    return _launch(x, weight, bias, index, block, (n, k), False, transposed, packed, activation, out_dtype, tiles)


def block_grad_input(
    grad_y: Tensor,
    weight: Tensor,
    index: Tensor,
    *,
    block: tuple[int, int],
    shape: tuple[int, int] | None = None,
    transposed: bool = False,
    out_dtype: torch.dtype | None = None,
    packed: bool = False,
    backend: str = "torch",
    tiles: BlockTiles | None = None,
) -> Tensor:
    """dX = dY W over the kept blocks of W; rounding, repeatability and what is read as in `block_linear`.

    Args:
        grad_y: `[M, N]`, float16/bfloat16/float32 (float64 with the torch back end), any strides.
        weight, index, block, shape, transposed, packed: as given to `block_linear`.
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
        >>> from tritonsparse.kernels.block_gemm import block_grad_input
        >>> from tritonsparse.kernels.block_topology import build_index_reference
        >>> index = build_index_reference(torch.tensor([[True, False]]))  # 1 x 2 blocks of [1, 4]
        >>> block_grad_input(torch.tensor([[2.0]]), torch.tensor([[1.0, 2.0, 3.0, 4.0]]), index, block=(1, 2))
        tensor([[2., 4., 0., 0.]])
    """
    function = "block_grad_input"
    out_dtype = grad_y.dtype if out_dtype is None else out_dtype
    n, k = check_block_weight(function, weight, index, block, shape, transposed, packed, backend)
    check_rows(function, "grad_y", grad_y, n, weight, backend)
    _check_out_dtype(function, out_dtype, backend)
    if backend == "torch":
        layout = {"block": block, "shape": shape, "transposed": transposed, "packed": packed}
        return block_grad_input_reference(grad_y, weight, index, out_dtype, **layout)
    require(function, weight)
    return _launch(grad_y, weight, None, index, block, (n, k), True, transposed, packed, None, out_dtype, tiles)
