"""What an eager forward and backward of a sparse layer, or of the ops that it is composed of, cost the host.

    python benchmarks/bench_host.py [--instructions] [--only '*soft*'] [--out DIR] [--note TEXT]
    python benchmarks/bench_host.py --smoke                                          two cases, few calls

A training step in eager mode cannot be faster than the Python that launches it. Layers here are so small (16 x 16, four
rows) that nothing else is left to measure. No GPU is used. "ops:" rows have no module around them: `F.linear` of
`effective_weight`, or `fused_linear`, compared with `F.linear` alone.

    backend   what
    torch     the references: elementwise PyTorch around the dense products, as a CPU runs them
    triton    what a GPU would run, with the launches themselves left out: Python up to Triton's own launcher

    column              what
    us                  CPU time of a forward and backward, the least of several rounds
    ratio               us over that of the dense layer in the same run
    instructions        of the processor, counted by valgrind's callgrind (--instructions: some three minutes)
    instruction_ratio   over the dense layer's: what to compare where the machine is shared
    calls               of Python and C functions, as `sys.setprofile` sees them
    ops                 that torch dispatches, nested ones included, as its profiler sees them
    launches            of Triton kernels; torch's own come on top

`--note` is written into every row. With `PYTHONPATH` at another checkout's package, that one is measured; rows name the
commit. Rows are appended to `DIR/host.jsonl`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tritonsparse as ts
from tritonsparse.kernels import _triton
from tritonsparse.kernels.fused.linear import fused_linear
from tritonsparse.kernels.weight.op import effective_weight
from tritonsparse.kernels.weight.view import View

sys.path.append(str(Path(__file__).parent))  # PYTHONSAFEPATH keeps a script's own folder off it
from harness import table
from row_log import RowLog

SIDE, ROWS = 16, 4
COLUMNS = {
    "backend": "", "layer": "", "us": ".1f", "ratio": ".2f", "instructions": "d", "instruction_ratio": ".2f",
    "calls": "d", "ops": "d", "launches": "d",
}  # fmt: skip
METHODS: dict[str, Callable[[], Any]] = {
    "soft": lambda: ts.methods.STR(threshold_init=-2.0),
    "soft, alpha, B": lambda: ts.methods.AutoSparse(
        threshold_init=-2.0, alpha=0.5, alpha_schedule="constant", backward_density=0.6
    ),
    "step": lambda: ts.methods.DST(),
    "mask": lambda: ts.methods.Static(sparsity=0.5, distribution="uniform"),
    "mask, alpha, B": lambda: ts.methods.TopKAST(sparsity=0.5, backward_sparsity=0.25),
    "power": lambda: ts.methods.PowerProp(sparsity=0.5),
    "packed input": lambda: ts.methods.SWAT(sparsity=0.5, activation_sparsity=0.5),
    "blocks": lambda: ts.methods.Static(sparsity=0.5, distribution="uniform"),
}
CACHES: dict[str, dict[str, Any]] = {
    "": {},
    ", cached": {"cache_dtype": torch.float32},
    ", cached, deferred": {"cache_dtype": torch.float32, "defer": True},
}


@dataclass(frozen=True)
class Case:
    """A layer: its method, its cache, its back end, and whether it is a convolution.

    With `ops` there is no module: the method names a view, and the cache may be ", fused" (all products) or ", fused
    dW" (the caller's own effective weight in the others).
    """

    method: str
    cache: str = ""
    backend: str = "torch"
    convolution: bool = False
    autocast: bool = False
    ops: bool = False

    @property
    def label(self) -> str:
        stock = "Conv2d " if self.convolution else "ops: " if self.ops else ""
        return f"{stock}{self.method}{self.cache}{', bf16 autocast' if self.autocast else ''}"

    @property
    def dense(self) -> Case:
        """The stock layer that this one stands beside."""
        return Case("dense", convolution=self.convolution, autocast=self.autocast, ops=self.ops)

    def step(self) -> Callable[[], None]:
        """A forward and backward, ready to be called again and again."""
        torch.manual_seed(0)
        return self._ops_step() if self.ops else self._layer_step()

    def _ops_step(self) -> Callable[[], None]:
        x, grad_y = torch.randn(ROWS, SIDE, requires_grad=True), torch.ones(ROWS, SIDE)
        weight, bias = nn.Parameter(torch.randn(SIDE, SIDE)), nn.Parameter(torch.randn(SIDE))
        if self.method == "dense":
            return lambda: F.linear(x, weight, bias).backward(grad_y)
        kind, _, annealed = self.method.partition(", ")
        threshold = None if kind == "mask" else nn.Parameter(torch.full((1,), 0.1))
        mask = torch.rand(SIDE, SIDE) < 0.5 if kind == "mask" else None
        view = View(kind, threshold, mask)
        if annealed:
            view = view._replace(grad_mask=torch.rand(SIDE, SIDE) < 0.6, alpha=torch.tensor(0.5))
        backend, fused = self.backend, "fused" in self.cache
        w_hat = None
        if self.cache and self.cache != ", fused":
            w_hat = torch.randn(SIDE, SIDE)

        def forward() -> Tensor:
            if fused:
                return fused_linear(x, weight, view, bias, w_hat=w_hat, backend=backend)
            defer = self.cache.endswith("deferred")
            return F.linear(x, effective_weight(weight, view, backend=backend, cached=w_hat, defer=defer), bias)

        return lambda: forward().backward(grad_y)

    def _layer_step(self) -> Callable[[], None]:
        layer: nn.Module = nn.Conv2d(SIDE, SIDE, 1) if self.convolution else nn.Linear(SIDE, SIDE)
        x = torch.randn(ROWS, SIDE, *((2, 2) if self.convolution else ()), requires_grad=True)
        if self.method != "dense":
            model = nn.Sequential(layer, nn.Flatten(), nn.Linear(SIDE, 2))
            pattern = "block:16" if self.method == "blocks" else "unstructured"
            backend = "block" if self.method == "blocks" else self.backend
            sparsifier = ts.sparsify(
                model, METHODS[self.method](), include=["0"], backend=backend, pattern=pattern, total_steps=100
            )
            optimizer = torch.optim.SGD(sparsifier.param_groups(lr=0.0))
            sparsifier.attach(optimizer, **CACHES[self.cache])
            # The first step chooses masks where a method starts dense.
            optimizer.step()
            assert sparsifier.layers["0"].kind != "dense" or self.method == "packed input"
        grad_y = torch.ones_like(layer(x))

        def under_autocast() -> None:
            with torch.autocast("cpu", torch.bfloat16):
                y = layer(x)
            y.backward(narrow)

        narrow = grad_y.bfloat16()
        return under_autocast if self.autocast else lambda: layer(x).backward(grad_y)


def cases() -> list[Case]:
    """By falling frequency in practice; the ops first."""
    views = ("soft", "mask", "soft, alpha, B", "mask, alpha, B", "step")
    every = [
        *(Case(method, cache, ops=True) for method in views for cache in CACHES),
        *(Case(method, cache, ops=True) for method in views[:4] for cache in (", fused", ", fused dW")),
        *(Case(method, cache) for method in ("soft", "mask") for cache in CACHES),
        Case("soft, alpha, B"),
        Case("soft, alpha, B", ", cached, deferred"),
        *(Case(method) for method in ("step", "mask, alpha, B", "power", "packed input")),
        *(Case(method, autocast=True) for method in ("soft", "mask")),
        *(Case(method, convolution=True) for method in ("soft", "mask")),
    ]
    every += [replace(case, backend="triton") for case in every if case.method != "packed input"]
    return [*every, Case("blocks", backend="triton"), Case("blocks", ", cached", backend="triton")]


@contextmanager
def without_launches(launches: list[str]) -> Iterator[None]:
    """Triton's launcher does nothing but note the kernel's name; CPU tensors pass for a GPU's."""
    if not _triton.AVAILABLE:
        yield
        return
    from triton.runtime.jit import JITFunction

    run, interpreted = JITFunction.run, _triton.INTERPRETED
    JITFunction.run = lambda self, *args, grid, warmup, **kwargs: launches.append(self.__name__)
    _triton.INTERPRETED = True
    try:
        yield
    finally:
        JITFunction.run, _triton.INTERPRETED = run, interpreted


def count_calls(step: Callable[[], object]) -> int:
    """Calls of Python and C functions in one step; the same in every run."""
    events: list[str] = []
    step()
    sys.setprofile(lambda _frame, event, _argument: events.append(event))
    try:
        step()
    finally:
        sys.setprofile(None)
    return events.count("call") + events.count("c_call") - 1  # setprofile(None)


def count_ops(step: Callable[[], object]) -> int:
    """Operations that torch dispatches in one step, nested ones included; the same in every run."""
    step()
    with torch.autograd.profiler.profile() as profile:
        step()
    return sum(event.name.startswith(("aten::", "tritonsparse::")) for event in profile.function_events)


def cpu_time(step: Callable[[], object], rounds: int, calls: int) -> float:
    """Microseconds of this process's CPU time a step, the least of the rounds."""
    for _ in range(calls // 4):
        step()
    best = float("inf")
    for _ in range(rounds):
        start = time.process_time()
        for _ in range(calls):
            step()
        best = min(best, (time.process_time() - start) / calls)
    return 1e6 * best


def instruction_counts(chosen: Sequence[Case], calls: int = 20) -> list[float]:
    """Instructions of a step of each case, from a run of this program under callgrind.

    Raises:
        RuntimeError: valgrind is not installed, or the run failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [
            *("valgrind", "--tool=callgrind", "--collect-atstart=no", "--instr-atstart=no"),
            *(f"--callgrind-out-file={folder}/counts", sys.executable, __file__),
            *("--counted", json.dumps([calls, *(vars(case) for case in chosen)])),
        ]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}
        try:
            run = subprocess.run(command, capture_output=True, text=True, env=environment)
        except FileNotFoundError as error:
            raise RuntimeError("bench_host: expected valgrind, got none; install it") from error
        files = [Path(folder, f"counts.{number + 1}") for number in range(len(chosen))]
        if run.returncode or not all(file.is_file() for file in files):
            raise RuntimeError(
                f"bench_host: expected {len(chosen)} counts from valgrind, got {run.stderr[-2000:]}; run {command}"
            )
        totals = [re.search(r"^totals: (\d+)", file.read_text(), re.MULTILINE) for file in files]
    return [int(total[1]) / calls for total in totals if total]


def counted(argument: str) -> int:
    """What `instruction_counts` starts under valgrind."""
    calls, *given = json.loads(argument)
    torch.set_num_threads(1)
    with without_launches([]):
        steps = [Case(**each).step() for each in given]
        # Imports need no counting and take minutes with it: only now is the code instrumented.
        switch = subprocess.Popen(["vgdb", f"--pid={os.getpid()}", "instrumentation", "on"])
        while switch.poll() is None:
            sum(range(1000))
        for step in steps:
            for _ in range(5):
                step()
            torch._C._valgrind_toggle()
            for _ in range(calls):
                step()
            torch._C._valgrind_toggle_and_dump_stats()
    return 0


def bench(chosen: Sequence[Case], rounds: int, calls: int, instructions: bool) -> Iterator[dict[str, Any]]:
    """A row a case; each dense one comes before those that are compared with it."""
    order = list(dict.fromkeys(each for case in chosen for each in (case.dense, case)))
    counts = instruction_counts(order) if instructions else [None] * len(order)
    dense: dict[Case, dict[str, Any]] = {}
    for case, count in zip(order, counts, strict=True):
        launches: list[str] = []
        with without_launches(launches):
            step = case.step()
            launches.clear()
            step()
            row = {
                **{"backend": "" if case.method == "dense" else case.backend, "layer": case.label},
                **{"launches": list(launches), "calls": count_calls(step), "ops": count_ops(step)},
                **{"us": round(cpu_time(step, rounds, calls), 1), "instructions": count and round(count)},
            }
        dense.setdefault(case.dense, row)
        beside = dense[case.dense]
        row["ratio"] = round(row["us"] / beside["us"], 3)
        row["instruction_ratio"] = count and round(count / beside["instructions"], 3)
        yield row


def facts(note: str) -> dict[str, Any]:
    """Processor, versions, the measured package's commit and the command."""
    package = Path(ts.__file__).resolve().parent
    git = ["git", "-C", str(package), "describe", "--always", "--dirty", "--abbrev=12"]
    cpuinfo = Path("/proc/cpuinfo")
    name = re.search(r"^model name\s*: (.*)", cpuinfo.read_text() if cpuinfo.exists() else "", re.MULTILINE)
    return {
        **{"note": note, "commit": subprocess.run(git, capture_output=True, text=True).stdout.strip() or None},
        **{"cpu": name[1] if name else platform.machine(), "torch": str(torch.__version__)},
        **{"python": platform.python_version(), "command": " ".join(["bench_host.py", *sys.argv[1:]])},
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="two cases, few calls")
    parser.add_argument("--instructions", action="store_true", help="count instructions with valgrind as well")
    parser.add_argument("--only", metavar="PATTERN", default="*", help="cases whose 'backend layer' matches")
    parser.add_argument("--out", type=Path, default=None, help="folder of host.jsonl; nothing is kept without it")
    parser.add_argument("--note", default="", help="said in every row, for instance before or after")
    parser.add_argument("--counted", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.counted:
        return counted(args.counted)
    torch.set_num_threads(1)
    chosen = [case for case in cases() if fnmatch(f"{case.backend} {case.label}", args.only)]
    chosen = [case for case in chosen if case.backend == "torch" or _triton.AVAILABLE]
    rounds, calls = (2, 4) if args.smoke else (20, 50)
    log = RowLog(None if args.out is None else args.out / "host.jsonl")
    about = facts(args.note)
    print("  ".join(f"{key} {value}" for key, value in about.items() if value), flush=True)
    rows = []
    for row in bench(chosen[:2] if args.smoke else chosen, rounds, calls, args.instructions):
        log.append({**about, **row})
        rows.append({**row, "launches": len(row["launches"])})
    print(table(rows, COLUMNS))
    return 0


if __name__ == "__main__":
    sys.exit(main())
