"""Benchmark programs start on any machine; a wrong result gets no time, and a variant that fails is a row."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import bench_block
import bench_train_step
import harness
import pytest
import torch

Program = Callable[..., subprocess.CompletedProcess[str]]

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")


@pytest.mark.parametrize(
    "name",
    [
        *("threshold", "masked_gemm", "conv", "whole_model", "packed", "train_step"),
        *("block", "block_step", "block_inference", "semi_structured", "transfo_xl"),
    ],
)
def test_smoke_prints_machine_table_and_json_and_writes_the_same(name: str, tmp_path: Path, program: Program) -> None:
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
def test_without_a_gpu_programs_refuse_in_one_sentence(name: str, tmp_path: Path, program: Program) -> None:
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


def test_a_variant_that_does_not_run_is_a_row_with_its_error() -> None:
    case = bench_train_step.Case("transformer-tiny", 64, 1, 4, "cpu", "no such compiler")
    rows = list(bench_train_step.bench(case, ("torch",), ("eager", "compile"), 1, 1))
    assert [(row["variant"], row["verdict"]) for row in rows] == [
        ("dense", "right"), ("torch", "right"), ("dense", "failed"), ("torch", "failed"),
    ]  # fmt: skip
    assert all("no such compiler" in row["failure"] and "median_ms" not in row for row in rows[2:])
