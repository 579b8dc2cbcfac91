"""The programs of `benchmarks/` can be imported and run; what tests of them share."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
# At the end of the path: the folder's modules have names of their own.
sys.path.append(str(BENCHMARKS))

Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., SimpleNamespace]:
    """Runs `benchmarks/<name>.py` as a script that finds the folder's modules by itself, in this process."""

    def run(name: str, *arguments: str) -> SimpleNamespace:
        script, stems = BENCHMARKS / f"{name}.py", [path.stem for path in BENCHMARKS.glob("*.py")]
        others = {stem: sys.modules.pop(stem) for stem in stems if stem in sys.modules}
        try:
            with monkeypatch.context() as patch, pytest.raises(SystemExit) as ended:
                patch.setattr(sys, "argv", [str(script), *arguments])
                patch.setattr(sys, "path", [entry for entry in sys.path if entry != str(BENCHMARKS)])
                patch.setattr(torch.backends.cudnn, "benchmark", False)
                runpy.run_path(str(script), run_name="__main__")
        finally:
            for stem in stems:
                sys.modules.pop(stem, None)
            sys.modules.update(others)
        out, err = capfd.readouterr()
        return SimpleNamespace(returncode=ended.value.code, stdout=out, stderr=err)

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
