"""The command line: transformers' names, recipes under it, and no word that is passed over in silence."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

import pytest

from tritonsparse.eval.command_line import Parser
from tritonsparse.train.images import arguments as image_arguments
from tritonsparse.train.run import arguments
from tritonsparse.train.text import language_arguments, translation_arguments

# Frozen: users have these in scripts. A new option is added here with its reason in the change.
OPTIONS = {
    "--adam_beta1", "--adam_beta2", "--adam_epsilon", "--auto_tune", "--average_checkpoints", "--backend",
    "--bleu_tokenize", "--checkpointing_steps", "--checkpoints_total_limit",
    "--dataset_config_name", "--dataset_name", "--dropout",
    "--eval_num_beams", "--exclude", "--flops_convention", "--gradient_accumulation_steps", "--help", "--include",
    "--label_smoothing", "--label_smoothing_factor", "--learning_rate", "--length_penalty", "--logging_steps",
    "--lr_scheduler_type", "--max_eval_samples", "--max_grad_norm", "--max_source_length", "--max_steps",
    "--max_target_length", "--max_test_samples", "--max_tokens_per_batch", "--max_train_samples", "--max_train_steps",
    "--method", "--method_args", "--mixed_precision", "--model_name_or_path", "--no-save_twins", "--no-with_tracking",
    "--num_beams", "--num_train_epochs", "--num_warmup_steps", "--output_dir", "--pattern", "--preset", "--recipe",
    "--record_reference_losses", "--report_to", "--resume_from_checkpoint", "--save_twins", "--seed", "--source_lang",
    "--sparsity", "--target_lang", "--test_file", "--train_file", "--validation_file", "--vocab_size", "--warmup_steps",
    "--weight_decay", "--with_tracking", "-h",
}  # fmt: skip
# Beside those of translation.
LANGUAGE = {
    "--batch_size", "--block_size", "--cache_dir", "--dropatt", "--embedding_sparsity", "--eval_batch_size",
    "--eval_mem_len", "--eval_stride", "--eval_tgt_len", "--max_eval_tokens", "--max_test_tokens", "--max_train_tokens",
    "--mem_len", "--min_count", "--min_learning_rate", "--no-roll", "--no-test_same_length", "--optim", "--roll",
    "--steps_per_epoch", "--test_batch_size", "--test_clamp_len", "--test_mem_len", "--test_same_length",
    "--test_tgt_len", "--tgt_len",
}  # fmt: skip
# Beside those of every program, by destination.
IMAGES = {
    "initialisation",
    "model_name_or_path", "preset", "channels_last", "dataset_name", "dataset_config_name", "data_dir", "image_size",
    "eval_resize", "augmentation", "batch_size", "eval_batch_size", "workers", "max_train_samples", "max_eval_samples",
    "max_test_samples", "label_smoothing", "optimizer", "momentum", "nesterov", "norm_decay", "warmup_epochs",
    "lr_milestones", "lr_gamma", "bn_reestimation_batches", "match_classes",
}  # fmt: skip
STEPS, OUT = "--max_train_steps=5", "--output_dir=out"
GMP = 'method = "gmp"\n[method_args]\nsparsity = 0.5\n'
LARGE = 'preset = "transformer-big"\nvocab_size = 77\ndropout = 0.3\nseed = 4\n'
MANY = 'learning_rate = 1\ninclude = ["*.fc1"]\nwith_tracking = true\ncheckpointing_steps = "epoch"\ndropout = 0.3'


def test_the_options_are_frozen() -> None:
    def options(parser: argparse.ArgumentParser) -> set[str]:
        return {option for action in parser._actions for option in action.option_strings}

    assert options(translation_arguments.parser()) == OPTIONS
    assert options(language_arguments.parser()) - OPTIONS == LANGUAGE
    common = Parser("train.any", None)
    arguments.add_common(common)
    shared = {action.dest for action in common._actions}
    assert {action.dest for action in image_arguments.parser("images", None)._actions} - shared == IMAGES


def parse(*argv: str) -> argparse.Namespace:
    return arguments.parse(translation_arguments.parser(), argv)


def recipe(folder: Path, text: str) -> str:
    (folder / "mine.toml").write_text(text, encoding="utf-8")
    return str(folder / "mine.toml")


# what is shown: (recipe, command line, arguments)
GIVEN: dict[str, tuple[str, tuple[str, ...], dict[str, Any]]] = {
    "every option has a default": ("", (STEPS,), {
        "method": "autosparse", "pattern": "unstructured", "backend": "auto", "seed": 0, "source_lang": "en",
        "target_lang": "de", "checkpointing_steps": None, "with_tracking": False, "label_smoothing": 0.1}),
    "the command line goes before the recipe, the recipe before the defaults": (
        f"seed = 3\nvocab_size = 77\n{GMP}", (STEPS, "--vocab_size", "88"),
        {"vocab_size": 88, "seed": 3, "method": "gmp", "method_args": {"sparsity": 0.5}, "label_smoothing": 0.1}),
    "a value equal to the default too": ("seed = 3", (STEPS, "--seed", "0"), {"seed": 0}),
    "a number of steps replaces a recipe's epochs": (
        "num_train_epochs = 4", (STEPS,), {"num_train_epochs": None, "max_train_steps": 5}),
    "epochs replace a recipe's number of steps": (
        "max_train_steps = 9", ("--num_train_epochs=2",), {"num_train_epochs": 2, "max_train_steps": None}),
    "another method leaves the recipe's fields behind": (GMP, (STEPS, "--method=dense"), {"method_args": None}),
    "the same method keeps them": (GMP, (STEPS, "--method", "gmp"), {"method_args": {"sparsity": 0.5}}),
    "fields of the command line replace them": (
        GMP, (STEPS, "--method=str", '--method_args={"threshold_init": -9}'), {"method_args": {"threshold_init": -9}}),
    "a saved model leaves the recipe's sizes behind": (
        LARGE, (STEPS, "--model_name_or_path", "some/model"),
        {"preset": None, "vocab_size": None, "dropout": None, "seed": 4}),
    "a recipe holds any option": (MANY, (STEPS,), {
        "learning_rate": 1, "include": ["*.fc1"], "with_tracking": True, "dropout": 0.3,
        "checkpointing_steps": "epoch"}),
    "dashes in names are underscores, values are left alone": (
        "", ("--output-dir=a-b", "--max-train-steps", "5", "--dataset-name", "my-set", "--method-args={}"),
        {"output_dir": "a-b", "max_train_steps": 5, "dataset_name": "my-set"}),
    "both spellings of the Trainer are one option": (
        "", ("--max_steps=7", "--warmup_steps=8", "--label_smoothing_factor=0.2"),
        {"max_train_steps": 7, "num_warmup_steps": 8, "label_smoothing": 0.2}),
    "a flag": ("", (STEPS, "--with-tracking"), {"with_tracking": True}),
    "its other half": ("", (STEPS, "--with_tracking", "--no-with_tracking"), {"with_tracking": False}),
    "its other half with dashes": ("", (STEPS, "--with_tracking", "--no-with-tracking"), {"with_tracking": False}),
    "its other half with underscores": ("", (STEPS, "--with_tracking", "--no_with_tracking"), {"with_tracking": False}),
    "naming a tracker switches tracking on": ("", (STEPS, "--report_to", "tensorboard"), {"with_tracking": True}),
    "none is no tracker": ("", (STEPS, "--report_to", "none"), {"with_tracking": False, "report_to": None}),
    "fields are a JSON object": ("", (STEPS, "--method_args", '{"alpha": 0.4}'), {"method_args": {"alpha": 0.4}}),
    "checkpoints by steps": ("", (STEPS, "--checkpointing_steps", "20"), {"checkpointing_steps": 20}),
    "checkpoints by epochs": ("", (STEPS, "--checkpointing_steps", "epoch"), {"checkpointing_steps": "epoch"}),
    "checkpoints by a recipe's steps": ("checkpointing_steps = 20", (STEPS,), {"checkpointing_steps": 20}),
}  # fmt: skip


@pytest.mark.parametrize(("text", "argv", "expected"), GIVEN.values(), ids=GIVEN)
def test_given_words_become_arguments(tmp_path: Path, text: str, argv: Any, expected: Any) -> None:
    words = (*argv, "--recipe", recipe(tmp_path, text)) if text else argv
    args = vars(parse(*(() if "output_dir" in expected else (OUT,)), *words))
    assert {key: args[key] for key in expected} == expected


# (command line, words of the refusal): between options; what each takes by itself is in ../test_command_lines.py.
VALUES = [
    ((STEPS,), "expected --output_dir, got none; name a folder"),
    ((OUT,), "one of --num_train_epochs and --max_train_steps, got neither; give one"),
    ((OUT, STEPS, "--num_train_epochs=1"), "got both; give one"),
    ((OUT, STEPS, "--average_checkpoints=2"), "--checkpointing_steps with --average_checkpoints, got none"),
    ((OUT, STEPS, "--checkpointing_steps=1", "--average_checkpoints=3", "--checkpoints_total_limit=2"),
     "--checkpoints_total_limit of at least 3 (the checkpoints to average), got 2; raise it"),
    ((OUT, STEPS, "--recipe=nonsense"), "expected a .toml file or one of"),
    ((OUT, STEPS, "--recipe=no/such.toml"), "got no/such.toml, which is not there; correct the path"),
    ((OUT, STEPS, "--record_reference_losses=losses.json"),
     "expected --method dense with --record_reference_losses, got 'autosparse'"),
]  # fmt: skip
RECIPES = [
    ("vocab = 3", "arguments of this program as keys, got 'vocab' in"),
    ('output_dir = "x"', "got 'output_dir' in"),
    ('resume_from_checkpoint = "latest"', "got 'resume_from_checkpoint' in"),
    ("vocab_size = ", "expected TOML, got"),
]


@pytest.mark.parametrize(("given", "words"), [*VALUES, *RECIPES])
def test_what_does_not_fit_is_one_sentence_with_a_remedy(tmp_path: Path, given: Any, words: str) -> None:
    path = recipe(tmp_path, given) if isinstance(given, str) else ""
    with pytest.raises(ValueError, match=re.escape(words)) as caught:
        parse(*((OUT, STEPS, "--recipe", path) if path else given))
    assert path in str(caught.value)
