"""A mask in one bit an element: an eighth of a bool mask's memory and traffic.

    bit k % 32 of bits[n, k // 32] = mask[n, k]        mask [N, K] bool  ->  bits [N, ceil(K/32)] int32

Bits past the last column are 0. Read by `gemm.py` and `grad.py`, which take either form.
"""
# N: rows of the mask
# K: columns of the mask

from __future__ import annotations

import torch
import torch.nn.functional as F

from .._operands import expect
from .._triton import require, tl, triton

__all__ = ["is_packed", "load_kept", "pack_bits", "pack_bits_reference", "unpack_bits", "unpacked"]

# Words a program packs: 4,096 bools in, 512 bytes out.
WORDS = 128
WORD_DTYPES = (torch.int32, torch.uint32)


def pack_bits_reference(mask: torch.Tensor) -> torch.Tensor:
    """The definition of `pack_bits`."""
    words = -(-mask.shape[1] // 32)
    padded = F.pad(mask, (0, 32 * words - mask.shape[1])).view(mask.shape[0], words, 32)
    # Summed in int64, whose low 32 bits are the word; int32 has no power 2^31.
    powers = torch.ones(32, dtype=torch.int64, device=mask.device) << torch.arange(32, device=mask.device)
    total = (padded * powers).sum(-1)
    return torch.where(total >= 2**31, total - 2**32, total).to(torch.int32)


def unpack_bits(bits: torch.Tensor, columns: int) -> torch.Tensor:
    """The inverse of `pack_bits`: bool `[N, columns]` of words `[N, ceil(columns/32)]`.

    Raises:
        ValueError: `bits` are not words of so many columns.
    """
    expect(
        is_packed(bits) and bits.shape[1] == -(-columns // 32),
        "unpack_bits",
        f"int32 or uint32 words [N, {-(-columns // 32)}] of {columns} columns",
        bits,
        "pass what pack_bits returned and the mask's own number of columns",
    )
    shifts = torch.arange(32, dtype=torch.int32, device=bits.device)
    ones = bits.view(torch.int32)[:, :, None] >> shifts & 1
    return ones.flatten(1)[:, :columns].bool()


def is_packed(mask: torch.Tensor | None) -> bool:
    """Whether a mask holds words of bits rather than bools."""
    return mask is not None and mask.dim() == 2 and mask.dtype in WORD_DTYPES


def unpacked(mask: torch.Tensor | None, weight: torch.Tensor) -> torch.Tensor | None:
    """The mask of `weight` as bools, whichever form it is in."""
    return mask if mask is None or not is_packed(mask) else unpack_bits(mask, weight.shape[1])


@triton.jit
def load_kept(  # type: ignore[no-untyped-def]
    mask, i_n, i_k, N, K, stride_mn, stride_mk, BITS: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr
):
    """Where a mask is True on the tile whose first row is i_n, first column i_k: bools, or words along BITS' axis."""
    # A word is loaded once and spread in registers, so i_n and i_k are multiples of 32 along its axis.
    if BITS == "k":
        o_n, o_w = i_n + tl.arange(0, TILE_N), i_k // 32 + tl.arange(0, TILE_K // 32)
        inside = (o_n < N)[:, None] & (o_w < tl.cdiv(K, 32))[None, :]
        word = tl.load(mask + o_n[:, None] * stride_mn + o_w[None, :] * stride_mk, mask=inside, other=0)
        kept = tl.reshape(word[:, :, None] >> tl.arange(0, 32)[None, None, :], (TILE_N, TILE_K)) & 1
    elif BITS == "n":
        o_w, o_k = i_n // 32 + tl.arange(0, TILE_N // 32), i_k + tl.arange(0, TILE_K)
        inside = (o_w < tl.cdiv(N, 32))[:, None] & (o_k < K)[None, :]
        word = tl.load(mask + o_w[:, None] * stride_mn + o_k[None, :] * stride_mk, mask=inside, other=0)
        kept = tl.reshape(word[:, None, :] >> tl.arange(0, 32)[None, :, None], (TILE_N, TILE_K)) & 1
    else:
        o_n, o_k = i_n + tl.arange(0, TILE_N), i_k + tl.arange(0, TILE_K)
        inside = (o_n < N)[:, None] & (o_k < K)[None, :]
        kept = tl.load(mask + o_n[:, None] * stride_mn + o_k[None, :] * stride_mk, mask=inside, other=0)
    return kept != 0


@triton.jit
def _pack_bits_kernel(bits, mask, words, total, K, stride_mn, stride_mk, WORDS: tl.constexpr):  # type: ignore[no-untyped-def]
    o_w = tl.program_id(0).to(tl.int64) * WORDS + tl.arange(0, WORDS)
    o_b = tl.arange(0, 32)
    o_n = o_w // words
    o_k = (o_w % words * 32)[:, None] + o_b[None, :]

    # [WORDS, 32]
    inside = (o_w < total)[:, None] & (o_k < K)
    kept = tl.load(mask + o_n[:, None] * stride_mn + o_k * stride_mk, mask=inside, other=0) != 0
    # No two terms share a bit, so the sum is their union, the sign bit included.
    word = tl.sum(kept.to(tl.int32) << o_b[None, :], axis=1)
    tl.store(bits + o_w, word, mask=o_w < total)


def pack_bits(mask: torch.Tensor, *, backend: str = "torch") -> torch.Tensor:
    """A bool mask as words of 32 bits, the lowest bit first.

    Args:
        mask: `[N, K]`, bool, any strides, any device.
        backend: "torch" (the reference, any device) or "triton" (a GPU, or the interpreter).

    Returns:
        int32 `[N, ceil(K/32)]`, contiguous, newly allocated.

    Raises:
        ValueError: `mask` is not a bool matrix, or `backend` is unknown.
        RuntimeError: backend "triton" without triton, or off the GPU.

    Example:
        >>> import torch
        >>> from tritonsparse.kernels.fused.bits import pack_bits, unpack_bits
        >>> bits = pack_bits(torch.tensor([[True, False, True, True]]))  # 1 + 4 + 8
        >>> bits, unpack_bits(bits, 4)
        (tensor([[13]], dtype=torch.int32), tensor([[ True, False,  True,  True]]))
    """
    expect(
        mask.dim() == 2 and mask.dtype == torch.bool,
        "pack_bits",
        "mask to be a bool matrix [N, K]",
        mask,
        "compare or cast it to bool, True where kept",
    )
    if backend not in ("torch", "triton"):
        raise ValueError(f'pack_bits: expected backend "torch" or "triton", got {backend!r}; pass either')
    if backend == "torch":
        return pack_bits_reference(mask)
    require("pack_bits", mask)
    n, k = mask.shape
    words = -(-k // 32)
    bits = mask.new_empty((n, words), dtype=torch.int32)
    if bits.numel():
        with torch.cuda.device_of(mask):
            _pack_bits_kernel[(triton.cdiv(n * words, WORDS),)](
                bits, mask, words, n * words, k, *mask.stride(), WORDS=WORDS, num_warps=4
            )
    return bits
