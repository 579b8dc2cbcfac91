"""MEST: one update by hand, its stages, and the importance that the published code loses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import tritonsparse as ts
from tritonsparse.methods import MEST


def start(**fields: Any) -> tuple[nn.Linear, torch.optim.Optimizer, ts.Sparsifier]:
    layer = nn.Linear(10, 1, bias=False)
    method = MEST(**{"sparsity": 0.5, "update_every": 1, **fields})
    sparsifier = ts.sparsify(layer, method, total_steps=8, seed=1)
    view = sparsifier.layers[""]
    view.mask.copy_(torch.tensor([[True] * 5 + [False] * 5]))
    layer.weight.data = torch.tensor([[0.5, -0.1, 0.2, 0.4, 0.3, 0, 0, 0, 0, 0]])
    optimizer = torch.optim.SGD(sparsifier.param_groups(lr=0.0))
    sparsifier.attach(optimizer)
    return layer, optimizer, sparsifier


def step(layer: nn.Linear, optimizer: torch.optim.Optimizer, gradient: list[float] | None = None) -> None:
    layer.weight.grad = torch.tensor([gradient or [0.0] * 10])
    optimizer.step()


def test_an_update_prunes_too_much_and_grows_back_at_random() -> None:
    layer, optimizer, sparsifier = start(mutation=(0.2, 0.0), softness=(0.0, 0.0), stages=(0.5,))
    step(layer, optimizer)  # step 0: no update
    assert sparsifier.layers[""].mask[0, :5].all()
    step(layer, optimizer)
    mask = sparsifier.layers[""].mask[0]
    # To .7: .1 and .2 go, three stay; back to .5: two of the other seven, at value 0.
    assert mask[[0, 3, 4]].all() and int(mask.sum()) == 5
    assert layer.weight[0].tolist() == pytest.approx([0.5, 0.0, 0.0, 0.4, 0.3, 0, 0, 0, 0, 0])


def test_the_gradient_counts_in_the_importance() -> None:
    """The published code takes it after zero_grad."""
    gradient = [0.0, 5.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    for weight, value in ((0.0, 0.0), (0.1, -0.1)):
        layer, optimizer, _ = start(mutation=(0.1, 0.0), softness=(0.0, 0.0), stages=(0.5,), gradient_weight=weight)
        step(layer, optimizer)
        step(layer, optimizer, gradient)
        # |-.1| + .1 x 5 = .6 is the largest, |-.1| alone the smallest: gone, and 0 even if chance grows it again.
        assert layer.weight[0, 1].item() == pytest.approx(value)


def test_soft_memory_falls_to_the_sparsity_and_freezes() -> None:
    layer, optimizer, sparsifier = start(softness=(0.3, 0.1, 0.0), mutation=(0.0, 0.0, 0.0), stages=(0.5, 0.75))
    counts, masks = [], []
    for _ in range(8):
        step(layer, optimizer)
        counts.append(int(sparsifier.layers[""].mask.sum()))
        masks.append(sparsifier.layers[""].mask.clone())
    # Stages begin at steps 4 and 6: 10 x (1 - .5 + .3) = 8, then 6, then 5 for good.
    assert counts == [5, 8, 8, 8, 6, 6, 5, 5]
    assert torch.equal(masks[6], masks[7])


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"mutation": (0.1,)}, "as many values of mutation as of softness"),
        ({"mutation": (0.1, 0.1, 0.1)}, "to end with 0"),
        ({"mutation": (0.6, 0.1, 0.0)}, r"to stay in \[0, 1\)"),
        ({"stages": (0.8, 0.2)}, "rising fractions"),
        ({"update_every": 0}, "update_every of at least 1"),
    ],
)
def test_fields_that_do_not_fit_are_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        MEST(sparsity=0.5, **fields)
