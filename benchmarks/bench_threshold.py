"""The threshold and cast kernel and its backward, against plain PyTorch and a copy of as many bytes.

    python benchmarks/bench_threshold.py [--quick] [--only '*soft*'] [--out DIR]      on a GPU
    python benchmarks/bench_threshold.py --smoke                                      two tiny cases, on any machine

    provider  forward                                     backward
    triton    threshold_cast(backend="triton")            threshold_backward(backend="triton")
    eager     sign(W) · relu(|W| − T), cast, as           the reference
              published code writes it; or W · mask
    compile   torch.compile of the reference              torch.compile of the reference
    copy      device to device, as many bytes read plus written: the ceiling

Bytes a weight, each operand once: forward W + Ŵ (+ 1 for the mask); backward g + dW + W (soft) or the mask.
GB/s are these bytes over the time. Times are of CUDA graph replays over inputs larger than the L2. The error
is relative RMS against the reference in float64; the bound is 1.1 times what the reference makes in the
dtypes of the case, at least 1e-6. Weights within a millionth of the threshold are moved away from it: on
which side rounding puts those is not an error.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from tritonsparse.kernels import _triton
from tritonsparse.kernels.weight.backward import threshold_backward
from tritonsparse.kernels.weight.forward import threshold_cast
from tritonsparse.kernels.weight.reference import effective_weight_reference, threshold_backward_reference
from tritonsparse.kernels.weight.view import View

sys.path.append(str(Path(__file__).parent))  # PYTHONSAFEPATH keeps a script's own folder off it
from harness import (
    QUICK_SAMPLES,
    SAMPLES,
    Row,
    Timing,
    announce,
    gated,
    input_sets,
    measure,
    parser_of,
    refuse_without_gpu,
    relative_error,
)
from reports import Report, chosen

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SHORT = {BF16: "bf16", FP16: "fp16", FP32: "fp32"}
# sigmoid(-4) = 0.018 prunes 63 % of N(0, 0.02²).
LOGIT, DEVIATION, ALPHA = -4.0, 0.02, 0.4


@dataclass(frozen=True)
class Case:
    """A layer's weight, fp32 `[rows, columns]`, and the dtype of its product; `compiled`: worth the wait."""

    layer: str
    rows: int
    columns: int
    out: torch.dtype = BF16
    compiled: bool = False


CASES = (
    Case("transformer-base attention", 512, 512),
    Case("transformer-base ffn", 2048, 512, compiled=True),
    Case("transformer-big attention", 1024, 1024),
    Case("transformer-big ffn", 4096, 1024, compiled=True),
    Case("transformer-xl large qkv", 3072, 1024),
    Case("transformer-xl large ffn out", 1024, 4096),
    Case("llama-7b mlp in", 11008, 4096, compiled=True),
    Case("llama-7b mlp out", 4096, 11008),
    Case("transformer-big ffn", 4096, 1024, FP16),
    Case("transformer-big ffn", 4096, 1024, FP32),
    Case("llama-7b mlp in", 11008, 4096, FP16),
    Case("llama-7b mlp in", 11008, 4096, FP32),
)
QUICK_CASES = (Case("llama-7b mlp in", 11008, 4096), Case("transformer-big ffn", 4096, 1024))
# No bfloat16: under TRITON_INTERPRET=1 the kernels run as well, and the interpreter is wrong in it.
SMOKE_CASES = (Case("smoke", 96, 80, FP16), Case("smoke", 65, 130, FP32))

COLUMNS = {
    "layer": "", "shape": "", "dtypes": "", "view": "", "pass": "", "provider": "",
    "median_ms": ".4f", "p20_ms": ".4f", "p80_ms": ".4f", "gb_per_s": ".0f", "of_copy": ".3f", "error": ".1e",
}  # fmt: skip


@dataclass(frozen=True)
class Operands:
    """One set of inputs."""

    weight: Tensor
    view: View
    grad: Tensor

    @classmethod
    def draw(cls, case: Case, kind: str, seed: int) -> Operands:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        random = torch.Generator(device).manual_seed(seed)
        shape = (case.rows, case.columns)
        weight = torch.randn(shape, generator=random, device=device).mul_(DEVIATION)
        threshold = torch.full((1,), LOGIT, device=device)
        cutoff = threshold.sigmoid()
        weight = torch.where((weight.abs() / cutoff - 1).abs() < 1e-6, 1.01 * weight, weight)
        view = View("soft", threshold) if kind == "soft" else View("mask", mask=weight.abs() > cutoff)
        view = view._replace(alpha=torch.full((), ALPHA, device=device))
        return cls(weight, view, torch.randn(shape, generator=random, device=device).to(case.out))

    def double(self) -> Operands:
        def double(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.double()

        view = self.view._replace(threshold=double(self.view.threshold), alpha=double(self.view.alpha))
        return Operands(self.weight.double(), view, self.grad.double())


Results = tuple[Tensor | None, ...]
Provider = Callable[[Operands], Results]


def _bytes(case: Case, kind: str, direction: str) -> int:
    out, soft = case.out.itemsize, kind == "soft"
    each = 4 + out + (0 if soft else 1) if direction == "forward" else out + 4 + (4 if soft else 1)
    return case.rows * case.columns * each


def _forward(case: Case) -> dict[str, Provider]:
    def published(o: Operands) -> Results:
        if o.view.threshold is None:
            assert o.view.mask is not None  # draw
            return ((o.weight * o.view.mask).to(case.out),)
        return ((o.weight.sign() * (o.weight.abs() - o.view.threshold.sigmoid()).relu()).to(case.out),)

    compiled = torch.compile(effective_weight_reference, dynamic=False, fullgraph=True)
    return {
        "triton": lambda o: (threshold_cast(o.weight, o.view, out_dtype=case.out, backend="triton"),),
        "eager": published,
        "compile": lambda o: (compiled(o.weight, o.view, case.out),),
    }


def _backward() -> dict[str, Provider]:
    compiled = torch.compile(threshold_backward_reference, dynamic=False, fullgraph=True)
    return {
        "triton": lambda o: threshold_backward(o.grad, o.weight, o.view, backend="triton"),
        "eager": lambda o: threshold_backward_reference(o.grad, o.weight, o.view),
        "compile": lambda o: compiled(o.grad, o.weight, o.view),
    }


def _definition(o: Operands, direction: str, out: torch.dtype) -> Results:
    if direction == "forward":
        return (effective_weight_reference(o.weight, o.view, out),)
    return threshold_backward_reference(o.grad, o.weight, o.view)


def _error(actual: Results, exact: Results) -> float:
    """Of Ŵ or dW; where there is ds, the larger of dW's and ds's, ds over the norm of the terms it sums."""
    (first, *ds), (expected, *expected_ds) = actual, exact
    assert first is not None and expected is not None
    error = relative_error(first, expected)
    if ds and ds[0] is not None and expected_ds[0] is not None:
        slope = torch.sigmoid(torch.tensor(LOGIT)).item() * torch.sigmoid(torch.tensor(-LOGIT)).item()
        terms = slope * expected.norm().item()
        error = max(error, (ds[0].double() - expected_ds[0]).abs().max().item() / terms)
    return error


def _time_copy(nbytes: int, sets: int, samples: int) -> Timing:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    source = [torch.randn(nbytes // 8, device=device) for _ in range(sets)]
    target = [torch.empty_like(tensor) for tensor in source]
    return measure([partial(t.copy_, s) for s, t in zip(source, target, strict=True)], graph=True, samples=samples)


def bench(case: Case, kind: str, direction: str, samples: int = SAMPLES) -> Iterator[Row]:
    """One row per provider; the copy comes first."""
    nbytes = _bytes(case, kind, direction)
    sets = input_sets(nbytes)
    facts: Row = {
        "layer": case.layer, "shape": f"{case.rows}x{case.columns}", "dtypes": f"fp32>{SHORT[case.out]}",
        "view": kind, "pass": direction, "bytes": nbytes,
    }  # fmt: skip
    copy = _time_copy(nbytes, sets, samples)

    def rated(row: Row) -> Row:
        if row["median_ms"]:
            row["gb_per_s"] = nbytes / row["median_ms"] / 1e6
            row["of_copy"] = copy.median / row["median_ms"]
        return row

    yield rated(gated({**facts, "provider": "copy"}, 0.0, 0.0, lambda: copy))
    operands = [Operands.draw(case, kind, seed) for seed in range(sets)]
    # Ŵ's own rounding belongs to the error: the exact result is left in float64.
    exact = _definition(operands[0].double(), direction, torch.float64)
    bound = max(1.1 * _error(_definition(operands[0], direction, case.out), exact), 1e-6)
    providers = _forward(case) if direction == "forward" else _backward()
    if not (torch.cuda.is_available() or _triton.INTERPRETED):
        del providers["triton"]
    if not case.compiled:
        del providers["compile"]
    for name, provider in providers.items():
        calls = [partial(provider, one) for one in operands]
        error = _error(provider(operands[0]), exact)
        row = {**facts, "provider": name}
        yield rated(gated(row, error, bound, partial(measure, calls, graph=True, samples=samples)))
    torch.compiler.reset()


def main(argv: Sequence[str] | None = None) -> int:
    args = parser_of(__doc__).parse_args(argv)
    if not args.smoke:
        refuse_without_gpu("bench_threshold")
    announce()
    cases = {
        f"{case.layer} {case.rows}x{case.columns} {SHORT[case.out]} {kind} {direction}": (case, kind, direction)
        for case in (SMOKE_CASES if args.smoke else QUICK_CASES if args.quick else CASES)
        for kind in ("soft", "mask")
        for direction in ("forward", "backward")
    }
    cases = chosen("bench_threshold", cases, args.only)
    report = Report("threshold", COLUMNS, args, threshold=LOGIT, alpha=ALPHA)
    for case, kind, direction in cases.values():
        report.extend(bench(case, kind, direction, QUICK_SAMPLES if args.quick else SAMPLES))
    return report.publish()


if __name__ == "__main__":
    sys.exit(main())
