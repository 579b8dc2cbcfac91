"""dW = dY^T X on the blocks of an index only: everywhere else dW is an exact zero that nobody computed.

    G[N, K]  = dY[M, N]^T X[M, K]                          on the index's blocks of r x c
    dW       = m * G           m: 1 on kept blocks, alpha on the index's others, 0 outside the index
    inner    = sum over each block of G * W                a block's gradient along its own weights

An SDD: sparse result, dense operands. Called by the backward of block-sparse layers, with the index that
`topology.py` made for the forward or with a larger one (Top-KAST's B, arXiv:2106.03517). The kernel is in
`_grad_kernel.py`.
"""

# M rows of dY and X (tokens, the reduction)   N, K rows and columns of W   R, C its block rows and columns, of r x c

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .._operands import FLOATS, check_triton_dtype, expect
from .._triton import require
from ..fused._operands import check_rows
from ._grad_kernel import launch_block_grad
from ._grad_tiles import BlockGradTiles
from .topology import check_index, grid_of, sections

__all__ = ["block_grad_weight"]


def _as_blocks(matrix: Tensor, grid: tuple[int, int], block: tuple[int, int]) -> Tensor:
    """A matrix as [R C, r, c], zeros beyond its edges."""
    (rows, columns), (r, c) = grid, block
    padded = F.pad(matrix, (0, columns * c - matrix.shape[1], 0, rows * r - matrix.shape[0]))
    return padded.reshape(rows, r, columns, c).transpose(1, 2).reshape(rows * columns, r, c)


def block_grad_weight_reference(
    grad_y: Tensor,
    x: Tensor,
    index: Tensor,
    block: tuple[int, int],
    kept: Tensor | None,
    alpha: Tensor | None,
    transposed: bool,
    capacity: int | None,
    out_dtype: torch.dtype,
    weight: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """The definition of `block_grad_weight`: the whole product in float32 (or float64), of which blocks are chosen."""
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    with torch.autocast(x.device.type, enabled=False):
        dense = grad_y.to(compute).t() @ x.to(compute)
    n, k = dense.shape
    rows, columns = grid = grid_of("block_grad_weight", (n, k), block)
    lists = sections(index, *grid)
    # Entry p of the list of kept blocks lies in the row whose stretch it falls into.
    entries = torch.arange(rows * columns, device=x.device)
    listed = entries < lists.row_start[-1]
    row = torch.searchsorted(lists.row_start[1:].long().contiguous(), entries, right=True).clamp(max=max(rows - 1, 0))
    place = torch.where(listed, row * columns + lists.row_block[: entries.numel()], rows * columns)
    present = torch.zeros(rows * columns + 1, dtype=torch.bool, device=x.device).scatter_(0, place, True)[:-1]

    gradients = _as_blocks(dense, grid, block)
    multiplier = present.to(compute)
    if kept is not None:
        on_pruned = 0.0 if alpha is None else alpha.to(compute).reshape(())
        multiplier = multiplier * torch.where(kept.flatten(), 1.0, on_pruned).to(compute)
    multiplier = multiplier[:, None, None]
    result = torch.where(multiplier == 0, 0.0, multiplier * gradients).to(out_dtype)

    inner = None
    if weight is not None:
        if capacity is None:
            w = _as_blocks(weight.t() if transposed else weight, grid, block)
        else:
            # A pruned block has no place among the packed ones; any will do.
            position = present.cumsum(0) - 1
            present = present & (position < capacity)
            w = weight[position.clamp(0, capacity - 1)] if capacity else torch.zeros_like(gradients)
        sums = torch.where(present[:, None, None], gradients * w.to(compute), 0.0).sum(dim=(1, 2))
        inner = sums.to(torch.float64 if compute == torch.float64 else torch.float32).view(rows, columns)

    if capacity is not None:
        packed = x.new_zeros((capacity, *block), dtype=out_dtype)
        stored = min(capacity, rows * columns)
        chosen = torch.where(listed, place, 0)[:stored]
        packed[:stored] = torch.where(listed[:stored, None, None], result[chosen], 0.0)
        return packed, inner
    r, c = block
    matrix = result.view(rows, columns, r, c).transpose(1, 2).reshape(rows * r, columns * c)[:n, :k]
    return (matrix.t() if transposed else matrix).contiguous(), inner


def _check(
    grad_y: Tensor,
    x: Tensor,
    index: Tensor,
    block: tuple[int, int],
    shape: tuple[int, int],
    kept: Tensor | None,
    alpha: Tensor | None,
    transposed: bool,
    packed: bool,
    capacity: int | None,
    out_dtype: torch.dtype,
    weight: Tensor | None,
    backend: str,
) -> None:
    """Refuse what does not fit together; before anything is computed."""
    function = "block_grad_weight"
    if backend not in ("torch", "triton"):
        raise ValueError(f'{function}: expected backend "torch" or "triton", got {backend!r}; pass either')
    if packed and transposed:
        raise ValueError(
            f"{function}: expected packed or transposed, got both; packed blocks are those of W [N, K], "
            f"pass transposed=False"
        )
    if not packed and capacity is not None:
        raise ValueError(f"{function}: expected capacity with packed=True only, got {capacity}; leave it out")
    grid = grid_of(function, shape, block)
    if backend == "triton" and any(side % 16 for side in block):
        raise ValueError(
            f'{function}: expected block sides that are multiples of 16 for backend="triton", got {tuple(block)}; '
            f'choose such a block or pass backend="torch"'
        )
    check_index(function, index, *grid)
    n, k = shape
    check_rows(function, "grad_y", grad_y, n, index, backend)
    check_rows(function, "x", x, k, index, backend)
    expect(
        grad_y.shape[0] == x.shape[0] and grad_y.dtype == x.dtype,
        function,
        f"grad_y to have the rows and the dtype of x, {x.shape[0]} and {x.dtype}",
        grad_y,
        "pass both as the forward's product left them",
    )
    if out_dtype not in FLOATS:
        raise ValueError(f"{function}: expected a floating-point out_dtype, got {out_dtype}; pass torch.float32")
    check_triton_dtype(function, "out_dtype", out_dtype, backend)
    if kept is not None:
        expect(
            kept.shape == grid and kept.dtype == torch.bool and kept.device == index.device,
            function,
            f"kept to be bool {list(grid)} on {index.device}",
            kept,
            "pass one flag a block, True where kept",
        )
    if alpha is not None:
        expect(
            alpha.shape in ((), (1,)) and alpha.dtype in (torch.float32, x.dtype) and alpha.device == index.device,
            function,
            f"alpha to be one float32 value on {index.device}",
            alpha,
            "keep the schedule's value in a float32 tensor beside the weight",
        )
    if weight is not None:
        wanted = (capacity, *block) if packed else (k, n) if transposed else (n, k)
        expect(
            weight.shape == wanted
            and weight.dtype in FLOATS
            and weight.device == index.device
            and (not packed or weight.is_contiguous()),
            function,
            f"weight to be a floating-point {list(wanted)} on {index.device}{', contiguous' if packed else ''}",
            weight,
            "pass the weight stored as its gradient is",
        )
        check_triton_dtype(function, "weight", weight.dtype, backend)


def block_grad_weight(
    grad_y: Tensor,
    x: Tensor,
    index: Tensor,
    *,
    block: tuple[int, int],
    shape: tuple[int, int],
    kept: Tensor | None = None,
    alpha: Tensor | None = None,
    transposed: bool = False,
    packed: bool = False,
    capacity: int | None = None,
    out_dtype: torch.dtype = torch.float32,
    weight: Tensor | None = None,
    backend: str = "torch",
    tiles: BlockGradTiles | None = None,
) -> tuple[Tensor, Tensor | None]:
    """dW = m * (dY^T X) on the blocks of an index, exact zeros elsewhere, and each block's sum of G * W.

    Sums are in float32 (float64 where all is float64) and in a fixed order: repeated calls agree bit for bit. float32
    operands are multiplied in full float32 unless torch allows tf32 (`_tiles.input_precision`). Where m = 0 the result
    is a selected 0: a NaN or infinity of the product there does not reach dW. Neither the launch nor the memory depends
    on the topology: nothing waits for the host, capturable in a CUDA graph.

    Args:
        grad_y: `[M, N]`, float16/bfloat16/float32 (float64 with the torch back end), any strides.
        x: `[M, K]`, dtype of grad_y, any strides.
        index: int32, `topology.py`'s, of the blocks whose gradient is wanted: the kept ones, or more.
        block: r and c, rows (outputs) and columns (inputs) of a block of W `[N, K]`; with the Triton back end multiples
            of 16. Blocks at the far edges may be smaller.
        shape: N and K.
        kept: `[R, C]`, bool, the blocks of the index that are kept; None = all of them.
        alpha: 0-dim or `[1]`, float32, the multiplier on the others; None = 0. Read on the device.
        transposed: dW, and `weight`, are stored `[K, N]`, as transformers' Conv1D does.
        packed: dW, and `weight`, are `[capacity, r, c]`: the blocks of the index in row-major order.
        capacity: places of a packed dW, at least as many as the index has blocks, which is not read: what does not fit
            is left out. None = that of a packed `weight`, else R C.
        out_dtype: dtype of dW.
        weight: `[N, K]` (`[K, N]` if transposed) of any strides, or packed and contiguous; any of these dtypes. Given,
            `inner` is computed.
        backend: "torch" (the reference, any device) or "triton" (a GPU, or the interpreter).
        tiles: configuration of the Triton kernel; computed from the shapes if None.

    Returns:
        `grad_weight`: `[N, K]`, `[K, N]` or `[capacity, r, c]`, contiguous, newly allocated; zeros outside the index
            and beyond its number of blocks.
        `inner`: `[R, C]`, float32 (float64 where all is float64): the sum of G * W over each block of the index, G
            before the multiplier; 0 on other blocks. None without a weight.

    Raises:
        ValueError: an operand has the wrong shape, dtype or device, arguments exclude each other, or the back end is
            Triton and a block's side is no multiple of 16.
        RuntimeError: backend "triton" without triton, or off the GPU.

    Example:
        >>> import torch
        >>> from tritonsparse.kernels.block.grad import block_grad_weight
        >>> from tritonsparse.kernels.block.topology import build_index_reference
        >>> index = build_index_reference(torch.tensor([[True, False]]))
        >>> x, grad_y = torch.tensor([[1.0, 2.0, 4.0, 8.0]]), torch.tensor([[3.0]])
        >>> block_grad_weight(grad_y, x, index, block=(1, 2), shape=(1, 4), weight=torch.ones(1, 4))
        (tensor([[3., 6., 0., 0.]]), tensor([[9., 0.]]))
    """
    if packed and capacity is None:
        rows, columns = grid_of("block_grad_weight", shape, block)
        capacity = rows * columns if weight is None else weight.shape[0]
    _check(grad_y, x, index, block, shape, kept, alpha, transposed, packed, capacity, out_dtype, weight, backend)
    if backend == "torch":
        return block_grad_weight_reference(
            grad_y, x, index, block, kept, alpha, transposed, capacity, out_dtype, weight
        )
    require("block_grad_weight", x)
    return launch_block_grad(grad_y, x, index, block, kept, alpha, transposed, capacity, out_dtype, weight, tiles)
