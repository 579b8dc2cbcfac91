"""Writes README.md's tables of results from the files under benchmarks/results, and from nowhere else.

    python benchmarks/readme_results.py            rewrite what stands between the two marks
    python benchmarks/readme_results.py --check    exit 1 where the README does not say what the files say

A training run lies in results/<device>/<corpus>/<run>/all_results.json, as the training program wrote it; the folder's
name is the row's.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- results: made by benchmarks/readme_results.py -->", "<!-- end of results -->"


# What a run is measured by, by the key of its results: the column, how it is written, the program that trained it.
QUALITIES = {
    "bleu": ("BLEU", "{:.2f}", "translation"),
    "perplexity": ("perplexity", "{:.2f}", "language_modeling"),
    "top1": ("top-1", "{:.2%}", "image_classification"),
}


def tables(results: Path) -> str:
    """Every table, in Markdown."""
    parts = ["## Measured"]
    for corpus in sorted({path.parent.parent for path in results.glob("*/*/*/all_results.json")}):
        runs = [
            {"run": path.name, **json.loads((path / "all_results.json").read_text(encoding="utf-8"))}
            for path in sorted(corpus.iterdir())
            if (path / "all_results.json").is_file()
        ]
        parts.append(_training_table(f"{corpus.name} on {corpus.parent.name}", runs))
    return "\n\n".join(parts)


def _training_table(title: str, runs: Sequence[dict[str, Any]]) -> str:
    key = next(key for key in QUALITIES if key in runs[0])
    quality, form, program = QUALITIES[key]
    columns = (
        "run",
        "sparsity",
        quality,
        "training MACs",
        "inference MACs",
        "epochs",
        "minutes",
        "threads",
        "commit",
    )
    lines = [f"**{title}**", "", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for run in sorted(runs, key=lambda run: run["sparsity"]):
        environment = run["environment"]
        cells = (
            run["run"],
            f"{run['sparsity']:.1%}",
            form.format(run[key]),
            f"{run['train_flops_fraction']:.1%} of dense",
            f"{run['test_flops_fraction']:.1%} of dense",
            len(run["evaluations"]),
            f"{run['training_seconds'] / 60:.0f}",
            environment["cpu_threads"],
            f"`{environment['commit']}`",
        )
        lines.append(f"| {' | '.join(str(cell) for cell in cells)} |")
    first, counted = runs[0], "linear and convolution" if key == "top1" else "linear"
    lines += [
        "",
        f"{_measured(first)}; one seed; "
        f"`accelerate launch -m tritonsparse.train.{program} --recipe {first['arguments']['recipe']}` with "
        f"`--method` (and its fields) as in each run's `all_results.json`; torch {first['environment']['torch']}. "
        f"Multiply-adds are of all {counted} layers, counted from zeros.",
    ]
    return "\n".join(lines)


def _measured(run: dict[str, Any]) -> str:
    """On what, and how, a run's quality was measured."""
    where = str(run["arguments"].get("test_file") or run["split"])
    if "bleu" in run:
        return f"{where}, {run['num_beams']} beams, {run['bleu_signature']}"
    return where if "perplexity" in run else f"{where} split, {run['arguments']['preset']}"


def updated(readme: str, results: Path) -> str:
    """`readme` with the tables between its two marks replaced.

    Raises:
        ValueError: a mark is missing.
    """
    head, begin, rest = readme.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"readme_results: expected the marks {BEGIN} and {END} in README.md, got none; put them back")
    return f"{head}{BEGIN}\n\n{tables(results)}\n\n{END}{tail}"


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing, compare")
    args = parser.parse_args(argv)
    path = ROOT / "README.md"
    readme = path.read_text(encoding="utf-8")
    new = updated(readme, ROOT / "benchmarks" / "results")
    if args.check:
        return int(new != readme)
    path.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
