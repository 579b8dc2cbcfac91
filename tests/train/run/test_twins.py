"""The best dense and the best sparse model of a run: which is kept, and what a kept dense one can do."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForSeq2SeqLM

import tritonsparse as ts
from tritonsparse.methods import Dense
from tritonsparse.train.run import checkpoints
from tritonsparse.train.run.twins import Twins, kept

Train = Callable[..., dict[str, Any]]


def evaluation(epoch: int, phase: str, sparsity: float, quality: float) -> dict[str, Any]:
    return {"epoch": epoch, "step": epoch + 1, "phase": phase, "sparsity": sparsity, "quality": quality}


@pytest.fixture
def keep(tmp_path: Path) -> Callable[..., dict[str, int]]:
    """`keep(*evaluations)` offers them one after the other; returns phase -> epoch of what lies in the folder."""
    accelerator = Accelerator(cpu=True)
    model = nn.Sequential(nn.Linear(8, 8))
    sparsifier = ts.sparsify(model, "gmp", sparsity=0.5, pattern="2:4", total_steps=4)
    accelerator.prepare(model)
    sparsifier.register(accelerator)
    twins = Twins(lambda numbers: numbers["quality"], lambda folder: folder.mkdir())

    def run(*evaluations: dict[str, Any]) -> dict[str, int]:
        for number in range(len(evaluations)):
            record = {
                "step": number + 1,
                "configuration": {"method": "gmp", "sparsity": 0.5, "pattern": "2:4", "seed": 3, "method_fields": {}},
                "evaluations": list(evaluations[: number + 1]),
            }
            twins.keep(accelerator, sparsifier, tmp_path, record)
        return {phase: numbers["epoch"] for phase, numbers in kept(tmp_path).items()}

    return run


def test_the_best_dense_and_the_sparsest_then_best_sparse_model_are_kept(
    keep: Callable[..., dict[str, int]], tmp_path: Path
) -> None:
    found = keep(
        evaluation(0, "dense", 0.0, 5.0),
        evaluation(1, "sparse", 0.5, 9.0),
        evaluation(2, "dense", 0.01, 4.0),  # worse, and a few weights that never woke do not make it better
        evaluation(3, "sparse", 0.8, 6.0),  # sparser goes before better
        evaluation(4, "sparse", 0.8, 6.0),  # no better than what is kept
    )
    assert found == {"dense": 0, "sparse": 3}
    assert keep(evaluation(5, "dense", 0.0, 5.5), evaluation(6, "sparse", 0.8, 7.0)) == {"dense": 5, "sparse": 6}
    # No step or epoch folder: the limit on checkpoints does not count them, and "latest" is never one of them.
    assert checkpoints.checkpoint_folders(tmp_path) == []


def test_a_kept_dense_model_is_a_checkpoint_of_a_dense_run(keep: Callable[..., dict[str, int]], tmp_path: Path) -> None:
    keep(evaluation(0, "dense", 0.0, 5.0), evaluation(1, "sparse", 0.5, 9.0))
    configuration = checkpoints.read_run(tmp_path / "best_dense")["configuration"]
    assert configuration == {
        "method": "dense", "sparsity": None, "pattern": "unstructured", "seed": 3, "method_fields": Dense().to_dict(),
    }  # fmt: skip
    assert checkpoints.read_run(tmp_path / "best_sparse")["configuration"]["method"] == "gmp"
    model = nn.Sequential(nn.Linear(8, 8))
    dense = ts.sparsify(model, "dense", total_steps=4)
    saved = json.loads((tmp_path / "best_dense" / "tritonsparse_state.json").read_text())
    tensors = load_file(tmp_path / "best_dense" / "tritonsparse_state.safetensors")
    dense.load_state_dict({**saved, "tensors": tensors})
    assert dense.layers["0"].kind == "dense" and tensors == {}


def test_translation_keeps_its_twins_too(train: Train, tmp_path: Path) -> None:
    phases = '{"phases": {"starts": [[0, "dense"], [1, "sparse"]], "epochs": 2}}'
    options = ("--method=acdc", "--sparsity=0.5", f"--method_args={phases}", "--num_train_epochs=2", "--save_twins")
    document = train(tmp_path, *options)
    assert [each["phase"] for each in document["evaluations"]] == ["dense", "sparse"]
    zeros = {}
    for phase in ("dense", "sparse"):
        assert checkpoints.read_run(tmp_path / f"best_{phase}")["evaluations"][-1]["phase"] == phase
        model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / f"best_{phase}" / "pretrained")
        weights = [module.weight for module in model.model.modules() if type(module) is nn.Linear]
        zeros[phase] = sum(int((weight == 0).sum()) for weight in weights) / sum(weight.numel() for weight in weights)
    assert zeros["sparse"] == pytest.approx(document["sparsity"], abs=1e-3) and zeros["dense"] < 0.01
    final = load_file(tmp_path / "model.safetensors")
    best = load_file(tmp_path / "best_sparse" / "pretrained" / "model.safetensors")
    assert all(torch.equal(final[name], best[name]) for name in best)
