"""Two ranks under DDP: what each decides for itself, both decide alike. torchrun runs this file, as a program, on each.

As a program it trains, stops, goes on, and writes what its rank has to `<folder>/<rank>.pt`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import nn

import tritonsparse as ts
from tritonsparse.methods import GMP, AutoSparse, AutoTune, Method

if __name__ != "__main__":
    from small_runs import assert_same

METHODS: dict[str, Method] = {
    "autosparse": AutoSparse(threshold_init=-3.0, backward_density=0.7, auto_tune=AutoTune(reference_losses=[0.5])),
    "gmp": GMP(sparsity=0.75, update_every=1, end=1.0),
}


def run(name: str, folder: Path) -> dict[str, object]:
    accelerator = Accelerator(cpu=True)
    rank = accelerator.process_index
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
    sparsifier = ts.sparsify(model, METHODS[name], total_steps=6, steps_per_epoch=3)
    optimizer = torch.optim.AdamW(sparsifier.param_groups(lr=0.05))
    model, optimizer = accelerator.prepare(model, optimizer)
    sparsifier.attach(optimizer)
    sparsifier.register(accelerator)

    def train(steps: int) -> list[float]:
        losses = []
        for _ in range(steps):
            # Each rank has its own data: what they agree on, they agree on through the gradients.
            x = torch.randn(16, 8, generator=torch.Generator().manual_seed(10 * sparsifier.step + rank))
            loss = (model(x) - x[:, :4]).square().mean()
            sparsifier.observe(loss=loss)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses

    def state() -> dict[str, object]:
        weights = {key: value.clone() for key, value in accelerator.unwrap_model(model).state_dict().items()}
        return {"model": weights, "sparsifier": sparsifier.state_dict()}

    losses = train(3)
    accelerator.save_state(str(folder / name))
    accelerator.wait_for_everyone()
    losses += train(3)
    unbroken = state()
    accelerator.load_state(str(folder / name))
    assert sparsifier.step == 3
    train(3)
    return {"losses": losses, "unbroken": unbroken, "resumed": state()}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", __file__, folder]
    run = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("name", METHODS)
def test_both_ranks_end_alike_and_go_on_as_if_never_stopped(ranks: list[dict[str, Any]], name: str) -> None:
    first, second = (rank[name] for rank in ranks)
    assert first["losses"] != second["losses"]
    assert_same(first["unbroken"], second["unbroken"])
    for each in (first, second):
        assert_same(each["resumed"], each["unbroken"])
    assert first["unbroken"]["sparsifier"]["tensors"].keys() == (
        {"0.mask", "2.mask"} if name == "gmp" else {"0.grad_mask", "2.grad_mask", "0.alpha", "2.alpha"}
    )
    losses = [a + b for a, b in zip(first["losses"], second["losses"], strict=True)]
    assert sum(losses[4:]) < sum(losses[:2])


def test_the_tuner_sees_the_mean_loss_over_ranks(ranks: list[dict[str, Any]]) -> None:
    losses = [rank["autosparse"]["losses"][:3] for rank in ranks]
    (seen, *_) = ranks[0]["autosparse"]["unbroken"]["sparsifier"]["epoch_losses"]
    assert seen == pytest.approx((sum(losses[0]) + sum(losses[1])) / 6, rel=1e-6)
    # .5 * 1.05 or .5 * .995: the same verdict on both, of the mean and not of a rank's own loss
    tuned = [rank["autosparse"]["unbroken"]["sparsifier"]["method_state"]["tuned_alpha"] for rank in ranks]
    assert tuned == [0.5 * (1.05 if seen > 0.505 else 0.995)] * 2


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    results = {name: run(name, folder) for name in METHODS}
    torch.save(results, folder / f"{torch.distributed.get_rank()}.pt")
    torch.distributed.destroy_process_group()
