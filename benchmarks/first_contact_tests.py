"""The step of `first_contact.py` that runs all GPU tests, as one parallel run; one row a test, the moment it is over.

In the smoke form, on a CPU: the GPU tests are collected, and a small file of CPU tests is run in the same way.
"""

from __future__ import annotations

import contextlib
import io
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parent))  # PYTHONSAFEPATH keeps a script's own folder off it
from first_contact_child import Context, Row
from recorder import Recorder

ROOT = Path(__file__).resolve().parents[1]
WORKERS = 14
# Seconds before the end of its time at which the run stops handing out tests.
WIND_DOWN = 6.0
SMOKE_FILE = "tests/test_schedules.py"


class TimedRecorder(Recorder):
    """Stops the run in time; knows how many tests there are."""

    def __init__(self, add: Callable[[Row], None], left: Callable[[], float]) -> None:
        super().__init__(add)
        self.left = left
        self.collected = 0
        self._session: Any = None

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


def _run(recorder: TimedRecorder, *arguments: str) -> int:
    fixed = ["-q", "--no-header", "-p", "no:cacheprovider", "--rootdir", str(ROOT), "-c", str(ROOT / "pyproject.toml")]
    with contextlib.chdir(ROOT):
        return int(pytest.main([*fixed, "--tb=short", "-r", "N", *arguments], plugins=[recorder]))


def run(context: Context) -> None:
    def collected(add: Callable[[Row], None]) -> None:
        recorder = TimedRecorder(add, context.left)
        # Each of them would be listed.
        with contextlib.redirect_stdout(io.StringIO()):
            status = _run(recorder, "--collect-only", "-m", "gpu", "tests/gpu")
        verdict = "right" if status == 0 and not recorder.counts else "failed"
        add({"verdict": verdict, "collected": recorder.collected, "what": "tests/gpu is collected, not run"})

    def tests(add: Callable[[Row], None], *arguments: str) -> None:
        recorder = TimedRecorder(add, context.left)
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
