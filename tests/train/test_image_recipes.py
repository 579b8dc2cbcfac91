"""The packaged image recipes: each parses, each makes its method, and the papers' numbers are the papers'."""

from __future__ import annotations

import argparse
from typing import Any

import pytest
import torch

from tritonsparse.methods import METHODS
from tritonsparse.methods.acdc import PHASES
from tritonsparse.selection import select
from tritonsparse.train.images.arguments import parser
from tritonsparse.train.images.models import IMAGE_MODELS, build_model
from tritonsparse.train.run import arguments, program

NAMES = [
    "cifar10-resnet20",
    "fashion-mnist-small",
    "mobilenetv1-imagenet-autosparse75",
    "resnet50-imagenet-acdc90",
    "resnet50-imagenet-autosparse80",
    "resnet50-imagenet-swat80",
]
IMAGENET = [name for name in NAMES if "imagenet" in name and "swat" not in name]


def parse(name: str) -> argparse.Namespace:
    return arguments.parse(parser("image_classification", None), ["--recipe", name, "--output_dir", "out"])


def values(name: str, *keys: str) -> tuple[Any, ...]:
    args = parse(name)
    return tuple(getattr(args, key) for key in keys)


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_parses_and_makes_its_method_with_the_fields_it_gives(name: str) -> None:
    assert name in arguments.recipe_names()
    args = parse(name)
    for key, value in arguments.read_recipe(name).items():
        assert getattr(args, key) == value, key
    assert args.preset in IMAGE_MODELS
    method = program.make_method("image_classification", args)
    assert type(method) is METHODS[args.method]
    fields = method.to_dict()
    assert {key: fields[key] for key in args.method_args or {}} == (args.method_args or {})


@pytest.mark.parametrize("name", IMAGENET)
def test_the_imagenet_recipes_train_as_str_does(name: str) -> None:
    """AutoSparse (arXiv:2304.06941), section 5.1, and AC/DC's configuration, both over STR's training."""
    keys = ("learning_rate", "momentum", "nesterov", "batch_size", "num_train_epochs", "warmup_epochs")
    assert values(name, *keys) == (0.256, 0.875, False, 256, 100, 5)
    keys = ("lr_scheduler_type", "augmentation", "image_size", "eval_resize", "optimizer", "norm_decay")
    assert values(name, *keys) == ("cosine", "imagenet", 224, 256, "sgd", True)
    assert values(name, "weight_decay") == (pytest.approx(3.0517578125e-5, rel=1e-8),)
    assert values(name, "dataset_name", "label_smoothing") == ("ILSVRC/imagenet-1k", 0.0 if "acdc" in name else 0.1)


def test_the_autosparse_recipes_are_rows_of_its_tables() -> None:
    """Table 1: 79.67 % with alpha 0.75, 0 from epoch 90. Table 3: 75.1 % with alpha 0.4 to the end."""
    shared = {"threshold_init": -5.0, "alpha_schedule": "sigmoid_cosine"}
    resnet = parse("resnet50-imagenet-autosparse80")
    assert resnet.method_args == {**shared, "alpha": 0.75, "zero_alpha_epoch": 90} and resnet.preset == "resnet50"
    mobile = parse("mobilenetv1-imagenet-autosparse75")
    assert mobile.method_args == {**shared, "alpha": 0.4} and mobile.preset == "mobilenet_v1"
    # Depthwise convolutions as well: STR's code has thresholds on all of them.
    assert mobile.include == ["*"] and resnet.include is None


def test_the_acdc_recipe_has_the_published_phases() -> None:
    args = parse("resnet50-imagenet-acdc90")
    assert (args.method, args.sparsity, args.method_args["scope"]) == ("acdc", 0.9, "global")
    table = PHASES[args.method_args["phases"]]
    assert table.epochs == args.num_train_epochs == 100
    assert [kind for epoch, kind in table.starts if epoch in (75, 85)] == ["dense", "sparse"]


def test_the_swat_recipe_is_its_table_14() -> None:
    """arXiv:2001.01969, section 4.1 and table 14, column "SWAT(UnStructured)"; table 3: 80 % of both."""
    name = "resnet50-imagenet-swat80"
    keys = ("optimizer", "learning_rate", "momentum", "nesterov", "weight_decay", "norm_decay", "label_smoothing")
    assert values(name, *keys) == ("sgd", 0.1, 0.9, True, 1e-4, False, 0.1)
    keys = ("num_train_epochs", "batch_size", "warmup_epochs", "lr_scheduler_type", "lr_milestones", "lr_gamma")
    assert values(name, *keys) == (90, 256, 5, "multistep", [30, 60, 80], 0.1)
    assert values(name, "preset", "method", "sparsity") == ("resnet50", "swat", 0.8)
    method = program.make_method("image_classification", parse(name))
    assert (method.distribution, method.refresh_every, method.activation_sparsity) == ("uniform", 1000, None)


@torch.no_grad()
def test_the_swat_recipe_leaves_the_first_convolution_dense_and_nothing_else() -> None:
    args = parse("resnet50-imagenet-swat80")
    with torch.device("meta"):
        model = build_model(args.preset, ["cat", "dog"], 3, 224)
    selected, skipped = select(model, include=args.include, exclude=args.exclude)
    assert [(skip.name, skip.reason) for skip in skipped] == [("resnet.embedder.embedder.convolution", "excluded")]
    # 16 blocks of 3 convolutions, 4 on the way down, and the classifier.
    assert len(selected) == 16 * 3 + 4 + 1


def test_the_cifar_recipe_is_he_s() -> None:
    """arXiv:1512.03385, section 4.2: 64,000 iterations of 128 images, of 50,000."""
    keys = ("preset", "batch_size", "learning_rate", "momentum", "weight_decay", "augmentation", "method")
    assert values("cifar10-resnet20", *keys) == ("resnet20", 128, 0.1, 0.9, 1e-4, "crop_flip", "dense")
    (epochs,) = values("cifar10-resnet20", "num_train_epochs")
    assert epochs * -(-50_000 // 128) == pytest.approx(64_000, rel=0.005)


def test_the_small_recipe_anneals_to_zero_within_its_run() -> None:
    args = parse("fashion-mnist-small")
    assert args.method_args["alpha_schedule"] == "sigmoid_cosine"
    assert args.method_args["zero_alpha_epoch"] < args.num_train_epochs
    assert (args.dataset_name, args.data_dir) == (None, None)
