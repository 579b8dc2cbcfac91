"""The training loop that the programs share: accumulate, clip, step, log, evaluate, checkpoint, resume.

The loss of an optimizer step is the sum over its batches on all ranks divided by their weight (tokens), so
accumulation and the number of ranks change nothing but rounding. Everything that depends on the position in
the run is a function of (seed, epoch, step) or is in the checkpoint, so a resumed run is the run that never
stopped, bit for bit on a CPU.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from tqdm.auto import tqdm

from tritonsparse import Sparsifier
from tritonsparse.flops import TrainingMeter, kept_counts
from tritonsparse.report import cut_off

from . import checkpoints
from .twins import Twins

__all__ = ["Batches", "Loop", "Settings"]


class Batches(Protocol):
    """What the loop asks of the data."""

    @property
    def steps_per_epoch(self) -> int: ...

    def step_batches(self, epoch: int, step: int) -> list[Any]: ...


@dataclass(frozen=True)
class Settings:
    """total_steps; max_grad_norm (0: no clipping); logging_steps; checkpointing_steps (a number, "epoch" or
    None); checkpoints_total_limit; configuration: what a checkpoint must agree with to be resumed."""

    output_dir: Path
    total_steps: int
    max_grad_norm: float
    logging_steps: int
    checkpointing_steps: int | str | None
    checkpoints_total_limit: int | None
    configuration: dict[str, Any]


@dataclass
class Loop:
    """One training run.

    model: as `accelerator.prepare` returned it. loss: (model, batch) -> loss summed over the batch, whose
    `weight` it is divided by. evaluate: called at the end of each epoch, returns numbers for the record; the
    loop adds the phase, "dense" or "sparse", that they are of. twins: keeps the best model of each phase.
    history: one dict a logging step; evaluations: one dict an epoch.
    """

    accelerator: Accelerator
    model: nn.Module
    optimizer: Any
    scheduler: Any
    sparsifier: Sparsifier
    meter: TrainingMeter
    batches: Batches
    loss: Callable[[nn.Module, Any], Tensor]
    evaluate: Callable[[], dict[str, Any]]
    settings: Settings
    twins: Twins | None = None
    history: list[dict[str, Any]] = field(default_factory=list)
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    step: int = 0
    seconds: float = 0.0

    def resume(self, folder: Path) -> None:
        """Continue from a checkpoint folder that is whole and of this run (`damage.py`, `program.refuse_unfit`)."""
        self.accelerator.load_state(str(folder))
        run = checkpoints.read_run(folder)
        self.scheduler.load_state_dict(run["scheduler"])
        self.meter.load_state_dict(run["meter"])
        self.history, self.evaluations = run["history"], run["evaluations"]
        self.step, self.seconds = run["step"], run["seconds"]

    def run(self) -> None:
        """Train from `step` to `settings.total_steps`."""
        with tqdm(
            total=self.settings.total_steps, initial=self.step, desc="training", unit="step",
            disable=not self.accelerator.is_local_main_process,
        ) as bar:  # fmt: skip
            self._train(bar)

    def _train(self, bar: Any) -> None:
        settings, per_epoch = self.settings, self.batches.steps_per_epoch
        self.model.train()
        summed, weight, since = torch.zeros((), device=self.accelerator.device), 0.0, time.perf_counter()
        while self.step < settings.total_steps:
            epoch, position = divmod(self.step, per_epoch)
            loss, tokens = self._optimizer_step(self.batches.step_batches(epoch, position))
            self.step += 1
            bar.update()
            summed, weight = summed + loss, weight + tokens
            ends_epoch = self.step % per_epoch == 0 or self.step == settings.total_steps
            every = settings.checkpointing_steps
            saves = ends_epoch if every == "epoch" else isinstance(every, int) and self.step % every == 0
            # A logging window never straddles a checkpoint: a resumed run has lost its sums.
            if self.step % settings.logging_steps == 0 or ends_epoch or saves:
                elapsed = time.perf_counter() - since
                self.seconds += elapsed
                row = self._log(float(summed / max(weight, 1.0)), weight / elapsed)
                bar.set_postfix(loss=f"{row['loss']:.3f}", sparsity=f"{row['sparsity']:.1%}")
                summed, weight, since = torch.zeros_like(summed), 0.0, time.perf_counter()
            if ends_epoch:
                dense = set(self.sparsifier.trained_kinds.values()) == {"dense"}
                where = {"epoch": epoch, "step": self.step, "phase": "dense" if dense else "sparse"}
                self.evaluations.append({**where, **self.evaluate()})
                self._track({f"eval_{key}": value for key, value in self.evaluations[-1].items()})
                if self.twins is not None:
                    self.twins.keep(self.accelerator, self.sparsifier, self.settings.output_dir, self._record())
                self.model.train()
            if saves:
                self._save(f"epoch_{epoch}" if every == "epoch" else f"step_{self.step}")
            if ends_epoch or saves:
                since = time.perf_counter()

    def _optimizer_step(self, batches: list[Any]) -> tuple[Tensor, float]:
        """One real step; returns this step's summed loss and weight over all ranks."""
        accelerator = self.accelerator
        losses = []
        total = torch.tensor(float(sum(batch.weight for batch in batches)), device=accelerator.device)
        total = accelerator.reduce(total)
        # DDP averages over ranks; multiplying by their number turns that into a sum.
        scale = accelerator.num_processes / total
        for number, batch in enumerate(batches):
            last = number == len(batches) - 1
            with contextlib.nullcontext() if last else accelerator.no_sync(self.model):
                loss = self.loss(self.model, batch)
                accelerator.backward(loss * scale)
            losses.append(loss.detach())
        summed = accelerator.reduce(torch.stack(losses).sum())
        self.sparsifier.observe(loss=summed / total)
        if self.settings.max_grad_norm > 0:
            accelerator.clip_grad_norm_(self.model.parameters(), self.settings.max_grad_norm)
        self.optimizer.step()
        if not accelerator.optimizer_step_was_skipped:
            self.scheduler.step()
        self.optimizer.zero_grad()
        return summed, float(total)

    def _log(self, loss: float, rate: float) -> dict[str, Any]:
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"training: expected a finite loss, got {loss} before step {self.step}; lower --learning_rate or "
                f"clip with --max_grad_norm"
            )
        layers = self.sparsifier.layers
        kept = kept_counts(self.sparsifier)
        total = sum(layer.weight.numel() for layer in layers.values())
        row: dict[str, Any] = {
            "step": self.step,
            "epoch": self.step / self.batches.steps_per_epoch,
            "loss": loss,
            "learning_rate": self.scheduler.get_last_lr()[0],
            "tokens_per_second": rate,
            "sparsity": 1.0 - sum(kept.values()) / total,
            "layer_sparsity": {name: 1.0 - kept[name] / layer.weight.numel() for name, layer in layers.items()},
            "train_flops_fraction": self.meter.update(kept),
        }
        cuts = {name: cut_off(layer) for name, layer in layers.items()}
        thresholds = {name: cut for name, cut in cuts.items() if cut is not None}
        if thresholds:
            row["thresholds"] = thresholds
            row["alpha"] = sum(float(layer.alpha) for layer in layers.values() if layer.alpha is not None) / len(layers)
        self.history.append(row)
        self._track(row)
        return row

    def _track(self, row: dict[str, Any]) -> None:
        """Nested dicts become `group/name`; trackers take scalars only."""
        flat: dict[str, float] = {}
        for key, value in row.items():
            if isinstance(value, dict):
                flat |= {f"{key}/{name}": float(number) for name, number in value.items()}
            elif isinstance(value, int | float):
                flat[key] = float(value)
        self.accelerator.log(flat, step=self.step)

    def _record(self) -> dict[str, Any]:
        """What run.json of a checkpoint holds."""
        return {
            "step": self.step,
            "seconds": self.seconds,
            "configuration": self.settings.configuration,
            "scheduler": self.scheduler.state_dict(),
            "meter": self.meter.state_dict(),
            "history": self.history,
            "evaluations": self.evaluations,
        }

    def _save(self, name: str) -> None:
        settings = self.settings
        checkpoints.save(self.accelerator, settings.output_dir, name, self._record(), settings.checkpoints_total_limit)
