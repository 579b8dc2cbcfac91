"""The programs of `benchmarks/` can be imported and run; what tests of them share."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tritonsparse.train.text import translation_presets

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
# At the end of the path: the folder's modules have names of their own.
sys.path.append(str(BENCHMARKS))
# Marian computes the sinusoids of 1024 positions in Python.
short = partial(translation_presets.build_model, max_positions=32)
Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., SimpleNamespace]:
    """Runs `benchmarks/<name>.py` as a script that finds the folder's modules by itself, in this process."""

    def run(name: str, *arguments: str) -> SimpleNamespace:
        script, stems = BENCHMARKS / f"{name}.py", [path.stem for path in BENCHMARKS.glob("*.py")]
        others = {stem: sys.modules.pop(stem) for stem in stems if stem in sys.modules}
        code: Any = 0
        try:
            with monkeypatch.context() as patch:
                patch.setattr(sys, "argv", [str(script), *arguments])
                patch.setattr(sys, "path", [entry for entry in sys.path if entry != str(BENCHMARKS)])
                patch.setattr(torch.backends.cudnn, "benchmark", False)
                patch.setattr(translation_presets, "build_model", short)
                runpy.run_path(str(script), run_name="__main__")
        except SystemExit as ended:
            code = ended.code
        finally:
            for stem in stems:
                sys.modules.pop(stem, None)
            sys.modules.update(others)
        out, err = capfd.readouterr()
        return SimpleNamespace(returncode=code, stdout=out, stderr=err)

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
