"""Where the kept blocks of every layer lie, for products that skip the others; owned by the Sparsifier.

    write    flags [R, C] of each mask, and of each set B -> their indices (kernels/block/topology.py), all layers of a
             device together; only layers whose masks have changed since

Written when the Sparsifier is made, after every real step, after loading and by `Sparsifier.refresh()`; never in a
forward. Tensors stay where they are and of the size they are, so CUDA graphs may hold them and torch.compile sees no
change. Whether a mask has changed is read from its version counter on the host, without waiting for the device. A layer
whose masks were edited in between makes an index for that forward alone.

Under "auto" a layer of blocks on a GPU skips them while its density is one at which that was measured faster than dense
(kernels/block/plan.py); it is asked again whenever its masks have changed a hundred times.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .kernels.block.plan import block_choice
from .kernels.block.topology import IndexTable, block_flags, build_indices, index_size

if TYPE_CHECKING:
    from .layers import SparseLayer

__all__ = ["BlockIndices", "MaskVersions", "fresh_index", "index_of", "is_indexed", "mask_versions"]

MaskVersions = tuple[tuple[Tensor | None, int], ...]

# Changes of a mask between two decisions of `auto`, each of which waits for the device once.
DECIDE_EVERY = 100


def mask_versions(layer: SparseLayer) -> MaskVersions:
    """The masks and how often each was written."""
    return tuple((mask, -1 if mask is None else mask._version) for mask in (layer.mask, layer.grad_mask))


def is_indexed(layer: SparseLayer) -> bool:
    """Whether the layer's masks are those that its index was made of, unwritten since.

    Told by the tensors themselves, which the layer therefore holds on to: the next mask may get a freed one's id.
    """
    now = mask_versions(layer)
    return len(layer.index_versions) == len(now) and all(
        old is new and before == after for (old, before), (new, after) in zip(layer.index_versions, now, strict=True)
    )


class BlockIndices:
    """The indices of one model's layers whose back end is "block".

    Args:
        layers: name -> sparse layer; others are left alone.
    """

    def __init__(self, layers: Mapping[str, SparseLayer]) -> None:
        self.layers = list(layers.values())
        # Changes seen since `auto` last decided, by place in `layers`.
        self._changes = [DECIDE_EVERY] * len(self.layers)
        # Flags and the index made of them, by place in `layers`; all of them by device, with their addresses there.
        self._pairs: dict[int, list[tuple[Tensor, Tensor]]] = {}
        self._tables: dict[torch.device, IndexTable] = {}

    @torch.no_grad()
    def write(self) -> None:
        """Rewrite what no longer says where the masks are."""
        changed = set()
        for number, layer in enumerate(self.layers):
            if layer.kind != "mask" or layer.compacted or is_indexed(layer):
                continue
            self._decide(number)
            # Also where another back end goes on without an index, so that the next change is told from none.
            layer.index_versions = mask_versions(layer)
            if layer.backend == "block":
                self._write_flags(number)
                assert layer.block_index is not None  # _write_flags
                changed.add(layer.block_index.device)
        for device in changed:
            pairs = [pair for pairs in self._pairs.values() for pair in pairs if pair[0].device == device]
            table = self._tables.get(device)
            if table is None or [id(index) for index in table.indices] != [id(index) for _, index in pairs]:
                # Once a topology's tensors change, not when it does: this writes their addresses to the device.
                table = IndexTable([flags for flags, _ in pairs], [index for _, index in pairs], "triton")
                self._tables[device] = table
            table.build()

    def _write_flags(self, number: int) -> None:
        """Write the flags of a layer's masks in place, and point the layer at the tensors of its indices."""
        layer = self.layers[number]
        kept, wanted = _flags(layer)
        turned = layer.input_flags(kept)
        fresh = [flags for flags in (kept, wanted, turned) if flags is not None]
        old = self._pairs.get(number, ())
        if layer.block_index is None or [(flags.shape, flags.device) for flags, _ in old] != [
            (flags.shape, flags.device) for flags in fresh
        ]:
            self._pairs[number] = [(flags, _empty_index(flags)) for flags in fresh]
        else:
            for (flags, _), new in zip(old, fresh, strict=True):
                flags.copy_(new)
        pairs = iter(self._pairs[number])
        layer.block_flags, layer.block_index = next(pairs)
        layer.grad_index = None if wanted is None else next(pairs)[1]
        layer.input_index = None if turned is None else next(pairs)[1]

    def _decide(self, number: int) -> None:
        layer = self.layers[number]
        if layer.backend_choice != "auto" or layer.block is None or not (layer.plans_blocks and layer.weight.is_cuda):
            return
        if layer.backend not in ("triton", "block") or layer.block[0] % 16 or layer.block[1] % 16:
            return
        self._changes[number] += 1
        if self._changes[number] <= DECIDE_EVERY:
            return
        self._changes[number] = 0
        n, k = layer.oriented(layer.weight).shape
        density = layer.kept_count() / layer.weight.numel()
        dtype = torch.bfloat16 if layer.weight.dtype == torch.float32 else layer.weight.dtype
        name = torch.cuda.get_device_name(layer.weight.device)
        skips, layer.backend_reason = block_choice(n, k, layer.block, density, dtype, name)
        layer.backend = "block" if skips else "triton"


def _empty_index(flags: Tensor) -> Tensor:
    return torch.empty(index_size(*flags.shape), dtype=torch.int32, device=flags.device)


def _flags(layer: SparseLayer) -> tuple[Tensor, Tensor | None]:
    """Which blocks are kept, and which get a gradient; None where those are the kept ones, or all."""
    assert layer.mask is not None and layer.block is not None  # kind "mask", back end "block"
    kept = block_flags(layer.oriented(layer.mask), layer.block)
    if layer.grad_mask is None:
        return kept, None
    return kept, kept | block_flags(layer.oriented(layer.grad_mask), layer.block)


@torch.no_grad()
def fresh_index(layer: SparseLayer) -> tuple[Tensor, Tensor | None, Tensor]:
    """(index, grad_index, kept flags) of the masks as they stand, in new tensors."""
    kept, wanted = _flags(layer)
    flags = [kept] if wanted is None else [kept, wanted]
    indices = index_of(*flags)
    return indices[0], indices[1] if len(indices) > 1 else None, kept


def index_of(*flags: Tensor) -> list[Tensor]:
    """An index of each of these flags, newly allocated."""
    indices = [_empty_index(flag) for flag in flags]
    build_indices(flags, indices, backend="triton")
    return indices
