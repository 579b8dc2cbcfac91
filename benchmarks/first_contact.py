"""First contact with a GPU: in one call of ten minutes, a figure for everything that matters, whatever else fails.

    make first-contact BUDGET=570 OUT=DIR
    python benchmarks/first_contact.py --out DIR --budget 570       on a machine with a GPU; needs no network
    python benchmarks/first_contact.py --out DIR --smoke            tiny cases of every step, on any machine

    step        what                                                                        rows in DIR/
    ceilings    a copy; a product of 8192^3 in bf16                                         kernels.jsonl
    threshold   threshold and cast, of layers and of a model, beside a copy                 kernels.jsonl
    blocks      forward, dX, dW on blocks of 128, 64, 32 at four densities, beside dense    blocks.jsonl
    grad        dW with the multiplier in its epilogue, beside the plain product            kernels.jsonl
    tests       all tests that need a GPU, as one parallel run                              tests.jsonl
    topk        the exact cut-off of 1.2e9 weights, beside one read                         kernels.jsonl
    train_step  transformer-big, compiled: dense, AutoSparse, cached and deferred           steps.jsonl
    decoder     a decoder of 1.1e9 weights, 90 % of its blocks pruned, beside dense         steps.jsonl

Every case is compared with float64 first: a wrong one has WRONG instead of a time. Every row is on the disk the moment
it exists; `run.jsonl` says what ran where, `summary.json` holds the ratios that the last table prints, and is written
anew after every step. Each step is a process of its own, with a share of the budget: one that crashes or hangs is
started again behind the case that broke it. What does not fit into the budget is skipped and said to be. The exit
status is 1 where a case was wrong, failed or crashed, 2 where there is no GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.metadata
import os
import signal
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parent))  # PYTHONSAFEPATH keeps a script's own folder off it
from first_contact_process import START, Child
from first_contact_summary import summarize
from row_log import RowLog, read_rows
from triton_cache import ARCHIVE, unpack

ROOT = Path(__file__).resolve().parents[1]
# Seconds kept from the budget for the summary and for ending what still runs.
RESERVE = 6.0
# How often a step is started again behind a case that broke it.
RESTARTS = 3


@dataclass(frozen=True)
class Step:
    """One step.

    Attributes:
        name, module: `module.run(context)` runs it.
        file: rows are appended to `<out>/<file>.jsonl`.
        least: seconds without which it is not started.
        most: seconds after which it is ended; it stops beginning cases a little before.
        interpreted: its smoke form runs kernels through Triton's interpreter, if that works.
    """

    name: str
    module: str
    file: str
    least: float
    most: float
    interpreted: bool = False


STEPS = (
    Step("ceilings", "first_contact_kernels", "kernels", 8, 45),
    Step("threshold", "first_contact_kernels", "kernels", 8, 60, interpreted=True),
    Step("blocks", "first_contact_blocks", "blocks", 12, 130, interpreted=True),
    Step("grad", "first_contact_kernels", "kernels", 10, 50, interpreted=True),
    Step("tests", "first_contact_tests", "tests", 40, 150),
    Step("topk", "first_contact_kernels", "kernels", 12, 50, interpreted=True),
    Step("train_step", "first_contact_train", "steps", 35, 160),
    Step("decoder", "first_contact_decoder", "steps", 40, 200),
)


def sources() -> str:
    """A hash of the package and of the benchmarks: what was measured, where there is no git."""
    digest = hashlib.sha256()
    for pattern in ("kernels/**/*.py", "tritonsparse/**/*.py", "train/**/*.py", "benchmarks/*.py"):
        for path in sorted(ROOT.glob(pattern)):
            digest.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def linked_environment(scratch: Path) -> dict[str, str]:
    """Variables under which Python imports this checkout as `tritonsparse`, installed or not: links, and a path."""
    package = scratch / "tritonsparse"
    package.mkdir(parents=True)
    for path in (ROOT / "tritonsparse").iterdir():
        (package / path.name).symlink_to(path)
    for room in ("kernels", "eval", "train"):
        (package / room).symlink_to(ROOT / room)
    variables = os.environ | {"PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false"}
    variables["PYTHONPATH"] = os.pathsep.join(filter(None, (str(scratch), os.environ.get("PYTHONPATH"))))
    return variables


def set_caches(variables: dict[str, str], scratch: Path) -> None:
    """Where compiled kernels are kept, between calls too; absolute, unless the environment says otherwise."""
    folder = ROOT / "runs" / "compiled"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        folder = scratch / "compiled"
    variables.setdefault("TRITON_CACHE_DIR", str(folder / "triton"))
    variables.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder / "inductor"))


def interprets() -> bool:
    """Whether Triton's interpreter runs here: that of 3.6 fails beside numpy 2.5, which is what there is."""
    try:
        version = importlib.metadata.version("triton").split(".")
    except importlib.metadata.PackageNotFoundError:
        return False
    return (int(version[0]), int(version[1])) >= (3, 9)


class Run:
    """One call of the program.

    Args:
        out: folder of the rows.
        budget: seconds, everything included, counted from the program's start.
        smoke: tiny cases, on any machine.
        variables: the environment of the steps.
    """

    def __init__(self, out: Path, budget: float, smoke: bool, variables: Mapping[str, str]) -> None:
        self.out, self.smoke, self.variables = out, smoke, dict(variables)
        self.start = time.monotonic()
        self.deadline = self.start + budget - RESERVE
        self.id = datetime.now(UTC).strftime("%Y%m%dT%H%M%S") + f"-{os.getpid()}"
        self.log = RowLog(out / "run.jsonl")
        self.children: list[Child] = []

    def note(self, **facts: Any) -> None:
        self.log.append({"run": self.id, "at_s": round(time.monotonic() - self.start, 1), **facts})

    def path(self, step: Step) -> Path:
        return self.out / f"{step.file}.jsonl"

    def prepare(self, step: Step) -> Child:
        """A process that imports what the step needs and waits."""
        command = [sys.executable, str(ROOT / "benchmarks" / "first_contact_child.py"), step.name, step.module]
        command += ["--file", str(self.path(step)), "--run", self.id] + ["--smoke"] * self.smoke
        variables = dict(self.variables)
        if self.smoke and step.interpreted and interprets():
            variables["TRITON_INTERPRET"] = "1"
        child = Child(command, variables)
        self.children.append(child)
        return child

    def run(self, steps: Sequence[Step], waiting: Child | None) -> None:
        """Run the steps in order; `waiting` is a process prepared for the first one."""
        for number, step in enumerate(steps):
            left = self.deadline - time.monotonic()
            if left < step.least:
                if waiting is not None:
                    waiting.end()
                    waiting = None
                print(f"{step.name}: skipped, {left:.0f} s left", flush=True)
                self.note(step=step.name, state="skipped", left_s=round(left, 1))
                continue
            child = waiting or self.prepare(step)
            # The next step's imports pass while this one has the GPU.
            following = steps[number + 1 : number + 2]
            fits = bool(following) and step.least + following[0].least <= left
            waiting = self.prepare(following[0]) if fits else None
            if not self.finish(step, child):
                break
            summarize(self.out, self.id)
        if waiting is not None:
            waiting.end()

    def finish(self, step: Step, child: Child) -> bool:
        """Run a step to its end, starting it again behind cases that break it; False where there is no GPU."""
        # Time means nothing on a machine without a GPU, which may be a slow one.
        limit = min(self.deadline, time.monotonic() + (5 if self.smoke else 1) * step.most)
        for attempt in range(RESTARTS + 1):
            start = time.monotonic()
            print(f"{step.name}: {self.deadline - start:.0f} s left", flush=True)
            ended = child.run(limit)
            self.note(step=step.name, state=ended.state, seconds=round(time.monotonic() - start, 1), **ended.facts)
            print(f"{step.name}: {ended.state}", flush=True)
            if ended.state in ("done", "no GPU"):
                return ended.state == "done"
            if ended.case:
                row = {"run": self.id, "step": step.name, "case": ended.case, "verdict": ended.state}
                RowLog(self.path(step)).append({**row, "output": ended.facts.get("output", "")})
            if not ended.case or attempt == RESTARTS or limit - time.monotonic() < step.least:
                break
            child = self.prepare(step)
        return True

    def end(self) -> None:
        for child in self.children:
            child.end()


def chosen(names: Sequence[str] | None) -> list[Step]:
    known = [step.name for step in STEPS]
    for name in names or ():
        if name not in known:
            raise ValueError(f"first_contact: expected a step among {', '.join(known)}, got {name!r}; see --list")
    return [step for step in STEPS if not names or step.name in names]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "first_contact", help="folder of the results")
    parser.add_argument("--budget", type=float, default=570.0, help="seconds, everything included")
    parser.add_argument("--only", action="append", metavar="STEP", help="this step; may be given more than once")
    parser.add_argument("--smoke", action="store_true", help="tiny cases, on any machine")
    parser.add_argument("--list", action="store_true", help="list the steps")
    args = parser.parse_args(argv)
    try:
        steps = chosen(args.only)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    if args.list:
        for step in steps:
            print(f"{step.name:12}{step.file + '.jsonl':16}{step.least:5.0f} to {step.most:.0f} s")
        return 0
    if not 0 < args.budget < float("inf"):
        print(
            f"first_contact: expected a --budget of seconds above 0, got {args.budget}; 570 is a call", file=sys.stderr
        )
        return 2
    try:
        args.out.resolve().mkdir(parents=True, exist_ok=True)
    except OSError as error:
        print(f"first_contact: expected a folder for --out, got {args.out} ({error}); name another", file=sys.stderr)
        return 2
    # What the steps start is ended through this program, whoever ends it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with contextlib.ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tritonsparse-")))
        variables = linked_environment(scratch)
        set_caches(variables, scratch)
        # Python's own start and the imports are of the budget too, where this is the program.
        spent = time.monotonic() - START if __name__ == "__main__" else 0.0
        run = Run(args.out.resolve(), args.budget - spent, args.smoke, variables)
        stack.callback(run.end)
        # Its imports pass while the kernels are unpacked.
        first = run.prepare(steps[0])
        cache = unpack(ROOT / ARCHIVE, Path(variables["TRITON_CACHE_DIR"]).absolute())
        run.note(state="started", budget_s=args.budget, smoke=args.smoke, sources=sources(), triton_cache=cache)
        print(f"run {run.id}  sources {sources()}  {cache}", flush=True)
        run.run(steps, first)
    bad = summarize(run.out, run.id, say=print)
    run.note(state="ended", bad=bad)
    states = [row.get("state") for row in read_rows(run.log.path or run.out) if row["run"] == run.id]
    return 2 if "no GPU" in states else int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
