"""Run by torchrun on two ranks: train under DDP, stop, go on; then write what this rank has to `<folder>/<rank>.pt`."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn

import tritonsparse as ts
from tritonsparse.methods import GMP, AutoSparse, AutoTune, Method

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


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    results = {name: run(name, folder) for name in METHODS}
    torch.save(results, folder / f"{torch.distributed.get_rank()}.pt")
    torch.distributed.destroy_process_group()
