"""A view: what a method says of a dense weight W, and what the kernels demand of it.

    kind         forward                                    gradient multiplier m, dW = m * dL/dS(W)
    "soft"       S(W) = sign(W) relu(|W| - sigmoid(s))      1 kept, alpha pruned, 0 outside B and where W = 0
    "hard"       S(W) = W where |W| > t                     1 kept, alpha pruned, 0 outside B
    "step"       S(W) = W where |W| > t                     1[kept] + |W| H(|W| - t), DST's estimate
    "mask"       S(W) = W where the mask is True            1 kept, alpha pruned, 0 outside B

S(W) is the *effective weight*, Ŵ, `w_hat` in code. Masks have the shape of the stored weight [N, K]; a threshold is one
for the matrix, one a row or one a block. `reference.py` says whose methods these are.
"""
# N: rows of the weight (output features)
# K: columns of the weight (input features)

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .._operands import FLOATS, check_triton_dtype, compute_dtype, refuse

__all__ = ["KINDS", "View", "check_view"]

KINDS = ("soft", "hard", "step", "mask")


class View(NamedTuple):
    """How a weight `[N, K]` is seen by the forward and by its gradient.

    Attributes:
        kind: "soft", "hard", "step" or "mask".
        threshold: `[1]`, `[N]` or `[R, C]` (R divides N, C divides K), float32 (float64 also where the weight is): the
            logits s for kind "soft", the cut-offs t for "hard" and "step"; None for "mask".
        mask: bool `[N, K]`, True = kept; for kind "mask" alone.
        grad_mask: bool `[N, K]`: the set B outside which pruned weights get no gradient; None = everywhere. Kept
            weights always get theirs.
        alpha: one float32 value on the device: the multiplier on pruned weights; None = 0.
    """

    kind: str
    threshold: Tensor | None = None
    mask: Tensor | None = None
    grad_mask: Tensor | None = None
    alpha: Tensor | None = None

    @property
    def per_block(self) -> bool:
        """Whether there is a threshold for each block of weights, or each column."""
        return self.threshold is not None and self.threshold.dim() == 2


def check_view(function: str, weight: Tensor, view: View, backend: str) -> None:
    """Refuse a view that does not fit its kind, its weight `[N, K]` or the back end ("torch" or "triton").

    Raises:
        ValueError: says what was expected, what it got and what to do; nothing has been computed.
    """
    kind, threshold, mask, grad_mask, alpha = view
    if (threshold is None) != (kind == "mask") or (mask is None) == (kind == "mask") or kind not in KINDS:
        given = [name for name, t in (("threshold", threshold), ("mask", mask)) if t is not None]
        raise ValueError(
            f'{function}: expected kind "soft", "hard" or "step" with a threshold, or kind "mask" with a mask, '
            f"got kind {kind!r} with {' and '.join(given) or 'neither'}; pass only what the kind reads"
        )
    if kind == "step" and not (grad_mask is None and alpha is None):
        given = [name for name, t in (("grad_mask", grad_mask), ("alpha", alpha)) if t is not None]
        raise ValueError(
            f'{function}: expected neither grad_mask nor alpha with kind "step", got {" and ".join(given)}; '
            f'leave them out, or use kind "hard"'
        )
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
    for name, tensor in (("mask", mask), ("grad_mask", grad_mask)):
        if tensor is not None and not (
            tensor.shape == shape and tensor.dtype == torch.bool and tensor.device == device
        ):
            refuse(
                function,
                f"{name} to be bool {list(shape)} on {device}",
                tensor,
                "make it of the weight's shape, True where kept",
            )
    if alpha is not None and not (
        alpha.numel() == 1
        and alpha.dim() < 2
        and (alpha.dtype == torch.float32 or alpha.dtype == compute_dtype(weight))
        and alpha.device == device
    ):
        refuse(
            function,
            f"alpha to be one float32 value on {device}",
            alpha,
            "keep the schedule's value in a float32 tensor beside the weight",
        )


def _divides(parts: torch.Size, shape: torch.Size) -> bool:
    """Whether a threshold of shape `parts` is one for the matrix, one a row, or one a block of equal blocks."""
    if len(parts) == 1:
        return parts[0] == 1 or parts[0] == shape[0]
    return len(parts) == 2 and all(part > 0 and size % part == 0 for size, part in zip(shape, parts, strict=True))
