"""A weight, the view it is seen through, and what moves the two together.

The mask is a buffer, all True while a method that holds masks is dense: whatever moves weights (state dicts, copies,
averages, ranks) moves it too. `grad_mask` and `alpha`, which say only where gradients go, are attributes.

    loaded without its mask       the mask stays if the new weight is 0 outside it; else it becomes the weight's zeros;
                                  a weight without zeros keeps the mask, with a warning at the next forward
    loaded without its threshold  the threshold stays, with that warning
    copied                        the view of the moment; it follows its mask, and no Sparsifier
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..kernels.block.topology import block_flags
from ..kernels.weight.power import power
from ..kernels.weight.reference import effective_weight_reference
from ..kernels.weight.view import View
from ..pattern import NM, Block, Channel, Pattern

__all__ = ["VIEW_TENSORS", "Viewed"]

VIEW_TENSORS = ("mask", "grad_mask", "alpha")


class Viewed(nn.Module):
    """A weight seen through a view (kernels/weight/view.py).

    Attributes:
        kind, threshold, mask, grad_mask, alpha: the view, as the method wrote it.
        exponent: the a of PowerPropagation, whose view is of W |W|^(a-1); None = of W.
        pattern: the shape of the masks.
        unseen: what a loaded weight came without; "" = nothing.
    """

    # Whether the weight is stored inputs by outputs.
    transposed: ClassVar[bool] = False

    weight: nn.Parameter
    threshold: nn.Parameter | None
    kind: str
    mask: Tensor | None
    grad_mask: Tensor | None
    alpha: Tensor | None
    exponent: float | None
    pattern: Pattern
    unseen: str = ""

    @property
    def view(self) -> View:
        """What the kernels are told; shares the layer's tensors."""
        return View(self.kind, self.threshold, self.mask, self.grad_mask, self.alpha)

    def powered(self, weight: Tensor) -> Tensor:
        """What the view is taken of: the weight, or its power where an exponent is set; differentiable."""
        return weight if self.exponent is None else power(weight, self.exponent)

    @property
    def block(self) -> tuple[int, int] | None:
        """Rows and columns of the blocks that the masks consist of; None = elements."""
        return (self.pattern.rows, self.pattern.columns) if isinstance(self.pattern, Block) else None

    def oriented(self, tensor: Tensor) -> Tensor:
        """A tensor of the weight's shape as [N, K], outputs by inputs; a view that shares its memory."""
        return tensor.t() if self.transposed else tensor

    def stored(self, matrix: Tensor) -> Tensor:
        """`oriented` undone: [N, K] -> the weight's shape; a view that shares its memory."""
        return self.oriented(matrix)

    def number(self, value: float, *shape: int) -> Tensor:
        """A threshold or an alpha: `value` in float32, float64 beside such a weight, whatever torch's default is."""
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        return torch.full(shape, value, dtype=dtype, device=self.weight.device)

    def threshold_a_row(self, value: float) -> Tensor:
        """A threshold for every output, [N] or, beside a transposed weight, [1, N]; all of them `value`."""
        n = self.oriented(self.weight).shape[0]
        return self.number(value, 1, n) if self.transposed else self.number(value, n)

    @property
    def unit_shape(self) -> tuple[int, int]:
        """(outputs, inputs) that blocks and groups of m must divide."""
        n, k = self.oriented(self.weight).shape
        return n, k

    @property
    def dense_shape(self) -> torch.Size:
        """Shape of the weight in dense storage, whatever it is stored as."""
        return self.weight.shape

    def view_tensor(self, name: str) -> Tensor | None:
        """One of `VIEW_TENSORS` as it is in dense storage."""
        tensor: Tensor | None = getattr(self, name)
        return tensor

    @torch.no_grad()
    def effective_weight(self, given: Mapping[str, Tensor] | None = None) -> Tensor:
        """S(W) as the forward uses it: a new tensor, shape and dtype of the weight, exact zeros where pruned.

        given: "weight", "threshold" or "mask" to take instead of the layer's own, as a state dict has them.
        """
        own = {"weight": self.weight, "threshold": self.threshold, "mask": self.mask}
        weight, threshold, mask = (own | dict(given or {})).values()
        kind = "mask" if self.kind == "dense" and "mask" in (given or {}) else self.kind
        assert weight is not None
        if kind == "dense":
            return weight.detach().clone()
        return self.seen(self.powered(weight), View(kind, threshold, mask), weight.dtype)

    def seen(self, weight: Tensor, view: View, dtype: torch.dtype) -> Tensor:
        """A weight through a view whose tensors are as the layer's own."""
        return effective_weight_reference(weight, view, dtype)

    @torch.no_grad()
    def kept_count(self) -> int:
        """How many weights the view keeps (for a dense view: all of them)."""
        if self.kind == "dense":
            return self.weight.numel()
        return int(torch.count_nonzero(self.effective_weight()))

    @torch.no_grad()
    def write_dense(self) -> None:
        """Make the view dense, with a mask that keeps all: what a copy or a state of now is seen through."""
        self.kind = "dense"
        if self.mask is not None:
            self.mask.fill_(True)

    @torch.no_grad()
    def hide(self, mask: Tensor) -> None:
        """Make `mask`, bool of the weight's shape, the view."""
        self.kind = "mask"
        if self.mask is None:
            # Strides as the weight's, which a channels-last convolution reads without a copy.
            self.mask = torch.empty_like(self.weight, dtype=torch.bool)
        # In place: what compiled or captured the layer holds this tensor.
        self.mask.copy_(mask)

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: Any, strict: bool, missing_keys: list[str], *rest: Any
    ) -> None:
        absent = [name for name in ("mask", "threshold") if getattr(self, name) is not None]
        absent = [name for name in absent if f"{prefix}{name}" not in state_dict]
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, *rest)
        self.unseen = ""
        if not absent:
            if self.kind == "dense" and self.mask is not None and not self.mask.all():
                self.kind = "mask"
        elif f"{prefix}weight" in state_dict:
            # An ordinary checkpoint: said by the layer, and no missing key.
            missing_keys[:] = [key for key in missing_keys if key not in {prefix + name for name in absent}]
            self._loaded_alone(absent[0])

    @torch.no_grad()
    def _loaded_alone(self, absent: str) -> None:
        """The weight came without the mask or threshold that it was trained under."""
        mask = self.mask
        if absent == "mask" and mask is not None and self.exponent is None:
            if not self.weight[~mask].any():
                return
            if (kept := self.nonzero_units()) is not None and not kept.all():
                self.hide(kept)
                return
        self.unseen = absent

    def nonzero_units(self) -> Tensor | None:
        """The smallest mask of the layer's pattern that keeps every weight but zeros; None where there is none."""
        return self.units_of(self.weight != 0)

    def units_of(self, mask: Tensor) -> Tensor | None:
        """The smallest mask of the layer's pattern that keeps what `mask` keeps; None where there is none."""
        kept = self.oriented(mask)
        if isinstance(self.pattern, Block):
            rows, columns = self.pattern.rows, self.pattern.columns
            kept = block_flags(kept, (rows, columns)).repeat_interleave(rows, 0).repeat_interleave(columns, 1)
        elif isinstance(self.pattern, Channel):
            kept = kept.any(1, keepdim=True).expand_as(kept)
        elif isinstance(self.pattern, NM):
            sides = (kept, kept.t()) if self.pattern.transposable else (kept,)
            if any(int(side.unflatten(1, (-1, self.pattern.m)).sum(2).max()) > self.pattern.n for side in sides):
                return None
        return self.stored(kept)

    def _warn_unseen(self) -> None:
        what, self.unseen = self.unseen, ""
        warnings.warn(
            f"load_state_dict: expected every sparse layer's {what} beside its weight, got weights alone, which have "
            f"no zeros to tell it from; they are seen through the {what} that was there before. Load what the sparse "
            f"model's state_dict() returned, or call sparsifier.restore(directory) on what save_pretrained wrote",
            stacklevel=3,
        )
