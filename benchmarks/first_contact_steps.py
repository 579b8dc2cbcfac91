"""What the training steps of `first_contact.py` share: gate, compiling layer by layer, timing beside dense.

The dense model comes first, alone, so that its time is on the disk whatever happens; every other variant is then timed
in turn with it.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import tritonsparse as ts

sys.path.append(str(Path(__file__).parent))  # PYTHONSAFEPATH keeps a script's own folder off it
from first_contact_child import Context
from first_contact_timing import how, in_turn, synchronize
from harness import Row

# Beyond the dense model's own error under autocast, see the steps' gates.
SLACK = 1.5
ROUNDS, EACH, WARM = 5, 4, 3


@dataclass
class Trained:
    """A model ready to train.

    Attributes:
        losses: of the parts of the batch, of equal size: the loss is their mean. More than one where activations of all
            would not fit into the memory.
    """

    model: nn.Module
    losses: Sequence[Callable[[], Tensor]]
    optimizer: torch.optim.Optimizer
    sparsifier: ts.Sparsifier | None

    def gradients(self) -> dict[str, Tensor]:
        """All gradients that the optimizer would step with, by name; nothing is learned from them.

        A deferred multiplier has been at work: this hook comes after the Sparsifier's.
        """
        seen: dict[str, Tensor] = {}

        def look(*_: Any) -> None:
            seen.update((n, p.grad.clone()) for n, p in self.model.named_parameters() if p.grad is not None)

        handle = self.optimizer.register_step_pre_hook(look)
        rates = [group["lr"] for group in self.optimizer.param_groups]
        for group in self.optimizer.param_groups:
            group["lr"] = 0.0
        self.step()
        handle.remove()
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        return seen

    def step(self) -> None:
        for loss in self.losses:
            (loss() / len(self.losses)).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def errors(actual: dict[str, Tensor], exact: dict[str, Tensor]) -> tuple[float, str, float]:
    """Relative RMS over all gradients; the parameter whose own is largest, and that."""
    if actual.keys() != exact.keys():
        raise ValueError(
            f"errors: expected gradients of {len(exact)} parameters, got {len(actual)}; compare like models"
        )
    off = {name: (gradient.double() - exact[name]).square().sum().item() for name, gradient in actual.items()}
    size = {name: gradient.double().square().sum().item() for name, gradient in exact.items()}
    total = sum(size.values())
    # Those of the keys' biases are 0 in exact arithmetic, and have no relative error.
    each = {name: (off[name] / size[name]) ** 0.5 for name in off if size[name] > 1e-10 * total}
    worst = max(each, key=lambda name: each[name])
    return (sum(off.values()) / total) ** 0.5, worst, each[worst]


@dataclass(frozen=True)
class Variant:
    """One line: `make(exact)` builds it, in float64 and plain PyTorch if `exact`."""

    name: str
    make: Callable[[bool], Trained]
    facts: Row = field(default_factory=dict)
    ratios: tuple[tuple[str, str, float], ...] = ()


def compile_layers(layers: Sequence[nn.Module], smoke: bool) -> None:
    """torch.compile for each layer on its own: what is compiled for one serves all that are like it."""
    # All variants of a step share one code object for each class of layer.
    torch._dynamo.config.recompile_limit = 64
    for layer in layers:
        layer.compile(backend="aot_eager" if smoke else "inductor", dynamic=False)


def run_variants(context: Context, variants: Sequence[Variant], seconds: float) -> None:
    """A row for each variant; the first is the dense one.

    Args:
        seconds: a variant's estimate, compiling included.
    """
    state: dict[str, Any] = {}

    def prepare(variant: Variant) -> tuple[Trained, Row]:
        """The variant, and its row as far as its gradients' error and how long it took until its steps were warm."""
        start = time.monotonic()
        exact = variant.make(True).gradients()
        row: Row = {"exact_s": round(time.monotonic() - start, 1)}
        before, start = torch.cuda.memory_allocated() if torch.cuda.is_available() else 0, time.monotonic()
        trained = variant.make(False)
        row["error"], row["worst_parameter"], row["worst"] = errors(trained.gradients(), exact)
        # float64 takes as much as model and moments.
        del exact
        for _ in range(WARM):
            trained.step()
        row["compile_s"] = round(time.monotonic() - start, 1)
        if torch.cuda.is_available():
            synchronize()
            torch.cuda.reset_peak_memory_stats()
            trained.step()
            synchronize()
            row["peak_mib"] = round((torch.cuda.max_memory_allocated() - before) / 2**20)
        row["graph_breaks"] = sum(torch._dynamo.utils.counters["graph_break"].values())
        row["graphs"] = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        return trained, row

    def work(variant: Variant, add: Callable[[Row], None]) -> None:
        torch._dynamo.utils.counters.clear()
        trained, row = prepare(variant)
        dense = variant is variants[0]
        if dense:
            state["dense"], state["bound"] = trained, SLACK * row["error"]
        row |= {**variant.facts, "provider": variant.name, "backend": "torch" if dense else how()}
        # A dense model without error (in float32 on a CPU, say) leaves room for rounding.
        bound = max(state["bound"], 1e-6)
        row |= {"bound": bound, "verdict": "right" if row["error"] <= bound else "WRONG"}
        if trained.sparsifier is not None:
            row["sparsity"] = trained.sparsifier.sparsity()
        if row["verdict"] == "right":
            steps = {variants[0].name: [state["dense"].step], variant.name: [trained.step]}
            timings = in_turn(steps, graph=False, rounds=ROUNDS, each=EACH)
            timing = timings[variant.name]
            row |= {"median_ms": timing.median, "p20_ms": timing.p20, "p80_ms": timing.p80}
            if not dense:
                row["beside_ms"] = timings[variants[0].name].median
                ratio = row["beside_ms"] / timing.median
                row["ratios"] = [{"name": n, "value": ratio * f, "target": t} for n, t, f in variant.ratios]
        add(row)

    for variant in variants:
        if variant is not variants[0] and "dense" not in state and variants[0].name in context.behind:
            # Started again: the dense model has its row, and is needed all the same.
            work(variants[0], lambda row: None)
        context.case(variant.name, seconds, lambda add, variant=variant: work(variant, add))  # type: ignore[misc]
