"""What the training programs have in common around the loop: refusing, naming the run, starting, averaging."""

from __future__ import annotations

import argparse
import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed

import tritonsparse as ts
from tritonsparse.eval.output_files import refuse_unwritable
from tritonsparse.methods import METHODS

from . import checkpoints, results
from .damage import refuse_damaged
from .loop import Loop, Settings
from .twins import kept

__all__ = ["average", "begin", "make_method", "refuse_unfit", "settings", "start"]

logger = logging.getLogger(__name__)

# Arguments of every program that may differ between a run and its resumption without making it another run.
_FREE = (
    "output_dir", "resume_from_checkpoint", "recipe", "logging_steps", "checkpointing_steps", "checkpoints_total_limit",
    "with_tracking", "report_to", "average_checkpoints", "backend", "save_twins",
)  # fmt: skip


def begin(program: str, args: argparse.Namespace) -> tuple[Accelerator, ts.methods.Method]:
    """Everything that can be refused without data or model; nothing is written.

    Returns:
        The accelerator, with a tracker if asked for, and the method. Processes but the first of a machine log warnings
        only.

    Raises:
        ValueError: an argument does not fit, a file could not be written, a checkpoint is damaged or would be lost.
    """
    method = make_method(program, args)
    refuse_unwritable(program, "--output_dir", args.output_dir, folder=True)
    if args.record_reference_losses is not None:
        refuse_unwritable(program, "--record_reference_losses", args.record_reference_losses)
    accelerator = _make_accelerator(program, args)
    refuse_used(program, args)
    if args.resume_from_checkpoint is not None:
        folder = checkpoints.find(args.resume_from_checkpoint, Path(args.output_dir))
        if folder is not None:
            refuse_damaged(folder, accelerator.num_processes)
    return accelerator, method


def _make_accelerator(program: str, args: argparse.Namespace) -> Accelerator:
    tracker = (args.report_to or "tensorboard") if args.with_tracking else None
    try:
        accelerator = Accelerator(
            mixed_precision=args.mixed_precision,
            log_with=tracker,
            project_dir=None if tracker is None else str(Path(args.output_dir) / "logs"),
        )
    except (ValueError, RuntimeError, ImportError) as error:
        raise ValueError(
            f"{program}: expected --mixed_precision, --report_to and a launch that work on this machine, got "
            f"{args.mixed_precision}, {tracker} and: {error}; correct them"
        ) from error
    # accelerate drops a tracker that is not installed without a word.
    if tracker is not None and not accelerator.log_with:
        raise ValueError(
            f"{program}: expected an installed tracker, got {tracker!r}, which is not; pip install {tracker}, or "
            f"leave --with_tracking and --report_to out"
        )
    if accelerator.mixed_precision != "no" and not accelerator.native_amp:
        # accelerate would train in float32 without a word.
        raise ValueError(
            f"{program}: expected a --mixed_precision that {accelerator.device} has, got "
            f"{accelerator.mixed_precision!r}; take bf16, or no"
        )
    # A checkpoint remembers in what precision it was trained, whoever asked for it.
    args.mixed_precision = None if accelerator.mixed_precision == "no" else accelerator.mixed_precision
    _refuse_lone_processes(program, accelerator.num_processes)
    if not accelerator.is_local_main_process:
        logging.getLogger().setLevel(logging.WARNING)
    return accelerator


def _refuse_lone_processes(program: str, found: int) -> None:
    """Without a GPU, accelerate makes each process of torchrun a run of its own, or starts one in place of two.

    Raises:
        ValueError: torchrun started more: they would write over each other.
    """
    remedy = "on a CPU, start them by torchrun with ACCELERATE_USE_CPU=true set (docs/programs.md)"
    if (started := os.environ.get("WORLD_SIZE", "1")).isdecimal() and int(started) > found:
        raise ValueError(
            f"{program}: expected the {started} processes of this launch to find each other, got {found}; {remedy}"
        )
    if found == 1 and "WORLD_SIZE" not in os.environ and {"MASTER_PORT", "ACCELERATE_MIXED_PRECISION"} <= {*os.environ}:
        # `accelerate launch` names a port where it is asked for several processes.
        logger.warning("%s: one process is here, although the launch looks like one of several; %s", program, remedy)


def refuse_used(program: str, args: argparse.Namespace) -> None:
    """Two runs in one folder would drop, average and resume each other's checkpoints.

    Raises:
        ValueError: a fresh run in a folder that has checkpoints.
    """
    old = checkpoints.checkpoint_folders(Path(args.output_dir))
    if old and args.resume_from_checkpoint is None and args.checkpointing_steps is not None:
        raise ValueError(
            f"{program}: expected an --output_dir without checkpoints of an earlier run, got {old[-1].name} in "
            f"{args.output_dir}; go on from it with --resume_from_checkpoint latest, or name another folder"
        )
    if args.save_twins and args.resume_from_checkpoint is None and (twins := kept(Path(args.output_dir))):
        raise ValueError(
            f"{program}: expected an --output_dir without twins of an earlier run, got best_{next(iter(twins))} in "
            f"{args.output_dir}; name another folder"
        )


def make_method(program: str, args: argparse.Namespace) -> ts.methods.Method:
    """The method with its fields from --method_args, --sparsity and --auto_tune.

    Raises:
        ValueError: an unknown field, or one of a value that it does not take.
    """
    fields: dict[str, Any] = dict(args.method_args or {})
    if args.sparsity is not None:
        fields["sparsity"] = args.sparsity
    if args.auto_tune is not None:
        fields["auto_tune"] = {"reference_losses": results.read_epoch_losses(args.auto_tune)}
    try:
        return METHODS[args.method](**fields)
    except TypeError as error:
        raise ValueError(
            f"{program}: expected fields of --method {args.method} in --method_args, --sparsity and --auto_tune, got "
            f"{fields} ({error}); correct them"
        ) from error


def settings(
    args: argparse.Namespace, method: ts.methods.Method, processes: int, total_steps: int, free: Sequence[str]
) -> Settings:
    """What the loop is told by the arguments.

    A checkpoint must agree, to be resumed, with all arguments but those of `free` and every program's own.
    """
    left_out = (*_FREE, *free, "method_args", "auto_tune")
    given = {key: value for key, value in vars(args).items() if key not in left_out}
    # As it is read back from run.json.
    configuration = json.loads(json.dumps({**given, "method_fields": method.to_dict(), "processes": processes}))
    return Settings(
        output_dir=Path(args.output_dir),
        total_steps=total_steps,
        max_grad_norm=args.max_grad_norm,
        logging_steps=args.logging_steps,
        checkpointing_steps=args.checkpointing_steps,
        checkpoints_total_limit=args.checkpoints_total_limit,
        configuration=configuration,
    )


def start(args: argparse.Namespace, loop: Loop) -> None:
    """Seed each rank's dropout, resume if asked, make the output folder, switch trackers on: the last of `prepare`.

    Raises:
        ValueError: the run could not do what it is to do at its end, or the checkpoint is of another run; nothing has
            been written then.
    """
    accelerator, output_dir = loop.accelerator, loop.settings.output_dir
    folder = refuse_unfit(args, loop)
    # Dropout differs between ranks; initialisation does not. NumPy's seeds end at 2^32.
    set_seed((args.seed + accelerator.process_index) % 2**32)
    if folder is not None:
        loop.resume(folder)
        logger.info("resumed from %s at step %d", folder, loop.step)
    elif args.resume_from_checkpoint is not None:
        logger.info("no checkpoint in %s yet: starting afresh", output_dir)
    if accelerator.is_main_process:
        output_dir.mkdir(parents=True, exist_ok=True)
        checkpoints.clear_unfinished(output_dir)
    accelerator.wait_for_everyone()
    if args.with_tracking:
        scalars = {key: value if isinstance(value, int | float) else str(value) for key, value in vars(args).items()}
        accelerator.init_trackers("tritonsparse", config=scalars)


def refuse_unfit(args: argparse.Namespace, loop: Loop) -> Path | None:
    """Refuse what a run of this length never comes to, and a checkpoint of another run.

    Returns:
        The checkpoint to go on from.

    Raises:
        ValueError: as said; nothing has been changed then.
    """
    total_steps, per_epoch = loop.settings.total_steps, loop.batches.steps_per_epoch
    every = args.checkpointing_steps
    saves = 0 if every is None else -(-total_steps // per_epoch) if every == "epoch" else total_steps // every
    if args.average_checkpoints > saves:
        raise ValueError(
            f"arguments: expected --average_checkpoints of at most {saves}, the checkpoints that {total_steps} steps "
            f"with --checkpointing_steps {every} save, got {args.average_checkpoints}; lower one of the two"
        )
    if args.record_reference_losses is not None and total_steps < per_epoch:
        raise ValueError(
            f"arguments: expected a run of an epoch, {per_epoch} steps, with --record_reference_losses, which records "
            f"a loss an epoch, got {total_steps} steps; train longer"
        )
    if args.num_warmup_steps > total_steps:
        # As in a trial of a long recipe.
        logger.warning(
            "--num_warmup_steps %d: the run of %d steps does not reach --learning_rate",
            args.num_warmup_steps, total_steps,
        )  # fmt: skip
    if args.resume_from_checkpoint is None:
        return None
    folder = checkpoints.find(args.resume_from_checkpoint, loop.settings.output_dir)
    if folder is not None:
        model = loop.accelerator.unwrap_model(loop.model)
        checkpoints.refuse_other_model(folder, model, loop.settings.configuration)
    return folder


def average(args: argparse.Namespace, loop: Loop) -> list[str]:
    """Load the average of the last --average_checkpoints into the model; returns their names, none if not asked.

    Of a method in phases, those of the last phase: a dense phase's weights, or another mask's, average to no model.
    """
    if not args.average_checkpoints:
        return []
    folders = checkpoints.checkpoint_folders(loop.settings.output_dir)[-args.average_checkpoints :]
    if len(folders) < args.average_checkpoints:
        logger.warning("expected %d checkpoints to average, got %d", args.average_checkpoints, len(folders))
    began = loop.sparsifier.method.phase_began(loop.sparsifier.clock)
    apart = [folder.name for folder in folders if checkpoints.read_run(folder)["step"] <= began]
    folders = folders[len(apart) :]
    if apart:
        logger.warning("left out of the average: %s, of before the last phase, which began at step %d", apart, began)
    if not folders:
        return []
    model = loop.sparsifier.model
    masks = {key: mask.clone() for key, mask in model.state_dict().items() if mask.dtype == torch.bool}
    model.load_state_dict({**checkpoints.average_weights(folders), **masks}, strict=False)
    averaged = [folder.name for folder in folders]
    logger.info("averaged %s", ", ".join(averaged))
    return averaged
