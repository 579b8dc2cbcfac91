"""Methods on a GPU: their own tensors follow the device, masks stay exact, and a control reads nothing back."""

from typing import Any

import pytest
import torch
from cases.block import no_synchronization
from torch import nn

import tritonsparse as ts
from tritonsparse.masks.topk import kept_count
from tritonsparse.methods import DSR, SNFS, STR, AutoSparse, OptG, PowerProp
from tritonsparse.methods.target_sparsity import common_offset

METHODS = {
    "autosparse": AutoSparse(sparsity=0.75, control_every=2, alpha=0.4),
    "dsr": DSR(sparsity=0.75, update_every=2),
    "optg": OptG(sparsity=0.75),
    "powerprop": PowerProp(sparsity=0.75, backward_sparsity=0.5),
    "snfs": SNFS(sparsity=0.75, update_every=2),
    "str": STR(sparsity=0.75, control_every=2),
}


def train(method: Any, moved_after: bool) -> ts.Sparsifier:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 32))
    if not moved_after:
        model.cuda()
    sparsifier = ts.sparsify(model, method, total_steps=24, steps_per_epoch=4, seed=1)
    model.cuda()
    optimizer = torch.optim.AdamW(sparsifier.param_groups(lr=1e-3), fused=True)
    sparsifier.attach(optimizer)
    for step in range(24):
        x = torch.randn(16, 64, generator=torch.Generator().manual_seed(step)).cuda()
        (model(x) - x[:, :32]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return sparsifier


@pytest.mark.parametrize("moved_after", [False, True], ids=["on the GPU", "moved there"])
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_the_sparsity_is_met_wherever_the_model_was_sparsified(method: Any, moved_after: bool) -> None:
    sparsifier = train(method, moved_after)
    kept = sum(
        int(layer.mask.sum()) if layer.mask is not None else layer.kept_count() for layer in sparsifier.layers.values()
    )
    total = 64 * 128 + 128 * 32
    assert abs(kept - kept_count(total, 0.75)) <= (0 if isinstance(method, OptG | SNFS | DSR) else 12)


def test_the_offset_is_the_cpus_and_is_found_without_a_synchronisation() -> None:
    weights = [torch.randn(300, 70), torch.randn(64, 64) * 0.1]
    logits = [torch.tensor([-3.0]), torch.tensor([-2.0])]
    most = [weight.numel() for weight in weights]
    expected = common_offset(weights, logits, most, 12_000)
    on_gpu = [weight.cuda() for weight in weights], [logit.cuda() for logit in logits]
    with no_synchronization():
        found = common_offset(*on_gpu, most, 12_000)
    assert found.item() == pytest.approx(expected.item(), abs=1e-4)
