"""README.md's figures of speed: what the GPU's files say, the losing cases too, and nothing where there is no file."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "benchmarks"))
import readme_marks  # noqa: E402
import readme_speed  # noqa: E402


def test_the_readme_says_what_the_files_say() -> None:
    assert readme_speed.main(["--check"]) == 0


def test_without_a_gpu_s_files_it_says_so(tmp_path: Path) -> None:
    (tmp_path / "some-cpu").mkdir()
    assert readme_speed.section(tmp_path) == readme_speed.NOTHING


def test_every_case_has_its_cell_the_losing_and_the_wrong_ones_too(tmp_path: Path) -> None:
    layer = {"op": "step", "provider": "ours", "layer": "mlp", "n": 512, "k": 256, "m": 8192}
    block_rows: list[dict[str, Any]] = [
        {**layer, "block": 64, "density": 0.5, "speedup": 0.8, "verdict": "right", "break_even": 0.4},
        {**layer, "block": 64, "density": 0.1, "speedup": 3.25, "verdict": "right", "break_even": 0.4},
        {**layer, "block": 32, "density": 0.5, "speedup": None, "verdict": "WRONG", "break_even": None},
        {**layer, "block": 64, "density": 0.5, "speedup": 9.0, "verdict": "right", "provider": "stk"},
    ]
    step = {"variant": "static", "sparsity": 0.9, "median_ms": 100.0, "ratio": 2.5, "ceiling": 3.1, "extra_b": -0.5}
    failed = {"variant": "static", "sparsity": 0.95, "verdict": "failed"}
    dense = {"variant": "dense", "mode": "compile", "median_ms": 50.0, "verdict": "right"}
    folder = tmp_path / "nvidia-h200"
    folder.mkdir()
    records = {"block": {"rows": block_rows}, "block_step": {"block": 128, "tokens": 16384, "rows": [step, failed]}}
    (folder / "kernels.json").write_text(json.dumps(records))
    (folder / "train_step.json").write_text(json.dumps({"preset": "transformer-base", "rows": [dense]}))
    lines = readme_speed.section(tmp_path).splitlines()
    assert "| layer | weight | tokens | block | 50% sparse | 90% sparse | break-even |" in lines
    assert "| mlp | 512x256 | 8,192 | 64 | 0.80 | 3.25 | 60% |" in lines
    assert "| mlp | 512x256 | 8,192 | 32 | WRONG | - | never |" in lines
    assert "| static | 90% | 100.0 | 2.50 | 3.10 | -0.50 |" in lines
    assert "| static | 95% | failed | failed | failed | failed |" in lines
    assert "| dense | compile | 50.0 | - | - |" in lines


def test_quick_and_unfinished_runs_stand_in_and_are_named(tmp_path: Path) -> None:
    row = {"op": "step", "provider": "ours", "layer": "mlp", "n": 512, "k": 256, "m": 8192, "verdict": "right"}
    rows = [{**row, "block": 64, "density": 0.5, "speedup": 1.5}]
    step = {"variant": "triton", "mode": "compile", "median_ms": 50.0, "ratio": 0.95, "verdict": "right"}
    quick = {
        "block": {"rows": rows, "quick": True, "queue": {"state": "unfinished"}},
        "train_step": {"rows": [step], "preset": "transformer-big", "quick": True, "queue": {"state": "done"}},
    }
    folder = tmp_path / "nvidia-h200"
    folder.mkdir()
    write = (folder / "kernels.json").write_text
    write(json.dumps({"quick": quick}))
    text = readme_speed.section(tmp_path)
    # Without the other densities nobody knows where it breaks even.
    assert "| mlp | 512x256 | 8,192 | 64 | 1.50 | - |" in text and "| triton | compile | 50.0 | 0.950 | - |" in text
    assert "few samples (`--quick`); the run is unfinished: cases are missing." in text
    full = {"rows": [{**rows[0], "speedup": 1.75, "break_even": 0.8}], "queue": {"state": "done"}}
    write(json.dumps({"quick": quick, "block": full}))
    text = readme_speed.section(tmp_path)
    assert "| mlp | 512x256 | 8,192 | 64 | 1.75 | 20% |" in text and "unfinished" not in text and "1.50" not in text


def test_a_readme_without_the_marks_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="readme_speed: expected <!-- "):
        readme_marks.updated("no marks", "", readme_speed.MARKS, "readme_speed")


def test_the_first_call_stands_before_the_rest_with_its_targets_and_what_went_wrong(tmp_path: Path) -> None:
    document = {
        "environment": {"commit": "abc123"},
        "steps": {"blocks": "done", "decoder": "hung"},
        "figures": [
            {"name": "forward ours, block 128, 10% kept / dense", "value": 6.0, "target": "T7@90"}
            | {"floor": 6.5, "goal": 8.3, "met": False},
            {"name": "no target", "value": 1.0, "target": ""},
        ],
        "bad": [{"step": "blocks", "case": "block 32", "verdict": "WRONG"}],
    }
    folder = tmp_path / "nvidia-h200" / "first_contact"
    folder.mkdir(parents=True)
    (folder / "summary.json").write_text(json.dumps(document), encoding="utf-8")
    text = readme_speed.section(tmp_path)
    assert "| T7@90 | forward ours, block 128, 10% kept / dense | 6.00 | 6.50 | 8.30 | no |" in text
    assert "commit abc123" in text and "no target" not in text
    assert "Missing of these: decoder hung; WRONG: block 32." in text
