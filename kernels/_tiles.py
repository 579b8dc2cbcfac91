"""How the fused products cut their work into tiles: arithmetic shared by their kernels and launchers.

Configurations are computed, not searched for: a first call compiles one kernel and starts. The rules are those of
triton_kernels' `opt_flags`, tiles by shape, warps by the tile's area, buffers by what shared memory is left, with
the numbers that ahead-of-time compilation gave for our kernels (`tests/kernels/compile_kernels.py` holds them).
"""

# M rows of x (tokens)   N rows of S(W) (results)   K the reduction

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from ._triton import tl, triton

__all__ = [
    "GROUP", "GemmTiles", "GradTiles", "Limits", "gemm_tiles", "grad_tiles", "grouped_tile", "input_precision",
    "is_aligned", "limits_of", "split_columns",
]  # fmt: skip

# Tiles of one operand that neighbouring programs share while they pass through the other operand's.
GROUP = 8
# The most parts a reduction is cut into: a part costs 8 bytes of traffic per result.
MAX_SPLITS = 16
# Buffers beyond four gain nothing that hides latency; triton_kernels stops there too.
MAX_STAGES = 4
# Shared memory of one program on Hopper and later; what has it also has the registers of 128 x 256 tiles.
HOPPER_SHARED = 232_448


@triton.jit
def grouped_tile(program, tiles_m, tiles_n, GROUP: tl.constexpr):  # type: ignore[no-untyped-def]
    """Row and column of the tile a program computes: down GROUP rows of tiles, then along, so that L2 is reused."""
    group = program // (GROUP * tiles_n)
    rows = tl.minimum(tiles_m - group * GROUP, GROUP)
    within = program % (GROUP * tiles_n)
    return group * GROUP + within % rows, within // rows


@triton.jit
def _halves(matrix):  # type: ignore[no-untyped-def]
    return tl.split(tl.permute(tl.reshape(matrix, (matrix.shape[0], 2, matrix.shape[1] // 2)), (0, 2, 1)))


@triton.jit
def split_columns(matrix, PARTS: tl.constexpr):  # type: ignore[no-untyped-def]
    """A matrix in registers as a tuple of 1, 2, 4 or 8 matrices of neighbouring columns."""
    if PARTS == 1:
        return (matrix,)
    elif PARTS == 2:
        return _halves(matrix)
    elif PARTS == 4:
        left, right = _halves(matrix)
        return _halves(left) + _halves(right)
    else:
        left, right = _halves(matrix)
        a, b = _halves(left)
        c, d = _halves(right)
        return _halves(a) + _halves(b) + _halves(c) + _halves(d)


@dataclass(frozen=True)
class GemmTiles:
    """A configuration of a fused product.

    Attributes:
        m, n, k: sides of a tile in the forward's letters, powers of two, at least 16.
        splits: parts of the reduction, each a program of its own.
        num_warps, num_stages: as Triton takes them.
    """

    m: int
    n: int
    k: int
    splits: int = 1
    num_warps: int = 8
    num_stages: int = 3


@dataclass(frozen=True)
class Limits:
    """What a configuration may use: bytes of shared memory a program, and multiprocessors."""

    shared_bytes: int
    multiprocessors: int


@functools.cache
def _gpu_limits(index: int) -> Limits:
    properties = torch.cuda.get_device_properties(index)
    shared = getattr(properties, "shared_memory_per_block_optin", properties.shared_memory_per_block)
    return Limits(shared, properties.multi_processor_count)


def limits_of(device: torch.device) -> Limits:
    """The device's limits; those of the smallest GPU we compile for where kernels are interpreted on a CPU."""
    if device.type != "cuda":
        return Limits(65_536, 1)
    return _gpu_limits(torch.cuda.current_device() if device.index is None else device.index)


def input_precision(dtype: torch.dtype) -> str:
    """What tl.dot makes of float32 operands: "tf32" where torch's own products may use it, else "ieee".

    Both `torch.set_float32_matmul_precision` and `torch.backends.cuda.matmul.allow_tf32` are heard, and nothing else:
    the default is full float32. Operands of 16 bits are always multiplied exactly; for them the value is "ieee", so
    that turning tf32 on compiles nothing anew.
    """
    allowed = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if allowed else "ieee"


def power_of_two(value: int, low: int, high: int) -> int:
    """The smallest power of two that is not below `value`, within [low, high], themselves powers of two."""
    return min(max(1 << (max(value, 1) - 1).bit_length(), low), high)


def stages_that_fit(bytes_per_stage: int, limits: Limits) -> int:
    """Buffers of a pipelined loop: as many as shared memory holds, from 2 to MAX_STAGES."""
    return min(max(limits.shared_bytes // bytes_per_stage, 2), MAX_STAGES)


def is_aligned(*matrices: torch.Tensor | None) -> bool:
    """Whether all are read by wide loads: neighbours along an axis, in lines that start on 16 elements."""
    # A loop without a generator: every launch asks.
    for matrix in matrices:
        if matrix is not None:
            rows, columns = matrix.stride()
            if matrix.data_ptr() % 16 or not ((rows == 1 and columns % 16 == 0) or (columns == 1 and rows % 16 == 0)):
                return False
    return True


def gemm_tiles(
    shape: tuple[int, int, int],
    *,
    weight_bytes: int,
    x_bytes: int,
    masked: bool,
    precision: str,
    aligned: bool,
    limits: Limits,
) -> GemmTiles:
    """The configuration of `fused/gemm.py` for a product of x [M, K] by S(W) [N, K].

    Args:
        shape: (M, N, K).
        weight_bytes, x_bytes: of an element of the master weight and of x.
        masked: whether a bool mask is read with the weight.
        precision: from `input_precision`.
        aligned: whether `is_aligned` says so of all operands; else each thread holds an address for each element.
        limits: of the device.
    """
    m, n, k = shape
    fp32 = x_bytes == 4
    if fp32 and precision == "ieee":
        # No matrix instruction multiplies in full float32 on NVIDIA; larger tiles only spill.
        tile_m, tile_n, num_warps = power_of_two(m, 16, 64), 64, 4
    elif m <= 32:
        # The weight is read once and nothing else matters: more and smaller programs keep more loads in flight.
        tile_m, tile_n, num_warps = power_of_two(m, 16, 32), 64, 4
    else:
        tile_m, tile_n, num_warps = power_of_two(m, 64, 128 if aligned else 64), 128, 8
    # Hopper's instruction reads x from shared memory; before it, longer tiles spill both operands.
    tile_k = 64 if limits.shared_bytes >= HOPPER_SHARED and aligned and not fp32 else 32
    stage = tile_n * tile_k * (weight_bytes + masked) + tile_m * tile_k * x_bytes
    programs = -(-m // tile_m) * -(-n // tile_n)
    splits = 1
    # A program with fewer than four tiles to reduce spends its time filling its pipeline.
    while splits < MAX_SPLITS and 2 * splits * programs <= limits.multiprocessors and k >= 8 * splits * tile_k:
        splits *= 2
    return GemmTiles(tile_m, tile_n, tile_k, splits, num_warps, stages_that_fit(stage, limits))


@dataclass(frozen=True)
class GradTiles:
    """A configuration of `fused/grad.py`, in its letters.

    Attributes:
        m, n, k: sides of a tile: the reduction, rows and columns of the weight; powers of two, at least 16.
        subtiles: parts in which the epilogue takes a tile's columns: 1, 2, 4 or 8, each of 32 columns or more.
        num_warps, num_stages: as Triton takes them.
        least_steps: 1; 0 lets ptxas serialise the matrix instructions, as it did until a GPU has timed both.
    """

    m: int
    n: int
    k: int
    subtiles: int = 2
    num_warps: int = 8
    num_stages: int = 3
    least_steps: int = 1


def grad_tiles(n: int, k: int, *, operand_bytes: int, precision: str, aligned: bool, limits: Limits) -> GradTiles:
    """The configuration of `fused/grad.py` for a weight `[n, k]`; the other arguments as in `gemm_tiles`."""
    fp32 = operand_bytes == 4
    if fp32 and precision == "ieee":
        return GradTiles(32, 64, 64, 1, 8, stages_that_fit(2 * 32 * 64 * 4, limits))
    tile_m, tile_n, tile_k, subtiles, num_warps = 64, 128, 128, 4, 8
    if -(-n // 128) * -(-k // 128) < limits.multiprocessors:
        # Too few tiles for the device: twice as many of half the size.
        tile_n, num_warps = 64, 4
    if fp32 or not aligned or limits.shared_bytes < 2 * 64 * (128 + 128) * operand_bytes:
        tile_m = 32
    elif limits.shared_bytes >= HOPPER_SHARED and -(-n // 128) * -(-k // 256) >= limits.multiprocessors:
        # A quarter fewer bytes a product into each multiprocessor, where there is a tile for every one of them.
        tile_k, subtiles = 256, 8
    stage = tile_m * (tile_n + tile_k) * operand_bytes
    return GradTiles(tile_m, tile_n, tile_k, subtiles, num_warps, stages_that_fit(stage, limits))
