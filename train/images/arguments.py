"""The command line of the image programs."""

from __future__ import annotations

import argparse
from itertools import pairwise

from tritonsparse.eval.command_line import (
    BELOW_ONE,
    COUNT,
    NATURAL,
    NON_NEGATIVE,
    POSITIVE,
    TEXT,
    Parser,
    one_of,
    real,
    whole,
)
from tritonsparse.eval.labelled_images import MATCHES

from ..run import arguments
from .batches import AUGMENTATIONS
from .models import IMAGE_MODELS, INITIALISATIONS
from .schedule import MULTISTEP

__all__ = ["FREE", "PRESET", "add_images", "parser"]

PRESET = "resnet20"
# In pixels: a mistake beyond, which would take all memory.
SIDE = whole(1, 4096)

# Arguments that may differ between a run and its resumption without making it another run.
FREE = (
    "output_dir", "resume_from_checkpoint", "recipe", "logging_steps", "checkpointing_steps", "checkpoints_total_limit",
    "with_tracking", "report_to", "average_checkpoints", "eval_batch_size", "max_eval_samples", "max_test_samples",
    "backend", "workers",
)  # fmt: skip


def parser(program: str, description: str | None) -> Parser:
    """The options of image classification; frozen by a test."""
    result = Parser(f"train.{program}", description)
    add = arguments.add_model(result, "an image classifier's checkpoint", IMAGE_MODELS, PRESET)
    add(
        "--initialisation", type=one_of(INITIALISATIONS), default=None,
        help=f"from scratch; Kaiming's normal by: {', '.join(INITIALISATIONS)} (the model's own by default)",
    )  # fmt: skip
    add("--channels_last", action=argparse.BooleanOptionalAction, default=False)
    add_images(result)
    add = result.add_argument_group("loss and optimizer").add_argument
    add("--label_smoothing", "--label_smoothing_factor", type=BELOW_ONE, default=0.0)
    add("--optimizer", type=one_of(("sgd", "adamw")), default="sgd", help="sgd or adamw")
    add("--momentum", type=BELOW_ONE, default=0.9)
    add("--nesterov", action=argparse.BooleanOptionalAction, default=False)
    add(
        "--norm_decay", action=argparse.BooleanOptionalAction, default=True,
        help="weight decay on biases and norms too; --no_norm_decay leaves them out",
    )  # fmt: skip
    add("--warmup_epochs", type=NON_NEGATIVE, default=None, help="in place of --num_warmup_steps")
    add(
        "--lr_milestones", nargs="+", type=POSITIVE, default=None,
        help=f"epochs at which --lr_scheduler_type {MULTISTEP} multiplies the rate by --lr_gamma",
    )  # fmt: skip
    add(
        "--lr_gamma",
        type=real(0.0, 1.0, open_below=True, open_above=True),
        default=None,
        help=f"of {MULTISTEP}: 0.1 by default",
    )
    add(
        "--bn_reestimation_batches", type=NATURAL, default=0,
        help="count batch norms' statistics again on so many batches where a phase has switched, before evaluating",
    )  # fmt: skip
    arguments.add_common(result, (*arguments.SCHEDULES, MULTISTEP))
    result.rules.append(_refuse_unfit)
    result.set_defaults(learning_rate=0.1, lr_scheduler_type="cosine", num_warmup_steps=0, weight_decay=1e-4)
    return result


def add_images(result: argparse.ArgumentParser) -> None:
    """The options that say where images come from and what becomes of them."""
    add = result.add_argument_group("data").add_argument
    add(
        "--dataset_name", type=TEXT, default=None,
        help="'embedded' (default; scikit-learn's digits), or a hub id of images",
    )  # fmt: skip
    add("--dataset_config_name", type=TEXT, default=None)
    add("--data_dir", type=TEXT, default=None, help="a folder of IDX files, <split>.npz or <split>/<class>/<image>")
    add(
        "--match_classes", type=one_of(MATCHES), default=None,
        help="with a saved model's: by name (default), or one by one",
    )  # fmt: skip
    add("--image_size", type=SIDE, default=None, help="side of the cut; as the images are by default")
    add("--eval_resize", type=SIDE, default=None, help="shorter side before the cut, in evaluation")
    add("--augmentation", type=one_of(AUGMENTATIONS), default="none", help=f"one of: {', '.join(AUGMENTATIONS)}")
    add("--batch_size", "--per_device_train_batch_size", type=COUNT, default=128)
    add("--eval_batch_size", "--per_device_eval_batch_size", type=COUNT, default=256)
    add("--workers", "--dataloader_num_workers", type=whole(0, 1024), default=0, help="threads that decode ahead")
    add("--max_train_samples", type=COUNT, default=None)
    add("--max_eval_samples", type=COUNT, default=None, help="images evaluated after each epoch")
    add("--max_test_samples", type=COUNT, default=None)


def _refuse_unfit(args: argparse.Namespace) -> None:
    arguments.refuse_beside_a_saved_model("image_classification", args, ("preset", "initialisation"))

    def refuse(expected: str, got: object, remedy: str) -> None:
        raise ValueError(f"image_classification: expected {expected}, got {got}; {remedy}")

    if args.nesterov and not (args.optimizer == "sgd" and args.momentum > 0):
        refuse(
            "--optimizer sgd with a --momentum above 0 beside --nesterov", f"{args.optimizer} and {args.momentum}",
            "leave --nesterov out",
        )  # fmt: skip
    if args.warmup_epochs is not None and args.num_warmup_steps:
        refuse("one of --warmup_epochs and --num_warmup_steps", "both", "give one")
    if args.eval_resize is not None and args.image_size is not None and args.eval_resize < args.image_size:
        refuse(f"--eval_resize of at least --image_size {args.image_size}", args.eval_resize, "raise it")
    milestones = args.lr_milestones
    if args.lr_scheduler_type != MULTISTEP:
        if milestones is not None or args.lr_gamma is not None:
            refuse(
                f"--lr_milestones and --lr_gamma with --lr_scheduler_type {MULTISTEP}",
                f"them with {args.lr_scheduler_type!r}", f"leave them out or name {MULTISTEP}",
            )  # fmt: skip
    elif not milestones or any(left >= right for left, right in pairwise(milestones)):
        refuse("rising --lr_milestones in epochs", milestones or "none", "give some, as in --lr_milestones 30 60 80")
