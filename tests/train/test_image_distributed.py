"""Two processes under torchrun train what one process that accumulates two batches trains, and evaluate together."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import load_file

from tritonsparse.train import image_classification

# Starting two processes takes longer than all else that is tested of images.
pytestmark = pytest.mark.long

# The smallest preset, and 61 test images: they do not divide by two. A norm's statistics are counted again at the end,
# by all ranks on the same batches.
OPTIONS = [
    "--preset=resnet8-narrow", "--max_train_samples=96", "--max_test_samples=61", "--batch_size=12",
    "--logging_steps=1", "--num_train_epochs=2", "--method=acdc", "--sparsity=0.5", "--augmentation=crop",
    "--bn_reestimation_batches=2", "--checkpointing_steps=4", "--channels_last",
    "--method_args", '{"phases": {"starts": [[0, "dense"], [1, "sparse"]], "epochs": 2}}',
]  # fmt: skip


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pair")
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
    launch += ["--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0", "-m", "tritonsparse.train.image_classification"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(
        [*launch, *OPTIONS, "--output_dir", str(folder)], env=environment, capture_output=True, text=True, timeout=1500
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("alone")
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    arguments = [*OPTIONS, "--gradient_accumulation_steps=2", "--output_dir", str(folder)]
    assert image_classification.main(arguments) == 0
    return folder


def results(folder: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((folder / "all_results.json").read_text(encoding="utf-8"))
    return document


def test_the_weights_are_the_same(pair: Path, alone: Path) -> None:
    ours, theirs = (load_file(folder / "step_8" / "model.safetensors") for folder in (pair, alone))
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        # Running statistics are the first rank's, over its own batches.
        if "running" not in name and expected.is_floating_point():
            assert torch.allclose(ours[name], expected, rtol=1e-3, atol=1e-5), name


def test_losses_and_what_was_evaluated_are_the_same(pair: Path, alone: Path) -> None:
    ours, theirs = results(pair), results(alone)
    assert [row["loss"] for row in ours["history"]] == pytest.approx(
        [row["loss"] for row in theirs["history"]], rel=1e-4
    )
    assert ours["environment"]["processes"] == 2 and ours["sparsity"] == theirs["sparsity"]
    # After the switch, at the end of the first epoch, both evaluate with statistics of the same batches.
    first, expected = ours["evaluations"][0], theirs["evaluations"][0]
    assert first["eval_loss"] == pytest.approx(expected["eval_loss"], rel=1e-3)
    # Top-1 counts images, of which 61 were seen once each.
    assert (first["top1"] * 61) == pytest.approx(round(first["top1"] * 61), abs=1e-9)
    assert abs(first["top1"] - expected["top1"]) < 1.5 / 61
