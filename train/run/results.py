"""What a run leaves behind: `all_results.json`, the plots, and the summary on the terminal."""

from __future__ import annotations

import argparse
import json
import math
import platform
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import accelerate
import torch
import transformers
from accelerate import Accelerator
from torch import Tensor

from tritonsparse.eval.machine import commit, processor
from tritonsparse.eval.output_files import write_whole
from tritonsparse.eval.plots import plot_layer_sparsity, plot_training
from tritonsparse.flops import CONVENTIONS, LayerCost, forward_fraction
from tritonsparse.report import Report, as_rows

from .loop import Loop

__all__ = [
    "environment",
    "plot",
    "portable",
    "read_epoch_losses",
    "record",
    "save",
    "show_costs",
    "sparsity",
    "write",
]

RESULTS = "all_results.json"


def environment(accelerator: Accelerator) -> dict[str, Any]:
    """Hardware, versions and, in a git checkout, the commit."""
    cuda = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if cuda else processor(),
        "cpu_threads": torch.get_num_threads(),
        "processes": accelerator.num_processes,
        "mixed_precision": accelerator.mixed_precision,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "accelerate": accelerate.__version__,
        "commit": commit(),
    }


def portable(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """A run's arguments without the folders of the machine it ran on: files, and folders of data, keep their names."""
    return {
        key: Path(value).name if key.endswith(("_file", "_dir")) and value else value
        for key, value in arguments.items()
        if key not in ("output_dir", "resume_from_checkpoint")
    }


def record(
    args: argparse.Namespace,
    loop: Loop,
    report: Report,
    costs: Mapping[str, LayerCost],
    measured: Mapping[str, Any],
    averaged: Sequence[str],
) -> dict[str, Any]:
    """What `all_results.json` says of a finished run; `measured` is what its program evaluated."""
    sparsifier = loop.sparsifier
    return {
        "method": sparsifier.method.name,
        "method_fields": sparsifier.method.to_dict(),
        **measured,
        **report.overall(),
        **loop.meter.overall(),
        **({} if sparsifier.embeddings is None else {"embedding_sparsity": sparsifier.embeddings.measured()}),
        "test_flops_fraction": forward_fraction(sparsifier, costs, convention=args.flops_convention),
        "steps": loop.step,
        "averaged_checkpoints": list(averaged),
        "training_seconds": loop.seconds,
        "epoch_losses": sparsifier.epoch_losses,
        "evaluations": loop.evaluations,
        "layers": as_rows(report),
        "history": loop.history,
        "arguments": portable(vars(args)),
        "environment": environment(loop.accelerator),
    }


def sparsity(weights: Mapping[str, Tensor], names: Iterable[str]) -> float:
    """The fraction of exact zeros in the weights of the layers `names`, of a state dict."""
    chosen = [weights[f"{name}.weight"] for name in names]
    return 1.0 - sum(int(torch.count_nonzero(weight)) for weight in chosen) / sum(weight.numel() for weight in chosen)


def save(document: Mapping[str, Any], output_dir: Path, reference_losses: str | None) -> None:
    """`all_results.json` and the plots; the epoch losses of a dense run for `--auto_tune`, if a file is named."""
    write(document, output_dir / RESULTS)
    if reference_losses is not None:
        write({key: document[key] for key in ("method", "epoch_losses")}, Path(reference_losses))
    plot(document, output_dir)


def write(document: Mapping[str, Any], path: Path) -> None:
    """A JSON file, whole or not there."""
    write_whole(path, json.dumps(document, indent=1))


def plot(document: Mapping[str, Any], output_dir: Path) -> None:
    """training.png (loss, sparsity, alpha, thresholds over steps) and layer_sparsity.png."""
    plot_training(document["history"], output_dir / "training.png", convention=document.get("flops_convention"))
    plot_layer_sparsity(document["layers"], output_dir / "layer_sparsity.png")


def show_costs(document: Mapping[str, Any], report: Report, output_dir: Path) -> None:
    """Print what sparsity saved, by which count, and where everything lies."""
    train, test = document["train_flops_fraction"], document["test_flops_fraction"]
    print(f"sparsity of the sparse layers: {report.sparsity:.2%}")
    counts = CONVENTIONS[report.convention].counts
    print(
        f"FLOPs by the convention {report.convention!r} ({counts}): training {train:.1%} of dense "
        f"({1 - train:.1%} saved), inference {test:.1%} of dense ({1 - test:.1%} saved)"
    )
    print("  (counted from zeros: an unstructured mask saves no time on a GPU; see the README)")
    print(f"written to {output_dir}: the finalized checkpoint, {RESULTS}, training.png, layer_sparsity.png")


def read_epoch_losses(path: str) -> list[float]:
    """Epoch losses of a dense run (its all_results.json, or what it recorded), the first tenth of its epochs.

    The first 10 % of the epochs, at least one, as AutoSparse tunes (arXiv:2304.06941v1, section 7.4).

    Raises:
        ValueError: no such file, one without epoch losses, or one of a sparse run.
    """
    try:
        document = json.loads(Path(path).read_text(encoding="utf-8"))
        losses, method = [float(loss) for loss in document["epoch_losses"]], document["method"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"auto_tune: expected {RESULTS} of a run with --method dense, got {path} ({error}); run the "
            f"dense model first"
        ) from error
    if method != "dense":
        raise ValueError(
            f"auto_tune: expected losses of a run with --method dense, got one of {method!r} in {path}; AutoSparse "
            f"tunes alpha against the dense model"
        )
    if not losses:
        raise ValueError(f"auto_tune: expected epoch losses in {path}, got none; the dense run ended within an epoch")
    return losses[: max(1, math.ceil(len(losses) / 10))]
