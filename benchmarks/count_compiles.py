"""Counts the kernels that each entry of the GPU queue compiles, without a GPU, for the queue's estimates.

    python benchmarks/count_compiles.py [--only 'block*'] [--write]

The benchmarks run as they are, on a machine without a GPU: Triton is told of an H100's driver, and a kernel that is
asked for, with its types, constants and options, is noted in place of being compiled. Operations on large tensors are
left out, so results mean nothing. `--write` updates `compile_counts.json`. Entries that train a model are not counted,
for torch.compile takes most of their time, nor those whose launchers read what a kernel would have written; their
estimates stand in `queue_entries.py`. Of the GPU tests the count is a lower bound: each goes as far as it gets. Run it
under the Triton of the GPU machines (PYTHONPATH).
"""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.append(str(Path(__file__).parent))  # PYTHONSAFEPATH keeps a script's own folder off it
from first_contact_dry import NoArithmetic, launch_tests, pretend
from harness import ROOT, Timing, write_json
from queue_entries import COUNTS, entries
from queue_store import FULL, QUICK
from reports import chosen
from row_log import RowLog

# Programs that are not counted.
UNCOUNTED = (
    "bench_block_step", "bench_train_step", "bench_transfo_xl", "bench_semi_structured", "bench_block_inference",
)  # fmt: skip
# Seconds for one program.
LIMIT = 600
# The entry of all GPU tests.
TESTS_ENTRY = "gpu tests"


def count_launches() -> set[tuple[str, str]]:
    """From now on a launch is noted in the returned set, once for each kernel that would be compiled."""
    import triton
    from triton.runtime import jit

    pretend(RowLog(None), "")
    found: set[tuple[str, str]] = set()

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        *_, binder = self.device_caches[0]
        kwargs.setdefault("debug", self.debug or triton.knobs.runtime.debug)
        _, specialization, options = binder(*args, **kwargs)
        # Kernels handed to a kernel are told apart by name, not by address.
        key = f"{specialization} {sorted((k, getattr(v, '__name__', v)) for k, v in options.items())}"
        found.add((self.fn.__name__, key))

    jit.JITFunction.run = run
    return found


def count(command: Sequence[str]) -> int:
    """How many kernels the program of an entry compiles; in a process of its own, for it changes torch and Triton."""
    found = count_launches()
    program: Any = importlib.import_module(Path(command[1]).stem)
    program.refuse_without_gpu = program.announce = lambda *_: None
    program.relative_error = lambda *_: 0.0
    program.input_sets = lambda *_: 1

    def once(calls: Sequence[Callable[[], object]], **_: object) -> Timing:
        calls[0]()
        return Timing(1.0, 1.0, 1.0)

    program.measure = once
    # Inductor cannot trace where nothing is computed, and what it compiles is not ours.
    torch.compile = lambda function, **_: function  # type: ignore[assignment]
    sys.stdout = sys.stderr
    with NoArithmetic():
        program.main([word for word in command[2:] if "{" not in word])
    sys.stdout = sys.__stdout__
    return len(found)


def count_tests(path: str) -> int:
    """As `count`, of a file of GPU tests; each test goes as far as it gets, most to their first comparison."""
    found = count_launches()
    sys.stdout = sys.stderr
    launch_tests(path)
    sys.stdout = sys.__stdout__
    return len(found)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="PATTERN", help="entries whose name matches, * and ? as in file names")
    parser.add_argument("--write", action="store_true", help=f"update {COUNTS.name}")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    counted = {
        entry.name: entry
        for entry in entries(None)
        if entry.stage in (QUICK, FULL) and Path(entry.command[1]).stem not in UNCOUNTED
    }
    tests = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "tests" / "gpu").glob("test_*.py"))
    if args.one:
        print(count_tests(args.only) if args.only in tests else count(counted[args.only].command))
        return 0
    made: dict[str, int] = {}
    for name in chosen("count_compiles", {**counted, TESTS_ENTRY: None}, args.only):
        parts = tests if name == TESTS_ENTRY else [name]
        made[name] = 0
        try:
            for part in parts:
                command = (sys.executable, __file__, "--one", "--only", part)
                run = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT)
                made[name] += int(run.stdout.split()[-1])
        except (subprocess.TimeoutExpired, ValueError, IndexError) as error:
            said = run.stderr.strip().splitlines()[-1:] if not isinstance(error, subprocess.TimeoutExpired) else error
            print(f"count_compiles: expected a count for {name!r}, got none: {said}", file=sys.stderr)
            del made[name]
            continue
        print(f"{made[name]:6d}  {name}", flush=True)
        if args.write:
            document = json.loads(COUNTS.read_text(encoding="utf-8"))
            write_json(COUNTS, document | {"kernels": dict(sorted((document["kernels"] | made).items()))})
    return int(not made)


if __name__ == "__main__":
    sys.exit(main())
