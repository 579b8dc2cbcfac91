"""The queue of GPU work: quick benchmarks, tests, benchmarks and training runs, until a budget is spent.

    make gpu BUDGET=500 OUT=results               on a machine with a GPU; needs no network
    python benchmarks/gpu_queue.py --budget 500 [--quick] [--only '*block*'] [--out DIR] [--dry-run]

Runs every entry of `queue_entries.py` that has no result yet, or one of other sources than today's: the quick form of
every benchmark, then the GPU tests, then the benchmarks in full, then training runs; what failed and has not changed
since comes last. Each result is written as soon as it is there, to DIR/<device>/ (benchmarks/results/<device>/ by
default; what lies there also counts where DIR has nothing), and the rows of a benchmark as they are made.

The exit status is 1 where an entry failed, 2 where there is no GPU. Multi30k is read
from the folder $TRITONSPARSE_DATA or data/multi30k (train.en.gz, train.de.gz, val.*, test_2016_flickr.*), WikiText-2
from $TRITONSPARSE_DATA/wikitext-2 or data/wikitext-2 (train.txt.gz, valid.txt.gz, test.txt.gz), Fashion-MNIST from
$TRITONSPARSE_DATA/fashion-mnist or data/fashion-mnist (the four IDX files).
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

START = time.monotonic()
sys.path.append(str(Path(__file__).parent))  # PYTHONSAFEPATH keeps a script's own folder off it
try:
    from harness import RESULTS, ROOT, device_name, environment, table
    from queue_entries import entries
    from queue_runner import run_queue
    from queue_store import QUICK, Entry, Store
    from reports import chosen
except ModuleNotFoundError as missing:
    if missing.name != "torch":
        raise
    print(f"gpu_queue: expected a Python that has torch, got {sys.executable}; set PYTHON", file=sys.stderr)
    raise SystemExit(2) from None

PYTHON = sys.executable


def data_folder() -> Path | None:
    """Where Multi30k lies, None if nowhere."""
    given = os.environ.get("TRITONSPARSE_DATA")
    places = [Path(given), Path(given) / "multi30k"] if given else [ROOT / "data" / "multi30k"]
    return next((place.resolve() for place in places if (place / "train.en.gz").is_file()), None)


def text_folder() -> Path | None:
    """Where WikiText-2 lies, None if nowhere."""
    given = os.environ.get("TRITONSPARSE_DATA")
    place = (Path(given) if given else ROOT / "data") / "wikitext-2"
    return place.resolve() if (place / "train.txt.gz").is_file() else None


def image_folder() -> Path | None:
    """Where Fashion-MNIST lies, None if nowhere."""
    given = os.environ.get("TRITONSPARSE_DATA")
    place = (Path(given) if given else ROOT / "data") / "fashion-mnist"
    return place.resolve() if (place / "train-images-idx3-ubyte.gz").is_file() else None


def python_environment(scratch: Path) -> tuple[dict[str, str], str]:
    """Variables under which PYTHON imports this checkout as `tritonsparse`, and how that came about."""
    variables = os.environ | {
        "PYTHONSAFEPATH": "1",
        "PYTHONUNBUFFERED": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    variables.setdefault("OMP_NUM_THREADS", "2")
    if _imports_this_checkout(variables):
        return variables, "tritonsparse is installed"
    install = (
        PYTHON, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "--no-index", "-q", "-e", str(ROOT),
    )  # fmt: skip
    run = subprocess.run(install, env=variables, capture_output=True, text=True)
    if run.returncode == 0 and _imports_this_checkout(variables):
        return variables, "tritonsparse was installed by pip"
    # The packages of pyproject.toml as links, found through PYTHONPATH.
    package = scratch / "tritonsparse"
    package.mkdir()
    for path in (ROOT / "tritonsparse").iterdir():
        (package / path.name).symlink_to(path)
    for room in ("kernels", "eval", "train"):
        (package / room).symlink_to(ROOT / room)
    variables["PYTHONPATH"] = os.pathsep.join(filter(None, (str(scratch), variables.get("PYTHONPATH"))))
    reason = (run.stderr.strip().splitlines() or ["pip installed something else"])[-1]
    return variables, f"tritonsparse is linked in {scratch}: pip could not install it ({reason})"


def _imports_this_checkout(variables: dict[str, str]) -> bool:
    check = "import tritonsparse.kernels as k, pathlib; print(pathlib.Path(k.__file__).resolve().parent)"
    run = subprocess.run((PYTHON, "-c", check), env=variables, cwd=ROOT, capture_output=True, text=True)
    return run.returncode == 0 and run.stdout.strip() == str(ROOT / "kernels")


def summary(queue: Sequence[Entry], store: Store, outcomes: dict[str, str]) -> str:
    """One line an entry, in the order in which they run: its state now, what this run made of it, its seconds."""
    rows = []
    for entry in store.order(queue):
        took = store.record(entry).get("queue", {}).get("seconds")
        row = {"entry": entry.name, "state": store.state(entry), "this run": outcomes.get(entry.name)}
        rows.append({**row, "seconds": took, "expected": store.expected(entry)})
    return table(rows, {"entry": "", "state": "", "this run": "", "seconds": ".0f", "expected": ".0f"})


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=float, default=500.0, help="seconds, everything included")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of results, by device")
    parser.add_argument("--dry-run", action="store_true", help="list entries and their state")
    parser.add_argument("--quick", action="store_true", help="the quick form of every benchmark, nothing else")
    parser.add_argument("--only", metavar="PATTERN", help="entries whose name matches, * and ? as in file names")
    args = parser.parse_args(argv)
    every, device = entries(data_folder(), text_folder(), image_folder()), device_name()
    named = {entry.name: entry for entry in every if entry.stage == QUICK or not args.quick}
    queue = list(chosen("gpu_queue", named, args.only).values())
    if args.dry_run:
        files = {f"{entry.file}.json" for entry in every}
        folders = (*args.out.glob("*/"), *RESULTS.glob("*/"))
        known = sorted({path.name for path in folders if any((path / file).is_file() for file in files)})
        for name in [device] if device else known or ["no device"]:
            print(f"{name}\n{summary(queue, Store(args.out / name, RESULTS / name), {})}\n")
        return 0
    if device is None:
        print("gpu_queue: expected a GPU that torch sees, got none; --dry-run lists entries", file=sys.stderr)
        return 2
    # Entries run in sessions of their own: whoever ends this program ends them through it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    store = Store(args.out.resolve() / device, RESULTS / device)
    with tempfile.TemporaryDirectory(prefix="tritonsparse-") as scratch:
        variables, how = python_environment(Path(scratch))
        print("  ".join(f"{key} {value}" for key, value in environment().items() if value))
        print(how, flush=True)
        left = args.budget - (time.monotonic() - START)
        outcomes = run_queue(queue, store, left, variables, lambda line: print(line, flush=True))
    print(summary(queue, store, outcomes))
    return int("failed" in outcomes.values())


if __name__ == "__main__":
    sys.exit(main())
