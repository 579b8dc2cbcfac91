"""How the queue of GPU work runs: what is due, what it costs, what is written.

A record lives in `<folder>/<file>.json`, alone or, for entries with a key "a/b", at `document["a"]["b"]`. It
is the entry's result with a part "queue": state, hash of the sources, seconds, when. An entry is due unless
its record is done and its sources have the hash they had then. An attempt that ends badly does not overwrite
an earlier result: it is noted in it as "last_attempt".
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from harness import ROOT, write_json

Record = dict[str, Any]
# Seconds kept from the budget for writing what has been found.
RESERVE = 1.0
# The end of a failed entry's output that its record keeps.
TAIL = 2000
# Runs of one file that share the GPU: each alone leaves it idle between small launches.
SIDE_BY_SIDE = 3


@dataclass(frozen=True)
class Entry:
    """One experiment.

    command: words of its command; {work} is a folder of its own, deleted afterwards, {data} is `data`.
    collect: (that folder, standard output) -> result; called when the command ends, well or badly.
    sources: globs below the root of the files it measures.
    estimate, minimum: seconds it takes, and without which it is not started.
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

    def write(self, entry: Entry, result: Mapping[str, Any], queue: Mapping[str, Any]) -> None:
        """Write one record; other keys of its file are kept."""
        before = self.record(entry)
        if queue["state"] != "done" and before.get("queue", {}).get("state") == "done":
            record = {**before, "queue": {**before["queue"], "last_attempt": {**queue, **result}}}
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


@dataclass
class _Running:
    entry: Entry
    hash: str
    process: subprocess.Popen[bytes]
    work: Path
    start: float

    def output(self) -> str:
        return (self.work / "output").read_text(encoding="utf-8", errors="replace")

    def kill(self) -> None:
        # Its own session, so that what it started goes with it and nothing else does.
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def run_queue(
    entries: Sequence[Entry],
    store: Store,
    budget: float,
    environment: Mapping[str, str],
    say: Callable[[str], None] = print,
) -> dict[str, str]:
    """Run what is due until the budget is spent.

    Returns:
        What became of each entry that was not done: "ran", "failed", "unfinished", or "left" (not started).
    """
    deadline = time.monotonic() + budget - RESERVE
    outcomes: dict[str, str] = {}
    waiting = [entry for entry in entries if store.state(entry) != "done"]
    while waiting:
        group = _together(waiting)
        waiting = waiting[len(group) :]
        left = deadline - time.monotonic()
        ready = [entry for entry in group if store.due(entry) and entry.minimum <= left]
        outcomes |= {entry.name: "left" for entry in group}
        if ready:
            say(f"{left:6.0f} s left: {', '.join(entry.name for entry in ready)}")
            outcomes |= _run_group(ready, store, deadline, environment, say)
    return outcomes


def _together(waiting: Sequence[Entry]) -> list[Entry]:
    """The first entry and the neighbours that run beside it, with two processors each."""
    first, most = waiting[0], max(1, min(SIDE_BY_SIDE, (os.cpu_count() or 1) // 2))
    group = [first]
    for entry in waiting[1:most] if first.key and not first.alone else ():
        if entry.key is None or entry.file != first.file or entry.alone:
            break
        group.append(entry)
    return group


def _run_group(
    group: Sequence[Entry],
    store: Store,
    deadline: float,
    environment: Mapping[str, str],
    say: Callable[[str], None],
) -> dict[str, str]:
    outcomes: dict[str, str] = {}
    with tempfile.TemporaryDirectory(prefix="tritonsparse-queue-") as folder:
        running = [_start(entry, Path(folder) / str(number), environment) for number, entry in enumerate(group)]
        try:
            while running:
                over = time.monotonic() >= deadline
                for job in [job for job in running if over or job.process.poll() is not None]:
                    running.remove(job)
                    status = job.process.poll()
                    if status is None:
                        job.kill()
                    outcomes[job.entry.name] = _finish(job, status, len(group), store)
                    say(f"         {job.entry.name}: {outcomes[job.entry.name]}")
                time.sleep(0.05)
        finally:
            for job in running:
                job.kill()
    return outcomes


def _start(entry: Entry, work: Path, environment: Mapping[str, str]) -> _Running:
    work.mkdir()
    command = [word.replace("{work}", str(work)).replace("{data}", str(entry.data)) for word in entry.command]
    with (work / "output").open("wb") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, env=dict(environment), stdout=output, stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
    return _Running(entry, entry.hash(), process, work, time.monotonic())


def _finish(job: _Running, status: int | None, beside: int, store: Store) -> str:
    """Write the record of a job that ended, or (status None) was ended by the budget."""
    output = job.output()
    queue: Record = {
        "state": "unfinished" if status is None else "failed" if status else "done",
        "sources": job.hash,
        "seconds": round(time.monotonic() - job.start, 1),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "side_by_side": beside,
    }
    result: Record = {}
    if status is not None:
        try:
            result = job.entry.collect(job.work, output)
        # A result that cannot be read is a failed entry; the others go on.
        except Exception as error:
            queue |= {"state": "failed", "reason": f"{type(error).__name__}: {error}"}
    if queue["state"] != "done":
        queue |= {"status": status, "output": output[-TAIL:]}
    store.write(job.entry, result, queue)
    return "ran" if queue["state"] == "done" else str(queue["state"])
