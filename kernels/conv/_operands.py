"""What the convolutions demand of their operands, and their view with blocks left out, in PyTorch.

Shared by `gemm.py`, `grad.py` and `conv2d.py`; every check raises ValueError before anything is
computed. The weight is a matrix [F, kh kw C/groups] with its columns in the order (kh, kw, in), so that a block
[r, c] of an index (`block/topology.py`) lies inside one kernel position and one group.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._operands import FLOATS, check_operands, check_triton_dtype, expect
from ..weight.forward import view_reference
from ._tiles import Geometry

__all__ = [
    "Block", "as_image", "blocks_of", "channels_last", "check_conv_view", "check_image", "conv_view", "image_like",
    "input_blocks", "input_flags", "kept_blocks", "on_blocks",
]  # fmt: skip

Block = tuple[int, int]


def input_flags(flags: Tensor, geometry: Geometry) -> Tensor:
    """The flags of a weight's blocks as the input gradient walks them.

    Args:
        flags: `[R, T C]`, bool: blocks of output channels by (kernel position, block of input channels).
        geometry: of the convolution, whose kernel has T positions and whose groups divide R.

    Returns:
        `[groups C, T R / groups]`: blocks of input channels by (kernel position, block of a group's outputs);
        contiguous. `block_topology.build_indices` of it is the `index` that `conv_grad_input` takes. Its own inverse,
        with the two kinds of channels exchanged.
    """
    rows, columns = flags.shape
    split = flags.reshape(geometry.groups, rows // geometry.groups, geometry.taps, columns // geometry.taps)
    return split.permute(0, 3, 2, 1).reshape(geometry.groups * split.shape[3], -1)


def kept_blocks(index: Tensor, rows: int, columns: int) -> Tensor:
    """The flags `[rows, columns]` that an index lists (`block/topology.py`), without asking the device."""
    ends, listed = index[1 : rows + 1], index[rows + 1 : rows + 1 + rows * columns]
    place = torch.arange(rows * columns, dtype=index.dtype, device=index.device)
    # Beyond the last block: the entry after the flags, which is dropped.
    row = torch.searchsorted(ends.contiguous(), place, right=True)
    flat = torch.where(row < rows, row * columns + listed, rows * columns)
    flags = torch.zeros(rows * columns + 1, dtype=torch.bool, device=index.device)
    return flags.scatter_(0, flat, True)[:-1].reshape(rows, columns)


def blocks_of(weight: Tensor, block: Block) -> tuple[int, int]:
    """Blocks along each axis of the matrix."""
    return weight.shape[0] // block[0], weight.shape[1] // block[1]


def input_blocks(weight: Tensor, block: Block, geometry: Geometry) -> tuple[int, int]:
    """Blocks along each axis of `input_flags`."""
    rows, columns = blocks_of(weight, block)
    return geometry.groups * columns // geometry.taps, geometry.taps * rows // geometry.groups


def on_blocks(flags: Tensor, block: Block) -> Tensor:
    """Flags `[R, C]` of blocks as bools of their elements, `[R r, C c]`."""
    return flags.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)


def as_image(matrix: Tensor, geometry: Geometry) -> Tensor:
    """A matrix of the weight's shape as `[F, C/groups, kh, kw]`; a view, channels-last."""
    return matrix.unflatten(1, (*geometry.kernel, -1)).permute(0, 3, 1, 2)


def channels_last(image: Tensor) -> Tensor:
    """The image itself where neighbours in memory are channels, else a copy in which they are."""
    if image.shape[1] == 1 or image.stride(1) == 1:
        return image
    return image.contiguous(memory_format=torch.channels_last)


def image_like(other: Tensor, batch: int, channels: int, image: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Memory for images `[batch, channels, *image]`, channels-last, on the device of another tensor."""
    return other.new_empty((batch, *image, channels), dtype=dtype).permute(0, 3, 1, 2)


def conv_view(
    weight: Tensor,
    threshold: Tensor | None,
    mask: Tensor | None,
    flags: Tensor | None,
    block: Block | None,
    kind: str,
    out_dtype: torch.dtype,
) -> Tensor:
    """The definition of the view: `view_reference`, and zero outside the blocks whose flags are True."""
    if flags is not None and block is not None:
        listed = on_blocks(flags, block)
        if kind == "mask":
            mask = listed if mask is None else mask & listed
        else:
            return torch.where(listed, view_reference(weight, threshold, None, kind, out_dtype), 0.0)
    return view_reference(weight, threshold, mask, kind, out_dtype)


def check_conv_view(
    function: str,
    weight: Tensor,
    threshold: Tensor | None,
    masks: dict[str, Tensor | None],
    index: Tensor | None,
    block: Block | None,
    geometry: Geometry,
    kind: str,
    backend: str,
) -> None:
    """Refuse a view that does not fit its weight, or an index whose blocks straddle kernel positions or groups."""
    if kind == "step":
        raise ValueError(
            f'{function}: expected kind "soft", "hard" or "mask", got "step"; use backend="triton", which has the view '
            f"beside the product"
        )
    if (index is None) != (block is None):
        given = "an index" if block is None else "a block"
        raise ValueError(f"{function}: expected index and block together, got only {given}; pass both or neither")
    stand_in = dict(masks)
    if kind == "mask" and index is not None and masks["mask"] is None and weight.dim() == 2:
        # The index says which blocks are kept, and that may be all.
        stand_in["mask"] = weight.new_empty((), dtype=torch.bool).expand(weight.shape)
    check_operands(function, weight, threshold, stand_in, kind, backend)
    if threshold is not None and threshold.dim() != 1:
        raise ValueError(
            f"{function}: expected threshold of shape [1] or [{weight.shape[0]}], got {list(threshold.shape)}; "
            f'use backend="triton", which has the view beside the product'
        )
    if weight.shape[0] % geometry.groups or weight.shape[1] % geometry.taps:
        raise ValueError(
            f"{function}: expected weight [F, {geometry.taps} C] with F a multiple of {geometry.groups} groups, got "
            f"{list(weight.shape)}; pass the matrix of this convolution"
        )
    if index is None or block is None:
        return
    n, k = weight.shape[0] // geometry.groups, weight.shape[1] // geometry.taps
    if any(side < 16 or side % 16 for side in block) or n % block[0] or k % block[1]:
        raise ValueError(
            f"{function}: expected blocks whose sides are multiples of 16 and divide the {n} output and {k} input "
            f"channels of a group, got {list(block)}; leave the index out, or use other blocks"
        )


def check_image(function: str, name: str, image: Tensor, channels: int, weight: Tensor, backend: str) -> None:
    """Refuse what is no batch of images `[B, channels, H, W]` beside the weight."""
    expect(
        image.dim() == 4 and image.shape[1] == channels and image.dtype in FLOATS and image.device == weight.device,
        function,
        f"{name} to be floating-point [B, {channels}, H, W] on {weight.device}",
        image,
        "pass a batch of images, with the channels that this weight multiplies",
    )
    check_triton_dtype(function, name, image.dtype, backend)
