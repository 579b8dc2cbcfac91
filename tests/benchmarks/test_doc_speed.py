"""docs/speed.md: what the files say, the losing cases too, and nothing where there is no file."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "benchmarks"))
import bench_cpu_step  # noqa: E402
import doc_speed  # noqa: E402

LAYER = {"op": "step", "provider": "ours", "layer": "mlp", "n": 512, "k": 256, "m": 8192, "block": 64, "density": 0.5}
RIGHT = {**LAYER, "verdict": "right", "break_even": 0.4}
WRONG = {**LAYER, "block": 32, "speedup": None, "verdict": "WRONG", "break_even": None}
PEER = {**RIGHT, "speedup": 9.0, "provider": "stk"}
STEP = {"variant": "static", "sparsity": 0.9, "median_ms": 100.0, "ratio": 2.5, "ceiling": 3.1, "extra_b": -0.5}
FAILED = {"variant": "static", "sparsity": 0.95, "verdict": "failed"}
DENSE = {"variant": "dense", "mode": "compile", "median_ms": 50.0, "verdict": "right"}
BLOCKS = [{**RIGHT, "speedup": 0.8}, {**RIGHT, "density": 0.1, "speedup": 3.25}, WRONG, PEER]
FULL = {"block": {"rows": BLOCKS}, "block_step": {"block": 128, "tokens": 16384, "rows": [STEP, FAILED]}}
# Without the other densities nobody knows where it breaks even.
QUICK = {
    "block": {"rows": [{**LAYER, "speedup": 1.5}], "quick": True, "queue": {"state": "unfinished"}},
    "train_step": {"rows": [{**DENSE, "ratio": 0.95}], "preset": "p", "quick": True, "queue": {"state": "done"}},
}  # fmt: skip
FIGURE = {"name": "forward, block 128", "value": 6.0, "target": "T7@90", "floor": 6.5, "goal": 8.3, "met": False}
FIRST_CALL = {
    "environment": {"commit": "abc123"}, "steps": {"blocks": "done", "decoder": "hung"},
    "figures": [FIGURE, {"name": "no target", "value": 1.0, "target": ""}],
    "bad": [{"step": "blocks", "case": "block 32", "verdict": "WRONG"}],
}  # fmt: skip
# Files of a GPU's folder, what the page then says, and what it does not.
CASES: dict[str, tuple[dict[str, dict[str, Any]], list[str], list[str]]] = {
    "nothing": ({}, [doc_speed.NOTHING], ["|"]),
    "losing, wrong and failed ones too": (
        {"kernels.json": FULL, "train_step.json": {"preset": "transformer-base", "rows": [DENSE]}},
        [
            "| layer | weight | tokens | block | 50% sparse | 90% sparse | break-even |",
            "| mlp | 512x256 | 8,192 | 64 | 0.80 | 3.25 | 60% |", "| mlp | 512x256 | 8,192 | 32 | WRONG | - | never |",
            "| static | 90% | 100.0 | 2.50 | 3.10 | -0.50 |", "| static | 95% | failed | failed | failed | failed |",
            "| dense | compile | 50.0 | - | - |",
        ], ["9.00", doc_speed.NOTHING],
    ),
    "quick and unfinished runs stand in": (
        {"kernels.json": {"quick": QUICK}},
        ["| mlp | 512x256 | 8,192 | 64 | 1.50 | - |", "| dense | compile | 50.0 | 0.950 | - |",
         "few samples (`--quick`); the run is unfinished: cases are missing."], [],
    ),
    "full runs take their place": (
        {"kernels.json": {"quick": QUICK, "block": {**FULL["block"], "queue": {"state": "done"}}}},
        ["| mlp | 512x256 | 8,192 | 64 | 0.80 | 3.25 | 60% |"], ["unfinished", "1.50"],
    ),
    "the first call": (
        {"first_contact/summary.json": FIRST_CALL},
        ["| T7@90 | forward, block 128 | 6.00 | 6.50 | 8.30 | no |", "commit abc123",
         "Missing of these: decoder hung; WRONG: block 32."], ["no target"],
    ),
}  # fmt: skip


def section(folder: Path, files: dict[str, dict[str, Any]]) -> str:
    for name, document in {"empty.json": {}, **files}.items():
        path = folder / "nvidia-h200" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(document), encoding="utf-8")
    return doc_speed.section(folder)


@pytest.mark.parametrize("case", CASES)
def test_the_gpu_s_files_are_said(case: str, tmp_path: Path) -> None:
    files, said, unsaid = CASES[case]
    text = section(tmp_path, files)
    assert text.startswith(doc_speed.GPU)
    assert [part for part in said if part not in text] == [] and [part for part in unsaid if part in text] == []


def test_the_page_says_what_the_files_say_and_the_readme_the_range_of_costs_on_a_cpu() -> None:
    assert doc_speed.main(["--check"]) == 0
    (file,) = (ROOT / "benchmarks" / "results").glob("*/cpu_step.json")
    costs = [row["cost"] for row in doc_speed.cpu_costs(json.loads(file.read_text(encoding="utf-8")))]
    said = f"{costs[0]:.2f} to {costs[-1]:.2f} times as much"
    assert said in " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())


def test_a_step_on_a_cpu_is_measured_and_said_cheapest_first(tmp_path: Path) -> None:
    assert bench_cpu_step.main(["--smoke", "--out", str(tmp_path)]) == 0
    record = json.loads((tmp_path / "cpu" / "cpu_step.json").read_text(encoding="utf-8"))
    static, autosparse = record["rows"]
    assert all(row["cost"] == pytest.approx(row["ms"] / row["dense_ms"]) for row in (static, autosparse))
    rows = [{**static, "cost": 1.5}, {**autosparse, "cost": 1.25}, {**static, "method": "dense", "cost": 1.01}]
    text = section(tmp_path / "made", {"cpu_step.json": {**record, "rows": rows}})
    shown = [line.split(" | ")[0::3] for line in text.splitlines() if line.startswith("| `")]
    assert shown == [["| `autosparse`", "1.25 |"], ["| `static`", "1.50 |"]]
    assert text.startswith(doc_speed.CPU) and "costs 1.01 in the same way" in text and text.endswith(doc_speed.NOTHING)
