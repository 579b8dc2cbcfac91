"""Tensors on two and on three ranks, ranked together: every rank finds what one process finds of all of them."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

WORKER = Path(__file__).with_name("topk_worker.py")
BACKENDS = ["torch"] + ["triton"] * (importlib.util.find_spec("triton") is not None)


# All three ranks; and two of them, whose places in their group are not their ranks.
GROUPS = {3: [0, 1, 2], 2: [0, 2]}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1", "TRITON_INTERPRET": "1"}
    arguments = ["--standalone", "--nproc_per_node", "3", str(WORKER), str(folder)]
    command = [sys.executable, "-m", "torch.distributed.run", *arguments]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(3)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["distinct", "tied"])
@pytest.mark.parametrize("size", GROUPS)
def test_every_rank_finds_the_cutoff_and_its_part_of_the_masks_of_one_stable_sort(
    results: list[dict[str, Any]], size: int, kind: str, backend: str
) -> None:
    random = torch.Generator().manual_seed(0)
    values = torch.cat([torch.randn(5000, generator=random), torch.randn(6000, generator=random)]).abs()
    values = values.mul(2).round() if kind == "tied" else values
    order = values.argsort(descending=True, stable=True)
    ranks = [results[rank][f"{backend} {size}"] for rank in GROUPS[size]]
    names = [name for name in ranks[0] if name.startswith(kind)]
    assert len(names) == 8
    for name in names:
        kept = int(name.split()[1])
        expected = torch.zeros(11_000, dtype=torch.bool)
        expected[order[:kept]] = True
        assert torch.equal(torch.cat([mask.reshape(-1) for rank in ranks for mask in rank[name][1]]), expected), name
        last = values[order[kept - 1]] if kept else torch.tensor(torch.inf)
        above = int((values > last).sum())
        for rank in ranks:
            key, *counts = rank[name][0]
            assert key == (last.view(torch.int32) if kept else 2**31 - 1), name
            assert counts == [above, kept - above, 0, 11_000], name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", GROUPS)
def test_what_one_rank_cannot_rank_every_rank_refuses(results: list[dict[str, Any]], size: int, backend: str) -> None:
    for rank in GROUPS[size]:
        diverged, too_many = results[rank][f"{backend} {size}"]["refusals"]
        assert "got NaN; the weights have diverged" in diverged
        assert "expected 0 <= kept <= 11000, got 11001" in too_many
