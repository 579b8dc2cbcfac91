"""The queue of GPU work runs what is due, within its budget, and keeps what it has whatever ends it."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import queue_runner
from queue_runner import run_queue
from queue_store import Entry, Record, Store

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def read_result(work: Path, output: str) -> Record:
    return {"output": output.strip()}


def unreadable(work: Path, output: str) -> Record:
    raise ValueError("no JSON")


def fake(name: str, code: str = "print('fine')", **changes: Any) -> Entry:
    """An entry that runs a line of Python and measures `benchmarks/harness.py`."""
    facts: dict[str, Any] = {
        "name": name, "command": (sys.executable, "-S", "-c", code), "collect": read_result,
        "sources": ("benchmarks/harness.py",), "estimate": 1, "minimum": 0, "file": name,
    }  # fmt: skip
    return Entry(**(facts | changes))


def run(entries: list[Entry], folder: Path, budget: float = 60.0) -> dict[str, str]:
    return run_queue(entries, Store(folder), budget, os.environ, say=lambda line: None)


def record(folder: Path, name: str = "a") -> Record:
    found: Record = json.loads((folder / f"{name}.json").read_text())
    return found


def test_results_are_written_not_made_twice_and_not_overwritten_by_a_failure(tmp_path: Path) -> None:
    entry, failing = fake("a"), fake("a", "import sys; sys.exit(1)")
    assert run([entry], tmp_path) == {"a": "ran"}
    assert record(tmp_path)["output"] == "fine" and record(tmp_path)["queue"]["state"] == "done"
    assert run([entry], tmp_path) == {}
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    assert run([failing], tmp_path) == {"a": "failed"}
    assert record(tmp_path)["output"] == "fine" and record(tmp_path)["queue"]["state"] == "done"
    assert record(tmp_path)["queue"]["last_attempt"]["state"] == "failed"
    assert Store(tmp_path).state(failing) == "stale"


def test_changed_sources_or_another_command_make_a_result_stale(tmp_path: Path) -> None:
    (tmp_path / "source.py").write_text("1")
    entry = fake("a", sources=("*.py",))
    before = entry.hash(tmp_path)
    assert entry.hash(tmp_path) == before
    (tmp_path / "source.py").write_text("2")
    assert entry.hash(tmp_path) != before
    assert fake("a", "print(2)").hash() != fake("a").hash()
    with pytest.raises(ValueError, match=r"expected files for 'none\.py'.*correct the entry"):
        fake("a", sources=("none.py",)).hash(tmp_path)
    store = Store(tmp_path / "results")
    store.write(entry, {}, {"state": "done", "sources": "older"})
    assert store.state(fake("a")) == "stale" and store.due(fake("a"))


def test_a_failing_entry_is_recorded_and_the_next_one_runs(tmp_path: Path) -> None:
    failing = fake("bad", "import sys; print('it broke'); sys.exit(3)")
    outcomes = run([failing, fake("good"), fake("odd", collect=unreadable)], tmp_path)
    assert outcomes == {"bad": "failed", "good": "ran", "odd": "failed"}
    queue = record(tmp_path, "bad")["queue"]
    assert queue["state"] == "failed" and queue["status"] == 3 and "it broke" in queue["output"]
    assert record(tmp_path, "odd")["queue"]["reason"] == "ValueError: no JSON"


def test_the_budget_ends_an_entry_and_what_it_started(tmp_path: Path) -> None:
    marker = tmp_path / "child"
    code = (
        "import subprocess, sys\n"
        "child = subprocess.Popen([sys.executable, '-S', '-c', 'import time; time.sleep(60)'])\n"
        f"open({str(marker)!r}, 'w').write(str(child.pid))\nchild.wait()"
    )
    start = time.monotonic()
    outcomes = run([fake("slow", code), fake("later", minimum=0.5)], tmp_path, queue_runner.RESERVE + 2)
    assert time.monotonic() - start < 30
    assert outcomes == {"slow": "unfinished", "later": "left"}
    assert record(tmp_path, "slow")["queue"]["state"] == "unfinished"
    assert not (tmp_path / "later.json").exists()
    status = Path(f"/proc/{marker.read_text()}/status")
    assert not status.exists() or "zombie" in status.read_text()


def test_an_entry_without_its_data_or_the_time_it_needs_is_left(tmp_path: Path) -> None:
    entry = fake("a", "print('{data}')", data=None)
    assert Store(tmp_path).state(entry) == "no data"
    assert run([entry], tmp_path) == {"a": "left"} and not list(tmp_path.iterdir())
    assert run([fake("a", "print('{data}')", data=tmp_path)], tmp_path) == {"a": "ran"}
    assert record(tmp_path)["output"] == str(tmp_path)
    assert run([fake("long", minimum=1e6), fake("short")], tmp_path) == {"long": "left", "short": "ran"}


def test_keyed_entries_share_a_file_and_earlier_results_count(tmp_path: Path) -> None:
    runs = [fake(key, file="runs", key=key) for key in ("dense/0", "str/0", "dense/1")]
    earlier, folder = tmp_path / "earlier", tmp_path / "new"
    assert run(runs[:1], earlier) == {"dense/0": "ran"}
    store = Store(folder, earlier)
    assert run_queue(runs, store, 60.0, os.environ, say=lambda line: None) == {"str/0": "ran", "dense/1": "ran"}
    assert {method: sorted(seeds) for method, seeds in record(folder, "runs").items()} == {
        "dense": ["0", "1"],
        "str": ["0"],
    }
    assert all(store.state(entry) == "done" for entry in runs)


def test_what_failed_and_has_not_changed_comes_last_and_value_counts_by_the_second(tmp_path: Path) -> None:
    store = Store(tmp_path)
    bad, good, late = fake("bad", value=9.0, stage=0), fake("good", value=1.0, stage=0), fake("late", stage=3)
    assert [entry.name for entry in store.order([late, good, bad])] == ["bad", "good", "late"]
    store.write(bad, {}, {"state": "failed", "sources": bad.hash()})
    assert [entry.name for entry in store.order([late, good, bad])] == ["good", "late", "bad"]
    # Its sources changed: by value again.
    store.write(bad, {}, {"state": "failed", "sources": "older"})
    assert store.order([late, good, bad])[0] is bad
    # The same where an earlier result is kept beside the failure.
    store.write(bad, {}, {"state": "done", "sources": "older"})
    store.write(bad, {}, {"state": "failed", "sources": bad.hash()})
    assert store.state(bad) == "stale" and store.order([late, good, bad])[-1] is bad
    slow, quick = fake("slow", value=5.0, estimate=100.0), fake("quick", value=4.0, estimate=10.0)
    assert store.order([slow, quick]) == [quick, slow]
    # What it took counts more than what was thought; what was ended took at least that long.
    store.write(slow, {}, {"state": "done", "sources": "older", "seconds": 5.0})
    store.write(quick, {}, {"state": "unfinished", "sources": "older", "seconds": 60.0})
    assert (store.expected(slow), store.expected(quick)) == (5.0, 60.0)
    assert store.order([quick, slow]) == [slow, quick]


ROWS = """
import json, os, sys, time
path = "{rows}"
with open(path, "a") as file:
    file.write(json.dumps({"run": {"name": "x", "block": 64}}) + "\\n")
    for number in range(3):
        file.write(json.dumps({"number": number}) + "\\n")
    file.write('{"number": 3, "cut sh')
"""
WAITING = """
open("{rows}.ready", "w").close()
time.sleep(600)
"""


@pytest.mark.parametrize("ending", ["sys.exit(3)", "os.kill(os.getpid(), 9)", "time.sleep(600)"])
def test_an_entry_that_ends_badly_leaves_the_rows_it_had(ending: str, tmp_path: Path) -> None:
    entry = fake("a", ROWS + ending, collect=unreadable)
    (outcome,) = run([entry], tmp_path, queue_runner.RESERVE + 5).values()
    kept = record(tmp_path)
    assert outcome == kept["queue"]["state"] == ("unfinished" if "sleep" in ending else "failed")
    assert kept["block"] == 64 and kept["rows"] == [{"number": number} for number in range(3)]
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


QUEUE = """
import os, signal, sys, types
sys.path[:0] = {path!r}
sys.modules["torch"] = types.ModuleType("torch")  # which takes seconds to import and has no part in this
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
from pathlib import Path
from test_queue_runner import ROWS, WAITING, fake
from queue_runner import run_queue
from queue_store import Store
run_queue([fake("a", ROWS + WAITING)], Store(Path({folder!r})), 600.0, os.environ, say=lambda line: None)
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_queue_that_is_killed_itself_loses_no_row(how: signal.Signals, tmp_path: Path, started: Any) -> None:
    path = [str(BENCHMARKS), str(Path(__file__).parent)]
    code = QUEUE.format(path=path, folder=str(tmp_path))
    process = started("-c", code, ready=(tmp_path / "a.jsonl.ready").exists)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.send_signal(how)
    process.wait()
    store, entry = Store(tmp_path), fake("a", ROWS + WAITING)
    if how == signal.SIGKILL:
        # The entry has a session of its own and outlives the queue.
        for child in children:
            os.kill(int(child), signal.SIGKILL)
        assert not (tmp_path / "a.json").exists() and store.recover(entry)
    kept = record(tmp_path)
    assert kept["rows"] == [{"number": number} for number in range(3)] and kept["block"] == 64
    assert kept["queue"]["state"] == "unfinished" and kept["queue"]["sources"] == entry.hash()
    assert not (tmp_path / "a.jsonl").exists() and not store.recover(entry)


def test_a_queue_starts_with_what_an_earlier_one_left(tmp_path: Path) -> None:
    store, entry = Store(tmp_path), fake("a", "print('fine')", minimum=1e6)
    lines = [{"queue": {"entry": "a", "sources": "s"}}, {"run": {"name": "a"}}, {"number": 0}]
    store.rows(entry).write_text("".join(json.dumps(line) + "\n" for line in lines))
    said: list[str] = []
    run_queue([entry], store, 60.0, os.environ, said.append)
    assert store.record(entry)["rows"] == [{"number": 0}] and store.record(entry)["queue"]["sources"] == "s"
    assert any("a: rows of an earlier attempt are kept" in line for line in said)
    # Fewer rows of the same sources replace no more.
    store, entry = Store(tmp_path), fake("a")
    queue = {"state": "unfinished", "sources": entry.hash()}
    for count, kept in ((3, 3), (1, 3), (4, 4)):
        store.write(entry, {"rows": [{}] * count}, queue)
        assert len(store.record(entry)["rows"]) == kept
    store.write(entry, {"rows": [{}]}, queue | {"sources": "newer"})
    assert len(store.record(entry)["rows"]) == 1
