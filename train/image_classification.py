"""Train an image classifier, sparse or dense, and measure its top-1 and top-5 accuracy.

    accelerate launch -m tritonsparse.train.image_classification --recipe fashion-mnist-small \\
        --data_dir fashion-mnist --output_dir runs/fashion-mnist

ResNet-50, MobileNetV1 and small residual networks from scratch (`--preset`), or any image classifier
(`--model_name_or_path`); SGD with momentum, cosine or steps with warm-up, label smoothing; checkpoints that resume bit
for bit on a CPU. Epochs are evaluated on the validation split, on the test split where there is no other; the result is
that of the last weights, never of a best epoch. `--output_dir` receives the finalized checkpoint (stock classes, exact
zeros) with its preprocessor, the sidecar to go on from, `all_results.json` and the plots.
"""

from __future__ import annotations

import argparse
import copy
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from accelerate.utils import set_seed
from torch import Tensor, nn
from torch.optim import Optimizer

import tritonsparse as ts
from tritonsparse.eval.accuracy import Accuracy, Sums, accuracy_sums
from tritonsparse.eval.command_line import naming
from tritonsparse.eval.image_sets import ImageSet
from tritonsparse.eval.preprocessing import Preprocessing
from tritonsparse.flops import LayerCost, TrainingMeter, layer_costs

from .images.arguments import FREE, PRESET, parser
from .images.batch_norm import reestimate
from .images.batches import ImageBatch, ImageBatches
from .images.label_corruption import Corruption
from .images.models import build_model, load_model
from .images.schedule import make_scheduler
from .images.training_set import load_sets, training_batches
from .run import checkpoints, frame, program, results
from .run.loop import Loop
from .run.twins import Twins

__all__ = ["Run", "build", "main", "prepare"]

logger = logging.getLogger(__name__)

NAME = "image_classification"


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status. What the user can mend is one sentence on stderr, status 2."""
    return frame.run_program(parser(NAME, __doc__), prepare, finish, argv)


@dataclass
class Run:
    """Everything that evaluation and `finish` need."""

    args: argparse.Namespace
    loop: Loop
    stock_model: nn.Module
    sets: dict[str, ImageSet]
    batches: ImageBatches
    preprocessing: Preprocessing
    costs: dict[str, LayerCost]
    kinds: dict[str, str]
    corruption: Corruption | None = None

    @property
    def evaluated(self) -> str:
        """The split that epochs are evaluated on."""
        return "validation" if "validation" in self.sets else "test"


def prepare(args: argparse.Namespace, corrupt: Callable[[ImageSet], Corruption] | None = None) -> Run:
    """Check everything and build everything; writes nothing but the output folder.

    corrupt: makes other labels for the training set, which evaluations then report on.
    """
    run = build(args, corrupt)
    loop, steps = run.loop, run.batches.steps_per_epoch
    program.start(args, loop)
    logger.info(
        "***** training *****\n  images: %s, %d classes\n  epochs: %.2f of %d steps\n  steps: %d\n"
        "  batch: %d images, %d process(es) x %d accumulation\n  device: %s, %s\n  %s",
        {split: len(part) for split, part in run.sets.items()}, len(run.sets["train"].classes),
        loop.settings.total_steps / steps, steps, loop.settings.total_steps, args.batch_size,
        loop.accelerator.num_processes, args.gradient_accumulation_steps, loop.accelerator.device,
        loop.accelerator.mixed_precision, loop.sparsifier.summary(),
    )  # fmt: skip
    return run


def build(args: argparse.Namespace, corrupt: Callable[[ImageSet], Corruption] | None = None) -> Run:
    """`prepare`, but for what it writes and resumes."""
    accelerator, method = program.begin(NAME, args)
    set_seed(args.seed)
    data = args.dataset_name or args.data_dir
    with naming(NAME, "images that can be loaded", data, "pass another --dataset_name or --data_dir"):
        sets = load_sets(args)
    corruption = None if corrupt is None else corrupt(sets["train"])
    batches, preprocessing = training_batches(
        args, sets["train"], accelerator.num_processes, accelerator.process_index,
        None if corruption is None else corruption.labels,
    )  # fmt: skip
    total_steps = args.max_train_steps or args.num_train_epochs * batches.steps_per_epoch
    model = _model(args, sets["train"], preprocessing)
    if args.channels_last:
        # torch's annotations leave this form of `to` out.
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    # Evaluation runs on stock classes loaded with the finalized weights, which is what users will load.
    stock_model = copy.deepcopy(model)
    sparsifier = ts.sparsify(
        model, method, pattern=args.pattern, include=args.include, exclude=args.exclude, backend=args.backend,
        total_steps=total_steps, steps_per_epoch=batches.steps_per_epoch, seed=args.seed,
        # AC/DC, RigL and STR prune the last layer too.
        output_heads=True,
    )  # fmt: skip
    optimizer = _optimizer(args, sparsifier)
    scheduler = make_scheduler(args, optimizer, batches.steps_per_epoch, total_steps)
    example = preprocessing.normalise(preprocessing.cut(sets["train"].image(0))[None])
    costs = layer_costs(stock_model.eval(), pixel_values=example)
    prepared_model, prepared_optimizer = accelerator.prepare(model, optimizer)
    sparsifier.attach(prepared_optimizer)
    sparsifier.register(accelerator)
    stock_model.to(accelerator.device)
    loop = Loop(
        accelerator=accelerator, model=prepared_model, optimizer=prepared_optimizer, scheduler=scheduler,
        batches=batches, sparsifier=sparsifier,
        meter=TrainingMeter(sparsifier, costs, convention=args.flops_convention),
        loss=lambda model, batch: _loss(model, batch, preprocessing, args.label_smoothing),
        evaluate=lambda: evaluate(run),
        settings=program.settings(args, method, accelerator.num_processes, total_steps, FREE),
        twins=_twins(stock_model, preprocessing) if args.save_twins else None,
    )  # fmt: skip
    kinds = {name: layer.kind for name, layer in sparsifier.layers.items()}
    run = Run(args, loop, stock_model, sets, batches, preprocessing, costs, kinds, corruption)
    return run


def _model(args: argparse.Namespace, images: ImageSet, preprocessing: Preprocessing) -> nn.Module:
    if args.model_name_or_path is not None:
        return load_model(args.model_name_or_path, images.classes)
    channels, side, _ = preprocessing.cut(images.image(0)).shape
    return build_model(args.preset or PRESET, images.classes, channels, side, args.initialisation)


def _optimizer(args: argparse.Namespace, sparsifier: ts.Sparsifier) -> Optimizer:
    groups = sparsifier.param_groups(lr=args.learning_rate, weight_decay=args.weight_decay)
    for group in groups:
        if group["name"] == "no_decay" and args.norm_decay:
            group["weight_decay"] = args.weight_decay
    if args.optimizer == "adamw":
        return torch.optim.AdamW(groups, betas=(args.adam_beta1, args.adam_beta2), eps=args.adam_epsilon)
    return torch.optim.SGD(groups, lr=args.learning_rate, momentum=args.momentum, nesterov=args.nesterov)


def _twins(stock_model: nn.Module, preprocessing: Preprocessing) -> Twins:
    def write(folder: Path) -> None:
        model: Any = stock_model
        model.save_pretrained(folder)
        preprocessing.save(folder)

    return Twins(lambda numbers: float(numbers["top1"]), write)


def _loss(model: nn.Module, batch: ImageBatch, preprocessing: Preprocessing, label_smoothing: float) -> Tensor:
    device = next(model.parameters()).device
    logits = model(pixel_values=preprocessing.normalise(batch.pixels.to(device))).logits
    labels = batch.labels.to(device)
    return F.cross_entropy(logits.float(), labels, label_smoothing=label_smoothing, reduction="sum")


def evaluate(run: Run, weights: dict[str, Tensor] | None = None, split: str | None = None) -> dict[str, Any]:
    """Accuracy of the stock model with `weights` (those that the last step trained) on `split`, over all ranks.

    Where a phase has switched since the evaluation before and statistics are to be re-estimated, they are, on the copy.
    """
    loop, sparsifier = run.loop, run.loop.sparsifier
    weights = sparsifier.trained_state_dict() if weights is None else weights
    run.stock_model.load_state_dict(weights)
    if loop.accelerator.num_processes > 1:
        # Norms count what their own rank sees; what is saved, and so what is evaluated, is the first rank's.
        for buffer in run.stock_model.buffers():
            dist.broadcast(buffer, 0)
    kinds = {name: layer.kind for name, layer in sparsifier.layers.items()}
    if run.args.bn_reestimation_batches and kinds != run.kinds:
        reestimate(run.stock_model, _inputs(run), loop.accelerator.autocast)
    run.kinds = kinds
    found = measure(run, run.sets[split or run.evaluated])
    numbers = {"top1": found.top1, "top5": found.top5, "eval_loss": found.loss}
    numbers["sparsity"] = results.sparsity(weights, sparsifier.layers)
    if run.corruption is not None:
        numbers["corrupted_as_true"] = measure(run, run.corruption.images).top1
        numbers["corrupted_as_labelled"] = measure(run, run.corruption.images, run.corruption.wrong).top1
    logger.info(
        "step %d: top-1 %.2f%%, top-5 %.2f%%, sparsity %.2f%%",
        loop.step, *(100 * numbers[key] for key in ("top1", "top5", "sparsity")),
    )  # fmt: skip
    return numbers


def measure(run: Run, images: ImageSet, labels: Tensor | None = None) -> Accuracy:
    """The stock model's accuracy on `images`, each rank its share."""
    accelerator = run.loop.accelerator
    sums = accuracy_sums(
        run.stock_model, images, run.preprocessing, batch_size=run.args.eval_batch_size,
        rank=accelerator.process_index, world=accelerator.num_processes, labels=labels, autocast=accelerator.autocast,
    )  # fmt: skip
    return Sums(accelerator.reduce(sums.values.to(accelerator.device)).cpu()).mean()


def _inputs(run: Run) -> Iterator[Tensor]:
    device = run.loop.accelerator.device
    for batch in run.batches.first(run.args.bn_reestimation_batches):
        yield run.preprocessing.normalise(batch.pixels.to(device))


def finish(run: Run, *, last: bool = True) -> None:
    """Average if asked, save the finalized model, evaluate on the test set, save results and plots.

    last: no run follows in these processes, which may part.
    """
    args, loop = run.args, run.loop
    sparsifier, accelerator = loop.sparsifier, loop.accelerator
    averaged = program.average(args, loop)
    weights, output_dir = sparsifier.finalized_state_dict(), loop.settings.output_dir
    if averaged and args.bn_reestimation_batches:
        # Averaged weights have no statistics of their own.
        run.kinds = {}
    if accelerator.is_main_process:
        with checkpoints.writing(output_dir, output_dir):
            sparsifier.save_pretrained(output_dir)
            run.preprocessing.save(output_dir)
    split = "test" if "test" in run.sets else "validation"
    with frame.saved(output_dir):
        numbers = evaluate(run, weights, split)
        report = sparsifier.report(run.costs, convention=args.flops_convention)
        if accelerator.is_main_process:
            measured = {
                **{key: numbers[key] for key in ("top1", "top5", "eval_loss")},
                "split": split,
                "preprocessing": asdict(run.preprocessing),
            }
            document = results.record(args, loop, report, run.costs, measured, averaged)
            results.save(document, output_dir, args.record_reference_losses)
            print(
                f"\n{report}\n\n{split}: top-1 {numbers['top1']:.2%}, top-5 {numbers['top5']:.2%}, cross-entropy "
                f"{numbers['eval_loss']:.4f}"
            )
            results.show_costs(document, report, output_dir)
        if last:
            accelerator.end_training()
        else:
            for tracker in accelerator.trackers:
                tracker.finish()
            # What the first process has written is there for all.
            accelerator.wait_for_everyone()


if __name__ == "__main__":
    sys.exit(main())
