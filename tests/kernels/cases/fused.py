"""Cases of the fused products, which every ring runs: Y = X S(W)^T + b, dX = dY S(W), dW = m (dY^T X) and ds."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from tritonsparse.kernels._tiles import GemmTiles, GradTiles
from tritonsparse.kernels.fused.gemm import fused_forward, fused_grad_input
from tritonsparse.kernels.fused.grad import fused_grad_weight
from tritonsparse.kernels.weight.view import View

from . import weight as weight_cases
from .matrices import error, laid_out, pairwise, same

# Of the dtypes of operands and result and the length of a sum.
Bound = Callable[[torch.dtype, torch.dtype, int], float]

KINDS = ("soft", "soft per row", "hard", "hard per row", "step", "step per row", "mask")


@dataclass(frozen=True)
class Case:
    """A product of `x` `[m, k]` by a weight `[n, k]`, or `[k, n]` where `transposed`; master and product as of weights.

    `layout` is that of x, the gradient of y and the masks; `splits`, `subtiles` are of the tiles where interpreted.
    """

    m: int
    n: int
    k: int
    kind: str
    transposed: bool = False
    master: str = "fp32"
    product: str = "half"
    layout: str = "contiguous"
    weight_layout: str = "contiguous"
    alpha: float | None = 0.25
    restricted: bool = True
    bias: bool = True
    splits: int = 1
    subtiles: int = 1

    def __str__(self) -> str:
        transposed = ", Conv1D" if self.transposed else ""
        return f"{self.kind}, {self.m}x{self.n}x{self.k}{transposed}, {self.master} x {self.product}, {self.layout}"


class Operands(NamedTuple):
    """Of all three products: each takes what it reads."""

    x: Tensor
    grad_y: Tensor
    weight: Tensor
    view: View
    bias: Tensor | None
    transposed: bool

    def double(self) -> "Operands":
        x, grad_y, weight, view, bias, transposed = self
        weight, view, *_ = weight_cases.Operands(weight, view, weight, weight.dtype).double()
        return Operands(x.double(), grad_y.double(), weight, view, None if bias is None else bias.double(), transposed)


# Several tiles along every axis, in shapes that the interpreter gets through.
CASES = [
    Case(**values)
    for values in pairwise(
        m=(0, 1, 17), n=(1, 31, 33), k=(1, 32, 33, 70), kind=KINDS, transposed=(False, True),
        master=("fp32", "half"), product=("fp32", "half"), layout=("contiguous", "transposed", "strided"),
        weight_layout=("contiguous", "transposed", "strided"), alpha=(None, 0.0, 0.25, 1.0), restricted=(False, True),
        bias=(False, True), splits=(1, 2, 4), subtiles=(1, 2, 4, 8),
    )
]  # fmt: skip
# For a GPU: decoding, odd sizes, one tile, several tiles, a split reduction, wide tiles of dW.
LARGE = [
    Case(*values.pop("shape"), **values)
    for values in pairwise(
        shape=((1, 257, 513), (7, 64, 64), (16, 1024, 4096), (129, 127, 65), (513, 1000, 511), (512, 4096, 2816)),
        kind=("soft", "soft per row", "hard", "mask"), transposed=(False, True), master=("fp32", "half"),
        product=("fp32", "half"),
    )
]  # fmt: skip


def operands(case: Case, device: str = "cpu", half: torch.dtype = torch.float16) -> Operands:
    random = torch.Generator(device).manual_seed(0)

    def rows(features: int) -> Tensor:
        matrix = torch.randn(case.m, features, generator=random, device=device)
        return laid_out(matrix.to(torch.float32 if case.product == "fp32" else half), case.layout)

    n, k = (case.k, case.n) if case.transposed else (case.n, case.k)
    of_weight = weight_cases.Case(
        n, k, case.kind, case.master, case.product, case.weight_layout, case.layout, case.alpha, case.restricted
    )
    weight, view, *_ = weight_cases.operands(of_weight, device, half)
    x, grad_y = rows(case.k), rows(case.n)
    bias = torch.randn(case.n, generator=random, device=device).to(x.dtype) if case.bias else None
    return Operands(x, grad_y, weight, view, bias, case.transposed)


def products(given: Operands, backend: str, case: Case | None = None) -> dict[str, Tensor]:
    """By name; in the tiles of a case, or in those that the shapes call for."""
    x, grad_y, weight, view, bias, transposed = given
    how = {"transposed": transposed, "backend": backend}
    tiles = None if case is None else GemmTiles(16, 32, 32, case.splits)
    found = {"y": fused_forward(x, weight, view, bias, **how, tiles=tiles)}
    found["grad_x"] = fused_grad_input(grad_y, weight, view, **how, tiles=tiles)
    if view.kind != "step":
        grad_tiles = None if case is None else GradTiles(16, 16, 32 * case.subtiles, case.subtiles)
        found["grad_weight"], of_threshold = fused_grad_weight(grad_y, x, weight, view, **how, tiles=grad_tiles)
        assert (of_threshold is None) == (view.threshold is None)
        if of_threshold is not None:
            found["grad_threshold"] = of_threshold
    return found


def answer(given: Operands) -> tuple[dict[str, Tensor], float]:
    """The results in float64; and the norm of the terms of the threshold's gradient."""
    x, grad_y, weight, view, bias, transposed = given.double()
    dense = x.t() @ grad_y if transposed else grad_y.t() @ x
    exact = weight_cases.answer(weight_cases.Operands(weight, view, dense, torch.float64))
    w_hat = exact.w_hat.t() if transposed else exact.w_hat
    y = x @ w_hat.t() if bias is None else x @ w_hat.t() + bias
    found = {"y": y, "grad_x": grad_y @ w_hat, "grad_weight": exact.grad_weight, "grad_threshold": exact.grad_threshold}
    return found, exact.terms


def check(
    case: Case, bound: Bound, device: str = "cpu", half: torch.dtype = torch.float16, *, computed_tiles: bool = False
) -> None:
    """The kernels are as exact as the two steps of the reference, twice bit for bit; the bound is allowed in any case.

    `computed_tiles`: in the tiles that the shapes call for, and not the case's.
    """
    given, tiles = operands(case, device, half), None if computed_tiles else case
    exact, terms = answer(given)
    reference, actual, again = (products(given, backend, tiles) for backend in ("torch", "triton", "triton"))
    assert actual.keys() == reference.keys()
    lengths = {"y": case.k, "grad_x": case.n, "grad_weight": case.m, "grad_threshold": case.m}
    for name, value in actual.items():
        assert value.dtype == reference[name].dtype and value.shape == exact[name].shape and value.is_contiguous(), name
        assert same(value, again[name]), f"{name}: another result the second time"
        allowed = bound(given.x.dtype, value.dtype, lengths[name])
        if name == "grad_threshold":
            # A sum of both signs, in five standard deviations: measured against the norm of its terms.
            assert (value - exact[name]).norm().item() <= 5 * allowed * terms
        else:
            allowed = max(1.1 * error(reference[name], exact[name]), allowed)
            assert error(value, exact[name]) <= allowed, f"{name}: {error(value, exact[name]):.2e}"


def cut(view: View, rows: slice, columns: slice) -> View:
    mask, grad_mask = (None if t is None else t[rows, columns] for t in (view.mask, view.grad_mask))
    shared = view.threshold is None or view.threshold.numel() == 1
    return View(view.kind, view.threshold if shared else view.threshold[rows], mask, grad_mask, view.alpha)


def by_columns(weight: Tensor, view: View, backend: str) -> Tensor:
    """S(W) as products of its columns with 1: in a product of more, NaN and infinity meet zeros."""
    one, parts = weight.new_ones(1, 1), [slice(j, j + 1) for j in range(weight.shape[1])]
    columns = [fused_forward(one, weight[:, j], cut(view, slice(None), j), backend=backend).t() for j in parts]
    return torch.cat(columns, 1)


def by_rows(grad: Tensor, weight: Tensor, view: View, backend: str) -> tuple[Tensor, Tensor | None]:
    one, parts = weight.new_ones(1, 1), [slice(i, i + 1) for i in range(weight.shape[0])]
    found = [fused_grad_weight(one, grad[i], weight[i], cut(view, i, slice(None)), backend=backend) for i in parts]
    ds = None if view.threshold is None else torch.cat([each for _, each in found]).sum_to_size(view.threshold.shape)
    return torch.cat([row for row, _ in found]), ds
