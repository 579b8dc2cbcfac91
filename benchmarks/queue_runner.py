"""How the queue of GPU work runs: one entry after the other until the budget is spent, each with its record.

An entry whose command has {rows} appends its rows to that file, `<folder>/<file>.<key>.jsonl`, as they are made. When
it ends badly, or is ended, its record holds the rows it had. A file that is left because this program was killed itself
becomes a record at the next start.
"""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from harness import ROOT
from queue_store import Entry, Record, Store
from reports import read_run
from row_log import RowLog

# Seconds kept from the budget for writing what has been found.
RESERVE = 1.0
# The end of a failed entry's output that its record keeps.
TAIL = 2000
# Runs of one file that share the GPU: each alone leaves it idle between small launches.
SIDE_BY_SIDE = 3


@dataclass
class _Running:
    entry: Entry
    hash: str
    process: subprocess.Popen[bytes]
    work: Path
    rows: Path
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
    for entry in entries:
        if store.rows(entry).exists() and store.recover(entry):
            say(f"         {entry.name}: rows of an earlier attempt are kept")
    waiting = store.order([entry for entry in entries if store.state(entry) != "done"])
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
        running = [
            _start(entry, Path(folder) / str(number), store.rows(entry), environment)
            for number, entry in enumerate(group)
        ]
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
            # This program is being ended: what they have so far is kept.
            for job in running:
                job.kill()
                _finish(job, None, len(group), store)
    return outcomes


def _start(entry: Entry, work: Path, rows: Path, environment: Mapping[str, str]) -> _Running:
    work.mkdir()
    places = {"{work}": str(work), "{data}": str(entry.data), "{rows}": str(rows)}
    command = list(entry.command)
    for mark, place in places.items():
        command = [word.replace(mark, place) for word in command]
    digest = entry.hash()
    if any("{rows}" in word for word in entry.command):
        started = datetime.now(UTC).isoformat(timespec="seconds")
        RowLog(rows).append({"queue": {"entry": entry.name, "sources": digest, "started": started}})
    with (work / "output").open("wb") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, env=dict(environment), stdout=output, stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
    return _Running(entry, digest, process, work, rows, time.monotonic())


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
    if not result:
        rows = read_run(job.rows)
        result = job.entry.partial(rows) if rows else {}
    store.write(job.entry, result, queue)
    job.rows.unlink(missing_ok=True)
    return "ran" if queue["state"] == "done" else str(queue["state"])
