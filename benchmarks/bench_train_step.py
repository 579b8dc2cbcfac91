"""A full training step of a translation Transformer under bf16 autocast: dense, and AutoSparse by back end.

    python benchmarks/bench_train_step.py [--preset transformer-big] [--out DIR]      on a GPU
    python benchmarks/bench_train_step.py --smoke                                     tiny, on any machine

    variant  dense: the stock model     triton: AutoSparse, our kernels
             torch: AutoSparse in plain PyTorch, the reference     each eager and under torch.compile

A step is forward, loss with label smoothing, backward, fused AdamW and the sparsifier's hooks, on 8,192
source and 8,192 target tokens. `ratio` is dense time over the variant's, dense run in the same mode: what
unstructured sparsity costs, as all products are dense (1 would be free). `extra_b` is peak memory beyond that
dense run's, in bytes a sparsified weight. Rounds of steps of all variants are timed in turn.

Gate: gradients of all parameters at the start, by relative RMS against the same model in float32 and eager
PyTorch; the bound is 1.25 times what eager PyTorch makes under autocast. Dropout is 0, so that every variant
computes the same. A variant that does not run is a row with its error.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tritonsparse as ts
from tritonsparse.train.presets import build_model

sys.path.append(str(Path(__file__).parent))  # PYTHONSAFEPATH keeps a script's own folder off it
from harness import (
    Row,
    Timing,
    announce,
    gated,
    parser_of,
    publish,
    refuse_without_gpu,
    relative_error,
    sample,
)

ROUNDS, STEPS = 5, 10
COLUMNS = {
    "variant": "", "mode": "", "median_ms": ".2f", "p20_ms": ".2f", "p80_ms": ".2f", "ratio": ".3f",
    "peak_mib": ".0f", "extra_b": ".2f", "sparsity": ".2f", "error": ".1e", "failure": "",
}  # fmt: skip


@dataclass(frozen=True)
class Vocabulary:
    """What `build_model` asks of a tokenizer."""

    size: int
    pad_token_id: int = 0
    eos_token_id: int = 1

    def __len__(self) -> int:
        return self.size


@dataclass(frozen=True)
class Case:
    preset: str
    vocabulary: int
    sentences: int
    length: int
    device: str
    compiler: str

    def batch(self) -> dict[str, Tensor]:
        random = torch.Generator().manual_seed(0)
        shape = (self.sentences, self.length)
        ids = torch.randint(3, self.vocabulary, (3, *shape), generator=random).to(self.device)
        return {
            "input_ids": ids[0], "attention_mask": torch.ones_like(ids[0]),
            "decoder_input_ids": ids[1], "labels": ids[2],
        }  # fmt: skip


SMOKE = Case("transformer-tiny", 64, 2, 8, "cpu", "aot_eager")


@dataclass
class Variant:
    """A model ready to train."""

    name: str
    mode: str
    model: nn.Module
    loss: Callable[[], Tensor]
    optimizer: torch.optim.Optimizer
    sparsifier: ts.Sparsifier | None
    row: Row = field(default_factory=dict)

    def gradient(self) -> Tensor:
        """All gradients of one backward, end to end; leaves none behind."""
        self.loss().backward()
        flat = torch.cat([p.grad.float().flatten() for p in self.model.parameters() if p.grad is not None])
        self.optimizer.zero_grad()
        return flat

    def step(self) -> None:
        self.loss().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def build(case: Case, name: str, mode: str, autocast: bool = True) -> Variant:
    torch.manual_seed(0)
    vocabulary: Any = Vocabulary(case.vocabulary)
    model = build_model(case.preset, vocabulary, dropout=0.0).to(case.device)
    sparsifier = None
    groups: Any = model.parameters()
    if name != "dense":
        method = ts.methods.AutoSparse(threshold_init=-4.0, alpha=0.4, alpha_schedule="constant")
        sparsifier = ts.sparsify(model, method, backend=name)
        groups = sparsifier.param_groups(lr=1e-4)
    optimizer = torch.optim.AdamW(groups, lr=1e-4, fused=True)
    if sparsifier is not None:
        sparsifier.attach(optimizer)
    batch = case.batch()
    labels = batch.pop("labels").flatten()

    def loss() -> Tensor:
        with torch.autocast(case.device, torch.bfloat16) if autocast else contextlib.nullcontext():
            logits = model(**batch, use_cache=False).logits
        return F.cross_entropy(logits.float().flatten(0, 1), labels, label_smoothing=0.1)

    compiled = torch.compile(loss, backend=case.compiler, dynamic=False) if mode == "compile" else loss
    return Variant(name, mode, model, compiled, optimizer, sparsifier)


def prepare(case: Case, name: str, mode: str) -> Variant | Row:
    """A variant with its row so far (gradient, peak memory, sparsity), or a row with its failure."""
    row: Row = {"variant": name, "mode": mode}
    cuda = case.device == "cuda"
    before = torch.cuda.memory_allocated() if cuda else 0
    try:
        variant = build(case, name, mode)
        row["gradient"] = variant.gradient().cpu()
        for _ in range(3):
            variant.step()
        if cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            variant.step()
            torch.cuda.synchronize()
            row["peak_bytes"] = torch.cuda.max_memory_allocated() - before
    # Any failure of a compiler is a result of this benchmark, not its end.
    except Exception as error:
        failure = f"{type(error).__name__}: {error}".splitlines()[0][:300]
        return {**row, "verdict": "failed", "failure": failure}
    if variant.sparsifier is not None:
        row["sparsity"] = variant.sparsifier.sparsity()
        row["weights"] = sum(layer.weight.numel() for layer in variant.sparsifier.layers.values())
    variant.row = row
    return variant


def bench(case: Case, names: Sequence[str], modes: Sequence[str], rounds: int, steps: int) -> list[Row]:
    """One row a variant, dense ones first in their mode."""
    exact = {}
    for family, name in (("dense", "dense"), ("sparse", "torch")):
        exact[family] = build(case, name, "eager", autocast=False).gradient().cpu()
    prepared = [prepare(case, name, mode) for mode in modes for name in names]
    variants = [variant for variant in prepared if isinstance(variant, Variant)]
    times: dict[int, list[float]] = {id(variant): [] for variant in variants}
    for _ in range(rounds):
        for variant in variants:
            times[id(variant)] += sample([variant.step], steps)

    def error(variant: Variant) -> float:
        return relative_error(variant.row["gradient"], exact["dense" if variant.name == "dense" else "sparse"])

    bounds = {v.name: 1.25 * error(v) for v in variants if v.mode == "eager" and v.name in ("dense", "torch")}
    rows: list[Row] = []
    for entry in prepared:
        if not isinstance(entry, Variant):
            rows.append({key: value for key, value in entry.items() if key != "gradient"})
            continue
        bound = bounds.get("dense" if entry.name == "dense" else "torch", 0.0)
        timing = Timing.of(times[id(entry)])
        row = gated(entry.row, error(entry), bound, lambda timing=timing: timing)  # type: ignore[misc]
        rows.append({key: value for key, value in row.items() if key != "gradient"})
    return [_compared(row, rows) for row in rows]


def _compared(row: Row, rows: Sequence[Row]) -> Row:
    """With what the dense variant of the same mode makes of it."""
    dense = next(other for other in rows if other["variant"] == "dense" and other["mode"] == row["mode"])
    if row.get("median_ms") and dense.get("median_ms"):
        row["ratio"] = dense["median_ms"] / row["median_ms"]
    if "peak_bytes" in row:
        row["peak_mib"] = row["peak_bytes"] / 2**20
        if "peak_bytes" in dense and "weights" in row:
            row["extra_b"] = (row["peak_bytes"] - dense["peak_bytes"]) / row["weights"]
    return row


def main(argv: Sequence[str] | None = None) -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--preset", default="transformer-base", help="a preset of tritonsparse.train.presets")
    args = parser.parse_args(argv)
    if not args.smoke:
        refuse_without_gpu("bench_train_step")
    announce()
    case = SMOKE if args.smoke else Case(args.preset, 32768, 64, 128, "cuda", "inductor")
    if args.smoke:
        rows = bench(case, ("dense", "torch"), ("eager",), 1, 2)
    else:
        rows = bench(case, ("dense", "triton", "torch"), ("eager", "compile"), ROUNDS, STEPS)
    name = "train_step" if case.preset in ("transformer-base", SMOKE.preset) else f"train_step_{case.preset}"
    tokens = case.sentences * case.length
    publish(name, rows, COLUMNS, args.out, smoke=args.smoke, preset=case.preset, tokens=tokens)
    return int(any(row["verdict"] == "WRONG" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
