"""GMP: gradual magnitude pruning, the baseline of every sparse-training paper.

Zhu & Gupta, "To prune, or not to prune: exploring the efficacy of pruning for model compression",
arXiv:1710.01878. A mask keeps the largest weights of each layer while its sparsity rises along a cubic:

    p_t = p_f + (p_i - p_f)(1 - (t - t_0)/(t_1 - t_0))^3            eq. (1)

every `update_every` steps from t_0 to t_1; pruned weights are zero and stay so. Forward, dX and dW see the
mask.

Differs from the paper in:
- the last update falls on t_1 exactly, whatever `update_every`, so the final sparsity is reached to one
  element (the STR and AC/DC repositories' variants stop at .899996 and .899083 for .9).
- t_0 and t_1 are fractions of the run.
- momentum of pruned positions is cleared, so that they stay exactly zero under every optimizer.
- patterns: a unit counts by the sum of its magnitudes; N:M keeps round((1 - p_t) M) of every M on the way, N at
  the end.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.optim import Optimizer

from ..clock import Clock
from ..masks.distribution import Distribution, divide
from ..masks.topk import check_sparsity, kept_count
from ..masks.units import choose_masks, to_units
from ..pattern import NM
from ..schedules import cubic
from .base import Layers
from .masked import MaskMethod

__all__ = ["GMP"]


# A model that comes with as many zeros as asked for, but for this, keeps them exactly.
SLACK = 0.005


@dataclass(kw_only=True)
class GMP(MaskMethod):
    """Magnitude pruning to `sparsity` along a cubic.

    sparsity: final sparsity over the sparsified layers (p_f), in [0, 1); 0 leaves every layer dense.
    initial_sparsity: p_i.
    begin, end: t_0 and t_1 as fractions of total_steps.
    update_every: steps between mask updates (the paper's Delta t); None = a hundredth of the run, at most 100.
    distribution: "uniform", "erk", or sparsities by layer (masks/distribution.py).
    """

    name: ClassVar[str] = "gmp"
    starts_from_mask: ClassVar[bool] = True
    intervals: ClassVar[dict[str, int]] = {"update_every": 100}
    initial_sparsity: float = 0.0
    begin: float = 0.0
    end: float = 0.75
    update_every: int | None = None
    distribution: Distribution = "uniform"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.initial_sparsity = check_sparsity("gmp", self.initial_sparsity)
        if self.initial_sparsity > self.sparsity:
            raise ValueError(
                f"gmp: expected initial_sparsity of at most sparsity = {self.sparsity}, got "
                f"{self.initial_sparsity}; pruning only rises"
            )
        if not 0.0 <= self.begin <= self.end <= 1.0:
            raise ValueError(
                f"gmp: expected 0 <= begin <= end <= 1 (fractions of total_steps), got {self.begin} and "
                f"{self.end}; correct them"
            )
        self.check_intervals()
        divide(self.distribution, {}, self.sparsity)  # refuses an unknown name

    @torch.no_grad()
    def first_masks(self, layers: Layers, clock: Clock) -> None:
        clock.require(self.name, "total_steps")
        own = None if self.initial is None else self.initial.masks
        if own is None:
            own = {name: torch.ones_like(layer.weight, dtype=torch.bool) for name, layer in layers.items()}
        self.write(layers, {name: layer.oriented(own[name]) for name, layer in layers.items()})
        if clock.step >= self._span(clock)[0] and self.restored(layers) is None:
            self._prune(layers, clock)

    def _span(self, clock: Clock) -> tuple[int, int]:
        assert clock.total_steps is not None  # required in setup
        return round(self.begin * clock.total_steps), round(self.end * clock.total_steps)

    @torch.no_grad()
    def after_step(self, layers: Layers, clock: Clock, optimizer: Optimizer) -> None:
        begin, end = self._span(clock)
        due = (clock.step - begin) % self.every("update_every") == 0 or clock.step == end
        if begin <= clock.step <= end and due:
            self._prune(layers, clock)
        self.hold(layers, optimizer)

    def frozen_topology(self, clock: Clock) -> bool | None:
        return clock.step > self._span(clock)[1]

    def _pruned(self, layers: Layers) -> dict[str, float]:
        """Units that are pruned already, as a share of each layer's, where the run began with zeros."""
        if self.initial is None or self.initial.masks is None or isinstance(self._pattern, NM):
            return dict.fromkeys(layers, 0.0)
        shares = {}
        for name, layer in layers.items():
            assert layer.mask is not None  # given in setup
            kept = to_units(layer.oriented(layer.mask).float(), self._pattern) > 0
            shares[name] = 1.0 - int(kept.sum()) / kept.numel()
        return shares

    def _came_sparse(self, layers: Layers) -> bool:
        """Whether the masks that the run began with prune as much as it is to prune."""
        if self.initial is None or self.initial.masks is None:
            return False
        kept = sum(int(mask.sum()) for mask in self.initial.masks.values())
        return 1.0 - kept / sum(layer.weight.numel() for layer in layers.values()) >= self.sparsity - SLACK

    def _prune(self, layers: Layers, clock: Clock) -> None:
        begin, end = self._span(clock)
        dims = self.dims(layers)
        final = divide(self.distribution, dims, self.sparsity)
        first = divide(self.distribution, dims, self.initial_sparsity)
        # What the model came with may be sparse already, and as sparse as asked for: what is pruned stays so.
        sparsity = self._pruned(layers)
        if not self._came_sparse(layers):
            for name, pruned in sparsity.items():
                sparsity[name] = max(pruned, cubic(clock.step - begin, end - begin, first[name], final[name]))
        scores, tiles = {}, isinstance(self._pattern, NM) and self._pattern.transposable
        for name, layer in layers.items():
            assert layer.mask is not None  # given in setup
            magnitude = layer.weight.abs()
            # A pruned weight is 0 already; less keeps it behind a kept weight that happens to be 0, and behind all of a
            # tile that would be kept with it.
            behind = -1.0 if not tiles else -1.0 - 16.0 * magnitude.max()
            scores[name] = layer.oriented(torch.where(layer.mask, magnitude, behind))
        pattern = self._pattern
        if isinstance(pattern, NM):
            # Of one group, and all groups alike: the sparsity of any layer is that of all.
            wanted = cubic(clock.step - begin, end - begin, self.initial_sparsity, self.sparsity)
            n = max(pattern.n, kept_count(pattern.m, wanted))
            if self.initial is not None and self.initial.masks is not None:
                groups = [layer.oriented(self.initial.masks[name]) for name, layer in layers.items()]
                n = min(n, max(int(group.unflatten(1, (-1, pattern.m)).sum(2).max()) for group in groups))
            pattern = dataclasses.replace(pattern, n=n)
        self.write(layers, choose_masks(scores, sparsity, pattern))
