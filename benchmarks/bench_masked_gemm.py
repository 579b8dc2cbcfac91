"""The products of a sparse linear layer, forward, dX and dW, fused with the effective weight and unfused.

    python benchmarks/bench_masked_gemm.py [--quick] [--only '*soft*'] [--out DIR]      on a GPU
    python benchmarks/bench_masked_gemm.py --smoke                                      two tiny cases, on any machine

    provider       forward [M, K] -> [M, N]              grad_input                grad_weight
    fused          fused_forward                         fused_grad_input          fused_grad_weight
    unfused        threshold_cast, then cuBLAS           the same                  cuBLAS, then threshold_backward
    dense random   cuBLAS on a random weight             the same                  dY^T X
    dense masked   cuBLAS on Ŵ as it is                  the same                  (the same: no row)
    eager          as published code writes it, with autograd's passes over the weight     (forward and dW)
    compile        torch.compile of that

"unfused" counts the pass that makes Ŵ: a layer that caches it pays for it once a step. Zeros in an operand make a dense
product faster (less power), so both dense lines are printed; `of_dense` is a provider's rate over the random one's.
Times are of CUDA graph replays over inputs larger than the L2. Errors: relative RMS against float64, bounded by 1.1
times what "unfused" makes. `make_plan_table.py` turns the rows into what `auto` reads.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from tritonsparse.kernels import _triton
from tritonsparse.kernels.fused.gemm import fused_forward, fused_grad_input
from tritonsparse.kernels.fused.grad import fused_grad_weight
from tritonsparse.kernels.weight.backward import threshold_backward
from tritonsparse.kernels.weight.forward import threshold_cast
from tritonsparse.kernels.weight.view import View

sys.path.append(str(Path(__file__).parent))  # PYTHONSAFEPATH keeps a script's own folder off it
from harness import (
    QUICK_SAMPLES,
    SAMPLES,
    Row,
    announce,
    gated,
    input_sets,
    measure,
    parser_of,
    refuse_without_gpu,
    relative_error,
)
from reports import Report, chosen

BF16, FP32 = torch.bfloat16, torch.float32
# sigmoid(-4) = 0.018 prunes 63 % of N(0, 0.02²).
LOGIT, DEVIATION, ALPHA = -4.0, 0.02, 0.4
OPS = ("forward", "grad_input", "grad_weight")


@dataclass(frozen=True)
class Case:
    """A layer's weight, fp32 `[n, k]`, and the tokens of a step; `compiled`: worth the wait."""

    layer: str
    n: int
    k: int
    tokens: tuple[int, ...]
    dtype: torch.dtype = BF16
    compiled: bool = False


CASES = (
    Case("transformer-base ffn", 2048, 512, (1024, 8192)),
    Case("transformer-big ffn", 4096, 1024, (1024, 8192, 32768), compiled=True),
    Case("transformer-xl large ffn out", 1024, 4096, (1024, 8192)),
    Case("llama-7b attention", 4096, 4096, (1, 16, 256, 1024, 4096, 16384)),
    Case("llama-7b mlp in", 11008, 4096, (1024, 4096, 16384), compiled=True),
    Case("llama-7b mlp out", 4096, 11008, (4096,)),
)
QUICK_CASES = (Case("llama-7b attention", 4096, 4096, (16384,)),)
# No bfloat16: under TRITON_INTERPRET=1 the kernels run as well, and the interpreter is wrong in it.
SMOKE_CASES = (Case("smoke", 48, 40, (33,), FP32), Case("smoke", 17, 64, (7,), torch.float16))

COLUMNS = {
    "layer": "", "op": "", "m": "", "n": "", "k": "", "dtype": "", "kind": "", "provider": "",
    "median_ms": ".4f", "p20_ms": ".4f", "p80_ms": ".4f", "tflop_per_s": ".1f", "of_dense": ".3f", "error": ".1e",
}  # fmt: skip


@dataclass(frozen=True)
class Operands:
    """One set of inputs, and the effective weight that "dense masked" is given."""

    x: Tensor
    grad_y: Tensor
    weight: Tensor
    dense: Tensor
    view: View
    w_hat: Tensor

    @classmethod
    def draw(cls, case: Case, m: int, kind: str, seed: int) -> Operands:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        random = torch.Generator(device).manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=random, device=device)

        weight = normal(case.n, case.k).mul_(DEVIATION)
        threshold = torch.full((1,), LOGIT, device=device)
        cutoff = threshold.sigmoid()
        weight = torch.where((weight.abs() / cutoff - 1).abs() < 1e-6, 1.01 * weight, weight)
        view = View("soft", threshold) if kind == "soft" else View("mask", mask=weight.abs() > cutoff)
        view = view._replace(alpha=torch.full((), ALPHA, device=device))
        return cls(
            normal(m, case.k).to(case.dtype),
            normal(m, case.n).to(case.dtype),
            weight,
            weight.to(case.dtype),
            view,
            threshold_cast(weight, view, out_dtype=case.dtype),
        )


Provider = Callable[[Operands], Tensor]


def _providers(op: str, dtype: torch.dtype) -> dict[str, Provider]:
    triton = "triton" if torch.cuda.is_available() or _triton.INTERPRETED else "torch"

    def cast(o: Operands) -> Tensor:
        return threshold_cast(o.weight, o.view, out_dtype=dtype, backend=triton)

    if op == "forward":

        def eager(x: Tensor, weight: Tensor, threshold: Tensor | None, mask: Tensor | None) -> Tensor:
            if threshold is None:
                return F.linear(x, (weight * mask).to(dtype))
            return F.linear(x, (weight.sign() * (weight.abs() - threshold.sigmoid()).relu()).to(dtype))

        compiled = torch.compile(eager, dynamic=False, fullgraph=True)
        return {
            "dense random": lambda o: F.linear(o.x, o.dense),
            "dense masked": lambda o: F.linear(o.x, o.w_hat),
            "unfused": lambda o: F.linear(o.x, cast(o)),
            "fused": lambda o: fused_forward(o.x, o.weight, o.view, out_dtype=dtype, backend=triton),
            "eager": lambda o: eager(o.x, o.weight, o.view.threshold, o.view.mask),
            "compile": lambda o: compiled(o.x, o.weight, o.view.threshold, o.view.mask),
        }
    if op == "grad_input":
        return {
            "dense random": lambda o: o.grad_y @ o.dense,
            "dense masked": lambda o: o.grad_y @ o.w_hat,
            "unfused": lambda o: o.grad_y @ cast(o),
            "fused": lambda o: fused_grad_input(o.grad_y, o.weight, o.view, out_dtype=dtype, backend=triton),
        }

    def published_grad(o: Operands) -> Tensor:
        grad, threshold, alpha = (o.grad_y.t() @ o.x).float(), o.view.threshold, o.view.alpha
        assert alpha is not None  # draw
        kept = o.view.mask if threshold is None else (o.weight.abs() - threshold.sigmoid()) > 0
        return torch.where(kept, grad, alpha * grad)

    return {
        "dense random": lambda o: o.grad_y.t() @ o.x,
        "unfused": lambda o: threshold_backward(o.grad_y.t() @ o.x, o.weight, o.view, backend=triton)[0],
        "fused": lambda o: fused_grad_weight(o.grad_y, o.x, o.weight, o.view, backend=triton)[0],
        "eager": published_grad,
    }


def _exact(o: Operands, op: str, provider: str) -> Tensor:
    """In float64: what the provider computes, from the operands as it is given them."""
    if op == "grad_weight":
        grad = o.grad_y.double().t() @ o.x.double()
        if provider == "dense random":
            return grad
        view = View(*(t.double() if isinstance(t, Tensor) and t.is_floating_point() else t for t in o.view))
        return threshold_backward(grad, o.weight.double(), view)[0]
    weight = o.dense.double() if provider == "dense random" else o.w_hat.double()
    return o.x.double() @ weight.t() if op == "forward" else o.grad_y.double() @ weight


def bench(case: Case, m: int, kind: str, op: str, samples: int = SAMPLES) -> Iterator[Row]:
    """One row a provider; the dense ones first."""
    nbytes = case.n * case.k * 4 + m * (case.n + case.k) * case.dtype.itemsize
    operands = [Operands.draw(case, m, kind, seed) for seed in range(min(8, input_sets(nbytes)))]
    facts: Row = {
        "layer": case.layer, "op": op, "m": m, "n": case.n, "k": case.k,
        "dtype": str(case.dtype).removeprefix("torch."), "kind": kind,
    }  # fmt: skip
    providers = _providers(op, case.dtype)
    if not (case.compiled and torch.cuda.is_available()):
        providers.pop("compile", None)
    dense_ms: float | None = None
    allowed = relative_error(providers["unfused"](operands[0]), _exact(operands[0], op, "unfused"))
    bound = max(1.1 * allowed, 1e-6)
    for name, provider in providers.items():
        error = relative_error(provider(operands[0]), _exact(operands[0], op, name))
        calls = [partial(provider, one) for one in operands]
        # Of cuBLAS's dW the reference is the product before it is rounded to float32 masters.
        row = gated({**facts, "provider": name}, error, max(bound, 5e-3 if name == "dense random" else 0.0),
                    partial(measure, calls, graph=True, samples=samples))  # fmt: skip
        if name == "dense random":
            dense_ms = row["median_ms"]
        if row["median_ms"]:
            row["tflop_per_s"] = 2 * m * case.n * case.k / row["median_ms"] / 1e9
            row["of_dense"] = dense_ms and dense_ms / row["median_ms"]
        yield row
    torch.compiler.reset()


def main(argv: Sequence[str] | None = None) -> int:
    args = parser_of(__doc__).parse_args(argv)
    if not args.smoke:
        refuse_without_gpu("bench_masked_gemm")
    announce()
    cases = {
        f"{case.layer} {m} {kind} {op}": (case, m, kind, op)
        for case in (SMOKE_CASES if args.smoke else QUICK_CASES if args.quick else CASES)
        for m in case.tokens
        for kind in ("soft", "mask")
        for op in OPS
    }
    cases = chosen("bench_masked_gemm", cases, args.only)
    report = Report("masked_gemm", COLUMNS, args, threshold=LOGIT, alpha=ALPHA)
    for case, m, kind, op in cases.values():
        report.extend(bench(case, m, kind, op, QUICK_SAMPLES if args.quick else SAMPLES))
    return report.publish()


if __name__ == "__main__":
    sys.exit(main())
