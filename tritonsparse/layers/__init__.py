"""The sparse layers: re-classed stock modules that hold a view, and the modules of packed blocks."""

from .base import SparseLayer
from .conv2d import SparseConv2d
from .linear import SparseConv1D, SparseLinear

__all__ = ["SparseConv1D", "SparseConv2d", "SparseLayer", "SparseLinear"]
