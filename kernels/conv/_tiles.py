"""How the convolutions cut their work into tiles, and the geometry their kernels and launchers share.

    forward    Y[b, o, f]  = sum over t, c of  X[b, o s - p + t d, c]  S(W)[f, t, c]
    grad input dX[b, h, c] = sum over t, f of dY[b, o, f] S(W)[f, t, c]     where  o s = h + p - t d

along each axis of the image, with stride s, padding p before it, dilation d and t a kernel position. A strided
convolution's h fall into s phases; in a phase the positions t that divide are every (s / gcd(s, d))-th, and what is
left is the forward's form with stride 1 (`Walk`). The rules for tiles are those of `_tiles.py`.
"""

# M positions of the result (batch, rows, columns)   N its channels in a group   K channels reduced in a group

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .._tiles import HOPPER_SHARED, MAX_SPLITS, Limits, power_of_two, stages_that_fit

__all__ = ["ConvGradTiles", "ConvTiles", "Geometry", "Walk", "conv_grad_tiles", "conv_tiles", "phases"]

# Channels of a group below which a tile of the reduction takes several kernel positions, at an address an element.
NARROW = 16
# Tiles of positions that a part of dW's reduction has at least: fewer spend their time filling the pipeline.
LEAST_TILES = 8


@dataclass(frozen=True)
class Geometry:
    """A 2-D convolution's shape but for channels and image: what `torch.nn.functional.conv2d` takes.

    Attributes:
        kernel, stride, dilation: (height, width), each at least 1.
        padding: zeros (top, left, bottom, right).
        groups: of channels.
    """

    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    @classmethod
    def of(
        cls, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int
    ) -> Geometry:
        """From lists, as a custom op hands them over."""
        top, left, bottom, right = padding
        (kh, kw), (sh, sw), (dh, dw) = kernel, stride, dilation
        return cls((kh, kw), (sh, sw), (top, left, bottom, right), (dh, dw), groups)

    @property
    def taps(self) -> int:
        """Kernel positions."""
        return self.kernel[0] * self.kernel[1]

    @property
    def is_product(self) -> bool:
        """Whether it is a matrix product of the pixels: 1 x 1, at every pixel, without padding or groups."""
        return self.taps == 1 and self.stride == (1, 1) and not any(self.padding) and self.groups == 1

    def output(self, image: Sequence[int]) -> tuple[int, int]:
        """Rows and columns of the result for an image of (height, width)."""
        before, after = self.padding[:2], self.padding[2:]
        height, width = (
            (image[axis] + before[axis] + after[axis] - self.dilation[axis] * (self.kernel[axis] - 1) - 1)
            // self.stride[axis]
            + 1
            for axis in (0, 1)
        )
        return height, width


@dataclass(frozen=True)
class Walk:
    """One axis of a walk over results: the o-th of them reads, at its t-th position, pixel o * mul + offset + t * step.

    Attributes:
        first, every: the results walked over are `first`, `first + every`, ... of the axis.
        mul, offset, step: as above; a pixel outside the image is zero.
        divisor: where not 1, that number must be a multiple of it, and the pixel is the quotient.
        taps: how many positions are walked through.
        tap, tap_step: the first of them among the kernel's, and how far apart they are.
    """

    first: int
    every: int
    mul: int
    offset: int
    step: int
    divisor: int
    taps: int
    tap: int
    tap_step: int


def forward_walk(kernel: int, stride: int, padding: int, dilation: int) -> Walk:
    """The forward's, along one axis."""
    return Walk(0, 1, stride, -padding, dilation, 1, kernel, 0, 1)


def phases(kernel: int, stride: int, padding: int, dilation: int, apart: bool) -> list[Walk]:
    """The input gradient's, along one axis: one a phase, or (not `apart`) one for all with positions that divide.

    A phase none of whose positions divides has no taps, and its gradient is zero.
    """
    if not apart or stride == 1:
        return [Walk(0, 1, 1, padding, -dilation, stride, kernel, 0, 1)]
    walks = []
    # t and t + apart_by fall on the same phase.
    apart_by = stride // math.gcd(stride, dilation)
    for first in range(stride):
        taps = [t for t in range(kernel) if (first + padding - t * dilation) % stride == 0]
        offset = (first + padding - taps[0] * dilation) // stride if taps else 0
        step = -(apart_by * dilation) // stride
        walks.append(Walk(first, stride, 1, offset, step, 1, len(taps), taps[0] if taps else 0, apart_by))
    return walks


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
    m: int,
    n: int,
    k: int,
    taps: int,
    *,
    groups: int,
    weight_bytes: int,
    x_bytes: int,
    mask_bytes: int,
    precision: str,
    limits: Limits,
    block: tuple[int, int] | None = None,
) -> ConvTiles:
    """The configuration of `gemm.py` for m positions, n results and k reduced channels a group.

    Args:
        m, n, k: sizes in the kernel's letters.
        taps: kernel positions.
        groups: of the convolution.
        weight_bytes, x_bytes, mask_bytes: of an element; 0 without a mask.
        precision: from `input_precision`.
        limits: of the device.
        block: sides of the blocks along n and k that an index skips, or None.
    """
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
    stage = tile_n * tile_k * (weight_bytes + mask_bytes) + tile_m * tile_k * x_bytes
    programs = -(-m // tile_m) * -(-n // tile_n) * groups
    splits, steps = 1, -(-taps * k // tile_k)
    # Two programs of four warps share a multiprocessor. One with fewer than four tiles to reduce spends its time
    # filling its pipeline.
    room = limits.multiprocessors * (8 // num_warps)
    while splits < MAX_SPLITS and 2 * splits * programs <= room and steps >= 8 * splits:
        splits *= 2
    return ConvTiles(tile_m, tile_n, tile_k, flat, splits, num_warps, stages_that_fit(stage, 0, limits))


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
    m: int,
    n: int,
    k: int,
    taps: int,
    *,
    groups: int,
    operand_bytes: int,
    precision: str,
    limits: Limits,
    block: tuple[int, int] | None = None,
) -> ConvGradTiles:
    """The configuration of `grad.py`: m positions, n results and k reduced channels a group of the forward.

    A convolution's weight is small and its positions are many: nearly always the positions are split, so that every
    multiprocessor has some. The other arguments are as in `conv_tiles`.
    """
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
    # Of indexed blocks, how many there are is known on the device alone: parts for when about half are.
    wanted = limits.multiprocessors * (8 // num_warps) * (1 if block is None else 2) // programs
    splits = max(1, min(wanted, -(-m // tile_m) // LEAST_TILES))
    stage = tile_m * (tile_n + tile_k) * operand_bytes
    subtiles = max(1, min(4, tile_k // 32))
    return ConvGradTiles(tile_m, tile_n, tile_k, flat, splits, subtiles, num_warps, stages_that_fit(stage, 0, limits))
