"""What a run of `first_contact.py` found: the ratios with their targets, tests, and what is missing.

A target is written "T4", or "T7@80" for the figure at 80 % sparsity. Figures that need several rows are made here:
forward, dX and dW together (T9, T10), and the sparsity at which ours takes as long as dense (T12).
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from row_log import read_rows

Row = dict[str, Any]
FILES = ("kernels", "blocks", "tests", "steps")
BAD = ("WRONG", "failed", "crashed", "hung")
TOGETHER = {128: "T9", 64: "T10"}


def rows_of(out: Path, run: str) -> list[Row]:
    """All rows of a run, file by file."""
    return [row for name in FILES for row in read_rows(out / f"{name}.jsonl") if row.get("run") == run]


def _figures(rows: Sequence[Row]) -> list[Row]:
    made = [
        {"step": row["step"], **ratio, "p20_ms": row.get("p20_ms"), "p80_ms": row.get("p80_ms")}
        for row in rows
        for ratio in row.get("ratios", ())
    ]
    blocks = [row for row in rows if row["step"] == "blocks" and row.get("median_ms") and row["provider"] == "ours"]
    return made + _together(blocks) + _break_even(blocks) + _first_calls(rows)


def _together(blocks: Sequence[Row]) -> list[Row]:
    """Forward, dX and dW of one block and density: all of dense over all of ours."""
    groups: dict[tuple[int, float], dict[str, Row]] = {}
    for row in blocks:
        groups.setdefault((row["block"], round(row["density"], 2)), {})[row["op"]] = row
    made = []
    for (block, density), ops in groups.items():
        if len(ops) == 3:
            ratio = sum(row["beside_ms"] for row in ops.values()) / sum(row["median_ms"] for row in ops.values())
            number = TOGETHER.get(block, "") if density < 1 else ""
            target = f"{number}@{round(100 * (1 - density))}" if number else ""
            name = f"forward + dX + dW, block {block}, {density:.0%} kept / dense"
            made.append({"step": "blocks", "name": name, "value": ratio, "target": target})
    return made


def _break_even(blocks: Sequence[Row]) -> list[Row]:
    """The sparsity, in per cent, from which on the forward is faster than dense; between the measured ones."""
    made = []
    for block in sorted({row["block"] for row in blocks}, reverse=True):
        forward = [row for row in blocks if row["block"] == block and row["op"] == "forward"]
        timed = sorted(((row["density"], row["beside_ms"] / row["median_ms"]) for row in forward), reverse=True)
        density = timed[0][0] if timed and timed[0][1] >= 1 else None
        for (above, slow), (below, fast) in pairwise(timed):
            if slow < 1 <= fast:
                # Time is all but linear in the density.
                density = above + (1 / slow - 1) / (1 / slow - 1 / fast) * (below - above)
        if density is not None:
            name = f"break-even sparsity of the forward, block {block}, per cent"
            made.append({"step": "blocks", "name": name, "value": 100 * (1 - density), "target": f"T12@{block}"})
    return made


def _first_calls(rows: Sequence[Row]) -> list[Row]:
    """The slowest first call among those for which something was compiled, in seconds."""
    times = [row["compile_s"] for row in rows if row.get("compiled")]
    name = "slowest first call of an operator, compiling included, s"
    return [{"step": "", "name": name, "value": max(times), "target": "T25"}] if times else []


def _judged(figure: Row, targets: dict[str, list[float]]) -> Row:
    """A figure beside what it is to reach on this card; "met" is whether it reaches the target, not only the floor."""
    goals = targets.get(figure["target"])
    if goals is None:
        return figure
    floor, goal, _ = goals
    met = figure["value"] <= goal if floor > goal else figure["value"] >= goal
    return {**figure, "floor": floor, "goal": goal, "met": met}


def summary_of(out: Path, run: str) -> Row:
    """The document of a run."""
    rows = rows_of(out, run)
    notes = [row for row in read_rows(out / "run.jsonl") if row.get("run") == run]
    environment: Row = next((row["environment"] for row in notes if "environment" in row), {})
    targets: dict[str, list[float]] = next((row["targets"] for row in notes if "targets" in row), {})
    figures = [_judged(figure, targets) for figure in _figures(rows)]
    bad = [
        {key: row[key] for key in ("step", "case", "provider", "verdict", "error", "bound", "failure") if key in row}
        for row in rows
        if row.get("verdict") in BAD
    ]
    return {
        "run": run,
        "environment": environment,
        "steps": {row["step"]: row["state"] for row in notes if "step" in row},
        "figures": figures,
        "bad": bad,
        "tests": dict(Counter(row["outcome"] for row in rows if "outcome" in row)),
        "failed_tests": [row["test"] for row in rows if row.get("outcome") in ("failed", "error")],
        "skipped": [f"{row['step']}: {row['case']}" for row in rows if row.get("verdict") == "skipped"],
    }


def summarize(out: Path, run: str, say: Callable[[str], None] | None = None) -> int:
    """Write `summary.json`, print it if asked; returns how many cases were wrong, failed or crashed."""
    document = summary_of(out, run)
    temporary = out / f".summary.json.{os.getpid()}"
    out.mkdir(parents=True, exist_ok=True)
    temporary.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, out / "summary.json")
    if say is not None:
        say(_printed(document))
    failed_steps = [name for name, state in document["steps"].items() if state in BAD]
    return len(document["bad"]) + len(failed_steps)


def _printed(document: Row) -> str:
    lines = []
    for row in document["bad"]:
        what = ", ".join(str(row[key]) for key in ("step", "case", "provider") if key in row)
        why = row.get("failure") or (f"error {row['error']}, bound {row['bound']}" if "error" in row else "")
        lines.append(f"{row['verdict']}: {what}: {why}"[:200])
    if document["skipped"]:
        lines.append(f"skipped for time: {len(document['skipped'])} cases, the first {document['skipped'][0]}")
    if document["tests"]:
        lines.append("tests: " + ", ".join(f"{count} {name}" for name, count in sorted(document["tests"].items())))
    lines += [f"  {name}" for name in document["failed_tests"][:20]]
    lines.append("steps: " + ", ".join(f"{name} {state}" for name, state in document["steps"].items()))
    cells = [("figure", "ratio", "target", "floor", "goal", "met")]
    for figure in document["figures"]:
        met = {True: "yes", False: "no"}.get(figure.get("met"), "-")
        floor, goal = (f"{figure[key]:.2f}" if figure.get(key) is not None else "-" for key in ("floor", "goal"))
        cells.append((figure["name"], f"{figure['value']:.3f}", figure["target"] or "-", floor, goal, met))
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for cell in cells:
        first, *rest = (
            word.ljust(width) if not place else word.rjust(width)
            for place, (word, width) in enumerate(zip(cell, widths, strict=True))
        )
        lines.append("  ".join([first, *rest]))
    return "\n".join(lines)
