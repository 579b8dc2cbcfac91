"""A weight in blocks as the products take it: what it must be, and the dense matrix that it stands for.

Shared by `gemm.py` and what is built on it; a check raises ValueError before anything is computed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._operands import FLOATS, check_triton_dtype, expect
from .topology import check_index, grid_of, sections

__all__ = ["check_block_weight", "dense_weight"]


def check_block_weight(
    function: str,
    weight: Tensor,
    index: Tensor,
    block: tuple[int, int],
    shape: tuple[int, int] | None,
    transposed: bool,
    packed: bool,
    backend: str,
) -> tuple[int, int]:
    """Refuse a weight in blocks that does not fit its index, layout or the back end; its N and K."""
    if backend not in ("torch", "triton"):
        raise ValueError(f'{function}: expected backend "torch" or "triton", got {backend!r}; pass either')
    rows, columns = grid_of(function, (0, 0) if shape is None else shape, block)
    if packed:
        if shape is None or transposed:
            raise ValueError(
                f"{function}: expected shape=(N, K) and not transposed beside packed values, got shape {shape} and "
                f"transposed {transposed}; pack the weight as [N, K]"
            )
        expect(
            weight.dim() == 3 and tuple(weight.shape[1:]) == tuple(block) and weight.is_contiguous(),
            function,
            f"packed weight to be contiguous values [blocks, {block[0]}, {block[1]}]",
            weight,
            "lay kept blocks one after the other, row by row of blocks",
        )
        n, k = shape
    else:
        expect(
            weight.dim() == 2, function, "weight to be a matrix [N, K]", weight, "pass packed=True with packed values"
        )
        n, k = reversed(weight.shape) if transposed else weight.shape
        if shape is not None and tuple(shape) != (n, k):
            raise ValueError(f"{function}: expected shape {(n, k)}, the weight's, got {tuple(shape)}; leave it out")
        rows, columns = grid_of(function, (n, k), block)
    expect(weight.dtype in FLOATS, function, "a floating-point weight", weight, "cast it")
    check_triton_dtype(function, "weight", weight.dtype, backend)
    if backend == "triton" and (block[0] % 16 or block[1] % 16):
        raise ValueError(
            f'{function}: expected blocks whose sides are multiples of 16 for backend="triton", got '
            f'{block[0]} x {block[1]}; pass backend="torch", which takes any'
        )
    check_index(function, index, rows, columns)
    expect(index.device == weight.device, function, f"index on {weight.device}", index, "build it beside the weight")
    return n, k


def dense_weight(
    weight: Tensor,
    index: Tensor,
    *,
    block: tuple[int, int],
    shape: tuple[int, int] | None = None,
    transposed: bool = False,
    packed: bool = False,
) -> Tensor:
    """The weight [N, K] that an index speaks of, with exact zeros in pruned blocks. Waits for the host.

    Args:
        weight, index, block, shape, transposed, packed: as given to `block_linear`.

    Returns:
        `[N, K]`, dtype of `weight`, newly allocated.

    Raises:
        ValueError: as `block_linear`.

    Example:
        >>> import torch
        >>> from tritonsparse.kernels.block._weight import dense_weight
        >>> from tritonsparse.kernels.block.topology import build_index_reference
        >>> index = build_index_reference(torch.tensor([[False, True]]))
        >>> dense_weight(torch.tensor([[5.0, 6.0, 7.0]]), index, block=(1, 2))
        tensor([[0., 0., 7.]])
    """
    n, k = check_block_weight("dense_weight", weight, index, block, shape, transposed, packed, "torch")
    rows, columns = grid_of("dense_weight", (n, k), block)
    parts = sections(index, rows, columns)
    kept = int(parts.row_start[-1])
    lines = torch.arange(rows, device=index.device).repeat_interleave(parts.row_start.diff(), output_size=kept)
    places = lines, parts.row_block[:kept].long()
    whole = (rows * block[0], columns * block[1])
    if packed:
        blocks = weight.new_zeros(rows, columns, *block)
        blocks[places] = weight[:kept]
        return blocks.transpose(1, 2).reshape(whole)[:n, :k].contiguous()
    flags = torch.zeros(rows, columns, dtype=torch.bool, device=index.device)
    flags[places] = True
    mask = flags.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)[:n, :k]
    # Whatever a pruned block holds, NaN included, is gone.
    return torch.where(mask, weight.t() if transposed else weight, 0.0)
