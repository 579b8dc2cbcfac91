"""Training losses as they are observed, and their mean at each epoch's end, over ranks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["EpochLosses"]


class EpochLosses:
    """Observed losses of one run.

    Attributes:
        epochs: mean of every finished epoch, over ranks.
        total, count: sum and number of the current epoch's losses; total is None before the first.
    """

    def __init__(self) -> None:
        self.epochs: list[float] = []
        self.total: Tensor | None = None
        self.count = 0

    def observe(self, loss: Tensor | float, device: torch.device) -> None:
        """Add one; no host sync. The sum is kept on the model's device, where the process group can reduce it."""
        value = torch.as_tensor(loss, dtype=torch.float32).detach().to(device)
        self.total = value if self.total is None else self.total + value
        self.count += 1

    def end_epoch(self, device: torch.device) -> float | None:
        """The mean of the epoch that ends, kept in `epochs`; None where nothing was observed."""
        if self.total is None:
            return None
        total = self.total.to(device)
        sums = torch.stack([total, torch.full_like(total, self.count)])
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(sums)
        self.total, self.count = None, 0
        self.epochs.append(float(sums[0] / sums[1]))
        return self.epochs[-1]

    def restore(self, epochs: Sequence[float], total: float | None, count: int) -> None:
        """Go on from a saved run."""
        self.epochs = [float(loss) for loss in epochs]
        self.total = None if total is None else torch.tensor(total, dtype=torch.float32)
        self.count = count
