"""A full training step of a translation Transformer under bf16 autocast: dense, and AutoSparse by back end.

    python benchmarks/bench_train_step.py [--preset transformer-big] [--quick] [--only PATTERN] [--out DIR]
    python benchmarks/bench_train_step.py --smoke                                     tiny, on any machine

    variant  dense: the stock model     triton: AutoSparse, our kernels
             torch: AutoSparse in plain PyTorch, the reference     each eager and under torch.compile
             "triton, cached + deferred": Sparsifier.attach(cache_dtype=torch.bfloat16, defer=True), so that the sparse
             weights are written, and the gradients multiplied, once a step in one launch each

A step is forward, loss with label smoothing, backward, fused AdamW and the sparsifier's hooks, on 8,192
source and 8,192 target tokens. `ratio` is dense time over the variant's: what unstructured sparsity costs, as all
products are dense (1 would be free). Rounds of steps of a variant and of the dense model in the same mode are timed
in turn, and `ratio` is of those. `extra_b` is peak memory beyond that dense model's, in bytes a sparsified weight.

Gate: gradients of all parameters at the start, as the optimizer sees them, by relative RMS against the same model in
float32 and eager PyTorch; the bound is 1.25 times what eager PyTorch makes under autocast. Dropout is 0, so that every
variant computes the same. A variant that does not run is a row with its error. `--quick` is under torch.compile only
and leaves out "torch"; `--only` chooses among the sparse variants, as "triton compile".
"""

from __future__ import annotations

import contextlib
import gc
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tritonsparse as ts
from tritonsparse.train.text.translation_presets import build_model

sys.path.append(str(Path(__file__).parent))  # PYTHONSAFEPATH keeps a script's own folder off it
from harness import Row, Timing, announce, gated, parser_of, refuse_without_gpu, relative_error, sample
from reports import Report, chosen

ROUNDS, STEPS = 5, 10
QUICK_ROUNDS, QUICK_STEPS = 3, 5
# What is passed to Sparsifier.attach, by the end of a variant's name; before it stands the back end.
CACHED = ", cached + deferred"
ATTACH: dict[str, dict[str, Any]] = {CACHED: {"cache_dtype": torch.bfloat16, "defer": True}, "": {}}
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
        """All gradients of one step, as the optimizer sees them, end to end on the CPU; takes the step."""
        found: list[Tensor] = []

        def note(*_: object) -> None:
            found.extend(p.grad.float().flatten().cpu() for p in self.model.parameters() if p.grad is not None)

        # After the sparsifier's hook, which may multiply what a backward left.
        handle = self.optimizer.register_step_pre_hook(note)
        self.step()
        handle.remove()
        return torch.cat(found)

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
    ending = CACHED if name.endswith(CACHED) else ""
    if name != "dense":
        method = ts.methods.AutoSparse(threshold_init=-4.0, alpha=0.4, alpha_schedule="constant")
        sparsifier = ts.sparsify(model, method, backend=name.removesuffix(ending))
        groups = sparsifier.param_groups(lr=1e-4)
    optimizer = torch.optim.AdamW(groups, lr=1e-4, fused=True)
    if sparsifier is not None:
        sparsifier.attach(optimizer, **ATTACH[ending])
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
    # Hooks and closures hold the models that were measured in cycles.
    gc.collect()
    before = torch.cuda.memory_allocated() if cuda else 0
    try:
        variant = build(case, name, mode)
        row["gradient"] = variant.gradient()
        for _ in range(3):
            variant.step()
        if cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            variant.step()
            torch.cuda.synchronize()
            row["peak_bytes"] = torch.cuda.max_memory_allocated() - before
            row["peak_mib"] = row["peak_bytes"] / 2**20
    # Any failure of a compiler is a result of this benchmark, not its end.
    except Exception as error:
        failure = f"{type(error).__name__}: {error}".splitlines()[0][:300]
        return {**row, "verdict": "failed", "failure": failure}
    if variant.sparsifier is not None:
        row["sparsity"] = variant.sparsifier.sparsity()
        row["weights"] = sum(layer.weight.numel() for layer in variant.sparsifier.layers.values())
    variant.row = row
    return variant


def bench(case: Case, names: Sequence[str], modes: Sequence[str], rounds: int, steps: int) -> Iterator[Row]:
    """One row a variant; in each mode the dense one first, and beside it one other at a time."""
    exact, bounds = {}, {}
    for family, name in (("dense", "dense"), ("sparse", "torch")):
        exact[family] = build(case, name, "eager", autocast=False).gradient()
        bounds[family] = 1.25 * relative_error(build(case, name, "eager").gradient(), exact[family])

    def timed(variant: Variant, times: Sequence[float]) -> Row:
        family = "dense" if variant.name == "dense" else "sparse"
        error, timing = relative_error(variant.row["gradient"], exact[family]), Timing.of(times)
        row = gated(variant.row, error, bounds[family], lambda: timing)
        return {key: value for key, value in row.items() if key != "gradient"}

    for mode in modes:
        dense = prepare(case, "dense", mode)
        if isinstance(dense, Variant):
            yield timed(dense, [time for _ in range(rounds) for time in sample([dense.step], steps)])
        else:
            yield {key: value for key, value in dense.items() if key != "gradient"}
        for name in names:
            variant = prepare(case, name, mode)
            if not isinstance(variant, Variant):
                yield {key: value for key, value in variant.items() if key != "gradient"}
                continue
            row = _beside(dense, variant, timed, rounds, steps)
            # Before the next one is built, whose memory is measured.
            del variant
            yield row


def _beside(
    dense: Variant | Row, variant: Variant, timed: Callable[[Variant, Sequence[float]], Row], rounds: int, steps: int
) -> Row:
    """The variant's row, timed in turn with the dense model where that runs."""
    beside, times = [], []
    for _ in range(rounds):
        if isinstance(dense, Variant):
            beside += sample([dense.step], steps)
        times += sample([variant.step], steps)
    row = timed(variant, times)
    if row["median_ms"] and isinstance(dense, Variant):
        row["dense_ms"] = Timing.of(beside).median
        row["ratio"] = row["dense_ms"] / row["median_ms"]
        if "peak_bytes" in row and "peak_bytes" in dense.row:
            row["extra_b"] = (row["peak_bytes"] - dense.row["peak_bytes"]) / row["weights"]
    return row


def main(argv: Sequence[str] | None = None) -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--preset", default="transformer-base", help="of tritonsparse.train.text.translation_presets")
    args = parser.parse_args(argv)
    if not args.smoke:
        refuse_without_gpu("bench_train_step")
    announce()
    names, modes = ["triton", f"triton{CACHED}", "torch"], ["eager", "compile"]
    case, rounds, steps = Case(args.preset, 32768, 64, 128, "cuda", "inductor"), ROUNDS, STEPS
    if args.smoke:
        case, rounds, steps, names, modes = SMOKE, 1, 2, ["torch", f"torch{CACHED}"], ["eager"]
    elif args.quick:
        rounds, steps, names, modes = QUICK_ROUNDS, QUICK_STEPS, names[:2], ["compile"]
    labels = {f"{name} {mode}": (name, mode) for mode in modes for name in names}
    pairs = list(chosen("bench_train_step", labels, args.only).values())
    tokens = case.sentences * case.length
    name = "train_step" if case.preset in ("transformer-base", SMOKE.preset) else f"train_step_{case.preset}"
    report = Report(name, COLUMNS, args, preset=case.preset, tokens=tokens)
    for mode in modes:
        of_mode = [name for name, its_mode in pairs if its_mode == mode]
        if of_mode:
            report.extend(bench(case, of_mode, [mode], rounds, steps))
    return report.publish()


if __name__ == "__main__":
    sys.exit(main())
