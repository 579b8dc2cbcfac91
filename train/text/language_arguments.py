"""The command line of the language-modelling program."""

from __future__ import annotations

import argparse

from ..run import arguments
from .language_presets import PRESETS

__all__ = ["FREE", "parser", "refuse_unfit"]

PRESET = "transfoxl-tiny"
OPTIMIZERS = ("adamw", "lamb")

# Arguments that may differ between a run and its resumption, beside those of every program.
FREE = (
    "embedding_sparsity",  # the state says whether it fits; a dense twin leaves it behind
    "cache_dir", "max_eval_tokens", "max_test_tokens", "eval_tgt_len", "eval_mem_len", "eval_stride", "test_file",
    "eval_batch_size", "test_tgt_len", "test_mem_len", "test_clamp_len", "test_same_length", "test_batch_size",
)  # fmt: skip


def parser(description: str | None = None) -> argparse.ArgumentParser:
    """The options; frozen by a test."""
    result = argparse.ArgumentParser(
        "tritonsparse.train.language_modeling",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = result.add_argument_group("model").add_argument
    add("--model_name_or_path", default=None, help="a causal checkpoint to go on from")
    add("--preset", default=None, help=f"from scratch: {', '.join(PRESETS)} ({PRESET} by default)")
    add("--dropout", type=float, default=None, help="from scratch; the preset's by default")
    add("--dropatt", type=float, default=None, help="Transformer-XL's dropout of attention; the preset's by default")
    add("--vocab_size", type=int, default=None, help="subwords of a tokenizer trained on the text (4096)")
    add("--min_count", type=int, default=None, help="words that occur less often become <unk> (1: none)")
    add(
        "--embedding_sparsity", type=float, default=None, help="of the embedding tables, in sparse phases (none: dense)"
    )
    add = result.add_argument_group("data").add_argument
    add("--dataset_name", default=None, help="'embedded' (default), or a hub id with a column 'text'")
    add("--dataset_config_name", default=None)
    add("--train_file", default=None)
    add("--validation_file", default=None)
    add("--test_file", default=None)
    add("--cache_dir", default=None, help="where token streams lie (OUTPUT_DIR/tokens)")
    add("--max_train_tokens", type=int, default=None)
    add("--max_eval_tokens", type=int, default=None, help="tokens of validation scored after each epoch")
    add("--max_test_tokens", type=int, default=None)
    add("--steps_per_epoch", type=int, default=None, help="steps called an epoch: evaluation, phases (a pass)")
    add("--batch_size", type=int, default=32, help="sequences of an optimizer step, over all processes")
    add("--tgt_len", type=int, default=None, help="Transformer-XL: tokens of a segment; the preset's by default")
    add("--mem_len", type=int, default=None, help="Transformer-XL: tokens of memory (as many)")
    add("--roll", action=argparse.BooleanOptionalAction, default=None, help="Transformer-XL: rotate columns each epoch")
    add("--block_size", type=int, default=None, help="other models: tokens of a block (their positions, at most 1024)")
    add = result.add_argument_group("evaluation").add_argument
    add("--eval_batch_size", type=int, default=8, help="columns, or windows, at a time after each epoch")
    add("--eval_tgt_len", type=int, default=None, help="Transformer-XL, after each epoch (tgt_len)")
    add("--eval_mem_len", type=int, default=None, help="Transformer-XL, after each epoch (mem_len)")
    add("--eval_stride", type=int, default=None, help="other models, at the end: stride of the window (its length)")
    add("--test_tgt_len", type=int, default=None, help="Transformer-XL, at the end (eval_tgt_len)")
    add("--test_mem_len", type=int, default=None, help="Transformer-XL, at the end (eval_mem_len)")
    add("--test_clamp_len", type=int, default=None, help="Transformer-XL, at the end (none)")
    add("--test_same_length", action=argparse.BooleanOptionalAction, default=None, help="Transformer-XL, at the end")
    add("--test_batch_size", type=int, default=1, help="Transformer-XL, at the end: columns")
    arguments.add_common(result)
    add = result.add_argument_group("language modelling").add_argument
    add("--optim", default="adamw", help=f"one of: {', '.join(OPTIMIZERS)}")
    add("--min_learning_rate", type=float, default=None, help="where the cosine ends (0)")
    # Dai et al. (2019): Adam, 2.5e-4, cosine, clipped at 0.25.
    result.set_defaults(
        learning_rate=2.5e-4, lr_scheduler_type="cosine", num_warmup_steps=0, adam_beta2=0.999, adam_epsilon=1e-8,
        max_grad_norm=0.25,
    )  # fmt: skip
    return result


def refuse_unfit(args: argparse.Namespace) -> None:
    """Refuse values that no kind of model takes; name the default preset where there is no saved model.

    Raises:
        ValueError: one of them, named.
    """
    if args.model_name_or_path is None:
        args.preset = args.preset or PRESET
        if args.preset not in PRESETS:
            raise ValueError(
                f"language_modeling: expected --preset among {', '.join(PRESETS)}, got {args.preset!r}; choose one"
            )
    if args.optim not in OPTIMIZERS:
        raise ValueError(
            f"language_modeling: expected --optim among {', '.join(OPTIMIZERS)}, got {args.optim!r}; choose one"
        )
    least = {"eval_batch_size": 1, "test_batch_size": 1, "batch_size": 1, "max_train_tokens": 2, "max_eval_tokens": 2}
    least |= dict.fromkeys(("max_test_tokens", "tgt_len", "eval_tgt_len", "test_tgt_len", "block_size"), 1)
    least |= {"steps_per_epoch": 1, "mem_len": 0, "eval_mem_len": 0, "test_mem_len": 0}
    for name, smallest in least.items():
        value = getattr(args, name)
        if value is not None and value < smallest:
            raise ValueError(f"language_modeling: expected --{name} of at least {smallest}, got {value}; correct it")
    rate = args.min_learning_rate
    if rate is not None and (not 0 <= rate <= args.learning_rate or args.lr_scheduler_type != "cosine"):
        raise ValueError(
            f"language_modeling: expected --min_learning_rate from 0 to --learning_rate {args.learning_rate} with "
            f"--lr_scheduler_type cosine, got {rate} with {args.lr_scheduler_type}; correct them"
        )
