"""What every option of every program takes: a word out of range is one sentence that names the option, status 2."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tritonsparse.eval import accuracy, agreement, bleu, cli, layer_bench, onnx_export, perplexity, plots, speed
from tritonsparse.eval.command_line import Parser
from tritonsparse.train import image_classification, language_modeling, memorization, translation
from tritonsparse.train.images import arguments as image_arguments
from tritonsparse.train.run.arguments import SCHEDULES, parse
from tritonsparse.train.text import language_arguments, translation_arguments

NO_NUMBER = ("", " ", "x", "nan", "inf", "-inf", "1e999", "None", "[1]", "1,5", "𝟙x")
NO_WHOLE = (*NO_NUMBER, "1.5", "1e3", "1_000", "0x10", "٣", "9" * 20)
# kind -> (words that it takes, words that it does not)
KINDS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "count": (("1", "+7", "007"), (*NO_WHOLE, "0", "-1")),
    "natural": (("0", "7"), (*NO_WHOLE, "-1")),
    "two": (("2",), (*NO_WHOLE, "1", "0", "-1")),
    "pixels": (("1", "4096"), (*NO_WHOLE, "0", "4097", "65536")),
    "vocabulary": (("1", "1048576"), (*NO_WHOLE, "0", "1048577")),
    "threads": (("1", "1024"), (*NO_WHOLE, "0", "1025")),
    "workers": (("0", "1024"), (*NO_WHOLE, "-1", "1025")),
    "seed": (("0", "4294967295"), (*NO_WHOLE, "-1", "4294967296")),
    "beams": (("1", "1024"), (*NO_WHOLE, "0", "1025")),
    "power": (("-10", "0.6"), (*NO_NUMBER, "-10.1", "11")),
    "below one": (("0", "0.999", "1e-9"), (*NO_NUMBER, "1", "-0.1", "1.5")),
    "inside one": (("0.001", "0.999"), (*NO_NUMBER, "0", "1", "-0.1")),
    "density": (("0.001", "1"), (*NO_NUMBER, "0", "1.1")),
    "not negative": (("0", "1e30"), (*NO_NUMBER, "-1", "-1e-9", "1e39")),
    "positive": (("1e-30", "30"), (*NO_NUMBER, "0", "-1", "1e-60", "1e39")),
    "steps or epoch": (("epoch", "1"), (*NO_WHOLE, "0", "-1", "epochs")),
    "text": (("a b", "ü", "-"), ("", " ", "a\0b", "\udcff")),
    "object": (("{}", '{"a": [1]}'), ("", "x", "[]", "3", "{", "{'a': 1}")),
    "pattern": (("unstructured", "block:4x8", "2:4", "2:4:transposable", "channel"), ("", "x", "4:2", "block:0", "2:")),
    "shape": (("48x32",), ("", "48", "48x", "0x4", "4x4x4", "-1x4", "axb")),
    "device": (("cpu",), ("", "gpu", "cuda:99", "meta", "cpu:-1")),
    "method": (("gmp", "dense"), ("", "GMP", "magic")),
    "convention": (("autosparse", "swat"), ("", "macs")),
    "backend": (("auto", "torch", "block"), ("", "cuda")),
    "precision": (("no", "bf16", "fp16"), ("", "fp8", "float16")),
    "schedule": (SCHEDULES, ("", "steep", "greedy", "reduce_lr_on_plateau", "cosine_with_min_lr", "multistep")),
    "image schedule": ((*SCHEDULES, "multistep"), ("", "steep", "warmup_stable_decay")),
    "optimizer": (("adamw", "lamb"), ("", "sgd")),
    "image optimizer": (("adamw", "sgd"), ("", "lamb")),
    "augmentation": (("none", "crop"), ("", "mixup")),
    "preset": (("transformer-tiny",), ("", "huge")),
    "language preset": (("gpt2-tiny", "transfoxl-base"), ("", "transfoxl-huge")),
    "image preset": (("resnet20",), ("", "resnet9")),
    "initialisation": (("fan_in", "fan_out"), ("", "fan_avg")),
    "matching": (("name", "position"), ("", "index")),
    "split": (("train", "test"), ("", "all")),
    "dtype": (("float32", "bfloat16"), ("", "int8")),
}  # fmt: skip
COMMON = {
    "text": "recipe output_dir include exclude record_reference_losses auto_tune resume_from_checkpoint report_to "
            "model_name_or_path dataset_name dataset_config_name",
    "seed": "seed", "method": "method", "below one": "sparsity adam_beta1 adam_beta2", "pattern": "pattern",
    "backend": "backend", "convention": "flops_convention", "object": "method_args", "precision": "mixed_precision",
    "not negative": "learning_rate weight_decay max_grad_norm", "positive": "adam_epsilon",
    "natural": "num_warmup_steps average_checkpoints", "steps or epoch": "checkpointing_steps",
    "count": "num_train_epochs max_train_steps gradient_accumulation_steps checkpoints_total_limit logging_steps",
}  # fmt: skip
IMAGES = {
    "text": "data_dir", "below one": "label_smoothing momentum", "image optimizer": "optimizer",
    "not negative": "warmup_epochs", "positive": "lr_milestones", "inside one": "lr_gamma", "workers": "workers",
    "natural": "bn_reestimation_batches", "pixels": "image_size eval_resize", "augmentation": "augmentation",
    "count": "batch_size eval_batch_size max_train_samples max_eval_samples max_test_samples",
    "image preset": "preset", "initialisation": "initialisation", "matching": "match_classes",
    "image schedule": "lr_scheduler_type",
}  # fmt: skip
Given = tuple[Callable[[], Parser], tuple[str, ...], tuple[dict[str, str], ...]]
# program -> (its parser, what it must be given, its options by kind)
PROGRAMS: dict[str, Given] = {
    "translation": (translation_arguments.parser, ("--output_dir=o", "--max_train_steps=5"), (COMMON, {
        "text": "train_file validation_file test_file source_lang target_lang bleu_tokenize",
        "below one": "dropout label_smoothing",
        "count": "max_source_length max_target_length max_train_samples max_eval_samples max_test_samples "
                 "max_tokens_per_batch",
        "vocabulary": "vocab_size", "beams": "num_beams eval_num_beams", "power": "length_penalty", "preset": "preset",
        "schedule": "lr_scheduler_type"})),
    "language_modeling": (language_arguments.parser, ("--output_dir=o", "--max_train_steps=5"), (COMMON, {
        "text": "train_file validation_file test_file cache_dir", "below one": "dropout dropatt embedding_sparsity",
        "count": "min_count steps_per_epoch batch_size tgt_len block_size eval_batch_size eval_tgt_len "
                 "eval_stride test_tgt_len test_batch_size",
        "natural": "mem_len eval_mem_len test_mem_len test_clamp_len",
        "two": "max_train_tokens max_eval_tokens max_test_tokens", "optimizer": "optim", "vocabulary": "vocab_size",
        "not negative": "min_learning_rate", "language preset": "preset", "schedule": "lr_scheduler_type"})),
    "image_classification": (lambda: image_arguments.parser("image_classification", None),
                             ("--output_dir=o", "--max_train_steps=5"), (COMMON, IMAGES)),
    "memorization": (memorization.parser, ("--output_dir=o", "--max_train_steps=5"), (COMMON, IMAGES, {
        "count": "corrupted_samples", "seed": "corruption_seed", "below one": "sparsities"})),
    "accuracy": (accuracy.parser, ("--model=m",), ({
        "text": "model twin dataset_name dataset_config_name data_dir", "split": "split", "device": "device",
        "matching": "match_classes", "count": "batch_size max_samples"},)),
    "agreement": (agreement.parser, ("--first=a", "--second=b", "--text_file=t"), ({
        "text": "first second text_file source_file reference_file", "count": "tgt_len window batch_size",
        "device": "device"},)),
    "bleu": (bleu.parser, ("--model=m", "--source_file=s", "--reference_file=r"), ({
        "text": "model source_file reference_file tokenize target_lang compound_split output_file",
        "beams": "num_beams",
        "power": "length_penalty", "count": "extra_tokens max_tokens_per_batch", "device": "device"},)),
    "perplexity": (perplexity.parser, ("--model=m", "--text_file=t"), ({
        "text": "model text_file", "count": "tgt_len window stride batch_size", "natural": "mem_len clamp_len",
        "device": "device"},)),
    "speed": (speed.parser, ("--model=m",), ({
        "text": "model dense output", "inside one": "prune", "count": "batch_sizes length runs", "device": "device",
        "dtype": "dtype", "threads": "threads"},)),
    "onnx_export": (onnx_export.parser, ("--model=m", "--output=o"), ({"text": "model output", "count": "length"},)),
    "plots": (plots.parser, ("run", "--output=o"), ({"text": "output"},)),
    "doctor": (cli.doctor_parser, (), ({
        "text": "model_name_or_path device_name", "pattern": "pattern", "density": "density", "count": "tokens"},)),
    "layer_bench": (layer_bench.parser, (), ({"shape": "shape", "count": "tokens runs", "dtype": "dtype"},)),
}  # fmt: skip
MAINS: dict[str, Callable[..., int]] = {
    "translation": translation.main, "language_modeling": language_modeling.main, "plots": plots.main,
    "image_classification": image_classification.main, "memorization": memorization.main, "accuracy": accuracy.main,
    "agreement": agreement.main, "bleu": bleu.main, "perplexity": perplexity.main, "speed": speed.main,
    "onnx_export": onnx_export.main, "doctor": lambda words: cli.main(["doctor", *words]),
    "layer_bench": lambda words: cli.main(["bench", *words]),
}  # fmt: skip
# Who refuses: expected what, got what; what to do.
FORM = re.compile(r"error: [\w .]+: expected .+, got .+; .+\n", re.DOTALL)


def kinds_of(program: str) -> dict[str, str]:
    """Option -> kind."""
    groups = PROGRAMS[program][2]
    return {option: kind for group in groups for kind, options in group.items() for option in options.split()}


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_option_says_what_it_takes(program: str) -> None:
    parser, _, _ = PROGRAMS[program]
    flags = (argparse.BooleanOptionalAction, argparse._HelpAction, argparse._StoreTrueAction)
    options = {action.dest for action in parser()._actions if not isinstance(action, flags) and action.option_strings}
    assert options == kinds_of(program).keys()


@pytest.mark.parametrize("program", PROGRAMS)
def test_words_in_range_are_taken_and_others_are_one_sentence(program: str, capsys: Any, tmp_path: Path) -> None:
    make, needed, _ = PROGRAMS[program]
    for option, kind in kinds_of(program).items():
        good, bad = KINDS[kind]
        # That the two fit each other is another matter: rules are left out, and what the option replaces.
        for word in good if option != "recipe" else ():
            parser = make()
            parser.rules.clear()
            value = vars(parser.parse_args([*needed, f"--{option}={word}"]))[option]
            assert value is not None
        for word in bad:
            with pytest.raises(ValueError, match=f"expected --{option} as .*, got .*; "):
                parse(make(), [*needed, f"--{option}={word}"])
        # Through the program, and as two words.
        assert MAINS[program]([*needed, f"--{option}", bad[-1]]) == 2
        printed = capsys.readouterr()
        assert FORM.fullmatch(printed.err) and option in printed.err and not printed.out, printed.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("program", PROGRAMS)
def test_options_that_are_none_or_lack_a_value_are_one_sentence(program: str, capsys: Any) -> None:
    _, needed, _ = PROGRAMS[program]
    option = next(iter(kinds_of(program)))
    for words in ([*needed, "--sparse"], [*needed, f"--{option}"], [*needed, f"--{option[:3]}=1"], needed[:-1]):
        if words or needed:
            assert MAINS[program]([*words]) == 2
            printed = capsys.readouterr()
            assert FORM.fullmatch(printed.err) and not printed.out, (words, printed)
    with pytest.raises(SystemExit) as ended:
        MAINS[program](["--help"])
    assert ended.value.code == 0 and "usage: " in capsys.readouterr().out


def test_a_recipe_s_values_go_through_the_same_check(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    for line, words in (
        ("num_beams = 0", "num_beams as a whole number from 1 to 1024, got 0"),
        ("learning_rate = -1", "learning_rate as a number of at least 0 that float32 holds, got -1"),
        ("max_grad_norm = nan", "max_grad_norm as a number of at least 0 that float32 holds, got nan"),
        ("label_smoothing = 1.0", "label_smoothing as a number in [0, 1), got 1.0"),
        ("seed = true", "seed as a whole number from 0 to 4294967295, got True"),
        ("vocab_size = 12.5", "vocab_size as a whole number from 1 to 1048576, got 12.5"),
        ('learning_rate = "fast"', "learning_rate as a number of at least 0 that float32 holds, got 'fast'"),
        ("with_tracking = 1", "with_tracking as true or false, got 1"),
        ('include = "fc1"', "include as a list, each text that is not empty, in UTF-8, got 'fc1'"),
        ("include = []", "include as a list, each text"),
        ('include = ["*.fc1", ""]', "include as a list, each text"),
        ("method_args = 3", "method_args as a JSON object, got 3"),
        ('method = "magic"', "method as one of acdc, "),
        ('pattern = "4:2"', "pattern as a pattern, got '4:2'"),
        ('checkpointing_steps = "often"', "checkpointing_steps as a whole number of steps of at least 1, or 'epoch'"),
        ("checkpointing_steps = 0", "checkpointing_steps as a whole number of steps of at least 1, or 'epoch'"),
    ):
        file.write_text(line, encoding="utf-8")
        with pytest.raises(ValueError, match=re.escape(f"recipe: expected {words}")) as refused:
            parse(translation_arguments.parser(), [*PROGRAMS["translation"][1], f"--recipe={file}"])
        assert str(file) in str(refused.value)
    file.write_bytes("seed = 1 # ü".encode("latin-1"))
    with pytest.raises(ValueError, match=r"recipe: expected TOML, got .*; correct the file"):
        parse(translation_arguments.parser(), [*PROGRAMS["translation"][1], f"--recipe={file}"])
