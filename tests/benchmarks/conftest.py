"""The programs of `benchmarks/` can be imported and run; what tests of them share."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
# At the end of the path: the folder's modules have names of their own.
sys.path.append(str(BENCHMARKS))

Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def program() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs a program of `benchmarks/` to its end, in a process of its own."""

    def run(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(BENCHMARKS / f"{name}.py"), *arguments]
        return subprocess.run(command, env=os.environ | {"PYTHONSAFEPATH": "1"}, capture_output=True, text=True)

    return run


@pytest.fixture
def started() -> Iterator[Start]:
    """Starts Python with these arguments and waits until `ready()`; what is still there at the end is killed."""
    processes = []

    def start(*arguments: str, ready: Callable[[], bool], **options: object) -> subprocess.Popen[str]:
        environment = os.environ | {"PYTHONSAFEPATH": "1"} | options.pop("env", {})  # type: ignore[operator]
        process = subprocess.Popen([sys.executable, *arguments], env=environment, text=True, **options)  # type: ignore[call-overload]
        processes.append(process)
        while not ready():
            assert process.poll() is None
            time.sleep(0.05)
        return process  # type: ignore[no-any-return]

    yield start
    for process in processes:
        process.kill()
        process.wait()
