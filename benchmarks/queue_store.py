"""An entry of the queue of GPU work, and the store of its records: what is due, and in which order.

A record lives in `<folder>/<file>.json`, alone or, for entries with a key "a/b", at `document["a"]["b"]`. It
is the entry's result with a part "queue": state, hash of the sources, seconds, when. An entry is due unless
its record is done and its sources have the hash they had then. An attempt that ends badly does not overwrite
an earlier result, nor one of the same sources with more rows: it is noted in it as "last_attempt".

The order is by stage, in a stage by value a second. An entry that failed, and whose sources are still those that
failed, comes after all others: a fault that stays must not cost every lease its first minutes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness import ROOT, write_json
from reports import read_run
from row_log import read_rows

Record = dict[str, Any]
# Stages: the quick form of every benchmark, the tests, the benchmarks in full, long training runs.
QUICK, TESTS, FULL, LONG = range(4)
# What kernels, and layers over them, are made of.
KERNELS = ("kernels/**/*.py",)
LAYERS = (
    *KERNELS, "tritonsparse/layers/*.py", "tritonsparse/sparsifier.py", "tritonsparse/topologies.py",
    "tritonsparse/weight_cache.py", "tritonsparse/methods/*.py",
)  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """One experiment.

    command: words of its command; {work} is a folder of its own, deleted afterwards, {data} is `data`, {rows} the file
        that it appends its rows to.
    collect: (that folder, standard output) -> result; called when the command ends, well or badly.
    partial: what the result is of the document of the rows it had, where `collect` has none.
    sources: globs below the root of the files it measures.
    estimate, minimum: seconds it takes, and without which it is not started.
    stage, value: its place in the queue; entries of no value come last in their stage, in the order of the list.
    file, key: where the record lives. Neighbours that share a file and have keys run side by side, unless `alone`.
    alone: it takes times, which nothing beside it may disturb.
    data: folder of the data it reads, None where there is none; no part of the hash.
    """

    name: str
    command: tuple[str, ...]
    collect: Callable[[Path, str], Record]
    sources: tuple[str, ...]
    estimate: float
    minimum: float
    file: str
    key: str | None = None
    data: Path | None = None
    alone: bool = False
    stage: int = FULL
    value: float = 0.0
    partial: Callable[[Record], Record] = dict

    @property
    def missing(self) -> str:
        """What it lacks to be run, "" if nothing."""
        return "no data" if self.data is None and any("{data}" in word for word in self.command) else ""

    def hash(self, root: Path = ROOT) -> str:
        """Of the command's words and of names and contents of the sources."""
        digest = hashlib.sha256(json.dumps(self.command[1:]).encode())
        for pattern in self.sources:
            paths = sorted(path for path in root.glob(pattern) if path.is_file())
            if not paths:
                raise ValueError(
                    f"Entry.hash: expected files for {pattern!r} (sources of {self.name}), got none; correct the entry"
                )
            for path in paths:
                digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes() + b"\0")
        return digest.hexdigest()[:16]


def read_document(path: Path) -> Record:
    """A results file; empty where there is none or no JSON."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return document if isinstance(document, dict) else {}


@dataclass(frozen=True)
class Store:
    """Records of one device: read from `folder`, else from `earlier` (results that came along)."""

    folder: Path
    earlier: Path | None = None

    def document(self, entry: Entry) -> Record:
        name = f"{entry.file}.json"
        document = read_document(self.folder / name)
        if not document and self.earlier is not None:
            document = read_document(self.earlier / name)
        return document

    def record(self, entry: Entry) -> Record:
        record = self.document(entry)
        for part in entry.key.split("/") if entry.key else ():
            record = record.get(part, {})
        return record

    def state(self, entry: Entry) -> str:
        """ "done", "stale", "failed", "unfinished", "no result", or what is missing."""
        queue = self.record(entry).get("queue", {})
        if queue.get("state") == "done":
            return "done" if queue.get("sources") == entry.hash() else "stale"
        return entry.missing or queue.get("state") or "no result"

    def due(self, entry: Entry) -> bool:
        return not entry.missing and self.state(entry) != "done"

    def failed(self, entry: Entry) -> bool:
        """Whether the last attempt at its present sources failed."""
        queue = self.record(entry).get("queue", {})
        last = queue.get("last_attempt", queue)
        return last.get("state") == "failed" and last.get("sources") == entry.hash()

    def expected(self, entry: Entry) -> float:
        """Seconds it will take: what it took, else its estimate; one that was ended takes no less than it took."""
        queue = self.record(entry).get("queue", {})
        seconds = float(queue.get("seconds", 0.0))
        return seconds if seconds and queue.get("state") == "done" else max(entry.estimate, seconds)

    def order(self, entries: Sequence[Entry]) -> list[Entry]:
        """The entries in the order in which they are to run."""
        return sorted(entries, key=lambda e: (self.failed(e), e.stage, -e.value / max(self.expected(e), 1.0)))

    def rows(self, entry: Entry) -> Path:
        """Where it appends its rows."""
        name = f"{entry.file}.{entry.key}" if entry.key else entry.file
        return self.folder / f"{name.replace('/', '.').replace(' ', '_')}.jsonl"

    def recover(self, entry: Entry) -> bool:
        """Make a record of the rows that an attempt left when this program was killed; whether there were any."""
        path = self.rows(entry)
        started = next((row["queue"] for row in read_rows(path) if "queue" in row), {"sources": ""})
        document = read_run(path)
        if document:
            queue = {"state": "unfinished", **started, "reason": "the queue was killed"}
            self.write(entry, entry.partial(document), queue)
        path.unlink(missing_ok=True)
        return bool(document)

    def write(self, entry: Entry, result: Mapping[str, Any], queue: Mapping[str, Any]) -> None:
        """Write one record; other keys of its file are kept."""
        before = self.record(entry)
        known = before.get("queue", {})
        fewer = len(result.get("rows", ())) < len(before.get("rows", ())) and known.get("sources") == queue["sources"]
        if queue["state"] != "done" and (known.get("state") == "done" or fewer):
            record = {**before, "queue": {**known, "last_attempt": {**queue, **result}}}
        else:
            record = {"queue": dict(queue), **result}
        document = record
        if entry.key:
            document = self.document(entry)
            *parts, last = entry.key.split("/")
            place = document
            for part in parts:
                place = place.setdefault(part, {})
            place[last] = record
        write_json(self.folder / f"{entry.file}.json", document)
