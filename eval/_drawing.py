"""The parts that every plot shares: numbers out of a history, lines, labels, legends, the file."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

if TYPE_CHECKING:  # matplotlib takes a second to import, which a program that only offers plots should not pay
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

History = Sequence[Mapping[str, Any]]

# Okabe and Ito's palette: told apart under every common colour blindness. Black is left for means.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_DASHES = ("-", "--", ":", "-.")
_FILLS: tuple[Literal["full", "none", "left", "bottom"], ...] = ("full", "none", "left", "bottom")

SPARSITY = "fraction of weights that are 0"

_NAMED_LAYERS = 8  # up to this many layers have their names in a legend; more are coloured by depth
_SMOOTHED_POINTS = 200  # a curve of more points is drawn faintly, under its moving average


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of inches, laid out so that nothing overlaps or is cut."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=120, layout="constrained")


def save(figure: Figure, path: str | os.PathLike[str]) -> Path:
    """Writes the PNG through a temporary name, so that a reader never sees half a file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        FigureCanvasAgg(figure).print_png(partial)
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)
    return target


def label_axes(axes: Axes, title: str, x: str, y: str) -> None:
    """Title, axis labels and a light grid under the data."""
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(True, color="#E4E4E4", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.set_xmargin(0.01)
    axes.spines[["top", "right"]].set_visible(False)


def shared_legend(figure: Figure) -> None:
    """One legend right of all panels, each label once."""
    handles = {
        label: handle for axes in figure.axes for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="outside right upper", frameon=False, fontsize=9)


def legend_below(axes: Axes) -> None:
    """A legend under one panel, as wide as the panel and with as many columns as fit."""
    labels = axes.get_legend_handles_labels()[1]
    if labels:
        columns = max(1, min(len(labels), 96 // (6 + max(map(len, labels)))))
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=columns, frameon=False, fontsize=8)


def style(i: int) -> tuple[str, str, str]:
    """Colour, dashes and marker of the i-th run: together different for the first 28."""
    return COLOURS[i % 7], _DASHES[i // 7 % 4], _MARKERS[i % 7]


def fill(i: int) -> Literal["full", "none", "left", "bottom"]:
    """How the i-th run's marker is filled: with its colour and shape different for the first 28."""
    return _FILLS[i // 7 % 4]


def count(number: float) -> str:
    """A count in three digits: 512, 65.5k, 1.05M."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.0f}"


def flops_label(phase: str, convention: str | None = None) -> str:
    """Label of an axis of FLOPs: "training" or "inference", and how they were counted."""
    return f"{phase} FLOPs (fraction of dense{'' if convention is None else f', counted as {convention}'})"


def is_number(value: Any) -> bool:
    """Whether `value` can be drawn; None, NaN and text cannot."""
    return isinstance(value, int | float) and math.isfinite(value)


def check_history(function: str, history: History) -> None:
    """Refuses a history without entries, or an entry without a step."""
    if not history:
        raise ValueError(f"{function}: expected at least one history entry, got none; log at least one step")
    for i, entry in enumerate(history):
        if not isinstance(entry, Mapping) or not is_number(entry.get("step")):
            raise ValueError(f"{function}: expected a step in entry {i}, got {entry!r}; log step with each entry")


def has(history: History, key: str) -> bool:
    """Whether any entry has something to draw under `key`."""
    values = (entry.get(key) for entry in history)
    return any(bool(value) if isinstance(value, Mapping) else is_number(value) for value in values)


def series(history: History, key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and numbers of `key`, without the entries that lack it."""
    points = [(entry["step"], entry[key]) for entry in history if is_number(entry.get(key))]
    steps, values = zip(*points, strict=True)
    return np.array(steps, dtype=float), np.array(values, dtype=float)


def layer_series(history: History, key: str) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Steps, and for each layer of `key` (in order of appearance) its numbers; NaN where it has none."""
    entries = [entry for entry in history if entry.get(key)]
    names = dict.fromkeys(name for entry in entries for name in entry[key])
    steps = np.array([entry["step"] for entry in entries], dtype=float)
    return steps, {name: np.array([entry[key].get(name, math.nan) for entry in entries], dtype=float) for name in names}


def smoothed(
    axes: Axes,
    steps: np.ndarray,
    values: np.ndarray,
    colour: str,
    *,
    label: str | None = None,
    dashes: str = "-",
) -> bool:
    """One noisy curve; one of many points as a moving average over itself, which the result tells."""
    if len(values) <= _SMOOTHED_POINTS:
        axes.plot(steps, values, color=colour, linestyle=dashes, linewidth=1.8, label=label)
        return False
    window = 2 * (len(values) // 100) + 1
    axes.plot(steps, values, color=colour, alpha=0.22, linewidth=0.8)
    # Counting the points under the window at both ends keeps the average from bending towards 0 there.
    ones = np.ones(window)
    mean = np.convolve(values, ones, "same") / np.convolve(np.ones_like(values), ones, "same")
    axes.plot(steps, mean, color=colour, linestyle=dashes, linewidth=1.8, label=label)
    return True


def layers(axes: Axes, steps: np.ndarray, layers: Mapping[str, np.ndarray], *, with_mean: bool) -> None:
    """A thin line for each layer, coloured by depth, with a legend or, for many layers, a colour bar."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, Normalize

    colours = ListedColormap(colormaps["viridis"](np.linspace(0.0, 0.9, 256)))  # the lightest vanish on white
    depth = Normalize(0, max(1, len(layers) - 1))
    named = len(layers) <= _NAMED_LAYERS
    for i, (name, values) in enumerate(layers.items()):
        label = f"...{name[-37:]}" if len(name) > 40 else name
        axes.plot(steps, values, color=colours(depth(i)), linewidth=0.9, alpha=0.85, label=label if named else None)
    if with_mean:
        mean = np.nanmean(list(layers.values()), axis=0)
        axes.plot(steps, mean, color="black", linewidth=2.0, label="mean of layers")
    if not named:
        bar = axes.figure.colorbar(ScalarMappable(depth, colours), ax=axes, pad=0.02, aspect=30)
        bar.set_ticks([0, len(layers) - 1], labels=["first layer", "last layer"])
