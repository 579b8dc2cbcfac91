"""The rows of a benchmark's run: on the disk one by one, and at its end one document.

A run appends a line that says what it is, `{"run": {"name": ..., "environment": ..., facts}}`, and then its rows to
`<out>/<device>/<name>.jsonl`, or to the file given by `--rows`. When it ends well the document is written beside that
file and the file goes: what is left is of a run that was killed, and `read_run` makes its document. A queue may write
a line of its own before them, `{"queue": ...}`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, TypeVar

from harness import RESULTS, Row, device_name, environment, publish
from row_log import RowLog, read_rows

T = TypeVar("T")


class Report:
    """The rows of one run.

    Args:
        name: of the document; `_quick` or `_only` is appended where the options choose some cases.
        columns: of the printed table, as in `harness.table`.
        args: the parsed options of `harness.parser_of`.
        facts: what the document says beside its rows.
    """

    def __init__(self, name: str, columns: Mapping[str, str], args: argparse.Namespace, **facts: Any) -> None:
        self.name = name + ("_only" if args.only else "_quick" if args.quick else "")
        self.columns, self.out = columns, args.out
        self.facts = {"smoke": args.smoke, "quick": args.quick, **facts}
        self.rows: list[Row] = []
        device = device_name()
        self._own = None
        if args.rows is None and (args.out is not None or device is not None):
            self._own = (args.out or RESULTS) / (device or "cpu") / f"{self.name}.jsonl"
        self._log = RowLog(args.rows or self._own)
        self._log.append({"run": {"name": self.name, "environment": environment(), **self.facts}})

    def add(self, row: Row) -> None:
        """Keep a row; it is on the disk before this returns."""
        self._log.append(row)
        self.rows.append(row)

    def extend(self, rows: Iterable[Row]) -> None:
        """Keep rows as they are made."""
        for row in rows:
            self.add(row)

    def publish(self, rows: Sequence[Row] | None = None, **facts: Any) -> int:
        """Print and write the document, with all rows or the given ones; returns 1 where a row is WRONG, else 0."""
        publish(self.name, self.rows if rows is None else rows, self.columns, self.out, **self.facts, **facts)
        if self._own is not None:
            self._own.unlink(missing_ok=True)
        return int(any(row.get("verdict") == "WRONG" for row in self.rows))


def read_run(path: Path) -> dict[str, Any]:
    """The document of the last run that wrote to a file of rows; empty where the file has no row of it."""
    facts: dict[str, Any] = {}
    rows: list[Row] = []
    for row in read_rows(path):
        if "run" in row:
            facts, rows = row["run"], []
        elif "queue" not in row:
            rows.append(row)
    return {**facts, "rows": rows} if rows else {}


def chosen(program: str, cases: Mapping[str, T], only: str | None) -> dict[str, T]:
    """The cases whose label matches the pattern of `--only`; exits with status 2 where none does."""
    found = {label: case for label, case in cases.items() if only is None or fnmatch(label, only)}
    if not found:
        known = "; ".join(list(cases)[:3])
        print(
            f"{program}: expected --only to match a case, got {only!r} and {len(cases)} cases such as {known}; "
            f"write * where a label may go on",
            file=sys.stderr,
        )
        raise SystemExit(2)
    return found
