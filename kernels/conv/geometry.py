"""A convolution's geometry, and how a product walks its images.

    forward    Y[b, o, f]  = sum over t, c of  X[b, o s - p + t d, c]  S(W)[f, t, c]
    grad input dX[b, h, c] = sum over t, f of dY[b, o, f] S(W)[f, t, c]     where  o s = h + p - t d

along each axis of the image, with stride s, padding p before it, dilation d and t a kernel position. A strided
convolution's h fall into s phases; in a phase the positions t that divide are every (s / gcd(s, d))-th, and what is
left is the forward's form with stride 1.
"""

# R, C rows and columns of a weight's blocks   T kernel positions

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

__all__ = ["Geometry", "Walk", "Walks"]


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
        """From sequences of any kind, as modules keep them."""
        top, left, bottom, right = padding
        (kh, kw), (sh, sw), (dh, dw) = kernel, stride, dilation
        return cls((kh, kw), (sh, sw), (top, left, bottom, right), (dh, dw), groups)

    @classmethod
    def of_numbers(cls, numbers: Sequence[int]) -> Geometry:
        """`numbers` undone."""
        return cls.of(numbers[:2], numbers[2:4], numbers[4:8], numbers[8:10], numbers[10])

    @property
    def numbers(self) -> list[int]:
        """All of it in one list, as a custom op takes it."""
        return [*self.kernel, *self.stride, *self.padding, *self.dilation, self.groups]

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

    def input_flags(self, flags: Tensor) -> Tensor:
        """The flags of a weight's blocks as the input gradient walks them: `Topology.of`'s `turn`.

        Args:
            flags: `[R, T C]`, bool: blocks of output channels by (kernel position, block of input channels); groups
                divide R.

        Returns:
            `[groups C, T R / groups]`: blocks of input channels by (kernel position, block of a group's outputs);
            contiguous.
        """
        rows, columns = flags.shape
        split = flags.reshape(self.groups, rows // self.groups, self.taps, columns // self.taps)
        return split.permute(0, 3, 2, 1).reshape(self.groups * split.shape[3], -1).contiguous()


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


def phases(kernel: int, stride: int, padding: int, dilation: int, apart: bool) -> tuple[Walk, ...]:
    """The input gradient's, along one axis: one a phase, or (not `apart`) one for all with positions that divide.

    A phase none of whose positions divides has no taps, and its gradient is zero.
    """
    if not apart or stride == 1:
        return (Walk(0, 1, 1, padding, -dilation, stride, kernel, 0, 1),)
    walks = []
    # t and t + apart_by fall on the same phase.
    apart_by = stride // math.gcd(stride, dilation)
    for first in range(stride):
        taps = [t for t in range(kernel) if (first + padding - t * dilation) % stride == 0]
        offset = (first + padding - taps[0] * dilation) // stride if taps else 0
        step = -(apart_by * dilation) // stride
        walks.append(Walk(first, stride, 1, offset, step, 1, len(taps), taps[0] if taps else 0, apart_by))
    return tuple(walks)


@dataclass(frozen=True)
class Walks:
    """All walks of one product.

    Attributes:
        geometry: of the convolution.
        down, along: those of the two axes; every pair of them is a part of the result.
        exchanged: the product is dX's: it results in what the forward reduces over.
    """

    geometry: Geometry
    down: tuple[Walk, ...]
    along: tuple[Walk, ...]
    exchanged: bool

    @classmethod
    def forward(cls, geometry: Geometry) -> Walks:
        """One walk an axis."""
        down, along = (
            Walk(0, 1, geometry.stride[axis], -geometry.padding[axis], geometry.dilation[axis], 1, size, 0, 1)
            for axis, size in enumerate(geometry.kernel)
        )
        return cls(geometry, (down,), (along,), False)

    @classmethod
    def grad_input(cls, geometry: Geometry, apart: bool) -> Walks:
        """`apart`: a walk a phase. Blocks are listed for all kernel positions together, and walked at once."""
        down, along = (
            phases(size, geometry.stride[axis], geometry.padding[axis], geometry.dilation[axis], apart)
            for axis, size in enumerate(geometry.kernel)
        )
        return cls(geometry, down, along, True)
