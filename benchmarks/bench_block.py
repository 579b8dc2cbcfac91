"""The products of a linear layer whose weight is sparse in blocks: forward, dX, dW, and all three as a step.

    python benchmarks/bench_block.py [--quick] [--only '* step *'] [--tune] [--tiles] [--out DIR]     on a GPU
    python benchmarks/bench_block.py --smoke                                      two tiny cases, on any machine

    provider       forward [M, K] -> [M, N]     grad_input                 grad_weight
    dense random   cuBLAS on a random weight, and the same for every density
    dense masked   cuBLAS on the weight with its pruned blocks zeroed
    ours           block_forward                block_grad_input           block_grad_weight
    torch bsr      bsr_dense_addmm(W)           bsr_dense_addmm(W^T)       sampled_addmm
    stk            dds(W^T)                     dds(W)                     sdd                     blocks of 128

A step is all three, and "ours" rebuilds its index in it, as a topology that moves demands; the others' formats are made
beforehand, outside the time. torch's operators run with the parameters they ship with; `--tune` adds a line with what
`tune_bsr_dense_addmm` finds (minutes). stk is timed where it is installed. `--tiles` adds lines of forward and dX with
other configurations than ours computes, by which the rules of `kernels/block/_gemm_tiles.py` are judged. Zeros in an
operand make a dense product faster (less power), so both dense lines are printed.

`tflop_per_s` counts kept blocks only; `speedup` is over "dense random"; `of_ideal` is the speed-up times the density: 1
means that all of the skipped work was saved; `break_even` is the density at which ours takes as long as dense, between
the measured ones. "index" is the time to rebuild the indices of a whole model. `--quick` takes 4096 x 4096 at 16,384
tokens and leaves out other libraries. Times are of CUDA graph replays over inputs larger than the L2. Errors: relative
RMS against float64, bounded by 1.1 times what the dense products make.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parent))  # PYTHONSAFEPATH keeps a script's own folder off it
from block_products import Case, Operands, backend_here, dense, error_of, providers_of
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
)
from reports import Report, chosen

from tritonsparse.kernels.block.topology import IndexTable, index_size

FP32 = torch.float32
DENSITIES, QUICK_DENSITIES = (1.0, 0.5, 0.3, 0.2, 0.1, 0.05, 0.02), (1.0, 0.5, 0.2, 0.1)
BLOCKS = (128, 64, 32)
# On a CPU times mean nothing: enough for the program to have run.
DEFAULT_SAMPLES = SAMPLES if torch.cuda.is_available() else 3
OPS = ("forward", "grad_input", "grad_weight", "step")

CASES = (
    Case("transformer-base ffn", 2048, 512, (8192,)),
    Case("transformer-big ffn", 4096, 1024, (8192, 32768)),
    Case("llama-7b attention", 4096, 4096, (256, 4096, 16384)),
    Case("llama-7b mlp in", 11008, 4096, (4096, 16384)),
    Case("llama-7b mlp out", 4096, 11008, (4096,)),
)
QUICK_CASES = (Case("llama-7b attention", 4096, 4096, (16384,)),)
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


def bench(
    case: Case,
    m: int,
    block: int,
    density: float,
    op: str,
    dense_ms: float | None = None,
    *,
    samples: int = DEFAULT_SAMPLES,
    others: bool = True,
    tune: bool = False,
    tiles: bool = False,
) -> Iterator[Row]:
    """One row a provider; "dense random" first, unless its time is known. `others`: also what is not ours nor dense."""
    nbytes = case.n * case.k * case.dtype.itemsize + m * (case.n + case.k) * case.dtype.itemsize
    operands = [Operands.draw(case, m, block, density, seed) for seed in range(min(8, input_sets(nbytes)))]
    kept = operands[0].flags.float().mean().item()
    facts: Row = {
        "layer": case.layer, "op": op, "m": m, "n": case.n, "k": case.k,
        "dtype": str(case.dtype).removeprefix("torch."), "block": block, "density": kept,
    }  # fmt: skip
    one = operands[0]
    allowed = max(error_of(dense(one, weight, op), one, op, name) for name, weight in
                  (("dense masked", one.masked), ("dense random", one.weight)))  # fmt: skip
    bound = max(1.1 * allowed, 1e-6)
    for name, make in providers_of(block, density, op, others=others, tune=tune, tiles=tiles).items():
        if name == "dense random" and dense_ms is not None:
            continue
        row = {**facts, "provider": name}
        try:
            calls = [make(given, op) for given in operands]
            error = error_of(calls[0], operands[0], op, name)
            row = gated(row, error, bound, partial(measure, calls, graph=True, samples=samples))
        except Exception as failure:
            # What somebody else's operator does not do is a result; what ours does not do is a failure.
            if name == "ours" or name.startswith("dense"):
                raise
            yield {**row, "verdict": "failed", "failure": f"{type(failure).__name__}: {failure}"}
            continue
        if name == "dense random":
            dense_ms = row["median_ms"]
        if row["median_ms"] and dense_ms:
            share = 1.0 if name.startswith("dense") else kept
            products = 3 if op == "step" else 1
            row["tflop_per_s"] = 2 * products * m * case.n * case.k * share / row["median_ms"] / 1e9
            row["speedup"] = dense_ms / row["median_ms"]
            row["of_ideal"] = row["speedup"] * share
        yield row


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


def bench_index(block: int, shapes: Sequence[tuple[int, int]], samples: int = DEFAULT_SAMPLES) -> Row:
    """The time to rebuild the indices of a whole model."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    grids = [(n // block, k // block) for n, k in shapes]
    flags = [torch.rand(grid, device=device) < 0.1 for grid in grids]
    indices = [torch.empty(index_size(*grid), dtype=torch.int32, device=device) for grid in grids]
    table = IndexTable(flags, indices, backend_here())
    timing = measure([table.build], graph=True, samples=samples)
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
    densities, blocks = ((1.0, 0.3), (16,)) if args.smoke else (QUICK_DENSITIES if args.quick else DENSITIES, BLOCKS)
    samples = QUICK_SAMPLES if args.quick and not args.smoke else DEFAULT_SAMPLES
    cases = {
        f"{case.layer} {case.n}x{case.k} {m} {op} {block}": (case, m, op, block)
        for case in (SMOKE_CASES if args.smoke else QUICK_CASES if args.quick else CASES)
        for m in case.tokens
        for block in blocks
        for op in OPS
    }
    indices = {f"index {block}": block for block in blocks}
    labels = chosen("bench_block", cases | indices, args.only)
    report = Report("block", COLUMNS, args)
    # Of a case that was timed with other blocks.
    dense_ms: dict[tuple[Case, int, str], float] = {}
    for case, m, op, block in (cases[label] for label in labels if label in cases):
        ours: list[Row] = []
        for density in densities:
            known = dense_ms.get((case, m, op))
            for row in bench(case, m, block, density, op, known, samples=samples, others=not args.quick,
                             tune=args.tune, tiles=args.tiles):  # fmt: skip
                report.add(row)
                if row["provider"] == "dense random" and row["median_ms"]:
                    dense_ms[case, m, op] = row["median_ms"]
                ours += [row] if row["provider"] == "ours" else []
        equal = break_even(ours)
        for row in ours:
            row["break_even"] = equal
    for block in (indices[label] for label in labels if label in indices):
        report.add(bench_index(block, SMOKE_MODEL if args.smoke else MODEL, samples))
    return report.publish()


if __name__ == "__main__":
    sys.exit(main())
