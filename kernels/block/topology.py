"""Where the kept blocks of a weight lie: flags of its masks, and the indices that products walk.

A method writes masks of elements that are constant on blocks of r x c. Products of blocks read a `Topology` of them:
flags [R, C] of kept blocks, R = ceil(N/r) and C = ceil(K/c), and an int32 index of fixed size (`_index.py`), so that
blocks that move change no shape, no launch and no captured graph.
"""
# N, K: rows and columns of the weight as a matrix, outputs by inputs. R, C: rows and columns of its blocks

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from .._operands import expect
from .._triton import INTERPRETED
from ._index import (
    IndexTable,
    build_index_reference,
    build_indices,
    check_index,
    empty_index,
    index_size,
    sections,
)

__all__ = [
    "IndexTable",
    "Topology",
    "block_flags",
    "build_index_reference",
    "build_indices",
    "check_index",
    "grid_of",
    "index_size",
    "mask_versions",
    "sections",
]

MaskVersions = tuple[tuple[Tensor | None, int], ...]
Turn = Callable[[Tensor], Tensor | None]


@dataclass(eq=False)
class Topology:
    """The kept blocks of one weight.

    Attributes:
        block: rows and columns of a block, r and c.
        flags: `[R, C]`, bool, which blocks are kept.
        index: int32, of `flags`.
        grad_index: int32, of the blocks that get a gradient: the kept ones and those of the set B. None without a B.
        input_index: int32, of `flags` in the order in which the gradient of a convolution's input walks them. None of a
            linear layer, which walks the columns of `index`.
        versions: the masks that all of these were made of, as `mask_versions` gives them; may be rewritten.
        grad_flags, input_flags: bool, what `grad_index` and `input_index` are built of.

    Example:
        >>> import torch
        >>> from tritonsparse.kernels.block.topology import Topology
        >>> mask = torch.tensor([[0, 0, 1, 1]]).bool()
        >>> topology = Topology.of(mask, None, (1, 2))
        >>> topology.flags, topology.is_current(mask, None)
        (tensor([[False,  True]]), True)
        >>> mask[:, :2] = True
        >>> topology.is_current(mask, None)
        False
    """

    block: tuple[int, int]
    flags: Tensor
    index: Tensor
    grad_index: Tensor | None = None
    input_index: Tensor | None = None
    versions: MaskVersions = field(default=(), repr=False)
    grad_flags: Tensor | None = field(default=None, repr=False)
    input_flags: Tensor | None = field(default=None, repr=False)

    @classmethod
    def allocate(
        cls, mask: Tensor, grad_mask: Tensor | None, block: tuple[int, int], *, turn: Turn | None = None
    ) -> Topology:
        """The flags of these masks, and memory for their indices, which is not written; arguments as in `of`."""
        kept, wanted, turned = _flags(mask, grad_mask, block, turn)
        return cls(
            block,
            kept,
            empty_index(kept),
            None if wanted is None else empty_index(wanted),
            None if turned is None else empty_index(turned),
            mask_versions(mask, grad_mask),
            wanted,
            turned,
        )

    @classmethod
    def of(
        cls, mask: Tensor, grad_mask: Tensor | None, block: tuple[int, int], *, turn: Turn | None = None
    ) -> Topology:
        """The topology of masks, in new tensors: flags by PyTorch, indices by Triton on a GPU or in the interpreter.

        Args:
            mask: `[N, K]`, bool, any strides, True = kept; for a weight stored `[K, N]` its transpose.
            grad_mask: the set B, as `mask`; its blocks get a gradient as the kept ones do. None = no set.
            block: rows and columns of a block.
            turn: from flags to those of `input_index`, for a convolution; of a linear layer None, or what returns None.

        Raises:
            ValueError: a mask is no bool matrix, masks differ in shape or device, or the block has an empty side.
            RuntimeError: masks on a GPU where Triton is not installed.
        """
        topology = cls.allocate(mask, grad_mask, block, turn=turn)
        backend = "triton" if INTERPRETED or mask.is_cuda else "torch"
        flags, indices = zip(*topology.pairs(), strict=True)
        build_indices(flags, indices, backend)
        return topology

    def pairs(self) -> list[tuple[Tensor, Tensor]]:
        """(flags, index) of each index, for an `IndexTable` over many layers."""
        both = ((self.flags, self.index), (self.grad_flags, self.grad_index), (self.input_flags, self.input_index))
        return [(flags, index) for flags, index in both if flags is not None and index is not None]

    def rewrite(self, mask: Tensor, grad_mask: Tensor | None, *, turn: Turn | None = None) -> bool:
        """Write the flags of other masks over the old ones; indices are the caller's to build (`pairs`).

        Returns:
            Whether they fit: False, and nothing is written, where shapes, device or the number of indices differ.
        """
        new = [flags for flags in _flags(mask, grad_mask, self.block, turn) if flags is not None]
        old = [flags for flags, _ in self.pairs()]
        if [(flags.shape, flags.device) for flags in old] != [(flags.shape, flags.device) for flags in new]:
            return False
        for flags, written in zip(old, new, strict=True):
            flags.copy_(written)
        self.versions = mask_versions(mask, grad_mask)
        return True

    def is_current(self, mask: Tensor | None, grad_mask: Tensor | None) -> bool:
        """Whether these are the masks it was made of, unwritten since: told on the host, by identity and version."""
        now = mask_versions(mask, grad_mask)
        return len(self.versions) == len(now) and all(
            old is new and before == after for (old, before), (new, after) in zip(self.versions, now, strict=True)
        )


def mask_versions(mask: Tensor | None, grad_mask: Tensor | None) -> MaskVersions:
    """The masks themselves and how often each was written.

    A view of all of a mask, such as its transpose, counts as the mask: it is written where the mask is. The tensors are
    held on to, since another mask may get the id of a freed one.
    """
    return tuple((None, -1) if each is None else (_whole(each), each._version) for each in (mask, grad_mask))


def _whole(mask: Tensor) -> Tensor:
    base = mask._base
    return mask if base is None or base.numel() != mask.numel() else base


def _flags(
    mask: Tensor, grad_mask: Tensor | None, block: tuple[int, int], turn: Turn | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Flags of kept blocks, of those that get a gradient, and of kept ones turned; None where not asked for."""
    kept = block_flags(mask, block)
    wanted = None
    if grad_mask is not None:
        expect(
            grad_mask.shape == mask.shape and grad_mask.device == mask.device,
            "Topology",
            f"grad_mask of {list(mask.shape)} on {mask.device}, as the mask",
            grad_mask,
            "make both of the weight's shape",
        )
        wanted = kept | block_flags(grad_mask, block)
    return kept, wanted, None if turn is None else turn(kept)


def block_flags(mask: Tensor, block: tuple[int, int]) -> Tensor:
    """Which blocks hold an element that is kept.

    Args:
        mask: `[N, K]`, bool, any strides, True = kept; for a weight stored `[K, N]` its transpose.
        block: rows and columns of a block, r and c; blocks at the far edges may be smaller.

    Returns:
        `[ceil(N/r), ceil(K/c)]`, bool, contiguous, newly allocated.

    Raises:
        ValueError: the mask is no bool matrix, or the block has an empty side.

    Example:
        >>> import torch
        >>> from tritonsparse.kernels.block.topology import block_flags
        >>> block_flags(torch.tensor([[0, 0, 0, 1], [0, 0, 0, 0]]).bool(), (2, 2))
        tensor([[False,  True]])
    """
    expect(
        mask.dim() == 2 and mask.dtype == torch.bool,
        "block_flags",
        "mask to be a bool matrix [N, K]",
        mask,
        "pass True where kept",
    )
    rows, columns = grid_of("block_flags", tuple(mask.shape), block)
    r, c = block
    ragged = (0, columns * c - mask.shape[1], 0, rows * r - mask.shape[0])
    padded = F.pad(mask, ragged) if any(ragged) else mask
    return padded.reshape(rows, r, columns, c).any(dim=3).any(dim=1)


def grid_of(function: str, shape: tuple[int, ...], block: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of blocks of a weight [N, K]; refuses a block that has none."""
    if len(block) != 2 or min(block) < 1:
        raise ValueError(
            f"{function}: expected block to be (rows, columns) of at least 1, got {block}; pass for example (64, 64)"
        )
    return -(-shape[0] // block[0]), -(-shape[1] // block[1])
