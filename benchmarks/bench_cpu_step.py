"""A whole training step on a CPU by every method, beside the dense model's: what sparse training costs there today.

    python benchmarks/bench_cpu_step.py --out DIR
    python benchmarks/bench_cpu_step.py --smoke                                      a tiny model and two methods

The model is a GPT-2 of 4 layers and width 384 in float32, a step is forward, backward, AdamW and the Sparsifier's
hooks on 1,024 tokens. Steps of a sparse and of a dense model are taken in turn on one thread; `ms` is the mean CPU time
of a sparse step, `cost` its ratio to the dense model's. CPU time is not wall time: other work on the machine changes
it little.

A run is 20 steps: AC/DC's phases and GMP's updates are shrunk to fit into them, so that they come more often than in a
real run, while methods that move their masks every 100 steps by default (RigL, SET, SNFS, MEST, DSR) are seen between
updates. Sparsity is 90 % where a method takes one. No kernel of ours runs here: on a CPU sparse layers are the PyTorch
references, which multiply by the effective weight in dense storage.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel

import tritonsparse as ts
from tritonsparse.eval.machine import processor
from tritonsparse.methods import METHODS

sys.path.append(str(Path(__file__).parent))  # PYTHONSAFEPATH keeps a script's own folder off it
from harness import Row, announce, parser_of
from reports import Report, chosen

SPARSITY, BLOCK = 0.9, 64
COLUMNS = {"method": "", "pattern": "", "ms": ".1f", "dense_ms": ".1f", "cost": ".2f"}
# Width, layers, sentences, steps: of a smoke run, and in full.
SMOKE, FULL = (32, 1, 2, 3), (384, 4, 8, 20)
LENGTH, WARM_UP = 128, 2


class Run:
    """A model that trains on random tokens; dense where no method is given."""

    def __init__(self, method: str | None, pattern: str, size: tuple[int, int, int, int]) -> None:
        width, layers, sentences, steps = size
        torch.manual_seed(0)
        config = GPT2Config(n_layer=layers, n_embd=width, n_head=4, vocab_size=512, bos_token_id=0, eos_token_id=0)
        self.model = GPT2LMHeadModel(config)
        self.tokens = torch.randint(512, (sentences, LENGTH))
        groups: Any = self.model.parameters()
        sparsifier = None
        if method is not None:
            total = steps + WARM_UP
            fields: dict[str, Any] = {} if method in ("dense", "dst") else {"sparsity": SPARSITY}
            if method == "acdc":
                fields["phases"] = ts.methods.PHASES["imagenet100"].scaled(total // 2)
            if method == "gmp":
                fields["update_every"] = 2
            sparsifier = ts.sparsify(
                self.model, METHODS[method](**fields), pattern=pattern, total_steps=total, steps_per_epoch=2
            )
            groups = sparsifier.param_groups(lr=1e-3)
        self.optimizer = torch.optim.AdamW(groups, lr=1e-3)
        if sparsifier is not None:
            sparsifier.attach(self.optimizer)

    def step(self) -> float:
        """Milliseconds of CPU time."""
        start = time.process_time()
        self.model(input_ids=self.tokens, labels=self.tokens).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return 1e3 * (time.process_time() - start)


def bench(method: str, pattern: str, size: tuple[int, int, int, int]) -> Row:
    """One method's row."""
    dense, sparse = Run(None, pattern, size), Run(method, pattern, size)
    for _ in range(WARM_UP):
        dense.step()
        sparse.step()
    pairs = [(dense.step(), sparse.step()) for _ in range(size[-1])]
    dense_ms, ms = (statistics.fmean(times) for times in zip(*pairs, strict=True))
    return {"method": method, "pattern": pattern, "ms": ms, "dense_ms": dense_ms, "cost": ms / dense_ms}


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    args = parser_of(__doc__).parse_args(argv)
    torch.set_num_threads(1)
    announce()
    cases = {f"{name} unstructured": (name, "unstructured") for name in METHODS}
    cases[f"static block:{BLOCK}"] = ("static", f"block:{BLOCK}")
    size, names = (SMOKE, ["static unstructured", "autosparse unstructured"]) if args.smoke else (FULL, list(cases))
    report = Report(
        "cpu_step", COLUMNS, args, processor=processor(), threads=1, width=size[0], layers=size[1],
        tokens=size[2] * LENGTH, steps=size[3], sparsity=SPARSITY,
    )  # fmt: skip
    picked = chosen("bench_cpu_step", {name: cases[name] for name in names}, args.only)
    report.extend(bench(*case, size) for case in picked.values())
    return report.publish()


if __name__ == "__main__":
    sys.exit(main())
