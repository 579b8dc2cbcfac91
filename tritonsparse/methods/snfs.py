"""SNFS, sparse momentum: grow where the momentum is large, in the layers where it is large.

Dettmers & Zettlemoyer, "Sparse Networks from Scratch: Faster Training without Losing Performance",
arXiv:1907.04840, Algorithm 1.

    every Delta T steps, with M the optimizer's momentum, kept for every weight:
        share_l = mean |M_l| over the kept, normalised to sum_l share_l = 1
        drop      ceil(f(t) n_l) smallest |W| of the n_l kept, f falling from p to 0.005 along a cosine
        grow      share_l of all that were dropped, where |M| is largest among the others
    grown weights start at 0 and keep their momentum

Forward and dX see the mask. dW is dense until the last update, so that momentum knows every weight; what it moves
outside the mask is zeroed after the step. Momentum is SGD's buffer; under Adam and its kin it is
m / (sqrt(v) + 1e-8), as in the published code.

Differs from the paper in:
- the count is exact: what was dropped is grown, shares rounded by largest remainder. The published code rounds
  every layer up and corrects the drift with a moving average.
- a layer takes at most 0.99 of the room it has, and the excess goes to the others in proportion to their shares;
  the published code spreads it evenly, in up to 1000 passes.
- updates come every `update_every` steps (the paper: an epoch).
- what was just dropped may grow again and then keeps its value, as in the published code; the paper's text grows
  "zero-valued weights".
- rigl's SNFS has no redistribution and keeps its own average of gradients; ITOP's masks the momentum at every step,
  after which it can show no growth. Neither is followed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..clock import Clock
from ..layers import SparseLayer
from ..masks.distribution import Distribution, apportion
from ..masks.topk import topk_mask
from ..masks.units import from_units, to_units, unit_size
from ..optimizer_state import momentum
from ..schedules import cosine
from .base import Densities, Layers
from .masked import still
from .rigl_set import SET

__all__ = ["SNFS"]

_LAST = 0.005  # f(t) at the end of the cosine
_ROOM = 0.99  # of a layer's places that growth may fill


@dataclass(kw_only=True)
class SNFS(SET):
    """Drop by magnitude, grow and redistribute over layers by momentum.

    sparsity: fraction of zeros over the sparsified layers, in [0, 1); 0 leaves every layer dense.
    drop_fraction: share of the kept units replaced at the first update (p).
    update_every: steps between updates (Delta T); None = a hundredth of the run, at most 100.
    stop_at: updates, and dense dW with them, end at this fraction of total_steps.
    distribution: "uniform" or "erk", at the start.
    """

    name: ClassVar[str] = "snfs"
    keeps_distribution: ClassVar[bool] = False
    drop_fraction: float = 0.5
    distribution: Distribution = "uniform"
    _budget: int = field(default=0, init=False, repr=False, compare=False)

    @torch.no_grad()
    def first_masks(self, layers: Layers, clock: Clock) -> None:
        super().first_masks(layers, clock)
        # Kept weights, of all layers: a function of shapes, so a resumed run finds the same.
        self._budget = sum(int(layer.mask.sum()) for layer in layers.values() if layer.mask is not None)
        for layer in layers.values():
            layer.alpha = layer.number(1.0)

    def fraction(self, step: int, clock: Clock) -> float:
        assert clock.total_steps is not None  # required in setup
        falling = (self.drop_fraction - _LAST) * cosine(step, self.stop_at * clock.total_steps)
        return min(self.drop_fraction, _LAST + falling)

    def frozen_topology(self, clock: Clock) -> bool | None:
        # Until the last update, growth reads the momentum outside the masks.
        assert clock.total_steps is not None  # required in setup
        return clock.step >= self.stop_at * clock.total_steps

    @torch.no_grad()
    def after_step(self, layers: Layers, clock: Clock, optimizer: Optimizer) -> None:
        if self._due(clock.step, clock) and (moving := self.moving(layers)):
            rate = self.fraction(clock.step, clock)
            budget = self._budget - still(layers, moving)
            self.write(moving, self._redistribute(moving, _momenta(moving, optimizer), rate, budget))
        if self._updating:
            # Momentum outside the masks stays: it is what growth reads.
            self.hold(layers, None)
            return
        self.hold(layers, optimizer)
        for layer in layers.values():
            assert layer.alpha is not None  # given in setup
            layer.alpha.zero_()

    def _redistribute(
        self, layers: Layers, momenta: Mapping[str, Tensor], rate: float, budget: int
    ) -> dict[str, Tensor]:
        """The masks after an update, of `budget` weights together: bool [N, K] by layer."""
        shapes, magnitudes = self.shapes(layers), self.magnitudes(layers)
        old = {name: layer.oriented(layer.mask) for name, layer in layers.items() if layer.mask is not None}
        shares = {name: float(momenta[name][mask].mean()) for name, mask in old.items()}
        for name, share in shares.items():
            if not math.isfinite(share):
                raise RuntimeError(f"snfs: expected finite momentum, got {share} in {name}; training has diverged")
        fair = sum(shares.values()) / len(shares)
        stays, room, size = {}, {}, {}
        for name, mask in old.items():
            kept = to_units(mask.float(), self._pattern) > 0
            count, total = int(kept.sum()), kept.numel()
            # A layer that is nearly dense and asks for more would only turn over what it has.
            zeros = 1.0 - count / total
            share = min(rate, zeros) if zeros < 0.2 and shares[name] > fair else rate
            drop = min(math.ceil(share * count), count - 1)
            ranked = torch.where(kept, to_units(magnitudes[name].float(), self._pattern), -1.0)
            stays[name] = topk_mask(ranked, count - drop)
            size[name] = unit_size(shapes[name], self._pattern)
            room[name] = total - (count - drop)
        left = budget - sum(int(stay.sum()) * size[name] for name, stay in stays.items())
        capped = {name: math.floor(_ROOM * free) for name, free in room.items()}
        # Where all layers are full to the cap, what the cap leaves free is needed.
        within = capped if sum(capped[name] * size[name] for name in room) >= left else room
        grown = apportion(left, shares, within, size)
        masks = {}
        for name, stay in stays.items():
            ranked = torch.where(stay, -1.0, to_units(momenta[name].float(), self._pattern))
            masks[name] = from_units(stay | topk_mask(ranked, grown[name]), self._pattern, shapes[name])
        return masks

    def cost_state(self) -> Any:
        return self._updating

    def densities(self, layer: SparseLayer, kept: float) -> Densities:
        return Densities(kept, kept, 1.0 if self._updating else kept)


def _momenta(layers: Layers, optimizer: Optimizer) -> dict[str, Tensor]:
    """|M| as [N, K] by layer."""
    found = {name: momentum(optimizer, layer.weight) for name, layer in layers.items()}
    if all(value is None for value in found.values()):
        raise RuntimeError(
            f"snfs: expected an optimizer with momentum or Adam's averages, got {type(optimizer).__name__} without; "
            f"use SGD(momentum=0.9) or AdamW"
        )
    # A layer that has had no gradient yet (LayerDrop, a frozen one) has a momentum of 0.
    return {
        name: layer.oriented(torch.zeros_like(layer.weight) if (value := found[name]) is None else value.abs())
        for name, layer in layers.items()
    }
