"""Which stock module becomes which sparse layer; a module is taken by its exact type."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from .conv2d import SparseConv2d
from .linear import SparseConv1D, SparseLinear

__all__ = ["SPARSE_CLASSES"]

SPARSE_CLASSES: dict[type[nn.Module], type[Any]] = {
    nn.Linear: SparseLinear,
    Conv1D: SparseConv1D,
    nn.Conv2d: SparseConv2d,
}
