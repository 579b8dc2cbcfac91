"""Cases of `sparse_input_linear` and `sparse_input_conv2d`, and their answer in float64, which every ring runs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tritonsparse.kernels.activation.conv2d import sparse_input_conv2d
from tritonsparse.kernels.activation.linear import sparse_input_linear
from tritonsparse.kernels.activation.packing import Packing

from .matrices import error, pairwise

F64 = torch.float64


@dataclass(frozen=True)
class Case:
    """A product of x and the effective weight, and how x is packed.

    Attributes:
        shape: of x.
        out: output features.
        conv: the kernel's sides and what `sparse_input_conv2d` takes beside them; None = a linear product.
        cutoff: given, one for all or "a row"; None = fresh.
        masked: some rows do not count.
    """

    shape: tuple[int, ...]
    out: int = 5
    transposed: bool = False
    conv: tuple[tuple[int, int], dict[str, Any]] | None = None
    scope: str = "batch"
    cutoff: float | str | None = None
    masked: bool = False
    density: float = 0.2
    slack: float = 1.25
    bias: bool = True

    def __str__(self) -> str:
        cutoff = "fresh" if self.cutoff is None else self.cutoff
        options = (f"density {self.density}", f"slack {self.slack}", self.scope, f"cutoff {cutoff}")
        flags = [name for name in ("transposed", "conv", "masked") if getattr(self, name)]
        return ", ".join((str(list(self.shape)), *options, *flags))

    @property
    def function(self) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
        return sparse_input_conv2d if self.conv else sparse_input_linear

    @property
    def options(self) -> dict[str, Any]:
        return self.conv[1] if self.conv else {"transposed": self.transposed}


GROUPED = ((2, 3), {"stride": (2, 1), "padding": (1, 0), "dilation": (1, 2), "groups": 2})
CASES = [
    *(
        Case(**values)
        for values in pairwise(
            shape=((6, 70), (2, 3, 70), (70,)), transposed=(False, True), scope=("batch", "sample", "plane"),
            cutoff=(None, 1.3, "a row"), masked=(False, True), slack=(1.25, math.inf), bias=(True, False),
        )
    ),
    Case((4, 33), density=1.0),
    # More is kept than there is room for; ties at the cut-off; a cut-off that keeps all.
    Case((6, 70), density=0.1, cutoff=0.2),
    Case((6, 70), density=0.1, cutoff=math.nan, transposed=True),
    Case((0, 70)),
    *(
        Case((2, 4, 7, 6), conv=GROUPED, **values)
        for values in pairwise(scope=("batch", "sample", "plane"), cutoff=(None, 0.2, "a row"), masked=(False, True))
    ),
    Case((2, 3, 5, 5), conv=((3, 3), {"padding": (1, 1)}), bias=False, slack=math.inf),
]  # fmt: skip
LARGE = [
    replace(case, shape=shape, out=out, cutoff=cutoff)
    for case, shape, out in (
        (Case((1, 1), masked=True), (8, 128, 512), 256),
        (Case((1, 1), transposed=True, scope="plane"), (300, 511), 300),
        (Case((1, 1), conv=GROUPED), (8, 64, 30, 29), 96),
    )
    for cutoff in (None, 0.5)
]


class Operands(NamedTuple):
    """Of one case; x and w_hat are leaves."""

    case: Case
    x: Tensor
    w_hat: Tensor
    bias: Tensor | None
    packing: Packing
    grad_y: Tensor

    @property
    def leaves(self) -> dict[str, Tensor]:
        named = {"x": self.x, "w_hat": self.w_hat, "bias": self.bias}
        return {name: leaf for name, leaf in named.items() if leaf is not None}


def operands(case: Case, dtype: torch.dtype = F64, device: str = "cpu") -> Operands:
    random = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, device=device).to(dtype)

    out = case.out if case.conv is None else 2 * case.out
    if case.conv is None:
        features = case.shape[-1]
        w_hat, leading = normal(features, out) if case.transposed else normal(out, features), case.shape[:-1]
    else:
        w_hat, leading = normal(out, case.shape[1] // case.options.get("groups", 1), *case.conv[0]), case.shape[:2]
    cutoff: Tensor | None = None
    if case.cutoff is not None:
        size = math.prod(leading) if case.cutoff == "a row" else 1
        cutoff = 1 + torch.rand(size, generator=random, device=device)
        cutoff = cutoff if case.cutoff == "a row" else torch.full_like(cutoff, float(case.cutoff))
    row_mask = torch.rand(leading, generator=random, device=device) < 0.7 if case.masked and leading else None
    packing = Packing(case.density, case.scope, case.slack, cutoff, row_mask)
    x, bias = normal(*case.shape), normal(out) if case.bias else None
    for leaf in (x, w_hat, bias):
        if leaf is not None:
            leaf.requires_grad_()
    return Operands(case, x, w_hat, bias, packing, normal(*_product(case, x, w_hat, bias).shape))


def _product(case: Case, x: Tensor, w_hat: Tensor, bias: Tensor | None) -> Tensor:
    if case.conv is not None:
        return F.conv2d(x, w_hat, bias, **case.options)
    return F.linear(x, w_hat.t() if case.transposed else w_hat, bias)


def run(o: Operands, backend: str = "torch", function: Callable[..., Any] | None = None) -> dict[str, Tensor]:
    """Results, and the gradients of all leaves."""
    call = function or o.case.function
    y, cutoff, overflow = call(o.x, o.w_hat, o.bias, o.packing, backend=backend, **o.case.options)
    gradients = torch.autograd.grad(y, list(o.leaves.values()), o.grad_y)
    found = {"y": y.detach(), "cutoff": cutoff, "overflow": overflow}
    return found | dict(zip(o.leaves, gradients, strict=True))


def answer(o: Operands) -> dict[str, Tensor]:
    """The same in float64: autograd of the product, with the kept part of x for the gradient of w_hat alone."""
    case, p = o.case, o.packing
    x, w_hat = (leaf.detach().double().requires_grad_() for leaf in (o.x, o.w_hat))
    bias = None if o.bias is None else o.bias.detach().double().requires_grad_()
    rows = x.detach().reshape(*case.shape[:2], -1) if case.conv else x.detach()
    kept, cutoff = _kept(rows, p)
    y, grad_y = _product(case, x, w_hat, bias), o.grad_y.double()
    found = {"y": y.detach(), "x": torch.autograd.grad(y, x, grad_y, retain_graph=True)[0]}
    if bias is not None:
        found["bias"] = torch.autograd.grad(y, bias, grad_y)[0]
    x_hat = torch.where(kept.view(case.shape), x.detach(), 0.0)
    found["w_hat"] = torch.autograd.grad(_product(case, x_hat, w_hat, None), w_hat, grad_y)[0]
    share = min(1.0, case.density * case.slack)
    found["overflow"] = torch.tensor(
        share < 1 and int((kept & (rows.reshape(kept.shape) != 0)).sum()) > math.ceil(share * rows.numel())
    )
    return found | {"cutoff": cutoff}


def _kept(rows: Tensor, p: Packing) -> tuple[Tensor, Tensor]:
    """Which elements of x `[..., K]` the packing keeps, and the cut-off."""
    k, leading = rows.shape[-1], rows.shape[:-1]
    counted = torch.ones(leading, dtype=torch.bool, device=rows.device) if p.row_mask is None else p.row_mask
    counted = counted.reshape(-1, 1).expand(-1, k)
    magnitude = rows.reshape(-1, k).abs()
    if p.cutoff is not None:
        return counted & ~(magnitude < p.cutoff.double()[:, None]), p.cutoff
    m = magnitude.shape[0]
    groups = {"batch": 1, "sample": leading[0] if leading else 1, "plane": m}[p.scope]
    # The round-half-up(density n) largest of what counts in each group.
    kept, cutoffs = torch.zeros_like(counted), []
    for g in range(groups):
        part = slice(g * (m // groups), (g + 1) * (m // groups))
        n = int(counted[part].sum())
        values = torch.where(counted[part], magnitude[part], -1.0).flatten()
        places = values.argsort(descending=True)[: max(1, math.floor(p.density * n + 0.5)) if n else 0]
        kept[part] = torch.zeros_like(values, dtype=torch.bool).index_fill(0, places, True).view(kept[part].shape)
        cutoffs += [values[places[-1]].item() if n else math.inf] * (1 if p.scope == "batch" else m // groups)
    return kept, torch.tensor(cutoffs, dtype=F64, device=rows.device)


def errors(found: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    """Relative RMS of every result but the packing's own, which are asserted."""
    assert found.keys() == exact.keys()
    torch.testing.assert_close(found["cutoff"].double(), exact["cutoff"].double(), rtol=0, atol=0, equal_nan=True)
    overflow = found["overflow"]
    assert bool(overflow) == bool(exact["overflow"]) and overflow.shape == () and overflow.device.type == "cpu"
    return {name: error(found[name], exact[name]) for name in found if name not in ("cutoff", "overflow")}
