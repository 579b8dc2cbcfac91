"""What a method does to all weights of a model at once: threshold and cast, multiplier, exact top-k.

    python benchmarks/bench_whole_model.py [--quick] [--only '1.3*'] [--out DIR]      on a GPU
    python benchmarks/bench_whole_model.py --smoke                                    two tiny cases, on any machine

    pass       provider     what
    cast       many         cast_many: every layer in one launch
               each         threshold_cast, layer by layer
               copy         device to device, as many bytes read plus written: the ceiling
    backward   many         backward_many in place over the gradients
               each         threshold_backward, layer by layer
    top-k      select       topk_cutoff over all layers (predicted bracket; exact in any case)
               hinted       the same from the cut-off of a model that was trained on since
               read         torch.sum over the weights: one read of them, the ceiling
               sort         torch.sort of the first `elements` magnitudes, at most 1e8: it takes 60 bytes a weight
               kthvalue     torch.kthvalue of the first `elements` magnitudes, at most 1e7: it takes 0.7 s for 1e8

GB/s count each of `elements` weights, and what is written of it, once. Host time is part of what is timed: these are
one call a step. Ŵ and gradients are compared by relative RMS. A cut-off t is right if the weights
above it and those at or above it, counted one tensor at a time, enclose the number to be kept: nothing is sorted.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tritonsparse.kernels import _triton
from tritonsparse.kernels.select.topk import Cutoff, topk_cutoff
from tritonsparse.kernels.weight.backward import threshold_backward
from tritonsparse.kernels.weight.backward_many import backward_many
from tritonsparse.kernels.weight.forward import threshold_cast
from tritonsparse.kernels.weight.forward_many import cast_many
from tritonsparse.kernels.weight.table import Viewed, ViewTable
from tritonsparse.kernels.weight.view import View

sys.path.append(str(Path(__file__).parent))  # PYTHONSAFEPATH keeps a script's own folder off it
from harness import (
    QUICK_SAMPLES,
    SAMPLES,
    Row,
    announce,
    gated,
    measure,
    parser_of,
    refuse_without_gpu,
    relative_error,
)
from reports import Report, chosen

# sigmoid(-4) = 0.018 prunes 63 % of N(0, 0.02²).
LOGIT, DEVIATION, ALPHA, KEPT = -4.0, 0.02, 0.4, 0.1
# The most elements and samples of the calls that are too slow, or take too much memory, for a whole model.
SORTED, RANKED, SLOW_SAMPLES = 10**8, 10**7, 3


@dataclass(frozen=True)
class Case:
    """Shapes of a model's sparse layers, float32 masters; `out` the dtype of Ŵ."""

    model: str
    shapes: tuple[tuple[int, int], ...]
    out: torch.dtype = torch.bfloat16


def transformer(layers: int, width: int, inner: int, attentions: int) -> tuple[tuple[int, int], ...]:
    return (((width, width),) * (4 * attentions) + ((inner, width), (width, inner))) * layers


CASES = (
    Case("transformer-base", transformer(6, 512, 2048, 1) + transformer(6, 512, 2048, 2)),
    Case("transformer-big", transformer(6, 1024, 4096, 1) + transformer(6, 1024, 4096, 2)),
    Case("1.3 billion", transformer(24, 2048, 8192, 1)),
)
QUICK_CASES = (CASES[2], CASES[1])
# No bfloat16: under TRITON_INTERPRET=1 the kernels run as well, and the interpreter is wrong in it.
SMOKE_CASES = (Case("smoke", ((96, 80), (65, 130)), torch.float16), Case("smoke", ((33, 17),), torch.float32))

COLUMNS = {
    "model": "", "weights": "", "layers": "", "pass": "", "provider": "", "elements": "",
    "median_ms": ".4f", "p20_ms": ".4f", "p80_ms": ".4f", "gb_per_s": ".0f", "error": ".1e",
}  # fmt: skip


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def layers_of(case: Case) -> list[Viewed]:
    random = torch.Generator(_device()).manual_seed(0)
    layers = []
    for shape in case.shapes:
        weight = torch.randn(shape, generator=random, device=_device()).mul_(DEVIATION)
        threshold = torch.full((1,), LOGIT, device=_device())
        weight = torch.where((weight.abs() / threshold.sigmoid() - 1).abs() < 1e-6, 1.01 * weight, weight)
        view = View("soft", threshold, alpha=torch.full((), ALPHA, device=_device()))
        layers.append(Viewed(weight, view, torch.empty(shape, dtype=case.out, device=_device())))
    return layers


def is_exact(weights: Sequence[Tensor], kept: int, cutoff: Cutoff) -> bool:
    """Whether `cutoff` is that of the `kept` largest magnitudes, by counting those above it and those at it.

    The key of a float32 magnitude is its bits.
    """
    magnitude = cutoff.key.to(torch.int32).view(torch.float32)
    above = at_least = 0
    for weight in weights:
        above += int((weight.abs() > magnitude).sum())
        at_least += int((weight.abs() >= magnitude).sum())
    return above == int(cutoff.above) < kept <= at_least and int(cutoff.ties_kept) == kept - above


def bench(case: Case, samples: int = SAMPLES) -> Iterator[Row]:
    backend = "triton" if torch.cuda.is_available() or _triton.INTERPRETED else "torch"
    layers = layers_of(case)
    weights = sum(layer.weight.numel() for layer in layers)
    table = ViewTable(layers, backend)
    facts: Row = {"model": case.model, "weights": weights, "layers": len(layers)}

    def timed(
        name: str,
        provider: str,
        width: int,
        call: Callable[[], object],
        error: float = 0.0,
        bound: float = 0.0,
        *,
        elements: int = weights,
        samples: int = samples,
    ) -> Row:
        row = {**facts, "pass": name, "provider": provider, "elements": elements}
        row = gated(row, error, bound, lambda: measure([call], samples=samples))
        if row["median_ms"]:
            row["gb_per_s"] = elements * width / row["median_ms"] / 1e6
        return row

    yield from _casts(case, layers, table, backend, timed)
    yield from _backwards(layers, table, backend, timed)
    del table
    magnitudes = [layer.weight for layer in layers]
    del layers
    kept = max(1, int(KEPT * weights))
    cutoff = topk_cutoff(magnitudes, kept, magnitude=True, backend=backend)
    wrong = float(not is_exact(magnitudes, kept, cutoff))
    yield timed("top-k", "select", 4, lambda: topk_cutoff(magnitudes, kept, magnitude=True, backend=backend), wrong)
    for weight in magnitudes:
        weight.mul_(1.001)

    def hinted() -> Cutoff:
        return topk_cutoff(magnitudes, kept, magnitude=True, hint=cutoff, backend=backend)

    yield timed("top-k", "hinted", 4, hinted, float(not is_exact(magnitudes, kept, hinted())))
    flat = torch.cat([weight.flatten() for weight in magnitudes])
    yield timed("top-k", "read", 4, flat.sum)
    few, fewer = flat[:SORTED].abs(), flat[:RANKED].abs()
    del flat
    slow = min(samples, SLOW_SAMPLES)
    yield timed("top-k", "sort", 4, lambda: few.sort(), elements=few.numel(), samples=slow)
    rank = fewer.numel() - max(1, int(KEPT * fewer.numel())) + 1
    yield timed("top-k", "kthvalue", 4, lambda: fewer.kthvalue(rank), elements=fewer.numel(), samples=slow)


def _casts(
    case: Case, layers: Sequence[Viewed], table: ViewTable, backend: str, timed: Callable[..., Row]
) -> Iterator[Row]:
    width = 4 + case.out.itemsize
    cast_many(table)
    error = 0.0
    for layer in layers:
        assert layer.w_hat is not None  # layers_of
        expected = threshold_cast(layer.weight, layer.view, out_dtype=case.out)
        error = max(error, relative_error(layer.w_hat, expected))
    yield timed("cast", "many", width, lambda: cast_many(table), error, 1e-3)

    def each() -> list[Tensor]:
        return [threshold_cast(layer.weight, layer.view, out_dtype=case.out, backend=backend) for layer in layers]

    yield timed("cast", "each", width, each)
    source = torch.empty(sum(layer.weight.numel() for layer in layers) * width // 8, device=_device())
    target = torch.empty_like(source)
    yield timed("cast", "copy", width, lambda: target.copy_(source))


def _backwards(layers: Sequence[Viewed], table: ViewTable, backend: str, timed: Callable[..., Row]) -> Iterator[Row]:
    grads = [torch.randn_like(layer.weight) for layer in layers]
    changed = [grad.clone() for grad in grads]
    backward_many(table, changed)
    error = 0.0
    for grad, layer, actual in zip(grads, layers, changed, strict=True):
        error = max(error, relative_error(actual, threshold_backward(grad, layer.weight, layer.view)[0]))
    yield timed("backward", "many", 12, lambda: backward_many(table, changed), error, 1e-6)

    def each() -> list[Tensor]:
        return [
            threshold_backward(grad, layer.weight, layer.view, backend=backend)[0]
            for grad, layer in zip(grads, layers, strict=True)
        ]

    yield timed("backward", "each", 12, each)


def main(argv: Sequence[str] | None = None) -> int:
    args = parser_of(__doc__).parse_args(argv)
    if not args.smoke:
        refuse_without_gpu("bench_whole_model")
    announce()
    cases = SMOKE_CASES if args.smoke else QUICK_CASES if args.quick else CASES
    labelled = {f"{case.model} {len(case.shapes)} layers": case for case in cases}
    labelled = chosen("bench_whole_model", labelled, args.only)
    report = Report("whole_model", COLUMNS, args, threshold=LOGIT, kept=KEPT)
    for case in labelled.values():
        report.extend(bench(case, QUICK_SAMPLES if args.quick else SAMPLES))
    return report.publish()


if __name__ == "__main__":
    sys.exit(main())
