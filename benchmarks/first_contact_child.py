"""One step of `first_contact.py`, in a process of its own: its cases in order, each within the step's deadline.

    python benchmarks/first_contact_child.py STEP MODULE --file FILE --run ID [--smoke]

Imports what the step needs, prints "@ready", and waits for a line "go SECONDS" on its input, so that the imports of one
step pass while another has the GPU. SECONDS is its deadline, of the system's monotonic clock. Before a case it prints
"@case SECONDS NAME", the most that the case may take, and "@over" after it. The exit status is 0 where all cases ran or
were skipped, 3 where the GPU no longer answers: the parent starts the step again, which goes on behind the case that
broke it; 4 where there is no GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import importlib
import importlib.util
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parent))  # PYTHONSAFEPATH keeps a script's own folder off it
from row_log import RowLog, read_rows

Row = dict[str, Any]
BROKEN, NO_GPU = 3, 4
PR_SET_PDEATHSIG = 1
# A case may take this many times its estimate before the parent ends it, and at least this long.
PATIENCE, LEAST_PATIENCE = 5.0, 30.0


@dataclass
class Context:
    """What a step is given.

    Attributes:
        step: its name.
        log: where its rows go.
        run: what tells the rows of this run from those of an earlier one in the same file.
        smoke: tiny cases, on any machine.
        deadline: of `time.monotonic`; no case is begun that would end after it.
        behind: cases that have rows already, from before the step was started again.
    """

    step: str
    log: RowLog
    run: str
    smoke: bool = False
    deadline: float = float("inf")
    behind: set[str] = field(default_factory=set)
    compiles: list[bool] = field(default_factory=list)

    def left(self) -> float:
        return self.deadline - time.monotonic()

    def case(self, name: str, seconds: float, work: Callable[[Callable[[Row], None]], None]) -> None:
        """Run one case, unless it has run or would not end in time.

        Args:
            name: of the case, on all of its rows.
            seconds: its estimate, compiling included.
            work: is given what it calls with each of its rows, the moment there is one.

        Raises:
            SystemExit: the GPU no longer answers.
        """
        if name in self.behind:
            return

        def add(row: Row) -> None:
            self.log.append({"run": self.run, "step": self.step, "case": name, **row})

        left = self.left()
        if left < seconds:
            add({"verdict": "skipped", "needs_s": seconds, "left_s": round(left, 1)})
            return
        print(f"@case {max(LEAST_PATIENCE, PATIENCE * seconds):.0f} {name}", flush=True)
        start = time.monotonic()
        try:
            work(add)
        # What a kernel or a compiler does not do is a result, and the other cases go on.
        except Exception as error:
            print(traceback.format_exc()[-3000:], flush=True)
            failure = f"{type(error).__name__}: {error}".splitlines()[0][:500]
            add({"verdict": "failed", "failure": failure, "seconds": round(time.monotonic() - start, 2)})
            self._check_alive()
        _free()
        print("@over", flush=True)

    def _check_alive(self) -> None:
        import torch

        if torch.cuda.is_available():
            try:
                torch.cuda.synchronize()
            except RuntimeError as error:
                print(f"the GPU no longer answers: {error}", flush=True)
                raise SystemExit(BROKEN) from None


def _free() -> None:
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _end_with_parent() -> None:
    """On Linux, a parent that is killed takes this process with it: a later run has the GPU to itself."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _count_compiles(context: Context) -> None:
    """Notes for each kernel whether Triton found it in its cache."""
    try:
        from triton import knobs
    except ImportError:
        return

    def listener(*, cache_hit: bool, **_: Any) -> None:
        context.compiles.append(not cache_hit)

    knobs.compilation.listener = listener


def _targets(device: str) -> dict[str, list[float]]:
    """Floor, target and stretch of each figure on this card; none where nothing was derived for it."""
    from targets import UnknownCard, targets_for

    try:
        return {key: [each.floor, each.target, each.stretch] for key, each in targets_for(device).items()}
    except UnknownCard as error:
        print(error, flush=True)
        return {}


def _describe_machine(log: RowLog, run: str) -> None:
    """The run's row on the machine, from the first step that gets here."""
    import torch
    from harness import environment

    assert log.path is not None  # main
    if any("environment" in row for row in read_rows(log.path) if row["run"] == run):
        return
    row: Row = {"run": run, "environment": environment()}
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        names = ("total_memory", "multi_processor_count", "L2_cache_size", "shared_memory_per_block_optin")
        row["device"] = {name: getattr(properties, name, None) for name in names}
    found = importlib.util.find_spec("tritonsparse")
    row["package"] = str(Path(found.origin).resolve().parent) if found is not None and found.origin else None
    row["targets"] = _targets(str(row["environment"]["device"]))
    log.append(row)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step")
    parser.add_argument("module", help="has `run(context)`")
    parser.add_argument("--file", type=Path, required=True, help="where rows are appended")
    parser.add_argument("--run", required=True)
    parser.add_argument("--smoke", action="store_true")
    args = parser.parse_args(argv)
    _end_with_parent()
    module = importlib.import_module(args.module)
    print("@ready", flush=True)
    word, _, seconds = sys.stdin.readline().partition(" ")
    if word != "go":
        return 0
    import torch

    if not (args.smoke or torch.cuda.is_available()):
        print("first_contact: expected a GPU that torch sees, got none; pass --smoke", flush=True)
        return NO_GPU
    _describe_machine(RowLog(args.file.with_name("run.jsonl")), args.run)
    behind = {row["case"] for row in read_rows(args.file) if (row["run"], row["step"]) == (args.run, args.step)}
    context = Context(args.step, RowLog(args.file), args.run, args.smoke, float(seconds), behind)
    _count_compiles(context)
    module.run(context)
    print(f"@kernels {len(context.compiles) - sum(context.compiles)} {sum(context.compiles)}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
