"""Writes `kernels/plan_table.json`, from which `plan.choose` answers, out of results of a benchmark of the products.

    python benchmarks/make_plan_table.py benchmarks/results/*/masked_gemm.json benchmarks/results/*/conv.json

A result file lies in the folder of its device and holds `rows`; read of each row are

    op          "forward", "grad_input" or "grad_weight"; of a convolution, conv/conv2d.py's conv_op_name
    m, n, k     rows of x or pixels of the result, rows and columns of the weight as stored
    dtype       of x and the product: "bfloat16", "float16" or "float32"
    kind        "soft", "hard", "step" or "mask"
    provider    "fused", or "unfused" (the effective weight, then the dense library product); others are left out
    verdict     "right", or the row is left out
    median_ms   milliseconds

An entry is made of the two rows of a case, from the same file. Of the rows of `bench_block.py` those are read that have
op "step", provider "ours" and verdict "right": their layer, `block`, `dtype`, `density` and `speedup` over dense. A
layer's entry is the largest density up to which every one measured was faster than dense, at every number of tokens; 0
where none was. Of the rows of `bench_semi_structured.py` the steps by "2:4" and "dense" are compared: a layer is faster
that was so at every number of tokens. Entries of devices for which no file is given stay.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parent))  # PYTHONSAFEPATH keeps a script's own folder off it
from harness import ROOT, write_json

TABLE = ROOT / "kernels" / "plan_table.json"
LAYER = ("n", "k", "rows", "columns", "dtype")
SEMI_STRUCTURED = ("n", "k", "dtype")
CASE = ("op", "m", "n", "k", "dtype", "kind")
PROVIDERS = ("unfused", "fused")


def entries_of(device: str, rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One entry for every case whose two providers were both right."""
    times: dict[tuple[Any, ...], dict[str, float]] = {}
    for row in rows:
        if row.get("provider") in PROVIDERS and row.get("verdict") == "right":
            times.setdefault(tuple(row[name] for name in CASE), {})[row["provider"]] = row["median_ms"]
    return [
        {"device": device, **dict(zip(CASE, case, strict=True)), **{f"{name}_ms": found[name] for name in PROVIDERS}}
        for case, found in times.items()
        if len(found) == len(PROVIDERS)
    ]


def blocks_of(device: str, rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One entry for every layer and block whose step was timed."""
    found: dict[tuple[Any, ...], dict[int, dict[float, float]]] = {}
    for row in rows:
        if row.get("op") == "step" and row.get("provider") == "ours" and row.get("verdict") == "right":
            layer = (row["n"], row["k"], row["block"], row["block"], row["dtype"])
            found.setdefault(layer, {}).setdefault(row["m"], {})[row["density"]] = row["speedup"]
    return [
        {
            "device": device,
            **dict(zip(LAYER, layer, strict=True)),
            "max_density": min(_largest(speedups) for speedups in by_tokens.values()),
        }
        for layer, by_tokens in found.items()
    ]


def semi_structured_of(device: str, rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One entry for every layer whose step was timed through 2:4 products and dense ones."""
    times: dict[tuple[Any, ...], dict[int, dict[str, float]]] = {}
    for row in rows:
        if row.get("op") == "step" and row.get("provider") in ("2:4", "dense") and row.get("verdict") == "right":
            layer = tuple(row[name] for name in SEMI_STRUCTURED)
            times.setdefault(layer, {}).setdefault(row["tokens"], {})[row["provider"]] = row["median_ms"]
    entries = []
    for layer, by_tokens in times.items():
        pairs = [found for found in by_tokens.values() if len(found) == 2]
        if pairs:
            faster = all(found["2:4"] < found["dense"] for found in pairs)
            entries.append({"device": device, **dict(zip(SEMI_STRUCTURED, layer, strict=True)), "faster": faster})
    return entries


def _largest(speedups: Mapping[float, float]) -> float:
    """The largest density up to which all are faster than dense; 0 where not even the smallest is."""
    largest = 0.0
    for density, speedup in sorted(speedups.items()):
        if speedup <= 1:
            break
        largest = density
    return largest


def rows_of(document: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The rows of a result file, or of all records in one; of quick forms first, so that full ones replace them."""
    if "rows" in document:
        return list(document["rows"])
    records = sorted((name != "quick", name) for name, record in document.items() if isinstance(record, dict))
    return [row for _, name in records for row in rows_of(document[name])]


PARTS = {
    "entries": (entries_of, CASE),
    "blocks": (blocks_of, LAYER),
    "semi_structured": (semi_structured_of, SEMI_STRUCTURED),
}


def updated(table: Mapping[str, Any], results: Mapping[str, list[Mapping[str, Any]]]) -> dict[str, Any]:
    """The table with the entries of each given device replaced by what its rows say; sorted, so that equal results
    write equal files."""
    parts = {}
    for part, (make, order) in PARTS.items():
        new = [entry for device, rows in results.items() for entry in make(device, rows)]
        # A file of one benchmark says nothing of another's.
        replaced = {entry["device"] for entry in new}
        entries = [entry for entry in table[part] if entry["device"] not in replaced] + new
        parts[part] = sorted(entries, key=lambda entry: tuple(entry[name] for name in ("device", *order)))
    return {**table, **parts}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, help="result files, each in the folder of its device")
    parser.add_argument("--table", type=Path, default=TABLE, help="file to update, %(default)s by default")
    given = parser.parse_args(arguments)
    results: dict[str, list[Mapping[str, Any]]] = {}
    for path in given.files:
        device = path.resolve().parent.name
        results.setdefault(device, []).extend(rows_of(json.loads(path.read_text(encoding="utf-8"))))
    table = updated(json.loads(given.table.read_text(encoding="utf-8")), results)
    write_json(given.table, table)
    print(f"{given.table}: {sum(len(table[part]) for part in PARTS)} entries")


if __name__ == "__main__":
    main()
