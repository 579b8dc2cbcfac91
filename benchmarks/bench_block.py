"""The products of a linear layer whose weight is sparse in blocks: forward, dX, dW, and all three as a step.

    python benchmarks/bench_block.py [--out DIR] [--tune] [--tiles]     on a GPU
    python benchmarks/bench_block.py --smoke                            two tiny cases, on any machine

    provider       forward [M, K] -> [M, N]     grad_input                 grad_weight
    dense random   the vendor on a random weight, and the same for every density
    dense masked   the vendor on the weight with its pruned blocks zeroed
    ours           block_linear                 block_grad_input           block_grad_weight
    torch bsr      bsr_dense_addmm(W)           bsr_dense_addmm(W^T)       sampled_addmm
    stk            dds(W^T)                     dds(W)                     sdd                     blocks of 128

A step is all three, and "ours" rebuilds its index in it, as a topology that moves demands; the others' formats are made
beforehand, outside the time. torch's operators run with the parameters they ship with; `--tune` adds a line with what
`tune_bsr_dense_addmm` finds (minutes). stk is timed where it is installed. `--tiles` adds lines of forward and dX with
other configurations than ours computes, by which the rules of `kernels/_block_tiles.py` are judged. Zeros in an operand
make a dense product faster (less power), so both dense lines are printed.

`tflop_per_s` counts kept blocks only; `speedup` is over "dense random"; `of_ideal` is the speed-up times the density: 1
means that all of the skipped work was saved; `break_even` is the density at which ours takes as long as dense, between
the measured ones. "index" is the time to rebuild the indices of a whole model. Times are of CUDA graph replays over
inputs larger than the L2. Errors: relative RMS against float64, bounded by 1.1 times what the dense products make.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tritonsparse.kernels import _triton
from tritonsparse.kernels._block_tiles import block_tiles
from tritonsparse.kernels._tiles import input_precision, is_aligned, limits_of
from tritonsparse.kernels.block_gemm import block_grad_input, block_linear
from tritonsparse.kernels.block_grad import block_grad_weight
from tritonsparse.kernels.block_topology import IndexTable, index_size

sys.path.append(str(Path(__file__).parent))  # PYTHONSAFEPATH keeps a script's own folder off it
from harness import (
    SAMPLES,
    Row,
    announce,
    gated,
    input_sets,
    measure,
    parser_of,
    publish,
    refuse_without_gpu,
    relative_error,
)

BF16, FP32 = torch.bfloat16, torch.float32
DEVIATION = 0.02
DENSITIES = (1.0, 0.5, 0.3, 0.2, 0.1, 0.05, 0.02)
BLOCKS = (128, 64, 32)
# On a CPU times mean nothing: enough for the program to have run.
TIMED = partial(measure, graph=True, samples=SAMPLES if torch.cuda.is_available() else 3)
OPS = ("forward", "grad_input", "grad_weight", "step")


@dataclass(frozen=True)
class Case:
    """A layer's weight `[n, k]` and the tokens of a step."""

    layer: str
    n: int
    k: int
    tokens: tuple[int, ...]
    dtype: torch.dtype = BF16


CASES = (
    Case("transformer-base ffn", 2048, 512, (8192,)),
    Case("transformer-big ffn", 4096, 1024, (8192, 32768)),
    Case("llama-7b attention", 4096, 4096, (256, 4096, 16384)),
    Case("llama-7b mlp in", 11008, 4096, (4096, 16384)),
    Case("llama-7b mlp out", 4096, 11008, (4096,)),
)
# No bfloat16: under TRITON_INTERPRET=1 the kernels run as well, and the interpreter is wrong in it.
SMOKE_CASES = (Case("smoke", 64, 96, (33,), FP32), Case("smoke", 32, 64, (7,), torch.float16))
SMOKE_MODEL = [(64, 96), (32, 64)]
# Every linear layer of Llama-7B's 32 blocks: rows and columns of the weights.
MODEL = [(4096, 4096)] * 128 + [(11008, 4096)] * 64 + [(4096, 11008)] * 32

COLUMNS = {
    "layer": "", "op": "", "m": "", "n": "", "k": "", "dtype": "", "block": "", "density": ".2f", "provider": "",
    "median_ms": ".4f", "p20_ms": ".4f", "p80_ms": ".4f", "tflop_per_s": ".1f", "speedup": ".2f", "of_ideal": ".3f",
    "break_even": ".2f", "error": ".1e",
}  # fmt: skip


@dataclass(frozen=True)
class Operands:
    """One set of inputs; `masked` is the weight with its pruned blocks zeroed."""

    x: Tensor
    grad_y: Tensor
    weight: Tensor
    masked: Tensor
    flags: Tensor
    index: Tensor
    table: IndexTable
    block: tuple[int, int]

    @classmethod
    def draw(cls, case: Case, m: int, block: int, density: float, seed: int) -> Operands:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        random = torch.Generator(device).manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=random, device=device).to(case.dtype)

        weight = normal(case.n, case.k).mul_(DEVIATION)
        rows, columns = case.n // block, case.k // block
        flags = torch.zeros(rows * columns, dtype=torch.bool, device=device)
        kept = max(1, round(density * rows * columns))
        flags[torch.randperm(rows * columns, generator=random, device=device)[:kept]] = True
        flags = flags.view(rows, columns)
        index = torch.empty(index_size(rows, columns), dtype=torch.int32, device=device)
        table = IndexTable([flags], [index], _backend())
        table.build()
        mask = flags.repeat_interleave(block, 0).repeat_interleave(block, 1)
        x, grad_y = normal(m, case.k), normal(m, case.n)
        return cls(x, grad_y, weight, weight * mask, flags, index, table, (block, block))

    @property
    def mask(self) -> Tensor:
        return self.flags.repeat_interleave(self.block[0], 0).repeat_interleave(self.block[1], 1)


def _backend() -> str:
    return "triton" if torch.cuda.is_available() or _triton.INTERPRETED else "torch"


# The results of forward, dX and dW, or one of them.
Provider = Callable[[], tuple[Any, ...]]


def _step(parts: dict[str, Callable[[], Any]], op: str, before: Callable[[], None] | None = None) -> Provider:
    """The op of a provider; its step is all three, after what goes `before` them."""
    if op != "step":
        return lambda: (parts[op](),)

    def run() -> tuple[Any, ...]:
        if before is not None:
            before()
        return tuple(part() for part in parts.values())

    return run


def _dense(o: Operands, weight: Tensor, op: str) -> Provider:
    parts = {
        "forward": lambda: F.linear(o.x, weight),
        "grad_input": lambda: o.grad_y @ weight,
        "grad_weight": lambda: o.grad_y.t() @ o.x,
    }
    return _step(parts, op)


def _ours(o: Operands, op: str) -> Provider:
    given: dict[str, Any] = {"block": o.block, "backend": _backend()}
    shape, dtype = tuple(o.weight.shape), o.weight.dtype
    parts = {
        "forward": lambda: block_linear(o.x, o.weight, None, o.index, **given),
        "grad_input": lambda: block_grad_input(o.grad_y, o.weight, o.index, **given),
        "grad_weight": lambda: block_grad_weight(o.grad_y, o.x, o.index, shape=shape, out_dtype=dtype, **given)[0],
    }
    return _step(parts, op, o.table.build)


def _variants(block: int) -> dict[str, dict[str, Any]]:
    """Other configurations of the products, by name: what they change in the computed one."""
    variants: dict[str, dict[str, Any]] = {
        "pointers": {"descriptors": False},
        "a program an item": {"persistent": 0},
        "two programs": {"m": 128, "num_warps": 8 if block == 128 else 4, "num_stages": 3, "persistent": 2},
        "group 1": {"group": 1},
    }
    if block == 64:
        # A descriptor's box has at most 256 rows.
        variants["512 rows"] = {"m": 512, "num_stages": 3, "descriptors": False}
    return variants


def _varied(o: Operands, op: str, changes: dict[str, Any]) -> Provider:
    (n, k), m = o.weight.shape, o.x.shape[0]
    sizes, rows = ((n, k), o.x) if op == "forward" else ((k, n), o.grad_y)
    tiles = block_tiles(
        m, *sizes, block=o.block, weight_bytes=o.weight.element_size(), x_bytes=rows.element_size(),
        precision=input_precision(rows.dtype), aligned=is_aligned(rows, o.weight), limits=limits_of(rows.device),
    )  # fmt: skip
    given: dict[str, Any] = {"block": o.block, "backend": _backend(), "tiles": replace(tiles, **changes)}
    parts = {
        "forward": lambda: block_linear(o.x, o.weight, None, o.index, **given),
        "grad_input": lambda: block_grad_input(o.grad_y, o.weight, o.index, **given),
    }
    return _step(parts, op)


def _torch_bsr(o: Operands, op: str, tune: bool) -> Provider:
    from torch.sparse._triton_ops import bsr_dense_addmm, sampled_addmm
    from torch.sparse._triton_ops_meta import tune_bsr_dense_addmm

    forward, backward = o.masked.to_sparse_bsr(o.block), o.masked.t().contiguous().to_sparse_bsr(o.block)
    # Neither is read: beta is 0.
    y, grad_x = o.grad_y.t().contiguous(), o.x.t().contiguous()
    if tune and op != "grad_weight":
        for bsr, dense, out in ((forward, o.x, y), (backward, o.grad_y, grad_x)):
            tune_bsr_dense_addmm(out, bsr, dense.t(), beta=0, store=True)
    parts = {
        "forward": lambda: bsr_dense_addmm(y, forward, o.x.t(), beta=0).t(),
        "grad_input": lambda: bsr_dense_addmm(grad_x, backward, o.grad_y.t(), beta=0).t(),
        "grad_weight": lambda: sampled_addmm(forward, o.grad_y.t(), o.x, beta=0.0, skip_checks=True),
    }
    return _step(parts, op)


def _stk(o: Operands, op: str) -> Provider:
    import stk

    weight = stk.ops.to_sparse(o.masked, o.block[0])
    parts = {
        "forward": lambda: stk.ops.dds(o.x, weight.t()),
        "grad_input": lambda: stk.ops.dds(o.grad_y, weight),
        "grad_weight": lambda: stk.ops.sdd(o.grad_y.t(), o.x, weight),
    }
    return _step(parts, op)


def _providers(
    block: int, density: float, op: str, tune: bool, tiles: bool
) -> dict[str, Callable[[Operands, str], Provider]]:
    made: dict[str, Callable[[Operands, str], Provider]] = {
        "dense random": lambda o, op: _dense(o, o.weight, op),
        "dense masked": lambda o, op: _dense(o, o.masked, op),
        "ours": _ours,
    }
    if tiles and op in ("forward", "grad_input"):
        for name, changes in _variants(block).items():
            made[f"ours, {name}"] = partial(_varied, changes=changes)
    if torch.cuda.is_available() and density < 1:
        made["torch bsr"] = partial(_torch_bsr, tune=False)
        if tune:
            made["torch bsr tuned"] = partial(_torch_bsr, tune=True)
        if block == 128 and importlib.util.find_spec("stk") is not None:
            made["stk"] = _stk
    return made


def _as_dense(result: Any) -> Tensor:
    if isinstance(result, Tensor):
        return result if result.layout == torch.strided else result.to_dense()
    import stk

    dense: Tensor = stk.ops.to_dense(result)
    return dense


def _exact(o: Operands, op: str, provider: str) -> tuple[Tensor, ...]:
    """In float64: what the provider computes, from the operands as it is given them."""
    weight = (o.weight if provider == "dense random" else o.masked).double()
    made = {
        "forward": lambda: o.x.double() @ weight.t(),
        "grad_input": lambda: o.grad_y.double() @ weight,
        "grad_weight": lambda: o.grad_y.double().t() @ o.x.double() * (1 if provider.startswith("dense") else o.mask),
    }
    return tuple(part() for part in made.values()) if op == "step" else (made[op](),)


def _error(provider: Provider, o: Operands, op: str, name: str) -> float:
    exact = _exact(o, op, name)
    return max(relative_error(_as_dense(a), e) for a, e in zip(provider(), exact, strict=True))


def bench(
    case: Case,
    m: int,
    block: int,
    density: float,
    op: str,
    dense_ms: float | None = None,
    tune: bool = False,
    tiles: bool = False,
) -> list[Row]:
    """One row a provider; "dense random" first, unless its time is known."""
    nbytes = case.n * case.k * case.dtype.itemsize + m * (case.n + case.k) * case.dtype.itemsize
    operands = [Operands.draw(case, m, block, density, seed) for seed in range(min(8, input_sets(nbytes)))]
    kept = operands[0].flags.float().mean().item()
    facts: Row = {
        "layer": case.layer, "op": op, "m": m, "n": case.n, "k": case.k,
        "dtype": str(case.dtype).removeprefix("torch."), "block": block, "density": kept,
    }  # fmt: skip
    providers = _providers(block, density, op, tune, tiles)
    one = operands[0]
    allowed = max(_error(_dense(one, weight, op), one, op, name) for name, weight in
                  (("dense masked", one.masked), ("dense random", one.weight)))  # fmt: skip
    bound = max(1.1 * allowed, 1e-6)
    rows: list[Row] = []
    for name, make in providers.items():
        if name == "dense random" and dense_ms is not None:
            continue
        row = {**facts, "provider": name}
        try:
            calls = [make(given, op) for given in operands]
            error = _error(calls[0], operands[0], op, name)
            row = gated(row, error, bound, partial(TIMED, calls))
        except Exception as failure:
            # What somebody else's operator does not do is a result; what ours does not do is a failure.
            if name == "ours" or name.startswith("dense"):
                raise
            rows.append({**row, "verdict": "failed", "failure": f"{type(failure).__name__}: {failure}"})
            continue
        if name == "dense random":
            dense_ms = row["median_ms"]
        if row["median_ms"] and dense_ms:
            share = 1.0 if name.startswith("dense") else kept
            products = 3 if op == "step" else 1
            row["tflop_per_s"] = 2 * products * m * case.n * case.k * share / row["median_ms"] / 1e9
            row["speedup"] = dense_ms / row["median_ms"]
            row["of_ideal"] = row["speedup"] * share
        rows.append(row)
    return rows


def break_even(rows: Sequence[Row]) -> float | None:
    """The density at which ours takes as long as dense: the largest, between measured ones; None where it never does.

    Args:
        rows: of "ours" for one layer, op and block, by falling density.
    """
    timed = [(row["density"], row["speedup"]) for row in rows if row.get("speedup")]
    if timed and timed[0][1] >= 1:
        return float(timed[0][0])
    for (above, slow), (below, fast) in pairwise(timed):
        if slow < 1 <= fast:
            # Time is all but linear in the density.
            share = (1 / slow - 1) / (1 / slow - 1 / fast)
            return float(above + share * (below - above))
    return None


def bench_index(block: int, shapes: Sequence[tuple[int, int]]) -> Row:
    """The time to rebuild the indices of a whole model."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    grids = [(n // block, k // block) for n, k in shapes]
    flags = [torch.rand(grid, device=device) < 0.1 for grid in grids]
    indices = [torch.empty(index_size(*grid), dtype=torch.int32, device=device) for grid in grids]
    table = IndexTable(flags, indices, _backend())
    timing = TIMED([table.build])
    return {
        "layer": f"{len(shapes)} layers", "op": "index", "block": block, "density": 0.1, "provider": "ours",
        "verdict": "right", "median_ms": timing.median, "p20_ms": timing.p20, "p80_ms": timing.p80,
    }  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--tune", action="store_true", help="also time torch's operators as tuned for each shape")
    parser.add_argument("--tiles", action="store_true", help="also time other configurations than those computed")
    args = parser.parse_args(argv)
    if not args.smoke:
        refuse_without_gpu("bench_block")
    announce()
    rows: list[Row] = []
    densities, blocks = ((1.0, 0.3), (16,)) if args.smoke else (DENSITIES, BLOCKS)
    for case in SMOKE_CASES if args.smoke else CASES:
        for m in case.tokens:
            for op in OPS:
                dense_ms = None
                for block in blocks:
                    ours: list[Row] = []
                    for density in densities:
                        made = bench(case, m, block, density, op, dense_ms, args.tune, args.tiles)
                        if made[0]["provider"] == "dense random":
                            dense_ms = made[0]["median_ms"]
                        ours += [row for row in made if row["provider"] == "ours"]
                        rows += made
                    equal = break_even(ours)
                    for row in ours:
                        row["break_even"] = equal
    rows += [bench_index(block, SMOKE_MODEL if args.smoke else MODEL) for block in blocks]
    publish("block", rows, COLUMNS, args.out, smoke=args.smoke)
    return int(any(row["verdict"] == "WRONG" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
