"""Cases of `semi_structured_linear`, which every ring runs."""

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tritonsparse.kernels import semi_structured
from tritonsparse.kernels.select.n_of_m import n_of_m_mask
from tritonsparse.kernels.select.transposable import transposable_mask
from tritonsparse.kernels.semi_structured import semi_structured_linear

from .matrices import Readable
from .product import Product


@dataclass(frozen=True)
class Case(Readable):
    """x `[*rows, k]` by an effective weight `[n, k]` that is 2:4 along rows; `both`: along columns too, for dX."""

    rows: tuple[int, ...]
    n: int = 64
    k: int = 96
    transposed: bool = False
    both: bool = False
    bias: bool = True
    strided: bool = False


CASES = [
    *(Case((3, 7), transposed=turned, both=both) for turned in (False, True) for both in (False, True)),
    # No multiple of the rows that the library takes, and none at all.
    *(Case((rows,), bias=False, strided=True, both=rows == 13) for rows in (0, 1, 8, 13)),
    Case((), 32, 32),
]
# Fewer rows than a tile, no multiple of 8, the least weight, a layer's.
LARGE = [
    Case((m,), n, k, transposed, both)
    for m, n, k in ((1, 64, 64), (13, 192, 320), (512, 1024, 4096), (2048, 4096, 1024))
    for transposed in (False, True)
    for both in (False, True)
]


def product(case: Case, dtype: torch.dtype, device: str = "cpu", backend: str = "semi_structured") -> Product:
    random = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, device=device)

    w_hat = normal(case.n, case.k)
    w_hat = w_hat * (transposable_mask if case.both else n_of_m_mask)(w_hat, 2, 4, magnitude=True)
    w_hat = w_hat.t().contiguous() if case.transposed else w_hat
    x = normal(*case.rows, 2 * case.k)[..., ::2] if case.strided else normal(*case.rows, case.k)
    bias = normal(case.n).to(dtype) if case.bias else None
    return Product(
        semi_structured_linear, x.to(dtype), w_hat.to(dtype), bias,
        lambda x, w_hat, bias: F.linear(x, w_hat.t() if case.transposed else w_hat, bias),
        normal(*case.rows, case.n).to(dtype),
        options={"transposed": case.transposed, "sparse_grad_input": case.both}, backend=backend,
    )  # fmt: skip


class Emulated:
    """cuSPARSELt's two calls in plain torch, strict about what they are given; counts them."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.compressed = self.multiplied = 0
        patch.setattr(torch, "_cslt_compress", self.compress)
        patch.setattr(torch, "_cslt_sparse_mm", self.multiply)
        patch.setattr(semi_structured, "hardware_reason", lambda device: None)

    def compress(self, dense: Tensor) -> Tensor:
        self.compressed += 1
        assert dense.is_contiguous()
        groups = dense.view(-1, 4)
        assert int((groups != 0).sum(1).max()) <= 2, "no 2:4 matrix"
        order = (groups != 0).to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :2]
        return torch.stack([groups.gather(1, order), order.to(dense.dtype)])

    def multiply(self, packed: Tensor, dense: Tensor, bias: Tensor | None, transpose_result: bool) -> Tensor:
        self.multiplied += 1
        k, count = dense.shape
        # What the library assumes of an operand that is not contiguous.
        assert dense.t().is_contiguous() and count % 8 == 0 and transpose_result
        values, places = packed
        matrix = torch.zeros(values.shape[0], 4, dtype=dense.dtype).scatter_(1, places.long(), values).view(-1, k)
        y = matrix @ dense
        return (y if bias is None else y + bias[:, None]).t().contiguous()
