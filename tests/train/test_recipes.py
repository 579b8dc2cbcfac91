"""The packaged recipes: each parses, each makes its method, and the papers' numbers are the papers'."""

from __future__ import annotations

import argparse
from typing import Any

import pytest

from tritonsparse.methods import METHODS
from tritonsparse.train.run import arguments
from tritonsparse.train.run.program import make_method
from tritonsparse.train.text import translation_arguments
from tritonsparse.train.text.translation_presets import PRESETS

NAMES = ["demo", "multi30k", "wmt14-base", "wmt14-big-autosparse"]


def parse(name: str) -> argparse.Namespace:
    return arguments.parse(translation_arguments.parser(), ["--recipe", name, "--output_dir", "out"])


def values(name: str, *keys: str) -> tuple[Any, ...]:
    args = parse(name)
    return tuple(getattr(args, key) for key in keys)


def test_these_recipes_come_with_the_package() -> None:
    # Those of the other programs have tests of their own.
    assert set(NAMES) <= set(arguments.recipe_names())


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_parses_and_its_values_arrive(name: str) -> None:
    args = parse(name)
    for key, value in arguments.read_recipe(name).items():
        assert getattr(args, key) == value, key
    assert args.preset in PRESETS


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_makes_its_method_with_the_fields_it_gives(name: str) -> None:
    args = parse(name)
    method = make_method("translation", args)
    assert type(method) is METHODS[args.method]
    fields = method.to_dict()
    assert {key: fields[key] for key in args.method_args or {}} == (args.method_args or {})


def test_the_base_recipe_is_vaswani_s() -> None:
    """Attention is all you need (2017): sections 5.1-5.4 and 6.1, table 3."""
    keys = ("learning_rate", "adam_beta1", "adam_beta2", "adam_epsilon", "num_warmup_steps", "max_train_steps")
    assert values("wmt14-base", *keys) == (7e-4, 0.9, 0.98, 1e-9, 4000, 100_000)
    # lrate = d^-0.5 min(step^-0.5, step warmup^-1.5) peaks at the end of the warm-up.
    peak = 512**-0.5 * 4000**-0.5
    assert peak == pytest.approx(7e-4, rel=2e-3)
    args = parse("wmt14-base")
    assert args.max_tokens_per_batch * args.gradient_accumulation_steps == 25_000
    assert (args.preset, args.vocab_size, args.method) == ("transformer-base", 37_000, "dense")
    assert (args.dropout, args.label_smoothing, args.lr_scheduler_type) == (0.1, 0.1, "inverse_sqrt")
    assert (args.average_checkpoints, args.num_beams, args.length_penalty) == (5, 4, 0.6)
    assert (args.max_grad_norm, args.weight_decay) == (0.0, 0.0)


def test_the_big_recipe_is_autosparse_s() -> None:
    """arXiv:2304.06941, sections 5.1 and 5.3."""
    args = parse("wmt14-big-autosparse")
    assert args.method_args == {
        "threshold_init": -7.0,
        "alpha": 0.4,
        "alpha_schedule": "exponential",
        "zero_alpha_epoch": 10,
    }
    keys = ("num_train_epochs", "learning_rate", "adam_beta1", "adam_beta2", "num_warmup_steps", "lr_scheduler_type")
    assert values("wmt14-big-autosparse", *keys) == (44, 8.46e-4, 0.9, 0.997, 4000, "inverse_sqrt")
    assert (args.max_tokens_per_batch, args.preset, args.method) == (10_240, "transformer-big", "autosparse")


def test_what_the_big_recipe_takes_from_nvidia_is_nvidia_s() -> None:
    """DeepLearningExamples, PyTorch/Translation/Transformer: 33,712 entries, dropout 0.1 for big, beam 5, no decay."""
    keys = ("vocab_size", "dropout", "label_smoothing", "weight_decay", "adam_epsilon", "num_beams")
    assert values("wmt14-big-autosparse", *keys) == (33_712, 0.1, 0.1, 0.0, 1e-9, 5)


@pytest.mark.parametrize("name", ["demo", "multi30k"])
def test_the_small_recipes_keep_the_paper_s_annealing(name: str) -> None:
    args = parse(name)
    assert (args.method_args["alpha"], args.method_args["alpha_schedule"]) == (0.4, "exponential")
    # alpha must reach 0 within the run, as in the paper (10 of 44), or what is trained last is not sparse.
    assert args.method_args["zero_alpha_epoch"] < args.num_train_epochs
    assert (args.adam_beta1, args.adam_beta2) == (0.9, 0.997)


def test_the_demo_needs_no_file_and_no_network() -> None:
    assert values("demo", "dataset_name", "train_file", "with_tracking") == ("embedded", None, False)


@pytest.mark.parametrize("name", ["wmt14-base", "wmt14-big-autosparse"])
def test_the_wmt_recipes_name_the_hub_s_configuration(name: str) -> None:
    assert values(name, "dataset_name", "dataset_config_name") == ("wmt/wmt14", "de-en")
    assert values(name, "source_lang", "target_lang") == ("en", "de")
