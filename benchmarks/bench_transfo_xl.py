"""A full training step of Transformer-XL under bf16 autocast: dense, and with masks of blocks at 80 and 90 %.

    python benchmarks/bench_transfo_xl.py [--quick] [--only '90*'] [--out DIR]      transfoxl-large, on a GPU
    python benchmarks/bench_transfo_xl.py --smoke                                   tiny, on any machine

    variant  dense: the stock model     80 %, 90 %: blocks of 64 x 64 kept by magnitude, `static`, back end "block"

A step is forward and backward of a segment of 384 tokens after a full memory of 384, in 16 columns, the adaptive
softmax over WikiText-103's 267,735 types, LAMB and the sparsifier's hooks. `ratio` is dense time over the variant's:
what block sparsity gains or costs. `peak_mib` is peak memory beyond what lay on the device before.

Gate: gradients of all parameters at the start, by relative RMS against the same model and mask in float32 and eager
PyTorch; the bound is 1.25 times what the dense model makes under autocast. Dropout is 0. A variant that does not run is
a row with its error. `--only` chooses among the sparse variants, `--quick` takes 90 %.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import tritonsparse as ts
from tritonsparse.train.text.lamb import Lamb
from tritonsparse.train.text.language_presets import build_transfo_xl

sys.path.append(str(Path(__file__).parent))  # PYTHONSAFEPATH keeps a script's own folder off it
from harness import Row, Timing, announce, gated, parser_of, refuse_without_gpu, relative_error, sample
from reports import Report, chosen

ROUNDS, STEPS = 5, 5
QUICK_ROUNDS, QUICK_STEPS = 2, 3
SPARSITIES = {"80 %": 0.8, "90 %": 0.9}
COLUMNS = {
    "variant": "", "median_ms": ".2f", "p20_ms": ".2f", "p80_ms": ".2f", "ratio": ".3f", "peak_mib": ".0f",
    "sparsity": ".2f", "error": ".1e", "failure": "",
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    preset: str
    types: int
    columns: int
    tgt_len: int
    block: int
    device: str


LARGE = Case("transfoxl-large", 267_735, 16, 384, 64, "cuda")
SMOKE = Case("transfoxl-tiny", 300, 2, 8, 32, "cpu")


class Variant:
    """A model ready to train, its memory full."""

    def __init__(self, case: Case, sparsity: float | None, backend: str | None = None) -> None:
        torch.manual_seed(0)
        self.case = case
        self.model = build_transfo_xl(case.preset, case.types, mem_len=case.tgt_len, dropout=0.0, dropatt=0.0)
        self.model.to(case.device)
        method = "dense" if sparsity is None else ts.methods.Static(sparsity=sparsity, criterion="magnitude")
        pattern = "unstructured" if sparsity is None else f"block:{case.block}"
        skips = sparsity is not None and case.device == "cuda"
        backend = backend or ("block" if skips else "auto")
        self.sparsifier = ts.sparsify(self.model, method, pattern=pattern, backend=backend)
        self.optimizer = Lamb(self.sparsifier.param_groups(lr=1e-4))
        self.sparsifier.attach(self.optimizer)
        random = torch.Generator().manual_seed(0)
        # Zipf's law, roughly: the adaptive softmax is made for it.
        draws = torch.rand(2, case.columns, case.tgt_len + 1, generator=random)
        ids = (case.types**draws - 1).long().clamp(max=case.types - 1).to(case.device)
        with torch.no_grad():
            self.mems: list[Tensor] = self.model(ids[0, :, :-1], target_ids=ids[0, :, 1:]).mems
        self.inputs, self.targets = ids[1, :, :-1], ids[1, :, 1:]

    def loss(self, autocast: bool = True) -> Tensor:
        with torch.autocast(self.case.device, torch.bfloat16) if autocast else contextlib.nullcontext():
            loss: Tensor = self.model(self.inputs, target_ids=self.targets, mems=self.mems).loss
        return loss

    def gradient(self, autocast: bool = True) -> Tensor:
        """All gradients of one backward, end to end, on the CPU; leaves none behind."""
        self.loss(autocast).backward()
        flat = [p.grad.float().flatten().cpu() for p in self.model.parameters() if p.grad is not None]
        self.optimizer.zero_grad()
        return torch.cat(flat)

    def step(self) -> None:
        self.loss().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def prepare(case: Case, name: str, sparsity: float | None) -> tuple[Row, Variant | None]:
    """The row so far (error, peak memory, sparsity) and what to time; no variant where it does not run."""
    row: Row = {"variant": name}
    cuda = case.device == "cuda"
    try:
        exact = Variant(case, sparsity, "torch").gradient(autocast=False)
        before = torch.cuda.memory_allocated() if cuda else 0
        variant = Variant(case, sparsity)
        row["error"] = relative_error(variant.gradient(), exact)
        row["sparsity"] = variant.sparsifier.sparsity()
        for _ in range(2):
            variant.step()
        if cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            variant.step()
            torch.cuda.synchronize()
            row["peak_bytes"] = torch.cuda.max_memory_allocated() - before
            row["peak_mib"] = row["peak_bytes"] / 2**20
    # A variant that cannot run is a result of this benchmark, not its end.
    except Exception as error:
        return {**row, "verdict": "failed", "failure": f"{type(error).__name__}: {error}".splitlines()[0][:300]}, None
    return row, variant


def bench(case: Case, sparsities: Mapping[str, float], rounds: int, steps: int) -> Iterator[Row]:
    """One row a variant, the dense one first; one variant is on the device at a time."""
    dense: Row = {}
    for name, sparsity in {"dense": None, **sparsities}.items():
        row, variant = prepare(case, name, sparsity)
        if variant is not None:
            bound = 1.25 * (dense or row).get("error", 0.0)
            times = [time for _ in range(rounds) for time in sample([variant.step], steps)]
            timing = Timing.of(times)
            row = gated(row, row["error"], bound, lambda timing=timing: timing)  # type: ignore[misc]
        del variant
        if row.get("median_ms") and dense.get("median_ms"):
            row["ratio"] = dense["median_ms"] / row["median_ms"]
        dense = dense or row
        yield row


def main(argv: Sequence[str] | None = None) -> int:
    args = parser_of(__doc__).parse_args(argv)
    if not args.smoke:
        refuse_without_gpu("bench_transfo_xl")
    announce()
    case = SMOKE if args.smoke else LARGE
    sparsities = {"90 %": 0.9} if args.quick or args.smoke else SPARSITIES
    sparsities = chosen("bench_transfo_xl", sparsities, args.only)
    rounds, steps = (1, 2) if args.smoke else (QUICK_ROUNDS, QUICK_STEPS) if args.quick else (ROUNDS, STEPS)
    tokens = case.columns * case.tgt_len
    report = Report("train_step_transfoxl-large", COLUMNS, args, preset=case.preset, tokens=tokens)
    report.extend(bench(case, sparsities, rounds, steps))
    return report.publish()


if __name__ == "__main__":
    sys.exit(main())
