"""The picture of a run's evaluations: each point stands at its epoch and bears the mark of its phase."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from tritonsparse.eval.twin_plot import plot_twins, twins_figure

PHASES = ("dense", "dense", "sparse", "dense", "sparse")
EVALUATIONS = [{"epoch": epoch, "phase": phase, "perplexity": 100.0 - 10 * epoch} for epoch, phase in enumerate(PHASES)]


def test_points_and_phases_are_where_they_belong() -> None:
    (axes,) = twins_figure(EVALUATIONS, key="perplexity", label="validation perplexity").axes
    line, dense, sparse = axes.lines
    assert list(line.get_xdata()) == [1, 2, 3, 4, 5] and list(line.get_ydata()) == [100, 90, 80, 70, 60]
    assert (list(dense.get_xdata()), list(sparse.get_xdata())) == ([1, 2, 4], [3, 5])
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["dense model", "sparse model"]
    assert len(axes.patches) == 2 and axes.get_yscale() == "linear" and axes.get_ylabel() == "validation perplexity"


def test_a_fall_over_magnitudes_is_drawn_on_a_logarithmic_axis() -> None:
    evaluations = [{**EVALUATIONS[0], "perplexity": 5000.0}, EVALUATIONS[1]]
    assert twins_figure(evaluations, key="perplexity", label="p").axes[0].get_yscale() == "log"


def test_what_is_not_finite_is_left_out_and_nothing_else_is_refused(tmp_path: Path) -> None:
    broken = {**EVALUATIONS[0], "perplexity": math.inf}
    path = plot_twins([broken, *EVALUATIONS[1:]], tmp_path / "made" / "p.png", key="perplexity", label="p")
    assert path.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="a finite perplexity, got none"):
        twins_figure([broken], key="perplexity", label="p")
