"""Train a language model, sparse or dense, and measure it by perplexity.

    accelerate launch -m tritonsparse.train.language_modeling --recipe lm-demo --output_dir runs/lm-demo

A Transformer-XL or a tiny GPT-2 from scratch (`--preset`), or any causal checkpoint (`--model_name_or_path`). A
Transformer-XL reads words in segments and carries its memory from step to step; other models read blocks of subwords.
`--output_dir` receives the finalized checkpoint (stock classes, exact zeros) with its vocabulary or tokenizer, the
sidecar to go on from, `all_results.json` and the plots.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import logging
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import get_scheduler

import tritonsparse as ts
from tritonsparse.eval.command_line import naming
from tritonsparse.eval.output_files import refuse_unwritable
from tritonsparse.eval.perplexity import Perplexity
from tritonsparse.eval.twin_plot import plot_twins
from tritonsparse.flops import LayerCost, TrainingMeter, layer_costs
from tritonsparse.report import Report

from .run import results
from .run.checkpoints import writing
from .run.frame import run_program, saved
from .run.loop import Loop
from .run.program import average, begin, settings, start
from .run.twins import PRETRAINED, Twins, kept
from .text.lamb import Lamb
from .text.language_arguments import FREE, parser
from .text.language_families import Family, make_family
from .text.language_presets import load_model
from .text.lines import Text, load_text
from .text.segments import PartEpochs
from .text.source import TextSource
from .text.token_streams import Ids, removed_on_error, token_stream, word_counts

__all__ = ["main"]

logger = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status. What the user can mend is one sentence on stderr, status 2."""
    return run_program(parser(__doc__), prepare, finish, argv)


@dataclass
class Run:
    """Everything `finish` needs."""

    args: argparse.Namespace
    loop: Loop
    family: Family
    stock_model: nn.Module
    texts: dict[str, Text]
    streams: dict[str, Ids]
    costs: dict[str, LayerCost]


def prepare(args: argparse.Namespace) -> Run:
    """Check everything and build everything; writes the token streams and the output folder.

    A run that is refused leaves no streams in its output folder; those in --cache_dir stay for the next.
    """
    accelerator, method = begin("language_modeling", args)
    if args.cache_dir is not None:
        refuse_unwritable("language_modeling", "--cache_dir", args.cache_dir, folder=True)
    folder = Path(args.cache_dir or Path(args.output_dir) / "tokens")
    with removed_on_error(folder) if args.cache_dir is None else contextlib.nullcontext():
        return _prepare(args, accelerator, method, folder)


def _prepare(args: argparse.Namespace, accelerator: Accelerator, method: ts.methods.Method, folder: Path) -> Run:
    saved = None
    if args.model_name_or_path is not None:
        saved = load_model(args.model_name_or_path)
    source = TextSource.of(args)
    with naming("language_modeling", "text that can be loaded", str(source), "pass other files, or --dataset_name"):
        texts = load_text(source)
    set_seed(args.seed)
    family = make_family(args, texts["train"], saved)
    streams = _streams(args, accelerator, family, texts, folder)
    batches = family.batches(
        streams["train"], args.gradient_accumulation_steps, accelerator.process_index, accelerator.num_processes
    )
    if args.steps_per_epoch is not None:
        batches = PartEpochs(batches, args.steps_per_epoch)
    total_steps = args.max_train_steps or args.num_train_epochs * batches.steps_per_epoch
    model = family.model
    # Evaluation runs on stock classes loaded with the finalized weights, which is what users will load.
    stock_model = copy.deepcopy(model)
    sparsifier = ts.sparsify(
        model, method, pattern=args.pattern, include=args.include, exclude=args.exclude, backend=args.backend,
        total_steps=total_steps, steps_per_epoch=batches.steps_per_epoch, seed=args.seed,
        # A dense twin goes on without the masks of its run.
        embedding_sparsity=None if args.method == "dense" else args.embedding_sparsity,
    )  # fmt: skip
    optimizer = _optimizer(args, sparsifier)
    scheduler = _scheduler(args, optimizer, total_steps)
    costs = layer_costs(stock_model.eval(), **family.example())
    prepared_model, prepared_optimizer = accelerator.prepare(model, optimizer)
    sparsifier.attach(prepared_optimizer)
    sparsifier.register(accelerator)
    family.register(accelerator)
    stock_model.to(accelerator.device)
    loop = Loop(
        accelerator=accelerator, model=prepared_model, optimizer=prepared_optimizer, scheduler=scheduler,
        sparsifier=sparsifier, meter=TrainingMeter(sparsifier, costs, convention=args.flops_convention),
        loss=family.loss, evaluate=lambda: _evaluate(run), batches=batches,
        settings=settings(args, method, accelerator.num_processes, total_steps, FREE),
        twins=_twins(stock_model, family) if args.save_twins else None,
    )  # fmt: skip
    run = Run(args, loop, family, stock_model, texts, streams, costs)
    # Before hours of training, not after them.
    for split in ("validation", "test"):
        if split in streams:
            family.refuse_short(split, streams[split])
    start(args, loop)
    logger.info(
        "***** training *****\n  tokens: %s\n  epochs: %.2f of %d steps\n  steps: %d\n  sequences a step: %d, "
        "%d process(es) x %d accumulation\n  device: %s, %s\n  %s",
        {split: len(stream) for split, stream in streams.items()}, total_steps / batches.steps_per_epoch,
        batches.steps_per_epoch, total_steps, args.batch_size, accelerator.num_processes,
        args.gradient_accumulation_steps, accelerator.device, accelerator.mixed_precision, sparsifier.summary(),
    )  # fmt: skip
    return run


def _streams(
    args: argparse.Namespace, accelerator: Accelerator, family: Family, texts: Mapping[str, Text], folder: Path
) -> dict[str, Ids]:
    limits = {"train": args.max_train_tokens, "validation": args.max_eval_tokens, "test": args.max_test_tokens}
    encode, encoder = family.encoding()
    # One process writes, the others find what it wrote.
    with accelerator.main_process_first():
        return {
            split: token_stream(text, encode, encoder, folder, split)[: limits[split]] for split, text in texts.items()
        }


def _optimizer(args: argparse.Namespace, sparsifier: ts.Sparsifier) -> torch.optim.Optimizer:
    groups = sparsifier.param_groups(lr=args.learning_rate, weight_decay=args.weight_decay)
    options: dict[str, Any] = {"betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
    return Lamb(groups, **options) if args.optim == "lamb" else torch.optim.AdamW(groups, **options)


def _scheduler(args: argparse.Namespace, optimizer: torch.optim.Optimizer, total_steps: int) -> Any:
    if args.min_learning_rate is None:
        return get_scheduler(args.lr_scheduler_type, optimizer, args.num_warmup_steps, total_steps)
    # As a rate, so that thresholds with a learning rate of their own end at as small a part of it.
    rate = args.min_learning_rate / args.learning_rate
    return get_scheduler("cosine_with_min_lr", optimizer, args.num_warmup_steps, total_steps, {"min_lr_rate": rate})


def _twins(stock_model: Any, family: Family) -> Twins:
    def pretrained(folder: Path) -> None:
        stock_model.save_pretrained(folder)
        family.save_encoder(folder)

    return Twins(lambda numbers: -float(numbers["nll"]), pretrained)


def _measure(run: Run, split: str, weights: Mapping[str, Tensor], *, final: bool) -> Perplexity:
    """Perplexity of `weights` in the stock model; every process computes all of it."""
    run.stock_model.load_state_dict(weights, strict=False)
    stream, limit = run.streams[split], run.args.max_test_tokens if split == "test" else run.args.max_eval_tokens
    # Of a text that is cut short the words are not known.
    words = sum(word_counts(run.texts[split])) if limit is None else None
    return run.family.perplexity(run.stock_model, stream, words, final=final)


def _evaluate(run: Run) -> dict[str, Any]:
    sparsifier = run.loop.sparsifier
    weights = sparsifier.trained_state_dict()
    result = _measure(run, "validation", weights, final=False)
    sparsity = results.sparsity(weights, sparsifier.layers)
    logger.info("step %d: %s; sparsity %.2f%%", run.loop.step, result, 100 * sparsity)
    numbers = {"perplexity": result.perplexity, "nll": result.nll / result.tokens, "sparsity": sparsity}
    return numbers if result.word_perplexity is None else {**numbers, "word_perplexity": result.word_perplexity}


def finish(run: Run) -> None:
    """Average if asked, save the finalized model, score the test set, save results and plots."""
    args, loop, family = run.args, run.loop, run.family
    sparsifier, accelerator, output_dir = loop.sparsifier, loop.accelerator, loop.settings.output_dir
    averaged = average(args, loop)
    weights = sparsifier.finalized_state_dict()
    if accelerator.is_main_process:
        with writing(output_dir, output_dir):
            sparsifier.save_pretrained(output_dir)
            family.save_encoder(output_dir)
    split = "test" if "test" in run.streams else "validation"
    with saved(output_dir):
        result = _measure(run, split, weights, final=True)
        twins = {}
        if loop.twins is not None:
            for phase, numbers in kept(output_dir).items():
                weights = load_file(output_dir / f"best_{phase}" / PRETRAINED / "model.safetensors")
                twins[phase] = {**numbers, split: _measure(run, split, weights, final=True).as_dict()}
        report = sparsifier.report(run.costs, convention=args.flops_convention)
        if accelerator.is_main_process:
            measured = {
                "perplexity": result.perplexity,
                "word_perplexity": result.word_perplexity,
                "nll": result.nll / result.tokens,
                "tokens_scored": result.tokens,
                "perplexity_line": str(result),
                "perplexity_settings": result.settings,
                "split": split,
                "twins": twins,
            }
            document = results.record(args, loop, report, run.costs, measured, averaged)
            results.save(document, output_dir, args.record_reference_losses)
            if any(math.isfinite(each["perplexity"]) for each in loop.evaluations):
                plot_twins(
                    loop.evaluations, output_dir / "perplexity.png", key="perplexity", label="validation perplexity"
                )
            _show(document, report, result, output_dir)
        accelerator.end_training()


def _show(document: Mapping[str, Any], report: Report, result: Perplexity, output_dir: Path) -> None:
    print(f"\n{report}\n\n{document['split']}: {result}")
    for phase, numbers in document["twins"].items():
        perplexity = numbers[document["split"]]["perplexity"]
        print(f"  best {phase} model, after epoch {numbers['epoch']}: perplexity {perplexity:.2f}")
    results.show_costs(document, report, output_dir)


if __name__ == "__main__":
    sys.exit(main())
