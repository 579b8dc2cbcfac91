"""The effective weight and its gradient in plain PyTorch: the definition that every kernel is held to.

    "soft":          S(W) = sign(W) relu(|W| - T), T = sigmoid(s)    kept: not |W| <= T
    "hard", "step":  S(W) = W where kept, 0 elsewhere                kept: not |W| <= t
    "mask":          S(W) = W where mask, 0 elsewhere

    dW = m g         g = dL/dS(W)
    "soft", "hard", "mask":  m = 1 on kept; alpha on pruned; 0 on pruned outside grad_mask, and where W = 0 (soft)
    "soft":                  ds = -sigmoid'(s) sum(sign(W) m g)
    "step":                  m = 1[kept] + |W| H(|W| - t),  dt = -sum(W H(|W| - t) g)
                             H(q) = 2 - 4|q| up to |q| = 0.4, then 0.4 up to |q| = 1, then 0
    "hard":                  no gradient for the cut-off

Sums run over the weights that share a threshold.

STR is soft with alpha = 0 (arXiv:2002.03231). AutoSparse is soft with 0 < alpha (arXiv:2304.06941, eq. 7 and 8: the sum
in ds runs over pruned weights too while alpha > 0). DST is step with a threshold per row (arXiv:2005.06870, eq. 4 and
6). Top-KAST is mask with grad_mask = B and alpha = 1; the paper's B contains A, the mask, so a kept position counts as
inside B whether or not grad_mask says so.
"""
# N: rows of the weight (output features)
# K: columns of the weight (input features)

from __future__ import annotations

import torch
from torch import Tensor

from .._eager import as_dtype
from .._operands import compute_dtype
from .view import View

__all__ = ["effective_weight_reference", "sum_shared", "threshold_backward_reference"]


def effective_weight_reference(weight: Tensor, view: View, dtype: torch.dtype) -> Tensor:
    """S(W) `[N, K]` in `dtype`, contiguous; computes in float64 for float64 weights, else in float32."""
    w = as_dtype(weight, compute_dtype(weight))
    if view.kind != "soft":
        return as_dtype(torch.where(_kept(w, view), w, 0.0), dtype).contiguous()
    assert view.threshold is not None  # check_view
    t = _cutoff(w, view.threshold, soft=True)
    # sign(W) relu(|W| - T) in two vectorised passes; + 0 for -0.
    return as_dtype((w - w.clamp(-t, t)).add_(0.0), dtype).contiguous()


def _kept(w: Tensor, view: View) -> Tensor:
    """Which weights a view of another kind than "soft" keeps: bool `[N, K]`."""
    if view.threshold is None:
        assert view.mask is not None  # check_view
        return view.mask
    # "not <=" rather than ">": a NaN weight is kept, so it reaches the loss instead of vanishing.
    return ~(w.abs() <= _cutoff(w, view.threshold, soft=False))


def _cutoff(w: Tensor, threshold: Tensor, *, soft: bool) -> Tensor:
    """The cut-off on |W|, in the dtype of w: `[1]`, `[N, 1]`, or `[N, K]` of a threshold per block."""
    t = as_dtype(threshold, w.dtype)
    return _spread(t.sigmoid() if soft else t, w)


def _spread(t: Tensor, w: Tensor) -> Tensor:
    if t.dim() == 1:
        return t if t.shape[0] == 1 else t[:, None]
    (n, k), (rows, columns) = w.shape, t.shape
    return t.repeat_interleave(n // rows, 0).repeat_interleave(k // columns, 1)


def threshold_backward_reference(grad: Tensor, weight: Tensor, view: View) -> tuple[Tensor, Tensor | None]:
    """dW in the weight's dtype, contiguous, and the threshold's gradient: None without one, zeros for kind "hard"."""
    kind, threshold, mask, grad_mask, alpha = view
    dtype = compute_dtype(weight)
    w, g = as_dtype(weight, dtype), as_dtype(grad, dtype)
    # One zero for all choices: a Python number becomes a tensor at every use.
    zero = w.new_zeros(())
    if kind == "step":
        assert threshold is not None  # check_view
        return _step(g, w, weight.dtype, threshold, zero)

    s = p = zero
    if threshold is None:
        assert mask is not None  # check_view
        kept = mask
    else:
        s = as_dtype(threshold, dtype)
        p = s.sigmoid() if kind == "soft" else s
        kept = ~(w.abs() <= _spread(p, w))
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


def _step(g: Tensor, w: Tensor, dtype: torch.dtype, threshold: Tensor, zero: Tensor) -> tuple[Tensor, Tensor]:
    """DST's estimator."""
    magnitude, t = w.abs(), _cutoff(w, threshold, soft=False)
    tail = _long_tail(magnitude - t)
    reach = torch.where(tail == zero, zero, w * tail)
    multiplier = ~(magnitude <= t) + reach.abs()
    grad_w = torch.where(multiplier != zero, multiplier * g, zero)
    total = sum_shared(torch.where(reach == zero, zero, reach * g), threshold)
    return as_dtype(grad_w, dtype).contiguous(), as_dtype(-total, threshold.dtype)


def _long_tail(q: Tensor) -> Tensor:
    """DST's estimate of the derivative of the unit step at q: 2 - 4|q|, 0.4, 0."""
    q = q.abs()
    return torch.where(q <= 0.4, 2.0 - 4.0 * q, torch.where(q <= 1.0, 0.4, 0.0))


def sum_shared(terms: Tensor, threshold: Tensor) -> Tensor:
    """Sum of terms `[N, K]` over the weights that share an element of `threshold`; its shape."""
    if threshold.dim() == 1:
        return terms.sum_to_size(threshold.shape[0], 1).view(-1)
    (n, k), (rows, columns) = terms.shape, threshold.shape
    return terms.reshape(rows, n // rows, columns, k // columns).sum(dim=(1, 3))
