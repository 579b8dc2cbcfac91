"""The bridge to `transformers.Trainer`: attach, log, save and resume the Sparsifier.

trainer = Trainer(model, args, ..., callbacks=[SparsityCallback(sparsifier)],
                  optimizers=(AdamW(sparsifier.param_groups(lr=..., weight_decay=...)), None))
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from . import borders
from .checkpoint.sidecar import SIDECAR
from .checkpoint.state_files import write_state
from .report import cut_off
from .sparsifier import Sparsifier

__all__ = ["SparsityCallback"]


class SparsityCallback(TrainerCallback):
    """Runs a Sparsifier inside `transformers.Trainer`.

    Attaches to the Trainer's optimizer when training begins (and refuses one in which a threshold is missing
    or shares a group with weights), adds `sparsity`, `alpha` and `threshold` to the logs, observes the logged
    training loss, and saves the Sparsifier's state into every checkpoint folder, from which it resumes.

    Args:
        sparsifier: as returned by `tritonsparse.sparsify`.
        resume_from: the checkpoint folder to resume from, where it is not `output_dir/checkpoint-<step>`.
        compact: train on kept blocks alone while the topology stays (`Sparsifier.compact`).
    """

    def __init__(self, sparsifier: Sparsifier, resume_from: str | Path | None = None, compact: bool = False) -> None:
        self.sparsifier = sparsifier
        self.resume_from = resume_from
        self.compact = compact

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        planned = self.sparsifier.clock.total_steps
        if planned is not None and planned != state.max_steps:
            raise ValueError(
                f"SparsityCallback: expected total_steps of the run, {state.max_steps}, got a Sparsifier of {planned}, "
                f"whose schedules would end elsewhere; pass total_steps={state.max_steps} to sparsify"
            )
        borders.guard_trainer()
        self.sparsifier.attach(kwargs["optimizer"])
        if state.global_step > 0:
            # As the learning rate's, the sparsity's schedule is the one of the run as it is planned now.
            self.sparsifier.restore(self.resume_from or _checkpoint(args, state), longer=True)
        if self.compact:
            self.sparsifier.compact()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs is None:
            return
        if "loss" in logs:
            self.sparsifier.observe(loss=logs["loss"])
        layers = self.sparsifier.layers.values()
        measured = {"sparsity": self.sparsifier.sparsity()}
        thresholds = [cut for layer in layers if (cut := cut_off(layer)) is not None]
        if thresholds:
            measured["threshold"] = sum(thresholds) / len(thresholds)
        alphas = [float(layer.alpha) for layer in layers if layer.alpha is not None]
        if alphas:
            measured["alpha"] = sum(alphas) / len(alphas)
        logs.update(measured)
        # The Trainer has written its history, a copy of `logs`, before it asks the callbacks.
        if state.log_history:
            state.log_history[-1].update(measured)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            folder = _checkpoint(args, state)
            folder.mkdir(parents=True, exist_ok=True)
            if not (folder / SIDECAR).is_file():
                # Of a model without save_pretrained the Trainer has written the state dict as it is.
                write_state(self.sparsifier.state_dict(), folder)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # The Trainer has just put the best checkpoint's weights back.
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            self.sparsifier.expand()
            self.sparsifier.restore(state.best_model_checkpoint)
        self.sparsifier.warn_off_target("SparsityCallback")


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    if args.output_dir is None:
        raise ValueError("SparsityCallback: expected args.output_dir, got None; set it to save checkpoints")
    return Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
