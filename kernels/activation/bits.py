"""Bools in one bit each: which elements of an activation are kept.

    bit k % 32 of bits[m, k // 32] = kept[m, k]        kept [M, K] bool  ->  bits [M, ceil(K/32)] int32

Bits past the last column are 0. The kept elements of a row are counted by the bits set in its words.
"""
# M: rows   K: columns

from __future__ import annotations

import torch
import torch.nn.functional as F

from .._triton import tl, triton

__all__ = ["pack_bits", "popcount", "unpack_bits", "word_positions"]


def pack_bits(kept: torch.Tensor) -> torch.Tensor:
    """The words of bools `[M, K]`; the kernel in `compress.py` writes the same."""
    words = -(-kept.shape[1] // 32)
    padded = F.pad(kept, (0, 32 * words - kept.shape[1])).view(kept.shape[0], words, 32)
    # 1 << 31 is the sign bit, and no bit is added twice: the sum stays within 32 bits.
    return (padded.int() << torch.arange(32, dtype=torch.int32, device=kept.device)).sum(-1, dtype=torch.int32)


def unpack_bits(bits: torch.Tensor, columns: int) -> torch.Tensor:
    """The inverse: bool `[M, columns]` of int32 words `[M, ceil(columns/32)]`."""
    ones = bits[:, :, None] >> torch.arange(32, dtype=torch.int32, device=bits.device) & 1
    return ones.flatten(1)[:, :columns].bool()


@triton.jit
def popcount(word):  # type: ignore[no-untyped-def]
    """Bits set in each int32; the compiler knows the idiom and emits the machine's instruction for it."""
    word = word.to(tl.uint32, bitcast=True)
    word = word - ((word >> 1) & 0x55555555)
    word = (word & 0x33333333) + ((word >> 2) & 0x33333333)
    word = (word + (word >> 4)) & 0x0F0F0F0F
    return ((word * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def word_positions(bits, position, row, i_word, words, TILE: tl.constexpr):  # type: ignore[no-untyped-def]
    """For TILE positions of one row from word i_word on: kept or not, the place of each among the values, and the place
    after the last. The bits below a position in its word count the kept ones before it there."""
    o_word = i_word + tl.arange(0, TILE // 32)
    word = tl.load(bits + row * words + o_word, mask=o_word < words, other=0)
    kept_in_word = popcount(word)
    before = (tl.cumsum(kept_in_word, 0) - kept_in_word)[:, None]
    o_bit = tl.arange(0, 32)[None, :]
    kept = ((word[:, None] >> o_bit) & 1) != 0
    o_value = position + before + popcount(word[:, None] & ((1 << o_bit) - 1))
    return kept, o_value, position + tl.sum(kept_in_word)
