"""The command line of the image programs."""

from __future__ import annotations

import argparse

from tritonsparse.eval.labelled_images import MATCHES

from ..run import arguments
from .batches import AUGMENTATIONS
from .models import IMAGE_MODELS
from .schedule import MULTISTEP

__all__ = ["FREE", "PRESET", "add_images", "parser"]

PRESET = "resnet20"

# Arguments that may differ between a run and its resumption without making it another run.
FREE = (
    "output_dir", "resume_from_checkpoint", "recipe", "logging_steps", "checkpointing_steps", "checkpoints_total_limit",
    "with_tracking", "report_to", "average_checkpoints", "eval_batch_size", "max_eval_samples", "max_test_samples",
    "backend", "workers",
)  # fmt: skip


def parser(program: str, description: str | None) -> argparse.ArgumentParser:
    """The options of image classification; frozen by a test."""
    result = argparse.ArgumentParser(
        f"tritonsparse.train.{program}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        # A typo must not pass as a short form of another option.
        allow_abbrev=False,
    )
    model = result.add_argument_group("model")
    model.add_argument("--model_name_or_path", default=None, help="an image classifier's checkpoint to go on from")
    model.add_argument("--preset", default=None, help=f"from scratch: {', '.join(IMAGE_MODELS)} ({PRESET} by default)")
    model.add_argument("--channels_last", action=argparse.BooleanOptionalAction, default=False)
    add_images(result)
    goal = result.add_argument_group("loss and optimizer")
    goal.add_argument("--label_smoothing", "--label_smoothing_factor", type=float, default=0.0)
    goal.add_argument("--optimizer", default="sgd", choices=("sgd", "adamw"))
    goal.add_argument("--momentum", type=float, default=0.9)
    goal.add_argument("--nesterov", action=argparse.BooleanOptionalAction, default=False)
    goal.add_argument(
        "--norm_decay", action=argparse.BooleanOptionalAction, default=True,
        help="weight decay on biases and norms too; --no_norm_decay leaves them out",
    )  # fmt: skip
    goal.add_argument("--warmup_epochs", type=float, default=None, help="in place of --num_warmup_steps")
    goal.add_argument(
        "--lr_milestones", nargs="+", type=float, default=None,
        help=f"epochs at which --lr_scheduler_type {MULTISTEP} multiplies the rate by --lr_gamma",
    )  # fmt: skip
    goal.add_argument("--lr_gamma", type=float, default=None, help=f"of {MULTISTEP}: 0.1 by default")
    goal.add_argument(
        "--bn_reestimation_batches", type=int, default=0,
        help="count batch norms' statistics again on so many batches where a phase has switched, before evaluating",
    )  # fmt: skip
    arguments.add_common(result)
    result.set_defaults(learning_rate=0.1, lr_scheduler_type="cosine", num_warmup_steps=0, weight_decay=1e-4)
    return result


def add_images(result: argparse.ArgumentParser) -> None:
    """The options that say where images come from and what becomes of them."""
    data = result.add_argument_group("data")
    data.add_argument(
        "--dataset_name", default=None, help="'embedded' (default; scikit-learn's digits), or a hub id of images"
    )
    data.add_argument("--dataset_config_name", default=None)
    data.add_argument("--data_dir", default=None, help="a folder of IDX files, <split>.npz or <split>/<class>/<image>")
    data.add_argument(
        "--match_classes", default=None, choices=MATCHES, help="with a saved model's: by name (default), or one by one"
    )
    data.add_argument("--image_size", type=int, default=None, help="side of the cut; as the images are by default")
    data.add_argument("--eval_resize", type=int, default=None, help="shorter side before the cut, in evaluation")
    data.add_argument("--augmentation", default="none", help=f"one of: {', '.join(AUGMENTATIONS)}")
    data.add_argument("--batch_size", "--per_device_train_batch_size", type=int, default=128)
    data.add_argument("--eval_batch_size", "--per_device_eval_batch_size", type=int, default=256)
    data.add_argument("--workers", "--dataloader_num_workers", type=int, default=0, help="threads that decode ahead")
    data.add_argument("--max_train_samples", type=int, default=None)
    data.add_argument("--max_eval_samples", type=int, default=None, help="images evaluated after each epoch")
    data.add_argument("--max_test_samples", type=int, default=None)
