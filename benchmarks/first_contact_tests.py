"""The step of `first_contact.py` that runs all GPU tests, as one parallel run; one row a test, the moment it is over.

In the smoke form, on a CPU: the GPU tests are collected, and a small file of CPU tests is run in the same way.
"""

from __future__ import annotations

import contextlib
import io
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parent))  # PYTHONSAFEPATH keeps a script's own folder off it
from first_contact_child import Context, Row

ROOT = Path(__file__).resolve().parents[1]
WORKERS = 14
# Seconds before the end of its time at which the run stops handing out tests.
WIND_DOWN = 6.0
SMOKE_FILE = "tests/test_schedules.py"


class Recorder:
    """A pytest plugin of the process that distributes tests: writes a row for each, and stops in time."""

    def __init__(self, add: Callable[[Row], None], left: Callable[[], float]) -> None:
        self.add, self.left = add, left
        self.counts: Counter[str] = Counter()
        self.collected = 0
        self._session: Any = None
        self._parts: dict[str, float] = {}

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.collected = len(session.items)

    def pytest_sessionstart(self, session: pytest.Session) -> None:
        self._session = session
        threading.Thread(target=self._stop_in_time, daemon=True).start()

    def _stop_in_time(self) -> None:
        time.sleep(max(0.0, min(self.left() - WIND_DOWN, threading.TIMEOUT_MAX)))
        reason = "the step's time is over"
        # Under xdist the distributing plugin decides, else the session.
        distributing = self._session.config.pluginmanager.getplugin("dsession")
        (distributing or self._session).shouldstop = reason

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._note(report.nodeid, "error", 0.0, str(report.longrepr))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        seconds = self._parts.pop(report.nodeid, 0.0) + report.duration
        self._parts[report.nodeid] = seconds
        if report.when == "call" or report.outcome != "passed":
            outcome = report.outcome if report.when == "call" or report.skipped else "error"
            message = "" if report.passed else str(report.longrepr)
            self._note(report.nodeid, outcome, seconds, message)

    def _note(self, test: str, outcome: str, seconds: float, message: str) -> None:
        self.counts[outcome] += 1
        row: Row = {"test": test, "outcome": outcome, "seconds": round(seconds, 3)}
        # The end of a report says what was wrong; whole ones of hundreds of failures would fill the file.
        self.add(row | ({"message": message[-1200:]} if message else {}))


def _run(recorder: Recorder, *arguments: str) -> int:
    fixed = ["-q", "--no-header", "-p", "no:cacheprovider", "--rootdir", str(ROOT), "-c", str(ROOT / "pyproject.toml")]
    with contextlib.chdir(ROOT):
        return int(pytest.main([*fixed, "--tb=short", "-r", "N", *arguments], plugins=[recorder]))


def run(context: Context) -> None:
    def collected(add: Callable[[Row], None]) -> None:
        recorder = Recorder(add, context.left)
        # Each of them would be listed.
        with contextlib.redirect_stdout(io.StringIO()):
            status = _run(recorder, "--collect-only", "-m", "gpu", "tests/gpu")
        verdict = "right" if status == 0 and not recorder.counts else "failed"
        add({"verdict": verdict, "collected": recorder.collected, "what": "tests/gpu is collected, not run"})

    def tests(add: Callable[[Row], None], *arguments: str) -> None:
        recorder = Recorder(add, context.left)
        start = time.monotonic()
        status = _run(recorder, "--dist", "worksteal", *arguments)
        bad = recorder.counts["failed"] + recorder.counts["error"]
        verdict = "right" if status == 0 else "failed" if bad or status not in (0, 2) else "stopped"
        facts = {"status": status, "seconds": round(time.monotonic() - start, 1), "what": " ".join(arguments)}
        add({"verdict": verdict, "counts": dict(recorder.counts), **facts})

    if context.smoke:
        context.case("collection of tests/gpu", 10, collected)
        context.case("tests of the CPU", 20, lambda add: tests(add, "-n", "1", SMOKE_FILE))
        return
    # The step's own limit ends it: what is left of it is for the tests.
    context.case("tests/gpu", 30, lambda add: tests(add, "-n", str(WORKERS), "-m", "gpu", "tests/gpu"))
