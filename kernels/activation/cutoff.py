"""The cut-off that keeps a given share of an activation's elements: its exact k-th largest magnitude.

    k = max(1, round-half-up(density n))      n: counted elements of the group
    T = k-th largest |x| among them             kept: not |x| < T   (`compress.py`)

A group is the whole tensor, one sample, or one row (SWAT, arXiv:2001.01969, keeps the k largest activations
of the mini-batch; its appendix compares the finer groups). Rows that `row_mask` leaves out, padding tokens,
are not counted: their zeros or garbage would move T. Called by `packing.py`.
"""
# M rows of x (tokens)   K columns (features)   G groups

from __future__ import annotations

import math
from decimal import Decimal
from math import inf
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._eager import as_dtype
from .._operands import compute_dtype
from ..select.topk import topk_cutoff

__all__ = ["SCOPES", "activation_cutoff", "check_density"]

SCOPES = ("batch", "sample", "plane")
# Densities are read to nine decimals, so that k is integer arithmetic on the device as on the host.
UNIT = 10**9


def check_density(function: str, density: float) -> None:
    """Refuse a density outside (0, 1].

    Raises:
        ValueError: it is not.
    """
    if isinstance(density, bool) or not isinstance(density, int | float) or not 1 / UNIT <= density <= 1:
        raise ValueError(
            f"{function}: expected a density in (0, 1], the fraction of elements kept, got {density!r}; "
            f"write 0.2 to keep 20 %"
        )


def _rank(density: float, n: Any) -> Any:
    """round-half-up(density n) of an integer or an int64 tensor `n`, exact below 4.6e9 elements."""
    billionths = int((Decimal(str(density)) * UNIT).to_integral_value())
    return (2 * billionths * n + UNIT) // (2 * UNIT)


def activation_cutoff(
    x: Tensor, density: float, scope: str = "batch", row_mask: Tensor | None = None, backend: str = "torch"
) -> Tensor:
    """The k-th largest magnitude of each group of `x`, k = max(1, round-half-up(density n)).

    A NaN counts as larger than everything, with the Triton back end as anything: what keeps the NaN is not T. A group
    without counted elements gets +inf, which keeps nothing finite. No host sync on a GPU. Operands are the caller's to
    check (`packing.py`).

    Args:
        x: `[..., K]`, floating point, any strides. A convolution's `[B, C, H, W]` comes as `[B, C, H W]`.
        density: in (0, 1], the fraction kept; read to nine decimals.
        scope: "batch" (one cut-off), "sample" (one for each leading index of x) or "plane" (one for each row:
            a token of a linear layer, a sample's channel of a convolution).
        row_mask: bool, the leading dimensions of x, True = counted; None = all.
        backend: "torch" (partial sorts on a CPU, sorts on a GPU) or "triton" (a GPU, or the interpreter), which
            selects without sorting where one cut-off is for all of x; a graph capture sorts.

    Returns:
        `[1]` for scope "batch", else `[M]`, one for each row of x flattened to `[M, K]`; float32, float64 for
        float64 x.

    Example:
        >>> import torch
        >>> from tritonsparse.kernels.activation.cutoff import activation_cutoff
        >>> activation_cutoff(torch.tensor([[3.0, -1.0], [2.0, -4.0]]), 0.5)
        tensor([3.])
    """
    n, rows = x.numel(), math.prod(x.shape[:-1])
    if n == 0:
        return x.new_full((1 if scope == "batch" else rows,), inf, dtype=compute_dtype(x))
    groups = {"batch": 1, "sample": x.shape[0] if x.dim() > 1 else 1, "plane": rows}[scope]
    if backend == "triton" and scope == "batch" and row_mask is None and not _capturing(x):
        key = topk_cutoff([x.detach()], max(1, _rank(density, n)), magnitude=True, check=False, backend="triton").key
        return key.to(torch.int32).view(torch.float32).reshape(1)
    magnitude = as_dtype(x.detach(), compute_dtype(x)).abs().reshape(groups, rows // groups, x.shape[-1])
    counted = None if row_mask is None else row_mask.reshape(groups, rows // groups)
    select = _selected if x.device.type == "cpu" else _sorted
    cutoff = select(magnitude, counted, density)
    return cutoff if scope == "batch" else cutoff.repeat_interleave(rows // groups, output_size=rows)


def _capturing(x: Tensor) -> bool:
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def _selected(magnitude: Tensor, counted: Tensor | None, density: float) -> Tensor:
    """Where the host may read counts. NumPy's partition, NaN last, takes 1.5 ms for 1M elements on one core of an AMD
    EPYC (Milan, 2026-11-21), `kthvalue` 54 ms."""
    groups, rows, k = magnitude.shape
    if counted is None or rows == 1:
        place = rows * k - max(1, _rank(density, rows * k))
        cutoff = torch.from_numpy(np.partition(magnitude.reshape(groups, rows * k).numpy(), place, axis=1)[:, place])
        return cutoff if counted is None else torch.where(counted[:, 0], cutoff, inf)
    chosen = [group[mask][None] for group, mask in zip(magnitude, counted, strict=True)]
    none = magnitude.new_full((1,), inf)
    return torch.cat([_selected(each, None, density) if each.numel() else none for each in chosen])


def _sorted(magnitude: Tensor, counted: Tensor | None, density: float) -> Tensor:
    """Where nothing may wait for the device."""
    groups, rows, k = magnitude.shape
    n = torch.full((groups,), rows * k, device=magnitude.device)
    if counted is not None:
        magnitude, n = torch.where(counted[:, :, None], magnitude, -1.0), counted.sum(1) * k
    ordered = magnitude.flatten(1).sort(dim=1, descending=True).values
    cutoff = ordered.gather(1, _rank(density, n).clamp(min=1)[:, None] - 1)[:, 0]
    return torch.where(n > 0, cutoff, inf)
