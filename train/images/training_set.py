"""The images that the arguments of a program name, and how they are batched for training."""

from __future__ import annotations

import argparse
from dataclasses import replace

import torch
from torch import Tensor

from tritonsparse.eval.image_sets import ImageSet, load_images
from tritonsparse.eval.labelled_images import match, matched, numbered
from tritonsparse.eval.preprocessing import Preprocessing, channel_statistics

from .batches import ImageBatches
from .models import saved_classes

__all__ = ["load_sets", "training_batches"]


def load_sets(args: argparse.Namespace) -> dict[str, ImageSet]:
    """The splits that the arguments name, cut to the sizes asked for; with the labels of a saved model that knows them.

    Raises:
        ValueError: no train split, nothing to evaluate on, or no such model.
    """
    name = args.dataset_name or (None if args.data_dir else "embedded")
    saved = None if args.model_name_or_path is None else Preprocessing.find(args.model_name_or_path)
    sets = load_images(name, args.dataset_config_name, args.data_dir, None if saved is None else len(saved.mean))
    if "train" not in sets or len(sets) < 2:
        raise ValueError(
            f"image_classification: expected a train split and a validation or test split, got "
            f"{', '.join(sets) or 'none'}; add the missing one"
        )
    if args.model_name_or_path is not None:
        names = saved_classes(args.model_name_or_path)
        for split, images in sets.items():
            if args.match_classes == "position":
                sets[split] = matched("image_classification", images, names, args.model_name_or_path, by_position=True)
            elif not numbered(names):
                # Other classes get a new head.
                sets[split] = match(images, names) or images
    limit = args.max_train_samples
    if limit is not None and limit < len(sets["train"]):
        # Not the run's seed, which would draw another training set too.
        drawn = torch.randperm(len(sets["train"]), generator=torch.Generator().manual_seed(0))[:limit]
        sets["train"] = sets["train"].subset(drawn.sort().values)
    for split, most in (("validation", args.max_eval_samples), ("test", args.max_test_samples)):
        if split in sets and most is not None:
            sets[split] = sets[split].subset(torch.arange(min(most, len(sets[split]))))
    return sets


def training_batches(
    args: argparse.Namespace, images: ImageSet, world: int, rank: int, labels: Tensor | None = None
) -> tuple[ImageBatches, Preprocessing]:
    """The training set as the arguments have it augmented and batched, and the preprocessing that goes with it."""
    saved = None if args.model_name_or_path is None else Preprocessing.find(args.model_name_or_path)
    sizes = {"resize": args.eval_resize or args.image_size, "crop": args.image_size}
    if saved is None:
        preprocessing = Preprocessing(*channel_statistics(images), **sizes)
    else:
        # What the model has learned to see.
        preprocessing = replace(saved, **sizes) if any(sizes.values()) else saved
    batches = ImageBatches(
        images, preprocessing, args.batch_size, args.augmentation, args.seed,
        group=world * args.gradient_accumulation_steps, rank=rank, world=world, workers=args.workers, labels=labels,
    )  # fmt: skip
    return batches, preprocessing
