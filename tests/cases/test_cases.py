"""Situations from public reports whose scripts contradicted what is right, corrected; each says why."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

CASES = sorted(path for path in Path(__file__).parent.glob("*.py") if not path.name.startswith("test_"))


@pytest.mark.long
@pytest.mark.parametrize("script", CASES, ids=lambda path: path.stem)
def test_the_situation_ends_right(script: Path) -> None:
    done = subprocess.run([sys.executable, "-W", "ignore", str(script)], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "PASS", done.stdout[-2000:] + done.stderr[-2000:]
