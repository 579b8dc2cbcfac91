"""A linear layer of packed blocks at inference, one token and many, and the dense layer.

    python benchmarks/bench_block_inference.py [--quick] [--only 'llama*'] [--out DIR]      on a GPU
    python benchmarks/bench_block_inference.py --smoke                     two tiny cases, on any machine

    provider   dense      F.linear of the weight with its zeros: what finalize(format="dense") leaves
               packed     packed_block_linear of the kept blocks: what finalize(format="bsr") leaves

Times are of the device alone (CUDA graphs), over as many weights in turn as the L2 cannot hold. `of_dense` is how many
times faster than the dense line, `of_bytes` that over 1/density, which reading and multiplying only what is kept would
give. The document also has the largest density at which packed was faster, by layer, block and number of tokens.
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
from tritonsparse.kernels.block.packed import pack_blocks, packed_block_linear, unpack_blocks
from tritonsparse.kernels.block.topology import build_index_reference

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


@dataclass(frozen=True)
class Case:
    """A layer's weight `[n, k]` in the dtype of the product, its blocks, and the rows of x of each measurement."""

    layer: str
    n: int
    k: int
    block: int
    densities: Sequence[float] = (0.5, 0.3, 0.2, 0.1)
    tokens: Sequence[int] = (1, 16, 256, 4096)
    dtype: torch.dtype = torch.bfloat16


CASES = tuple(
    Case(layer, n, k, block)
    for layer, n, k in (("transformer-big ffn", 4096, 1024), ("llama-7b mlp in", 11008, 4096))
    for block in (128, 64, 32)
)
QUICK_CASES = tuple(Case("llama-7b mlp in", 11008, 4096, block, (0.2, 0.1), (1, 16, 4096)) for block in (128, 64))
# No bfloat16: under TRITON_INTERPRET=1 the kernels run as well, and the interpreter is wrong in it.
SMOKE_CASES = (
    Case("smoke", 64, 96, 16, (0.5, 0.2), (1, 17), torch.float32),
    Case("smoke", 64, 64, 32, (0.4,), (3,), torch.float16),
)
BOUND = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
COLUMNS = {
    "layer": "", "n": "", "k": "", "block": "", "tokens": "", "density": ".2f", "provider": "",
    "median_ms": ".4f", "p20_ms": ".4f", "p80_ms": ".4f", "of_dense": ".3f", "of_bytes": ".3f", "error": ".1e",
}  # fmt: skip


def bench(case: Case, samples: int = SAMPLES) -> Iterator[Row]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    backend = "triton" if device == "cuda" or _triton.INTERPRETED else "torch"
    random = torch.Generator(device).manual_seed(0)
    grid = (case.n // case.block, case.k // case.block)
    for density in case.densities:
        flags = torch.rand(grid, generator=random, device=device) < density
        index, kept = build_index_reference(flags), max(1, int(flags.sum()))
        # The dense weights are many sets; the packed ones are as many bytes only in more sets.
        values = [
            torch.randn(kept, case.block, case.block, generator=random, device=device).to(case.dtype)
            for _ in range(input_sets(kept * case.block**2 * case.dtype.itemsize))
        ]
        dense = [
            unpack_blocks(each, index, (case.n, case.k))
            for each in values[: input_sets(case.n * case.k * case.dtype.itemsize)]
        ]
        assert torch.equal(pack_blocks(dense[0], index, (case.block, case.block), kept), values[0])
        for tokens in case.tokens:
            x = torch.randn(tokens, case.k, generator=random, device=device).to(case.dtype)
            exact = x.double() @ dense[0].double().t()
            providers: dict[str, list[Callable[[], Tensor]]] = {
                "dense": [partial(F.linear, x, weight) for weight in dense],
                "packed": [
                    partial(packed_block_linear, x, each, None, index, shape=(case.n, case.k), backend=backend)
                    for each in values
                ],
            }
            line: Row | None = None
            for provider, calls in providers.items():
                facts: Row = {
                    "layer": case.layer, "n": case.n, "k": case.k, "block": case.block, "tokens": tokens,
                    "density": kept / flags.numel(), "provider": provider,
                }  # fmt: skip
                error = relative_error(calls[0](), exact)
                row = gated(facts, error, BOUND[case.dtype], partial(measure, calls, graph=True, samples=samples))
                if line is not None and row["median_ms"] and line["median_ms"]:
                    row["of_dense"] = line["median_ms"] / row["median_ms"]
                    row["of_bytes"] = row["of_dense"] * row["density"]
                line = line or row
                yield row


def break_even(rows: Sequence[Row]) -> list[Row]:
    """Per layer, block and number of tokens: the largest measured density at which packed was faster, or None."""
    found: dict[tuple[object, ...], Row] = {}
    for row in rows:
        if row["provider"] != "packed":
            continue
        key = tuple(row[name] for name in ("layer", "n", "k", "block", "tokens"))
        entry = found.setdefault(
            key, {**dict(zip(("layer", "n", "k", "block", "tokens"), key, strict=True)), "at": None}
        )
        if (row.get("of_dense") or 0.0) > 1.0:
            entry["at"] = max(entry["at"] or 0.0, row["density"])
    return list(found.values())


def main(argv: Sequence[str] | None = None) -> int:
    args = parser_of(__doc__).parse_args(argv)
    if not args.smoke:
        refuse_without_gpu("bench_block_inference")
    announce()
    cases = SMOKE_CASES if args.smoke else QUICK_CASES if args.quick else CASES
    labelled = {f"{case.layer} {case.n}x{case.k} {case.block}": case for case in cases}
    labelled = chosen("bench_block_inference", labelled, args.only)
    report = Report("block_inference", COLUMNS, args)
    with torch.inference_mode():
        for case in labelled.values():
            report.extend(bench(case, QUICK_SAMPLES if args.quick else SAMPLES))
    return report.publish(break_even=break_even(report.rows))


if __name__ == "__main__":
    sys.exit(main())
