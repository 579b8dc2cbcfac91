"""Where the kept blocks of every layer lie, for products that skip the others; owned by the Sparsifier.

    write    flags [R, C] of each mask, and of each set B -> their indices (kernels/block/topology.py), all layers of a
             device together; only layers whose masks have changed since

Written when the Sparsifier is made, after every real step, after loading and by `Sparsifier.refresh()`; never in a
forward. Tensors stay where they are and of the size they are, so CUDA graphs may hold them and torch.compile sees no
change. Whether a mask has changed is read from its version counter on the host, without waiting for the device. A layer
whose masks were edited in between makes a topology for that forward alone.

Under "auto" a layer of blocks on a GPU skips them while its density is one at which that was measured faster than dense
(layers/backend.py); it is asked again whenever its masks have changed a hundred times.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from .kernels.block.topology import IndexTable, Topology, mask_versions
from .layers import SparseLayer
from .layers.backend import follow_density

__all__ = ["Topologies"]

# Changes of a mask between two decisions of `auto`, each of which waits for the device once.
DECIDE_EVERY = 100


class Topologies:
    """The topologies of one model's layers whose back end is "block".

    Args:
        layers: name -> sparse layer; others are left alone.
    """

    def __init__(self, layers: Mapping[str, SparseLayer]) -> None:
        self.layers = list(layers.values())
        # Changes seen since `auto` last decided, by place in `layers`.
        self._changes = [DECIDE_EVERY] * len(self.layers)
        # The masks as they were seen last, also of layers without a topology: the next change is told from them.
        self._seen: list[Any] = [()] * len(self.layers)
        # What was made, by place in `layers`; all of a device's indices with their addresses there.
        self._made: dict[int, Topology] = {}
        self._tables: dict[torch.device, IndexTable] = {}

    @torch.no_grad()
    def write(self) -> None:
        """Rewrite what no longer says where the masks are."""
        changed = set()
        for number, layer in enumerate(self.layers):
            if layer.kind != "mask" or layer.compacted:
                continue
            assert layer.mask is not None  # kind "mask"
            if layer.topology is None and layer.backend.name == "block":
                # Moved, copied or expanded since.
                self._seen[number] = ()
            if _same(self._seen[number], now := mask_versions(layer.mask, layer.grad_mask)):
                continue
            self._decide(number)
            self._seen[number] = now
            if layer.backend.name == "block":
                self._write(number)
                changed.add(layer.weight.device)
        for device in changed:
            pairs = [pair for made in self._made.values() for pair in made.pairs() if pair[0].device == device]
            table = self._tables.get(device)
            if table is None or [id(index) for index in table.indices] != [id(index) for _, index in pairs]:
                # Once a topology's tensors change, not when it does: this writes their addresses to the device.
                table = IndexTable([flags for flags, _ in pairs], [index for _, index in pairs], "triton")
                self._tables[device] = table
            table.build()

    def _write(self, number: int) -> None:
        """Write the flags of a layer's masks, in place where they fit; their indices come after."""
        layer, made = self.layers[number], self._made.get(number)
        masks, block = layer.mask_matrices(), layer.block
        assert block is not None  # backend "block"
        if layer.topology is None or made is None or not made.rewrite(*masks, turn=layer.input_flags):
            made = Topology.allocate(*masks, block, turn=layer.input_flags)
        made.versions = mask_versions(layer.mask, layer.grad_mask)
        self._made[number] = layer.topology = made

    def _decide(self, number: int) -> None:
        layer = self.layers[number]
        block = layer.block
        if not layer.follows_density or block is None:
            return
        self._changes[number] += 1
        if self._changes[number] <= DECIDE_EVERY:
            return
        self._changes[number] = 0
        n, k = layer.oriented(layer.weight).shape
        density = layer.kept_count() / layer.weight.numel()
        layer.backend = follow_density(layer.backend, layer.weight, (n, k), block, density)


def _same(old: Any, new: Any) -> bool:
    return len(old) == len(new) and all(a is b and i == j for (a, i), (b, j) in zip(old, new, strict=True))
