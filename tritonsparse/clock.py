"""The clock: real optimizer steps, and the epochs they make."""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["Clock"]


@dataclass
class Clock:
    """Counts real optimizer steps; owned and advanced by the Sparsifier alone.

    step: real steps taken so far.
    total_steps: real steps planned, or None.
    steps_per_epoch: real steps in an epoch, or None.
    """

    step: int = 0
    total_steps: int | None = None
    steps_per_epoch: int | None = None

    def __post_init__(self) -> None:
        for name in ("total_steps", "steps_per_epoch"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(
                    f"sparsify: expected {name} as an integer of at least 1, got {value!r}; count optimizer "
                    f"steps, not batches"
                )

    @property
    def epoch(self) -> int:
        """The epoch that the next step belongs to, from 0."""
        return 0 if self.steps_per_epoch is None else self.step // self.steps_per_epoch

    @property
    def at_epoch_start(self) -> bool:
        """True when `step` is the first step of an epoch."""
        return self.steps_per_epoch is not None and self.step % self.steps_per_epoch == 0

    @property
    def total_epochs(self) -> int:
        """Epochs in `total_steps`, the last one counted whole; 0 where either is unknown."""
        if self.total_steps is None or self.steps_per_epoch is None:
            return 0
        return math.ceil(self.total_steps / self.steps_per_epoch)

    def require(self, method: str, *names: str) -> None:
        """Raise ValueError unless `names` (total_steps, steps_per_epoch) are set."""
        for name in names:
            if getattr(self, name) is None:
                raise ValueError(
                    f"{method}: expected {name}=, which its schedule is measured in, got None; pass {name} to "
                    f"tritonsparse.sparsify"
                )
