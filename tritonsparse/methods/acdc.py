"""AC/DC: alternating compressed and decompressed training; one run gives a sparse model and its dense twin.

Peste, Iofinova, Vladu & Alistarh, "AC/DC: Alternating Compressed/DeCompressed Training of Deep Neural Networks",
arXiv:2106.12379, Algorithm 1.

    dense phase    every weight is trained
    sparse phase   starts with m = TopK(|W|), over all layers together ("global") or in each ("uniform");
                   forward, dX and dW see m, and W = m W after every step

Phases are given in epochs: `Phases` holds the paper's tables (METHODS: "imagenet100" and so on) and makes others.
Where a dense phase starts, what was pruned starts from 0 and the optimizer's moments are reset.

The mask of a sparse phase is chosen after the last dense step, and the weights outside it are zeroed one step
later: in between, at the end of the epoch, W is still the dense twin and the view is the sparse model.

Differs from the paper in:
- exact counts, ties to the lowest index; the published code keeps k - 1 of k and drops ties (`strict=True`).
- the moments are reset whatever `.grad` is; the published reset skips parameters whose gradient is None, which
  is all of them under today's `zero_grad`. The paper has SGD's momentum alone; of Adam and LAMB all moments and the
  step counts restart, unless `reset_moments` is "momentum" (docs/experiments/acdc-reset.md).
- momentum of pruned weights is cleared in sparse phases too; in the paper it decays unseen.
- a dense phase counts as dense in training MACs; the paper leaves out weights that happen to be 0 still.
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
from ..masks.distribution import Distribution, divide
from ..masks.units import choose_masks
from ..optimizer_state import reset_state
from ..pattern import Unstructured
from .base import Layers, MethodState
from .masked import MaskMethod
from .phases import PHASES, Phases

__all__ = ["ACDC"]


_LAST = "last/"


@dataclass(kw_only=True)
class ACDC(MaskMethod):
    """Alternating phases with a mask chosen anew for each sparse one.

    sparsity: of the sparse phases, in [0, 1); 0 leaves every layer dense.
    phases: a table, or the name of one in `PHASES`; its epochs must be the run's (`PHASES[name].scaled(epochs)`).
        None = "imagenet100" scaled to the run.
    scope: "global" (one top-k over all layers) or "uniform" (one a layer). Norms of blocks are those of a layer's
        initialisation, give or take a few per cent: on blocks "global" may empty layers whole
        (docs/experiments/acdc-on-blocks.md).
    distribution: of scope "uniform": "uniform", "erk", or sparsities by layer (masks/distribution.py).
    reset_moments: what of the optimizer's state starts anew where a dense phase starts, for every parameter: True = all
        moments and Adam's step counts; "momentum" = running averages of gradients alone, which is all that the paper's
        SGD has; False = nothing.
    strict: the published code's count, which keeps one weight less and none that tie; unstructured only.
    """

    name: ClassVar[str] = "acdc"
    phases: Phases | str | None = None
    scope: str = "global"
    distribution: Distribution = "uniform"
    reset_moments: bool | str = True
    strict: bool = False
    _statistics: dict[str, float] = field(default_factory=dict, init=False, repr=False, compare=False)
    _scaled: Phases | None = field(default=None, init=False, repr=False, compare=False)
    # The masks of the sparse phase before, in a dense phase.
    _last: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.phases, dict):
            self.phases = Phases(**self.phases)
        if not isinstance(self.phases, Phases | str | None):
            raise ValueError(f"acdc: expected phases as a Phases table or a name, got {self.phases!r}; correct them")
        if isinstance(self.phases, str) and self.phases not in PHASES:
            raise ValueError(
                f"acdc: expected phases as a Phases table or one of {', '.join(PHASES)}, got {self.phases!r}; choose "
                f"one of them"
            )
        if self.scope == "global" and self.distribution != "uniform":
            raise ValueError(
                f"acdc: expected scope 'uniform' with sparsities by layer, got 'global', where layers compete; pass "
                f"ACDC(scope='uniform', sparsity={self.distribution!r})"
            )
        if self.strict and self.distribution != "uniform":
            raise ValueError(f"acdc: expected distribution 'uniform' with strict, got {self.distribution!r}; drop one")
        divide(self.distribution, {}, self.sparsity)  # refuses an unknown name
        if self.reset_moments not in (True, False, "momentum"):
            raise ValueError(
                f"acdc: expected reset_moments True, False or 'momentum', got {self.reset_moments!r}; choose one"
            )
        if self.scope not in ("global", "uniform"):
            raise ValueError(f"acdc: expected scope 'global' or 'uniform', got {self.scope!r}; choose one")

    @classmethod
    def fits(cls) -> set[str]:
        return {*super().fits(), "phases"}

    def fit(self, clock: Clock) -> None:
        super().fit(clock)
        if clock.total_steps is not None and clock.steps_per_epoch is not None:
            self._scaled = PHASES["imagenet100"].scaled(clock.total_steps / clock.steps_per_epoch)

    @property
    def table(self) -> Phases:
        """The phases as a table."""
        if self.phases is None:
            assert self._scaled is not None  # fit
            return self._scaled
        return PHASES[self.phases] if isinstance(self.phases, str) else self.phases

    @torch.no_grad()
    def first_masks(self, layers: Layers, clock: Clock) -> None:
        clock.require(self.name, "steps_per_epoch", "total_steps")
        if self.strict and not isinstance(self._pattern, Unstructured):
            raise ValueError(
                f"acdc: expected pattern 'unstructured' with strict, got '{self._pattern}'; leave strict out"
            )
        if clock.total_epochs != math.ceil(self.table.epochs):
            raise ValueError(
                f"acdc: expected a run of {self.table.epochs:g} epochs, as the phases have, got {clock.total_epochs}; "
                f"pass phases=Phases(...).scaled({clock.total_epochs}) or another table"
            )
        if self._phase(clock.step, clock) == "sparse" and self.restored(layers) is None:
            self._compress(layers, clock)

    def _phase(self, step: int, clock: Clock) -> str:
        assert clock.steps_per_epoch is not None  # required in setup
        return self.table.at(step, clock.steps_per_epoch)

    @torch.no_grad()
    def after_step(self, layers: Layers, clock: Clock, optimizer: Optimizer) -> None:
        # The step that was taken, and the one that comes.
        before, now = self._phase(clock.step - 1, clock), self._phase(clock.step, clock)
        if before == "sparse":
            self.hold(layers, optimizer)
        if now == before:
            return
        if now == "sparse":
            self._compress(layers, clock)
            return
        self._rest(layers)
        if self.reset_moments:
            reset_state(optimizer, momentum_only=self.reset_moments == "momentum")

    def frozen_topology(self, clock: Clock) -> bool | None:
        # Not before its first step: until then W is the dense twin.
        sparse = [self._phase(step, clock) == "sparse" for step in (clock.step - 1, clock.step)]
        return clock.step > 0 and all(sparse)

    def phase_began(self, clock: Clock) -> int:
        began = max(clock.step - 1, 0)
        while began and self.sparsity and self._phase(began - 1, clock) == self._phase(began, clock):
            began -= 1
        return began if self.sparsity else 0

    def _compress(self, layers: Layers, clock: Clock) -> None:
        """Choose the masks of a sparse phase; weights outside them are zeroed after its first step."""
        old, self._last = self._last, {}
        scores = self.magnitudes(layers)
        if self.strict:
            masks = _published(scores, self.sparsity, self.scope)
        elif self.scope == "global":
            masks = choose_masks(scores, self.sparsity, self._pattern, "global")
        else:
            masks = choose_masks(scores, divide(self.distribution, self.dims(layers), self.sparsity), self._pattern)
        total = sum(score.numel() for score in scores.values())
        zeros = sum(int((score == 0).sum()) for score in scores.values())
        self._statistics[f"dead at step {clock.step}"] = zeros / total
        self.write(layers, masks)
        self.say_empty(layers, clock.step)
        if old:
            changed = sum(int((layers[name].oriented(mask) != masks[name]).sum()) for name, mask in old.items())
            self._statistics[f"mask change at step {clock.step}"] = changed / total

    def _rest(self, layers: Layers) -> None:
        """Make all layers dense, and remember the masks they had."""
        for name, layer in layers.items():
            assert layer.mask is not None  # given in setup
            self._last[name] = layer.mask.clone()
            layer.write_dense()

    def statistics(self) -> dict[str, float]:
        """By the step at which sparse phases started: "dead" (weights that a dense phase left at exactly 0, as a
        fraction) and "mask change" (positions where the mask differs from that of the sparse phase before)."""
        return dict(self._statistics)

    def state_dict(self) -> MethodState:
        return {**self._statistics, **{f"{_LAST}{name}": mask for name, mask in self._last.items()}}

    def load_state_dict(self, state: Mapping[str, float | int | Tensor]) -> None:
        tensors = {key: value for key, value in state.items() if isinstance(value, Tensor)}
        self._last = {key.removeprefix(_LAST): mask for key, mask in tensors.items()}
        self._statistics = {key: float(value) for key, value in state.items() if key not in tensors}

    def resume(self, layers: Layers) -> None:
        self._last = {name: mask.to(layers[name].weight.device) for name, mask in self._last.items()}
        resting = {name: layer for name, layer in layers.items() if layer.kind == "dense" and layer.mask is not None}
        if not self._last and any(not layer.mask.all() for layer in resting.values() if layer.mask is not None):
            # Version 0.1 left the masks of the sparse phase before in the layers.
            self._rest(resting)

    @torch.no_grad()
    def replan(self, layers: Layers, clock: Clock) -> None:
        dense = all(layer.kind == "dense" for layer in layers.values())
        if self._phase(clock.step, clock) == "dense" and not dense:
            self._rest(layers)
        elif self._phase(clock.step, clock) == "sparse" and dense:
            self._compress(layers, clock)

    def to_dict(self) -> dict[str, Any]:
        fields = super().to_dict()
        if isinstance(self.phases, Phases):
            fields["phases"] = {"starts": [list(start) for start in self.phases.starts], "epochs": self.phases.epochs}
        return fields


def _published(scores: Mapping[str, Tensor], sparsity: float, scope: str) -> dict[str, Tensor]:
    """The masks of the published code: |W| + 1e-4 above, not at, the k-th largest, k = ceil(n (1 - p)) in floats."""
    stats = {name: score + 1e-4 for name, score in scores.items()}

    def above(values: Tensor) -> Tensor:
        k = math.ceil(values.numel() * (1 - sparsity))
        return torch.kthvalue(values.flatten(), values.numel() - k + 1).values

    if scope == "uniform":
        return {name: stat > above(stat) for name, stat in stats.items()}
    threshold = above(torch.cat([stat.flatten() for stat in stats.values()]))
    return {name: stat > threshold for name, stat in stats.items()}
