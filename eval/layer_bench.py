"""One layer's training step on this machine, dense and sparse in one run: `tritonsparse bench`.

    tritonsparse bench --shape 4096x4096 --tokens 8192 --dtype bfloat16
    tritonsparse bench --smoke

    dense     nn.Linear under autocast, float32 master
    eager     Ŵ by torch operations under autograd, as published code does
    torch, triton, fused     the sparse layer by each back end that runs here; cached: its view kept (`attach`)

Forward and backward, gradients of input, weight, bias and threshold. Runs alternate, so that all meet the same
neighbours on the machine; a layer whose output is not the eager one's prints WRONG and no time. `ratio` is the dense
line's time over the row's: below 1, sparsity costs time here.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tritonsparse as ts
from tritonsparse.kernels import _triton
from tritonsparse.methods import AutoSparse

from .command_line import COUNT, Parser, Value, one_line, one_of
from .speed import measure

__all__ = ["BenchRow", "bench", "main"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# sigmoid(-4) = 0.018 prunes 63 % of N(0, 0.02²).
LOGIT, DEVIATION = -4.0, 0.02


def _sizes(word: str) -> tuple[int, int]:
    outputs, inputs = (COUNT.read(size) for size in word.split("x"))
    return outputs, inputs


SHAPE = Value("OUTPUTSxINPUTS of at least 1", (str,), _sizes, lambda sizes: min(sizes) >= 1, "write 4096x1024")


@dataclass(frozen=True)
class BenchRow:
    """One way to train the layer: milliseconds a step (median, 20th and 80th percentile), and against dense."""

    way: str
    median_ms: float | None
    p20_ms: float | None
    p80_ms: float | None
    ratio: float | None
    right: bool


class Eager(nn.Module):
    """STR's formulation as published: elementwise passes over the weight that autograd records."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.threshold = nn.Parameter(torch.full((1,), LOGIT, device=linear.weight.device))

    def forward(self, x: Tensor) -> Tensor:
        shrunk = self.weight.sign() * (self.weight.abs() - self.threshold.sigmoid()).relu()
        return F.linear(x, shrunk, self.bias)


def bench(
    outputs: int, inputs: int, tokens: int, dtype: torch.dtype, *, device: str | None = None, runs: int = 30
) -> list[BenchRow]:
    """Time one layer's step in every way that runs on `device`.

    Args:
        outputs, inputs: the layer's weight, `[outputs, inputs]`.
        tokens: rows of its input.
        dtype: of the products; float32 means no autocast.
        device: "cuda" or "cpu"; the GPU if there is one when None.
        runs: how many steps of each the quantiles are of.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    x = torch.randn(tokens, inputs, device=device, requires_grad=True)
    grad = torch.randn(tokens, outputs, device=device, dtype=dtype)

    def linear() -> nn.Linear:
        torch.manual_seed(1)
        made = nn.Linear(inputs, outputs, device=device)
        nn.init.normal_(made.weight, std=DEVIATION)
        return made

    def step(module: nn.Module) -> Callable[[], Tensor]:
        def run() -> Tensor:
            for parameter in module.parameters():
                parameter.grad = None
            # The timer is made for inference.
            with torch.enable_grad():
                with torch.autocast(device, dtype, enabled=dtype != torch.float32):
                    y: Tensor = module(x)
                y.backward(grad)
            return y.detach()

        return run

    modules: dict[str, nn.Module] = {"dense": linear(), "eager": Eager(linear())}
    backends = ["torch"]
    if _triton.AVAILABLE and (device == "cuda" or (_triton.INTERPRETED and dtype != torch.bfloat16)):
        backends += ["triton", "fused"]
    for backend in backends:
        for cached in (False, True) if backend != "fused" else (False,):
            model = nn.Sequential(linear())
            method = AutoSparse(threshold_init=LOGIT, alpha=0.4, min_density=0.0)
            sparsifier = ts.sparsify(model, method, include=["*"], backend=backend, total_steps=1, steps_per_epoch=1)
            if cached:
                optimizer = torch.optim.SGD(sparsifier.param_groups(lr=0.0))
                sparsifier.attach(optimizer, cache_dtype=dtype)
            modules[f"{backend}, cached" if cached else backend] = model
    calls = {way: step(module) for way, module in modules.items()}
    expected = calls["eager"]().double()
    # Of products in the same dtype, summed in other orders.
    bound = 1e-5 if dtype == torch.float32 else 2e-2
    errors = {way: float((call().double() - expected).norm() / expected.norm()) for way, call in calls.items()}
    right = {way: way == "dense" or error <= bound for way, error in errors.items()}
    synchronise = torch.cuda.synchronize if device == "cuda" else None
    timings = measure(
        {way: call for way, call in calls.items() if right[way]},
        batch_size=tokens, runs=runs, synchronise=synchronise,
    )  # fmt: skip
    rows = []
    for way in calls:
        timing = timings.get(way)
        milliseconds = None if timing is None else 1e3 * timing.median
        rows.append(
            BenchRow(
                way,
                milliseconds,
                None if timing is None else 1e3 * timing.p20,
                None if timing is None else 1e3 * timing.p80,
                None if milliseconds is None else 1e3 * timings["dense"].median / milliseconds,
                right[way],
            )
        )
    return rows


def parser(command: str | None = None) -> Parser:
    """The options; `main` reads them."""
    result = Parser("eval.layer_bench", __doc__, command)
    add = result.add_argument
    add("--shape", type=SHAPE, default="4096x4096", help="OUTPUTSxINPUTS of the layer, %(default)s by default")
    add("--tokens", type=COUNT, default=8192, help="rows of its input, %(default)s by default")
    add("--dtype", type=one_of(DTYPES), default="bfloat16", help=f"of the products: {', '.join(DTYPES)} (%(default)s)")
    add("--runs", type=COUNT, default=30, help="steps of each way, %(default)s by default")
    add("--smoke", action="store_true", help="a tiny layer in float32, on any machine")
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; see the head of this file."""
    return one_line(lambda: run(argv))


def run(argv: Sequence[str] | None, command: str | None = None) -> int:
    """As `main`, but that what does not fit is raised."""
    args = parser(command).parse_args(argv)
    if args.smoke:
        outputs, inputs, tokens, dtype, runs = 48, 32, 16, torch.float32, 3
    else:
        (outputs, inputs), tokens, dtype, runs = args.shape, args.tokens, DTYPES[args.dtype], args.runs
    rows = bench(outputs, inputs, tokens, dtype, runs=runs)
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    print(f"{name}: [{tokens}, {inputs}] x [{outputs}, {inputs}]^T, {dtype}, forward and backward")
    print(f"{'way':<16}  median ms      p20      p80  ratio")
    for row in rows:
        if row.median_ms is None:
            print(f"{row.way:<16}      WRONG")
        else:
            print(f"{row.way:<16}  {row.median_ms:9.3f}  {row.p20_ms:7.3f}  {row.p80_ms:7.3f}  {row.ratio:5.2f}")
    print(json.dumps([asdict(row) for row in rows]))
    return int(not all(row.right for row in rows))


if __name__ == "__main__":
    sys.exit(main())
