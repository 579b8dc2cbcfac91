"""Do sparse phases forget what dense ones memorise? AC/DC's experiment with corrupted labels, as one program.

    accelerate launch -m tritonsparse.train.memorization --recipe cifar10-resnet20 --num_train_epochs 200 \\
        --method acdc --method_args '{"phases": "cifar100"}' --sparsities 0 0.5 0.9 --output_dir runs/memorization

Peste et al., AC/DC (arXiv:2106.12379), section 4.4 and appendix B.6: 1,000 training images get a wrong label; every
epoch counts how many of them the model classifies as what they are, and how many as labelled. Each sparsity is trained
without and with augmentation, 0 as the dense baseline; all options of image_classification hold for every run. Writes
the runs' folders, `memorization.json` and `memorization.png`; a run whose results are there already is not repeated.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate.state import AcceleratorState, PartialState

from tritonsparse.eval.command_line import BELOW_ONE, COUNT, SEED, Parser
from tritonsparse.eval.memorization import plot_memorization
from tritonsparse.eval.output_files import refuse_unwritable

from . import image_classification
from .images.arguments import parser as image_parser
from .images.label_corruption import corrupt
from .run import frame, program, results

__all__ = ["main", "parser"]

logger = logging.getLogger(__name__)

NAME = "memorization"
KEYS = ("epoch", "step", "phase", "top1", "sparsity", "corrupted_as_true", "corrupted_as_labelled")


def parser() -> Parser:
    """The options of image classification, and those of the experiment."""
    result = image_parser(NAME, __doc__)
    experiment = result.add_argument_group("experiment")
    experiment.add_argument("--corrupted_samples", type=COUNT, default=1000)
    experiment.add_argument("--corruption_seed", type=SEED, default=0)
    experiment.add_argument(
        "--sparsities", nargs="+", type=BELOW_ONE, default=[0.0, 0.5, 0.75, 0.9, 0.95], help="one run each; 0 is dense"
    )
    result.rules.append(_refuse_unfit)
    # He et al.'s for the half of the runs that is augmented.
    result.set_defaults(method="acdc", augmentation="crop_flip")
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status. What the user can mend is one sentence on stderr, status 2."""
    return frame.run_program(parser(), prepare, finish, argv)


@dataclass
class Experiment:
    """The runs by folder name; it is its own loop, so that the programs' common frame can run it."""

    args: argparse.Namespace
    runs: dict[str, argparse.Namespace]
    documents: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def loop(self) -> Experiment:
        """What `run_program` runs."""
        return self

    def run(self) -> None:
        """Train whatever has no results yet."""
        for name, args in self.runs.items():
            if name not in self.documents:
                logger.info("***** %s *****", name)
                one = image_classification.prepare(args, lambda images: _corruption(self.args, images))
                one.loop.run()
                image_classification.finish(one, last=False)
                # The next run may want another tracker's folder.
                AcceleratorState._reset_state()
                self.documents[name] = _read(args)


def prepare(args: argparse.Namespace) -> Experiment:
    """One set of arguments for each sparsity and augmentation; refuses what any of them could not run with."""
    refuse_unwritable(NAME, "--output_dir", args.output_dir, folder=True)
    runs, documents = {}, {}
    for augmentation in ("none", args.augmentation):
        for sparsity in args.sparsities:
            name = f"{_label(sparsity)}-{'plain' if augmentation == 'none' else 'augmented'}"
            one = copy.deepcopy(args)
            one.augmentation, one.output_dir = augmentation, str(Path(args.output_dir) / name)
            one.sparsity = sparsity
            if sparsity == 0.0:
                one.method, one.method_args, one.sparsity = "dense", None, None
            runs[name] = one
    for name, one in runs.items():
        if (Path(one.output_dir) / results.RESULTS).is_file():
            documents[name] = _read(one)
        else:
            # All of them, before hours of the first.
            program.refuse_unfit(one, image_classification.build(one, lambda images: _corruption(args, images)).loop)
            AcceleratorState._reset_state()
    return Experiment(args, runs, documents)


def _read(args: argparse.Namespace) -> dict[str, Any]:
    path = Path(args.output_dir) / results.RESULTS
    try:
        document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        [each[key] for key in KEYS for each in document["evaluations"]]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ValueError(
            f"{NAME}: expected results of a run in {path}, got a damaged file ({error}); remove it to repeat the run"
        ) from error
    return document


def _refuse_unfit(args: argparse.Namespace) -> None:
    if args.augmentation == "none":
        raise ValueError(
            f"{NAME}: expected an augmentation for the second half of the runs, got 'none'; pass --augmentation "
            f"crop_flip"
        )
    if len(set(args.sparsities)) < len(args.sparsities):
        raise ValueError(f"{NAME}: expected different --sparsities, got {args.sparsities}; leave one of the equal out")


def _corruption(args: argparse.Namespace, images: Any) -> Any:
    return corrupt(images, args.corrupted_samples, args.corruption_seed)


def _label(sparsity: float) -> str:
    return "dense" if sparsity == 0.0 else f"{100 * sparsity:g}%"


def finish(experiment: Experiment) -> None:
    """Write `memorization.json` and its picture, and say what the last epochs came to."""
    PartialState().destroy_process_group()
    if not PartialState().is_main_process:
        return
    with frame.saved(Path(experiment.args.output_dir)):
        _report(experiment)


def _report(experiment: Experiment) -> None:
    folder = Path(experiment.args.output_dir)
    record: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for name, document in experiment.documents.items():
        label, _, how = name.partition("-")
        evaluations = [{key: each[key] for key in KEYS} for each in document["evaluations"]]
        title = "without augmentation" if how == "plain" else "with augmentation"
        record.setdefault(title, {})[label] = evaluations
    environment = next(iter(experiment.documents.values()))["environment"]
    arguments = results.portable(vars(experiment.args))
    document = {"runs": record, "arguments": arguments, "environment": environment}
    results.write(document, folder / "memorization.json")
    plot_memorization(record, folder / "memorization.png")
    print(f"{'':<24}{'run':>8}{'phase':>8}{'test top-1':>12}{'as they are':>13}{'as labelled':>13}")
    for title, group in record.items():
        for label, evaluations in group.items():
            last = evaluations[-1]
            print(
                f"{title:<24}{label:>8}{last['phase']:>8}{last['top1']:>12.2%}{last['corrupted_as_true']:>13.2%}"
                f"{last['corrupted_as_labelled']:>13.2%}"
            )
    print(f"written to {folder}: memorization.json, memorization.png")


if __name__ == "__main__":
    sys.exit(main())
