"""What the view's kernels demand of their operands, said in one sentence each.

Shared by `threshold.py` and `masked_matmul.py`; every check raises ValueError before anything is computed.
"""

from __future__ import annotations

import torch

__all__ = ["FLOATS", "check_kind", "check_operands", "check_triton_dtype", "compute_dtype", "expect"]

TRITON_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
FLOATS = (*TRITON_DTYPES, torch.float64)


def compute_dtype(weight: torch.Tensor) -> torch.dtype:
    """float64 for a float64 weight, else float32."""
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


def check_kind(function: str, kind: str, threshold: torch.Tensor | None, mask: torch.Tensor | None) -> None:
    """Refuse a kind that is unknown, or not given exactly what it reads."""
    given = [name for name, t in (("threshold", threshold), ("mask", mask)) if t is not None]
    if given != {"soft": ["threshold"], "mask": ["mask"]}.get(kind):
        raise ValueError(
            f'{function}: expected kind "soft" with a threshold or kind "mask" with a mask, '
            f"got kind {kind!r} with {' and '.join(given) or 'neither'}; pass only what the kind reads"
        )


def expect(holds: bool, function: str, expected: str, tensor: torch.Tensor, remedy: str) -> None:
    """Refuse `tensor` unless `holds`, saying what it is."""
    if not holds:
        dtype = str(tensor.dtype).removeprefix("torch.")
        got = f"{dtype} {list(tensor.shape)} on {tensor.device}"
        raise ValueError(f"{function}: expected {expected}, got {got}; {remedy}")


def check_operands(
    function: str,
    weight: torch.Tensor,
    threshold: torch.Tensor | None,
    masks: dict[str, torch.Tensor | None],
    kind: str,
    backend: str,
) -> None:
    """Refuse a weight, threshold or mask that does not fit the others, the kind or the back end."""
    check_kind(function, kind, threshold, masks["mask"])
    if backend not in ("torch", "triton"):
        raise ValueError(f'{function}: expected backend "torch" or "triton", got {backend!r}; pass either')
    expect(
        weight.dim() == 2 and weight.dtype in FLOATS,
        function,
        "weight to be a floating-point matrix [N, K]",
        weight,
        "flatten a convolution's weight to [N, K] first",
    )
    check_triton_dtype(function, "weight", weight.dtype, backend)
    if threshold is not None:
        expect(
            threshold.shape in ((1,), weight.shape[:1])
            and threshold.dtype in (torch.float32, compute_dtype(weight))
            and threshold.device == weight.device,
            function,
            f"threshold to be float32 [1] or [{weight.shape[0]}] on {weight.device}",
            threshold,
            "keep one float32 logit for the matrix or one per row, beside the weight",
        )
    for name, mask in masks.items():
        if mask is not None:
            expect(
                mask.shape == weight.shape and mask.dtype == torch.bool and mask.device == weight.device,
                function,
                f"{name} to be bool {list(weight.shape)} on {weight.device}",
                mask,
                "make it of the weight's shape, True where kept",
            )


def check_triton_dtype(function: str, name: str, dtype: torch.dtype, backend: str) -> None:
    """Refuse a dtype that the Triton kernels do not compute in."""
    if backend == "triton" and dtype not in TRITON_DTYPES:
        raise ValueError(
            f'{function}: expected {name} in float16, bfloat16 or float32 for backend="triton", '
            f'got {dtype}; pass backend="torch", which takes it'
        )
