"""Rows for the plan's table: of single results, of records in one file, and of quick forms that full ones replace."""

from __future__ import annotations

import make_plan_table


def test_rows_of_full_forms_come_after_those_of_quick_ones() -> None:
    def record(milliseconds: float) -> dict[str, object]:
        case = {"op": "forward", "m": 8, "n": 4, "k": 2, "dtype": "bfloat16", "kind": "soft", "verdict": "right"}
        return {"rows": [{**case, "provider": each, "median_ms": milliseconds} for each in ("unfused", "fused")]}

    document = {"masked_gemm": record(2.0), "quick": {"masked_gemm": record(1.0)}, "zero": {"queue": {}}}
    rows = make_plan_table.rows_of(document)
    assert [row["median_ms"] for row in rows] == [1.0, 1.0, 2.0, 2.0]
    (entry,) = make_plan_table.entries_of("gpu", rows)
    assert (entry["unfused_ms"], entry["fused_ms"]) == (2.0, 2.0)
    assert make_plan_table.rows_of(record(3.0)) == record(3.0)["rows"]
