"""Cases of the fused products, which every ring runs: Y = X S(W)^T + b, dX = dY S(W), dW = m (dY^T X) and ds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from tritonsparse.kernels._tiles import GemmTiles, GradTiles
from tritonsparse.kernels.fused.gemm import fused_forward, fused_grad_input
from tritonsparse.kernels.fused.grad import fused_grad_weight
from tritonsparse.kernels.weight.view import View

from .matrices import error, laid_out, pairwise, same
from .weight import away_from_cutoff, make_view, spread, straight_through
from .weight_exact import Exact

KINDS = ("soft", "soft per row", "hard", "hard per row", "step", "step per row", "mask")


@dataclass(frozen=True)
class Case:
    """A product of `x` `[m, k]` by a weight `[n, k]`, or `[k, n]` where `transposed`.

    Attributes:
        kind: of the view, and what shares a threshold: the matrix, or rows of the stored weight.
        master, product: dtypes of the weight and of x, "fp32" or "half", which is float16 or bfloat16 by the ring.
        layout, weight_layout: of x, the gradient of y and the masks; of the weight.
        splits, subtiles: of the tiles that are asked for where kernels are interpreted.
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

    def double(self) -> Operands:
        def doubled(value: object) -> object:
            return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value

        view = View(*map(doubled, self.view))
        return Operands(*(view if part is self.view else doubled(part) for part in self))


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
    dtypes = {"fp32": torch.float32, "half": half}

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, device=device)

    weight = normal(case.k, case.n) if case.transposed else normal(case.n, case.k)
    view = make_view(case.kind, weight, random, alpha=case.alpha, restricted=case.restricted)
    weight = away_from_cutoff(weight, view).to(dtypes[case.master])
    weight[torch.rand(weight.shape, generator=random, device=device) < 0.1] = 0.0
    masks = {
        name: laid_out(mask, case.layout) for name in ("mask", "grad_mask") if (mask := getattr(view, name)) is not None
    }
    x, grad_y = (laid_out(normal(case.m, size).to(dtypes[case.product]), case.layout) for size in (case.k, case.n))
    bias = normal(case.n).to(x.dtype) if case.bias else None
    return Operands(x, grad_y, laid_out(weight, case.weight_layout), view._replace(**masks), bias, case.transposed)


def products(given: Operands, backend: str, case: Case | None = None) -> dict[str, Tensor]:
    """By name; in the tiles of a case, or in those that the shapes call for."""
    x, grad_y, weight, view, bias, transposed = given
    how = {"transposed": transposed, "backend": backend}
    tiles = None if case is None else GemmTiles(16, 32, 32, case.splits)
    # grad_mask and alpha are dW's.
    forward = view._replace(grad_mask=None, alpha=None)
    found = {
        "y": fused_forward(x, weight, forward, bias, **how, tiles=tiles),
        "grad_x": fused_grad_input(grad_y, weight, forward, **how, tiles=tiles),
    }
    if view.kind != "step":
        grad_tiles = None if case is None else GradTiles(16, 16, 32 * case.subtiles, case.subtiles)
        found["grad_weight"], of_threshold = fused_grad_weight(grad_y, x, weight, view, **how, tiles=grad_tiles)
        assert (of_threshold is None) == (view.threshold is None)
        if of_threshold is not None:
            found["grad_threshold"] = of_threshold
    return found


def answer(given: Operands) -> tuple[dict[str, Tensor], float]:
    """The results in float64, by autograd of published code; and the norm of the terms of the threshold's gradient."""
    x, grad_y, weight, view, bias, transposed = given.double()
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    each = view.threshold
    if each is not None:
        each = spread(each, weight).clone().requires_grad_()
    w_hat = straight_through(weight, view._replace(threshold=each))
    y = x @ (w_hat if transposed else w_hat.t()) + (0.0 if bias is None else bias)
    found = {"y": y.detach()}
    leaves = {"grad_x": x, "grad_weight": weight}
    found |= dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), grad_y, retain_graph=True), strict=True))
    if each is None or view.threshold is None:
        return found, 0.0
    terms = torch.zeros_like(weight)
    if view.kind != "hard":
        (terms,) = torch.autograd.grad(y, each, grad_y)
    found["grad_threshold"] = terms.sum_to_size(view.threshold.shape[0], 1).view(-1)
    return found, terms.norm().item()


def check(
    case: Case,
    bound: Callable[[torch.dtype, torch.dtype, int], float],
    device: str = "cpu",
    half: torch.dtype = torch.float16,
    *,
    computed_tiles: bool = False,
) -> None:
    """The kernels are as exact as the two steps of the reference, twice bit for bit.

    Args:
        bound: the relative RMS error that is allowed in any case, of dtypes of operands and result and a sum's length.
        computed_tiles: use the tiles that the shapes call for, and not the case's.
    """
    given = operands(case, device, half)
    exact, terms = answer(given)
    tiles = None if computed_tiles else case
    reference, actual, again = (products(given, backend, tiles) for backend in ("torch", "triton", "triton"))
    assert actual.keys() == reference.keys()
    lengths = {"y": case.k, "grad_x": case.n, "grad_weight": case.m, "grad_threshold": case.m}
    for name, value in actual.items():
        assert value.dtype == reference[name].dtype and value.shape == exact[name].shape and value.is_contiguous(), name
        assert same(value, again[name]), f"{name}: another result the second time"
        allowed = max(1.1 * error(reference[name], exact[name]), bound(given.x.dtype, value.dtype, lengths[name]))
        if name == "grad_threshold":
            # A sum of both signs: measured against the norm of its terms.
            assert (value - exact[name]).norm().item() <= 5 * bound(given.x.dtype, value.dtype, case.m) * terms
        else:
            assert error(value, exact[name]) <= allowed, f"{name}: {error(value, exact[name]):.2e}"


def check_exact(case: Exact, backend: str, device: str = "cpu") -> None:
    """Products with 1 give S(W) column by column, and dW row by row, to the bit.

    One column or row at a time: in a product of more, NaN and infinity meet zeros.
    """
    weight, one = torch.tensor(case.weight, device=device), torch.ones(1, 1, device=device)
    view = View(*(part.to(device) if isinstance(part, Tensor) else part for part in case.view))

    def part(rows: slice, columns: slice) -> View:
        cut = {name: mask[rows, columns] for name in ("mask", "grad_mask") if (mask := getattr(view, name)) is not None}
        threshold = view.threshold
        if threshold is not None and threshold.numel() > 1:
            cut["threshold"] = threshold[rows]
        return view._replace(**cut)

    everything = slice(None)
    columns = []
    for j in range(weight.shape[1]):
        forward = part(everything, slice(j, j + 1))._replace(grad_mask=None, alpha=None)
        columns.append(fused_forward(one, weight[:, j : j + 1], forward, backend=backend).t())
    assert same(torch.cat(columns, 1), torch.tensor(case.w_hat, device=device))
    if case.grad is None or view.kind == "step":
        return
    found = [
        fused_grad_weight(
            one,
            torch.tensor([row], device=device),
            weight[i : i + 1],
            part(slice(i, i + 1), everything),
            backend=backend,
        )
        for i, row in enumerate(case.grad)
    ]
    assert same(torch.cat([row for row, _ in found]), torch.tensor(case.grad_weight, device=device))
    if case.grad_threshold is None:
        assert all(ds is None for _, ds in found)
        return
    of_rows = torch.cat([ds for _, ds in found])
    total = of_rows.sum_to_size(len(case.grad_threshold))
    torch.testing.assert_close(total, torch.tensor(case.grad_threshold, device=device), rtol=0, atol=0, equal_nan=True)
