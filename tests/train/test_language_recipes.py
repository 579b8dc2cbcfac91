"""Recipes of the language-modelling program: each parses and makes its method, and says what the papers say."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

import pytest
import torch

import tritonsparse as ts
from tritonsparse.methods import METHODS
from tritonsparse.train.run import arguments
from tritonsparse.train.run.program import make_method
from tritonsparse.train.text import language_arguments
from tritonsparse.train.text.language_presets import PRESETS, TRANSFO_XL, Sizes, build_transfo_xl

NAMES = ["lm-demo", "wikitext2-small", "wt103-base", "wt103-large-acdc80", "wt103-large-acdc90"]


def parse(name: str, *options: str) -> argparse.Namespace:
    return arguments.parse(language_arguments.parser(), ["--recipe", name, "--output_dir", "out", *options])


def values(name: str, *keys: str) -> tuple[Any, ...]:
    args = parse(name)
    return tuple(getattr(args, key) for key in keys)


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_parses_its_values_arrive_and_it_makes_its_method(name: str) -> None:
    args = parse(name)
    for key, value in arguments.read_recipe(name).items():
        assert getattr(args, key) == value, key
    assert args.preset in PRESETS
    assert type(make_method("language_modeling", args)) is METHODS[args.method]


@pytest.mark.parametrize("name", [name for name in NAMES if name != "wt103-base"])
def test_an_acdc_recipe_is_as_long_as_its_phases_and_ends_sparse(name: str) -> None:
    args = parse(name)
    method = make_method("language_modeling", args)
    assert isinstance(method, ts.methods.ACDC)
    assert method.table.epochs == args.num_train_epochs
    assert method.table.starts[0] == (0.0, "dense") and method.table.starts[-1][1] == "sparse"
    assert args.save_twins


@pytest.mark.parametrize("name", NAMES)
def test_the_same_recipe_trains_the_dense_baseline(name: str) -> None:
    args = parse(name, "--method=dense")
    assert (args.sparsity, args.method_args, args.pattern) == (None, None, "unstructured")
    make_method("language_modeling", args)


def test_another_method_that_takes_a_sparsity_keeps_the_recipe_s() -> None:
    args = parse("wikitext2-small", "--method=gmp")
    assert (args.sparsity, args.method_args) == (0.8, None)
    for name, method in METHODS.items():
        takes = "sparsity" in {field.name for field in dataclasses.fields(method)}
        assert parse("wikitext2-small", f"--method={name}").sparsity == (0.8 if takes else None)


def test_the_base_recipe_is_nvidia_s() -> None:
    """wt103_base.yaml, and the defaults of train.py and lamb.py beside it."""
    keys = ("batch_size", "tgt_len", "mem_len", "optim", "learning_rate", "min_learning_rate", "num_warmup_steps")
    assert values("wt103-base", *keys) == (256, 192, 192, "lamb", 0.01, 0.001, 1000)
    keys = ("max_train_steps", "max_grad_norm", "roll", "adam_beta1", "adam_beta2", "adam_epsilon", "weight_decay")
    assert values("wt103-base", *keys) == (40_000, 0.25, True, 0.9, 0.999, 1e-6, 0.0)
    keys = ("test_tgt_len", "test_mem_len", "test_clamp_len", "test_same_length", "test_batch_size", "method")
    assert values("wt103-base", *keys) == (64, 640, 400, True, 1, "dense")
    assert dataclasses.astuple(TRANSFO_XL["transfoxl-base"])[:5] == (16, 512, 8, 64, 2048)


@pytest.mark.parametrize(("name", "sparsity"), [("wt103-large-acdc80", 0.8), ("wt103-large-acdc90", 0.9)])
def test_the_large_recipes_are_acdc_s_over_nvidia_s(name: str, sparsity: float) -> None:
    """arXiv:2106.12379, section 4.3; wt103_large.yaml."""
    keys = ("batch_size", "tgt_len", "mem_len", "optim", "learning_rate", "min_learning_rate", "num_warmup_steps")
    assert values(name, *keys) == (128, 384, 384, "lamb", 0.01, 0.0001, 16_000)
    keys = ("test_tgt_len", "test_mem_len", "test_clamp_len", "test_same_length", "eval_tgt_len", "eval_mem_len")
    assert values(name, *keys) == (128, 1600, 1000, True, 128, 640)
    assert values(name, "sparsity", "num_train_epochs", "max_grad_norm") == (sparsity, 48, 0.25)
    method = make_method("language_modeling", parse(name))
    assert isinstance(method, ts.methods.ACDC)
    kinds = [method.table.at(epoch, 1) for epoch in range(48)]
    assert kinds.count("dense") == kinds.count("sparse") == 24 and kinds[32:39] == ["dense"] * 7
    assert dataclasses.astuple(TRANSFO_XL["transfoxl-large"])[:5] == (18, 1024, 16, 64, 4096)


@pytest.mark.parametrize(("preset", "millions"), [("transfoxl-base", 191.95), ("transfoxl-large", 285.2)])
def test_the_presets_have_the_published_counts_of_parameters(preset: str, millions: float) -> None:
    with torch.device("meta"):
        model = build_transfo_xl(preset, 267_735)
    assert sum(parameter.numel() for parameter in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.05)
    assert model.config.mem_len == TRANSFO_XL[preset].tgt_len


def test_cutoffs_beyond_a_small_vocabulary_are_left_out() -> None:
    sizes: Sizes = TRANSFO_XL["transfoxl-base"]
    with torch.device("meta"):
        assert build_transfo_xl("transfoxl-base", 30_000).config.cutoffs == [sizes.cutoffs[0]]
        assert build_transfo_xl("transfoxl-base", 1000).config.cutoffs == []


def test_the_demo_needs_no_file_and_no_network() -> None:
    assert values("lm-demo", "dataset_name", "train_file") == ("embedded", None)
