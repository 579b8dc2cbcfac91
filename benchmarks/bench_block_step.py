"""A full training step of a decoder of about a billion weights: dense, and with products that skip blocks.

    python benchmarks/bench_block_step.py [--block 128] [--quick] [--only '*90*'] [--out DIR]      on a GPU
    python benchmarks/bench_block_step.py --smoke                                          tiny, on any machine

A Llama of 22 layers (hidden 2048, MLP 5632, vocabulary 32,000: 1.1 B weights), all linear layers of its attention and
MLP sparse, embeddings and head dense; bf16 autocast over float32 masters, fused AdamW, 8 sequences of 2,048 tokens,
torch.compile.

    variant                what
    block                  a mask that never moves (`static`): forward, dX and dW all skip what is pruned; compiled, a
                           forward casts its weight first
    block, cached          the same, the weights kept in bf16 from step to step: attach(cache_dtype=torch.bfloat16)
    block, fp32 masters    the same, the products reading the float32 masters
    annealed               Top-KAST with alpha = 1 on every pruned block, so that dW is dense

`ratio` is dense time over the variant's, each timed in turn with the dense model in one run; `ceiling` what it would be
if the time of the linear layers fell by the share of their products that are skipped and nothing else took longer:
1 / (1 - f + f c), f being the linear layers' share of the dense model's multiply-adds and c the share that is left.
`extra_b` is peak memory beyond the dense model's, in bytes a sparsified weight. `--quick` is 90 % alone.

Gate: gradients of all parameters, on one sequence of 512 tokens, by relative RMS against the same masks in float32 and
plain PyTorch; the bound is 1.25 times what the dense model makes under autocast against itself in float32.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import tritonsparse as ts

sys.path.append(str(Path(__file__).parent))  # PYTHONSAFEPATH keeps a script's own folder off it
from harness import Row, Timing, announce, gated, parser_of, refuse_without_gpu, relative_error, sample
from reports import Report, chosen

ROUNDS, STEPS = 5, 6
QUICK_ROUNDS, QUICK_STEPS = 3, 4
# Variants by falling worth, and their sparsities.
CACHED, MASTERS = "block, cached", "block, fp32 masters"
VARIANTS = (
    *(("block", 0.9), (CACHED, 0.9), (MASTERS, 0.9), ("block", 0.8), ("block", 0.5), ("block", 0.95)),
    ("annealed", 0.9),
)
COLUMNS = {
    "variant": "", "sparsity": ".2f", "median_ms": ".1f", "p20_ms": ".1f", "p80_ms": ".1f", "ratio": ".3f",
    "ceiling": ".3f", "peak_mib": ".0f", "extra_b": ".2f", "error": ".1e", "failure": "",
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """What is trained, and on what; `backend` is that of the sparse layers."""

    config: dict[str, int]
    block: int
    sequences: int
    length: int
    gate_length: int
    device: str
    compiler: str
    backend: str

    def tokens(self, length: int, sequences: int) -> Tensor:
        random = torch.Generator().manual_seed(0)
        return torch.randint(3, self.config["vocab_size"], (sequences, length), generator=random).to(self.device)


BILLION = {
    "vocab_size": 32_000, "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22,
    "num_attention_heads": 32, "num_key_value_heads": 4, "max_position_embeddings": 2048,
}  # fmt: skip
TINY = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 32,
}  # fmt: skip
SMOKE = Case(TINY, 16, 2, 8, 8, "cpu", "aot_eager", "torch")


@dataclass
class Variant:
    """A model ready to train: `loss` of the timed batch, compiled, and of the gate's, as it stands."""

    model: nn.Module
    loss: Callable[[], Tensor]
    gate_loss: Callable[[], Tensor]
    optimizer: torch.optim.Optimizer
    sparsifier: ts.Sparsifier | None

    def gradient(self) -> Tensor:
        """All gradients of one backward over the gate's tokens, end to end, on the CPU; leaves none behind."""
        self.gate_loss().backward()
        flat = torch.cat([p.grad.float().flatten().cpu() for p in self.model.parameters() if p.grad is not None])
        self.optimizer.zero_grad()
        return flat

    def step(self) -> None:
        self.loss().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def build(case: Case, name: str, sparsity: float, *, autocast: bool = True, backend: str | None = None) -> Variant:
    """`name`: "dense" or a variant's."""
    torch.manual_seed(0)
    with torch.device(case.device):
        model = LlamaForCausalLM(LlamaConfig(**case.config, attn_implementation="sdpa"))
    sparsifier = None
    groups: Any = model.parameters()
    if name != "dense":
        method: ts.methods.Method = ts.methods.Static(sparsity=sparsity, distribution="uniform")
        if name == "annealed":
            method = ts.methods.TopKAST(sparsity=sparsity, backward_sparsity=0.0, alpha=1.0)
        sparsifier = ts.sparsify(
            model, method, pattern=f"block:{case.block}", backend=backend or case.backend, total_steps=10_000
        )
        groups = sparsifier.param_groups(lr=1e-5)
    optimizer = torch.optim.AdamW(groups, lr=1e-5, fused=True)
    if sparsifier is not None:
        caches: dict[str, Any] = {CACHED: {"cache_dtype": torch.bfloat16}, MASTERS: {"cache_dtype": None}}
        sparsifier.attach(optimizer, **caches.get(name, {}))
        for layer in sparsifier.layers.values():
            layer.casts_first = name != MASTERS

    def loss(ids: Tensor) -> Tensor:
        with torch.autocast(case.device, torch.bfloat16) if autocast else contextlib.nullcontext():
            logits = model(input_ids=ids, use_cache=False).logits
        return F.cross_entropy(logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten())

    compiled = torch.compile(loss, backend=case.compiler, dynamic=False)
    timed, gate = case.tokens(case.length, case.sequences), case.tokens(case.gate_length, 1)
    return Variant(model, lambda: compiled(timed), lambda: loss(gate), optimizer, sparsifier)


def linear_share(case: Case) -> float:
    """Sparse layers' share of the dense model's forward multiply-adds, attention and head counted."""
    config = case.config
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    kv = hidden // heads * config["num_key_value_heads"]
    linear = config["num_hidden_layers"] * (2 * hidden**2 + 2 * hidden * kv + 3 * hidden * config["intermediate_size"])
    # A causal query meets half of the keys, once for the scores and once for the values.
    attention = config["num_hidden_layers"] * case.length * hidden
    return linear / (linear + attention + hidden * config["vocab_size"])


def bench(case: Case, variants: Sequence[tuple[str, float]], rounds: int, steps: int) -> Iterator[Row]:
    """A dense row for each variant, timed with it, and the variant's."""
    reference = build(case, "dense", 0.0, autocast=False).gradient()
    bound = 1.25 * relative_error(build(case, "dense", 0.0).gradient(), reference)
    for name, sparsity in variants:
        try:
            rows = _pair(case, name, sparsity, bound, rounds, steps)
        # Any failure of a compiler is a result of this benchmark, not its end.
        except Exception as error:
            failure = f"{type(error).__name__}: {error}".splitlines()[0][:300]
            rows = [{"variant": name, "sparsity": sparsity, "verdict": "failed", "failure": failure}]
        yield from rows
        gc.collect()
        if case.device == "cuda":
            torch._dynamo.reset()
            torch.cuda.empty_cache()


def _pair(case: Case, name: str, sparsity: float, bound: float, rounds: int, steps: int) -> list[Row]:
    exact = build(case, name, sparsity, autocast=False, backend="torch").gradient()
    peaks, variants = [], []
    for each in ("dense", name):
        before = torch.cuda.memory_allocated() if case.device == "cuda" else 0
        variant = build(case, each, sparsity)
        for _ in range(3):
            variant.step()
        if case.device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            variant.step()
            torch.cuda.synchronize()
            peaks.append(torch.cuda.max_memory_allocated() - before)
        variants.append(variant)
    times: list[list[float]] = [[], []]
    for _ in range(rounds):
        for variant, measured in zip(variants, times, strict=True):
            measured += sample([variant.step], steps)
    dense, sparse = (Timing.of(each) for each in times)
    sparsifier = variants[1].sparsifier
    assert sparsifier is not None  # of every variant but the dense one
    # Trained for a few steps, the weights differ; the gate is of a model that is as it was made.
    error = relative_error(build(case, name, sparsity).gradient(), exact)
    reached, share = sparsifier.sparsity(), linear_share(case)
    left = (2 * (1 - reached) + 1) / 3 if name == "annealed" else 1 - reached
    row = gated({"variant": name, "sparsity": reached}, error, bound, lambda: sparse)
    row["ceiling"] = 1 / (1 - share + share * left)
    weights = sum(layer.weight.numel() for layer in sparsifier.layers.values())
    first: Row = {
        "variant": "dense", "sparsity": 0.0, "median_ms": dense.median, "p20_ms": dense.p20, "p80_ms": dense.p80,
        "verdict": "right",
    }  # fmt: skip
    if row["median_ms"]:
        row["ratio"] = dense.median / row["median_ms"]
    if peaks:
        first["peak_mib"], row["peak_mib"] = (peak / 2**20 for peak in peaks)
        row["extra_b"] = (peaks[1] - peaks[0]) / weights
    return [first, row]


def main(argv: Sequence[str] | None = None) -> int:
    parser: argparse.ArgumentParser = parser_of(__doc__)
    parser.add_argument("--block", type=int, default=128, help="side of a block")
    args = parser.parse_args(argv)
    if not args.smoke:
        refuse_without_gpu("bench_block_step")
    announce()
    case = SMOKE if args.smoke else Case(BILLION, args.block, 8, 2048, 512, "cuda", "inductor", "block")
    variants, rounds, steps = VARIANTS, ROUNDS, STEPS
    if args.smoke:
        variants, rounds, steps = tuple((name, 0.5) for name in ("block", CACHED, MASTERS, "annealed")), 1, 2
    elif args.quick:
        variants, rounds, steps = VARIANTS[:2], QUICK_ROUNDS, QUICK_STEPS
    labelled = chosen("bench_block_step", {f"{name} {share:.0%}": (name, share) for name, share in variants}, args.only)
    facts = {"block": case.block, "linear_share": linear_share(case), "tokens": case.sequences * case.length}
    name = "block_step" if args.smoke or case.block == 128 else f"block_step_{case.block}"
    report = Report(name, COLUMNS, args, **facts)
    report.extend(bench(case, list(labelled.values()), rounds, steps))
    return report.publish()


if __name__ == "__main__":
    sys.exit(main())
