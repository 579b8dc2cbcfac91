"""What lies between two marks of a page of docs/ is written by a program: this is how."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def marks(program: str) -> tuple[str, str]:
    """The two lines of a program: "doc_speed" writes what is called "speed"."""
    name = program.removeprefix("doc_")
    return f"<!-- {name}: written by benchmarks/{program}.py -->", f"<!-- end of {name} -->"


def updated(page: str, text: str, program: str) -> str:
    """`page` with `text` between the program's two marks.

    Raises:
        ValueError: a mark is missing.
    """
    first, last = marks(program)
    head, begin, rest = page.partition(first)
    _, end, tail = rest.partition(last)
    if not begin or not end:
        raise ValueError(f"{program}: expected {first} and {last} in its page, got none; put them back")
    return f"{head}{begin}\n\n{text}\n\n{end}{tail}"


def rewrite(
    argv: Sequence[str] | None, description: str | None, make: Callable[[Path], str], program: str, page: str
) -> int:
    """The program: writes into docs/`page` what `make` says of benchmarks/results, or compares with --check.

    Returns:
        The exit status: with --check 1 where the page does not say what the files say.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing, compare")
    args = parser.parse_args(argv)
    path = ROOT / "docs" / page
    text = path.read_text(encoding="utf-8")
    new = updated(text, make(ROOT / "benchmarks" / "results"), program)
    if args.check:
        return int(new != text)
    path.write_text(new, encoding="utf-8")
    return 0
