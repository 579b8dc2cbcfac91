"""What a method is: a dataclass of hyper-parameters and a few hooks, called in the order of a step.

    setup         once, by `sparsify`: give every layer its view
    before_step   gradients are complete, the optimizer has not moved: penalties go here, and topology updates
                  that take the place of the step
    guard         right before the optimizer moves: gradients that it must not see
    after_step    the optimizer has moved and the clock has advanced: masks, alpha, zeros go here

A method decides; it never calls a kernel, never touches an optimizer's internals and never names a model.
The dataclass is the configuration: it prints itself, validates in `__post_init__`, round-trips through
`to_dict` and `METHODS[name](**fields)`. What changes during a run is kept out of its fields and returned by
`state_dict`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor
from torch.optim import Optimizer

from ..clock import Clock
from ..layers import SparseLayer
from ..pattern import Pattern, Unstructured
from .fields import check_types

__all__ = ["Densities", "Layers", "Method", "MethodState"]

Layers = Mapping[str, SparseLayer]
MethodState = dict[str, float | int | Tensor]


@dataclass(frozen=True)
class Densities:
    """Fractions of a layer's dense multiply-adds that forward, dX and dW need.

    activations: what is kept of the layer's input for dW, where the method sparsifies it.
    """

    forward: float
    grad_input: float
    grad_weight: float
    activations: float | None = None

    @property
    def training(self) -> float:
        """The three passes together, as a fraction of dense training."""
        return (self.forward + self.grad_input + self.grad_weight) / 3.0


@dataclass(kw_only=True)
class Method:
    """Base of all methods: every hook does nothing."""

    name: ClassVar[str]
    patterns: ClassVar[tuple[type, ...]] = (Unstructured,)
    # Whether the model is as sparse as it will be before the first step.
    one_shot: ClassVar[bool] = False
    # Whether it prunes weights that do not train, under an adapter for instance.
    takes_frozen: ClassVar[bool] = True
    # Whether its layers have masks from the start on, and what they were chosen by (initial_masks.py).
    starts_from_mask: ClassVar[bool] = False
    initial: Any = field(default=None, init=False, repr=False, compare=False)
    # Intervals in steps that None leaves to the length of the run, and the longest that they become.
    intervals: ClassVar[dict[str, int]] = {}
    # Fields that may be infinite.
    infinite: ClassVar[tuple[str, ...]] = ()
    # What the intervals that are None are in this run.
    _fitted: dict[str, int] = field(default_factory=dict, init=False, repr=False, compare=False)

    def setup(self, layers: Layers, clock: Clock, pattern: Pattern, seed: int) -> None:
        """Give every layer its view. All checks come before the first change."""

    def settle(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """The layers' shapes are known."""

    @classmethod
    def fits(cls) -> set[str]:
        """Fields that None leaves to the length of the run."""
        return set(cls.intervals)

    def fit(self, clock: Clock) -> None:
        """Give every interval that is None a hundredth of the run, of one step at least and of `intervals` at most: the
        papers' number in runs of their length."""
        for name, most in self.intervals.items():
            share = most if clock.total_steps is None else clock.total_steps // 100
            self._fitted[name] = min(most, max(1, share))

    def every(self, name: str) -> int:
        """An interval in steps: as given, or as fitted to the run."""
        value: int | None = getattr(self, name)
        return self._fitted[name] if value is None else value

    def adopt(self, config: Mapping[str, Any]) -> None:
        """Take what a saved run had where this method leaves it to the run."""
        for name in self.fits():
            if getattr(self, name) is None:
                setattr(self, name, config[name])
        self.__post_init__()

    def __post_init__(self) -> None:
        """Check the fields, types first, and give them their types."""
        for name in self.infinite:
            # As `to_dict` has them.
            if getattr(self, name) in ("inf", "-inf"):
                setattr(self, name, float(getattr(self, name)))
        check_types(self, self.name, self.infinite)

    def check_intervals(self) -> None:
        """Refuse intervals of no step."""
        for name in self.intervals:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(
                    f"{self.name}: expected {name} of at least 1, got {value}; correct it, or leave it out for a "
                    f"hundredth of the run"
                )

    @property
    def idle(self) -> bool:
        """Whether every layer stays dense for the whole run (sparsity 0): none of the hooks below is called then."""
        return False

    def forget(self) -> None:
        """Weights may have been written to in a way that no counter shows: take nothing about them for known."""

    def before_step(self, layers: Layers, clock: Clock, optimizer: Optimizer, scale: Tensor | None) -> bool:
        """Read or change the gradients; `scale` is the factor by which they are too large, None for 1.

        Returns:
            True where the method's own update replaces this step: every `.grad` of the optimizer is then set to
            None, so that nothing else moves, and the step counts.
        """
        return False

    def guard(self, layers: Layers, optimizer: Optimizer) -> None:
        """The optimizer is about to move: keep it from what must not."""

    def after_step(self, layers: Layers, clock: Clock, optimizer: Optimizer) -> None:
        """Update views for the step that comes; `clock.step` steps have been taken."""

    def end_epoch(self, epoch: int, loss: float | None, clock: Clock) -> None:
        """Epoch `epoch` is over; `loss` is its mean observed training loss over ranks, None if none was given."""

    def frozen_topology(self, clock: Clock) -> bool | None:
        """Whether the coming step leaves the topology as it is and needs nothing of pruned weights: no gradient, no
        value but 0. Asked after a step, when `clock.step` has advanced, before and after `after_step`; while it is
        True, `after_step` may find layers that are compact, without a mask. None: this method never says so."""
        return None

    def phase_began(self, clock: Clock) -> int:
        """The step from which all steps up to the last were of one phase. Weights saved in another phase do not average
        with today's."""
        return 0

    def densities(self, layer: SparseLayer, kept: float) -> Densities:
        """The passes' densities for a layer of which the fraction `kept` is not zero, by the paper's count."""
        return Densities(kept, kept, kept)

    def cost_state(self) -> Any:
        """What `densities` reads of the method itself: where it changes, the coming steps cost something else."""
        return None

    def statistics(self) -> dict[str, float]:
        """What the method measured of its own course, as "<what> at step <step>", for results and plots."""
        return {}

    def replan(self, layers: Layers, clock: Clock) -> None:
        """A run that was planned shorter goes on: views and state are restored, and schedules are the new run's."""

    def state_dict(self) -> MethodState:
        """What has changed since construction: numbers, and tensors (one a layer: "<what>/<layer name>")."""
        return {}

    def load_state_dict(self, state: Mapping[str, float | int | Tensor]) -> None:
        """Restore `state_dict`; tensors come on the CPU."""

    def resume(self, layers: Layers) -> None:
        """Views and state have been restored: give the layers what of the state is not in their views."""

    @classmethod
    def completed(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """What `to_dict` said once, with the defaults of fields that an older version had not."""
        own = [field for field in dataclasses.fields(cls) if field.init and field.default is not dataclasses.MISSING]
        return {**{field.name: _plain(field.default) for field in own}, **config}

    def to_dict(self) -> dict[str, Any]:
        """The fields, JSON-ready: infinities as strings, nested configurations as dicts."""
        return {field.name: _plain(getattr(self, field.name)) for field in dataclasses.fields(self) if field.init}


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, float) and math.isinf(value):
        return str(value)
    return list(value) if isinstance(value, tuple) else value
