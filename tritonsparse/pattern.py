"""Patterns: the shapes a mask may take.

    "unstructured"   any element            Unstructured()
    "block:32"       32x32 blocks           Block(32, 32)
    "block:16x64"    16 rows x 64 columns   Block(16, 64)
    "2:4"            2 kept of every 4      NM(2, 4)
    "2:4:transposable"  and along columns   NM(2, 4, transposable=True)
    "channel"        whole rows of W        Channel()

Which patterns a method supports is the method's to say (`Method.patterns`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from .kernels.select.transposable import MAX_SIDE

__all__ = ["NM", "Block", "Channel", "Pattern", "Unstructured", "parse"]


@dataclass(frozen=True)
class Unstructured:
    """Every element on its own."""

    def __str__(self) -> str:
        return "unstructured"


@dataclass(frozen=True)
class Block:
    """Blocks of `rows` x `columns` elements of W [N, K], kept or pruned whole."""

    rows: int
    columns: int

    def __str__(self) -> str:
        same = self.rows == self.columns
        return f"block:{self.rows}" if same else f"block:{self.rows}x{self.columns}"


@dataclass(frozen=True)
class NM:
    """`n` kept elements in every group of `m` along a row of W; `transposable`: along a column too."""

    n: int
    m: int
    transposable: bool = False

    def __str__(self) -> str:
        return f"{self.n}:{self.m}{':transposable' if self.transposable else ''}"


@dataclass(frozen=True)
class Channel:
    """Whole output rows of W."""

    def __str__(self) -> str:
        return "channel"


Pattern = Unstructured | Block | NM | Channel


def parse(text: str | Pattern) -> Pattern:
    """The pattern that `text` names; a pattern object is returned as it is.

    Raises:
        ValueError: `text` names no pattern, or a block or group of no size.
    """
    if not isinstance(text, str):
        return text
    if text == "unstructured":
        return Unstructured()
    if text == "channel":
        return Channel()
    if match := re.fullmatch(r"block:([1-9]\d*)(?:x([1-9]\d*))?", text):
        rows = int(match[1])
        return Block(rows, int(match[2] or rows))
    if match := re.fullmatch(r"([1-9]\d*):([1-9]\d*)(:transposable)?", text):
        n, m, transposable = int(match[1]), int(match[2]), match[3] is not None
        if n < m and (m <= MAX_SIDE or not transposable):
            return NM(n, m, transposable)
    raise ValueError(
        f"pattern: expected 'unstructured', 'block:R', 'block:RxC', 'N:M' with N < M, 'N:M:transposable' with M of at "
        f"most {MAX_SIDE} or 'channel', got {text!r}; correct the pattern"
    )
