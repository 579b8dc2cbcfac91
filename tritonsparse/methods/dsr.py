"""DSR, dynamic sparse reparameterization: one adaptive threshold for all layers, growth shared out over them.

Mostafa & Wang, "Parameter Efficient Training of Deep Convolutional Neural Networks by Dynamic Sparse
Reparameterization", arXiv:1902.05967, Algorithm 1.

    every Delta T steps, Delta T doubled at the fractions `doublings` of the run:
        drop  all kept weights with |W| < H, K in all             one H for all layers
        H     halved if K > 1.1 N_p, doubled if K < 0.9 N_p       so that about N_p are dropped
        grow  K, at random, layer l the share R_l / sum R of them   R_l: what it has kept
    grown weights start at 0

So layers whose weights are small get sparser and the others denser. Forward, dX and dW see the mask.

Differs from the paper in:
- N_p is a share of the kept weights, which fits any model; the paper has 600, and 400 000 for ResNet-50.
- a layer keeps at least one unit; shares are rounded by largest remainder, and what a full layer cannot take goes to
  the others, so the total never changes.
- momentum and moments of what was dropped are cleared; the published code lets them live, and they push weights that
  grow in the same places.
- a weight grown at the last update may be dropped at the next like any other (as in the paper), and is, where the
  gradient has not moved it past H.
- where fewer places are free than were dropped (a density above 1/2), what was just dropped may grow again.
- blocks and rows are compared with H by the mean of their |W|.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..clock import Clock
from ..masks.distribution import Distribution, apportion
from ..masks.topk import topk_mask
from ..masks.units import from_units, random_score, to_units, unit_size
from ..optimizer_state import clear_state
from .base import Layers, MethodState
from .masked import still
from .rigl_set import SET

__all__ = ["DSR"]


@dataclass(kw_only=True)
class DSR(SET):
    """Drop below a global threshold, grow at random where weights survive.

    sparsity: fraction of zeros over the sparsified layers, in [0, 1); 0 leaves every layer dense.
    drop_fraction: share of the kept units that an update aims to drop (N_p over them).
    threshold_init: H at the first update, above 0.
    update_every: steps between updates at the start (Delta T); None = a hundredth of the run, at most 100.
    doublings: fractions of the run, rising, from which Delta T is doubled.
    stop_at: updates end at this fraction of total_steps.
    distribution: "uniform" or "erk", at the start.
    """

    name: ClassVar[str] = "dsr"
    keeps_distribution: ClassVar[bool] = False
    drop_fraction: float = 0.05
    threshold_init: float = 1e-3
    doublings: Sequence[float] = (0.25, 0.5, 0.75)
    stop_at: float = 0.95
    distribution: Distribution = "uniform"
    _threshold: float = field(default=0.0, init=False, repr=False, compare=False)
    _budget: int = field(default=0, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.doublings = tuple(self.doublings)
        if list(self.doublings) != sorted(self.doublings) or not all(0.0 <= each <= 1.0 for each in self.doublings):
            raise ValueError(f"dsr: expected doublings as rising fractions of the run, got {self.doublings}; sort them")
        if not 0.0 < self.threshold_init < float("inf"):
            raise ValueError(f"dsr: expected a threshold_init above 0, got {self.threshold_init}; 0.001 is the paper's")
        self._threshold = float(self.threshold_init)

    @torch.no_grad()
    def first_masks(self, layers: Layers, clock: Clock) -> None:
        super().first_masks(layers, clock)
        # Kept weights, of all layers: a function of shapes, so a resumed run finds the same.
        self._budget = sum(int(layer.mask.sum()) for layer in layers.values() if layer.mask is not None)

    def period(self, step: int, clock: Clock) -> int:
        """Delta T at step `step`."""
        assert clock.total_steps is not None  # required in setup
        passed = sum(step >= share * clock.total_steps for share in self.doublings)
        return int(self.every("update_every") * 2**passed)

    def _due(self, step: int, clock: Clock) -> bool:
        return super()._due(step, clock) and step % self.period(step, clock) == 0

    @torch.no_grad()
    def after_step(self, layers: Layers, clock: Clock, optimizer: Optimizer) -> None:
        if self._due(clock.step, clock) and (moving := self.moving(layers)):
            self._reallocate(moving, clock.step, optimizer, self._budget - still(layers, moving))
        self.hold(layers, optimizer)

    def _reallocate(self, layers: Layers, step: int, optimizer: Optimizer, budget: int) -> None:
        """budget: weights that the layers keep together."""
        shapes = self.shapes(layers)
        size = {name: unit_size(shape, self._pattern) for name, shape in shapes.items()}
        old: dict[str, Tensor] = {}
        stays: dict[str, Tensor] = {}
        for name, magnitude in self.magnitudes(layers).items():
            mask = layers[name].mask
            assert mask is not None  # written in setup
            old[name] = to_units(layers[name].oriented(mask).float(), self._pattern) > 0
            mean = torch.where(old[name], to_units(magnitude.float(), self._pattern) / size[name], -1.0)
            survives = mean >= self._threshold
            # The largest stays, whatever H has become.
            stays[name] = survives if bool(survives.any()) else topk_mask(mean, 1)
        held = {name: int(kept.sum()) for name, kept in old.items()}
        remain = {name: int(stay.sum()) for name, stay in stays.items()}
        self._adapt(sum(held.values()) - sum(remain.values()), self.drop_fraction * sum(held.values()))

        left = budget - sum(remain[name] * size[name] for name in remain)
        grown = self._share_out(left, remain, old, size)
        masks = {}
        for name, stay in stays.items():
            score = to_units(random_score(shapes[name], self._seed, self.name, name, step), self._pattern)
            score = score.to(stay.device)
            # Places that were free, then those just dropped.
            ranked = torch.where(stay, -torch.inf, torch.where(old[name], -score, 1.0 + score))
            masks[name] = from_units(stay | topk_mask(ranked, grown[name]), self._pattern, shapes[name])
            new = masks[name] & ~from_units(stay, self._pattern, shapes[name])
            layer = layers[name]
            layer.weight.masked_fill_(layer.stored(new), 0.0)
            clear_state(optimizer, layer.weight, layer.stored(new))
        self.write(layers, masks)

    def _share_out(
        self, left: int, remain: Mapping[str, int], old: Mapping[str, Tensor], size: Mapping[str, int]
    ) -> dict[str, int]:
        """Units to grow by layer, `left` weights together: in proportion to the weights that remain in it."""
        free = {name: kept.numel() - int(kept.sum()) for name, kept in old.items()}
        shares = {name: float(count * size[name]) for name, count in remain.items()}
        if sum(free[name] * size[name] for name in free) < left:
            free = {name: kept.numel() - remain[name] for name, kept in old.items()}
        return apportion(left, shares, free, size)

    def _adapt(self, dropped: int, wanted: float) -> None:
        """H after an update that dropped so many."""
        if dropped > 1.1 * wanted:
            self._threshold /= 2.0
        elif dropped < 0.9 * wanted:
            self._threshold *= 2.0

    def state_dict(self) -> MethodState:
        return {"threshold": self._threshold}

    def load_state_dict(self, state: Mapping[str, float | int | Tensor]) -> None:
        self._threshold = float(state["threshold"])
