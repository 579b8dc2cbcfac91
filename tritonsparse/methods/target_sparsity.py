"""What the methods with learned thresholds share: a sparsity to aim at, and a floor under every layer's density.

With a target p, every `control_every` steps and after the last one, all logits move together:

    p_t    = p + (p_0 - p)(1 - t / t_1)^3,  p from t_1 on       gmp.py's cubic; p_0 is the sparsity at the start
    delta  = the least offset in [-4, 4] with  sum_l #{|W_l| <= sigma(s_l + delta)} >= p_t n
    s_l   <- s_l + delta                                        for every layer l

What is learned is what the offset leaves alone, the differences between the layers' logits; how sparse they are
together is no longer left to the balance of decay, learning rate and loss. The solution is exact and depends on weights
and logits alone, so it has no gain to tune and no memory: it resumes, and ranks agree. It reads nothing back from the
device.

With `min_density` d, no layer stays below it: at the same steps a layer that keeps less than round(d n_l) of its
weights has its threshold lowered to where it keeps as many. A layer without weights gets no gradient, and nothing
lowers its threshold again. This reads one count a layer back.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from ..clock import Clock
from ..layers import SparseLayer
from ..masks.topk import check_sparsity, kept_count
from ..schedules import cubic
from .base import Layers, Method, MethodState

__all__ = ["TargetSparsity", "common_offset", "floor_thresholds", "pruned_count"]

logger = logging.getLogger(__name__)

_REACH = 4.0  # of one offset: T may grow or shrink fifty-fold at once
_ROUNDS = 18  # halvings of [-4, 4]: an offset to 3e-5
_LOGITS = (-30.0, 15.0)  # sigma is 1e-13, and the largest below 1 in float32 with room to spare


@dataclass(kw_only=True)
class TargetSparsity(Method):
    """Base of the methods whose layers have a threshold logit each.

    sparsity: p, over the sparsified layers at the end, in [0, 1); 0 runs every layer dense, None = no target: the
        thresholds go where training takes them.
    reach_by: fraction of total_steps at which p is reached and then held (t_1).
    control_every: steps between corrections of the logits and looks at the densities; None = a hundredth of the run, at
        most 10.
    min_density: share of its weights that every layer keeps at least (d), in [0, 1); 0 = no floor. None = 1 %, with
        blocks half of the share that all layers together are to keep.
    """

    intervals: ClassVar[dict[str, int]] = {"control_every": 10}
    sparsity: float | None = None
    reach_by: float = 0.75
    control_every: int | None = None
    min_density: float | None = None
    _initial: float = field(default=0.0, init=False, repr=False, compare=False)
    _floored: set[str] = field(default_factory=set, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.sparsity is not None:
            self.sparsity = check_sparsity(self.name, self.sparsity)
        super().__post_init__()
        if not 0.0 <= self.reach_by <= 1.0:
            raise ValueError(
                f"{self.name}: expected reach_by in [0, 1], a fraction of the run, got {self.reach_by}; 0.75 is usual"
            )
        self.check_intervals()
        if self.min_density is not None and not 0.0 <= self.min_density < 1.0:
            raise ValueError(f"{self.name}: expected min_density in [0, 1), got {self.min_density}; 0 means no floor")
        if self.sparsity and self.sparsity > 1.0 - self.floor:
            raise ValueError(
                f"{self.name}: expected a sparsity of at most 1 - min_density = {1.0 - self.floor:g}, got "
                f"{self.sparsity}; lower min_density"
            )

    @property
    def floor(self) -> float:
        """d of elements."""
        return 0.01 if self.min_density is None else self.min_density

    @torch.no_grad()
    def check_length(self, layers: Layers, logit: float, clock: Clock) -> None:
        """Refuse a run with too few corrections to bring all thresholds from `logit` to the target.

        Raises:
            ValueError: with the shortest run that works.
        """
        assert self.sparsity is not None and clock.total_steps is not None  # required in setup
        weights = torch.cat([layer.weight.detach().abs().flatten().float() for layer in layers.values()])
        pruned = len(weights) - kept_count(len(weights), self.sparsity)
        if not pruned:
            return
        wanted = float(torch.logit(weights.kthvalue(pruned).values.double().clamp(1e-13, 1 - 1e-7)))
        # One more, for what training does to the weights.
        needed = math.ceil(max(0.0, wanted - logit) / _REACH) + 1
        every = self.every("control_every")
        if -(-clock.total_steps // every) < needed:
            shortest = needed if self.control_every is None else (needed - 1) * every + 1
            raise ValueError(
                f"{self.name}: expected total_steps of at least {shortest} to reach sparsity {self.sparsity} from "
                f"threshold_init {logit:g} with control_every = {every}, got {clock.total_steps}; train longer, or "
                f"start from a higher threshold_init"
            )

    @torch.no_grad()
    def begin(self, layers: Layers) -> None:
        """Note where the ramp starts; the layers have their first thresholds."""
        soft = _soft(layers)
        total = sum(layer.weight.numel() for layer in soft)
        self._initial = float(sum(pruned_count(layer.weight, _logit(layer)) for layer in soft)) / total

    def wanted(self, clock: Clock) -> float:
        """p_t after `clock.step` steps."""
        assert self.sparsity is not None and clock.total_steps is not None  # required in setup
        return cubic(clock.step, self.reach_by * clock.total_steps, self._initial, self.sparsity)

    def due(self, clock: Clock) -> bool:
        """Whether this step is one of those that correct."""
        return clock.step % self.every("control_every") == 0 or clock.step == clock.total_steps

    @torch.no_grad()
    def control(self, layers: Layers, clock: Clock) -> None:
        """Correct the logits, where this step is one of those that do."""
        if not self.due(clock):
            return
        soft = _soft(layers)
        if not soft:
            return
        if self.sparsity is not None:
            total = sum(layer.weight.numel() for layer in soft)
            offset = common_offset(
                [layer.weight for layer in soft],
                [_logit(layer) for layer in soft],
                [layer.weight.numel() - self._least(layer) for layer in soft],
                total - kept_count(total, self.wanted(clock)),
            )
            for layer in soft:
                logit = _logit(layer)
                logit.add_(offset.to(logit.device)).clamp_(*_LOGITS)
        if not self.floor:
            return
        for name in floor_thresholds(layers, {name: self._least(layer) for name, layer in layers.items()}):
            if name not in self._floored:
                self._floored.add(name)
                logger.warning(
                    "%s: step %d: layer %s kept less than min_density = %g of its weights; its threshold is held where "
                    "it keeps as many (said once)",
                    *(self.name, clock.step, name, self.floor),
                )

    def _least(self, layer: SparseLayer) -> int:
        """Weights that the layer keeps at least."""
        if not self.floor:
            return 0
        return kept_count(layer.weight.numel(), round(1.0 - self.floor, 12))

    def state_dict(self) -> MethodState:
        return {} if self.sparsity is None else {"initial_sparsity": self._initial}

    def load_state_dict(self, state: Mapping[str, float | int | Tensor]) -> None:
        if self.sparsity is not None:
            self._initial = float(state["initial_sparsity"])


def _soft(layers: Layers) -> list[SparseLayer]:
    return [layer for layer in layers.values() if layer.threshold is not None]


def _logit(layer: SparseLayer) -> Tensor:
    assert layer.threshold is not None  # of the layers of `_soft`
    return layer.threshold


def pruned_count(weight: Tensor, logit: Tensor, offset: Tensor | float = 0.0) -> Tensor:
    """#{|W| <= sigma(s + offset)}: int64 scalar on the weight's device; a NaN is not pruned."""
    return (weight.abs() <= torch.sigmoid(logit + offset)).sum()


@torch.no_grad()
def common_offset(weights: list[Tensor], logits: list[Tensor], most: list[int], wanted: int) -> Tensor:
    """The least offset to all logits, in [-4, 4] and to 3e-5, that prunes `wanted` weights or more.

    Args:
        weights: one tensor a layer, any shape.
        logits: s of each layer, [1], float32.
        most: how many of each layer count as pruned at most: the rest is kept whatever the offset.
        wanted: how many to prune, over all layers.

    Returns:
        float32 scalar on the first weight's device; 4 where `wanted` is out of reach. No host synchronisation.
    """
    device = weights[0].device
    low = torch.full((), -_REACH, dtype=torch.float32, device=device)
    high = torch.full((), _REACH, dtype=torch.float32, device=device)
    for _ in range(_ROUNDS):
        middle = 0.5 * (low + high)
        counts = [
            pruned_count(weight, logit, middle.to(weight.device)).clamp(max=limit).to(device)
            for weight, logit, limit in zip(weights, logits, most, strict=True)
        ]
        enough = torch.stack(counts).sum() >= wanted
        high, low = torch.where(enough, middle, high), torch.where(enough, low, middle)
    return high


@torch.no_grad()
def floor_thresholds(layers: Layers, least: Mapping[str, int]) -> list[str]:
    """Lower the thresholds of the layers that keep fewer than `least` of their weights to where they keep as many.

    The threshold goes half-way between the last weight to keep and the next smaller one.

    Returns:
        The names of these layers. One host synchronisation, and another for each of them.
    """
    soft = {name: layer for name, layer in layers.items() if layer.threshold is not None}
    device = next(iter(soft.values())).weight.device
    pruned = torch.stack([pruned_count(layer.weight, _logit(layer)).to(device) for layer in soft.values()]).tolist()
    found = []
    for (name, layer), gone in zip(soft.items(), pruned, strict=True):
        n = layer.weight.numel()
        if n - gone >= least[name]:
            continue
        top = torch.topk(layer.weight.abs().flatten().float(), min(least[name] + 1, n)).values
        below = top[least[name]] if least[name] < n else torch.zeros_like(top[0])
        _logit(layer).fill_(torch.logit(0.5 * (top[least[name] - 1] + below))).clamp_(*_LOGITS)
        found.append(name)
    return found
