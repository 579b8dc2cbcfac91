"""Files that programs write: whether they can is found out before any work, and none is left half-written."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

__all__ = ["refuse_unwritable", "write_whole"]


def refuse_unwritable(program: str, option: str, path: str | Path, *, folder: bool = False) -> None:
    """Refuse a path that no file, or folder, could be written at. Nothing is left there, and no folder is made.

    Raises:
        ValueError: it is of the other kind, under a file, or where nothing can be written.
    """
    target = Path(path).absolute()
    kind = "a folder" if folder else "a file"
    reason = None
    try:
        if target.exists() and target.is_dir() != folder:
            reason = f"{'a file' if folder else 'a folder'} is there"
        place = target if folder else target.parent
        while not place.exists():
            place = place.parent
        # An unnamed file: permissions do not tell a full or a read-only disk.
        with tempfile.TemporaryFile(dir=place) as file:
            file.write(bytes(4096))
            file.flush()
    except (OSError, ValueError) as error:
        reason = reason or getattr(error, "strerror", None) or str(error)
    if reason is not None:
        raise ValueError(
            f"{program}: expected {option} as {kind} that can be written, got {str(path)!r} ({reason}); name another"
        )


def write_whole(path: str | Path, text: str) -> None:
    """A file of text, replaced as a whole or left as it was; folders on the way are made."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        partial.write_text(text, encoding="utf-8", newline="\n")
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)
