"""The picture of a memorisation experiment: corrupted images over epochs, by their true and by their wrong labels."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import _drawing as draw

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["memorization_figure", "plot_memorization"]

Evaluations = Sequence[Mapping[str, Any]]

_PANELS = (
    ("corrupted_as_true", "Seen as what they are", "accuracy against true labels"),
    ("corrupted_as_labelled", "Memorised", "accuracy against corrupted labels"),
)


def plot_memorization(runs: Mapping[str, Mapping[str, Evaluations]], path: str | os.PathLike[str]) -> Path:
    """Writes two panels for each way of training: how many corrupted images are seen as what they are, and as labelled.

    Sparse phases of the first run that has both phases are shaded.

    Args:
        runs: title (such as "without augmentation") -> label of a run -> its evaluations, one an epoch, with `epoch`,
            `phase`, `corrupted_as_true` and `corrupted_as_labelled`, fractions of the corrupted images.
        path: the PNG file; folders on the way are made.

    Raises:
        ValueError: no run, or one without these numbers.
    """
    return draw.save(memorization_figure(runs), path)


def memorization_figure(runs: Mapping[str, Mapping[str, Evaluations]]) -> Figure:
    """The figure of `plot_memorization`."""
    missing = [
        label for group in runs.values() for label, run in group.items() if not run or _PANELS[0][0] not in run[0]
    ]
    if not runs or not all(runs.values()) or missing:
        raise ValueError(
            f"plot_memorization: expected runs with evaluations of corrupted images, got none in "
            f"{', '.join(missing) or 'an empty mapping'}; pass evaluations of the memorisation program"
        )
    figure = draw.new_figure(11.5, 3.6 * len(runs))
    for row, (title, group) in enumerate(runs.items()):
        for column, (key, what, label) in enumerate(_PANELS):
            axes = figure.add_subplot(len(runs), 2, 2 * row + column + 1)
            _shade(axes, group)
            for number, (name, run) in enumerate(group.items()):
                colour, dashes, marker = draw.style(number)
                epochs = [each["epoch"] + 1 for each in run]
                values = [each[key] for each in run]
                axes.plot(epochs, values, color=colour, linestyle=dashes, marker=marker, markersize=3.5, label=name)
            draw.label_axes(axes, f"{what}, {title}", "epochs", label)
            axes.set_ylim(-0.03, 1.03)
    draw.shared_legend(figure)
    return figure


def _shade(axes: Axes, group: Mapping[str, Evaluations]) -> None:
    for run in group.values():
        if len({each["phase"] for each in run}) < 2:
            continue
        for each in run:
            if each["phase"] == "sparse":
                axes.axvspan(each["epoch"], each["epoch"] + 1, color="#EFEFEF", linewidth=0)
        return
