"""Picture of a run's evaluations: quality after each epoch, the dense and the sparse model told apart."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tritonsparse.eval import _drawing as draw

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["plot_twins", "twins_figure"]

# Marker and colour of the two phases.
_LOOKS = {"dense": ("o", draw.COLOURS[0]), "sparse": ("s", draw.COLOURS[1])}


def plot_twins(evaluations: Sequence[Mapping[str, Any]], path: str | os.PathLike[str], *, key: str, label: str) -> Path:
    """Write `twins_figure` as a PNG; folders on the way are made."""
    return draw.save(twins_figure(evaluations, key=key, label=label), path)


def twins_figure(evaluations: Sequence[Mapping[str, Any]], *, key: str, label: str) -> Figure:
    """One quality over epochs: one line, each point marked by its phase; sparse epochs lie on grey.

    Args:
        evaluations: one mapping an epoch, with `epoch` (from 0), `phase` ("dense" or "sparse") and `key`.
        key: what is drawn, such as "perplexity".
        label: the axis of it.

    Raises:
        ValueError: no evaluation has a finite value.
    """
    points = [
        (int(each["epoch"]) + 1, float(each[key]), str(each["phase"]))
        for each in evaluations
        if math.isfinite(each[key])
    ]
    if not points:
        raise ValueError(f"twins_figure: expected evaluations with a finite {key}, got none; train an epoch first")
    figure = draw.new_figure(7, 4)
    axes = figure.add_subplot()
    for epoch, _, phase in points:
        if phase == "sparse":
            axes.axvspan(epoch - 0.5, epoch + 0.5, color="#EFEFEF", linewidth=0)
    axes.plot([epoch for epoch, _, _ in points], [value for _, value, _ in points], color="#7F7F7F", linewidth=1)
    for phase, (marker, colour) in _LOOKS.items():
        chosen = [(epoch, value) for epoch, value, found in points if found == phase]
        if chosen:
            x, y = zip(*chosen, strict=True)
            axes.plot(x, y, linestyle="none", marker=marker, color=colour, label=f"{phase} model")
    values = [value for _, value, _ in points]
    if min(values) > 0 and max(values) > 4 * min(values):
        axes.set_yscale("log")
    draw.label_axes(axes, "After each epoch", "epoch", label)
    axes.legend(frameon=False)
    return figure
