"""Cases of `sparse_input_linear` and `sparse_input_conv2d`, which every ring runs."""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tritonsparse.kernels.activation.conv2d import sparse_input_conv2d
from tritonsparse.kernels.activation.linear import sparse_input_linear
from tritonsparse.kernels.activation.packing import Packing

from .matrices import Readable, pairwise
from .product import Product


@dataclass(frozen=True)
class Case(Readable):
    """An x of `shape`, "normal", after a "relu", all "ones" or normal with a "NaN", and how it is packed.

    `conv`: what `sparse_input_conv2d` takes beside a kernel of 2 x 3, if it does. `masked`: some rows do not count.
    """

    shape: tuple[int, ...]
    conv: dict[str, Any] | None = None
    transposed: bool = False
    scope: str = "batch"
    cutoff: float | str | None = None
    masked: bool = False
    density: float = 0.2
    slack: float = 1.25
    bias: bool = True
    values: str = "normal"
    out: int = 6


GROUPED = {"stride": (2, 1), "padding": (1, 0), "dilation": (1, 2), "groups": 2}
CASES = [
    *(
        Case(**values)
        for values in pairwise(
            shape=((6, 70), (2, 3, 70), (70,)), transposed=(False, True), scope=("batch", "sample", "plane"),
            cutoff=(None, 1.3, "a row"), masked=(False, True), slack=(1.25, math.inf), bias=(True, False),
        )
    ),
    # All of x; more than there is room for; nothing; zeros, which take none; ties; NaN.
    Case((4, 33), density=1.0), Case((6, 70), density=0.1, cutoff=0.2), Case((0, 70)), Case((2, 4, 7, 6), GROUPED),
    Case((20, 70), values="relu", slack=1.0), Case((4, 8), values="ones", density=0.25), Case((6, 70), values="NaN"),
    Case((6, 70), density=0.1, cutoff=math.nan, transposed=True), Case((2, 4, 7, 6), GROUPED, values="NaN"),
    *(
        Case((2, 4, 7, 6), GROUPED, **values)
        for values in pairwise(scope=("batch", "sample", "plane"), cutoff=(0.2, "a row"), masked=(True, False))
    ),
    Case((2, 3, 5, 5), {"padding": (1, 1)}, bias=False, slack=math.inf),
]  # fmt: skip
LINEAR, CONV = Case((2, 3, 70), transposed=True, masked=True, scope="plane"), Case((2, 4, 7, 6), GROUPED)
LARGE = [
    replace(case, cutoff=cutoff)
    for case in (
        Case((8, 128, 512), masked=True, out=256),
        Case((300, 511), transposed=True, scope="plane", out=300),
        Case((8, 64, 30, 29), GROUPED, out=96),
    )
    for cutoff in (None, 0.5)
]


def product(case: Case, dtype: torch.dtype = torch.float64, device: str = "cpu") -> Product:
    random = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, device=device).to(dtype)

    x, options = normal(*case.shape), case.conv or {"transposed": case.transposed}
    if case.values == "NaN":
        x[(1, 1, 3, 2)[: x.dim()]] = math.nan
    x = {"relu": (x - 1.2816).relu(), "ones": torch.ones_like(x)}.get(case.values, x)
    if case.conv is not None:
        rows, w_hat = x.flatten(2), normal(case.out, case.shape[1] // options.get("groups", 1), 2, 3)
    else:
        rows, w_hat = x, normal(*((x.shape[-1], case.out) if case.transposed else (case.out, x.shape[-1])))
    leading, cutoff = rows.shape[:-1], None
    if case.cutoff is not None:
        a_row = 1 + torch.rand(leading.numel(), generator=random, device=device)
        cutoff = a_row if case.cutoff == "a row" else torch.full((1,), float(case.cutoff), device=device)
    row_mask = torch.rand(leading, generator=random, device=device) < 0.7 if case.masked and leading else None
    packing = Packing(case.density, case.scope, case.slack, cutoff, row_mask)

    def dense(x: Tensor, w_hat: Tensor, bias: Tensor | None) -> Tensor:
        if case.conv is not None:
            return F.conv2d(x, w_hat, bias, **options)
        return F.linear(x, w_hat.t() if case.transposed else w_hat, bias)

    used, share = _cutoff(rows, packing), min(1.0, case.density * case.slack)
    kept = ~(rows.reshape(-1, rows.shape[-1]).double().abs() < used.double()[:, None])
    kept = (kept if row_mask is None else kept & row_mask.view(-1, 1)).view(case.shape) & (x != 0)
    overflow = torch.tensor(share < 1 and int(kept.sum()) > math.ceil(share * x.numel()))
    function, bias = sparse_input_conv2d if case.conv else sparse_input_linear, normal(case.out) if case.bias else None
    return Product(
        function, x, w_hat, bias, dense, normal(*dense(x, w_hat, bias).shape), (packing,), options,
        x_hat=torch.where(kept, x, 0.0), also={"cutoff": used, "overflow": overflow},
    )  # fmt: skip


def _cutoff(rows: Tensor, packing: Packing) -> Tensor:
    """The magnitude that the round-half-up(density n) largest of what counts in each group reach."""
    if packing.cutoff is not None:
        return packing.cutoff
    leading = rows.shape[:-1]
    counted = torch.ones(leading, dtype=torch.bool) if packing.row_mask is None else packing.row_mask.cpu()
    groups = {"batch": 1, "sample": leading[0] if leading else 1, "plane": leading.numel()}[packing.scope]
    per_group = leading.numel() // groups if groups else 0
    magnitude, cutoffs = rows.double().abs().cpu().reshape(leading.numel(), rows.shape[-1]), []
    for g in range(groups):
        part = slice(g * per_group, (g + 1) * per_group)
        values = magnitude[part][counted.view(-1)[part]].flatten()
        ordered = values.nan_to_num(math.inf).sort(descending=True).values
        k = max(1, math.floor(packing.density * values.numel() + 0.5))
        last = ordered[k - 1].item() if values.numel() else math.inf
        cutoffs += [last] * (1 if packing.scope == "batch" else per_group)
    return torch.tensor(cutoffs, dtype=torch.float64, device=rows.device)
