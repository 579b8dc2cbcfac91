"""All GPU tests as one parallel run, and a row for each test the moment it is over.

    python benchmarks/gpu_tests.py [--only 'test_block*'] [--out DIR]      on a GPU
    python benchmarks/gpu_tests.py --smoke --tests FOLDER                  those of another folder, on any machine

The tests of all files go to one fleet of processes, two fewer than there are processors, for most of their time is the
compiling of kernels. Where pytest-xdist is missing, one process runs them. `--only` chooses files by their names.
The exit status is pytest's: 1 where a test failed, 5 where there was none.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parent))  # PYTHONSAFEPATH keeps a script's own folder off it
from harness import ROOT, announce, parser_of, refuse_without_gpu
from recorder import Recorder
from reports import Report

COLUMNS = {"test": "", "outcome": "", "seconds": ".2f"}
SLOWEST = 5


def counted(document: Mapping[str, Any]) -> dict[str, Any]:
    """A run's document with counts, what failed and the slowest tests in place of its rows."""
    rows = document.get("rows", [])
    bad = {row["test"]: row.get("message", "") for row in rows if row["outcome"] in ("failed", "error")}
    seconds = {row["test"]: row["seconds"] for row in rows}
    return {
        **{key: value for key, value in document.items() if key != "rows"},
        # A test whose teardown failed has passed before.
        "passed": len({row["test"] for row in rows if row["outcome"] == "passed"} - set(bad)),
        "failed": bad,
        "skipped": {row["test"]: row.get("message", "") for row in rows if row["outcome"] == "skipped"},
        "slowest": dict(sorted(seconds.items(), key=lambda each: -each[1])[:SLOWEST]),
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--tests", type=Path, default=ROOT / "tests" / "gpu", help="their folder, %(default)s")
    args = parser.parse_args(argv)
    if not args.smoke:
        refuse_without_gpu("gpu_tests")
    files = sorted(path for path in args.tests.glob("test_*.py") if fnmatch(path.stem, args.only or "*"))
    if not files:
        print(
            f"gpu_tests: expected test files named {args.only or 'test_*.py'!r}, got none in {args.tests}; "
            f"write * where a name may go on",
            file=sys.stderr,
        )
        return 2
    announce()
    report = Report("gpu_tests", COLUMNS, args)
    fleet: list[str] = []
    if importlib.util.find_spec("xdist") is not None:
        fleet = ["-n", str(max(1, (os.cpu_count() or 1) - 2)), "--dist", "worksteal"]
    fixed = ["-m", "gpu", "-q", "--tb=short", "-p", "no:cacheprovider", "-c", str(ROOT / "pyproject.toml")]
    status = pytest.main([*fixed, *fleet, *map(str, files)], plugins=[Recorder(report.add)])
    counts = counted({"rows": report.rows})
    shown = [row for row in report.rows if row["test"] in counts["slowest"]]
    report.publish(shown, **counts, status=int(status))
    return int(status)


if __name__ == "__main__":
    sys.exit(main())
