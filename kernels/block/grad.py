"""dW = dY^T X on the blocks of an index only: everywhere else dW is an exact zero that nobody computed.

    G[N, K]  = dY[M, N]^T X[M, K]                          on the index's blocks of r x c
    dW       = m * G           m: 1 on kept blocks, alpha on the index's others, 0 outside the index

An SDD: sparse result, dense operands. Called by the backward of block-sparse layers, with the index that
`topology.py` made for the forward or with a larger one (Top-KAST's B, arXiv:2106.03517). The kernel is in
`_grad_kernel.py`.
"""

# M rows of dY and X (tokens, the reduction)   N, K rows and columns of W   R, C its block rows and columns, of r x c

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .._operands import check_out_dtype, expect
from .._triton import require
from ..fused._operands import check_rows
from ._grad_kernel import launch_block_grad
from ._grad_tiles import BlockGradTiles
from ._layout import BlockLayout, check_layout
from .storage import as_blocks, as_matrix, listed_blocks, places

__all__ = ["BlockLayout", "block_grad_weight"]


def block_grad_weight_reference(
    grad_y: Tensor, x: Tensor, layout: BlockLayout, kept: Tensor | None, alpha: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    """The definition of `block_grad_weight`: the whole product in float32 (or float64), of which blocks are chosen."""
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    with torch.autocast(x.device.type, enabled=False):
        dense = grad_y.to(compute).t() @ x.to(compute)
    grid, count = layout.grid, layout.count
    multiplier = listed_blocks(layout.index, *grid).to(compute)
    if kept is not None:
        on_pruned = 0.0 if alpha is None else alpha.to(compute).reshape(())
        multiplier = multiplier * torch.where(kept, 1.0, on_pruned).to(compute)
    multiplier = multiplier.reshape(-1, 1, 1)
    gradients = multiplier * as_blocks(dense, layout.block)
    # A choice, not a product: where no gradient is due, a NaN in G must not leave one behind.
    result = torch.where(multiplier == 0, 0.0, gradients).to(out_dtype)
    if count is None:
        matrix = as_matrix(result, layout.shape)
        return matrix.t().contiguous() if layout.transposed else matrix
    # Places behind the kept blocks hold the zeros behind the result.
    return F.pad(result, (0, 0, 0, 0, 0, 1))[places(layout.index, *grid, count)]


def _check(
    grad_y: Tensor,
    x: Tensor,
    layout: BlockLayout,
    kept: Tensor | None,
    alpha: Tensor | None,
    out_dtype: torch.dtype,
    backend: str,
) -> None:
    """Refuse what does not fit together; before anything is computed."""
    function, index, (n, k) = "block_grad_weight", layout.index, layout.shape
    check_layout(function, layout, backend)
    check_rows(function, "grad_y", grad_y, n, index, backend)
    check_rows(function, "x", x, k, index, backend)
    expect(
        grad_y.shape[0] == x.shape[0] and grad_y.dtype == x.dtype,
        function,
        f"grad_y to have the rows and the dtype of x, {x.shape[0]} and {x.dtype}",
        grad_y,
        "pass both as the forward's product left them",
    )
    check_out_dtype(function, "out_dtype", out_dtype, backend)
    if kept is not None:
        expect(
            kept.shape == layout.grid and kept.dtype == torch.bool and kept.device == index.device,
            function,
            f"kept to be bool {list(layout.grid)} on {index.device}",
            kept,
            "pass one flag a block, True where kept",
        )
    if alpha is not None:
        expect(
            alpha.shape in ((), (1,)) and alpha.dtype in (torch.float32, x.dtype) and alpha.device == index.device,
            function,
            f"alpha to be one float32 value on {index.device}",
            alpha,
            "keep the schedule's value in a float32 tensor on the weight's device",
        )


def block_grad_weight(
    grad_y: Tensor,
    x: Tensor,
    layout: BlockLayout,
    *,
    kept: Tensor | None = None,
    alpha: Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
    backend: str = "torch",
    tiles: BlockGradTiles | None = None,
) -> Tensor:
    """dW = m * (dY^T X) on the blocks of an index, exact zeros elsewhere.

    Sums are in float32 (float64 where all is float64) and in a fixed order: repeated calls agree bit for bit. float32
    operands are multiplied in full float32 unless torch allows tf32 (`_tiles.input_precision`). Where m = 0 the result
    is a selected 0: a NaN or infinity of the product there does not reach dW. Neither the launch nor the memory depends
    on the topology: nothing waits for the host, capturable in a CUDA graph.

    Args:
        grad_y: `[M, N]`, float16/bfloat16/float32 (float64 with the torch back end), any strides.
        x: `[M, K]`, dtype of grad_y, any strides.
        layout: the blocks whose gradient is wanted, the kept ones or more, and how dW is stored. Packed places are at
            least as many as the index has blocks; what does not fit is left out.
        kept: `[R, C]`, bool, the blocks of the index that are kept; None = all of them.
        alpha: 0-dim or `[1]`, float32, the multiplier on the others; None = 0. Read on the device.
        out_dtype: dtype of dW.
        backend: "torch" (the reference, any device) or "triton" (a GPU, or the interpreter).
        tiles: configuration of the Triton kernel; computed from the shapes if None.

    Returns:
        `[N, K]`, `[K, N]` or `[count, r, c]` as the layout says, contiguous, newly allocated; zeros outside the index
        and beyond its number of blocks.

    Raises:
        ValueError: an operand has the wrong shape, dtype or device, arguments exclude each other, or the back end is
            Triton and a block's side is no multiple of 16.
        RuntimeError: backend "triton" without triton, or off the GPU.

    Example:
        >>> import torch
        >>> from tritonsparse.kernels.block.grad import BlockLayout, block_grad_weight
        >>> from tritonsparse.kernels.block.topology import build_index_reference
        >>> layout = BlockLayout(build_index_reference(torch.tensor([[True, False]])), (1, 2), (1, 4))
        >>> block_grad_weight(torch.tensor([[3.0]]), torch.tensor([[1.0, 2.0, 4.0, 8.0]]), layout)
        tensor([[3., 6., 0., 0.]])
    """
    _check(grad_y, x, layout, kept, alpha, out_dtype, backend)
    if backend == "torch":
        return block_grad_weight_reference(grad_y, x, layout, kept, alpha, out_dtype)
    require("block_grad_weight", x)
    return launch_block_grad(grad_y, x, layout, kept, alpha, out_dtype, tiles)
