"""How the gradient of kept blocks cuts its work into tiles (`grad.py`), by arithmetic, as in `_tiles.py`."""

# In the letters of the kernels: M the reduction, N the tile's own axis of W, K the gathered one.

from __future__ import annotations

from dataclasses import dataclass

from .._tiles import HOPPER_SHARED, MAX_SPLITS, Limits, power_of_two, stages_that_fit

__all__ = ["BlockGradTiles", "block_grad_tiles", "takes_rows"]

# Share of the programs that find blocks to compute, for choices made before anybody knows: sparse training runs at
# about this density, and a wrong guess costs idle programs or a little traffic of parts.
DENSITY = 1 / 8
# The longest own side of a tile.
OWN_LIMIT = 128
# Programs that a multiprocessor of Hopper and later holds at once: while one waits for its first tiles or writes its
# results, the other multiplies. Each has half of the shared memory, and of 256 threads 128 registers.
RESIDENT = 2
# Shared memory that the driver takes of each program.
PROGRAM_RESERVE = 1024


@dataclass(frozen=True)
class BlockGradTiles:
    """A configuration of the kernel.

    Attributes:
        m: side of a tile along the reduction.
        n: along its own axis; parts of a block if it is smaller, rows of it stay empty if it is larger.
        k: gathered columns, of several blocks or of parts of one. All are powers of two, at least 16.
        splits: parts of the reduction, each a program of its own.
        subtiles: parts in which the epilogue takes a tile's own axis: 1, 2, 4 or 8, each at least 16 wide.
        num_warps, num_stages: as Triton takes them.
    """

    m: int
    n: int
    k: int
    splits: int = 1
    subtiles: int = 1
    num_warps: int = 4
    num_stages: int = 3


def takes_rows(shape: tuple[int, int], block: tuple[int, int], transposed: bool) -> bool:
    """Whether a tile's own axis is that of W's rows `[N, K]`, its columns gathered, or the other way round.

    The longer side of a block, as far as a tile goes, fills a tile best. Of equal ones the longer axis of W: what all
    programs gather from is then the smaller operand, which is read again and again and stays in the L2. Of equal axes
    the one across which dW is stored.
    """
    (n, k), (r, c) = shape, (min(side, OWN_LIMIT) for side in block)
    if r != c:
        return r > c
    return n > k if n != k else not transposed


def block_grad_tiles(
    m: int,
    own: tuple[int, int],
    gathered: int,
    *,
    operand_bytes: int,
    precision: str,
    aligned: bool,
    limits: Limits,
    resident: int = RESIDENT,
) -> BlockGradTiles:
    """The configuration for blocks along a tile's own axis and `gathered` elements along the other.

    Args:
        m: rows of dY and X.
        own: (R, r), block rows and their height, where rows are the own axis.
        gathered: elements along the other axis, all blocks of it counted.
        operand_bytes: of an element of dY and X.
        precision: from `input_precision`.
        aligned: whether `is_aligned` says so of dY and X; else each thread holds an address for each element.
        limits: of the device.
        resident: programs that a multiprocessor of Hopper and later is to hold at once, 1 or 2.
    """
    (blocks, side), fp32 = own, operand_bytes == 4
    exact = fp32 and precision == "ieee"
    # No matrix instruction multiplies in full float32 on NVIDIA; larger tiles only spill.
    tile_n = power_of_two(side, 16, 64 if exact else OWN_LIMIT)
    tile_k = 64 if exact else 128
    rows = blocks * -(-side // tile_n)
    hopper = limits.shared_bytes >= HOPPER_SHARED and aligned and not fp32
    if not hopper:
        resident = 1
    places = resident * limits.multiprocessors
    # Two programs have no registers for 128 x 256 sums each.
    if hopper and not (tile_n == 128 and resident > 1):
        # Fewer bytes a product into each multiprocessor, where there is a tile for every place.
        tile_k = 256 if rows * -(-gathered // 256) * DENSITY >= places else 128
    room = Limits((limits.shared_bytes + PROGRAM_RESERVE) // resident - PROGRAM_RESERVE, limits.multiprocessors)
    # A step's bytes for each row of its reduction; three short buffers hide more of the latency than two long ones.
    row_bytes = (tile_n + tile_k) * operand_bytes
    tile_m = 32 if fp32 or not aligned or room.shared_bytes < (3 if hopper else 2) * 64 * row_bytes else 64
    programs = rows * -(-gathered // tile_k) * DENSITY
    splits = 1
    # A program with fewer than four tiles to reduce spends its time filling its pipeline.
    while splits < MAX_SPLITS and 2 * splits * programs <= places and m >= 8 * splits * tile_m:
        splits *= 2
    area = tile_n * tile_k
    # dW and the whole of G would not fit into registers.
    subtiles = min(max(area // 4096, 1), tile_n // 16)
    # Addresses and places of 256 gathered columns, or of single elements, are too many for four warps.
    num_warps = 8 if area >= 16_384 or tile_k == 256 or exact or not aligned else 4
    return BlockGradTiles(
        tile_m, tile_n, tile_k, splits, subtiles, num_warps, stages_that_fit(tile_m * row_bytes, room)
    )
