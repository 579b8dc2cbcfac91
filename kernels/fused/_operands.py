"""What the fused products demand of their operands beyond what `_operands.py` says of a view's.

Shared by `gemm.py` and `grad.py`; every check raises ValueError before anything is computed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._operands import FLOATS, check_operands, check_triton_dtype, expect
from .bits import is_packed

__all__ = ["check_rows", "check_view"]


def check_view(
    function: str, weight: Tensor, threshold: Tensor | None, masks: dict[str, Tensor | None], kind: str, backend: str
) -> None:
    """Refuse a view that does not fit its weight, a mask in bits included, or whose threshold is per block."""
    bools = dict(masks)
    for name, mask in masks.items():
        if mask is not None and is_packed(mask) and weight.dim() == 2:
            words = -(-weight.shape[1] // 32)
            expect(
                mask.shape == (weight.shape[0], words) and mask.device == weight.device,
                function,
                f"packed {name} to be int32 [{weight.shape[0]}, {words}] on {weight.device}",
                mask,
                "pack the mask of this weight with pack_bits",
            )
            # Stands in for the bools it encodes, at one byte of memory.
            bools[name] = mask.new_zeros((), dtype=torch.bool).expand(weight.shape)
    check_operands(function, weight, threshold, bools, kind, backend)
    if threshold is not None and threshold.dim() != 1:
        raise ValueError(
            f"{function}: expected threshold of shape [1] or [{weight.shape[0]}], got {list(threshold.shape)}; "
            f"give the view of threshold_cast to the vendor's product"
        )


def check_rows(function: str, name: str, rows: Tensor, features: int, weight: Tensor, backend: str) -> None:
    """Refuse what is no matrix `[M, features]` beside the weight."""
    expect(
        rows.dim() == 2 and rows.shape[1] == features and rows.dtype in FLOATS and rows.device == weight.device,
        function,
        f"{name} to be a floating-point matrix [M, {features}] on {weight.device}",
        rows,
        "flatten the leading axes, and pass the rows that this weight (and `transposed`) multiplies",
    )
    check_triton_dtype(function, name, rows.dtype, backend)
