"""Training costs of hand-sized runs, one for each way in which they were miscounted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import recount_training

LAYERS = [{"name": "a", "shape": [4, 4], "numel": 16, "macs": 100.0, "macs_kept": 50.0}]
BLOCKS = {"pattern": "block:2"}
PHASES = {"starts": [[0, "dense"], [0.5, "sparse"], [1, "dense"], [1.5, "sparse"]], "epochs": 2}


def run(method: str, fields: dict[str, Any], sparsities: dict[int, float], **more: Any) -> dict[str, Any]:
    """Two epochs of four steps, rows at some; a layer of 100 multiply-adds, half of them kept at the end."""
    rows = [
        {"step": at, "epoch": at / 4, "layer_sparsity": {"a": share}, "train_flops_fraction": 0.25}
        for at, share in sparsities.items()
    ]
    return {
        "method": method, "method_fields": fields, "history": rows, "layers": LAYERS, "steps": 8,
        "arguments": {"pattern": "unstructured"}, "evaluations": [{}, {}], "test_flops_fraction": 0.5,
        "train_flops_fraction": 0.25, **more,
    }  # fmt: skip


CASES: dict[str, tuple[dict[str, Any], float]] = {
    # Steps 2, 3, 6 and 7 are sparse: (1 + 1/2)/2, although every row but the second is of a sparse phase.
    "phases": (run("acdc", {"sparsity": 0.5, "phases": PHASES}, {3: 0.5, 4: 0.0, 7: 0.5, 8: 0.5}), 0.75),
    # A dense run that went on from a twin, whose epoch was evaluated sparse.
    "a twin": (run("dense", {}, {3: 0.5, 8: 0.0}, evaluations=[{"phase": "sparse"}, {"phase": "dense"}]), 0.75),
    # Half is kept throughout, though half of that had just grown at steps 4 and 8.
    "fixed counts": (
        run("set", {"sparsity": 0.5, "update_every": 2, "drop_fraction": 0.5}, {3: 0.5, 4: 0.75, 8: 0.75}), 0.5,
    ),
    # RigL updates before step 6 = 0.75 * 8: dW is (2/2 + 1)/3 there, a half in the last two steps.
    "RigL": (run("rigl", {"sparsity": 0.5, "update_every": 2}, {4: 0.5, 8: 0.5}), (1 + (6 * 2 / 3 + 2 * 0.5) / 8) / 3),
    # Another layer than "a" has as much work, and all of it: 3/4.
    "dense layers": (run("static", {"sparsity": 0.5}, {4: 0.5, 8: 0.5}, test_flops_fraction=0.75), 0.75),
    # Updates every two steps until step 6, of the one layer: half, whatever has just grown; dW is dense all along.
    "moving counts": (run("snfs", {"sparsity": 0.5, "update_every": 2}, {4: 0.75, 7: 0.5, 8: 0.5}), 2 / 3),
    # p_0 = 0, p_2 = 0.5 - 0.5 (1 - 2/4)^3 = 7/16, p_4 = 1/2 on: 16 weights keep 16, 9 and 8.
    "ramps": (
        run("gmp", {"sparsity": 0.5, "update_every": 2, "end": 0.5}, {3: 0.4375, 8: 0.5}),
        (2 + 2 * 9 / 16 + 4 / 2) / 8,
    ),
    # A row shows what the coming step sees: all is kept in the first epoch, half in the second. dW is dense.
    "epochs": (run("optg", {"sparsity": 0.5}, {3: 0.0, 4: 0.5, 8: 0.5}), (1 + (1 + 2 * 0.5) / 3) / 2),
    # Four blocks, of which p_2 = 7/16 and p_4 = 1/2 leave two.
    "blocks": (
        run("str", {"sparsity": 0.5, "control_every": 2, "reach_by": 0.5}, {3: 0.5, 8: 0.5}, arguments=BLOCKS),
        (2 + 6 * 0.5) / 8,
    ),
    # From 1, for t = 0 prunes nothing, by way of 3/4 to 1/2: 3/4 in the mean. dW is dense.
    "thresholds": (run("dst", {}, {4: 0.25, 8: 0.5}), (1 + 2 * 0.75) / 3),
    # The same, by the line through both rows. dW is dense while alpha > 0, in the first epoch; then it is 5/8.
    "alpha": (
        run("autosparse", {"alpha": 0.4, "alpha_schedule": "exponential", "zero_alpha_epoch": 1}, {4: 0.25, 8: 0.5}),
        (2 * 0.75 + (1 + 0.625) / 2) / 3,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_every_step_is_billed_by_what_it_saw(case: str, tmp_path: Path) -> None:
    document, right = CASES[case]
    path = tmp_path / "all_results.json"
    path.write_text(json.dumps(document), encoding="utf-8")
    picture = path.with_name("training.png")
    if case == "phases":
        picture.touch()
    recount_training.recount(path, "abc")
    # A picture is drawn anew where there is one.
    assert bool(picture.exists() and picture.stat().st_size) == (case == "phases")
    written = json.loads(path.read_text(encoding="utf-8"))
    found = written.pop("train_flops_recounted")
    assert written == document and found.pop("fraction") == pytest.approx(right)
    assert found == {"published": 0.25, "command": "python benchmarks/recount_training.py", "commit": "abc"}


def test_rows_that_the_masks_do_not_explain_are_refused() -> None:
    with pytest.raises(ValueError, match="expected masks of static that keep what is not zero at step 4"):
        recount_training.fractions(run("static", {"sparsity": 0.5}, {4: 0.25, 8: 0.5}))
