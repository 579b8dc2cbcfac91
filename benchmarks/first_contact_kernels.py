"""Steps of `first_contact.py` on single kernels: ceilings, threshold and cast, fused dW, exact top-k.

    ceilings    a copy from device to device; a product of 8192^3 in bf16: what any kernel here can reach
    threshold   Ŵ = S(W), fp32 to bf16, of a layer and of a whole model in one launch; beside a copy of as many bytes
    grad        dW with multiplier and threshold's gradient in the product's epilogue; beside the plain product, with
                the tiles that serialise the matrix unit and with those that do not
    topk        the exact cut-off of the 10 % largest of 1.2e9 weights; beside one read of them

A top-k is checked by counting what lies above its cut-off and at it, not by sorting.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tritonsparse.kernels.fused.grad import GradTiles, fused_grad_weight
from tritonsparse.kernels.select._keys import tile_table
from tritonsparse.kernels.select.topk import Cutoff, topk_cutoff
from tritonsparse.kernels.weight.backward import threshold_backward
from tritonsparse.kernels.weight.forward import threshold_cast
from tritonsparse.kernels.weight.forward_many import cast_many
from tritonsparse.kernels.weight.reference import effective_weight_reference
from tritonsparse.kernels.weight.table import Viewed, ViewTable
from tritonsparse.kernels.weight.view import View

sys.path.append(str(Path(__file__).parent))  # PYTHONSAFEPATH keeps a script's own folder off it
from first_contact_child import Context
from first_contact_timing import ROUNDOFF, Bound, Case, Provider, Settings, backend, device, draw, run_cases, sets_of

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# sigmoid(-4) = 0.018 prunes 63 % of N(0, 0.02²).
LOGIT, DEVIATION, ALPHA = -4.0, 0.02, 0.4
# Beside the fused dW's own tiles, by whether they fill the device with 256 columns each: a loop whose matrix
# instructions ptxas serialises (C7515), as all were until 2026-11, and half the parts in the epilogue.
WAITING = {True: GradTiles(64, 128, 256, 8, 8, 4, 0), False: GradTiles(64, 128, 128, 4, 8, 4, 0)}
FEWER_PARTS = {True: GradTiles(64, 128, 256, 4, 8, 4), False: GradTiles(64, 128, 128, 2, 8, 4)}
WEIGHTS, KEPT = 1_200_000_000, 0.1
SAID_RIGHT, SAID_WRONG = 1.0, float("nan")


def _said(right: bool) -> Tensor:
    """A yes or no as a result that is compared with 1: a number for yes, NaN for no."""
    return torch.tensor([SAID_RIGHT if right else SAID_WRONG])


def ceilings(smoke: bool) -> Iterator[Case]:
    n, nbytes = (64, 2**12) if smoke else (8192, 2**32)
    dtype = FP32 if smoke else BF16

    def copy() -> list[Provider]:
        random = torch.Generator(device()).manual_seed(0)
        source = draw(random, nbytes // 8)
        target = torch.empty_like(source)
        return [Provider("copy", [partial(target.copy_, source)], None)]

    def product() -> list[Provider]:
        random = torch.Generator(device()).manual_seed(0)
        pairs = [(draw(random, n, n, dtype=dtype), draw(random, n, n, dtype=dtype)) for _ in range(2)]
        a, b = pairs[0]
        calls = [partial(torch.mm, *pair) for pair in pairs]
        return [Provider("dense", calls, lambda: (a.double() @ b.double(),), Bound.of_product(n, dtype))]

    yield Case("copy", 3, {"op": "copy", "bytes": nbytes}, copy)
    yield Case(f"product {n}^3", 4, {"op": "product", "n": n, "flops": 2 * n**3}, product)


def _weight(random: torch.Generator, n: int, k: int) -> Tensor:
    """Normal values, none within a millionth of the cut-off: on which side rounding puts those is no error."""
    weight = draw(random, n, k, scale=DEVIATION)
    if Settings.empty:
        return weight
    cutoff = torch.tensor(LOGIT, device=weight.device).sigmoid()
    return torch.where((weight.abs() / cutoff - 1).abs() < 1e-6, 1.01 * weight, weight)


def threshold(smoke: bool) -> Iterator[Case]:
    out = FP16 if smoke else BF16
    bound = Bound(ROUNDOFF[out] + 1e-6, ROUNDOFF[out] + 1e-6)

    def copy(nbytes: int) -> Provider:
        source = [torch.ones(nbytes // 8, device=device()) for _ in range(sets_of(nbytes))]
        target = [torch.empty_like(each) for each in source]
        return Provider("copy", [partial(t.copy_, s) for s, t in zip(source, target, strict=True)], None)

    def layer(n: int, k: int, nbytes: int) -> list[Provider]:
        random = torch.Generator(device()).manual_seed(0)
        weights = [_weight(random, n, k) for _ in range(sets_of(nbytes))]
        logit = torch.full((1,), LOGIT, device=device())
        cast = partial(threshold_cast, view=View("soft", logit), out_dtype=out, backend=backend())

        def exact() -> tuple[Tensor, ...]:
            return (effective_weight_reference(weights[0].double(), View("soft", logit.double()), torch.float64),)

        calls = [partial(cast, weight) for weight in weights]
        ratios = ((f"cast {n}x{k} / copy", "T17", 1.0),)
        return [copy(nbytes), Provider("ours", calls, exact, bound, ratios=ratios)]

    def model(shapes: list[tuple[int, int]], nbytes: int) -> list[Provider]:
        random = torch.Generator(device()).manual_seed(0)
        layers = []
        for n, k in shapes:
            view = View("soft", torch.full((1,), LOGIT, device=device()))
            layers.append(Viewed(_weight(random, n, k), view, torch.empty(n, k, dtype=out, device=device())))
        table = ViewTable(layers, backend())

        def exact() -> tuple[Tensor, ...]:
            view = View("soft", torch.full((1,), LOGIT, device=device(), dtype=torch.float64))
            return tuple(effective_weight_reference(layer.weight.double(), view, torch.float64) for layer in layers)

        def result(made: Any) -> tuple[Tensor, ...]:
            return tuple(layer.w_hat for layer in layers if layer.w_hat is not None)

        ratios = (("cast of a whole model / copy", "T17", 1.0),)
        ours = Provider("ours", [partial(cast_many, table)], exact, bound, ratios=ratios, result=result)
        return [copy(nbytes), ours]

    for n, k in ((96, 80), (65, 130)) if smoke else ((4096, 1024), (11008, 4096)):
        nbytes = n * k * (4 + out.itemsize)
        yield Case(f"cast {n}x{k}", 4, {"op": "cast", "n": n, "k": k, "bytes": nbytes}, partial(layer, n, k, nbytes))
    big = [(1024, 1024)] * 72 + [(4096, 1024), (1024, 4096)] * 12
    shapes = [(96, 80), (33, 17)] if smoke else big
    nbytes = sum(n * k for n, k in shapes) * (4 + out.itemsize)
    yield Case("cast of a model", 4, {"op": "cast many", "bytes": nbytes}, partial(model, shapes, nbytes))


def grad(smoke: bool) -> Iterator[Case]:
    dtype = FP16 if smoke else BF16

    def providers(n: int, k: int, m: int) -> list[Provider]:
        random = torch.Generator(device()).manual_seed(0)
        sets = [
            (draw(random, m, n, dtype=dtype), draw(random, m, k, dtype=dtype), _weight(random, n, k))
            for _ in range(sets_of(4 * n * k + 2 * m * (n + k)))
        ]
        logit, alpha = torch.full((1,), LOGIT, device=device()), torch.full((), ALPHA, device=device())
        view = View("soft", logit, alpha=alpha)
        grad_y, x, weight = sets[0]
        slope = torch.sigmoid(torch.tensor(LOGIT)).item() * torch.sigmoid(torch.tensor(-LOGIT)).item()
        known: list[tuple[Tensor, Tensor, Tensor]] = []

        def truth() -> tuple[Tensor, Tensor, Tensor]:
            """dY^T X, dW and ds."""
            if not known:
                dense = grad_y.double().t() @ x.double()
                exact_view = View("soft", logit.double(), alpha=alpha.double())
                grad_weight, grad_threshold = threshold_backward(dense, weight.double(), exact_view)
                assert grad_threshold is not None  # there is a threshold
                known.append((dense, grad_weight, grad_threshold))
            return known[0]

        def result(made: Any) -> tuple[Tensor, ...]:
            # A sum of terms of both signs: its error counts beside the norm of what it sums, not beside its own value.
            _, exact, exact_sum = truth()
            return made[0], 1 + (made[1].double() - exact_sum) / (slope * exact.norm())

        def exact() -> tuple[Tensor, ...]:
            return truth()[1], torch.ones_like(truth()[2])

        def ours(name: str, tiles: GradTiles | None, target: str) -> Provider:
            calls = [partial(fused_grad_weight, g, a, w, view, backend=backend(), tiles=tiles) for g, a, w in sets]
            ratios = ((f"{name} {n}x{k}, {m} tokens / dense", target, 1.0),)
            facts = {"tiles": None if tiles is None else repr(tiles)}
            # The reference rounds the product before it multiplies; the kernel does not.
            bound = Bound.of_product(m, FP32 if backend() == "triton" else dtype)
            return Provider(name, calls, exact, bound, facts, ratios, result)

        def unfused(g: Tensor, a: Tensor, w: Tensor) -> tuple[Tensor, Tensor | None]:
            return threshold_backward(g.t() @ a, w, view, backend=backend())

        def product(g: Tensor, a: Tensor, w: Tensor) -> Tensor:
            return g.t() @ a

        rounded = Bound.of_product(m, dtype)
        made = [
            Provider("dense", [partial(product, *each) for each in sets], lambda: truth()[:1], rounded),
            ours("fused dW", None, "T3"),
            Provider("dW, then multiplier", [partial(unfused, *each) for each in sets], exact, rounded, result=result,
                     ratios=((f"dW, then multiplier {n}x{k}, {m} tokens / dense", "", 1.0),)),
        ]  # fmt: skip
        if not smoke:
            wide = -(-n // 128) * -(-k // 256) >= 132
            made.append(ours("fused dW, products waiting", WAITING[wide], ""))
            made.append(ours("fused dW, fewer parts", FEWER_PARTS[wide], ""))
        return made

    for n, k, m in ((48, 40, 33),) if smoke else ((4096, 4096, 16384), (4096, 1024, 32768)):
        facts = {"op": "fused dW", "n": n, "k": k, "m": m, "flops": 2 * m * n * k}
        yield Case(f"dW {n}x{k}, {m} tokens", 6, facts, partial(providers, n, k, m))


def topk(smoke: bool) -> Iterator[Case]:
    def providers() -> list[Provider]:
        total = 30_000 if smoke else WEIGHTS
        if torch.cuda.is_available():
            # The list of candidates and the counting need as much again.
            total = min(total, int(torch.cuda.mem_get_info()[0] / 12))
        random = torch.Generator(device()).manual_seed(0)
        count = 3 if smoke else 24
        weights = [draw(random, total // count, scale=DEVIATION) for _ in range(count)]
        total = total // count * count
        kept = int(KEPT * total)
        table = tile_table(weights) if backend() == "triton" else None

        def cut(hint: Cutoff | None = None) -> Cutoff:
            return topk_cutoff(weights, kept, magnitude=True, hint=hint, table=table, check=False, backend=backend())

        def result(made: Any) -> tuple[Tensor, ...]:
            value = made.key.to(torch.int32).reshape(1).view(FP32)
            above = sum(int((weight.abs() > value).sum()) for weight in weights)
            equal = sum(int((weight.abs() == value).sum()) for weight in weights)
            right = above == int(made.above) and above < kept <= above + equal and int(made.ties_kept) == kept - above
            return (_said(right),)

        def read() -> list[Tensor]:
            return [weight.sum() for weight in weights]

        before = cut()
        # As of a model that has been trained on since: the cut-off has moved by 0.2 %.
        hint = before._replace(key=before.key - 2**14)
        facts = {"weights": total, "read_bytes": 4 * total}

        def ours(name: str, call: Callable[[], Cutoff], target: str) -> Provider:
            ratios = ((f"{name} of {total:.1e} / one read", target, 1.0),)
            return Provider(name, [call], lambda: (_said(True),), facts=facts, ratios=ratios, result=result)

        return [
            Provider("read", [read], None, facts=facts),
            ours("top-k", cut, ""),
            ours("top-k near the last cut-off", partial(cut, hint), "T19"),
        ]

    yield Case("top-k", 8, {"op": "top-k", "kept": KEPT}, providers)


CASES: dict[str, Callable[[bool], Iterator[Case]]] = {
    "ceilings": ceilings, "threshold": threshold, "grad": grad, "topk": topk,
}  # fmt: skip


def run(context: Context) -> None:
    run_cases(context, list(CASES[context.step](context.smoke)))
