"""N:M masks that are N:M along rows and along columns, so that products with W and with its transpose are both sparse.

    tiles t of m x m of scores[N, K]:   mask = the P with n ones in every row and column that maximises sum(P * t)

Hubara et al., "Accelerated Sparse Neural Training: A Provable and Efficient Method to Find N:M Transposable Masks",
arXiv:2102.08124. Found by trying every P, which is exact: 90 of them for 2:4, no more for any m up to 4. (The paper
solves a flow for larger m, or approximates within a factor of 2.) Sums are taken element after element, without a
matrix product, so that no tf32 changes a choice and every device makes the same.
"""

# N rows of scores, K columns   T tiles, N K / m^2   P masks of a tile

from __future__ import annotations

import functools
import itertools

import torch
from torch import Tensor

from .._operands import FLOATS, expect

__all__ = ["MAX_SIDE", "transposable_mask"]

# The largest tile whose masks are tried one by one.
MAX_SIDE = 4
# Tiles tried at once: sums of 90 masks for each of so many are 24 MB.
CHUNK = 1 << 16


@functools.cache
def tile_masks(n: int, m: int) -> tuple[tuple[int, ...], ...]:
    """Every m x m mask with n ones in each row and column, row-major; those that keep early places first."""
    rows = [tuple(int(i in kept) for i in range(m)) for kept in itertools.combinations(range(m), n)]
    chosen = itertools.product(rows, repeat=m)
    return tuple(sum(tile, ()) for tile in chosen if all(sum(column) == n for column in zip(*tile, strict=True)))


def transposable_mask(
    scores: Tensor, n: int, m: int, *, magnitude: bool = False, function: str = "transposable_mask"
) -> Tensor:
    """The best of all masks with n of every m neighbours along rows and along columns.

    Waits for the host once, to refuse NaN, which has no place in an order.

    Args:
        scores: `[N, K]`, floating point, any strides; N and K multiples of m.
        n, m: kept of every m, 0 < n < m, m at most 4.
        magnitude: sum |scores|.
        function: name under which errors are raised, of whoever was called with the scores.

    Returns:
        bool `[N, K]`, contiguous, newly allocated, True = kept; of masks with equal sums (in float32, float64 of
        float64) the first in the order of `tile_masks`.

    Raises:
        ValueError: a score is NaN or infinite, the scores are no floating-point matrix, its sides do not divide into
            tiles, or n and m are not as above.

    Example:
        >>> import torch
        >>> from tritonsparse.kernels.select.transposable import transposable_mask
        >>> transposable_mask(torch.tensor([[9.0, 8.0], [7.0, 1.0]]), 1, 2).int()  # 8 + 7 is more than 9 + 1
        tensor([[0, 1],
                [1, 0]], dtype=torch.int32)
    """
    if not 0 < n < m <= MAX_SIDE:
        raise ValueError(f"{function}: expected 0 < n < m <= {MAX_SIDE}, got n={n} and m={m}; pass n=2, m=4")
    expect(
        scores.dim() == 2 and scores.dtype in FLOATS and scores.shape[0] % m == scores.shape[1] % m == 0,
        function,
        f"scores to be a floating-point matrix whose sides are multiples of {m}",
        scores,
        "exclude the layer",
    )
    rows, columns = scores.shape
    scores = scores.detach().to(torch.promote_types(scores.dtype, torch.float32))
    if not bool(torch.isfinite(scores).all()):
        raise ValueError(f"{function}: expected finite scores, got NaN or infinity; the weights have diverged")
    # [T, m m]
    tiles = (scores.abs() if magnitude else scores).reshape(rows // m, m, columns // m, m).transpose(1, 2)
    tiles = tiles.reshape(-1, m * m)
    candidates = torch.tensor(tile_masks(n, m), device=scores.device)
    kept = torch.empty_like(tiles, dtype=torch.bool)
    for start in range(0, len(tiles), CHUNK):
        part = tiles[start : start + CHUNK]
        sums = part.new_zeros(len(part), len(candidates))
        for place in range(m * m):
            sums += part[:, place, None] * candidates[:, place]
        kept[start : start + CHUNK] = candidates.bool()[sums.argmax(dim=1)]
    return kept.reshape(rows // m, columns // m, m, m).transpose(1, 2).reshape(rows, columns).contiguous()
