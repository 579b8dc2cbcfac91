"""Runs every file of `tests/interpreted`, each in a process where Triton interprets kernels."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "tests" / "interpreted").glob("test_*.py"))


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_kernels_pass_through_the_interpreter(path: Path) -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONSAFEPATH": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(path)]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    # Files whose tests all skip also return 0.
    assert re.search(r"^\d+ passed(?!.*skipped)", run.stdout.splitlines()[-1]), run.stdout


def test_there_is_something_to_interpret() -> None:
    assert FILES
