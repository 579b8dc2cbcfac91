"""The command line of the translation program."""

from __future__ import annotations

import argparse

from ..run import arguments
from .translation_presets import PRESETS

__all__ = ["FREE", "PRESET", "VOCABULARY", "parser"]

PRESET, VOCABULARY = "transformer-base", 32768

# Arguments that may differ between a run and its resumption, beside those of every program.
FREE = (
    "num_beams", "length_penalty", "eval_num_beams", "max_eval_samples", "test_file", "max_test_samples",
    "bleu_tokenize",
)  # fmt: skip


def parser(description: str | None = None) -> argparse.ArgumentParser:
    """The options; frozen by a test."""
    result = argparse.ArgumentParser(
        "tritonsparse.train.translation",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        # A typo must not pass as a short form of another option.
        allow_abbrev=False,
    )
    model = result.add_argument_group("model")
    model.add_argument("--model_name_or_path", default=None, help="a seq2seq checkpoint to go on from")
    model.add_argument("--preset", default=None, help=f"from scratch: {', '.join(PRESETS)} ({PRESET} by default)")
    model.add_argument("--vocab_size", type=int, default=None, help=f"from scratch; {VOCABULARY} by default")
    model.add_argument("--dropout", type=float, default=None, help="from scratch; the preset's by default")
    data = result.add_argument_group("data")
    data.add_argument(
        "--dataset_name", default=None, help="'embedded' (default), or a hub id with a translation feature"
    )
    data.add_argument("--dataset_config_name", default=None)
    data.add_argument("--train_file", default=None)
    data.add_argument("--validation_file", default=None)
    data.add_argument("--test_file", default=None)
    data.add_argument("--source_lang", default="en")
    data.add_argument("--target_lang", default="de")
    data.add_argument("--max_source_length", type=int, default=256, help="longer training sentences are dropped")
    data.add_argument("--max_target_length", type=int, default=256)
    data.add_argument("--max_train_samples", type=int, default=None)
    data.add_argument("--max_eval_samples", type=int, default=None, help="sentences translated after each epoch")
    data.add_argument("--max_test_samples", type=int, default=None)
    data.add_argument("--max_tokens_per_batch", type=int, default=4096)
    goal = result.add_argument_group("loss and decoding")
    goal.add_argument("--label_smoothing", "--label_smoothing_factor", type=float, default=0.1)
    goal.add_argument("--num_beams", type=int, default=4, help="for the final translation of the test set")
    goal.add_argument("--eval_num_beams", type=int, default=1, help="for the validation set after each epoch")
    goal.add_argument("--length_penalty", type=float, default=1.0, help="p in sum log-prob / length^p")
    goal.add_argument(
        "--bleu_tokenize", default=None, help="sacreBLEU's tokenizer; by default its choice for --target_lang, or 13a"
    )
    arguments.add_common(result)
    return result
