"""Embeddings kept sparse beside the layers: held masks on the tables, tied output layers included.

    W = 0 outside the mask, gradient 0 and optimizer state 0 there      while the layers' views are sparse

A table has no view: an embedding is a look-up, and where it is tied, the output layer multiplies by the same Parameter.
So the zeros are put into the Parameter itself, by magnitude and with an exact count a table, and both uses see them.
The masks follow the method's phases: chosen when the layers become sparse, dropped when they become dense. As with
AC/DC's layers, a mask is chosen after the last dense step, while the zeros are written after the first sparse one: at
the boundary W is the dense twin. Unlike a layer's, the first forward of a sparse phase still sees the whole table.

AC/DC prunes Transformer-XL's embeddings to 50 % in separate rows of its table (Peste et al., arXiv:2106.12379, section
4.3), without saying how; its main rows leave them dense.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..optimizer_state import clear_state
from .topk import check_sparsity, kept_count, topk_mask

__all__ = ["EmbeddingMasks"]


class EmbeddingMasks:
    """The masks of a model's `nn.Embedding` tables.

    Args:
        model: its tables are found by identity, so that a tied one counts once; those that train take part.
        sparsity: of every table, in [0, 1).

    Attributes:
        tables: name of each table's Parameter -> the Parameter.
        masks: the same names -> bool, shape of the table, True = kept; empty in a dense phase.

    Raises:
        ValueError: the sparsity is outside [0, 1), or the model has no table that trains.
    """

    def __init__(self, model: nn.Module, sparsity: float) -> None:
        self.sparsity = check_sparsity("sparsify", sparsity)
        self.tables: dict[str, Tensor] = {}
        held: set[int] = set()
        for name, module in model.named_modules():
            if isinstance(module, nn.Embedding) and module.weight.requires_grad and id(module.weight) not in held:
                held.add(id(module.weight))
                self.tables[f"{name}.weight" if name else "weight"] = module.weight
        if not self.tables:
            raise ValueError(
                "sparsify: expected an embedding that trains for embedding_sparsity, got none in this model; leave it "
                "out"
            )
        self.masks: dict[str, Tensor] = {}

    @torch.no_grad()
    def follow(self, sparse: bool) -> None:
        """The coming step's layers are sparse, or all dense: choose masks, or drop them.

        What the optimizer remembers of a sparse phase is the method's to forget (AC/DC's `reset_moments`).
        """
        if sparse and not self.masks:
            for name, table in self.tables.items():
                self.masks[name] = topk_mask(table.detach().abs(), kept_count(table.numel(), self.sparsity))
        elif not sparse:
            self.masks = {}

    @torch.no_grad()
    def mask_gradients(self) -> None:
        """Before a step: nothing outside the masks moves."""
        for name, table, mask in self._masked():
            if table.grad is not None:
                table.grad.masked_fill_(~self._beside(name, mask, table), 0.0)

    @torch.no_grad()
    def hold(self, optimizer: Optimizer) -> None:
        """After a step: zero outside the masks, in the tables and in the optimizer's state."""
        for name, table, mask in self._masked():
            pruned = ~self._beside(name, mask, table)
            table.masked_fill_(pruned, 0.0)
            clear_state(optimizer, table, pruned)

    @torch.no_grad()
    def bake(self) -> None:
        """Write the zeros into the tables."""
        for name, table, mask in self._masked():
            table.masked_fill_(~self._beside(name, mask, table), 0.0)

    @torch.no_grad()
    def apply(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`state_dict` with the masks on every key that is a table, under whichever of its names."""
        by_place = {table.data_ptr(): self._beside(name, mask, table) for name, table, mask in self._masked()}
        return {
            key: torch.where(mask, value, 0.0) if (mask := by_place.get(value.data_ptr())) is not None else value
            for key, value in state_dict.items()
        }

    def measured(self) -> float:
        """Zeros among the tables' elements as they stand, under the masks."""
        kept = sum(
            int(torch.count_nonzero(table if name not in self.masks else table * self.masks[name]))
            for name, table in self.tables.items()
        )
        return 1.0 - kept / sum(table.numel() for table in self.tables.values())

    def state_dict(self) -> dict[str, Tensor]:
        """The masks."""
        return dict(self.masks)

    def load_state_dict(self, masks: Mapping[str, Tensor]) -> None:
        """Restore `state_dict`.

        Raises:
            ValueError: a mask is of no table, or of another shape; nothing has been changed then.
        """
        for name, mask in masks.items():
            if name not in self.tables or mask.shape != self.tables[name].shape:
                raise ValueError(
                    f"load_state_dict: expected embedding masks of {sorted(self.tables)}, got {name!r} of shape "
                    f"{list(mask.shape)}; sparsify the model with the arguments of the run that was saved"
                )
        self.masks = {name: mask.to(self.tables[name].device) for name, mask in masks.items()}

    def _masked(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        for name, mask in list(self.masks.items()):
            yield name, self.tables[name], mask

    def _beside(self, name: str, mask: Tensor, table: Tensor) -> Tensor:
        if mask.device != table.device:
            mask = self.masks[name] = mask.to(table.device)
        return mask
