"""Whether a checkpoint folder is what was written: run.json records length and CRC-32 of every file, its own too.

A random state that is missing would let a run go on and end elsewhere; half a file may load. Both are refused by name
before anything is loaded.
"""

from __future__ import annotations

import json
import logging
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["RUN_FILE", "read", "refuse_damaged", "write"]

logger = logging.getLogger(__name__)

RUN_FILE = "run.json"
_FILES = "files"


def write(run: Mapping[str, Any], folder: Path) -> None:
    """run.json, the last file of a checkpoint."""
    files = {path.name: _of_file(path) for path in sorted(folder.iterdir()) if path.is_file()}
    files[RUN_FILE] = _of_text(run)
    (folder / RUN_FILE).write_text(json.dumps({**run, _FILES: files}), encoding="utf-8")


def read(folder: Path) -> tuple[dict[str, Any], dict[str, list[int]] | None]:
    """What run.json says of the run, and of the files; None where a version before checksums wrote it.

    Raises:
        ValueError: there is none, or a damaged one.
    """
    path = folder / RUN_FILE
    try:
        text = path.read_text(encoding="utf-8")
        run = json.loads(text)
        # A digit beyond what a float holds is no other number, and still not what was written.
        if _FILES in run and json.dumps(run) != text:
            raise ValueError("another text")
        files = run.pop(_FILES, None)
        if files is not None and files.pop(RUN_FILE) != _of_text(run):
            raise ValueError("another checksum")
        int(run["step"])
    except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:
        raise ValueError(_damaged(path, str(getattr(error, "strerror", None) or error))) from error
    return run, files


def refuse_damaged(folder: Path, processes: int) -> None:
    """Refuse a checkpoint of which a file is missing or not as it was written.

    Raises:
        ValueError: the first such file, named.
    """
    _, files = read(folder)
    if files is None:
        logger.warning("resume: %s is of an earlier version, without checksums: files are looked for only", folder)
        names = ["model.safetensors", "optimizer.bin", "tritonsparse_state.json", "tritonsparse_state.safetensors"]
        names += [f"random_states_{rank}.pkl" for rank in range(processes)]
        files = {name: [] for name in names}
    for name, expected in files.items():
        path = folder / name
        if not path.is_file():
            raise ValueError(_damaged(path, "no such file"))
        if expected and path.stat().st_size != expected[0]:
            raise ValueError(_damaged(path, f"{path.stat().st_size} bytes in place of {expected[0]}"))
        if expected and _of_file(path) != expected:
            raise ValueError(_damaged(path, "other bytes"))


def _damaged(path: Path, what: str) -> str:
    return f"resume: expected {path} as it was written, got {what}; take another checkpoint"


def _of_file(path: Path) -> list[int]:
    length = checksum = 0
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            length, checksum = length + len(chunk), zlib.crc32(chunk, checksum)
    return [length, checksum]


def _of_text(run: Mapping[str, Any]) -> list[int]:
    # As it is read back: JSON has neither tuples nor keys that are numbers.
    text = json.dumps(run).encode()
    return [len(text), zlib.crc32(text)]
