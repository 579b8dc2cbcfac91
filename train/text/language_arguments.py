"""The command line of the language-modelling program."""

from __future__ import annotations

import argparse

from tritonsparse.eval.command_line import BELOW_ONE, COUNT, NATURAL, NON_NEGATIVE, TEXT, Parser, one_of, whole

from ..run import arguments
from .language_presets import PRESETS
from .subwords import VOCABULARY_SIZE

__all__ = ["FREE", "parser"]

PRESET = "transfoxl-tiny"
OPTIMIZERS = ("adamw", "lamb")

# Arguments that may differ between a run and its resumption, beside those of every program.
FREE = (
    "embedding_sparsity",  # the state says whether it fits; a dense twin leaves it behind
    "cache_dir", "max_eval_tokens", "max_test_tokens", "eval_tgt_len", "eval_mem_len", "eval_stride", "test_file",
    "eval_batch_size", "test_tgt_len", "test_mem_len", "test_clamp_len", "test_same_length", "test_batch_size",
)  # fmt: skip


def parser(description: str | None = None) -> Parser:
    """The options; frozen by a test."""
    result = Parser("train.language_modeling", description)
    add = arguments.add_model(result, "a causal checkpoint", PRESETS, PRESET)
    add("--dropout", type=BELOW_ONE, default=None, help="from scratch; the preset's by default")
    add(
        "--dropatt", type=BELOW_ONE, default=None, help="Transformer-XL's dropout of attention; the preset's by default"
    )
    add("--vocab_size", type=VOCABULARY_SIZE, default=None, help="subwords of a tokenizer trained on the text (4096)")
    add("--min_count", type=COUNT, default=None, help="words that occur less often become <unk> (1: none)")
    add(
        "--embedding_sparsity",
        type=BELOW_ONE,
        default=None,
        help="of the embedding tables, in sparse phases (none: dense)",
    )
    add = result.add_argument_group("data").add_argument
    add("--dataset_name", type=TEXT, default=None, help="'embedded' (default), or a hub id with a column 'text'")
    add("--dataset_config_name", type=TEXT, default=None)
    add("--train_file", type=TEXT, default=None)
    add("--validation_file", type=TEXT, default=None)
    add("--test_file", type=TEXT, default=None)
    add("--cache_dir", type=TEXT, default=None, help="where token streams lie (OUTPUT_DIR/tokens)")
    add("--max_train_tokens", type=whole(2), default=None)
    add("--max_eval_tokens", type=whole(2), default=None, help="tokens of validation scored after each epoch")
    add("--max_test_tokens", type=whole(2), default=None)
    add("--steps_per_epoch", type=COUNT, default=None, help="steps called an epoch: evaluation, phases (a pass)")
    add("--batch_size", type=COUNT, default=32, help="sequences of an optimizer step, over all processes")
    add("--tgt_len", type=COUNT, default=None, help="Transformer-XL: tokens of a segment; the preset's by default")
    add("--mem_len", type=NATURAL, default=None, help="Transformer-XL: tokens of memory (as many)")
    add("--roll", action=argparse.BooleanOptionalAction, default=None, help="Transformer-XL: rotate columns each epoch")
    add(
        "--block_size", type=COUNT, default=None, help="other models: tokens of a block (their positions, at most 1024)"
    )
    add = result.add_argument_group("evaluation").add_argument
    add("--eval_batch_size", type=COUNT, default=8, help="columns, or windows, at a time after each epoch")
    add("--eval_tgt_len", type=COUNT, default=None, help="Transformer-XL, after each epoch (tgt_len)")
    add("--eval_mem_len", type=NATURAL, default=None, help="Transformer-XL, after each epoch (mem_len)")
    add("--eval_stride", type=COUNT, default=None, help="other models, at the end: stride of the window (its length)")
    add("--test_tgt_len", type=COUNT, default=None, help="Transformer-XL, at the end (eval_tgt_len)")
    add("--test_mem_len", type=NATURAL, default=None, help="Transformer-XL, at the end (eval_mem_len)")
    add("--test_clamp_len", type=NATURAL, default=None, help="Transformer-XL, at the end (none)")
    add("--test_same_length", action=argparse.BooleanOptionalAction, default=None, help="Transformer-XL, at the end")
    add("--test_batch_size", type=COUNT, default=1, help="Transformer-XL, at the end: columns")
    arguments.add_common(result)
    add = result.add_argument_group("language modelling").add_argument
    add("--optim", type=one_of(OPTIMIZERS), default="adamw", help=f"one of: {', '.join(OPTIMIZERS)}")
    add("--min_learning_rate", type=NON_NEGATIVE, default=None, help="where the cosine ends (0)")
    # Dai et al. (2019): Adam, 2.5e-4, cosine, clipped at 0.25.
    result.set_defaults(
        learning_rate=2.5e-4, lr_scheduler_type="cosine", num_warmup_steps=0, adam_beta2=0.999, adam_epsilon=1e-8,
        max_grad_norm=0.25,
    )  # fmt: skip
    result.rules.append(_refuse_unfit)
    return result


def _refuse_unfit(args: argparse.Namespace) -> None:
    """Between options; names the default preset where there is no saved model."""
    names = ("preset", "vocab_size", "min_count", "dropout", "dropatt")
    arguments.refuse_beside_a_saved_model("language_modeling", args, names)
    if args.model_name_or_path is None:
        args.preset = args.preset or PRESET
    rate = args.min_learning_rate
    if rate is not None and not (rate <= args.learning_rate > 0 and args.lr_scheduler_type == "cosine"):
        raise ValueError(
            f"language_modeling: expected --min_learning_rate of at most --learning_rate, above 0, with "
            f"--lr_scheduler_type cosine, got {rate}, {args.learning_rate} and {args.lr_scheduler_type}; correct them"
        )
