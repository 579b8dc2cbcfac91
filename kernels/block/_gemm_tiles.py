"""How the block-sparse products cut their work into tiles: configurations computed from shapes, as `_tiles.py` does.

A tile of the weight lies inside one block, so that one entry of the index serves a whole tile. Everything else follows
from what a multiprocessor must receive, 4096 (1/TILE_M + 1/TILE_N) bytes a clock at the full rate of Hopper's matrix
units in 16 bits: a narrow block makes up for it by more rows of x.
"""

# M rows of x (tokens)   N results   K the reduction: block rows and columns in the forward, exchanged in dX

from __future__ import annotations

from dataclasses import dataclass

from .._tiles import HOPPER_SHARED, MAX_SPLITS, Limits, power_of_two, stages_that_fit

__all__ = ["BlockTiles", "block_tiles", "tile_side"]

# Bytes of x that the programs at work share, so that it stays in the L2 while the weight streams past.
PANEL_BYTES = 16 * 2**20
MAX_GROUP = 16


@dataclass(frozen=True)
class BlockTiles:
    """A configuration of `gemm.py`.

    Attributes:
        m, n, k: sides of a tile in the forward's letters, powers of two, at least 16; n and k divide the block.
        splits: most parts of a line's reduction, each a work item of its own; as many as the kernel finds fair.
        subtiles: parts in which the epilogue takes a tile's columns: 1, 2, 4 or 8.
        group: tiles of rows of x that go through all blocks of the weight together.
        persistent: programs on one multiprocessor, each of which takes its work items in turn; 0 for a program each.
        descriptors: x and the weight are read through tensor descriptors (Hopper's copy engine), else by pointers.
        num_warps, num_stages: as Triton takes them.
    """

    m: int
    n: int
    k: int
    splits: int = 1
    subtiles: int = 1
    group: int = 8
    persistent: int = 1
    descriptors: bool = False
    num_warps: int = 8
    num_stages: int = 3


def tile_side(side: int, most: int) -> int:
    """The largest power of two that divides a block's side and is at most `most`, a power of two."""
    return min(side & -side, most)


def block_tiles(
    shape: tuple[int, int, int],
    *,
    block: tuple[int, int],
    weight_bytes: int,
    x_bytes: int,
    precision: str,
    aligned: bool,
    limits: Limits,
) -> BlockTiles:
    """The configuration of `gemm.py` for a product of x [M, K] by a weight [N, K] in blocks.

    Args:
        shape: (M, N, K).
        block: sides of a block along n and k.
        weight_bytes, x_bytes: of an element of the weight and of x.
        precision: from `input_precision`.
        aligned: whether `is_aligned` says so of x and the weight; else each thread holds an address for each element.
        limits: of the device.
    """
    m, n, k = shape
    fp32 = x_bytes == 4
    ieee = fp32 and precision == "ieee"
    hopper = limits.shared_bytes >= HOPPER_SHARED
    tile_n = tile_side(block[0], 64 if ieee else 128)
    tile_k = tile_side(block[1], 64 if hopper and aligned and not fp32 else 32)
    columns = -(-n // tile_n)
    if m <= 32:
        tile_m = power_of_two(m, 16, 32)
    else:
        # Before Hopper operands take registers too, and no matrix instruction multiplies in full float32. A weight that
        # is converted on its way needs room for both.
        widest = 256 if hopper and x_bytes == weight_bytes == 2 else 128
        tile_m = power_of_two(m, 64, widest if aligned and not ieee else 64)
        while tile_m > 64 and -(-m // tile_m) * columns < limits.multiprocessors:
            tile_m //= 2
    num_warps = 8 if tile_m * tile_n >= (64 * 64 if ieee else 128 * 128) else 4
    descriptors = hopper and aligned and weight_bytes == x_bytes == 2
    stage = tile_m * tile_k * x_bytes + tile_n * tile_k * weight_bytes
    # The converted tile of the weight.
    reserved = 0 if weight_bytes == x_bytes else tile_n * tile_k * x_bytes
    stages = stages_that_fit(stage, Limits(limits.shared_bytes - reserved, limits.multiprocessors))
    splits, items = 1, -(-m // tile_m) * columns
    # The number of blocks that a row keeps is not known here: as if one in four, with four steps for each part. Were
    # there an item for every multiprocessor and more, the longest would not last long beyond the others.
    if items <= limits.multiprocessors:
        while splits < MAX_SPLITS and splits * items < 2 * limits.multiprocessors and k >= 32 * splits * tile_k:
            splits *= 2
    group = max(1, min(PANEL_BYTES // max(1, tile_m * k * x_bytes), MAX_GROUP))
    return BlockTiles(
        tile_m,
        tile_n,
        tile_k,
        splits,
        # Thirty-two columns at a time: the addresses of 256 x 128 results at once would take 80 registers more.
        max(1, tile_n // 32),
        group=1 << (group.bit_length() - 1),
        # Registers allow two programs of 128 threads, and one of 256.
        persistent=2 if num_warps == 4 and 2 * (stages * stage + reserved) <= limits.shared_bytes else 1,
        descriptors=descriptors,
        num_warps=num_warps,
        num_stages=stages,
    )
