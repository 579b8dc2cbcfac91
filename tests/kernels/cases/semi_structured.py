"""Cases of `semi_structured_linear` and their answer in float64, which every ring runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tritonsparse.kernels.select.n_of_m import n_of_m_mask
from tritonsparse.kernels.select.transposable import transposable_mask
from tritonsparse.kernels.semi_structured import semi_structured_linear


@dataclass(frozen=True)
class Case:
    """A product of x `[*rows, k]` and an effective weight `[n, k]` that is 2:4 along rows.

    Attributes:
        both: along columns as well, and dX is a sparse product.
        strided: x has gaps between its rows.
    """

    rows: tuple[int, ...]
    n: int = 64
    k: int = 96
    transposed: bool = False
    both: bool = False
    bias: bool = True
    strided: bool = False

    def __str__(self) -> str:
        flags = [name for name in ("transposed", "both", "bias", "strided") if getattr(self, name)]
        return ", ".join((f"{list(self.rows)} by {self.n}x{self.k}", *flags))


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


class Operands(NamedTuple):
    """Of one case; x, w_hat and the bias are leaves."""

    case: Case
    x: Tensor
    w_hat: Tensor
    bias: Tensor | None
    grad_y: Tensor
    mask: Tensor

    @property
    def leaves(self) -> dict[str, Tensor]:
        named = {"x": self.x, "w_hat": self.w_hat, "bias": self.bias}
        return {name: leaf for name, leaf in named.items() if leaf is not None}

    @property
    def options(self) -> dict[str, Any]:
        return {"transposed": self.case.transposed, "sparse_grad_input": self.case.both}


def operands(case: Case, dtype: torch.dtype, device: str = "cpu") -> Operands:
    random = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, device=device)

    weight = normal(case.n, case.k)
    mask = (transposable_mask if case.both else n_of_m_mask)(weight, 2, 4, magnitude=True)
    weight = weight * mask
    if case.transposed:
        weight, mask = weight.t().contiguous(), mask.t().contiguous()
    x, bias = normal(*case.rows, case.k), normal(case.n).to(dtype).requires_grad_() if case.bias else None
    x = (normal(*case.rows, 2 * case.k)[..., ::2] if case.strided else x).to(dtype)
    grad_y = normal(*case.rows, case.n).to(dtype)
    return Operands(case, x.requires_grad_(), weight.to(dtype).requires_grad_(), bias, grad_y, mask)


def run(o: Operands, backend: str, function: Callable[..., Tensor] = semi_structured_linear) -> dict[str, Tensor]:
    """The output and the gradients of all leaves."""
    y = function(o.x, o.w_hat, o.bias, backend=backend, **o.options)
    return {"y": y.detach()} | dict(
        zip(o.leaves, torch.autograd.grad(y, list(o.leaves.values()), o.grad_y), strict=True)
    )


def answer(o: Operands) -> dict[str, Tensor]:
    """The same in float64, by autograd of the dense product."""
    leaves = {name: leaf.detach().double().requires_grad_() for name, leaf in o.leaves.items()}
    w_hat = leaves["w_hat"].t() if o.case.transposed else leaves["w_hat"]
    y = F.linear(leaves["x"], w_hat, leaves.get("bias"))
    return {"y": y.detach()} | dict(
        zip(leaves, torch.autograd.grad(y, list(leaves.values()), o.grad_y.double()), strict=True)
    )
