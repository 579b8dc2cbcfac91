"""Rows of benchmarks and GPU tests are on the disk as soon as they exist, whatever becomes of their run."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import bench_packed
import bench_threshold
import gpu_tests
import harness
import pytest
import reports
import row_log

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def test_rows_come_back_in_order_and_a_missing_file_has_none(tmp_path: Path) -> None:
    log = row_log.RowLog(tmp_path / "new" / "rows.jsonl")
    for number in range(3):
        log.append({"number": number, "text": "Ŵ\nα"})
    rows = [{"number": number, "text": "Ŵ\nα"} for number in range(3)]
    assert row_log.read_rows(tmp_path / "new" / "rows.jsonl") == rows
    assert row_log.read_rows(tmp_path / "none.jsonl") == []
    row_log.RowLog(None).append({"kept": "nowhere"})
    # What JSON cannot hold writes nothing.
    path = tmp_path / "other.jsonl"
    with pytest.raises(TypeError):
        row_log.RowLog(path).append({"what": object()})
    assert not path.exists()
    # A line cut short is left out and spoils no later row.
    row_log.RowLog(path).append({"a": 1})
    with path.open("ab") as file:
        file.write(b'{"a": 2, "b"')
    assert row_log.read_rows(path) == [{"a": 1}]
    row_log.RowLog(path).append({"a": 3})
    assert row_log.read_rows(path) == [{"a": 1}, {"a": 3}]


def test_a_document_is_made_of_the_last_run_s_rows(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    log = row_log.RowLog(path)
    for facts, count in (({"name": "old"}, 3), ({"name": "new", "block": 64}, 2)):
        log.append({"run": facts})
        for number in range(count):
            log.append({"number": number})
    assert reports.read_run(path) == {"name": "new", "block": 64, "rows": [{"number": 0}, {"number": 1}]}
    log.append({"run": {"name": "without rows"}})
    assert reports.read_run(path) == {} and reports.read_run(tmp_path / "none.jsonl") == {}


SLOW = """
import sys, time
sys.path[:0] = [{benchmarks!r}]
import bench_threshold

whole = bench_threshold.bench
def slow(*given):
    for number, row in enumerate(whole(*given)):
        yield row
        if number:
            print("two rows", flush=True)
            time.sleep(600)

bench_threshold.bench = slow
bench_threshold.main(["--smoke", "--out", {out!r}])
"""


def test_a_benchmark_killed_between_two_rows_keeps_those_it_had(tmp_path: Path, started: Any) -> None:
    code = SLOW.format(benchmarks=str(BENCHMARKS), out=str(tmp_path))
    said = (tmp_path / "said.txt").open("w+")
    process = started("-c", code, stdout=said, ready=lambda: "two rows" in (tmp_path / "said.txt").read_text())
    process.send_signal(signal.SIGKILL)
    assert process.wait(60) == -signal.SIGKILL
    (path,) = tmp_path.glob("*/*")
    assert path.name == "threshold.jsonl"
    document = reports.read_run(path)
    assert document["name"] == "threshold" and document["smoke"] and document["environment"]["torch"]
    # The generator is resumed, and sleeps, after its second row was kept.
    assert [row["provider"] for row in document["rows"]] == ["copy", "eager"]
    assert all(row["verdict"] == "right" and row["median_ms"] > 0 for row in document["rows"])


def test_only_chooses_cases_or_names_those_that_exist(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_threshold.main(["--smoke", "--only", "*96x80*mask*", "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("*/*")
    document = json.loads(path.read_text(encoding="utf-8"))
    assert path.name == "threshold_only.json" and document == json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {(row["shape"], row["view"]) for row in document["rows"]} == {("96x80", "mask")}
    with pytest.raises(SystemExit) as status:
        bench_packed.main(["--smoke", "--only", "nothing", "--out", str(tmp_path / "none")])
    error = capsys.readouterr().err
    assert status.value.code == 2 and not (tmp_path / "none").exists()
    assert error.startswith("bench_packed: expected --only to match a case, got 'nothing'") and "smoke 48x40" in error


def test_quick_and_given_files_of_rows_and_a_wrong_row_is_the_exit_status(tmp_path: Path) -> None:
    parser = harness.parser_of("")
    rows = tmp_path / "rows.jsonl"
    args = parser.parse_args(["--quick", "--out", str(tmp_path), "--rows", str(rows)])
    report = reports.Report("bench", {"a": ""}, args, block=64)
    report.extend({"a": number, "verdict": "right"} for number in range(2))
    assert report.publish(more=1) == 0
    (written,) = tmp_path.glob("*/*")
    document = json.loads(written.read_text(encoding="utf-8"))
    assert written.name == "bench_quick.json" and document["more"] == 1 and document["quick"]
    # A file that was asked for is left to whoever asked.
    assert reports.read_run(rows)["rows"] == document["rows"] and reports.read_run(rows)["block"] == 64
    report = reports.Report("bench", {"a": ""}, harness.parser_of("").parse_args([]))
    report.extend([{"a": 1, "verdict": "failed"}, {"a": 2, "verdict": "WRONG"}])
    assert report.publish() == 1


TESTS = """
import time
import pytest

pytestmark = pytest.mark.gpu

def test_fine(): pass
def test_bad(): assert 1 == 2, "one is not two"
@pytest.mark.skip(reason="not here")
def test_skipped(): pass
@pytest.fixture
def broken(): raise OSError("no fixture")
def test_setup(broken): pass
@pytest.fixture
def leaving():
    yield
    raise OSError("no end")
def test_teardown(leaving): pass
"""
SLOW_TESTS = """
import time
import pytest
pytestmark = pytest.mark.gpu
@pytest.mark.parametrize("number", range(8))
def test_quick(number): pass
@pytest.mark.parametrize("number", range(8))
def test_slow(number): time.sleep(600)
"""


def of(folder: Path, *options: str) -> list[str]:
    return ["--smoke", f"--tests={folder}", f"--out={folder / 'out'}", *options]


def test_every_outcome_is_counted_once_and_without_a_file_it_says_so(tmp_path: Path, program: Any) -> None:
    (tmp_path / "test_some.py").write_text(TESTS)
    (tmp_path / "test_others.py").write_text("raise RuntimeError('must not be imported')")
    command = [sys.executable, str(BENCHMARKS / "gpu_tests.py"), *of(tmp_path, "--only=test_s*")]
    run = subprocess.run(command, env=os.environ | {"PYTHONSAFEPATH": "1"}, capture_output=True, text=True)
    assert run.returncode == 1, run.stdout + run.stderr
    document = json.loads(run.stdout.splitlines()[-1])
    assert document["passed"] == 1 and document["status"] == 1
    failed = {test.rpartition("::")[2]: message for test, message in document["failed"].items()}
    assert sorted(failed) == ["test_bad", "test_setup", "test_teardown"]
    assert "one is not two" in failed["test_bad"] and "no fixture" in failed["test_setup"]
    assert [test.rpartition("::")[2] for test in document["skipped"]] == ["test_skipped"]
    assert len(document["slowest"]) == 5 and document["environment"]["torch"]
    run = program("gpu_tests", *of(tmp_path, "--only=nothing"))
    assert run.returncode == 2 and run.stderr.startswith("gpu_tests: expected test files named 'nothing'")


@pytest.mark.skipif(importlib.util.find_spec("xdist") is None, reason="says what processes side by side do")
def test_a_killed_run_of_many_processes_keeps_what_it_had(tmp_path: Path, started: Any) -> None:
    (tmp_path / "test_slow.py").write_text(SLOW_TESTS)
    rows = tmp_path / "rows.jsonl"
    process = started(
        str(BENCHMARKS / "gpu_tests.py"), *of(tmp_path, f"--rows={rows}"), stdout=subprocess.DEVNULL,
        start_new_session=True, ready=lambda: len(reports.read_run(rows).get("rows", ())) >= 4,
    )  # fmt: skip
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    document = gpu_tests.counted(reports.read_run(rows))
    assert document["passed"] >= 4 and document["failed"] == {} and document["name"] == "gpu_tests"
    assert all("test_quick" in test for test in document["slowest"])
