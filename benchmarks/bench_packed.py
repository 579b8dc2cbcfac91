"""A linear layer that saves its input packed (SWAT), forward and backward, and the bytes it holds between them.

    python benchmarks/bench_packed.py [--quick] [--only '*ffn*'] [--out DIR]      on a GPU
    python benchmarks/bench_packed.py --smoke                                     two tiny cases, on any machine

    provider   dense      F.linear: what torch saves and multiplies
               packed     sparse_input_linear, cut-off fresh each call
               cached     sparse_input_linear, cut-off given, room for everything: no host sync
               eager      as published code writes it: torch.topk's cut-off, X_hat saved dense

Weights are masked to the same sparsity as the inputs. `saved` is the memory that autograd holds for the backward,
without the weight. The weight's gradient is compared with that of `eager` in float64 (dense: with the dense one).
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from tritonsparse.kernels import _triton
from tritonsparse.kernels.activation.cutoff import activation_cutoff
from tritonsparse.kernels.activation.linear import sparse_input_linear
from tritonsparse.kernels.activation.packing import Packing
from tritonsparse.kernels.weight.op import effective_weight
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


@dataclass(frozen=True)
class Case:
    """A layer's weight `[n, k]` in the dtype of the product, the tokens of a step, and the share that is kept."""

    layer: str
    n: int
    k: int
    tokens: int
    density: float = 0.2
    dtype: torch.dtype = torch.bfloat16


CASES = (
    Case("transformer-base ffn", 2048, 512, 8192),
    Case("transformer-big ffn", 4096, 1024, 8192),
    Case("llama-7b attention", 4096, 4096, 4096),
    Case("llama-7b mlp in", 11008, 4096, 4096),
    Case("llama-7b mlp in", 11008, 4096, 4096, 0.1),
)
QUICK_CASES = (CASES[1], CASES[3])
# No bfloat16: under TRITON_INTERPRET=1 the kernels run as well, and the interpreter is wrong in it.
SMOKE_CASES = (
    Case("smoke", 48, 40, 33, dtype=torch.float32),
    Case("smoke", 24, 64, 17, dtype=torch.float16),
)

COLUMNS = {
    "layer": "", "tokens": "", "n": "", "k": "", "density": "", "provider": "",
    "median_ms": ".4f", "p20_ms": ".4f", "p80_ms": ".4f", "of_dense": ".3f", "saved_mib": ".2f", "error": ".1e",
}  # fmt: skip

Step = Callable[[], Tensor]


class _Eager(torch.autograd.Function):
    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, w: Tensor, density: float) -> Tensor:
        k = max(1, math.floor(density * x.numel() + 0.5))
        cutoff = x.abs().flatten().topk(k).values[-1]
        ctx.save_for_backward(torch.where(x.abs() >= cutoff, x, 0.0), w)
        return F.linear(x, w)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad_y: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        x_hat, w = ctx.saved_tensors  # type: ignore[attr-defined]
        return grad_y @ w, grad_y.t() @ x_hat, None


def bench(case: Case, samples: int = SAMPLES) -> Iterator[Row]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    backend = "triton" if device == "cuda" or _triton.INTERPRETED else "torch"
    random = torch.Generator(device).manual_seed(0)
    x = torch.randn(case.tokens, case.k, generator=random, device=device).to(case.dtype).requires_grad_()
    weight = torch.randn(case.n, case.k, generator=random, device=device).mul_(0.02).to(case.dtype)
    mask = torch.rand(case.n, case.k, generator=random, device=device) < case.density
    grad = torch.randn(case.tokens, case.n, generator=random, device=device).to(case.dtype)
    dense_weight, sparse_weight = weight.clone().requires_grad_(), (weight * mask).requires_grad_()
    master = weight.clone().requires_grad_()
    alpha = torch.ones((), device=device)
    cutoff = activation_cutoff(x.detach(), case.density)
    view = View("mask", mask=mask, alpha=alpha)

    def packed(packing: Packing) -> Tensor:
        w_hat = effective_weight(master, view, backend=backend)
        return sparse_input_linear(x, w_hat, None, packing, backend=backend)[0]

    forwards: dict[str, tuple[Callable[[], Tensor], Tensor]] = {
        "dense": (lambda: F.linear(x, dense_weight), dense_weight),
        "packed": (lambda: packed(Packing(case.density)), master),
        "cached": (lambda: packed(Packing(case.density, slack=math.inf, cutoff=cutoff)), master),
        "eager": (lambda: _Eager.apply(x, sparse_weight, case.density), sparse_weight),
    }
    exact_x = x.detach().double()
    x_hat = torch.where(exact_x.abs() >= float(cutoff), exact_x, 0.0)
    exact = {name: grad.double().t() @ (exact_x if name == "dense" else x_hat) for name in forwards}
    # What rounding to the dtype of the product makes of a sum of so many terms.
    bound = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}[case.dtype]
    dense_ms: float | None = None
    for name, (forward, parameter) in forwards.items():

        def step(forward: Callable[[], Tensor] = forward, parameter: Tensor = parameter) -> Tensor:
            parameter.grad = x.grad = None
            forward().backward(grad)
            assert parameter.grad is not None
            return parameter.grad

        saved: list[int] = []

        def noted(tensor: Tensor, saved: list[int] = saved) -> Tensor:
            if tensor.shape != weight.shape:
                saved.append(tensor.numel() * tensor.element_size())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(noted, lambda tensor: tensor):
            forward()
        error = relative_error(step(), exact[name])
        facts: Row = {
            "layer": case.layer, "tokens": case.tokens, "n": case.n, "k": case.k, "density": case.density,
            "provider": name, "saved_mib": sum(saved) / 2**20,
        }  # fmt: skip
        row = gated(facts, error, bound, partial(measure, [step], samples=samples))
        if name == "dense":
            dense_ms = row["median_ms"]
        elif row["median_ms"] and dense_ms:
            row["of_dense"] = dense_ms / row["median_ms"]
        yield row


def main(argv: Sequence[str] | None = None) -> int:
    args = parser_of(__doc__).parse_args(argv)
    if not args.smoke:
        refuse_without_gpu("bench_packed")
    announce()
    cases = SMOKE_CASES if args.smoke else QUICK_CASES if args.quick else CASES
    labelled = {f"{case.layer} {case.n}x{case.k} {case.tokens} {case.density}": case for case in cases}
    labelled = chosen("bench_packed", labelled, args.only)
    report = Report("packed", COLUMNS, args)
    for case in labelled.values():
        report.extend(bench(case, QUICK_SAMPLES if args.quick else SAMPLES))
    return report.publish()


if __name__ == "__main__":
    sys.exit(main())
