"""Cases of `pack_activation`, `unpack_activation` and `packed_grad_weight`, which every ring runs."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tritonsparse.kernels.activation.compress import pack_activation, unpack_activation
from tritonsparse.kernels.activation.grad_weight import packed_grad_weight

from .matrices import Readable, error, laid_out, pairwise, same


@dataclass(frozen=True)
class Case(Readable):
    """An x of `shape` [M, K], packed, and its product with a dY [M, n]; `half` is float16 or bfloat16 by the ring.

    `masked`: some rows do not count; `missing`: so many of the last kept values find no room.
    """

    shape: tuple[int, int]
    n: int = 5
    half: bool = False
    layout: str = "contiguous"
    cutoff: float | str = 0.8
    masked: bool = True
    missing: int = 0
    transposed: bool = False


AXES = {
    "half": (False, True), "layout": ("contiguous", "transposed", "strided"), "cutoff": (0.8, "a row"),
    "masked": (False, True), "missing": (0, 3), "transposed": (False, True),
}  # fmt: skip
# Around a word of 32, tiles of the product (32 x 64 x 128) and one of the packing (1,024).
CASES = [
    *(Case(**each) for each in pairwise(shape=((1, 1), (7, 32), (33, 33), (9, 70), (2, 1030)), n=(5, 70), **AXES)),
    # Everything; what no number reaches; what no number is compared with; nothing to pack; room for nothing.
    *(Case((5, 40), cutoff=cutoff, masked=False) for cutoff in (0.0, math.inf, math.nan)),
    Case((0, 33)), Case((3, 40), missing=999),
]  # fmt: skip
LARGE_SHAPES = ((1, 1), (1, 2049), (257, 1), (64, 64), (63, 1025), (2000, 511), (8192, 1024))
LARGE = [Case(**each) for each in pairwise(shape=LARGE_SHAPES, n=(300,), **AXES)]


def packed_errors(
    case: Case, *backends: str, half: torch.dtype = torch.float16, full: torch.dtype = torch.float32,
    device: str = "cpu", calls: int = 1,
) -> list[float]:  # fmt: skip
    """What is packed and unpacked is, bit for bit and in every call, what the definition keeps.

    Returns each back end's relative RMS error of the product, over the columns of which every value fits.
    """
    random, (m, k) = torch.Generator(device).manual_seed(0), case.shape
    x, grad_y = (torch.randn(m, size, generator=random, device=device) for size in (k, case.n))
    # What is not finite in every eighth column, so that it is known which columns of the product it reaches.
    some = torch.arange(k, device=device) % 8 == 5
    for value, share in ((0.0, 0.2), (-0.0, 0.1), (1e-45, 0.05)):
        x = torch.where(torch.rand(m, k, generator=random, device=device) < share, value, x)
    for value in (math.nan, math.inf, -math.inf):
        x = torch.where(some & (torch.rand(m, k, generator=random, device=device) < 0.1), value, x)
    x, grad_y = (laid_out(each.to(half if case.half else full), case.layout) for each in (x, grad_y))
    cutoff = torch.rand(m, generator=random, device=device)
    cutoff = cutoff if case.cutoff == "a row" else torch.full((1,), float(case.cutoff), device=device)
    row_mask = torch.rand(2 * m, generator=random, device=device)[::2] < 0.7 if case.masked else None
    kept = ~(x.double().abs() < cutoff.double()[:, None]) & (x != 0)
    kept = kept if row_mask is None else kept & row_mask[:, None]
    count = int(kept.sum())
    capacity = max(0, count - case.missing) if case.missing else x.numel()
    stored = kept & (kept.flatten().cumsum(0).view(m, k) <= capacity)
    x_hat = torch.where(kept, torch.where(stored, x, math.nan), 0.0)
    words = np.packbits(kept.cpu().numpy(), axis=1, bitorder="little")
    words = np.ascontiguousarray(np.pad(words, ((0, 0), (0, -words.shape[1] % 4)))).view(np.int32)
    errors = []
    for backend in backends:
        products: list[Tensor] = []
        for _ in range(calls):
            *packed, overflow = pack_activation(x, cutoff, row_mask, capacity, backend)
            bits, values, row_offsets = packed
            assert bits.dtype == torch.int32 and bits.tolist() == words.tolist()
            assert row_offsets.dtype == torch.int64 and row_offsets.tolist() == [0, *kept.sum(1).cumsum(0).tolist()]
            assert same(values[:count], x[stored]) and not values[count:].any() and values.shape == (capacity,)
            assert bool(overflow) == (count > capacity)
            unpacked = unpack_activation(*packed, k, backend)
            assert same(unpacked, x_hat) and unpacked.is_contiguous()
            products.append(packed_grad_weight(grad_y, *packed, k, transposed=case.transposed, backend=backend))
            assert products[-1].is_contiguous() and products[-1].dtype == x.dtype and same(products[-1], products[0])
        errors.append(_error(products[0].t() if case.transposed else products[0], grad_y, x_hat))
    return errors


def _error(product: Tensor, grad_y: Tensor, x_hat: Tensor) -> float:
    """NaN and infinity reach their own columns of the product, and no others."""
    finite = x_hat.isfinite().all(0)
    assert not product[:, ~finite].isfinite().any()
    return error(product[:, finite], (grad_y.double().t() @ x_hat.double())[:, finite])
