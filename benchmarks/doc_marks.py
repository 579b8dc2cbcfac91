"""What lies between two marks of README.md is written by a program: this is how."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def updated(readme: str, text: str, marks: tuple[str, str], program: str) -> str:
    """`readme` with `text` between its two marks.

    Raises:
        ValueError: a mark is missing.
    """
    head, begin, rest = readme.partition(marks[0])
    _, end, tail = rest.partition(marks[1])
    if not begin or not end:
        raise ValueError(f"{program}: expected {marks[0]} and {marks[1]} in README.md, got none; put them back")
    return f"{head}{begin}\n\n{text}\n\n{end}{tail}"


def rewrite(
    argv: Sequence[str] | None,
    description: str | None,
    make: Callable[[Path], str],
    marks: tuple[str, str],
    program: str,
) -> int:
    """The program: writes what `make` says of benchmarks/results, or with --check compares; returns the exit status."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing, compare")
    args = parser.parse_args(argv)
    path = ROOT / "README.md"
    readme = path.read_text(encoding="utf-8")
    new = updated(readme, make(ROOT / "benchmarks" / "results"), marks, program)
    if args.check:
        return int(new != readme)
    path.write_text(new, encoding="utf-8")
    return 0
