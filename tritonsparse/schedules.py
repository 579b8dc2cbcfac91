"""Schedules: pure functions of a position `i` in a span of length `n`, returning a float.

The annealing schedules start at 1 (or within 0.3 % of it) and fall; a method multiplies them by its own
initial value. AutoSparse, eqs. (2)-(4) and (9) (arXiv:2304.06941). `i` and `n` share one unit, epochs or
steps, which is the caller's.
"""

from __future__ import annotations

import math
from collections.abc import Callable

__all__ = ["SCHEDULES", "constant", "cosine", "cubic", "exponential", "linear", "sigmoid", "sigmoid_cosine"]


def constant(i: float, n: float) -> float:
    """1 everywhere."""
    return 1.0


def linear(i: float, n: float) -> float:
    """1 - i/n."""
    return 1.0 - _progress(i, n)


def cosine(i: float, n: float) -> float:
    """(1 + cos(pi i/n)) / 2 (AutoSparse, eq. 2)."""
    return 0.5 * (1.0 + math.cos(math.pi * _progress(i, n)))


def sigmoid(i: float, n: float) -> float:
    """1 - sigma(-6 + 12 i/n) (AutoSparse, eq. 3 with L_min = -6, L_max = 6); 0.9975 at 0, 0.0025 at n."""
    return 1.0 - 1.0 / (1.0 + math.exp(6.0 - 12.0 * _progress(i, n)))


def sigmoid_cosine(i: float, n: float) -> float:
    """max(sigmoid, cosine) (AutoSparse, eq. 4): the paper's choice for vision. Ends at 0.0025, not 0."""
    return max(sigmoid(i, n), cosine(i, n))


def exponential(i: float, n: float, beta: float = 1.0) -> float:
    """exp(-beta i) (AutoSparse, eq. 9): `i` in epochs; `n` is not used. The paper's choice for translation."""
    return math.exp(-beta * i)


def cubic(i: float, n: float, initial: float = 0.0, final: float = 1.0) -> float:
    """final + (initial - final)(1 - i/n)^3, clamped to the span (Zhu & Gupta, arXiv:1710.01878, eq. 1)."""
    return final + (initial - final) * (1.0 - _progress(i, n)) ** 3


def _progress(i: float, n: float) -> float:
    """i/n in [0, 1]; a span of no length is over."""
    return 1.0 if n <= 0 else min(max(i / n, 0.0), 1.0)


SCHEDULES: dict[str, Callable[[float, float], float]] = {
    "constant": constant,
    "linear": linear,
    "cosine": cosine,
    "sigmoid": sigmoid,
    "sigmoid_cosine": sigmoid_cosine,
    "exponential": exponential,
}
