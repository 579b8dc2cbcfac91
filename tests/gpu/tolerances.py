"""How far from float64 a correct product may lie, as relative RMS. `tests/kernels/test_tolerances.py` emulates it.

Number formats. A significand of p bits (bfloat16 8, float16 11, tf32 11, float32 24) has spacing 2^(1-p) in [1, 2).
The significands m of random data are spread evenly in log m, so the mean of 1/m is 1 / (2 ln 2) = 0.721 and that of
1/m^2 is 3 / (8 ln 2) = 0.541.

One rounding to nearest errs evenly in +-2^-p, so its RMS is 2^-p sqrt(0.541 / 3) = 0.425 2^-p. For bfloat16, float16
and float32 that is 1.7e-3, 2.1e-4 and 2.5e-8.

One truncation errs evenly in [0, 2^(1-p)) toward zero, so its mean is 0.721 2^-p and its mean square 0.721 2^(-2p). The
mean is a bias: it does not average out in a sum.

Operands. Products of two 16-bit numbers are exact in float32. With tf32 Triton hands float32 registers to the tensor
core as they are (its PTX has no cvt.rna), and the core reads the upper 19 bits, so both operands are truncated. A
product is smaller by 2 * 0.721 * 2^-11 = 7.0e-4, beside a spread of 3.1e-4: 7.7e-4 in all. Operands rounded to nearest
would give 2.9e-4, which 1.1 times a vendor's error would not cover.

Sums on tensor cores. The running sum of float32 is truncated after every addition of a few products: 16 on Hopper, 8
on Ampere for 16-bit operands and 4 for tf32; the smaller is taken. A random sum is a walk s_j of n steps, and its
truncation errors d s_j add up to d n / sqrt(3) of its RMS, d = 0.721 * 2^-24 = 4.3e-8. (Where all terms have one sign:
d n / 2.) 8-wide that is 6.4e-6 at k = 2048 and 1.3e-5 at k = 4096. Parts that are summed apart err less. The bias has
the sign of that of truncated operands, so the two are added.

Sums in full float32. Each of k fused multiply-adds is rounded to nearest: 2.5e-8 sqrt(k / 2).

What surrounds a product (a sigmoid, a view, a bias, an activation) is in float32: 2e-6 has room for 32 roundings of
2^-24, and 1e-6 for the 16 of a kernel without a product.

A bound is this floor and 1.3 times the root of the sum of squares. On average over normal data the models hold within
0.3 %. The 1.3 is for results of few entries: 192 of them were seen to reach 1.24. Where the reference is the vendor's
product in the same dtypes, the bound of a test is `max(1.1 * error of the reference, product_bound(...))`.
"""

import math

import torch

__all__ = ["CANCELLING", "ELEMENTWISE", "FLOOR", "product_bound", "rounding"]

BITS = {torch.bfloat16: 8, torch.float16: 11, torch.float32: 24}
TF32_BITS = 11
# Means of 1/m and 1/m^2.
INVERSE, INVERSE_SQUARE = 1 / (2 * math.log(2)), 3 / (8 * math.log(2))
# Products that are added before the sum is truncated.
STEP, TF32_STEP = 8, 4
FLOOR, ELEMENTWISE = 2e-6, 1e-6
MARGIN = 1.3
# A sum of terms of both signs, measured against the root of their sum of squares, is a normal number: in five of its
# standard deviations. A bias of the terms is that share of the sum.
CANCELLING = 5.0


def rounding(dtype: torch.dtype) -> float:
    return float(2.0 ** -BITS[dtype] * math.sqrt(INVERSE_SQUARE / 3))


def _truncated_operands() -> float:
    mean = 2.0**-TF32_BITS * INVERSE
    square = 2.0 ** (2 - 2 * TF32_BITS) * INVERSE_SQUARE / 3
    return math.sqrt((2 * mean) ** 2 + 2 * (square - mean**2))


def product_bound(operands: torch.dtype, out: torch.dtype, k: int, precision: str = "full float32") -> float:
    """The largest relative RMS error of a correct product.

    Args:
        operands: dtype in which the product is taken.
        out: dtype of the result.
        k: length of the sums.
        precision: "tf32" lets float32 operands be truncated; anything else does not.
    """
    tf32 = operands == torch.float32 and precision == "tf32"
    truncated = 2.0**-24 * INVERSE * -(-k // (TF32_STEP if tf32 else STEP)) / math.sqrt(3)
    if tf32:
        product = _truncated_operands() + truncated
    else:
        product = rounding(torch.float32) * math.sqrt(k / 2) if operands == torch.float32 else truncated
    return FLOOR + MARGIN * math.hypot(product, rounding(out))
