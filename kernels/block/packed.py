"""A linear layer of which only the kept blocks exist: values [nnz, r, c] and an index instead of a matrix.

    W          = the blocks V at the places of the index, 0 elsewhere      [N, K], never stored by the kernels
    forward    Y  = X Wᵀ + b                                               [M, N]
    backward   dX = dY W                                                   [M, K]
               dV = the blocks of dYᵀ X at the places of the index         [nnz, r, c]
               db = Σ_M dY                                                 [N]

The blocks are stored as `storage.py` says; what lies behind the kept ones is not read and gets a gradient of 0. The
products are `gemm.py`'s and `grad.py`'s, so gradients and an optimizer's state are of the size of V. For a few rows,
one token of each of a few texts, the time is that of reading V once: then rows of blocks are shared out among programs
until enough loads are in flight (`few_rows_tiles`). Called by `tritonsparse.layers`.
"""

# M rows of x (tokens)   N output features   K input features   R, C: rows and columns of blocks, r x c elements each

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .._operands import FLOATS, check_triton_dtype, expect
from .._tiles import MAX_SPLITS, MAX_STAGES, Limits, limits_of
from .._triton import require
from ._gemm_tiles import BlockTiles, tile_side
from ._layout import BlockLayout, check_bias, check_weight
from .gemm import block_forward, block_grad_input
from .grad import block_grad_weight
from .storage import pack_blocks, unpack_blocks

__all__ = ["few_rows_tiles", "pack_blocks", "packed_block_linear", "unpack_blocks"]

# Rows of x that one tile of the least height holds.
FEW = 16
# Programs on a multiprocessor that keep enough loads in flight where nothing but the values is read.
PROGRAMS = 4


def few_rows_tiles(shape: tuple[int, int], block: tuple[int, int], limits: Limits) -> BlockTiles:
    """The configuration of the forward for at most FEW rows: by shapes, never by what is kept."""
    (n, k), (r, c) = shape, block
    tile_n, tile_k = tile_side(r, 64), tile_side(c, 64)
    items, splits = -(-n // tile_n), 1
    # Of a row that keeps one block in four, each share has one.
    while splits < MAX_SPLITS and splits * items < PROGRAMS * limits.multiprocessors and 8 * splits * c <= k:
        splits *= 2
    num_warps = 4 if tile_n * tile_k >= 2048 else 2
    return BlockTiles(FEW, tile_n, tile_k, splits, group=1, persistent=0, num_warps=num_warps, num_stages=MAX_STAGES)


def _layout(values: Tensor, index: Tensor, n: int, k: int) -> BlockLayout:
    count, r, c = values.shape
    return BlockLayout(index, (r, c), (n, k), count=count)


@torch.library.custom_op("tritonsparse::packed_block_linear", mutates_args=())
def _forward_op(x: Tensor, values: Tensor, bias: Tensor | None, index: Tensor, n: int, k: int, backend: str) -> Tensor:
    rows, layout = x.reshape(math.prod(x.shape[:-1]), k), _layout(values, index, n, k)
    few = backend == "triton" and rows.shape[0] <= FEW
    tiles = few_rows_tiles((n, k), layout.block, limits_of(x.device)) if few else None
    with torch.autocast(x.device.type, enabled=False):
        y = block_forward(rows, values, layout, bias, backend=backend, tiles=tiles)
    return y.reshape(*x.shape[:-1], n)


@_forward_op.register_fake
def _(x: Tensor, values: Tensor, bias: Tensor | None, index: Tensor, n: int, k: int, backend: str) -> Tensor:
    return x.new_empty((*x.shape[:-1], n))


@torch.library.custom_op("tritonsparse::packed_block_linear_backward", mutates_args=())
def _backward_op(
    grad_y: Tensor, x: Tensor, values: Tensor, index: Tensor, n: int, k: int, backend: str, need_x: bool, need_v: bool
) -> tuple[Tensor, Tensor]:
    of_y, of_x = grad_y.reshape(math.prod(grad_y.shape[:-1]), n), x.reshape(math.prod(x.shape[:-1]), k)
    layout = _layout(values, index, n, k)
    grad_x, grad_values = x.new_empty(0), values.new_empty(0)
    with torch.autocast(x.device.type, enabled=False):
        if need_x:
            grad_x = block_grad_input(of_y, values, layout, backend=backend).reshape(x.shape)
        if need_v:
            grad_values = block_grad_weight(of_y, of_x, layout, out_dtype=values.dtype, backend=backend)
    return grad_x, grad_values


@_backward_op.register_fake
def _(
    grad_y: Tensor, x: Tensor, values: Tensor, index: Tensor, n: int, k: int, backend: str, need_x: bool, need_v: bool
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape if need_x else 0), values.new_empty(values.shape if need_v else 0)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, values, bias, index, ctx.n, ctx.k, ctx.backend = inputs
    # Only the gradient of the values reads x.
    ctx.save_for_backward(x if ctx.needs_input_grad[1] else x.new_empty(0), values, index)
    ctx.x_shape, ctx.bias_dtype = x.shape, None if bias is None else bias.dtype


def _backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
    x, values, index = ctx.saved_tensors
    need_x, need_values, need_bias = ctx.needs_input_grad[:3]
    grad_x = grad_values = None
    if need_x or need_values:
        if not need_values:
            # Of its shape and dtype, for the operator; it is not read.
            x = x.new_empty(()).expand(ctx.x_shape)
        grad_x, grad_values = torch.ops.tritonsparse.packed_block_linear_backward(
            grad_y, x, values, index, ctx.n, ctx.k, ctx.backend, need_x, need_values
        )
    grad_bias = grad_y.reshape(-1, ctx.n).sum(0).to(ctx.bias_dtype) if need_bias else None
    return grad_x if need_x else None, grad_values if need_values else None, grad_bias, None, None, None, None


_forward_op.register_autograd(_backward, setup_context=_setup_context)


def packed_block_linear(
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    index: Tensor,
    *,
    shape: tuple[int, int],
    backend: str = "torch",
) -> Tensor:
    """Y = x Wᵀ + bias, W being the blocks of `values`; differentiable in x, values and bias.

    Values are rounded to the dtype of x before the product, sums are float32 (float64 where all is float64) and rounded
    once. Deterministic, no host sync, capturable in a CUDA graph.

    Args:
        x: `[..., K]`, float16/bfloat16/float32 (float64 with the torch back end), any strides.
        values: `[>= nnz, r, c]`, any of these dtypes, contiguous: the kept blocks in the order of the index.
        bias: `[N]`, dtype of x, or None.
        index: `[index_size(ceil(N/r), ceil(K/c))]`, int32 (`topology.py`).
        shape: N and K.
        backend: "torch" (the reference, any device) or "triton" (a GPU, or Triton's interpreter), which takes blocks
            whose sides are multiples of 16.

    Returns:
        `[..., N]`, dtype of x; aliases nothing.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together, or the back end is unknown.
        RuntimeError: `backend="triton"` where Triton cannot run.

    Example:
        >>> import torch
        >>> from tritonsparse.kernels.block.packed import packed_block_linear
        >>> from tritonsparse.kernels.block.topology import build_index_reference
        >>> index = build_index_reference(torch.tensor([[False, True]]))
        >>> values = torch.tensor([[[3.0, 4.0]]])  # W = [0, 0, 3, 4]
        >>> packed_block_linear(torch.tensor([[9.0, 9.0, 1.0, 2.0]]), values, None, index, shape=(1, 4))
        tensor([[11.]])
    """
    _check(x, values, bias, index, shape, backend)
    return _forward_op(x, values, bias, index, *shape, backend)


def _check(x: Tensor, values: Tensor, bias: Tensor | None, index: Tensor, shape: tuple[int, int], backend: str) -> None:
    function, (n, k) = "packed_block_linear", shape
    expect(
        values.dim() == 3 and len(values) > 0,
        function,
        "values to be blocks [nnz, r, c], one at least",
        values,
        "pack_blocks makes them",
    )
    check_weight(function, values, _layout(values, index, n, k), backend)
    expect(
        x.dim() > 0 and x.shape[-1] == k and x.dtype in FLOATS and x.device == values.device,
        function,
        f"x to be floating-point [..., {k}] on {values.device}",
        x,
        "check the layer's input",
    )
    check_bias(function, bias, n, x)
    if backend == "triton":
        check_triton_dtype(function, "x", x.dtype, backend)
        require(function, x)
