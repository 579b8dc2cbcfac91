"""Two ranks under DDP: what each decides for itself, both decide alike."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

WORKER = Path(__file__).with_name("distributed_worker.py")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", WORKER, folder]
    run = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def assert_same(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    for left, right in (
        (ours["model"], theirs["model"]),
        (ours["sparsifier"]["tensors"], theirs["sparsifier"]["tensors"]),
    ):
        assert left.keys() == right.keys()
        assert [key for key in left if not torch.equal(left[key], right[key])] == []
    rest = [{key: value for key, value in each["sparsifier"].items() if key != "tensors"} for each in (ours, theirs)]
    assert rest[0] == rest[1]


@pytest.mark.parametrize("name", ["autosparse", "gmp"])
def test_weights_thresholds_and_views_are_identical_on_both_ranks(ranks: list[dict[str, Any]], name: str) -> None:
    assert ranks[0][name]["losses"] != ranks[1][name]["losses"]
    assert_same(ranks[0][name]["unbroken"], ranks[1][name]["unbroken"])
    tensors = ranks[0][name]["unbroken"]["sparsifier"]["tensors"]
    assert tensors.keys() == (
        {"0.mask", "2.mask"} if name == "gmp" else {"0.grad_mask", "2.grad_mask", "0.alpha", "2.alpha"}
    )


@pytest.mark.parametrize("name", ["autosparse", "gmp"])
def test_the_loss_falls(ranks: list[dict[str, Any]], name: str) -> None:
    losses = [(a + b) / 2 for a, b in zip(ranks[0][name]["losses"], ranks[1][name]["losses"], strict=True)]
    assert sum(losses[4:]) < sum(losses[:2])


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("name", ["autosparse", "gmp"])
def test_saved_and_loaded_both_ranks_go_on_as_if_never_stopped(
    ranks: list[dict[str, Any]], name: str, rank: int
) -> None:
    assert_same(ranks[rank][name]["resumed"], ranks[rank][name]["unbroken"])


def test_the_tuner_sees_the_mean_loss_over_ranks(ranks: list[dict[str, Any]]) -> None:
    losses = [rank["autosparse"]["losses"][:3] for rank in ranks]
    (seen, *_) = ranks[0]["autosparse"]["unbroken"]["sparsifier"]["epoch_losses"]
    assert seen == pytest.approx((sum(losses[0]) + sum(losses[1])) / 6, rel=1e-6)
    # .5 * 1.05 or .5 * .995: the same verdict on both, of the mean and not of a rank's own loss
    tuned = [rank["autosparse"]["unbroken"]["sparsifier"]["method_state"]["tuned_alpha"] for rank in ranks]
    assert tuned == [0.5 * (1.05 if seen > 0.505 else 0.995)] * 2
