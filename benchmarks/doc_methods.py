"""Writes the table of docs/choosing-a-method.md: what each method needs, and every default; asked of the code itself.

    python benchmarks/doc_methods.py [--check]

A need is found by leaving it out: `sparsify` then asks for it by name.
"""

from __future__ import annotations

import dataclasses
import logging
import sys
from pathlib import Path
from typing import Any

from torch import nn

import tritonsparse as ts
from tritonsparse.methods import METHODS, Method

sys.path.append(str(Path(__file__).parent))  # PYTHONSAFEPATH keeps a script's own folder off it
from doc_marks import rewrite

LENGTHS = {"total_steps": 12, "steps_per_epoch": 2}


def needs(cls: type[Method]) -> list[str]:
    """What `sparsify` asks for beside a method's name."""
    found = []
    given: dict[str, Any] = dict(LENGTHS)
    try:
        cls(sparsity=0.5)  # type: ignore[call-arg]  # a field of most
        given = {"sparsity": 0.5, **given}
    except (TypeError, ValueError):
        pass  # no such field, or one that is only 0
    for name in given:
        rest = {key: value for key, value in given.items() if key != name}
        try:
            ts.sparsify(nn.Linear(16, 16), cls.name, **rest)
        except ValueError as error:
            if f"{name}=" not in str(error):
                raise
            found.append(f"`{name}`")
    return found


def defaults(cls: type[Method]) -> str:
    """Every field that has a default, with it; None is said to fit the run where it does."""
    parts = []
    for field in dataclasses.fields(cls):
        if not field.init or field.default is dataclasses.MISSING:
            continue
        value = field.default
        if field.name in cls.intervals:
            said = f"a hundredth of the run, at most {cls.intervals[field.name]}"
        elif field.name in cls.fits():
            said = "scaled to the run"
        else:
            said = f"`{value!r}`"
        parts.append(f"`{field.name}` {said}")
    return ", ".join(parts) or "-"


def table() -> str:
    """Markdown, a row a method."""
    lines = ["| name | needs | starts from | patterns | defaults |", "|---|---|---|---|---|"]
    for name, cls in METHODS.items():
        asked = ", ".join(needs(cls)) or "nothing"
        patterns = ", ".join(kind.__name__ for kind in cls.patterns)
        first = "a mask (`initial_mask`)" if cls.starts_from_mask else "its weights"
        lines.append(f"| `{name}` | {asked} | {first} | {patterns} | {defaults(cls)} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    logging.disable(logging.WARNING)
    try:
        return rewrite(argv, __doc__, lambda _: table(), "doc_methods", "choosing-a-method.md")
    finally:
        logging.disable(logging.NOTSET)


if __name__ == "__main__":
    sys.exit(main())
