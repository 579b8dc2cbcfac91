"""The dense and the sparse model of one run: the best of each kept as a checkpoint.

output_dir/best_sparse/   of the epochs that were sparse: the sparsest, among equals the best
output_dir/best_dense/    of the epochs that were dense: the best; a checkpoint of a dense run, so that
                          `--resume_from_checkpoint RUN/best_dense --method dense` fine-tunes it
  .../pretrained/         the evaluated model as `from_pretrained` loads it

Peste et al., AC/DC, arXiv:2106.12379, and its published code: one run gives both models, the sparse one chosen by
sparsity and then by quality, the dense one fine-tuned for the rest of the run without masks.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file

from tritonsparse import Sparsifier
from tritonsparse.checkpoint.state import as_dense
from tritonsparse.checkpoint.state_files import write_state
from tritonsparse.methods import METHODS

from . import checkpoints

__all__ = ["PRETRAINED", "Twins", "kept"]

PRETRAINED = "pretrained"


@dataclass(frozen=True)
class Twins:
    """quality: an evaluation's numbers -> larger is better. pretrained: writes what was evaluated into a folder."""

    quality: Callable[[Mapping[str, Any]], float]
    pretrained: Callable[[Path], None]

    def rank(self, numbers: Mapping[str, Any]) -> tuple[float, float]:
        """What decides between evaluations of one phase; a dense model's few zeros do not count."""
        return (numbers["sparsity"] if numbers["phase"] == "sparse" else 0.0, self.quality(numbers))

    def keep(
        self, accelerator: Accelerator, sparsifier: Sparsifier, output_dir: Path, record: Mapping[str, Any]
    ) -> None:
        """Write a checkpoint if the last evaluation of `record` beats what is kept. Called by every process."""
        last = record["evaluations"][-1]
        incumbent = kept(output_dir).get(last["phase"])
        # Nobody may look after another process has begun to write.
        accelerator.wait_for_everyone()
        if incumbent is not None and self.rank(last) <= self.rank(incumbent):
            return
        dense = last["phase"] == "dense"

        def finish(folder: Path) -> None:
            self.pretrained(folder / PRETRAINED)
            if dense:
                _without_masks(folder / "model.safetensors")
                write_state(as_dense(sparsifier.state_dict()), folder)

        if dense:
            record = {**record, "configuration": _of_a_dense_run(record["configuration"])}
        checkpoints.save(accelerator, output_dir, f"best_{last['phase']}", record, None, finish)


def kept(output_dir: Path) -> dict[str, dict[str, Any]]:
    """Phase -> the evaluation of the model that is kept of it; read from the folders, so of this run's models only."""
    found = {}
    for phase in ("sparse", "dense"):
        if (folder := output_dir / f"best_{phase}").is_dir():
            found[phase] = checkpoints.read_run(folder)["evaluations"][-1]
    return found


def _without_masks(file: Path) -> None:
    """A dense run's layers have none, and in a dense phase they keep everything."""
    weights = {key: tensor for key, tensor in load_file(file).items() if tensor.dtype != torch.bool}
    save_file(weights, file, metadata={"format": "pt"})


def _of_a_dense_run(configuration: Mapping[str, Any]) -> dict[str, Any]:
    fields = json.loads(json.dumps(METHODS["dense"]().to_dict()))
    wanted = {"method": "dense", "sparsity": None, "pattern": "unstructured", "method_fields": fields}
    return {**configuration, **{key: value for key, value in wanted.items() if key in configuration}}
