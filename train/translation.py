"""Train a translation model, sparse or dense, and measure it by BLEU.

    accelerate launch -m tritonsparse.train.translation --recipe demo --output_dir runs/demo

A Marian-class Transformer from scratch (`--preset`) or any seq2seq checkpoint (`--model_name_or_path`);
joint BPE; batches by tokens; label smoothing; beam search; checkpoints that resume bit for bit on a CPU.
`--output_dir` receives the finalized checkpoint (stock classes, exact zeros), the sidecar to go on from,
`all_results.json` and the plots.
"""

from __future__ import annotations

import argparse
import copy
import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.utils import gather_object, set_seed
from torch import Tensor, nn
from transformers import get_scheduler

import tritonsparse as ts
from tritonsparse.eval.bleu import BleuResult, corpus_bleu
from tritonsparse.eval.bleu_tokenizers import choose_tokenizer
from tritonsparse.eval.command_line import naming
from tritonsparse.eval.translate import translate
from tritonsparse.flops import LayerCost, TrainingMeter, layer_costs
from tritonsparse.report import Report

from .run import results
from .run.checkpoints import writing
from .run.frame import run_program, saved
from .run.loop import Loop
from .run.program import average, begin, settings, start
from .run.twins import Twins
from .text.corpora import load_parallel
from .text.source import TextSource
from .text.subwords import train_tokenizer
from .text.token_batches import Batch, TokenBatches
from .text.translation_arguments import FREE, PRESET, VOCABULARY, parser
from .text.translation_presets import build_model, load_model

__all__ = ["main"]

logger = logging.getLogger(__name__)

Pairs = list[tuple[str, str]]
Evaluation = tuple[dict[str, Any], list[str], BleuResult]


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status. What the user can mend is one sentence on stderr, status 2."""
    return run_program(parser(__doc__), prepare, finish, argv)


@dataclass
class Run:
    """Everything `finish` needs."""

    args: argparse.Namespace
    loop: Loop
    tokenizer: Any
    stock_model: nn.Module
    pairs: dict[str, Pairs]
    costs: dict[str, LayerCost]
    bleu_tokenizer: str


def prepare(args: argparse.Namespace) -> Run:
    """Check everything and build everything; writes nothing but the output folder."""
    accelerator, method = begin("translation", args)
    set_seed(args.seed)
    source = TextSource.of(args)
    with naming("translation", "text that can be loaded", str(source), "pass other files or another --dataset_name"):
        pairs = load_parallel(source, args.source_lang, args.target_lang, args.max_train_samples)
    if "validation" not in pairs:
        raise ValueError(
            "translation: expected a validation split, got none; pass --validation_file with pairs held out of training"
        )
    references = [target for _, target in pairs["validation"]]
    bleu_tokenizer = choose_tokenizer(
        "translation", args.target_lang, references, args.bleu_tokenize, "--bleu_tokenize"
    )
    tokenizer, model = _model(args, pairs["train"])
    ids = _encode(tokenizer, pairs["train"], args.max_source_length, args.max_target_length)
    _refuse_beyond_positions(model, ids)
    batches = TokenBatches(
        ids,
        max_tokens=args.max_tokens_per_batch,
        pad=model.config.pad_token_id,
        start=model.config.decoder_start_token_id,
        seed=args.seed,
        group=accelerator.num_processes * args.gradient_accumulation_steps,
        rank=accelerator.process_index,
        world=accelerator.num_processes,
    )
    _try_decoding(args, model, tokenizer, pairs["validation"][0][0])
    total_steps = args.max_train_steps or args.num_train_epochs * batches.steps_per_epoch
    # Evaluation runs on stock classes loaded with the finalized weights, which is what users will load.
    stock_model = copy.deepcopy(model)
    sparsifier = ts.sparsify(
        model, method, pattern=args.pattern, include=args.include, exclude=args.exclude, backend=args.backend,
        total_steps=total_steps, steps_per_epoch=batches.steps_per_epoch, seed=args.seed,
    )  # fmt: skip
    groups = sparsifier.param_groups(lr=args.learning_rate, weight_decay=args.weight_decay)
    optimizer = torch.optim.AdamW(groups, betas=(args.adam_beta1, args.adam_beta2), eps=args.adam_epsilon)
    scheduler = get_scheduler(args.lr_scheduler_type, optimizer, args.num_warmup_steps, total_steps)
    middle = batches.collate(batches.batches[len(batches.batches) // 2])
    example: dict[str, Any] = {**middle.inputs(torch.device("cpu"))}
    costs = layer_costs(stock_model.eval(), **example)
    prepared_model, prepared_optimizer = accelerator.prepare(model, optimizer)
    sparsifier.attach(prepared_optimizer)
    sparsifier.register(accelerator)
    stock_model.to(accelerator.device)
    validation = pairs["validation"][: args.max_eval_samples]
    loop = Loop(
        accelerator=accelerator, model=prepared_model, optimizer=prepared_optimizer, scheduler=scheduler,
        sparsifier=sparsifier, meter=TrainingMeter(sparsifier, costs, convention=args.flops_convention),
        loss=lambda model, batch: _loss(model, batch, args.label_smoothing, sparsifier),
        evaluate=lambda: _evaluate(run, validation, args.eval_num_beams, sparsifier.trained_state_dict())[0],
        batches=batches, settings=settings(args, method, accelerator.num_processes, total_steps, FREE),
        twins=_twins(stock_model, tokenizer) if args.save_twins else None,
    )  # fmt: skip
    run = Run(args, loop, tokenizer, stock_model, pairs, costs, bleu_tokenizer)
    start(args, loop)
    logger.info(
        "***** training *****\n  pairs: %s\n  epochs: %.2f of %d steps\n  steps: %d\n  tokens a batch: at most %d, "
        "%d process(es) x %d accumulation\n  device: %s, %s\n  %s",
        {split: len(part) for split, part in pairs.items()}, total_steps / batches.steps_per_epoch,
        batches.steps_per_epoch, total_steps, args.max_tokens_per_batch, accelerator.num_processes,
        args.gradient_accumulation_steps, accelerator.device, accelerator.mixed_precision, sparsifier.summary(),
    )  # fmt: skip
    return run


def _twins(stock_model: Any, tokenizer: Any) -> Twins:
    def pretrained(folder: Path) -> None:
        stock_model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    return Twins(lambda numbers: float(numbers["bleu"]), pretrained)


def _model(args: argparse.Namespace, train: Pairs) -> tuple[Any, Any]:
    if args.model_name_or_path is not None:
        return load_model(args.model_name_or_path)
    tokenizer = train_tokenizer(train, args.vocab_size or VOCABULARY)
    return tokenizer, build_model(args.preset or PRESET, tokenizer, dropout=args.dropout)


def _encode(tokenizer: Any, pairs: Pairs, max_source: int, max_target: int) -> list[tuple[list[int], list[int]]]:
    sources = tokenizer([source for source, _ in pairs])["input_ids"]
    targets = tokenizer(text_target=[target for _, target in pairs])["input_ids"]
    kept = [
        (source, target)
        for source, target in zip(sources, targets, strict=True)
        if len(source) <= max_source and len(target) <= max_target
    ]
    if len(kept) < len(pairs):
        logger.info(
            "dropped %d training pairs longer than %d/%d tokens",
            len(pairs) - len(kept),
            max_source,
            max_target,
        )
    if not kept:
        raise ValueError(
            f"translation: expected training pairs of at most {max_source}/{max_target} tokens, got none; raise "
            f"--max_source_length and --max_target_length"
        )
    return kept


def _refuse_beyond_positions(model: Any, ids: list[tuple[list[int], list[int]]]) -> None:
    positions = getattr(model.config, "max_position_embeddings", None)
    longest = max(max(len(source), len(target)) for source, target in ids)
    if positions is not None and longest > positions:
        raise ValueError(
            f"translation: expected training pairs of at most {positions} tokens, the model's positions, got one of "
            f"{longest}; lower --max_source_length and --max_target_length"
        )


def _try_decoding(args: argparse.Namespace, model: Any, tokenizer: Any, source: str) -> None:
    """A token of one sentence in each of the two searches: what they refuse is refused before hours of training."""
    for num_beams in (args.eval_num_beams, args.num_beams):
        translate(model, tokenizer, [source], num_beams=num_beams, length_penalty=args.length_penalty, extra_tokens=1)


def _loss(model: nn.Module, batch: Batch, label_smoothing: float, sparsifier: ts.Sparsifier) -> Tensor:
    device = next(model.parameters()).device
    sparsifier.set_row_mask(batch.attention_mask.bool(), batch.labels != -100)
    logits = model(**batch.inputs(device), use_cache=False).logits
    return F.cross_entropy(
        logits.float().flatten(0, 1),
        batch.labels.to(device).flatten(),
        ignore_index=-100,
        label_smoothing=label_smoothing,
        reduction="sum",
    )


def _evaluate(run: Run, pairs: Pairs, num_beams: int, weights: dict[str, Tensor]) -> Evaluation:
    """Translate with `weights` in the stock model, each rank its slice; the score is computed once over all."""
    accelerator = run.loop.accelerator
    run.stock_model.load_state_dict(weights)
    rank, world = accelerator.process_index, accelerator.num_processes
    mine = translate(
        run.stock_model, run.tokenizer, [source for source, _ in pairs][rank::world], num_beams=num_beams,
        length_penalty=run.args.length_penalty, progress=accelerator.is_local_main_process,
    )  # fmt: skip
    gathered = gather_object([(rank + world * number, text) for number, text in enumerate(mine)])
    hypotheses = [text for _, text in sorted(gathered)]
    bleu = corpus_bleu(hypotheses, [target for _, target in pairs], tokenize=run.bleu_tokenizer)
    sparsity = results.sparsity(weights, run.loop.sparsifier.layers)
    numbers = {"bleu": bleu.score, "sparsity": sparsity, "num_beams": num_beams}
    logger.info("step %d: BLEU %.2f, sparsity %.2f%%", run.loop.step, bleu.score, 100 * sparsity)
    return numbers, hypotheses, bleu


def finish(run: Run) -> None:
    """Average if asked, save the finalized model, translate the test set, save results and plots."""
    args, loop = run.args, run.loop
    sparsifier, accelerator = loop.sparsifier, loop.accelerator
    averaged = average(args, loop)
    weights, output_dir = sparsifier.finalized_state_dict(), loop.settings.output_dir
    if accelerator.is_main_process:
        with writing(output_dir, output_dir):
            sparsifier.save_pretrained(output_dir)
            run.tokenizer.save_pretrained(output_dir)
    split = "test" if "test" in run.pairs else "validation"
    test = run.pairs[split][: args.max_test_samples]
    with saved(output_dir):
        _, hypotheses, bleu = _evaluate(run, test, args.num_beams, weights)
        report = sparsifier.report(run.costs, convention=args.flops_convention)
        if accelerator.is_main_process:
            measured = {
                "bleu": bleu.score,
                "bleu_line": bleu.line,
                "bleu_signature": bleu.signature,
                "split": split,
                "num_beams": args.num_beams,
                "length_penalty": args.length_penalty,
            }
            document = results.record(args, loop, report, run.costs, measured, averaged)
            results.save(document, output_dir, args.record_reference_losses)
            show(document, report, test, hypotheses, output_dir)
        accelerator.end_training()


def show(
    document: Mapping[str, Any],
    report: Report,
    pairs: Sequence[tuple[str, str]],
    hypotheses: Sequence[str],
    output_dir: Path,
) -> None:
    """Print the table, five translations, BLEU with its signature, and what sparsity saved."""
    print(f"\n{report}\n")
    count = min(5, len(pairs))
    for number in range(count):
        # Spread over the set, which may be ordered.
        source, reference = pairs[number * len(pairs) // count]
        print(f"  source      {source}\n  reference   {reference}")
        print(f"  translation {hypotheses[number * len(pairs) // count]}\n")
    print(f"BLEU on {document['split']} ({document['num_beams']} beams): {document['bleu']:.2f}")
    print(f"  {document['bleu_line']}\n  signature: {document['bleu_signature']}")
    results.show_costs(document, report, output_dir)


if __name__ == "__main__":
    sys.exit(main())
