"""Cases of `pack_activation`, `unpack_activation` and `packed_grad_weight`, which every ring runs."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from tritonsparse.kernels.activation.compress import pack_activation, unpack_activation
from tritonsparse.kernels.activation.grad_weight import packed_grad_weight

from .matrices import error, laid_out, pairwise, same


@dataclass(frozen=True)
class Packs:
    """An x `[m, k]` with zeros, infinities and NaN among its elements.

    Attributes:
        half: x is float16 or bfloat16, by the ring, else float32.
        cutoff: one number, or "a row" = one a row.
        masked: some rows do not count.
        room: capacity, as a share of x's elements.
    """

    m: int
    k: int
    half: bool = False
    layout: str = "contiguous"
    cutoff: float | str = 0.8
    masked: bool = True
    room: float = 1.0

    def __str__(self) -> str:
        half = ", half" if self.half else ""
        rows = ", row mask" if self.masked else ""
        return f"{self.m}x{self.k}{half}, {self.layout}, cutoff {self.cutoff}{rows}, room {self.room}"


# Around a word of 32, a tile of the product (64) and one of the packing (1,024).
PACKS = [
    *(
        Packs(**values)
        for values in pairwise(
            m=(1, 7), k=(1, 32, 33, 70, 1030), half=(False, True), layout=("contiguous", "transposed", "strided"),
            cutoff=(0.8, "a row"), masked=(False, True), room=(1.0, 0.3),
        )
    ),
    # Nothing to pack; everything; what no number reaches; what no number is compared with.
    Packs(0, 33),
    *(Packs(5, 40, cutoff=cutoff, masked=False) for cutoff in (0.0, math.inf, math.nan)),
]  # fmt: skip
LARGE_SHAPES = ((1, 1), (1, 2049), (257, 1), (64, 64), (63, 1025), (2000, 511), (8192, 1024))
LARGE_PACKS = [
    Packs(**values, m=shape[0], k=shape[1])
    for values in pairwise(shape=LARGE_SHAPES, half=(False, True), cutoff=(1.3, "a row"), room=(1.0, 0.1))
    for shape in [values.pop("shape")]
]


def assert_packs(
    case: Packs, backend: str, half: torch.dtype = torch.float16, device: str = "cpu", calls: int = 1
) -> None:
    """What is packed and unpacked is, bit for bit and in every call, what the definition keeps."""
    random = torch.Generator(device).manual_seed(0)
    m, k = case.m, case.k
    x = torch.randn(m, k, generator=random, device=device)
    for value, share in ((0.0, 0.2), (math.nan, 0.01), (math.inf, 0.01), (-math.inf, 0.01)):
        x = torch.where(torch.rand(m, k, generator=random, device=device) < share, value, x)
    x = laid_out(x.to(half if case.half else torch.float32), case.layout)
    cutoff = torch.full((1,), 0.0 if case.cutoff == "a row" else float(case.cutoff), device=device)
    if case.cutoff == "a row":
        cutoff = torch.rand(m, generator=random, device=device)
    # Every second of twice as many: a mask with strides.
    row_mask = torch.rand(2 * m, generator=random, device=device)[::2] < 0.7 if case.masked else None
    capacity = int(case.room * x.numel())

    kept = ~(x.double().abs() < cutoff.double()[:, None]) & (x != 0)
    kept = kept if row_mask is None else kept & row_mask[:, None]
    words = np.packbits(kept.cpu().numpy(), axis=1, bitorder="little")
    words = np.ascontiguousarray(np.pad(words, ((0, 0), (0, -words.shape[1] % 4)))).view(np.int32)
    chosen, place = x[kept], kept.flatten().cumsum(0).view(m, k)
    results = [pack_activation(x, cutoff, row_mask, capacity, backend) for _ in range(calls)]
    for bits, values, row_offsets, overflow in results:
        assert bits.dtype == torch.int32 and bits.tolist() == words.tolist()
        assert row_offsets.dtype == torch.int64 and row_offsets.tolist() == [0, *kept.sum(1).cumsum(0).tolist()]
        assert same(values[: chosen.numel()], chosen[:capacity]) and not values[chosen.numel() :].any()
        assert values.shape == (capacity,) and bool(overflow) == (chosen.numel() > capacity)
    x_hat = torch.where(kept, torch.where(place > capacity, math.nan, x), 0.0)
    unpacked = unpack_activation(*results[0][:3], k, backend)
    assert same(unpacked, x_hat) and unpacked.is_contiguous()


@dataclass(frozen=True)
class Product:
    """dY `[m, n]` by a packed X_hat `[m, k]`."""

    m: int
    n: int
    k: int
    half: bool = False
    transposed: bool = False
    layout: str = "contiguous"

    def __str__(self) -> str:
        turned = ", Conv1D" if self.transposed else ""
        return f"{self.m}x{self.n} by {self.m}x{self.k}{', half' if self.half else ''}{turned}, {self.layout}"


PRODUCTS = [
    Product(0, 5, 70),
    *(Product(**values) for values in pairwise(
        m=(1, 33), n=(5, 130), k=(1, 31, 70), half=(False, True), transposed=(False, True),
        layout=("contiguous", "transposed"),
    )),
]  # fmt: skip
LARGE_PRODUCTS = [
    Product(m, 300, k, half, transposed)
    for m, k in LARGE_SHAPES
    for half in (False, True)
    for transposed in (False, True)
]


def product_errors(
    case: Product,
    *backends: str,
    full: torch.dtype = torch.float32,
    half: torch.dtype = torch.float16,
    device: str = "cpu",
    calls: int = 1,
) -> list[float]:
    """The error of each back end against float64, relative RMS; its calls agree bit for bit."""
    random = torch.Generator(device).manual_seed(0)
    dtype, cutoff = half if case.half else full, torch.full((1,), 0.8, device=device)
    x = torch.randn(case.m, case.k, generator=random, device=device).to(dtype)
    grad_y = laid_out(torch.randn(case.m, case.n, generator=random, device=device).to(dtype), case.layout)
    row_mask = torch.rand(case.m, generator=random, device=device) < 0.8
    packed = pack_activation(x, cutoff, row_mask, x.numel())[:3]
    x_hat = x.double().where((x.double().abs() >= cutoff.double()) & row_mask[:, None], 0.0)
    exact = grad_y.double().t() @ x_hat
    errors = []
    for backend in backends:
        found = [
            packed_grad_weight(grad_y, *packed, case.k, transposed=case.transposed, backend=backend)
            for _ in range(calls)
        ]
        assert all(each.is_contiguous() and each.dtype == dtype and torch.equal(each, found[0]) for each in found)
        errors.append(error(found[0], exact.t() if case.transposed else exact))
    return errors
