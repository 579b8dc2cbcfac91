"""A pytest plugin that gives a row for each test the moment it is over."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

__all__ = ["Recorder"]

# Of a failure's report: its end says what was wrong, and whole ones of hundreds of failures would fill a file.
MESSAGE = 1000


class Recorder:
    """Of the process that hands out the tests under xdist.

    Args:
        add: takes a row: test, outcome ("passed", "failed", "error", "skipped"), seconds, and the end of its message.

    Attributes:
        counts: rows by outcome. A test whose teardown fails has two.
    """

    def __init__(self, add: Callable[[dict[str, Any]], object]) -> None:
        self.add = add
        self.counts: Counter[str] = Counter()
        self._seconds: dict[str, float] = {}

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._note(report.nodeid, "error", 0.0, str(report.longrepr))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Called for setup, call and teardown; also, with neither, for the test during which a process crashed."""
        seconds = self._seconds.get(report.nodeid, 0.0) + report.duration
        self._seconds[report.nodeid] = seconds
        if report.when in ("setup", "teardown") and report.passed:
            return
        outcome = "error" if report.failed and report.when in ("setup", "teardown") else report.outcome
        self._note(report.nodeid, outcome, seconds, "" if report.passed else str(report.longrepr))

    def _note(self, test: str, outcome: str, seconds: float, message: str) -> None:
        self.counts[outcome] += 1
        row: dict[str, Any] = {"test": test, "outcome": outcome, "seconds": round(seconds, 3)}
        self.add(row | ({"message": message[-MESSAGE:]} if message else {}))
