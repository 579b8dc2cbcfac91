"""The GPU tests' run: a row for each test the moment it is over, from all processes, also when the run is killed."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import gpu_tests
import pytest
import reports

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"

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
SLOW = """
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
    (tmp_path / "test_slow.py").write_text(SLOW)
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
