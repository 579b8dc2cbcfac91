"""The packaged recipes: each parses, each makes its method, and the papers' numbers are the papers'."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

import pytest
import torch

from tritonsparse.methods import ACDC, METHODS, PHASES
from tritonsparse.selection import select
from tritonsparse.train.images import arguments as image_arguments
from tritonsparse.train.images.models import IMAGE_MODELS, build_model
from tritonsparse.train.run import arguments
from tritonsparse.train.run.program import make_method
from tritonsparse.train.text import language_arguments, language_presets, translation_arguments, translation_presets

TRANSLATION = ["demo", "multi30k", "wmt14-base", "wmt14-big-autosparse"]
LANGUAGE = ["lm-demo", "wikitext2-small", "wt103-base", "wt103-large-acdc80", "wt103-large-acdc90"]
IMAGES = [
    "cifar10-resnet20", "fashion-mnist-small", "mobilenetv1-imagenet-autosparse75", "resnet50-imagenet-acdc90",
    "resnet50-imagenet-autosparse80", "resnet50-imagenet-swat80",
]  # fmt: skip
NAMES = [*TRANSLATION, *LANGUAGE, *IMAGES]


def parse(name: str, *options: str) -> argparse.Namespace:
    if name in IMAGES:
        parser = image_arguments.parser("image_classification", None)
    else:
        parser = translation_arguments.parser() if name in TRANSLATION else language_arguments.parser()
    return arguments.parse(parser, ["--recipe", name, "--output_dir", "out", *options])


def method_of(args: argparse.Namespace) -> Any:
    return make_method("recipes", args)


def test_every_recipe_of_the_package_is_tested_here() -> None:
    assert sorted(NAMES) == arguments.recipe_names()


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_parses_its_values_arrive_and_it_makes_its_method(name: str) -> None:
    args = parse(name)
    for key, value in arguments.read_recipe(name).items():
        assert getattr(args, key) == value, key
    presets = {**translation_presets.PRESETS, **IMAGE_MODELS, **dict.fromkeys(language_presets.PRESETS)}
    assert args.preset in presets
    method = method_of(args)
    assert type(method) is METHODS[args.method]
    fields, given = method.to_dict(), args.method_args or {}
    assert {key: fields[key] for key in given} == given


SHARED_AUTOSPARSE = {"threshold_init": -5.0, "alpha_schedule": "sigmoid_cosine"}
# STR's training, over which AutoSparse (arXiv:2304.06941, section 5.1) and AC/DC's configuration train ImageNet.
STR = {
    "learning_rate": 0.256, "momentum": 0.875, "nesterov": False, "batch_size": 256, "num_train_epochs": 100,
    "warmup_epochs": 5, "lr_scheduler_type": "cosine", "augmentation": "imagenet", "image_size": 224,
    "eval_resize": 256, "optimizer": "sgd", "norm_decay": True, "dataset_name": "ILSVRC/imagenet-1k",
}  # fmt: skip
# AC/DC (arXiv:2106.12379, section 4.3) over NVIDIA's wt103_large.yaml.
LARGE = {
    "batch_size": 128, "tgt_len": 384, "mem_len": 384, "optim": "lamb", "learning_rate": 0.01,
    "min_learning_rate": 0.0001, "num_warmup_steps": 16_000, "test_tgt_len": 128, "test_mem_len": 1600,
    "test_clamp_len": 1000, "test_same_length": True, "eval_tgt_len": 128, "eval_mem_len": 640,
    "num_train_epochs": 48, "max_grad_norm": 0.25,
}  # fmt: skip
WMT14 = {"dataset_name": "wmt/wmt14", "dataset_config_name": "de-en", "source_lang": "en", "target_lang": "de"}
EXPECTED: dict[str, dict[str, Any]] = {
    # They need no file and no network.
    "demo": {"dataset_name": "embedded", "train_file": None, "with_tracking": False},
    "lm-demo": {"dataset_name": "embedded", "train_file": None},
    "fashion-mnist-small": {"dataset_name": None, "data_dir": None},
    # Attention is all you need (2017): sections 5.1-5.4 and 6.1, table 3.
    "wmt14-base": WMT14 | {
        "learning_rate": 7e-4, "adam_beta1": 0.9, "adam_beta2": 0.98, "adam_epsilon": 1e-9, "num_warmup_steps": 4000,
        "max_train_steps": 100_000, "preset": "transformer-base", "vocab_size": 37_000, "method": "dense",
        "dropout": 0.1, "label_smoothing": 0.1, "lr_scheduler_type": "inverse_sqrt", "average_checkpoints": 5,
        "num_beams": 4, "length_penalty": 0.6, "max_grad_norm": 0.0, "weight_decay": 0.0,
    },
    # AutoSparse, sections 5.1 and 5.3; and from NVIDIA's DeepLearningExamples, PyTorch/Translation/Transformer: 33,712
    # entries, dropout 0.1 for big, beam 5, no decay.
    "wmt14-big-autosparse": WMT14 | {
        "method_args": {"threshold_init": -7.0, "alpha": 0.4, "alpha_schedule": "exponential", "zero_alpha_epoch": 10},
        "num_train_epochs": 44, "learning_rate": 8.46e-4, "adam_beta1": 0.9, "adam_beta2": 0.997,
        "num_warmup_steps": 4000, "lr_scheduler_type": "inverse_sqrt", "max_tokens_per_batch": 10_240,
        "preset": "transformer-big", "method": "autosparse", "vocab_size": 33_712, "dropout": 0.1,
        "label_smoothing": 0.1, "weight_decay": 0.0, "adam_epsilon": 1e-9, "num_beams": 5,
    },
    # wt103_base.yaml, and the defaults of train.py and lamb.py beside it.
    "wt103-base": {
        "batch_size": 256, "tgt_len": 192, "mem_len": 192, "optim": "lamb", "learning_rate": 0.01,
        "min_learning_rate": 0.001, "num_warmup_steps": 1000, "max_train_steps": 40_000, "max_grad_norm": 0.25,
        "roll": True, "adam_beta1": 0.9, "adam_beta2": 0.999, "adam_epsilon": 1e-6, "weight_decay": 0.0,
        "test_tgt_len": 64, "test_mem_len": 640, "test_clamp_len": 400, "test_same_length": True,
        "test_batch_size": 1, "method": "dense",
    },
    "wt103-large-acdc80": LARGE | {"sparsity": 0.8},
    "wt103-large-acdc90": LARGE | {"sparsity": 0.9},
    # AutoSparse, table 1: 79.67 % with alpha 0.75, 0 from epoch 90. Table 3: 75.1 % with alpha 0.4 to the end.
    "resnet50-imagenet-autosparse80": STR | {
        "method_args": {**SHARED_AUTOSPARSE, "alpha": 0.75, "zero_alpha_epoch": 90}, "preset": "resnet50",
        "include": None, "label_smoothing": 0.1,
    },
    # Depthwise convolutions as well: STR's code has thresholds on all of them.
    "mobilenetv1-imagenet-autosparse75": STR | {
        "method_args": {**SHARED_AUTOSPARSE, "alpha": 0.4}, "preset": "mobilenet_v1", "include": ["*"],
        "label_smoothing": 0.1,
    },
    "resnet50-imagenet-acdc90": STR | {"method": "acdc", "sparsity": 0.9, "label_smoothing": 0.0},
    # SWAT (arXiv:2001.01969), section 4.1 and table 14, column "SWAT(UnStructured)"; table 3: 80 % of both.
    "resnet50-imagenet-swat80": {
        "optimizer": "sgd", "learning_rate": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-4,
        "norm_decay": False, "label_smoothing": 0.1, "num_train_epochs": 90, "batch_size": 256, "warmup_epochs": 5,
        "lr_scheduler_type": "multistep", "lr_milestones": [30, 60, 80], "lr_gamma": 0.1, "preset": "resnet50",
        "method": "swat", "sparsity": 0.8,
    },
    # He et al. (arXiv:1512.03385), section 4.2.
    "cifar10-resnet20": {
        "preset": "resnet20", "batch_size": 128, "learning_rate": 0.1, "momentum": 0.9, "weight_decay": 1e-4,
        "augmentation": "crop_flip", "method": "dense",
    },
}  # fmt: skip


@pytest.mark.parametrize("name", EXPECTED)
def test_a_recipe_has_the_numbers_of_its_source(name: str) -> None:
    args = vars(parse(name))
    assert {key: args[key] for key in EXPECTED[name]} == EXPECTED[name]


def test_lengths_rates_and_phases_that_the_sources_give_in_other_units() -> None:
    # lrate = d^-0.5 min(step^-0.5, step warmup^-1.5) peaks at the end of the warm-up.
    base = parse("wmt14-base")
    assert base.learning_rate == pytest.approx(512**-0.5 * 4000**-0.5, rel=2e-3)
    assert base.max_tokens_per_batch * base.gradient_accumulation_steps == 25_000
    for name in IMAGES:
        if EXPECTED[name].get("augmentation") == "imagenet":
            assert parse(name).weight_decay == pytest.approx(3.0517578125e-5, rel=1e-8)
    # 64,000 iterations of 128 images, of 50,000.
    assert parse("cifar10-resnet20").num_train_epochs * -(-50_000 // 128) == pytest.approx(64_000, rel=0.005)
    args = parse("resnet50-imagenet-acdc90")
    assert args.method_args["scope"] == "global"
    table = PHASES[args.method_args["phases"]]
    assert table.epochs == args.num_train_epochs == 100
    assert [kind for epoch, kind in table.starts if epoch in (75, 85)] == ["dense", "sparse"]


@pytest.mark.parametrize(
    ("name", "schedule"),
    [("demo", "exponential"), ("multi30k", "exponential"), ("fashion-mnist-small", "sigmoid_cosine")],
)
def test_the_small_recipes_anneal_to_zero_within_their_run(name: str, schedule: str) -> None:
    """As in the paper (10 of 44 epochs), or what is trained last is not sparse."""
    args = parse(name)
    assert args.method_args["alpha_schedule"] == schedule
    assert args.method_args["zero_alpha_epoch"] < args.num_train_epochs
    if name in TRANSLATION:
        assert (args.method_args["alpha"], args.adam_beta1, args.adam_beta2) == (0.4, 0.9, 0.997)


@pytest.mark.parametrize("name", [name for name in LANGUAGE if name != "wt103-base"])
def test_an_acdc_recipe_is_as_long_as_its_phases_and_ends_sparse(name: str) -> None:
    args = parse(name)
    method = method_of(args)
    assert isinstance(method, ACDC) and args.save_twins
    assert method.table.epochs == args.num_train_epochs
    assert method.table.starts[0] == (0.0, "dense") and method.table.starts[-1][1] == "sparse"
    if "large" in name:
        kinds = [method.table.at(epoch, 1) for epoch in range(48)]
        assert kinds.count("dense") == kinds.count("sparse") == 24 and kinds[32:39] == ["dense"] * 7


@torch.no_grad()
def test_recipes_over_strs_training_initialise_by_fan_in_as_its_absolute_thresholds_ask() -> None:
    for name in ("resnet50-imagenet-autosparse80", "mobilenetv1-imagenet-autosparse75"):
        assert parse(name).initialisation == "fan_in"
    for mode in ("fan_in", "fan_out"):
        torch.manual_seed(0)
        for module in build_model("resnet20", ["cat", "dog"], 3, 32, mode).modules():
            if isinstance(module, torch.nn.Conv2d) and module.weight.numel() > 4000:
                inputs, outputs = module.weight[0].numel(), module.weight[:, 0].numel()
                wanted = (2.0 / (inputs if mode == "fan_in" else outputs)) ** 0.5
                assert float(module.weight.std()) == pytest.approx(wanted, rel=0.05)


@torch.no_grad()
def test_the_swat_recipe_leaves_the_first_convolution_dense_and_nothing_else() -> None:
    args = parse("resnet50-imagenet-swat80")
    method = method_of(args)
    assert (method.distribution, method.refresh_every, method.activation_sparsity) == ("uniform", 1000, None)
    with torch.device("meta"):
        model = build_model(args.preset, ["cat", "dog"], 3, 224)
    selected, skipped = select(model, include=args.include, exclude=args.exclude, output_heads=True)
    assert [(skip.name, skip.reason) for skip in skipped] == [("resnet.embedder.embedder.convolution", "excluded")]
    # 16 blocks of 3 convolutions, 4 on the way down, and the classifier.
    assert len(selected) == 16 * 3 + 4 + 1


def test_another_method_keeps_the_recipe_s_sparsity_if_it_takes_one_and_dense_trains_the_baseline() -> None:
    for name in LANGUAGE:
        args = parse(name, "--method=dense")
        assert (args.sparsity, args.method_args, args.pattern) == (None, None, "unstructured")
        method_of(args)
    assert parse("wikitext2-small", "--method=gmp").method_args is None
    for name, method in METHODS.items():
        takes = "sparsity" in {field.name for field in dataclasses.fields(method)}
        assert parse("wikitext2-small", f"--method={name}").sparsity == (0.8 if takes else None)


@pytest.mark.parametrize(
    ("preset", "millions", "sizes"),
    [("transfoxl-base", 191.95, (16, 512, 8, 64, 2048)), ("transfoxl-large", 285.2, (18, 1024, 16, 64, 4096))],
)
def test_transformer_xls_have_the_published_sizes(preset: str, millions: float, sizes: tuple[int, ...]) -> None:
    assert dataclasses.astuple(language_presets.TRANSFO_XL[preset])[:5] == sizes
    with torch.device("meta"):
        model = language_presets.build_transfo_xl(preset, 267_735)
        small = language_presets.build_transfo_xl(preset, 30_000), language_presets.build_transfo_xl(preset, 1000)
    assert sum(parameter.numel() for parameter in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.05)
    assert model.config.mem_len == language_presets.TRANSFO_XL[preset].tgt_len
    # Cutoffs beyond a small vocabulary are left out.
    assert [each.config.cutoffs for each in small] == [[19997], []]
