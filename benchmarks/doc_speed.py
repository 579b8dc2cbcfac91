"""Writes the figures of docs/speed.md from the result files, and from nothing else.

    python benchmarks/doc_speed.py [--check]

Read are `benchmarks/results/<device>/cpu_step.json` (bench_cpu_step.py), and of a GPU `kernels.json` and
`train_step.json`, as the queue writes them: the records `block` (bench_block.py), `block_step` (bench_block_step.py)
and the file of bench_train_step.py; where one has no rows, that of its quick form, `quick/block` and so on; and
`first_contact/summary.json`, as `first_contact.py` leaves it. A case that was not timed, because it was wrong or did
not run, is named as such, and so is a run that was ended before its last case. Without a GPU's file the text says that
there is none.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parent))  # PYTHONSAFEPATH keeps a script's own folder off it
from doc_marks import rewrite

NOTHING = (
    "No GPU has run these benchmarks yet, so no figure stands here and `auto` skips no blocks. "
    "`make first-contact BUDGET=570` measures every kernel in one call of ten minutes, and `make gpu` goes on from "
    "there. `python benchmarks/make_plan_table.py` and `python benchmarks/doc_speed.py` then fill in both."
)

CPU, GPU = "### What sparse training costs on a CPU", "### On a GPU"

Row = Mapping[str, Any]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]


def _number(row: Row, key: str, spec: str) -> str:
    """A figure; of a case that has none, why: "WRONG" or "failed"."""
    value = row.get(key)
    if value is not None:
        return format(value, spec)
    return "-" if row.get("verdict", "right") == "right" else str(row["verdict"])


def cpu_costs(record: Mapping[str, Any]) -> list[Row]:
    """The rows of sparse methods, cheapest first; "dense" is a check of the measurement, near 1."""
    return sorted((row for row in record["rows"] if row["method"] != "dense"), key=lambda row: float(row["cost"]))


def _steps_on_a_cpu(record: Mapping[str, Any]) -> list[str]:
    """What a sparse training step costs where nothing skips zeros."""
    rows = [
        [f"`{row['method']}`", row["pattern"], f"{row['ms']:.0f}", f"{row['cost']:.2f}"] for row in cpu_costs(record)
    ]
    environment = record["environment"]
    dense = next((row["cost"] for row in record["rows"] if row["method"] == "dense"), None)
    check = "" if dense is None else f" `dense`, which prunes nothing, costs {dense:.2f} in the same way."
    text = (
        f"A GPT-2 of {record['layers']} layers and width {record['width']}, {record['tokens']:,} tokens a step, "
        f"float32, sparsity {record['sparsity']:.0%} where a method takes one: mean CPU time of a step, and over that "
        f"of the dense model, whose steps were taken in turn (`bench_cpu_step.py`; {record['threads']} thread of an "
        f"{record['processor']}, torch {environment['torch']}, commit `{environment['commit']}`). In so few steps "
        f"AC/DC changes phase and GMP moves its masks more often than in a real run, which costs them more; updates of "
        f"masks that come every 100 steps are not in it.{check}"
    )
    return [text, "", *_table(("method", "pattern", "ms", "times dense's time"), rows)]


def _step_of_blocks(record: Mapping[str, Any]) -> list[str]:
    """Whole training steps beside the dense one of the same run."""
    rows = [
        [
            row["variant"], f"{row['sparsity']:.0%}", _number(row, "median_ms", ".1f"),
            _number(row, "ratio", ".2f"), _number(row, "ceiling", ".2f"), _number(row, "extra_b", "+.2f"),
        ]
        for row in record["rows"] if row["variant"] != "dense"
    ]  # fmt: skip
    head = ("variant", "sparsity", "ms", "times dense", "ceiling", "bytes a weight beyond dense")
    text = (
        f"A training step of a decoder of 1.1 B weights, blocks of {record['block']}, {record['tokens']:,} tokens, "
        f"bf16, compiled, beside the dense model's in one run (`bench_block_step.py`, which says what the ceiling is):"
    )
    return [text, "", *_table(head, rows)]


def _layers_of_blocks(record: Mapping[str, Any]) -> list[str]:
    """Forward, dX and dW of layers, topology included, over the dense products of the same run."""
    steps = [row for row in record["rows"] if row["op"] == "step" and row["provider"] == "ours"]
    densities = sorted({round(row["density"], 2) for row in steps}, reverse=True)
    cases: dict[tuple[Any, ...], dict[float, Row]] = {}
    for row in steps:
        case = (row["layer"], row["n"], row["k"], row["m"], row["block"])
        cases.setdefault(case, {})[round(row["density"], 2)] = row
    rows = []
    for (layer, n, k, m, block), found in cases.items():
        first = next(iter(found.values()))
        cells = [_number(found[each], "speedup", ".2f") if each in found else "-" for each in densities]
        rows.append([layer, f"{n}x{k}", f"{m:,}", str(block), *cells, _break_even(first)])
    head = ("layer", "weight", "tokens", "block", *(f"{1 - each:.0%} sparse" for each in densities), "break-even")
    text = (
        "Forward, dX and dW of one layer, the rebuilding of its topology included: times as fast as the dense products "
        "of cuBLAS on random weights, and the sparsity from which that is more than 1 (`bench_block.py`):"
    )
    return [text, "", *_table(head, rows)]


def _break_even(row: Row) -> str:
    """Of an unfinished run it is not known."""
    if "break_even" not in row:
        return "-"
    return "never" if row["break_even"] is None else f"{1 - row['break_even']:.0%}"


def _element_steps(document: Mapping[str, Any]) -> list[str]:
    """What unstructured AutoSparse costs beside the dense step."""
    rows = [
        [row["variant"], row["mode"], _number(row, "median_ms", ".1f"), _number(row, "ratio", ".3f"),
         _number(row, "extra_b", "+.2f")]
        for row in document["rows"]
    ]  # fmt: skip
    head = ("variant", "mode", "ms", "times dense", "bytes a weight beyond dense")
    text = (
        f"Unstructured AutoSparse, {document['preset']}: it cannot be faster than dense, 1 would be free "
        f"(`bench_train_step.py`):"
    )
    return [text, "", *_table(head, rows)]


def _first_contact(summary: Mapping[str, Any]) -> list[str]:
    """The figures of the first call that have a target on this card, and what of it went wrong."""
    verdicts = {True: "yes", False: "no"}
    rows = [
        [figure["target"], figure["name"], f"{figure['value']:.2f}", f"{figure['floor']:.2f}", f"{figure['goal']:.2f}",
         verdicts[figure["met"]]]
        for figure in summary["figures"] if figure.get("goal") is not None
    ]  # fmt: skip
    commit = summary["environment"].get("commit") or "unknown"
    lines = [
        f"The first call (`make first-contact`, commit {commit}), ratios beside dense in one run:",
        "",
        *_table(("target", "figure", "measured", "must", "goal", "reached"), rows),
    ]
    missing = [f"{name} {state}" for name, state in summary["steps"].items() if state != "done"]
    missing += [f"{row['verdict']}: {row.get('case', row['step'])}" for row in summary["bad"]]
    return [*lines, *(["", f"Missing of these: {'; '.join(missing)}."] if missing else [])]


PARAGRAPHS = {"block_step": _step_of_blocks, "block": _layers_of_blocks, "train_step": _element_steps}


def _reservation(record: Mapping[str, Any]) -> list[str]:
    """What keeps the figures from being whole."""
    state = record.get("queue", {}).get("state", "done")
    parts = ["few cases and few samples (`--quick`)"] if record.get("quick") else []
    parts += [f"the run is {state}: cases are missing"] if state in ("failed", "unfinished") else []
    return ["", f"Of these: {'; '.join(parts)}."] if parts else []


def section(results: Path) -> str:
    """The text between the marks."""
    folders = sorted(path for path in results.iterdir() if path.is_dir())
    measured = [record for folder in folders if (record := _read(folder / "cpu_step.json"))]
    on_cpus = [line for record in measured for line in ("", *_steps_on_a_cpu(record))]
    parts: list[str] = []
    for folder in folders:
        records = _read(folder / "kernels.json")
        full = {**records, "train_step": _read(folder / "train_step.json")}
        paragraphs = []
        for name, make in PARAGRAPHS.items():
            forms = (full.get(name) or {}, (records.get("quick") or {}).get(name) or {})
            record = next((form for form in forms if form.get("rows")), None)
            if record:
                paragraphs.append([*make(record), *_reservation(record)])
        summary = _read(folder / "first_contact" / "summary.json")
        if any(figure.get("goal") is not None for figure in summary.get("figures", [])):
            paragraphs.insert(0, _first_contact(summary))
        if paragraphs:
            parts += [f"**{folder.name}**", ""]
            for lines in paragraphs:
                parts += [*lines, ""]
    on_gpus = "\n".join(parts).strip() or NOTHING
    return "\n".join([*([CPU, *on_cpus, ""] if measured else []), GPU, "", on_gpus])


def _read(path: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return document


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    return rewrite(argv, __doc__, section, "doc_speed", "speed.md")


if __name__ == "__main__":
    sys.exit(main())
