"""The figure of a method's own record: what changed where phases began."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from tritonsparse.eval import _drawing as draw
from tritonsparse.eval._drawing import is_number

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Key of `Method.statistics` before " at step N", title, label of the y axis.
_PANELS = (
    ("mask change", "Mask change between phases", "fraction of mask positions"),
    ("dead", "Weights still zero after a dense phase", draw.SPARSITY),
)


def phases(statistics: Mapping[str, Any]) -> dict[str, list[tuple[int, float]]]:
    """ "<what> at step <step>" -> number, as what -> (step, number) in the order of steps; other keys are left out."""
    found: dict[str, list[tuple[int, float]]] = {}
    for key, value in statistics.items():
        match = re.fullmatch(r"(.+) at step (\d+)", key)
        if match and is_number(value):
            found.setdefault(match[1], []).append((int(match[2]), float(value)))
    return {what: sorted(points) for what, points in found.items()}


def has_phases(statistics: Mapping[str, Any]) -> bool:
    """Whether `mask_change_figure` has anything to draw."""
    return any(key in phases(statistics) for key, _, _ in _PANELS)


def mask_change_figure(runs: Mapping[str, Mapping[str, Any]]) -> Figure:
    """The figure of `plot_mask_change`."""
    records = {label: phases(statistics) for label, statistics in runs.items()}
    panels = [panel for panel in _PANELS if any(panel[0] in record for record in records.values())]
    if not panels:
        raise ValueError(
            f"plot_mask_change: expected statistics such as 'mask change at step 100', got none in {len(runs)} runs; "
            f"pass method_statistics of a method with phases, such as acdc"
        )
    figure = draw.new_figure(5.6 * len(panels) + 1.8, 4.2)
    for number, (key, title, label) in enumerate(panels):
        axes = figure.add_subplot(1, len(panels), number + 1)
        for run, (name, record) in enumerate(records.items()):
            if key not in record:
                continue
            steps, values = zip(*record[key], strict=True)
            colour, dashes, marker = draw.style(run)
            axes.plot(steps, values, color=colour, linestyle=dashes, marker=marker, linewidth=1.5, label=name)
        draw.label_axes(axes, title, "optimizer step at which the sparse phase began", label)
        axes.set_ylim(0.0, 1.15 * max(axes.dataLim.ymax, 1e-6))
    draw.shared_legend(figure)
    return figure
