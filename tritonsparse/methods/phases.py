"""Tables of dense and sparse phases: AC/DC's (arXiv:2106.12379, sections 4.1 to 4.3), and how others are made."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

__all__ = ["PHASES", "Phases"]


@dataclass(frozen=True)
class Phases:
    """When phases start.

    starts: (first epoch, from 0, "dense" or "sparse"), rising from epoch 0; parts of epochs are allowed.
    epochs: length of the whole run.

    Raises:
        ValueError: the table does not start at 0, does not rise within `epochs`, or names another phase.
    """

    starts: Sequence[tuple[float, str]]
    epochs: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "starts", tuple((float(epoch), str(kind)) for epoch, kind in self.starts))
        when = [*(epoch for epoch, _ in self.starts), self.epochs]
        rises = all(low < high < math.inf for low, high in pairwise(when))
        if (
            not self.starts
            or when[0] != 0
            or not rises
            or any(kind not in ("dense", "sparse") for _, kind in self.starts)
        ):
            raise ValueError(
                f"Phases: expected (epoch, 'dense' or 'sparse') rising from epoch 0 to below {self.epochs}, got "
                f"{list(self.starts)}; correct the table"
            )

    @classmethod
    def alternating(cls, epochs: float, *, warmup: float, sparse: float, dense: float, final: float) -> Phases:
        """Dense for `warmup` epochs, then sparse and dense in turn, sparse for the `final` epochs.

        The dense phase before the last sparse one takes what is left over, as in the paper's tables.
        """
        starts: list[tuple[float, str]] = [(0, "dense")]
        at = warmup
        while at + sparse + dense <= epochs - final:
            starts += [(at, "sparse"), (at + sparse, "dense")]
            at += sparse + dense
        return cls([*starts, (epochs - final, "sparse")], epochs)

    def scaled(self, epochs: float) -> Phases:
        """The same table stretched or shrunk to a run of `epochs` epochs."""
        return Phases([(epoch * epochs / self.epochs, kind) for epoch, kind in self.starts], epochs)

    def at(self, step: int, steps_per_epoch: int) -> str:
        """The phase that step `step` (from 0) belongs to: a function of the step alone, so it survives resuming."""
        current = self.starts[0][1]
        for epoch, kind in self.starts:
            if step >= math.floor(epoch * steps_per_epoch + 0.5):
                current = kind
        return current


def _imagenet(epochs: int) -> Phases:
    """Tables of the published configurations: 5 and 5 from epoch 10, at the end 10 dense and 15 sparse."""
    return Phases.alternating(epochs, warmup=10, sparse=5, dense=5, final=15)


def _turns(*begins: int, sparse: int, last: int) -> list[tuple[float, str]]:
    """Sparse phases of `sparse` epochs from each of `begins`, dense in between, sparse from `last` on."""
    turns = [turn for begin in begins for turn in ((begin, "sparse"), (begin + sparse, "dense"))]
    return [(0, "dense"), *turns, (last, "sparse")]


PHASES: dict[str, Phases] = {
    "imagenet100": _imagenet(100),
    "imagenet150": _imagenet(150),
    "imagenet200": _imagenet(200),
    "cifar100": Phases(_turns(10, 50, 90, 130, sparse=20, last=170), 200),
    # From the text of section 4.3: 5 epochs dense, 3 and 3 in turn, epochs 33 to 39 dense, 40 to 48 sparse.
    "transfoxl48": Phases(_turns(5, 11, 17, 23, 29, sparse=3, last=39), 48),
}
