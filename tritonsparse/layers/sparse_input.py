"""A layer's sparse input (SWAT): how much of it the weight's gradient sees, and what the last forwards found."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..kernels.activation.packing import Packing

__all__ = ["SparseInput"]


@dataclass(eq=False)
class SparseInput:
    """How a layer packs the input that it saves for its weight's gradient; the method writes it.

    Attributes:
        density: the share of the input that dW is made of, in (0, 1]; at 1 the layer saves its input as it is.
        scope: what a cut-off is common to: "batch", "sample" or "plane".
        slack: room for packed values over what the density needs.
        remembers: keep the last forward's cut-off in `last_cutoff`.
        cutoff: use this one; None = each batch's exact one.
        row_masks: which rows of a batch are tokens (`Sparsifier.set_row_mask`).
        last_cutoff: of the last forward, where it is remembered.
        overflows: batches that kept more than there was room for; they were saved whole.
        last_overflow: a compiled forward's, to be added to `overflows` after the step.
    """

    density: float = 1.0
    scope: str = "batch"
    slack: float = 1.25
    remembers: bool = False
    cutoff: Tensor | None = None
    row_masks: list[Tensor] = field(default_factory=list)
    last_cutoff: Tensor | None = None
    overflows: int = 0
    last_overflow: Tensor | None = None

    def packing(self, rows: torch.Size | None = None) -> Packing:
        """What the kernels are told of a batch; `rows` are the leading dimensions of x, where rows are counted."""
        return Packing(self.density, self.scope, self.slack, self.cutoff, None if rows is None else self._counted(rows))

    def _counted(self, rows: torch.Size) -> Tensor | None:
        """The masks of that shape, together; None where there is none."""
        counted = None
        for mask in self.row_masks:
            if mask.shape == rows:
                counted = mask if counted is None else counted | mask
        return counted

    def note(self, cutoff: Tensor, overflow: Tensor) -> None:
        """Keep what a packing forward reports, for the method to read after the step."""
        if self.remembers:
            self.last_cutoff = cutoff
        if torch.compiler.is_compiling():
            # A graph cannot add to a number of Python's, but it can leave the tensor behind.
            self.last_overflow = overflow
        else:
            self.overflows += int(overflow)

    def take_overflow(self) -> int:
        """`overflows`, with what compiled forwards left behind."""
        if self.last_overflow is not None:
            self.overflows += int(self.last_overflow)  # on the CPU: no sync
            self.last_overflow = None
        return self.overflows

    def to(self, device: torch.device) -> None:
        """Follow the layer to another device."""
        self.cutoff = None if self.cutoff is None else self.cutoff.to(device)
        self.row_masks = [mask.to(device) for mask in self.row_masks]
