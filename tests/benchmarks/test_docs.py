"""docs/results.md and docs/speed.md: what the files say, the losing cases too, and nothing where there is no file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import bench_cpu_step
import doc_marks
import doc_methods
import doc_results
import doc_speed
import pytest

ROOT = Path(__file__).parents[2]


def written(folder: Path, files: dict[str, Any]) -> Path:
    for name, document in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(document), encoding="utf-8")
    return folder


# What any file holds; each of FILES changes some of it.
RUN = {
    "sparsity": 0.0, "train_flops_fraction": 0.5, "test_flops_fraction": 0.25, "training_seconds": 90.0,
    "split": "test", "evaluations": [{}, {}],
    "environment": {"cpu_threads": 1, "threads": 1, "commit": "abc", "torch": "2.13.0"},
    "arguments": {"recipe": "r", "test_file": "t.gz"}, "block_sparsity": 0.0, "layers": [{"sparsity": 0.0}],
    "epoch_losses": [3.0, 2.5], "num_beams": 4, "bleu_signature": "sig",
}  # fmt: skip
ACDC = {"sparsity": 0.7, "block_sparsity": 0.75, "layers": [{"sparsity": 0.5}, {"sparsity": 0.9}]}
IMAGES = {"recipe": "r", "preset": "resnet20", "augmentation": "crop", "max_train_samples": 20000}
ALIKE = {"agreement": 0.9321, "cross_entropy": 0.25, "entropy": 0.125, "predictions": 10000}
EPOCHS = [dict.fromkeys(("top1", "corrupted_as_true", "corrupted_as_labelled"), share) for share in (0.123, 0.875)]
STOCK = {"batch_size": 1, "model": "dense", "median": 0.006, "verdict": "ok"}
OURS = {**STOCK, "model": "compressed rows", "median": 0.004, "speedup": 1.5, "layers": [{"used": True}]}
WRONG = {"batch_size": 64, "model": "compressed rows", "verdict": "WRONG", "layers": [{"used": False}]}
CORRUPTED = {**IMAGES, "method": "acdc", "num_train_epochs": 2, "corrupted_samples": 40, "max_train_samples": None}
FILES: dict[str, dict[str, Any]] = {
    "blocks/acdc/all_results.json": {"bleu": 31.657, **ACDC, "arguments": {**RUN["arguments"], "pattern": "block:16"}},
    "blocks/dense/all_results.json": {"bleu": 30.0},
    "images/acdc/all_results.json": {"top1": 0.8765, "sparsity": 0.8, "arguments": IMAGES},
    "images/dense/all_results.json": {"top1": 0.75, "arguments": IMAGES},
    "images/cost.png": {},
    "images/twins.json": {"top1": 0.87, "twin": {"top1": 0.88, **ALIKE}},
    "images/memorization.json": {"runs": {"plain": {"dense": EPOCHS}}, "arguments": CORRUPTED},
    "words/acdc/all_results.json": {"perplexity": 123.456, "sparsity": 0.8, "train_flops_recounted": {"fraction": 0.4}},
    "words/twins.json": ALIKE,
    "inference/resnet.json": {"sparsity": 0.9, "rows": [STOCK, OURS, {**STOCK, "batch_size": 64}, WRONG]},
}
# What stands under each heading, all in this order.
SAID = {
    doc_results.TRAINING: [],
    "**blocks on some-cpu**": [
        "| run | sparsity | of blocks | of its layers | training loss | BLEU |",
        "| dense | 0.0% | 0.0% | 0% to 0% | 2.500 | 30.00 |", "| acdc | 70.0% | 75.0% | 50% to 90% | 2.500 | 31.66 |",
        "t.gz, 4 beams, sig; one seed; `accelerate launch -m tritonsparse.train.translation --", doc_results.BLOCKS,
    ],
    "**images on some-cpu**": [
        "| top-1 |", "| dense | 0.0% | 75.00% |", "| acdc | 80.0% | 87.65% | 50.0% of dense | 25.0% of dense | 2 | 2 |",
        "resnet20, 20,000 training images, augmentation 'crop'", "train.image_classification --recipe r`",
        "top-1 88.00% beside 87.00%; they agree on 93.21% of 10,000 predictions",
        "![images: cost](../benchmarks/results/some-cpu/images/cost.png)",
    ],
    "**words on some-cpu**": [
        "| perplexity |", "| acdc | 80.0% | 123.46 | 40.0% of dense |", "train.language_modeling --", "93.21%",
    ],
    "**images, labels corrupted, on some-cpu**": [
        "| dense | plain | 87.5% | 87.5% | 87.5% |", "all training images, 40 of them",
        "(../benchmarks/results/some-cpu/images/memorization.png)", doc_results.INFERENCE,
    ],
    "**Inference on some-cpu**": [
        "| resnet | 90.0% | 1 | 6.00 ms | 4.00 ms | 1.50 | 1 of 1 | `abc` |", "| 64 | 6.00 ms | WRONG |  | 0 of 1 |",
    ],
}  # fmt: skip


def test_every_file_is_said_under_its_heading_and_the_page_says_what_its_files_say(tmp_path: Path) -> None:
    assert doc_results.main(["--check"]) == doc_methods.main(["--check"]) == 0
    results = tmp_path / "benchmarks" / "results"
    written(results / "some-cpu", {name: {**RUN, **document} for name, document in FILES.items()})
    text = doc_results.tables(results)
    assert "12.3%" not in text and text.count("![") == 2
    for part in (part for heading, parts in SAID.items() for part in (heading, *parts)):
        _, found, text = text.partition(part)
        assert found, part


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
    written(folder / "nvidia-h200", {"empty.json": {}, **files})
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
    # A page without marks is refused.
    with pytest.raises(ValueError, match=r"doc_results: expected <!-- results: written .* put them back"):
        doc_marks.updated("no marks", "", "doc_results")


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
