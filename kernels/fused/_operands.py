"""What the fused products demand of their operands beyond what `weight/view.py` says of a view.

Shared by `gemm.py`, `grad.py` and `linear.py`; every check raises ValueError before anything is computed.
"""

from __future__ import annotations

from torch import Tensor

from .._operands import FLOATS, check_triton_dtype, expect
from ..weight.view import View, check_view

__all__ = ["check_fused", "check_rows"]


def check_fused(function: str, weight: Tensor, view: View, backend: str) -> None:
    """Refuse a view that does not fit its weight, or whose threshold is per block."""
    check_view(function, weight, view, backend)
    if view.threshold is not None and view.per_block:
        raise ValueError(
            f"{function}: expected threshold of shape [1] or [{weight.shape[0]}], got {list(view.threshold.shape)}; "
            f"multiply by effective_weight, which takes any"
        )


def check_rows(function: str, name: str, rows: Tensor, features: int, weight: Tensor, backend: str) -> None:
    """Refuse what is no matrix `[M, features]` on the weight's device."""
    expect(
        rows.dim() == 2 and rows.shape[1] == features and rows.dtype in FLOATS and rows.device == weight.device,
        function,
        f"{name} to be a floating-point matrix [M, {features}] on {weight.device}",
        rows,
        "flatten the leading axes, and pass the rows that this weight (and `transposed`) multiplies",
    )
    check_triton_dtype(function, name, rows.dtype, backend)
