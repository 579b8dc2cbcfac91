"""The command line of the translation program."""

from __future__ import annotations

import argparse

from tritonsparse.eval.command_line import BELOW_ONE, COUNT, TEXT, Parser
from tritonsparse.eval.translate import BEAMS, LENGTH_PENALTY

from ..run import arguments
from .subwords import VOCABULARY_SIZE
from .translation_presets import PRESETS

__all__ = ["FREE", "PRESET", "VOCABULARY", "parser"]

PRESET, VOCABULARY = "transformer-base", 32768

# Arguments that may differ between a run and its resumption, beside those of every program.
FREE = (
    "num_beams", "length_penalty", "eval_num_beams", "max_eval_samples", "test_file", "max_test_samples",
    "bleu_tokenize",
)  # fmt: skip


def parser(description: str | None = None) -> Parser:
    """The options; frozen by a test."""
    result = Parser("train.translation", description)
    add = arguments.add_model(result, "a seq2seq checkpoint", PRESETS, PRESET)
    add("--vocab_size", type=VOCABULARY_SIZE, default=None, help=f"from scratch; {VOCABULARY} by default")
    add("--dropout", type=BELOW_ONE, default=None, help="from scratch; the preset's by default")
    add = result.add_argument_group("data").add_argument
    add("--dataset_name", type=TEXT, default=None, help="'embedded' (default), or a hub id with a translation feature")
    add("--dataset_config_name", type=TEXT, default=None)
    add("--train_file", type=TEXT, default=None)
    add("--validation_file", type=TEXT, default=None)
    add("--test_file", type=TEXT, default=None)
    add("--source_lang", type=TEXT, default="en")
    add("--target_lang", type=TEXT, default="de")
    add("--max_source_length", type=COUNT, default=256, help="longer training sentences are dropped")
    add("--max_target_length", type=COUNT, default=256)
    add("--max_train_samples", type=COUNT, default=None)
    add("--max_eval_samples", type=COUNT, default=None, help="sentences translated after each epoch")
    add("--max_test_samples", type=COUNT, default=None)
    add("--max_tokens_per_batch", type=COUNT, default=4096)
    add = result.add_argument_group("loss and decoding").add_argument
    add("--label_smoothing", "--label_smoothing_factor", type=BELOW_ONE, default=0.1)
    add("--num_beams", type=BEAMS, default=4, help="for the final translation of the test set")
    add("--eval_num_beams", type=BEAMS, default=1, help="for the validation set after each epoch")
    add("--length_penalty", type=LENGTH_PENALTY, default=1.0, help="p in sum log-prob / length^p")
    add(
        "--bleu_tokenize", type=TEXT, default=None,
        help="sacreBLEU's tokenizer; by default its choice for --target_lang, or 13a",
    )  # fmt: skip
    arguments.add_common(result)
    result.rules.append(_refuse_unfit)
    return result


def _refuse_unfit(args: argparse.Namespace) -> None:
    arguments.refuse_beside_a_saved_model("translation", args, ("preset", "vocab_size", "dropout"))
    if args.source_lang == args.target_lang:
        raise ValueError(
            f"translation: expected two languages, got --source_lang and --target_lang {args.source_lang!r}; name the "
            f"one that the other is translated to"
        )
