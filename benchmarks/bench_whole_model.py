"""What a method does to all weights of a model at once: threshold and cast, multiplier, exact top-k.

    python benchmarks/bench_whole_model.py [--out DIR]      on a GPU
    python benchmarks/bench_whole_model.py --smoke          two tiny cases, on any machine

    pass       provider     what
    cast       many         cast_many: every layer in one launch, counts included
               each         threshold_cast, layer by layer
               copy         device to device, as many bytes read plus written: the ceiling
    backward   many         backward_many in place over the gradients
               each         threshold_backward, layer by layer
    top-k      select       topk_cutoff over all layers (predicted bracket; exact in any case)
               hinted       the same from the cut-off of a model that was trained on since
               sort         torch.sort of the concatenated magnitudes
               kthvalue     torch.kthvalue of them
               read         torch.sum over the weights: one read of them, the ceiling

GB/s count each operand once. Host time is part of what is timed: these are one call a step. Results are compared with
the references: kept counts and cut-offs exactly, Ŵ and gradients by relative RMS.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tritonsparse.kernels import _triton
from tritonsparse.kernels.threshold import threshold_cast
from tritonsparse.kernels.threshold_backward import threshold_backward
from tritonsparse.kernels.threshold_backward_many import backward_many
from tritonsparse.kernels.threshold_many import cast_many
from tritonsparse.kernels.topk import topk_cutoff
from tritonsparse.kernels.view_table import View, ViewTable

sys.path.append(str(Path(__file__).parent))  # PYTHONSAFEPATH keeps a script's own folder off it
from harness import Row, announce, gated, measure, parser_of, publish, refuse_without_gpu, relative_error

# sigmoid(-4) = 0.018 prunes 63 % of N(0, 0.02²).
LOGIT, DEVIATION, ALPHA, KEPT = -4.0, 0.02, 0.4, 0.1


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
# No bfloat16: under TRITON_INTERPRET=1 the kernels run as well, and the interpreter is wrong in it.
SMOKE_CASES = (Case("smoke", ((96, 80), (65, 130)), torch.float16), Case("smoke", ((33, 17),), torch.float32))

COLUMNS = {
    "model": "", "weights": "", "layers": "", "pass": "", "provider": "",
    "median_ms": ".4f", "p20_ms": ".4f", "p80_ms": ".4f", "gb_per_s": ".0f", "error": ".1e",
}  # fmt: skip


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def views_of(case: Case) -> list[View]:
    random = torch.Generator(_device()).manual_seed(0)
    views = []
    for shape in case.shapes:
        weight = torch.randn(shape, generator=random, device=_device()).mul_(DEVIATION)
        threshold = torch.full((1,), LOGIT, device=_device())
        weight = torch.where((weight.abs() / threshold.sigmoid() - 1).abs() < 1e-6, 1.01 * weight, weight)
        w_hat = torch.empty(shape, dtype=case.out, device=_device())
        views.append(View("soft", weight, threshold, alpha=torch.full((), ALPHA, device=_device()), w_hat=w_hat))
    return views


def bench(case: Case) -> list[Row]:
    backend = "triton" if torch.cuda.is_available() or _triton.INTERPRETED else "torch"
    views = views_of(case)
    weights = sum(view.weight.numel() for view in views)
    table = ViewTable(views, backend)
    facts: Row = {"model": case.model, "weights": weights, "layers": len(views)}
    rows: list[Row] = []

    def add(name: str, provider: str, nbytes: int, call: Callable[[], object], error: float, bound: float) -> None:
        row = gated({**facts, "pass": name, "provider": provider}, error, bound, lambda: measure([call]))
        if row["median_ms"]:
            row["gb_per_s"] = nbytes / row["median_ms"] / 1e6
        rows.append(row)

    def each() -> list[Tensor]:
        return [
            threshold_cast(view.weight, view.threshold, kind="soft", out_dtype=case.out, backend=backend)[0]
            for view in views
        ]

    nbytes = weights * (4 + case.out.itemsize)
    reference = [threshold_cast(view.weight, view.threshold, kind="soft", out_dtype=case.out)[:2] for view in views]
    counted = cast_many(table)
    miscounted = float(any(int(a) != int(b[1]) for a, b in zip(counted.kept, reference, strict=True)))
    error = max(
        relative_error(view.w_hat, expected) for view, (expected, _) in zip(views, reference, strict=True)
        if view.w_hat is not None
    )  # fmt: skip
    add("cast", "many", nbytes, lambda: cast_many(table), error + miscounted, 1e-3)
    add("cast", "each", nbytes, each, 0.0, 0.0)
    source = torch.empty(nbytes // 8, device=_device())
    target = torch.empty_like(source)
    add("cast", "copy", nbytes, lambda: target.copy_(source), 0.0, 0.0)

    grads = [torch.randn_like(view.weight) for view in views]
    expected = [
        threshold_backward(grad, view.weight, view.threshold, alpha=view.alpha, kind="soft")[0]
        for grad, view in zip(grads, views, strict=True)
    ]
    changed = [grad.clone() for grad in grads]
    backward_many(table, changed)
    error = max(relative_error(a, b) for a, b in zip(changed, expected, strict=True))
    add("backward", "many", weights * 12, lambda: backward_many(table, changed), error, 1e-6)

    def backward_each() -> list[Tensor]:
        return [
            threshold_backward(grad, view.weight, view.threshold, alpha=view.alpha, kind="soft", backend=backend)[0]
            for grad, view in zip(grads, views, strict=True)
        ]

    add("backward", "each", weights * 12, backward_each, 0.0, 0.0)

    magnitudes = [view.weight for view in views]
    kept = max(1, int(KEPT * weights))
    flat = torch.cat([weight.flatten() for weight in magnitudes]).abs()
    ranked = flat.sort(descending=True).values
    cutoff = topk_cutoff(magnitudes, kept, magnitude=True, backend=backend)
    right = float(int((flat > ranked[kept - 1]).sum()) != int(cutoff.above))
    add(
        "top-k",
        "select",
        weights * 4,
        lambda: topk_cutoff(magnitudes, kept, magnitude=True, backend=backend),
        right,
        0.0,
    )
    hint = cutoff
    for weight in magnitudes:
        weight.mul_(1.001)
    add(
        "top-k", "hinted", weights * 4,
        lambda: topk_cutoff(magnitudes, kept, magnitude=True, hint=hint, backend=backend), right, 0.0,
    )  # fmt: skip
    add("top-k", "sort", weights * 4, lambda: flat.sort(), 0.0, 0.0)
    add("top-k", "kthvalue", weights * 4, lambda: flat.kthvalue(weights - kept + 1), 0.0, 0.0)
    add("top-k", "read", weights * 4, lambda: flat.sum(), 0.0, 0.0)
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    args = parser_of(__doc__).parse_args(argv)
    if not args.smoke:
        refuse_without_gpu("bench_whole_model")
    announce()
    rows: list[Row] = []
    for case in SMOKE_CASES if args.smoke else CASES:
        rows += bench(case)
    publish("whole_model", rows, COLUMNS, args.out, smoke=args.smoke, threshold=LOGIT, kept=KEPT)
    return int(any(row["verdict"] == "WRONG" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
