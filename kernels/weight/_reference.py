"""The definition of a view's gradient in plain PyTorch; `backward.py` has the equations and the kernel."""
# N: rows of the weight (output features)
# K: columns of the weight (input features)

from __future__ import annotations

import torch

from .._eager import as_dtype
from .._operands import check_kind, compute_dtype
from .forward import cutoff, spread

__all__ = ["gradients_reference", "sum_shared", "threshold_backward_reference"]


def threshold_backward_reference(
    grad: torch.Tensor,
    weight: torch.Tensor,
    threshold: torch.Tensor | None,
    mask: torch.Tensor | None,
    grad_mask: torch.Tensor | None,
    alpha: torch.Tensor | None,
    kind: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition of `threshold_backward`; computes in the dtype `view_reference` does."""
    check_kind("threshold_backward_reference", kind, threshold, mask)
    grad_weight, grad_threshold = gradients_reference(grad, weight, threshold, mask, grad_mask, alpha, kind)
    if grad_threshold is None:
        return grad_weight, weight.new_zeros(0, dtype=torch.float32)
    return grad_weight, grad_threshold


def gradients_reference(
    grad: torch.Tensor,
    weight: torch.Tensor,
    threshold: torch.Tensor | None,
    mask: torch.Tensor | None,
    grad_mask: torch.Tensor | None,
    alpha: torch.Tensor | None,
    kind: str,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`threshold_backward_reference` for callers that have checked the operands; None where there is no threshold."""
    dtype = compute_dtype(weight)
    w, g = as_dtype(weight, dtype), as_dtype(grad, dtype)
    # One zero for all choices: a Python number becomes a tensor at every use.
    zero = w.new_zeros(())
    if kind == "step":
        assert threshold is not None  # check_kind
        return _step(g, w, weight.dtype, threshold, zero)

    s = p = zero
    if threshold is None:
        assert mask is not None  # check_kind
        kept = mask
    else:
        s = as_dtype(threshold, dtype)
        p = s.sigmoid() if kind == "soft" else s
        kept = ~(w.abs() <= spread(p, w))
    product, due = g, kept
    if alpha is not None:
        product = torch.where(kept, g, alpha * g)
        pruned_due = (w != zero) & (alpha != zero) if kind == "soft" else (alpha != zero).expand_as(w)
        due = kept | (pruned_due if grad_mask is None else pruned_due & grad_mask)
    # A choice, not a product: where no gradient is due, a NaN in g must not leave one behind.
    grad_w = torch.where(due, product, zero)
    grad_weight = as_dtype(grad_w, weight.dtype).contiguous()
    if threshold is None:
        return grad_weight, None
    if kind == "hard":
        return grad_weight, torch.zeros_like(threshold)

    slope = p * (-s).sigmoid()
    total = sum_shared(w.sign() * grad_w, threshold)
    return grad_weight, as_dtype(torch.where(slope == zero, zero, -slope * total), threshold.dtype)


def _step(
    g: torch.Tensor, w: torch.Tensor, dtype: torch.dtype, threshold: torch.Tensor, zero: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """DST's estimator."""
    magnitude, t = w.abs(), cutoff(w, threshold, "step")
    tail = long_tail(magnitude - t)
    reach = torch.where(tail == zero, zero, w * tail)
    multiplier = ~(magnitude <= t) + reach.abs()
    grad_w = torch.where(multiplier != zero, multiplier * g, zero)
    total = sum_shared(torch.where(reach == zero, zero, reach * g), threshold)
    return as_dtype(grad_w, dtype).contiguous(), as_dtype(-total, threshold.dtype)


def long_tail(q: torch.Tensor) -> torch.Tensor:
    """DST's estimate of the derivative of the unit step at q: 2 − 4|q|, 0.4, 0."""
    q = q.abs()
    return torch.where(q <= 0.4, 2.0 - 4.0 * q, torch.where(q <= 1.0, 0.4, 0.0))


def sum_shared(terms: torch.Tensor, threshold: torch.Tensor) -> torch.Tensor:
    """Sum of terms `[N, K]` over the weights that share an element of `threshold`; its shape."""
    if threshold.dim() == 1:
        return terms.sum_to_size(threshold.shape[0], 1).view(-1)
    (n, k), (rows, columns) = terms.shape, threshold.shape
    return terms.reshape(rows, n // rows, columns, k // columns).sum(dim=(1, 3))
