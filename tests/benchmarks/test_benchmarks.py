"""Benchmark programs start on any machine; a wrong result gets no time, and a variant that fails is a row."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import bench_block
import bench_train_step
import bench_whole_model
import block_products
import harness
import make_plan_table
import pytest
import torch

from tritonsparse.kernels.select.topk import topk_cutoff

BENCHES = (
    "threshold", "masked_gemm", "conv", "whole_model", "packed", "train_step", "block", "block_step",
    "block_inference", "semi_structured", "transfo_xl",
)  # fmt: skip
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")


@pytest.mark.parametrize("name", BENCHES)
def test_smoke_prints_machine_table_and_json_and_writes_the_same(name: str, tmp_path: Path, program: Any) -> None:
    run = program(f"bench_{name}", "--smoke", "--out", str(tmp_path))
    assert run.returncode == 0, run.stdout + run.stderr
    lines = run.stdout.splitlines()
    assert lines[0].startswith("device ") and "median_ms" in lines[1]
    document = json.loads(lines[-1])
    assert {row["verdict"] for row in document["rows"]} == {"right"}
    assert all(row["median_ms"] > 0 for row in document["rows"])
    assert name != "block" or {row["op"] for row in document["rows"]} == {*bench_block.OPS, "index"}
    # The rows stand in the document; of a run that ended well no other file is left.
    (written,) = tmp_path.glob("*/*")
    assert written.name == f"{'train_step_transfoxl-large' if name == 'transfo_xl' else name}.json"
    assert json.loads(written.read_text()) == document


@no_gpu
@pytest.mark.parametrize("name", ["bench_threshold", "gpu_queue"])
def test_without_a_gpu_programs_refuse_in_one_sentence(name: str, tmp_path: Path, program: Any) -> None:
    run = program(name, "--out", str(tmp_path))
    assert run.returncode == 2 and run.stdout == ""
    assert run.stderr.startswith(f"{name}: expected a GPU") and run.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_case_beyond_its_bound_is_wrong_and_gets_no_time() -> None:
    def never() -> harness.Timing:
        raise AssertionError("a wrong case was timed")

    for error in (0.2, float("nan")):
        row = harness.gated({"case": "c"}, error, 0.1, never)
        assert row["verdict"] == "WRONG" and row["median_ms"] is None
        assert "WRONG" in harness.table([row], {"case": "", "median_ms": ".2f"})
    right = harness.gated({}, 0.1, 0.1, lambda: harness.Timing.of([1.0, 2.0, 3.0, 4.0, 5.0, 9.0]))
    # Sorted positions 0.5, 0.2 and 0.8 of 5: the third (2.5 rounds to even), the second and the fifth.
    assert (right["median_ms"], right["p20_ms"], right["p80_ms"]) == (3.0, 2.0, 5.0)


def test_a_variant_that_does_not_run_is_a_row_with_its_error(monkeypatch: pytest.MonkeyPatch) -> None:
    short = partial(bench_train_step.build_model, max_positions=8)
    monkeypatch.setattr(bench_train_step, "build_model", short)
    case = bench_train_step.Case("transformer-tiny", 64, 1, 4, "cpu", "no such compiler")
    rows = list(bench_train_step.bench(case, ("torch",), ("eager", "compile"), 1, 1))
    assert [(row["variant"], row["verdict"]) for row in rows] == [
        ("dense", "right"), ("torch", "right"), ("dense", "failed"), ("torch", "failed"),
    ]  # fmt: skip
    assert all("no such compiler" in row["failure"] and "median_ms" not in row for row in rows[2:])


def of_times(times: dict[float, float]) -> list[bench_block.Row]:
    """Rows of "ours" beside a dense product that takes 1."""
    return [{"density": density, "speedup": 1 / time} for density, time in times.items()]


def test_break_even_is_where_a_line_between_measured_times_meets_the_dense_one() -> None:
    # From 1.2 at 1 to 0.7 at 0.5: two fifths of the way down.
    assert bench_block.break_even(of_times({1.0: 1.2, 0.5: 0.7, 0.1: 0.2})) == pytest.approx(0.8)
    assert bench_block.break_even(of_times({1.0: 1.0, 0.5: 0.7})) == 1.0
    assert bench_block.break_even(of_times({1.0: 3.0, 0.5: 2.0})) is None
    # A density whose result was wrong has no time.
    rows = [{"density": 1.0}, *of_times({0.5: 1.5, 0.1: 0.5})]
    assert bench_block.break_even(rows) == pytest.approx(0.3)


def test_a_library_that_fails_is_a_row_with_its_error_and_other_tiles_are_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = list(bench_block.bench(bench_block.SMOKE_CASES[0], 7, 16, 0.5, "forward", tiles=True))
    names = [row["provider"] for row in rows]
    assert names[:4] == ["dense random", "dense masked", "ours", "ours, pointers"] and len(names) == 7
    assert {row["verdict"] for row in rows} == {"right"}
    assert block_products.other_tiles(64)["512 rows"]["m"] == 512

    def absent(*_: object) -> block_products.Provider:
        raise RuntimeError("no such operator")

    made = block_products.providers_of(16, 0.5, "step", others=True, tune=False, tiles=False)
    monkeypatch.setattr(bench_block, "providers_of", lambda *_, **__: made | {"torch bsr": absent})
    rows = list(bench_block.bench(bench_block.SMOKE_CASES[0], 7, 16, 0.5, "step"))
    assert [row["verdict"] for row in rows] == ["right"] * 3 + ["failed"]
    assert "no such operator" in rows[3]["failure"] and "median_ms" not in rows[3]
    assert rows[2]["of_ideal"] == pytest.approx(rows[2]["speedup"] * 0.5)


def test_a_cut_off_is_checked_by_counting() -> None:
    # Magnitudes 4, 3, 3, 2, 1: of three kept, one is above the cut-off 3 and both ties are kept.
    weights = [torch.tensor([3.0, -1.0, 4.0]), torch.tensor([[-3.0], [2.0]])]
    cutoffs = {kept: topk_cutoff(weights, kept, magnitude=True, backend="torch") for kept in range(1, 6)}
    assert all(bench_whole_model.is_exact(weights, kept, cutoff) for kept, cutoff in cutoffs.items())
    wrong = [(kept, other) for kept in cutoffs for other in cutoffs if kept != other]
    assert not any(bench_whole_model.is_exact(weights, kept, cutoffs[other]) for kept, other in wrong)
    off_by_one = cutoffs[3]._replace(above=cutoffs[3].above + 1)
    assert not bench_whole_model.is_exact(weights, 3, off_by_one)


def test_what_is_slow_is_timed_on_a_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_whole_model, "SORTED", 100)
    monkeypatch.setattr(bench_whole_model, "RANKED", 10)
    rows = {row["provider"]: row for row in bench_whole_model.bench(bench_whole_model.SMOKE_CASES[1], samples=1)}
    assert {name: rows[name]["elements"] for name in ("select", "hinted", "read", "sort", "kthvalue")} == {
        "select": 561, "hinted": 561, "read": 561, "sort": 100, "kthvalue": 10,
    }  # fmt: skip
    # Bytes are of the elements that were ranked: four each.
    assert rows["sort"]["gb_per_s"] == pytest.approx(4 * 100 / rows["sort"]["median_ms"] / 1e6)
    assert all(row["verdict"] == "right" for row in rows.values())


def test_rows_of_the_plan_s_full_forms_come_after_those_of_quick_ones() -> None:
    def record(milliseconds: float) -> dict[str, object]:
        case = {"op": "forward", "m": 8, "n": 4, "k": 2, "dtype": "bfloat16", "kind": "soft", "verdict": "right"}
        return {"rows": [{**case, "provider": each, "median_ms": milliseconds} for each in ("unfused", "fused")]}

    document = {"masked_gemm": record(2.0), "quick": {"masked_gemm": record(1.0)}, "zero": {"queue": {}}}
    rows = make_plan_table.rows_of(document)
    assert [row["median_ms"] for row in rows] == [1.0, 1.0, 2.0, 2.0]
    (entry,) = make_plan_table.entries_of("gpu", rows)
    assert (entry["unfused_ms"], entry["fused_ms"]) == (2.0, 2.0)
    assert make_plan_table.rows_of(record(3.0)) == record(3.0)["rows"]
