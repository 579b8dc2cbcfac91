"""The effective weight and its gradient on one tile, in Triton: written once, called by every kernel that reads W.

    kept          not |W| <= T                                 T = sigmoid(s) ("soft"), or the cut-off t itself
    effective     W - sign(W) T ("soft"), or W; 0 where pruned
    multiplier    1 on kept; alpha on pruned; 0 on pruned outside B, and where W = 0 ("soft")
                  "step": 1[kept] + |W| H(|W| - t)
    terms         of the threshold's gradient, summed over the weights that share it

`weight/reference.py` defines the same in PyTorch and says whose methods these are.
"""

from __future__ import annotations

from ._triton import tl, triton

__all__ = [
    "effective_tile",
    "is_kept",
    "masked_gradient",
    "multiplier_tile",
    "sigmoid",
    "step_multiplier",
    "step_reach",
    "step_terms",
    "times_sign",
    "times_slope",
]


@triton.jit
def sigmoid(x):  # type: ignore[no-untyped-def]
    # Rounded division: tl.sigmoid divides approximately, and 1/(1 + exp(inf)) has to be exactly 0.
    return tl.div_rn(1.0, 1.0 + tl.exp(-x))


@triton.jit
def is_kept(w, t):  # type: ignore[no-untyped-def]
    # "not <=" rather than ">": a NaN weight is kept, so it reaches the loss instead of vanishing.
    return ~(tl.abs(w) <= t)


@triton.jit
def effective_tile(w, kept, t, SOFT: tl.constexpr):  # type: ignore[no-untyped-def]
    """S(W) in float32; t is read for SOFT only."""
    if SOFT:
        w = tl.where(w > 0, w - t, w + t)
    return tl.where(kept, w, 0.0)


@triton.jit
def multiplier_tile(w, kept, in_b, on_pruned, SOFT: tl.constexpr):  # type: ignore[no-untyped-def]
    """The gradient's multiplier; w is read for SOFT only, `in_b` may be None = everywhere."""
    if SOFT:
        on_pruned = tl.where(w != 0, on_pruned, 0.0)
    if in_b is not None:
        on_pruned = tl.where(in_b, on_pruned, 0.0)
    return tl.where(kept, 1.0, on_pruned)


@triton.jit
def step_reach(w, t):  # type: ignore[no-untyped-def]
    """W H(|W| - t), with DST's estimate H of the derivative of the unit step: 2 - 4|q|, then 0.4, then 0."""
    q = tl.abs(tl.abs(w) - t)
    tail = tl.where(q <= 0.4, 2.0 - 4.0 * q, tl.where(q <= 1.0, 0.4, 0.0))
    return tl.where(tail == 0, 0.0, w * tail)


@triton.jit
def step_multiplier(kept, reach):  # type: ignore[no-untyped-def]
    return tl.where(kept, 1.0, 0.0) + tl.abs(reach)


@triton.jit
def step_terms(reach, g):  # type: ignore[no-untyped-def]
    """What each weight adds to the gradient of its cut-off; 0 out of reach, whatever g."""
    return tl.where(reach == 0, 0.0, -reach * g)


@triton.jit
def masked_gradient(multiplier, g):  # type: ignore[no-untyped-def]
    # A choice, not a product: where no gradient is due, a NaN in g must not leave one behind.
    return tl.where(multiplier == 0, 0.0, multiplier * g)


@triton.jit
def times_sign(w, g):  # type: ignore[no-untyped-def]
    # Like torch's, the sign of NaN is 0.
    return tl.where(w > 0, g, tl.where(w < 0, -g, 0.0))


@triton.jit
def times_slope(s, total):  # type: ignore[no-untyped-def]
    """ds = -sigmoid'(s) total; 0 where the slope is, whatever the total."""
    slope = sigmoid(s) * sigmoid(-s)
    return tl.where(slope == 0, 0.0, -slope * total)
