"""What a measurement was made on and with: the processor's name, and the commit of the code."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path

import tritonsparse

__all__ = ["commit", "processor"]


def processor() -> str:
    """The CPU's name as Linux gives it, elsewhere the platform's word for it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def commit() -> str | None:
    """The commit of the checkout that this package is imported from, "-dirty" where files differ; None outside one."""
    root = Path(tritonsparse.__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
