"""README.md's tables: what the files say, for every kind of training run."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "benchmarks"))
import readme_results  # noqa: E402

SHARED = {
    "train_flops_fraction": 0.5, "test_flops_fraction": 0.25, "training_seconds": 90.0, "evaluations": [{}, {}],
    "split": "test", "environment": {"cpu_threads": 1, "commit": "abc", "torch": "2.13.0"},
}  # fmt: skip
RUNS: dict[str, tuple[dict[str, Any], str]] = {
    "top1": ({"top1": 0.8765, "arguments": {"recipe": "r", "preset": "resnet20"}}, "| 87.65% |"),
    "perplexity": ({"perplexity": 123.456, "arguments": {"recipe": "r", "test_file": "t.gz"}}, "| 123.46 |"),
    "bleu": (
        {"bleu": 31.657, "num_beams": 4, "bleu_signature": "sig", "arguments": {"recipe": "r", "test_file": "t.gz"}},
        "| 31.66 |",
    ),
}


def test_the_readme_says_what_the_files_say() -> None:
    assert readme_results.main(["--check"]) == 0


@pytest.mark.parametrize("key", RUNS)
def test_a_run_of_every_program_has_its_row(key: str, tmp_path: Path) -> None:
    own, cell = RUNS[key]
    for name, sparsity in (("sparse", 0.8), ("dense", 0.0)):
        folder = tmp_path / "some-cpu" / "corpus" / name
        folder.mkdir(parents=True)
        document = {**SHARED, **own, "method": name, "sparsity": sparsity}
        (folder / "all_results.json").write_text(json.dumps(document), encoding="utf-8")
    text = readme_results.tables(tmp_path)
    rows = [line for line in text.splitlines() if cell in line]
    assert [row.split(" | ")[1] for row in rows] == ["0.0%", "80.0%"]
    assert "**corpus on some-cpu**" in text and "--recipe r" in text
    assert f"| {readme_results.QUALITIES[key][0]} |" in text


def test_a_readme_without_marks_is_refused() -> None:
    with pytest.raises(ValueError, match="put them back"):
        readme_results.updated("no marks", ROOT / "benchmarks" / "results")
