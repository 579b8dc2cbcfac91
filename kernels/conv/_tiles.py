"""How the convolutions cut their work into tiles; the rules are those of `kernels/_tiles.py`."""

# M positions of the result (batch, rows, columns)   N its channels in a group   K channels reduced in a group

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from .._tiles import HOPPER_SHARED, MAX_SPLITS, Limits, power_of_two, stages_that_fit

__all__ = ["ConvGradTiles", "ConvShape", "ConvTiles", "conv_grad_tiles", "conv_tiles"]

# Channels of a group below which a tile of the reduction takes several kernel positions, at an address an element.
NARROW = 16
# Tiles of positions that a part of dW's reduction has at least: fewer spend their time filling the pipeline.
LEAST_TILES = 8


class ConvShape(NamedTuple):
    """The sizes of a product.

    Attributes:
        m: positions of the result.
        n, k: channels of a group, of the result and reduced.
        taps: kernel positions.
        groups: of the convolution.
    """

    m: int
    n: int
    k: int
    taps: int
    groups: int = 1


@dataclass(frozen=True)
class ConvTiles:
    """A configuration of `gemm.py`.

    Attributes:
        m, n, k: sides of a tile: positions, channels of the result, channels reduced; powers of two, at least 16.
        flat: a tile of the reduction runs on over kernel positions, an address an element, instead of staying in one.
        splits: parts of the reduction, each a program of its own.
        num_warps, num_stages: as Triton takes them.
    """

    m: int
    n: int
    k: int
    flat: bool = False
    splits: int = 1
    num_warps: int = 8
    num_stages: int = 3


def block_tile(side: int, high: int) -> int:
    """The largest power of two that divides a block's side, at most `high`."""
    return min(side & -side, high)


def conv_tiles(
    shape: ConvShape,
    *,
    weight_bytes: int,
    x_bytes: int,
    masked: bool,
    precision: str,
    limits: Limits,
    block: tuple[int, int] | None = None,
) -> ConvTiles:
    """The configuration of `gemm.py`.

    Args:
        shape: in the kernel's letters.
        weight_bytes, x_bytes: of an element.
        masked: whether a bool mask is read with the weight.
        precision: from `input_precision`.
        limits: of the device.
        block: sides along n and k of the blocks of a topology, or None.
    """
    m, n, k, taps, groups = shape
    fp32 = x_bytes == 4
    full = fp32 and precision == "ieee"
    flat = block is None and k < NARROW
    # No matrix instruction multiplies in full float32 on NVIDIA; larger tiles only spill.
    widest = 64 if full else 128
    tile_n = power_of_two(n, 16, widest) if block is None else block_tile(block[0], widest)
    longest = 32 if fp32 or flat or limits.shared_bytes < HOPPER_SHARED else 64
    tile_k = power_of_two(taps * k if flat else k, 16, longest) if block is None else block_tile(block[1], longest)
    tile_m = 64 if full or flat else 128
    programs = -(-m // tile_m) * -(-n // tile_n) * groups
    if not flat and tile_n <= 64 and not fp32 and programs >= 4 * limits.multiprocessors:
        # Few channels: twice the positions for each weight that passes through registers.
        tile_m *= 2
    elif tile_m == 128 and programs < limits.multiprocessors:
        tile_m = 64
    tile_m = min(tile_m, power_of_two(m, 16, tile_m))
    num_warps = 8 if tile_m * tile_n >= 128 * 128 else 4
    stage = tile_n * tile_k * (weight_bytes + masked) + tile_m * tile_k * x_bytes
    programs = -(-m // tile_m) * -(-n // tile_n) * groups
    splits, steps = 1, -(-taps * k // tile_k)
    # Two programs of four warps share a multiprocessor. One with fewer than four tiles to reduce spends its time
    # filling its pipeline.
    room = limits.multiprocessors * (8 // num_warps)
    while splits < MAX_SPLITS and 2 * splits * programs <= room and steps >= 8 * splits:
        splits *= 2
    return ConvTiles(tile_m, tile_n, tile_k, flat, splits, num_warps, stages_that_fit(stage, limits))


@dataclass(frozen=True)
class ConvGradTiles:
    """A configuration of `grad.py`.

    Attributes:
        m, n, k: sides of a tile: the reduction, rows and columns of the weight; powers of two, at least 16.
        flat: a tile's columns run on over kernel positions, an address an element, instead of staying in one.
        splits: parts of the reduction, each a program of its own; any number.
        subtiles: parts in which the epilogue takes a tile's columns: 1, 2 or 4.
        num_warps, num_stages: as Triton takes them.
    """

    m: int
    n: int
    k: int
    flat: bool = False
    splits: int = 1
    subtiles: int = 2
    num_warps: int = 8
    num_stages: int = 3


def conv_grad_tiles(
    shape: ConvShape, *, operand_bytes: int, precision: str, limits: Limits, block: tuple[int, int] | None = None
) -> ConvGradTiles:
    """The configuration of `grad.py` for the forward of this shape; the other arguments as in `conv_tiles`.

    A convolution's weight is small and its positions are many: nearly always the positions are split, so that every
    multiprocessor has some.
    """
    m, n, k, taps, groups = shape
    fp32 = operand_bytes == 4
    full = fp32 and precision == "ieee"
    flat = block is None and k < NARROW
    widest = 64 if full or flat else 128
    tile_n = power_of_two(n, 16, widest) if block is None else block_tile(block[0], widest)
    tile_k = power_of_two(taps * k if flat else k, 16, widest) if block is None else block_tile(block[1], widest)
    tile_m = 32 if fp32 or flat or limits.shared_bytes < 2 * 64 * (tile_n + tile_k) * operand_bytes else 64
    num_warps = 8 if tile_n * tile_k >= 128 * 128 else 4
    columns = -(-taps * k // tile_k) if flat else taps * -(-k // tile_k)
    programs = groups * -(-n // tile_n) * columns
    # How many blocks are listed is known on the device alone: parts for when about half are.
    wanted = limits.multiprocessors * (8 // num_warps) * (1 if block is None else 2) // programs
    splits = max(1, min(wanted, -(-m // tile_m) // LEAST_TILES))
    stage = tile_m * (tile_n + tile_k) * operand_bytes
    subtiles = max(1, min(4, tile_k // 32))
    return ConvGradTiles(tile_m, tile_n, tile_k, flat, splits, subtiles, num_warps, stages_that_fit(stage, limits))
