"""What an eager forward and backward cost the host, in counts that no other process moves.

Bounds are on what a sparse layer, or the ops that it is composed of, costs beyond the dense one: function calls, and
operations that torch dispatches. Through `torch.library` they would be some 240 to 320 calls.
"""

import shutil
from pathlib import Path

import pytest
import torch
from bench_host import Case, count_calls, count_ops, instruction_counts, main, without_launches
from row_log import read_rows

from tritonsparse.kernels import _triton

CACHED, DEFERRED = ", cached", ", cached, deferred"
CAST, BACKWARD = "_threshold_cast_kernel", "_threshold_backward_kernel"
GEMM, GRAD = "_masked_gemm_kernel", "_masked_grad_kernel"
# Calls and operations as torch 2.13 has them, with a fifth more for what torch itself adds from one version to the
# next; and the kernels that are launched.
OPS: dict[tuple[str, ...], tuple[int, int, list[str]]] = {
    ("soft",): (108, 43, []), ("soft", CACHED): (91, 35, []), ("soft", DEFERRED): (68, 8, []),
    ("soft", ", fused"): (172, 60, []), ("soft, alpha, B",): (112, 56, []), ("step",): (119, 92, []),
    ("mask",): (83, 13, []), ("mask", DEFERRED): (64, 2, []), ("mask", ", fused dW"): (108, 7, []),
    ("mask, alpha, B",): (88, 26, []),
    ("soft", "", "triton"): (131, 14, [CAST, BACKWARD]), ("soft", CACHED, "triton"): (107, 14, [BACKWARD]),
    ("soft", DEFERRED, "triton"): (68, 8, []), ("mask", "", "triton"): (116, 5, [CAST, BACKWARD]),
    ("mask, alpha, B", "", "triton"): (121, 5, [CAST, BACKWARD]),
    ("soft", ", fused", "triton"): (239, 0, [GEMM, GEMM, GRAD]), ("soft", ", fused dW", "triton"): (149, 4, [GRAD]),
}  # fmt: skip
WHOLE_LAYERS = {
    Case("soft"): (149, 46, []), Case("soft", CACHED): (134, 37, []), Case("soft", DEFERRED): (103, 6, []),
    Case("mask"): (119, 12, []), Case("mask", autocast=True): (126, 11, []), Case("power"): (176, 42, []),
    Case("soft", convolution=True): (136, 62, []), Case("mask", convolution=True): (108, 30, []),
    Case("soft", "", "triton"): (163, 13, [CAST, BACKWARD]), Case("mask", DEFERRED, "triton"): (100, 1, []),
}  # fmt: skip
BOUNDS = {Case(*what, ops=True): bound for what, bound in OPS.items()} | WHOLE_LAYERS


@pytest.mark.parametrize("case", BOUNDS, ids=lambda case: f"{case.backend} {case.label}")
def test_an_eager_step_makes_few_calls_and_operations_beyond_the_dense_one(case: Case) -> None:
    calls, ops, kernels = BOUNDS[case]
    if case.backend == "triton" and (not _triton.AVAILABLE or _triton.INTERPRETED):
        pytest.skip("needs Triton's launcher, to leave it out")
    launches: list[str] = []
    with without_launches(launches):
        step, dense = case.step(), case.dense.step()
        launches.clear()
        step()
        launched = list(launches)
        # The least of three: a collection of garbage, or a weak reference that dies, calls something in between.
        called = [min(count_calls(each) for _ in range(3)) for each in (step, dense)]
        found = called[0] - called[1], count_ops(step) - count_ops(dense)
    assert found[0] <= calls and found[1] <= ops and launched == kernels, (found, launched)


def test_the_benchmark_appends_a_row_a_case(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--smoke", "--out", str(tmp_path), "--note", "smoke"]) == 0
    rows = read_rows(tmp_path / "host.jsonl")
    assert [row["layer"] for row in rows] == ["ops: dense", "ops: soft", "ops: soft, cached"]
    assert rows[0]["ratio"] == 1.0 and all(row["us"] > 0 and row["note"] == "smoke" for row in rows)
    assert capsys.readouterr().out.count("soft") == 2


@pytest.mark.long
@pytest.mark.skipif(shutil.which("valgrind") is None, reason="valgrind is not installed")
@pytest.mark.skipif(not torch._C._valgrind_supported_platform(), reason="torch cannot tell valgrind what to count")
def test_instructions_of_an_eager_step_as_a_ratio_to_the_dense_one() -> None:
    # Measured 2.49, 1.59, 1.69, 1.45, 2.95, and 2.14, 1.88, 2.86 with Triton; through torch.library 5 to 7.
    of_ops = {("soft",): 2.8, ("soft", DEFERRED): 1.8, ("mask",): 1.9, ("mask", DEFERRED): 1.65}
    of_ops[("soft", ", fused")] = 3.3
    if _triton.AVAILABLE:
        of_ops |= {("soft", "", "triton"): 2.4, ("mask", "", "triton"): 2.1, ("soft", ", fused", "triton"): 3.2}
    bounds = {Case(*what, ops=True): bound for what, bound in of_ops.items()}
    dense, *counts = instruction_counts([Case("dense", ops=True), *bounds])
    ratios = {case: count / dense for case, count in zip(bounds, counts, strict=True)}
    assert all(ratios[case] <= bound for case, bound in bounds.items()), ratios
