"""What a layer's eager forward and backward cost the host, in counts that no other process moves.

A training step that launches faster than its Python runs is a step that measures Python. Bounds are on what a sparse
layer costs beyond the dense one: calls of Python and C functions, and operations that torch dispatches. Before layers
ran their op outside `torch.library` in eager code they were some 240 to 320 calls.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
import torch

from tritonsparse.kernels import _triton

# At the end of the path: the folder's modules have names of their own.
sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

from bench_host import Case, count_calls, count_ops, instruction_counts, main, without_launches
from row_log import read_rows

needs_triton = pytest.mark.skipif(
    not _triton.AVAILABLE or _triton.INTERPRETED, reason="needs Triton's launcher, to leave it out"
)
DEFERRED = ", cached, deferred"


def beyond_dense(case: Case) -> tuple[int, int, list[str]]:
    """Calls and operations of a step, less the dense layer's; and the kernels that it launched."""
    launches: list[str] = []
    with without_launches(launches):
        step, dense = case.step(), case.dense.step()
        launches.clear()
        step()
        launched = list(launches)
        return count_calls(step) - count_calls(dense), count_ops(step) - count_ops(dense), launched


# Counts of torch 2.13, with a fifth more for what torch itself adds from one version to the next.
@pytest.mark.parametrize(
    "case, calls, ops",
    [
        (Case("soft"), 149, 46),
        (Case("soft", ", cached"), 134, 37),
        (Case("soft", DEFERRED), 103, 6),
        (Case("soft, alpha, B"), 149, 48),
        (Case("step"), 160, 82),
        (Case("mask"), 119, 12),
        (Case("mask", DEFERRED), 98, 1),
        (Case("mask, alpha, B"), 124, 23),
        (Case("power"), 176, 42),
        (Case("mask", autocast=True), 126, 11),
        (Case("soft", convolution=True), 136, 62),
        (Case("mask", convolution=True), 108, 30),
    ],
    ids=lambda value: value.label if isinstance(value, Case) else "",
)
def test_an_eager_step_makes_few_calls_and_operations_beyond_the_dense_one(case: Case, calls: int, ops: int) -> None:
    measured = beyond_dense(case)
    assert measured[0] <= calls and measured[1] <= ops, measured


@needs_triton
@pytest.mark.parametrize(
    "case, calls, ops, kernels",
    [
        (Case("soft", backend="triton"), 163, 13, ["_threshold_cast_kernel", "_threshold_backward_kernel"]),
        (Case("soft", ", cached", "triton"), 142, 11, ["_threshold_backward_kernel"]),
        (Case("soft", DEFERRED, "triton"), 104, 6, []),
        (Case("mask", backend="triton"), 152, 5, ["_threshold_cast_kernel", "_threshold_backward_kernel"]),
        (Case("mask", DEFERRED, "triton"), 100, 1, []),
        (Case("mask, alpha, B", backend="triton"), 157, 5, ["_threshold_cast_kernel", "_threshold_backward_kernel"]),
    ],
    ids=lambda value: value.label if isinstance(value, Case) else "",
)
def test_what_a_gpu_would_run_is_two_kernels_and_little_python(
    case: Case, calls: int, ops: int, kernels: list[str]
) -> None:
    measured = beyond_dense(case)
    assert measured[0] <= calls and measured[1] <= ops and measured[2] == kernels, measured


def test_counts_are_the_same_in_every_run() -> None:
    step = Case("soft").step()
    assert len({count_calls(step) for _ in range(3)}) == len({count_ops(step) for _ in range(3)}) == 1


def test_the_benchmark_appends_a_row_a_layer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--smoke", "--out", str(tmp_path), "--note", "smoke"]) == 0
    rows = read_rows(tmp_path / "host.jsonl")
    assert [row["layer"] for row in rows] == ["dense", "soft", "soft, cached"]
    assert rows[0]["ratio"] == 1.0 and all(row["us"] > 0 and row["note"] == "smoke" for row in rows)
    assert capsys.readouterr().out.count("soft") == 2


@pytest.mark.long
@pytest.mark.skipif(shutil.which("valgrind") is None, reason="valgrind is not installed")
@pytest.mark.skipif(not torch._C._valgrind_supported_platform(), reason="torch cannot tell valgrind what to count")
def test_instructions_of_an_eager_step_as_a_ratio_to_the_dense_one() -> None:
    bounds = {
        # Measured 2.67, 1.54, 1.70, 1.42, and 2.05, 1.79 with Triton; 6.80, 5.03, 5.43, 4.98, 6.00, 5.63 through
        # torch.library.
        Case("soft"): 3.0,
        Case("soft", DEFERRED): 1.75,
        Case("mask"): 1.9,
        Case("mask", DEFERRED): 1.6,
        **({Case("soft", backend="triton"): 2.3, Case("mask", backend="triton"): 2.0} if _triton.AVAILABLE else {}),
    }
    dense, *counts = instruction_counts([Case("dense"), *bounds])
    ratios = {case: count / dense for case, count in zip(bounds, counts, strict=True)}
    assert all(ratios[case] <= bound for case, bound in bounds.items()), ratios
