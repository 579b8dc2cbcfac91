"""What every table of cases needs: combinations of values, matrices behind other strides, and errors."""

from collections.abc import Sequence
from dataclasses import fields
from itertools import combinations
from typing import Any

import torch
from torch import Tensor


class Readable:
    """A dataclass whose string, the id of a test, says what is not as usual."""

    def __str__(self) -> str:
        values = ((each.name, getattr(self, each.name), each.default) for each in fields(self))  # type: ignore[arg-type]
        return ", ".join(f"{name} {value}" for name, value, usual in values if value != usual)


def pairwise(**axes: Sequence[Any]) -> list[dict[str, Any]]:
    """Few combinations, in which each two values of two axes meet at least once."""
    names = list(axes)
    missing = {
        frozenset(((left, a), (right, b)))
        for left, right in combinations(names, 2)
        for a in range(len(axes[left]))
        for b in range(len(axes[right]))
    }
    found = []
    while missing:
        # The smallest missing pair is fixed, then each other axis takes the value that meets the most missing pairs.
        chosen = dict(min(missing, key=sorted))
        for name in names:
            if name not in chosen:
                pairs = [[frozenset(((name, i), other)) for other in chosen.items()] for i in range(len(axes[name]))]
                counts = [sum(pair in missing for pair in each) for each in pairs]
                order = sorted(range(len(counts)), key=lambda i: (-counts[i], (i - len(found)) % len(counts)))
                chosen[name] = order[0]
        missing -= {frozenset(pair) for pair in combinations(chosen.items(), 2)}
        found.append({name: axes[name][chosen[name]] for name in names})
    return found


def laid_out(matrix: Tensor, layout: str) -> Tensor:
    """The same values behind other strides."""
    if layout == "transposed":
        return matrix.T.contiguous().T
    if layout == "strided":
        wide = matrix.new_zeros(matrix.shape[0] + 1, 2 * matrix.shape[1])
        wide[1:, ::2] = matrix
        return wide[1:, ::2]
    return matrix


def error(actual: Tensor, exact: Tensor) -> float:
    """Relative RMS, ||actual - exact|| / ||exact||; NaN where either has a NaN."""
    scale = exact.double().norm().item()
    return (actual.double() - exact.double()).norm().item() / (scale or 1.0)


def same(actual: Tensor, expected: Tensor) -> bool:
    """Equal bit for bit, NaN to NaN."""
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        return False
    bits = {8: torch.int64, 4: torch.int32, 2: torch.int16}[actual.itemsize]
    left, right = ((t.isnan(), t.masked_fill(t.isnan(), 0.0).view(bits)) for t in (actual, expected))
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))
