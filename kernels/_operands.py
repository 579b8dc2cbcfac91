"""What the view's kernels demand of their operands, said in one sentence each.

Shared by `weight/forward.py` and `fused/linear.py`; every check raises ValueError before anything is computed.
"""

from __future__ import annotations

from typing import NoReturn

import torch

__all__ = [
    "FLOATS",
    "KINDS",
    "check_alpha",
    "check_estimator",
    "check_input",
    "check_kind",
    "check_operands",
    "check_triton_dtype",
    "check_w_hat",
    "compute_dtype",
    "expect",
    "refuse",
]

TRITON_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
FLOATS = (*TRITON_DTYPES, torch.float64)
KINDS = ("soft", "hard", "step", "mask")


def compute_dtype(weight: torch.Tensor) -> torch.dtype:
    """float64 for a float64 weight, else float32."""
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


def check_kind(function: str, kind: str, threshold: torch.Tensor | None, mask: torch.Tensor | None) -> None:
    """Refuse a kind that is unknown, or not given exactly what it reads."""
    if (threshold is None) != (kind == "mask") or (mask is None) == (kind == "mask") or kind not in KINDS:
        given = [name for name, t in (("threshold", threshold), ("mask", mask)) if t is not None]
        raise ValueError(
            f'{function}: expected kind "soft", "hard" or "step" with a threshold, or kind "mask" with a mask, '
            f"got kind {kind!r} with {' and '.join(given) or 'neither'}; pass only what the kind reads"
        )


def check_estimator(function: str, kind: str, grad_mask: torch.Tensor | None, alpha: torch.Tensor | None) -> None:
    """Refuse what kind "step" does not read: its multiplier is the estimator's."""
    if kind == "step" and not (grad_mask is None and alpha is None):
        given = [name for name, t in (("grad_mask", grad_mask), ("alpha", alpha)) if t is not None]
        raise ValueError(
            f'{function}: expected neither grad_mask nor alpha with kind "step", got {" and ".join(given)}; '
            f'leave them out, or use kind "hard"'
        )


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


def check_w_hat(function: str, w_hat: torch.Tensor | None, weight: torch.Tensor, dtype: torch.dtype) -> None:
    """Refuse a view that the caller keeps unless it is of the weight's shape and device, in `dtype`."""
    if w_hat is not None and not (
        w_hat.shape == weight.shape and w_hat.dtype == dtype and w_hat.device == weight.device
    ):
        refuse(
            function,
            f"w_hat to be {dtype} {list(weight.shape)} on {weight.device}",
            w_hat,
            "leave it out, and the op builds it",
        )


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
    shape, dtype, device = weight.shape, weight.dtype, weight.device
    if len(shape) != 2 or dtype not in FLOATS:
        refuse(
            function,
            "weight to be a floating-point matrix [N, K]",
            weight,
            "flatten a convolution's weight to [N, K] first",
        )
    check_triton_dtype(function, "weight", dtype, backend)
    if threshold is not None and not (
        _divides(threshold.shape, shape)
        and (threshold.dtype == torch.float32 or threshold.dtype == compute_dtype(weight))
        and threshold.device == device
    ):
        n, k = shape
        refuse(
            function,
            f"threshold to be float32 [1], [{n}], or [R, C] that divide [{n}, {k}], on {device}",
            threshold,
            "keep one float32 value for the matrix, one per row or one per block, beside the weight",
        )
    for name, mask in masks.items():
        if mask is not None and not (mask.shape == shape and mask.dtype == torch.bool and mask.device == device):
            refuse(
                function,
                f"{name} to be bool {list(shape)} on {device}",
                mask,
                "make it of the weight's shape, True where kept",
            )


def _divides(parts: torch.Size, shape: torch.Size) -> bool:
    """Whether a threshold of shape `parts` is one for the matrix, one a row, or one a block of equal blocks."""
    if len(parts) == 1:
        return parts[0] == 1 or parts[0] == shape[0]
    return len(parts) == 2 and all(part > 0 and size % part == 0 for size, part in zip(shape, parts, strict=True))


def check_alpha(function: str, alpha: torch.Tensor | None, weight: torch.Tensor) -> None:
    """Refuse a multiplier that is not one value beside the weight."""
    if alpha is not None and not (
        alpha.numel() == 1
        and alpha.dim() < 2
        and (alpha.dtype == torch.float32 or alpha.dtype == compute_dtype(weight))
        and alpha.device == weight.device
    ):
        refuse(
            function,
            f"alpha to be one float32 value on {weight.device}",
            alpha,
            "keep the schedule's value in a float32 tensor beside the weight",
        )


def check_triton_dtype(function: str, name: str, dtype: torch.dtype, backend: str) -> None:
    """Refuse a dtype that the Triton kernels do not compute in."""
    if backend == "triton" and dtype not in TRITON_DTYPES:
        raise ValueError(
            f'{function}: expected {name} in float16, bfloat16 or float32 for backend="triton", '
            f'got {dtype}; pass backend="torch", which takes it'
        )
