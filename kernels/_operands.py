"""What the kernels demand of their operands, said in one sentence each; of a view, see `weight/view.py`.

Every check raises ValueError before anything is computed.
"""

from __future__ import annotations

from typing import NoReturn

import torch

__all__ = [
    "FLOATS",
    "check_input",
    "check_out_dtype",
    "check_triton_dtype",
    "compute_dtype",
    "expect",
    "refuse",
]

TRITON_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
FLOATS = (*TRITON_DTYPES, torch.float64)


def compute_dtype(weight: torch.Tensor) -> torch.dtype:
    """float64 for a float64 weight, else float32."""
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


def expect(holds: bool, function: str, expected: str, tensor: torch.Tensor, remedy: str) -> None:
    """Refuse `tensor` unless `holds`, saying what it is."""
    if not holds:
        refuse(function, expected, tensor, remedy)


def refuse(function: str, expected: str, tensor: torch.Tensor, remedy: str) -> NoReturn:
    """Refuse `tensor`, saying what it is. Checks of every forward call it where they fail: sentences cost time."""
    dtype = str(tensor.dtype).removeprefix("torch.")
    got = f"{dtype} {list(tensor.shape)} on {tensor.device}"
    raise ValueError(f"{function}: expected {expected}, got {got}; {remedy}")


def check_input(function: str, x: torch.Tensor, k: int, out_dtype: torch.dtype) -> None:
    """Refuse a layer's input that is not `[..., k]` in the dtype of the product."""
    shape = x.shape
    if not shape or shape[-1] != k:
        raise ValueError(
            f"{function}: expected x of shape [..., {k}] (the weight's input features), got {list(shape)}; check "
            f"the layer's input"
        )
    if x.dtype != out_dtype:
        raise ValueError(
            f"{function}: expected x in {out_dtype} (the weight's dtype outside autocast), got {x.dtype}; cast x or "
            f"run under torch.autocast"
        )


def check_out_dtype(function: str, name: str, dtype: torch.dtype, backend: str) -> None:
    """Refuse a dtype of the result that is not floating point, or that the Triton kernels do not write."""
    if dtype not in FLOATS:
        raise ValueError(
            f"{function}: expected a floating-point {name}, got {dtype}; leave it out for that of the operands"
        )
    check_triton_dtype(function, name, dtype, backend)


def check_triton_dtype(function: str, name: str, dtype: torch.dtype, backend: str) -> None:
    """Refuse a dtype that the Triton kernels do not compute in."""
    if backend == "triton" and dtype not in TRITON_DTYPES:
        raise ValueError(
            f'{function}: expected {name} in float16, bfloat16 or float32 for backend="triton", '
            f'got {dtype}; pass backend="torch", which takes it'
        )
