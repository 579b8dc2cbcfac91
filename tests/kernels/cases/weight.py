"""Cases of `threshold_cast`, `threshold_backward` and their whole-model forms, which every ring runs."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from tritonsparse.kernels.weight.backward import threshold_backward
from tritonsparse.kernels.weight.backward_many import backward_many
from tritonsparse.kernels.weight.forward import threshold_cast
from tritonsparse.kernels.weight.forward_many import cast_many
from tritonsparse.kernels.weight.table import Viewed, ViewTable
from tritonsparse.kernels.weight.view import View

from .matrices import error, laid_out, pairwise, same

KINDS = (
    *("soft", "soft per row", "soft per column", "soft per block", "hard", "hard per row", "hard per block"),
    *("step", "step per row", "step per column", "step per block", "mask"),
)


@dataclass(frozen=True)
class Case:
    """A weight `[n, k]` and its view, whose kind says what shares a threshold: blocks of 16 columns where 16 divides k.

    "half" is float16 or bfloat16 by the ring, `other_layout` that of the mask and the gradient; `restricted`: by a
    grad_mask. Kind "step" takes neither alpha nor that.
    """

    n: int
    k: int
    kind: str
    master: str = "fp32"
    product: str = "fp32"
    layout: str = "contiguous"
    other_layout: str = "contiguous"
    alpha: float | None = 0.25
    restricted: bool = True

    def __str__(self) -> str:
        gradient = f", alpha {self.alpha}{', B' if self.restricted else ''}"
        return f"{self.kind}, {self.n}x{self.k}, {self.master} > {self.product}, {self.layout}{gradient}"


class Operands(NamedTuple):
    weight: Tensor
    view: View
    grad: Tensor
    product: torch.dtype

    def double(self) -> "Operands":
        view = View(*(t.double() if isinstance(t, Tensor) and t.is_floating_point() else t for t in self.view))
        return Operands(self.weight.double(), view, self.grad.double(), torch.float64)


class Answer(NamedTuple):
    """What a correct function returns, in float64; `terms` is the norm of what is summed into `grad_threshold`."""

    w_hat: Tensor
    grad_weight: Tensor
    grad_threshold: Tensor | None
    terms: float


def check_empty(shape: tuple[int, int], backend: str) -> None:
    """It has an empty effective weight and zero gradients, also as one of two layers."""
    weight = torch.zeros(shape)
    for s in (torch.zeros(1), torch.zeros(shape[0])):
        view, other = View("soft", s), Viewed(torch.ones(3, 16), View("soft", torch.zeros(3)), torch.empty(3, 16))
        assert threshold_cast(weight, view, backend=backend).shape == shape
        grad_weight, grad_threshold = threshold_backward(weight, weight, view, backend=backend)
        assert grad_weight.shape == shape and torch.equal(grad_threshold, torch.zeros_like(s))
        table = ViewTable([Viewed(weight, view, weight.clone()), other], backend)
        cast_many(table)
        assert other.w_hat.tolist() == [[0.5] * 16] * 3
        of_thresholds = backward_many(table, [weight.clone(), None])
        assert torch.equal(of_thresholds[0], grad_threshold) and of_thresholds[1].tolist() == [0.0] * 3


# Around one tile of 64 and its multiples; single rows and columns.
CASES = [
    Case(**values)
    for values in pairwise(
        n=(1, 63, 64, 130), k=(1, 64, 65, 128), kind=KINDS, master=("fp32", "half"), product=("fp32", "half"),
        layout=("contiguous", "transposed", "strided"), other_layout=("contiguous", "transposed", "strided"),
        alpha=(None, 0.0, 0.25, 1.0), restricted=(False, True),
    )
]  # fmt: skip
# For a GPU: nothing divisible, several rows and columns of tiles, layers.
LARGE = [
    Case(*values.pop("shape"), **values)
    for values in pairwise(
        shape=((1, 129), (257, 1), (127, 513), (1000, 511), (2048, 512)),
        kind=("soft", "soft per row", "soft per block", "hard", "step per row", "mask"), master=("fp32", "half"),
        product=("fp32", "half"),
    )
]  # fmt: skip


def make_view(kind: str, weight: Tensor, random: torch.Generator, *, alpha: float | None, restricted: bool) -> View:
    (n, k), device, (kind, _, per) = weight.shape, weight.device, kind.partition(" per ")

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=random, device=device)

    threshold = mask = None
    if kind == "mask":
        mask = uniform(n, k) < 0.3
    else:
        blocks = (1 if n % 2 else 2, k // 16) if k % 16 == 0 else (n,)
        threshold = uniform(*{"": (1,), "row": (n,), "column": (1, k), "block": blocks}[per])
        # sigmoid of these, and they themselves, prune some half of normal weights.
        threshold = 2 * threshold - 1 if kind == "soft" else threshold
    if kind == "step":
        return View(kind, threshold)
    grad_mask = uniform(n, k) < 0.5 if restricted else None
    return View(kind, threshold, mask, grad_mask, None if alpha is None else torch.tensor(alpha, device=device))


def away_from_cutoff(weight: Tensor, view: View) -> Tensor:
    """The weights, moved where rounding could put them on the other side of their cut-off, or of the reach of H."""
    if view.threshold is None or not weight.numel():
        return weight
    cutoff = spread(view.threshold.sigmoid() if view.kind == "soft" else view.threshold, weight)
    for edge in (0.0, 0.4, 1.0) if view.kind == "step" else (0.0,):
        near = ((weight.abs() - cutoff).abs() - edge).abs() < 2e-2
        weight = torch.where(near, weight + 5e-2 * weight.sign(), weight)
    return weight


def operands(case: Case, device: str = "cpu", half: torch.dtype = torch.float16) -> Operands:
    """Random operands of one case; a tenth of the weights are zeros."""
    random = torch.Generator(device).manual_seed(0)
    dtypes = {"fp32": torch.float32, "half": half}
    weight = torch.randn(case.n, case.k, generator=random, device=device)
    view = make_view(case.kind, weight, random, alpha=case.alpha, restricted=case.restricted)
    weight = away_from_cutoff(weight, view).to(dtypes[case.master])
    weight[torch.rand(weight.shape, generator=random, device=device) < 0.1] = 0.0
    grad = torch.randn(case.n, case.k, generator=random, device=device).to(dtypes[case.product])
    if view.mask is not None:
        view = view._replace(mask=laid_out(view.mask, case.other_layout))
    if view.grad_mask is not None:
        view = view._replace(grad_mask=laid_out(view.grad_mask, case.layout))
    return Operands(laid_out(weight, case.layout), view, laid_out(grad, case.other_layout), dtypes[case.product])


def spread(threshold: Tensor, weight: Tensor) -> Tensor:
    """One value a weight of what its row, column, block or matrix shares."""
    if threshold.dim() == 1:
        threshold = threshold[:, None]
    (n, k), (rows, columns) = weight.shape, threshold.shape
    return threshold.repeat_interleave(n // rows, 0).repeat_interleave(k // columns, 1)


def straight_through(weight: Tensor, view: View) -> Tensor:
    """S(W) as published code writes it, from which autograd makes the gradients.

    u - u.detach() is worth 0 and has gradient 1: `leak` of it is what a pruned weight lets through.
    """
    kind, threshold, mask, grad_mask, alpha = view
    leak = torch.zeros_like(weight) if alpha is None else alpha * torch.ones_like(weight)
    if grad_mask is not None:
        leak = leak * grad_mask
    if kind == "mask":
        return weight * mask + leak * ~mask * (weight - weight.detach())
    if kind == "hard":
        kept = weight.abs() > spread(threshold, weight)
        return weight * kept + leak * ~kept * (weight - weight.detach())
    if kind == "soft":
        u = weight.abs() - spread(threshold.sigmoid(), weight)
        return weight.sign() * (u.relu() + leak * (u <= 0) * (u - u.detach()))
    q = weight.abs() - spread(threshold, weight)
    size = q.detach().abs()
    slope = (2 - 4 * size) * (size <= 0.4) + 0.4 * (size > 0.4) * (size <= 1)
    return weight * ((q > 0) + slope * (q - q.detach()))


def answer(given: Operands) -> Answer:
    exact = given.double()
    weight, threshold = exact.weight.clone().requires_grad_(), exact.view.threshold
    if threshold is None or exact.view.kind == "hard":
        w_hat = straight_through(weight, exact.view)
        (grad_weight,) = torch.autograd.grad(w_hat, weight, exact.grad)
        zeros = None if threshold is None else torch.zeros_like(threshold)
        return Answer(w_hat.detach(), grad_weight, zeros, 0.0)
    # A threshold a weight, of which each has its own gradient: the terms.
    each = spread(threshold, weight).clone().requires_grad_()
    w_hat = straight_through(weight, exact.view._replace(threshold=each))
    grad_weight, terms = torch.autograd.grad(w_hat, (weight, each), exact.grad)
    leaf = threshold.clone().requires_grad_()
    (grad_threshold,) = torch.autograd.grad(spread(leaf, weight), leaf, terms)
    return Answer(w_hat.detach(), grad_weight, grad_threshold, terms.norm().item())


def check_close(name: str, actual: Tensor, reference: Tensor, exact: Tensor, floor: float) -> None:
    """As exact as the reference in the same dtypes, but for a tenth and `floor`."""
    assert actual.dtype == reference.dtype and actual.shape == reference.shape, name
    assert error(actual, exact) <= max(1.1 * error(reference, exact), floor), f"{name}: {error(actual, exact):.2e}"


def check_threshold(actual: Tensor | None, exact: Answer, floor: float) -> None:
    """Its gradient is a sum of both signs: measured against the norm of the terms."""
    assert (actual is None) == (exact.grad_threshold is None)
    if actual is not None and exact.grad_threshold is not None:
        assert actual.shape == exact.grad_threshold.shape and actual.dtype == torch.float32
        assert (actual.double() - exact.grad_threshold).abs().max().item() <= floor * exact.terms


def alike(actual: Tensor | None, expected: Tensor | None) -> bool:
    """Bit for bit, or neither is there."""
    return actual is expected is None or (actual is not None and expected is not None and same(actual, expected))


def check(case: Case, floor: float, device: str = "cpu", half: torch.dtype = torch.float16) -> None:
    """The kernels are as exact as the reference, twice bit for bit; results are contiguous, in the right dtypes."""
    given = operands(case, device, half)
    exact = answer(given)

    def results(backend: str) -> tuple[Tensor, Tensor, Tensor | None]:
        w_hat = threshold_cast(given.weight, given.view, out_dtype=given.product, backend=backend)
        return w_hat, *threshold_backward(given.grad, given.weight, given.view, backend=backend)

    reference, actual, again = results("torch"), results("triton"), results("triton")
    assert actual[0].dtype == given.product and actual[1].dtype == given.weight.dtype
    assert actual[0].is_contiguous() and actual[1].is_contiguous()
    check_close("w_hat", actual[0], reference[0], exact.w_hat, floor)
    check_close("grad_weight", actual[1], reference[1], exact.grad_weight, floor)
    check_threshold(actual[2], exact, floor)
    assert all(map(alike, actual, again))


def layers(cases: Sequence[Case], device: str, half: torch.dtype) -> tuple[list[Viewed], list[Tensor]]:
    given = [operands(replace(c, layout="contiguous", other_layout="contiguous"), device, half) for c in cases]
    viewed = [Viewed(o.weight, o.view, o.weight.new_empty(o.weight.shape, dtype=o.product)) for o in given]
    return viewed, [o.grad.to(o.weight.dtype) for o in given]


def check_many(cases: Sequence[Case], floor: float, device: str = "cpu", half: torch.dtype = torch.float16) -> None:
    """The cases as the layers of one model, twice bit for bit; the second gets no gradient."""
    cases = [case for case in cases if "column" not in case.kind]
    viewed, dense = layers(cases, device, half)
    table, references = ViewTable(viewed, "triton"), ViewTable(layers(cases, device, half)[0], "torch")
    grads, again, expected = ([None if i == 1 else g.clone() for i, g in enumerate(dense)] for _ in range(3))
    cast_many(table)
    cast_many(references)
    of_thresholds, repeated = backward_many(table, grads), backward_many(table, again)
    backward_many(references, expected)
    for i, (layer, reference) in enumerate(zip(viewed, references.layers, strict=True)):
        exact = answer(Operands(layer.weight, layer.view, dense[i], layer.weight.dtype))
        check_close("w_hat", layer.w_hat, reference.w_hat, exact.w_hat, floor)
        ds = of_thresholds[i]
        if i == 1:
            assert ds is None or not ds.any()
            continue
        check_close("grad", grads[i], expected[i], exact.grad_weight, floor)
        check_threshold(ds, exact, floor)
        assert same(grads[i], again[i]) and (ds is None or same(ds, repeated[i]))
