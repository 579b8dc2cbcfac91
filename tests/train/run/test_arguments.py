"""The command line: transformers' names, recipes under it, and no word that is passed over in silence."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from tritonsparse.train.run import arguments
from tritonsparse.train.text import translation_arguments

# Frozen: users have these in scripts. A new option is added here with its reason in the change.
OPTIONS = {
    "--adam_beta1", "--adam_beta2", "--adam_epsilon", "--auto_tune", "--average_checkpoints", "--backend",
    "--checkpointing_steps", "--checkpoints_total_limit", "--dataset_config_name", "--dataset_name", "--dropout",
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
BASE = ("--output_dir", "out", "--max_train_steps", "5")


def parse(*argv: str) -> argparse.Namespace:
    return arguments.parse(translation_arguments.parser(), argv)


def recipe(folder: Path, text: str) -> str:
    path = folder / "mine.toml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_the_options_are_frozen() -> None:
    assert {option for action in translation_arguments.parser()._actions for option in action.option_strings} == OPTIONS


def test_every_option_has_a_default_that_parses() -> None:
    args = parse(*BASE)
    assert (args.method, args.pattern, args.backend, args.seed) == ("autosparse", "unstructured", "auto", 0)
    assert (args.source_lang, args.target_lang, args.checkpointing_steps) == ("en", "de", None)


def test_the_command_line_goes_before_the_recipe_and_the_recipe_before_the_defaults(tmp_path: Path) -> None:
    path = recipe(tmp_path, 'seed = 3\nvocab_size = 77\nmethod = "gmp"\n[method_args]\nsparsity = 0.5\n')
    args = parse(*BASE, "--recipe", path, "--vocab_size", "88")
    assert (args.vocab_size, args.seed, args.method, args.method_args) == (88, 3, "gmp", {"sparsity": 0.5})
    assert args.label_smoothing == 0.1


def test_a_value_equal_to_the_default_still_goes_before_the_recipe(tmp_path: Path) -> None:
    assert parse(*BASE, "--recipe", recipe(tmp_path, "seed = 3"), "--seed", "0").seed == 0


def test_a_length_on_the_command_line_replaces_either_length_of_the_recipe(tmp_path: Path) -> None:
    args = parse(*BASE, "--recipe", recipe(tmp_path, "num_train_epochs = 4"))
    assert (args.num_train_epochs, args.max_train_steps) == (None, 5)
    args = parse("--output_dir=out", "--num_train_epochs=2", "--recipe", recipe(tmp_path, "max_train_steps = 9"))
    assert (args.num_train_epochs, args.max_train_steps) == (2, None)


def test_another_method_leaves_the_recipes_fields_behind(tmp_path: Path) -> None:
    path = recipe(tmp_path, 'method = "gmp"\n[method_args]\nsparsity = 0.5\n')
    assert parse(*BASE, "--recipe", path, "--method=dense").method_args is None
    assert parse(*BASE, "--recipe", path, "--method", "gmp").method_args == {"sparsity": 0.5}
    own = parse(*BASE, "--recipe", path, "--method=str", '--method_args={"threshold_init": -9}')
    assert own.method_args == {"threshold_init": -9}


def test_a_saved_model_leaves_the_recipes_sizes_behind(tmp_path: Path) -> None:
    path = recipe(tmp_path, 'preset = "transformer-big"\nvocab_size = 77\ndropout = 0.3\nseed = 4\n')
    args = parse(*BASE, "--recipe", path, "--model_name_or_path", "some/model")
    assert (args.preset, args.vocab_size, args.dropout, args.seed) == (None, None, None, 4)


def test_an_abbreviated_option_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(*BASE, "--learning=1")
    assert "unrecognized arguments: --learning=1" in capsys.readouterr().err


def test_reference_losses_are_those_of_a_dense_run(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"expected --method dense with --record_reference_losses, got 'autosparse'"):
        parse(*BASE, "--record_reference_losses=losses.json")


def test_dashes_in_option_names_are_underscores_and_values_are_left_alone() -> None:
    args = parse("--output-dir=a-b", "--max-train-steps", "5", "--dataset-name", "my-set", "--method-args={}")
    assert (args.output_dir, args.max_train_steps, args.dataset_name) == ("a-b", 5, "my-set")


def test_both_spellings_of_the_trainer_are_one_option() -> None:
    args = parse("--output_dir=out", "--max_steps=7", "--warmup_steps=8", "--label_smoothing_factor=0.2")
    assert (args.max_train_steps, args.num_warmup_steps, args.label_smoothing) == (7, 8, 0.2)


@pytest.mark.parametrize("word", ["--no-with_tracking", "--no-with-tracking", "--no_with_tracking"])
def test_a_boolean_flag_has_both_halves_in_every_spelling(word: str) -> None:
    assert parse(*BASE, "--with-tracking").with_tracking is True
    assert parse(*BASE, "--with_tracking", word).with_tracking is False


def test_naming_a_tracker_switches_tracking_on() -> None:
    assert parse(*BASE).with_tracking is False
    assert parse(*BASE, "--report_to", "tensorboard").with_tracking is True
    args = parse(*BASE, "--report_to", "none")
    assert (args.with_tracking, args.report_to) == (False, None)


def test_method_args_are_a_json_object() -> None:
    assert parse(*BASE, "--method_args", '{"alpha": 0.4}').method_args == {"alpha": 0.4}


def test_checkpointing_steps_are_a_number_or_epoch(tmp_path: Path) -> None:
    assert parse(*BASE, "--checkpointing_steps", "20").checkpointing_steps == 20
    assert parse(*BASE, "--checkpointing_steps", "epoch").checkpointing_steps == "epoch"
    path = recipe(tmp_path, "checkpointing_steps = 20")
    assert parse(*BASE, "--recipe", path).checkpointing_steps == 20


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (("--sparse",), "unrecognized arguments: --sparse"),
        (("--vocab_size", "many"), "invalid int value: 'many'"),
        (("--mixed_precision", "fp8"), "invalid choice: 'fp8'"),
        (("--method_args", "alpha=1"), "--method_args: expected a JSON object, got 'alpha=1'"),
        (("--method_args", "[1]"), "--method_args: expected a JSON object, got '[1]'"),
    ],
)
def test_what_argparse_refuses_is_one_line_with_status_2(
    argv: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        parse(*BASE, *argv)
    assert caught.value.code == 2
    assert words in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (("--max_train_steps=5",), "expected --output_dir, got none; name a folder"),
        (("--output_dir=out",), "one of --num_train_epochs and --max_train_steps, got neither; give one"),
        ((*BASE, "--num_train_epochs=1"), "got both; give one"),
        (("--output_dir=out", "--max_train_steps=0"), "--max_train_steps of at least 1, got 0"),
        (("--output_dir=out", "--num_train_epochs=-1"), "--num_train_epochs of at least 1, got -1"),
        ((*BASE, "--gradient_accumulation_steps=0"), "--gradient_accumulation_steps of at least 1, got 0"),
        ((*BASE, "--logging_steps=0"), "--logging_steps of at least 1, got 0"),
        ((*BASE, "--checkpointing_steps=often"), "a number of steps or 'epoch', got 'often'"),
        ((*BASE, "--checkpointing_steps=0"), "a number of steps or 'epoch', got '0'"),
        ((*BASE, "--average_checkpoints=2"), "expected --checkpointing_steps with --average_checkpoints, got none"),
        (
            (*BASE, "--checkpointing_steps=1", "--average_checkpoints=3", "--checkpoints_total_limit=2"),
            "--checkpoints_total_limit of at least 3 (the checkpoints to average), got 2; raise it",
        ),
        ((*BASE, "--checkpoints_total_limit=0"), "--checkpoints_total_limit of at least 1"),
        ((*BASE, "--recipe=nonsense"), "expected a .toml file or one of"),
        ((*BASE, "--recipe=no/such.toml"), "got no/such.toml, which is not there; correct the path"),
    ],
)
def test_values_that_do_not_fit_are_one_sentence_with_a_remedy(argv: tuple[str, ...], words: str) -> None:
    with pytest.raises(ValueError) as caught:
        parse(*argv)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("vocab = 3", "arguments of this program as keys, got 'vocab' in"),
        ('output_dir = "x"', "got 'output_dir' in"),
        ('resume_from_checkpoint = "latest"', "got 'resume_from_checkpoint' in"),
        ("vocab_size = ", "expected TOML, got"),
        ("vocab_size = 12.5", "expected vocab_size as int, got 12.5"),
        ('learning_rate = "fast"', "expected learning_rate as int or float, got 'fast'"),
        ("seed = true", "expected seed as int, got True"),
        ("with_tracking = 1", "expected with_tracking as bool, got 1"),
        ('include = "fc1"', "expected include as list, got 'fc1'"),
        ("method_args = 3", "expected method_args as dict, got 3"),
        ("method = 3", "expected method as str, got 3"),
    ],
)
def test_a_recipe_that_does_not_fit_is_refused_with_its_name(tmp_path: Path, text: str, words: str) -> None:
    path = recipe(tmp_path, text)
    with pytest.raises(ValueError) as caught:
        parse(*BASE, "--recipe", path)
    assert words in str(caught.value)
    assert path in str(caught.value)


def test_a_recipe_holds_any_option_of_the_program(tmp_path: Path) -> None:
    text = 'learning_rate = 1\ninclude = ["*.fc1"]\nwith_tracking = true\ncheckpointing_steps = "epoch"\ndropout = 0.3'
    args = parse(*BASE, "--recipe", recipe(tmp_path, text))
    assert (args.learning_rate, args.include, args.with_tracking, args.dropout) == (1, ["*.fc1"], True, 0.3)
