"""N:M masks: the n largest of every m scores along a row.

    groups g of m neighbours of scores[N, K]:   mask = the n largest of each, ties to the lowest index

A program holds whole groups, one row of a tile each, as integers that order like the scores and then by falling index,
so that no two are equal; it takes the largest of what is left n times over, or leaves out the smallest m - n times,
whichever is less. A score is read once and its bool written once.
"""

# N rows of scores, K columns   G groups, N K / m

from __future__ import annotations

import torch
from torch import Tensor

from .._eager import on_device_of
from .._operands import FLOATS, check_triton_dtype, expect
from .._triton import require, tl, triton
from ..weight.forward import strides

__all__ = ["MAX_M", "n_of_m_mask"]

# The longest group of the Triton kernel.
MAX_M = 64
# Scores of a tile: 16 a thread, as integers of 64 bits.
TILE = 2048
NUM_WARPS = 4


def n_of_m_reference(scores: Tensor, n: int, m: int, magnitude: bool) -> Tensor:
    """The definition of `n_of_m_mask`, of scores without NaN."""
    groups = (scores.abs() if magnitude else scores).reshape(-1, m)
    # A stable order gives ties to the lowest index.
    order = groups.argsort(dim=1, descending=True, stable=True)
    # Not "like" them: a copy of transposed scores has their strides.
    kept = groups.new_zeros(groups.shape, dtype=torch.bool).scatter_(1, order[:, :n], True)
    return kept.reshape(scores.shape)


@triton.jit
def _n_of_m_kernel(  # type: ignore[no-untyped-def]
    mask,
    nan_found,
    scores,
    G,
    groups_per_row,
    stride_sn,
    stride_sk,
    KEPT: tl.constexpr,
    LENGTH: tl.constexpr,
    MAGNITUDE: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    g = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    place = tl.arange(0, WIDTH)
    inside = (g < G)[:, None] & (place < LENGTH)[None, :]
    # [GROUPS, WIDTH]
    o_k = (g % groups_per_row * LENGTH)[:, None] + place[None, :]
    score = tl.load(scores + (g // groups_per_row * stride_sn)[:, None] + o_k * stride_sk, mask=inside, other=0.0)
    bits = score.to(tl.float32).to(tl.int32, bitcast=True)
    unsigned = bits & 0x7FFFFFFF
    tl.store(nan_found, 1, mask=tl.max(tl.max(unsigned, axis=1), axis=0) > 0x7F800000)
    # A negative number's bits grow with its magnitude; -0 ties with +0.
    order = unsigned if MAGNITUDE else tl.where(bits < 0, -unsigned, unsigned)
    # No two of a group are equal, and an earlier one is larger than a later one of the same score.
    key = order.to(tl.int64) * WIDTH + (WIDTH - 1 - place)[None, :]
    # Below or above every key: what is no score, or was taken already, is never taken.
    never: tl.constexpr = -(1 << 60) if 2 * KEPT <= LENGTH else 1 << 60
    left = tl.where(inside, key, never)
    if 2 * KEPT <= LENGTH:
        for _ in range(KEPT):
            left = tl.where(left == tl.max(left, axis=1)[:, None], never, left)
        kept = left == never
    else:
        for _ in range(LENGTH - KEPT):
            left = tl.where(left == tl.min(left, axis=1)[:, None], never, left)
        kept = left != never
    tl.store(mask + (g * LENGTH)[:, None] + place[None, :], kept, mask=inside)


def _launch(scores: Tensor, n: int, m: int, magnitude: bool) -> tuple[Tensor, Tensor]:
    mask = scores.new_empty(scores.shape, dtype=torch.bool)
    nan_found = scores.new_zeros(1, dtype=torch.int32)
    width = triton.next_power_of_2(m)
    groups = scores.numel() // m
    if groups:
        with on_device_of(scores):
            _n_of_m_kernel[(triton.cdiv(groups, TILE // width),)](
                mask, nan_found, scores, groups, scores.shape[1] // m, *strides(scores), KEPT=n, LENGTH=m,
                MAGNITUDE=magnitude, GROUPS=TILE // width, WIDTH=width, num_warps=NUM_WARPS,
            )  # fmt: skip
    return mask, nan_found


def n_of_m_mask(
    scores: Tensor, n: int, m: int, *, magnitude: bool = False, function: str = "n_of_m_mask", backend: str = "torch"
) -> Tensor:
    """The n largest of every m neighbours along a row.

    Waits for the host once, to refuse NaN, which has no place in an order.

    Args:
        scores: `[N, K]`, float16/bfloat16/float32 (float64 with the torch back end), any strides; K a multiple of m.
        n, m: kept of every m, 0 < n < m; m at most 64 with the Triton back end.
        magnitude: order by |scores|.
        function: name under which errors are raised, of whoever was called with the scores.
        backend: "torch" (the reference, any device) or "triton" (a GPU, or the interpreter).

    Returns:
        bool `[N, K]`, contiguous, newly allocated, True = kept: exactly n of every m, of equal scores the first.

    Raises:
        ValueError: a score is NaN, the scores are no floating-point matrix, its rows do not divide into groups, or the
            back end does not take the dtype or the group.
        RuntimeError: backend "triton" without triton, or off the GPU.

    Example:
        >>> import torch
        >>> from tritonsparse.kernels.select.n_of_m import n_of_m_mask
        >>> n_of_m_mask(torch.tensor([[1.0, -4.0, 2.0, 2.0]]), 2, 4, magnitude=True)
        tensor([[False,  True,  True, False]])
    """
    if backend not in ("torch", "triton"):
        raise ValueError(f'{function}: expected backend "torch" or "triton", got {backend!r}; pass either')
    if not 0 < n < m:
        raise ValueError(f"{function}: expected 0 < n < m, got n={n} and m={m}; pass for example n=2, m=4")
    expect(
        scores.dim() == 2 and scores.dtype in FLOATS and scores.shape[1] % m == 0,
        function,
        f"scores to be a floating-point matrix whose rows are a multiple of {m}",
        scores,
        "choose a group that divides them",
    )
    scores = scores.detach()
    if backend == "torch":
        mask, nan_found = n_of_m_reference(scores, n, m, magnitude), torch.isnan(scores).any()
    else:
        check_triton_dtype(function, "scores", scores.dtype, backend)
        if m > MAX_M:
            raise ValueError(
                f'{function}: expected groups of at most {MAX_M} for backend="triton", got {m}; pass backend="torch"'
            )
        require(function, scores)
        mask, nan_found = _launch(scores, n, m, magnitude)
    if bool(nan_found):
        raise ValueError(f"{function}: expected scores without NaN, got NaN; the weights have diverged")
    return mask
