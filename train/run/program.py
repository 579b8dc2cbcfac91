"""What the training programs have in common around the loop: starting, refusing, naming the run, finishing."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed

import tritonsparse as ts
from tritonsparse.methods import METHODS

from . import arguments, checkpoints, results
from .loop import Loop, Settings
from .twins import kept

__all__ = [
    "average",
    "make_accelerator",
    "make_method",
    "refuse_beside_a_saved_model",
    "refuse_used",
    "run_program",
    "settings",
    "start",
]

logger = logging.getLogger(__name__)

# Arguments of every program that may differ between a run and its resumption without making it another run.
_FREE = (
    "output_dir", "resume_from_checkpoint", "recipe", "logging_steps", "checkpointing_steps", "checkpoints_total_limit",
    "with_tracking", "report_to", "average_checkpoints", "backend", "save_twins",
)  # fmt: skip


def run_program(
    parser: argparse.ArgumentParser,
    prepare: Callable[[argparse.Namespace], Any],
    finish: Callable[[Any], None],
    argv: Sequence[str] | None,
) -> int:
    """A program's exit status. What the user can mend is one sentence on stderr, status 2.

    prepare: arguments -> an object with a `loop`, which `finish` gets after the training.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for noisy in ("httpx", "datasets", "transformers", "matplotlib"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    try:
        run = prepare(arguments.parse(parser, sys.argv[1:] if argv is None else argv))
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        if os.environ.get("TRITONSPARSE_TRACEBACK"):
            raise
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    try:
        run.loop.run()
    except FloatingPointError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    finish(run)
    return 0


def make_accelerator(program: str, args: argparse.Namespace) -> Accelerator:
    """The accelerator, with a tracker if asked for; processes but the first of a machine log warnings only.

    Raises:
        ValueError: the tracker is not installed.
    """
    tracker = (args.report_to or "tensorboard") if args.with_tracking else None
    accelerator = Accelerator(
        mixed_precision=args.mixed_precision,
        log_with=tracker,
        project_dir=None if tracker is None else str(Path(args.output_dir) / "logs"),
    )
    # accelerate drops a tracker that is not installed without a word.
    if tracker is not None and not accelerator.log_with:
        raise ValueError(
            f"{program}: expected an installed tracker, got {tracker!r}, which is not; pip install {tracker}, or "
            f"leave --with_tracking out"
        )
    if not accelerator.is_local_main_process:
        logging.getLogger().setLevel(logging.WARNING)
    return accelerator


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


def refuse_beside_a_saved_model(program: str, args: argparse.Namespace, names: Sequence[str]) -> None:
    """Refuse arguments of a model from scratch beside a saved model, which brings its own.

    Raises:
        ValueError: one of them is given.
    """
    for name in names:
        if getattr(args, name) is not None:
            raise ValueError(
                f"{program}: expected no --{name} beside --model_name_or_path, which brings its own, got "
                f"{getattr(args, name)}; leave one of them out"
            )


def make_method(program: str, args: argparse.Namespace) -> ts.methods.Method:
    """The method with its fields from --method_args, --sparsity and --auto_tune.

    Raises:
        ValueError: an unknown method or field.
    """
    fields: dict[str, Any] = dict(args.method_args or {})
    if args.method not in METHODS:
        raise ValueError(f"{program}: expected --method among {', '.join(METHODS)}, got {args.method!r}; choose one")
    if args.sparsity is not None:
        fields["sparsity"] = args.sparsity
    if args.auto_tune is not None:
        fields["auto_tune"] = {"reference_losses": results.read_epoch_losses(args.auto_tune)}
    try:
        return METHODS[args.method](**fields)
    except TypeError as error:
        raise ValueError(
            f"{program}: expected fields of method {args.method!r} in --method_args and --sparsity, got {fields} "
            f"({error}); correct them"
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
    """Make the output folder, seed each rank's dropout, resume if asked, switch trackers on."""
    accelerator, output_dir = loop.accelerator, loop.settings.output_dir
    if accelerator.is_main_process:
        output_dir.mkdir(parents=True, exist_ok=True)
        checkpoints.clear_unfinished(output_dir)
    accelerator.wait_for_everyone()
    # Dropout differs between ranks; initialisation does not.
    set_seed(args.seed + accelerator.process_index)
    if args.resume_from_checkpoint is not None:
        folder = checkpoints.find(args.resume_from_checkpoint, output_dir)
        if folder is None:
            logger.info("no checkpoint in %s yet: starting afresh", output_dir)
        else:
            loop.resume(folder)
            logger.info("resumed from %s at step %d", folder, loop.step)
    if args.with_tracking:
        scalars = {key: value if isinstance(value, int | float) else str(value) for key, value in vars(args).items()}
        accelerator.init_trackers("tritonsparse", config=scalars)


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
