"""What the pictures show, and what they refuse."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.image import imread
from torch import nn

import tritonsparse as ts
from tritonsparse.eval.plots import (
    flops_quality_figure,
    layer_sparsity_figure,
    main,
    mask_change_figure,
    plot_flops_quality,
    plot_layer_sparsity,
    plot_mask_change,
    plot_runs,
    plot_runs_layers,
    plot_training,
    runs_figure,
    runs_layers_figure,
    training_figure,
)
from tritonsparse.methods import ACDC, Phases


def history(steps: int = 20, layers: int = 3) -> list[dict[str, Any]]:
    names = [f"encoder.layers.{i}.fc1" for i in range(layers)]
    return [
        {
            "step": 10 * (i + 1),
            "loss": 3.0 + math.exp(-i / 5),
            "sparsity": 0.9 * i / steps,
            "alpha": 0.75 * (1 - i / steps),
            "learning_rate": 1e-3,
            "train_flops_fraction": 1 - 0.5 * i / steps,
            "thresholds": {name: 0.01 * (i + j) for j, name in enumerate(names)},
            "layer_sparsity": {name: 0.8 * i / steps for name in names},
        }
        for i in range(steps)
    ]


def layers(count: int = 4) -> list[dict[str, Any]]:
    return [{"name": f"layer.{i}", "sparsity": i / count, "numel": 1000 * (i + 1)} for i in range(count)]


def results(method: str, **changes: Any) -> dict[str, Any]:
    costs = {"bleu": 26.0, "train_flops_fraction": 0.5, "test_flops_fraction": 0.2, "sparsity": 0.9}
    return {"method": method, "history": history(), "layers": layers(), **costs, **changes}


def panels(figure: Figure) -> dict[str, Any]:
    """Axes with a title by that title, which leaves out colour bars."""
    return {title: axes for axes in figure.axes if (title := axes.get_title(loc="left"))}


def legend(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


# --- one run


def test_each_quantity_in_the_history_has_its_panel():
    drawn = panels(training_figure(history()))
    assert {title: axes.get_ylabel() for title, axes in drawn.items()} == {
        "Training loss": "loss [nats]",
        "Sparsity": "fraction of weights that are 0",
        "Gradient annealing": "alpha (scale of pruned gradients)",
        "Learned thresholds": "threshold (weight magnitude)",
        "Learning rate": "learning rate",
        "Training cost so far": "training FLOPs (fraction of dense)",
    }
    assert {axes.get_xlabel() for axes in drawn.values()} == {"optimizer step"}


def test_what_the_history_lacks_has_no_panel():
    some = [{"step": i, "loss": 1.0, "alpha": None, "thresholds": {}} for i in range(3)]
    assert list(panels(training_figure(some))) == ["Training loss"]


def test_curves_are_the_numbers_of_the_history():
    axes = panels(training_figure(history()))["Training loss"]
    (line,) = axes.lines
    assert line.get_xdata().tolist() == [entry["step"] for entry in history()]
    assert line.get_ydata().tolist() == [entry["loss"] for entry in history()]


def test_entries_without_a_value_are_left_out_of_its_curve():
    mixed = [{"step": 1, "loss": 2.0}, {"step": 2, "sparsity": 0.5}, {"step": 3, "loss": float("nan")}]
    assert panels(training_figure(mixed))["Training loss"].lines[0].get_xdata().tolist() == [1]


def test_a_noisy_loss_gets_a_moving_average_that_keeps_its_level():
    flat = [{"step": i, "loss": 4.0 + (-1) ** i} for i in range(1000)]
    axes = panels(training_figure(flat))["Training loss (bold: moving average)"]
    raw, mean = axes.lines
    assert raw.get_ydata().tolist() == [entry["loss"] for entry in flat]
    # 21 points in a window leave one alternation: 1/21 off the level; 11 at the very ends: 1/11
    assert np.abs(mean.get_ydata() - 4.0).max() <= 1 / 11 + 1e-9


def test_sparsity_is_never_smoothed_because_its_jumps_are_real():
    phases = [{"step": i, "sparsity": 0.9 * (i // 100 % 2)} for i in range(1000)]
    (line,) = panels(training_figure(phases))["Sparsity"].lines
    assert set(line.get_ydata()) == {0.0, 0.9}


def test_few_layers_are_named_and_averaged():
    axes = panels(training_figure(history(layers=3)))["Learned thresholds"]
    names = [text.get_text() for text in axes.get_legend().get_texts()]
    assert names == [*(f"encoder.layers.{i}.fc1" for i in range(3)), "mean of layers"]
    # thresholds of step i are 0.01 * (i, i + 1, i + 2)
    assert axes.lines[-1].get_ydata() == pytest.approx([0.01 * (i + 1) for i in range(20)])


def test_many_layers_are_coloured_by_depth():
    figure = training_figure(history(layers=36))
    axes = panels(figure)["Learned thresholds"]
    assert len({line.get_color() for line in axes.lines[:-1]}) == 36
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["mean of layers"]
    bars = [axes for axes in figure.axes if not axes.get_title(loc="left")]
    assert [label.get_text() for label in bars[0].get_yticklabels()] == ["first layer", "last layer"]


def test_a_layer_that_joins_late_is_drawn_from_there():
    late = [{"step": 1, "thresholds": {"a": 1.0}}, {"step": 2, "thresholds": {"a": 1.0, "b": 3.0}}]
    a, b, mean = panels(training_figure(late))["Learned thresholds"].lines
    assert np.isnan(b.get_ydata()).tolist() == [True, False]
    assert (a.get_ydata().tolist(), mean.get_ydata().tolist()) == ([1.0, 1.0], [1.0, 2.0])


def test_bars_stand_in_the_models_order_with_sparsity_and_size():
    figure = layer_sparsity_figure(layers(100))
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == [f"layer.{i}" for i in range(100)]
    assert axes.yaxis_inverted()
    assert [bar.get_width() for bar in axes.patches] == [i / 100 for i in range(100)]
    assert axes.texts[50].get_text() == "0.500 of 51k"
    # 12 points of height for each layer: enough for its name in 8 points
    assert figure.get_figheight() * 72 / 100 > 12


def test_the_overall_sparsity_weighs_layers_by_their_size():
    # (0.5 * 100 + 1.0 * 300) / 400 = 0.875
    two = [{"name": "a", "sparsity": 0.5, "numel": 100}, {"name": "b", "sparsity": 1.0, "numel": 300}]
    assert legend(layer_sparsity_figure(two)) == ["all weights: 0.875"]


def test_zeros_in_blocks_and_what_is_skipped_stand_within_the_bars():
    shares = [(0.8, 0.5, 0.0), (0.4, 0.1, 0.0)]
    three = [
        {"name": str(i), "sparsity": s, "block_sparsity": b, "exploitable": e, "numel": 100 * (i * 2 + 1)}
        for i, (s, b, e) in enumerate(shares)
    ]
    figure = layer_sparsity_figure(three)
    bars = [[bar.get_width() for bar in container] for container in figure.axes[0].containers]
    assert bars == [[0.8, 0.4], [0.5, 0.1], [0.0, 0.0]]
    heights = [container[0].get_height() for container in figure.axes[0].containers]
    assert heights == sorted(heights, reverse=True)
    # 100 and 300 weights: (0.8 + 3 x 0.4)/4, (0.5 + 3 x 0.1)/4
    assert legend(figure) == [
        "zeros: 0.500 of all weights",
        "in blocks of zeros: 0.200 of all weights",
        "skipped: 0.000 of all weights",
    ]


# --- several runs


def test_layers_of_several_runs_stand_in_one_row_each():
    a, b, c = ({"name": name, "sparsity": s, "numel": 4} for name, s in (("a", 0.25), ("b", 0.5), ("c", 1.0)))
    figure = runs_layers_figure({"acdc": [a, b], "dense": [b, c]})
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "b", "c"] and axes.yaxis_inverted()
    first, second = axes.lines
    assert (first.get_xdata().tolist(), first.get_ydata().tolist()) == ([0.25, 0.5], [0, 1])
    assert (second.get_xdata().tolist(), second.get_ydata().tolist()) == ([0.5, 1.0], [1, 2])
    assert legend(figure) == ["acdc", "dense"]


def test_runs_share_two_panels_and_one_legend():
    figure = runs_figure({"acdc": history(), "dense": history()})
    assert list(panels(figure)) == ["Training loss", "Sparsity"]
    assert legend(figure) == ["acdc", "dense"]


def test_equal_curves_of_two_runs_both_show():
    first, second = panels(runs_figure({"acdc": history(), "rigl": history()}))["Sparsity"].lines
    assert first.get_linewidth() > second.get_linewidth()


def test_twenty_runs_are_told_apart():
    figure = runs_figure({f"run {i}": history() for i in range(20)})
    lines = panels(figure)["Training loss"].lines
    assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == 20


def test_quality_stands_against_both_costs():
    runs = {
        "acdc": {"quality": 26.4, "train_flops_fraction": 0.6, "test_flops_fraction": 0.2, "sparsity": 0.9},
        "dense": {"quality": 26.6, "train_flops_fraction": 1.0},
        "failed": {"quality": None, "train_flops_fraction": 0.4},
    }
    figure = flops_quality_figure(runs, quality_name="accuracy")
    drawn = panels(figure)
    assert list(drawn) == ["accuracy against training cost", "accuracy against inference cost"]
    assert drawn["accuracy against training cost"].get_xlabel() == "training FLOPs (fraction of dense)"
    assert drawn["accuracy against training cost"].get_ylabel() == "accuracy"
    assert legend(figure) == ["acdc (sparsity 0.90)", "dense"]


def test_a_cost_above_dense_stays_in_the_picture():
    (axes,) = flops_quality_figure({"a": {"quality": 1.0, "train_flops_fraction": 1.7}}).axes
    assert axes.get_xlim()[1] > 1.7


def test_twenty_eight_runs_have_twenty_eight_markers():
    runs = {f"run {i}": {"quality": float(i), "train_flops_fraction": 0.5} for i in range(28)}
    (axes,) = flops_quality_figure(runs).axes
    drawn = [line for line in axes.get_lines() if str(line.get_label()).startswith("run ")]
    assert len({(line.get_color(), line.get_marker(), line.get_fillstyle()) for line in drawn}) == 28


def test_the_flops_axes_name_the_convention():
    runs = {"a": {"quality": 1.0, "train_flops_fraction": 0.5, "flops_convention": "swat"}}
    (axes,) = flops_quality_figure(runs).axes
    assert axes.get_xlabel() == "training FLOPs (fraction of dense, counted as swat)"
    drawn = panels(training_figure(history(), convention="swat"))
    assert drawn["Training cost so far"].get_ylabel() == "training FLOPs (fraction of dense, counted as swat)"


def test_costs_of_two_conventions_are_not_set_beside_each_other():
    run = {"quality": 1.0, "train_flops_fraction": 0.5}
    runs = {"a": {**run, "flops_convention": "swat"}, "b": {**run, "flops_convention": "rigl"}}
    with pytest.raises(ValueError, match="one FLOPs convention, got rigl, swat; draw the runs of each by themselves"):
        flops_quality_figure(runs)


def test_the_mask_change_is_drawn_in_the_order_of_phases():
    statistics = {"mask change at step 1000": 0.1, "mask change at step 200": 0.3, "dead at step 200": 0.02}
    figure = mask_change_figure({"acdc": statistics, "gmp": {}})
    change, dead = figure.axes
    assert list(panels(figure)) == ["Mask change between phases", "Weights still zero after a dense phase"]
    (line,) = change.lines
    assert (line.get_xdata().tolist(), line.get_ydata().tolist()) == ([200, 1000], [0.3, 0.1])
    assert dead.lines[0].get_ydata().tolist() == [0.02]
    assert legend(figure) == ["acdc"]
    assert change.get_ylim()[0] == 0.0


def test_the_mask_change_of_a_real_run_can_be_drawn():
    model = nn.Linear(8, 8)
    method = ACDC(sparsity=0.5, phases=Phases([(0, "sparse"), (1, "dense"), (2, "sparse")], 3))
    sparsifier = ts.sparsify(model, method, steps_per_epoch=2, total_steps=6)
    optimizer = torch.optim.SGD(sparsifier.param_groups(lr=0.5))
    sparsifier.attach(optimizer)
    for _ in range(6):
        optimizer.zero_grad()
        model(torch.randn(16, 8)).square().mean().backward()
        optimizer.step()
    statistics = sparsifier.report().overall()["method_statistics"]
    (line,) = panels(mask_change_figure({"acdc": statistics}))["Mask change between phases"].lines
    assert line.get_xdata().tolist() == [4]
    assert line.get_ydata().tolist() == [statistics["mask change at step 4"]]


# --- files


@pytest.mark.parametrize(
    ("plot", "data"),
    [
        (plot_training, history()),
        (plot_layer_sparsity, layers()),
        (plot_runs, {"acdc": history(), "dense": history()}),
        (plot_runs_layers, {"acdc": layers(), "dense": layers(3)}),
        (plot_flops_quality, {"acdc": {"quality": 26.4, "train_flops_fraction": 0.6}}),
        (plot_mask_change, {"acdc": {"mask change at step 10": 0.2}}),
    ],
)
def test_a_plot_is_a_png_with_something_in_it_and_leaves_nothing_else(tmp_path: Path, plot, data):
    path = plot(data, tmp_path / "new" / "picture.png")
    assert [file.name for file in path.parent.iterdir()] == ["picture.png"]
    assert path.read_bytes().startswith(b"\x89PNG")
    pixels = imread(path)
    assert min(pixels.shape[:2]) > 150
    assert 0.001 < (pixels[..., :3] < 0.9).any(axis=-1).mean() < 0.9


def test_a_plot_needs_no_pyplot(tmp_path: Path):
    program = (
        "import sys; from tritonsparse.eval.plots import plot_training; before = set(sys.modules);"
        "plot_training([{'step': 1, 'loss': 2.0}], 'a.png');"
        "assert 'matplotlib.pyplot' not in set(sys.modules) - before"
    )
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True)


@pytest.mark.parametrize(
    ("figure", "data", "remedy"),
    [
        (training_figure, [], "got none; log at least one step"),
        (training_figure, [{"loss": 1.0}], "step in entry 0, .*; log step with each entry"),
        (training_figure, [{"step": 1}], "got only step; log at least the loss"),
        (layer_sparsity_figure, [], "got none; pass the report's layers"),
        (
            layer_sparsity_figure,
            [{"name": "a", "sparsity": 90.0, "numel": 1}],
            "layer a, got 90.0; pass a fraction",
        ),
        (
            layer_sparsity_figure,
            [{"name": "a", "sparsity": 0.9, "numel": 0}],
            "layer a, got 0; pass the number",
        ),
        (runs_layers_figure, {}, "got none; pass label -> the report's layers"),
        (runs_layers_figure, {"acdc": []}, "got none; pass the report's layers"),
        (runs_figure, {}, "got none; pass label -> history"),
        (runs_figure, {"acdc": []}, "run 'acdc'.*got none; log at least one step"),
        (runs_figure, {"acdc": [{"step": 1}]}, "got neither; log at least the loss"),
        (
            layer_sparsity_figure,
            [{"name": "a", "sparsity": 0.9, "block_sparsity": 2.0, "numel": 1}],
            r"block_sparsity in \[0, 1\] for layer a, got 2.0; pass a fraction",
        ),
        (flops_quality_figure, {"acdc": {"quality": 1.0}}, "got 1 without; pass quality with"),
        (mask_change_figure, {"gmp": {"seed": 1.0}}, "got none in 1 runs; pass method_statistics"),
    ],
)
def test_what_cannot_be_drawn_is_an_error_with_its_remedy(figure, data, remedy):
    with pytest.raises(ValueError, match=remedy):
        figure(data)


# --- the program


def run_folder(parent: Path, name: str, content: Any) -> str:
    (parent / name).mkdir()
    (parent / name / "all_results.json").write_text(json.dumps(content), "utf-8")
    return str(parent / name)


def test_the_program_draws_what_the_results_allow(tmp_path: Path, capsys):
    runs = [
        run_folder(tmp_path, "one", results("acdc")),
        run_folder(tmp_path, "two", results("dense", layers=None, bleu=None)),
        run_folder(tmp_path, "three", {"method": "gmp", "layers": layers()}),
    ]
    assert main([*runs, "--output", str(tmp_path / "plots")]) == 0
    expected = [
        *("training_acdc", "layer_sparsity_acdc", "training_dense", "layer_sparsity_gmp"),
        *("runs", "layers", "flops_quality"),
    ]
    printed = capsys.readouterr().out.splitlines()
    assert [Path(line).stem for line in printed] == expected
    assert sorted(Path(line).name for line in printed) == sorted(p.name for p in (tmp_path / "plots").iterdir())


def test_every_quality_that_runs_have_gets_its_picture_and_phases_theirs(tmp_path: Path, capsys):
    cost = {"train_flops_fraction": 0.5}
    runs = [
        run_folder(tmp_path, "one", {"method": "str", "perplexity": 20.0, **cost}),
        run_folder(
            tmp_path, "two", {"method": "acdc", "top1": 0.7, "method_statistics": {"dead at step 5": 0.1}, **cost}
        ),
    ]
    assert main([*runs, "--output", str(tmp_path / "plots")]) == 0
    names = [Path(line).name for line in capsys.readouterr().out.splitlines()]
    assert names == ["flops_quality_perplexity.png", "flops_quality_top1.png", "mask_change.png"]


def test_two_runs_of_one_method_do_not_overwrite_each_other(tmp_path: Path):
    runs = [run_folder(tmp_path, name, {"method": "acdc", "history": history()}) for name in ("a", "b")]
    assert main([*runs, "--output", str(tmp_path / "plots")]) == 0
    assert len(list((tmp_path / "plots").glob("training_acdc*.png"))) == 2


@pytest.mark.parametrize(
    ("content", "remedy"),
    [
        (None, "give the --output_dir of a training program"),
        ("{", "give the --output_dir of a training program"),
        ("[]", "expected a JSON object"),
        ('{"method": "acdc"}', "let the training program finish first"),
        ('{"history": [{"loss": 1}]}', "log step with each entry"),
        ('{"history": 5}', "check the file"),
        ('{"layers": {"a": 1}}', "check the file"),
    ],
)
def test_bad_results_are_one_sentence_and_a_failing_exit_status(tmp_path: Path, capsys, content, remedy):
    if content is not None:
        (tmp_path / "all_results.json").write_text(content, "utf-8")
    assert main([str(tmp_path), "--output", str(tmp_path / "plots")]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ") and remedy in captured.err
    assert captured.err.count("\n") == 1
