"""A linear layer through the GPU's 2:4 sparse products beside the dense one: a training step of it, and inference.

    python benchmarks/bench_semi_structured.py [--quick] [--only 'llama*'] [--out DIR]      on a GPU
    python benchmarks/bench_semi_structured.py --smoke                     two tiny cases, on any machine

    provider   dense       F.linear on the dense weight, in the dtype of the product
               masked      F.linear on the effective weight, which a kernel makes in every forward
               2:4         semi_structured_linear on it, which compresses it in every forward
               2:4 kept    the same, the effective weight given
               2:4 both    2:4 with a transposable mask, so that dX is a sparse product too

    op         forward     the output, nothing to be differentiated (inference)
               step        forward and backward
               pack        the compression alone (provider 2:4)

The masters are float32. An output, or for a step both gradients, are compared with the masked products in float64
(dense: with the dense ones). Random data: zeros draw less power and would run faster.
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
from tritonsparse.kernels.select.n_of_m import n_of_m_mask
from tritonsparse.kernels.select.transposable import transposable_mask
from tritonsparse.kernels.semi_structured import semi_structured_linear, semi_structured_reason
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
    """A layer's weight `[n, k]`, the tokens of a step and the dtype of the products."""

    layer: str
    n: int
    k: int
    tokens: int
    dtype: torch.dtype = torch.bfloat16


CASES = (
    Case("transformer-big ffn", 4096, 1024, 16384),
    Case("llama-7b attention", 4096, 4096, 8192),
    Case("llama-7b mlp in", 11008, 4096, 8192),
    Case("llama-7b mlp out", 4096, 11008, 8192),
    Case("square", 8192, 8192, 8192),
    Case("llama-7b mlp in, decoding", 11008, 4096, 16),
)
QUICK_CASES = (CASES[2], CASES[4])
# No bfloat16: under TRITON_INTERPRET=1 the kernels run as well, and the interpreter is wrong in it.
SMOKE_CASES = (Case("smoke", 64, 32, 17, torch.float16), Case("smoke", 32, 96, 8, torch.float32))

COLUMNS = {
    "layer": "", "tokens": "", "n": "", "k": "", "op": "", "provider": "",
    "median_ms": ".4f", "p20_ms": ".4f", "p80_ms": ".4f", "of_dense": ".3f", "error": ".1e",
}  # fmt: skip


def bench(case: Case, samples: int = SAMPLES) -> Iterator[Row]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    elementwise = "triton" if device == "cuda" or _triton.INTERPRETED else "torch"
    random = torch.Generator(device).manual_seed(0)
    x = torch.randn(case.tokens, case.k, generator=random, device=device).to(case.dtype).requires_grad_()
    master = torch.randn(case.n, case.k, generator=random, device=device).mul_(0.02).requires_grad_()
    grad = torch.randn(case.tokens, case.n, generator=random, device=device).to(case.dtype)
    mask = n_of_m_mask(master, 2, 4, magnitude=True, backend=elementwise)
    both = transposable_mask(master, 2, 4, magnitude=True)
    dense = master.detach().to(case.dtype).requires_grad_()
    w_hat, w_both = ((master.detach() * each).to(case.dtype) for each in (mask, both))
    reason = semi_structured_reason(x, master, mask)
    product = "torch" if reason else "semi_structured"

    def effective(mask: Tensor, cached: Tensor | None = None) -> Tensor:
        view = View("mask", mask=mask)
        return effective_weight(master, view, dtype=case.dtype, backend=elementwise, cached=cached)

    forwards: dict[str, tuple[Callable[[], Tensor], Tensor]] = {
        "dense": (lambda: F.linear(x, dense), dense),
        "masked": (lambda: F.linear(x, effective(mask)), master),
    }
    # A smoke test without a GPU runs the reference in their place; a GPU that cannot is not timed at something else.
    if reason is None or device == "cpu":
        forwards["2:4"] = (lambda: semi_structured_linear(x, effective(mask), backend=product), master)
        if not semi_structured_reason(x, master, both, sparse_grad_input=True) or device == "cpu":
            forwards["2:4 both"] = (
                lambda: semi_structured_linear(x, effective(both), backend=product, sparse_grad_input=True),
                master,
            )
        forwards["2:4 kept"] = (lambda: semi_structured_linear(x, effective(mask, w_hat), backend=product), master)
    exact_x, exact_grad = x.detach().double(), grad.double()
    weights, masks = {"dense": dense.detach(), "2:4 both": w_both}, {"dense": torch.ones_like(mask), "2:4 both": both}
    # What rounding to the dtype of the product makes of a sum of so many terms.
    bound = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}[case.dtype]
    shape: Row = {
        "layer": case.layer, "tokens": case.tokens, "n": case.n, "k": case.k,
        "dtype": str(case.dtype).removeprefix("torch."),
    }  # fmt: skip
    times: dict[tuple[str, str], float] = {}
    for name, (forward, parameter) in forwards.items():

        def infer(forward: Callable[[], Tensor] = forward) -> Tensor:
            with torch.no_grad():
                return forward()

        def step(forward: Callable[[], Tensor] = forward, parameter: Tensor = parameter) -> Tensor:
            parameter.grad = x.grad = None
            forward().backward(grad)
            assert parameter.grad is not None
            return parameter.grad

        exact_w = weights.get(name, w_hat).double()
        expected = {"forward": exact_x @ exact_w.t(), "step": exact_grad.t() @ exact_x * masks.get(name, mask)}
        for op, call in (("forward", infer), ("step", step)):
            error = relative_error(call(), expected[op])
            if op == "step":
                assert x.grad is not None
                error = max(error, relative_error(x.grad, exact_grad @ exact_w))
            facts = {**shape, "op": op, "provider": name, "reason": reason}
            row = gated(facts, error, bound, partial(measure, [call], samples=samples))
            if row["median_ms"]:
                times[op, name] = row["median_ms"]
                if (op, "dense") in times:
                    row["of_dense"] = times[op, "dense"] / row["median_ms"]
            yield row
    if reason is None:
        facts = {**shape, "op": "pack", "provider": "2:4"}
        yield gated(facts, 0.0, 0.0, partial(measure, [lambda: torch._cslt_compress(w_hat)], samples=samples))


def main(argv: Sequence[str] | None = None) -> int:
    args = parser_of(__doc__).parse_args(argv)
    if not args.smoke:
        refuse_without_gpu("bench_semi_structured")
    announce()
    cases = SMOKE_CASES if args.smoke else QUICK_CASES if args.quick else CASES
    labelled = {f"{case.layer} {case.n}x{case.k} {case.tokens}": case for case in cases}
    labelled = chosen("bench_semi_structured", labelled, args.only)
    report = Report("semi_structured", COLUMNS, args)
    for case in labelled.values():
        report.extend(bench(case, QUICK_SAMPLES if args.quick else SAMPLES))
    return report.publish()


if __name__ == "__main__":
    sys.exit(main())
