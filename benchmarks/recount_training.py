"""Counts anew what training cost in the runs under benchmarks/results, step by step, from what their files hold.

    python benchmarks/recount_training.py       writes "train_flops_recounted" into the files, redraws pictures

These runs counted what was kept when a line was logged, and billed the steps since the line before by it. Here every
step is billed by the view that it saw, as `TrainingMeter` does now:

    phases           by the method's table
    fixed counts     by the method's first masks on layers of the same shapes: zeros just grown are work
    GMP              by its own updates of such layers: how many weights are kept depends on the step alone
    moving masks     by the row between the same two updates, else by a line through two rows; their sum by the method
    thresholds       by a line through two rows
"""

from __future__ import annotations

import json
import sys
from bisect import bisect
from collections.abc import Iterator, Mapping
from itertools import accumulate
from pathlib import Path
from typing import Any

from torch import nn

import tritonsparse as ts
from tritonsparse.clock import Clock
from tritonsparse.eval.machine import commit
from tritonsparse.eval.plots import plot_flops_quality, plot_training
from tritonsparse.flops import CONVENTIONS
from tritonsparse.masks.topk import kept_count
from tritonsparse.methods import ACDC, DSR, DST, GMP, METHODS, SET, SNFS, AutoSparse, Dense, OptG
from tritonsparse.schedules import cubic

RESULTS = Path(__file__).parent / "results"
FIXED = ("static", "rigl", "set", "mest", "topkast", "powerprop", "swat")
QUALITIES = {"bleu": "BLEU", "perplexity": "perplexity", "top1": "top-1 accuracy"}
Shares = dict[str, float]


class Run:
    """A run's file, and its method on layers of the same shapes."""

    def __init__(self, document: Mapping[str, Any]) -> None:
        first, layers = document["history"][0], document["layers"]
        self.document, self.steps = document, int(document["steps"])
        self.per_epoch = round(first["step"] / first["epoch"])
        self.numel = {layer["name"]: int(layer["numel"]) for layer in layers}
        shapes = [layer["shape"] for layer in layers]
        sparsifier = ts.sparsify(
            nn.ModuleList(nn.Conv2d(n[1], n[0], n[2:]) if n[2:] else nn.Linear(n[1], n[0]) for n in shapes),
            METHODS[document["method"]](**document["method_fields"]),
            pattern=document["arguments"]["pattern"],
            total_steps=self.steps,
            steps_per_epoch=self.per_epoch,
        )
        self.method: Any = sparsifier.method
        self.gates: Any = getattr(self.method, "_gates", None)
        self.layers = dict(zip(self.numel, sparsifier.layers.values(), strict=True))
        self.rows = {row["step"]: {n: 1.0 - p for n, p in row["layer_sparsity"].items()} for row in document["history"]}

    def clock(self, step: int) -> Clock:
        return Clock(step, self.steps, self.per_epoch)

    def masks(self) -> Shares:
        """What the layers' masks keep."""
        found = {name: layer.mask for name, layer in self.layers.items()}
        return {name: 1.0 if mask is None else float(mask.double().mean()) for name, mask in found.items()}

    def total(self, shares: Shares) -> float:
        return sum(shares[name] * n for name, n in self.numel.items()) / sum(self.numel.values())

    def costs(self) -> dict[str, int]:
        """Multiply-adds of a forward by layer, those of all other layers together under ""."""
        layers, test = self.document["layers"], self.document["test_flops_fraction"]
        costs = {layer["name"]: int(layer["macs"]) for layer in layers}
        if counted := self.document.get("train_flops"):
            others = sum(each["forward"] for name, each in counted["layers"].items() if name not in costs)
            return {**costs, "": round(others / counted["steps"])}
        # test = (kept + others) / (all + others)
        kept = sum(layer["macs_kept"] for layer in layers)
        return {**costs, "": 0 if test == 1.0 else round((test * sum(costs.values()) - kept) / (1.0 - test))}

    def dense(self, step: int) -> bool:
        """Whether the step is of a dense phase. A dense run may have gone on from AC/DC's twin."""
        if isinstance(self.method, ACDC):
            return self.method.table.at(step, self.per_epoch) == "dense"
        epochs = self.document["evaluations"]
        return isinstance(self.method, Dense) and epochs[step // self.per_epoch].get("phase", "dense") == "dense"

    def changes(self, step: int) -> bool:
        """Whether the step sees other masks than the step before."""
        if isinstance(self.method, ACDC | Dense):
            return self.dense(step) != self.dense(step - 1)
        if isinstance(self.method, SET):
            return bool(self.method._due(step, self.clock(step)))
        return self.clock(step).at_epoch_start if isinstance(self.method, OptG) else self.method.due(self.clock(step))


def views(run: Run) -> Iterator[Shares]:
    """What every step's view keeps of each layer."""
    if run.method.name in (*FIXED, "gmp"):
        return counted(run)
    if isinstance(run.method, ACDC | Dense | OptG | SNFS | DSR) or run.gates is not None:
        return moving(run)
    return drifting(run)


def counted(run: Run) -> Iterator[Shares]:
    for step in range(run.steps):
        shares = run.masks()
        if any(share > shares[name] + 1e-9 for name, share in run.rows.get(step, {}).items()):
            raise ValueError(f"recount: expected masks of {run.method.name} that keep what is not zero at step {step}")
        yield shares
        if isinstance(run.method, GMP):
            run.method.after_step(run.layers, run.clock(step + 1), None)


def moving(run: Run) -> Iterator[Shares]:
    gates, grows = run.gates, isinstance(run.method, SNFS | DSR)
    # Where weights have just grown, a row counts them as pruned.
    rows = {0: run.masks()} | {at: row for at, row in run.rows.items() if not (grows and run.changes(at))}
    changes = [0, *(step for step in range(1, run.steps) if run.changes(step)), run.steps + 1]
    for step in range(run.steps):
        begin, end = (changes[bisect(changes, step) + i] for i in (-1, 0))
        inside = [at for at in rows if begin <= at < end]
        shares = rows[inside[-1]] if inside else between(rows, step)
        total = run.total(rows[0] if grows else shares)
        if gates is not None and begin:
            blocks = sum(run.numel.values()) // (gates.pattern.rows * gates.pattern.columns)
            total = kept_count(blocks, run.method.wanted(run.clock(begin))) / blocks
        now = run.total(shares)
        if total > now:
            yield {name: share + (1.0 - share) * (total - now) / (1.0 - now) for name, share in shares.items()}
        else:
            yield {name: share * total / now for name, share in shares.items()}


def drifting(run: Run) -> Iterator[Shares]:
    # No row tells of the start. DST's cut-offs begin at 0; else the target's cubic tells, or the line through two rows.
    (at, row), (after, later), *_ = run.rows.items()
    pruned, wanted = 1.0 - run.total(row), run.method.sparsity
    if isinstance(run.method, DST):
        start = 0.0
    elif wanted is None:
        start = pruned - (1.0 - run.total(later) - pruned) * at / (after - at)
    else:
        start = wanted - (wanted - pruned) / cubic(at, run.method.reach_by * run.steps, 1.0, 0.0)
    ratio = max(0.0, start) / pruned if pruned else 0.0
    rows = {0: {name: 1.0 - ratio * (1.0 - share) for name, share in row.items()}} | run.rows
    return (between(rows, step + 0.5) for step in range(run.steps))


def between(rows: Mapping[int, Shares], at: float) -> Shares:
    """On the line from the row before to the row after."""
    low, high = max(step for step in rows if step <= at), min(step for step in rows if step >= at)
    part = (at - low) / (high - low) if high > low else 0.0
    return {name: share + part * (rows[high][name] - share) for name, share in rows[low].items()}


def fractions(document: Mapping[str, Any]) -> list[float]:
    """What every step cost, over a dense one."""
    run = Run(document)
    rule, costs, spent = CONVENTIONS[document.get("flops_convention", "autosparse")], run.costs(), []
    for step, shares in enumerate(views(run)):
        # What `densities` reads of a method is set for the step that comes.
        if isinstance(run.method, SET):
            run.method._due(step, run.clock(step))
        if isinstance(run.method, AutoSparse):
            run.method._annealed = run.method.current_alpha(run.clock(step))
        kept = {} if run.dense(step) else shares
        found = {name: run.method.densities(run.layers[name], share) for name, share in kept.items()}
        spent.append(rule.training_fraction(costs, found))
    return spent


def recount(path: Path, at: str | None) -> dict[str, Any]:
    """Write what was counted now into a file, and draw its picture if that shows; returns the file."""
    document = json.loads(path.read_text(encoding="utf-8"))
    so_far, published = [0.0, *accumulate(fractions(document))], document["train_flops_fraction"]
    document["train_flops_recounted"] = {
        "fraction": so_far[-1] / document["steps"],
        "published": published,
        "command": "python benchmarks/recount_training.py",
        "commit": at,
    }
    path.write_text(json.dumps(document, indent=1), encoding="utf-8")
    rows = [{**row, "train_flops_fraction": so_far[row["step"]] / row["step"]} for row in document["history"]]
    pairs = zip(rows, document["history"], strict=True)
    moved = any(abs(new["train_flops_fraction"] - old["train_flops_fraction"]) > 0.002 for new, old in pairs)
    if moved and (picture := path.with_name("training.png")).exists():
        plot_training(rows, picture, convention=document.get("flops_convention"))
    return dict(document)


def main() -> int:
    """Entry point; returns the exit status."""
    at = commit()
    for corpus in sorted({path.parent.parent for path in RESULTS.glob("*/*/*/all_results.json")}):
        runs = {path.parent.name: recount(path, at) for path in sorted(corpus.glob("*/all_results.json"))}
        for name, run in runs.items():
            found = run["train_flops_recounted"]
            print(f"{corpus.name}/{name}: {found['published']:.2%} -> {found['fraction']:.2%}")
        for picture in corpus.glob("flops_quality_*.png"):
            key = picture.stem.removeprefix("flops_quality_")
            costs = {name: run["train_flops_recounted"]["fraction"] for name, run in runs.items()}
            drawn = {n: {**run, "quality": run[key], "train_flops_fraction": costs[n]} for n, run in runs.items()}
            plot_flops_quality(drawn, picture, quality_name=QUALITIES[key])
    return 0


if __name__ == "__main__":
    sys.exit(main())
