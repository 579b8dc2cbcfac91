"""Dense: every layer runs its stock forward. The baseline through the same code path.

Differs from the paper in: there is no paper.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..pattern import NM, Block, Channel, Unstructured
from .base import Method

__all__ = ["Dense"]


@dataclass(kw_only=True)
class Dense(Method):
    """No sparsity: bit-identical to the untouched model."""

    name: ClassVar[str] = "dense"
    patterns: ClassVar[tuple[type, ...]] = (Unstructured, Block, NM, Channel)
