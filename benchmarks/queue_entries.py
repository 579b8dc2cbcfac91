"""What is in the queue of GPU work: every benchmark in its quick form and in full, the GPU tests, the training runs."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from gpu_tests import counted
from harness import ROOT
from queue_store import FULL, KERNELS, LAYERS, QUICK, TESTS, Entry, Record
from queue_training import training_runs

PYTHON = sys.executable
# Kernels that each entry compiles, by its name: written by count_compiles.py.
COUNTS = ROOT / "benchmarks" / "compile_counts.json"
# Of one kernel, on one processor of a GPU machine.
SECONDS_A_KERNEL = 0.45
# Without as many seconds an entry is not started: Python, torch and the first case. Its rows survive its end.
SHORTEST = 20.0
SHARED = ("benchmarks/harness.py", "benchmarks/reports.py", "benchmarks/row_log.py")
STEP = ("train/text/translation_presets.py", *LAYERS)
XL = ("train/text/language_presets.py", "tritonsparse/models/transfo_xl/*.py", *LAYERS)


@dataclass(frozen=True)
class Bench:
    """A benchmark program in one form.

    name, bench: the entry's name, and the program's, without "bench_".
    seconds: what it takes beside compiling kernels.
    value: what its figures are worth beside the others'.
    options: of the program.
    sources: what it measures.
    key: of its record; the program's name by default.
    """

    name: str
    bench: str
    seconds: float
    value: float
    options: tuple[str, ...] = ()
    sources: tuple[str, ...] = KERNELS
    key: str = ""


# Targets of a single product and of a training step first; what nobody has promised last.
QUICK_BENCHES = (
    Bench("block", "block", 45, 40, sources=("benchmarks/block_products.py", *KERNELS)),
    Bench("threshold", "threshold", 20, 16),
    Bench("masked gemm", "masked_gemm", 25, 18),
    Bench("whole model", "whole_model", 30, 16),
    Bench("block step", "block_step", 150, 60, sources=LAYERS),
    Bench("train step", "train_step", 100, 36, ("--preset=transformer-big",), STEP),
    Bench("conv", "conv", 45, 14),
    Bench("block inference", "block_inference", 30, 8),
    Bench("2:4", "semi_structured", 25, 6),
    Bench("packed activations", "packed", 25, 5),
    Bench("transformer-xl step", "transfo_xl", 80, 8, sources=XL),
)
FULL_BENCHES = (
    Bench("block", "block", 140, 40, sources=("benchmarks/block_products.py", *KERNELS)),
    Bench("threshold", "threshold", 100, 20),
    Bench("train step", "train_step", 150, 30, sources=STEP, key="train_step"),
    Bench("block step", "block_step", 240, 40, sources=LAYERS),
    Bench("block inference", "block_inference", 100, 10),
    Bench("whole model", "whole_model", 60, 10),
    Bench("masked gemm", "masked_gemm", 180, 20),
    Bench("2:4", "semi_structured", 60, 6),
    Bench("packed activations", "packed", 60, 5),
    *(
        Bench(f"{op}, {model}, {batch}", "conv", 100, 6, (f"--model={model}", f"--batch={batch}", f"--op={op}"),
              key=f"{op}_{model}_{batch}")
        for model in ("resnet-50", "mobilenet-v1")
        for batch in (32, 256)
        for op in ("conv_forward", "conv_grad_input", "conv_grad_weight")
    ),
    Bench("train step, big", "train_step", 180, 18, ("--preset=transformer-big",), STEP, "train_step_transformer-big"),
    Bench("transformer-xl step", "transfo_xl", 150, 8, sources=XL, key="train_step_transfoxl-large"),
)  # fmt: skip


def entries(data: Path | None, text: Path | None = None, images: Path | None = None) -> list[Entry]:
    """The queue; `data`, `text` and `images` are the folders of Multi30k, WikiText-2 and Fashion-MNIST."""
    counts = compile_counts()
    return [
        *(_bench(each, counts, QUICK) for each in QUICK_BENCHES),
        _gpu_tests(counts),
        *(_bench(each, counts, FULL) for each in FULL_BENCHES),
        *training_runs(data, text, images),
    ]


def compile_counts() -> dict[str, int]:
    """How many kernels each entry compiles, by its name; of one that is not there nobody has counted them."""
    counts: dict[str, int] = json.loads(COUNTS.read_text(encoding="utf-8"))["kernels"]
    return counts


def _bench(bench: Bench, counts: dict[str, int], stage: int) -> Entry:
    """An entry that has the GPU to itself; the kernels of a benchmark are compiled by one process, one by one."""
    quick = stage == QUICK
    name = f"{bench.name}, quick" if quick else bench.name
    command = (PYTHON, f"benchmarks/bench_{bench.bench}.py", "--out={work}", "--rows={rows}", *bench.options)
    key = bench.key or bench.bench
    file, place = "kernels", f"quick/{key}" if quick else key
    if key == "train_step" and not quick:
        # A file of its own, whole, since before there were others.
        file, place = "train_step", ""
    seconds = bench.seconds + SECONDS_A_KERNEL * counts.get(name, 0)
    return Entry(
        name, (*command, "--quick") if quick else command, _last_line,
        (f"benchmarks/bench_{bench.bench}.py", *SHARED, *bench.sources), seconds, SHORTEST, file, place,
        alone=True, stage=stage, value=bench.value,
    )  # fmt: skip


def _gpu_tests(counts: dict[str, int]) -> Entry:
    """All of them as one entry: its processes share what is to be compiled."""
    command = (PYTHON, "benchmarks/gpu_tests.py", "--out={work}", "--rows={rows}")
    sources = ("benchmarks/gpu_tests.py", *SHARED, *STEP, "tests/gpu/*.py")
    processes = max(1, (os.cpu_count() or 1) - 2)
    # Without a count: what compiling them takes 14 processes.
    compiling = SECONDS_A_KERNEL * counts["gpu tests"] / processes if "gpu tests" in counts else 50.0
    seconds = 50 + compiling
    return Entry(
        "gpu tests", command, _last_line, sources, seconds, SHORTEST, "gpu_tests", "all",
        alone=True, stage=TESTS, value=1.0, partial=counted,
    )  # fmt: skip


def _last_line(work: Path, output: str) -> Record:
    """What a benchmark prints last."""
    result: Record = json.loads(output.strip().rpartition("\n")[2])
    return result
