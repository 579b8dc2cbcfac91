"""Rows of a benchmark on disk the moment they exist: one JSON object a line, so that a kill loses one row.

A line that a kill cut short is left out when the file is read, and closed before the next row is written.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["RowLog", "read_rows"]


class RowLog:
    """Appends rows to a file; each is flushed to the disk before `append` returns.

    Args:
        path: the file, made with its folder at the first row; None keeps nothing.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path

    def append(self, row: Mapping[str, Any]) -> None:
        """Write one row.

        Raises:
            TypeError: the row holds what JSON cannot; nothing is written.
        """
        if self.path is None:
            return
        line = json.dumps(dict(row))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a+b") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                line = line if file.read(1) == b"\n" else "\n" + line
            file.write(line.encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The whole rows of a file, in order; none where there is no file."""
    if not path.is_file():
        return []
    rows = []
    for line in path.read_bytes().splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows
