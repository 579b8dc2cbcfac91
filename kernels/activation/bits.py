"""Bools in one bit each: which elements of an activation are kept.

    bit k % 32 of bits[m, k // 32] = kept[m, k]        kept [M, K] bool  ->  bits [M, ceil(K/32)] int32

Bits past the last column are 0.
"""
# M: rows   K: columns

from __future__ import annotations

import torch
import torch.nn.functional as F

from .._operands import expect

__all__ = ["pack_bits_reference", "unpack_bits"]


def pack_bits_reference(kept: torch.Tensor) -> torch.Tensor:
    """The words of bools `[M, K]`; the kernel in `compress.py` writes the same."""
    words = -(-kept.shape[1] // 32)
    padded = F.pad(kept, (0, 32 * words - kept.shape[1])).view(kept.shape[0], words, 32)
    # Summed in int64, whose low 32 bits are the word; int32 has no power 2^31.
    powers = torch.ones(32, dtype=torch.int64, device=kept.device) << torch.arange(32, device=kept.device)
    total = (padded * powers).sum(-1)
    return torch.where(total >= 2**31, total - 2**32, total).to(torch.int32)


def unpack_bits(bits: torch.Tensor, columns: int) -> torch.Tensor:
    """The inverse: bool `[M, columns]` of int32 words `[M, ceil(columns/32)]`.

    Raises:
        ValueError: `bits` are not words of so many columns.
    """
    expect(
        bits.dim() == 2 and bits.dtype == torch.int32 and bits.shape[1] == -(-columns // 32),
        "unpack_bits",
        f"int32 words [M, {-(-columns // 32)}] of {columns} columns",
        bits,
        "pass the words of a packed activation and the activation's own number of columns",
    )
    shifts = torch.arange(32, dtype=torch.int32, device=bits.device)
    ones = bits[:, :, None] >> shifts & 1
    return ones.flatten(1)[:, :columns].bool()
