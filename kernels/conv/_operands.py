"""What the convolutions demand of their operands, and images in the memory order that their kernels read.

Every check raises ValueError before anything is computed. The weight is a matrix [F, kh kw C/groups] with its columns
in the order (kh, kw, in), so that a block [r, c] of a topology (`block/topology.py`) lies inside one kernel position
and one group.
"""

# B images of C x H x W   F output channels

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .._operands import FLOATS, check_triton_dtype, expect
from ..block.topology import check_index
from ..fused._operands import check_fused
from ..weight.view import View
from .geometry import Geometry

__all__ = ["Blocks", "as_image", "channels_last", "check_blocks", "check_conv", "check_image", "image_like", "padded"]


@dataclass(frozen=True)
class Blocks:
    """The blocks that a product visits.

    Attributes:
        index: of their flags (`block/topology.py`).
        sides: (output, input) channels of a block.
    """

    index: Tensor
    sides: tuple[int, int]

    def grid(self, weight: Tensor) -> tuple[int, int]:
        """Blocks along each axis of the matrix."""
        return weight.shape[0] // self.sides[0], weight.shape[1] // self.sides[1]

    def input_grid(self, weight: Tensor, geometry: Geometry) -> tuple[int, int]:
        """Blocks along each axis of `Geometry.input_flags`."""
        rows, columns = self.grid(weight)
        return geometry.groups * columns // geometry.taps, geometry.taps * rows // geometry.groups


def as_image(matrix: Tensor, geometry: Geometry) -> Tensor:
    """A matrix of the weight's shape as `[F, C/groups, kh, kw]`; a view, channels-last."""
    return matrix.unflatten(1, (*geometry.kernel, -1)).permute(0, 3, 1, 2)


def channels_last(image: Tensor) -> Tensor:
    """The image itself where neighbours in memory are channels, else a copy in which they are."""
    if image.shape[1] == 1 or image.stride(1) == 1:
        return image
    return image.contiguous(memory_format=torch.channels_last)


def image_like(other: Tensor, channels: int, image: tuple[int, int]) -> Tensor:
    """Memory for images `[B, channels, *image]`, channels-last, of another's batch, dtype and device."""
    return other.new_empty((other.shape[0], *image, channels)).permute(0, 3, 1, 2)


def padded(x: Tensor, geometry: Geometry) -> Tensor:
    """x with the convolution's zeros around it."""
    top, left, bottom, right = geometry.padding
    return F.pad(x, (left, right, top, bottom)) if any(geometry.padding) else x


def check_conv(
    function: str, weight: Tensor, view: View, geometry: Geometry, blocks: Blocks | None, backend: str
) -> None:
    """Refuse a view that does not fit its weight, or blocks that straddle kernel positions or groups."""
    check_fused(function, weight, view, backend)
    if view.kind == "step":
        raise ValueError(
            f'{function}: expected kind "soft", "hard" or "mask", got "step"; pass effective_weight to conv2d'
        )
    if weight.shape[0] % geometry.groups or weight.shape[1] % geometry.taps:
        raise ValueError(
            f"{function}: expected weight [F, {geometry.taps} C] with F a multiple of {geometry.groups} groups, got "
            f"{list(weight.shape)}; pass the matrix of this convolution"
        )
    if blocks is None:
        return
    if view.kind != "mask":
        raise ValueError(f'{function}: expected kind "mask" with a topology, got {view.kind!r}; leave the topology out')
    n, k = weight.shape[0] // geometry.groups, weight.shape[1] // geometry.taps
    if any(side < 16 or side % 16 for side in blocks.sides) or n % blocks.sides[0] or k % blocks.sides[1]:
        raise ValueError(
            f"{function}: expected blocks whose sides are multiples of 16 and divide the {n} output and {k} input "
            f"channels of a group, got {list(blocks.sides)}; leave the topology out, or use other blocks"
        )


def check_blocks(function: str, weight: Tensor, blocks: Blocks, grid: tuple[int, int]) -> None:
    """Refuse an index that is not of a grid of blocks, or not on the weight's device."""
    check_index(function, blocks.index, *grid)
    expect(
        blocks.index.device == weight.device, function, f"index on {weight.device}", blocks.index,
        "build the topology on the weight's device",
    )  # fmt: skip


def check_image(function: str, name: str, image: Tensor, channels: int, weight: Tensor, backend: str) -> None:
    """Refuse what is no batch of images `[B, channels, H, W]` on the weight's device."""
    expect(
        image.dim() == 4 and image.shape[1] == channels and image.dtype in FLOATS and image.device == weight.device,
        function,
        f"{name} to be floating-point [B, {channels}, H, W] on {weight.device}",
        image,
        "pass a batch of images, with the channels that this weight multiplies",
    )
    check_triton_dtype(function, name, image.dtype, backend)
