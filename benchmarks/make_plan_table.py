"""Writes `kernels/plan_table.json`, from which `plan.choose` answers, out of results of a benchmark of the products.

    python benchmarks/make_plan_table.py benchmarks/results/*/masked_gemm.json

A result file lies in the folder of its device and holds `rows`; read of each row are

    op          "forward", "grad_input" or "grad_weight"
    m, n, k     rows of x, rows and columns of the weight as stored
    dtype       of x and the product: "bfloat16", "float16" or "float32"
    kind        "soft", "hard", "step", "mask" or "bits"
    provider    "inside" (the fused product) or "beside" (the view, then the vendor's product); others are left out
    verdict     "right", or the row is left out
    median_ms   milliseconds

An entry is made of the two rows of a case, from the same file. Entries of devices for which no file is given stay.
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
CASE = ("op", "m", "n", "k", "dtype", "kind")
PROVIDERS = ("beside", "inside")


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


def updated(table: Mapping[str, Any], results: Mapping[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """The table with each given device's entries replaced; sorted, so that equal results write equal files."""
    kept = [entry for entry in table["entries"] if entry["device"] not in results]
    entries = kept + [entry for device in results for entry in results[device]]
    order = ("device", *CASE)
    return {**table, "entries": sorted(entries, key=lambda entry: tuple(entry[name] for name in order))}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, help="result files, each in the folder of its device")
    parser.add_argument("--table", type=Path, default=TABLE, help="file to update, %(default)s by default")
    given = parser.parse_args(arguments)
    results: dict[str, list[dict[str, Any]]] = {}
    for path in given.files:
        device = path.resolve().parent.name
        rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
        results.setdefault(device, []).extend(entries_of(device, rows))
    table = updated(json.loads(given.table.read_text(encoding="utf-8")), results)
    write_json(given.table, table)
    print(f"{given.table}: {len(table['entries'])} entries, {sum(map(len, results.values()))} of them new")


if __name__ == "__main__":
    main()
