"""DSR: one reallocation by hand, the adaptive threshold, and the periods that double."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import tritonsparse as ts
from tritonsparse.clock import Clock
from tritonsparse.methods import DSR


def start(**fields: Any) -> tuple[nn.ModuleList, torch.optim.Optimizer, ts.Sparsifier]:
    model = nn.ModuleList(nn.Linear(6, 1, bias=False) for _ in range(2))
    method = DSR(**{"sparsity": 0.5, "drop_fraction": 0.5, "threshold_init": 0.15, "update_every": 1, **fields})
    sparsifier = ts.sparsify(model, method, total_steps=100, seed=3)
    optimizer = torch.optim.SGD(sparsifier.param_groups(lr=0.0), momentum=0.5)
    sparsifier.attach(optimizer)
    for name, weights in (("0", [0.9, 0.1, -0.2, 0.0, 0.0, 0.0]), ("1", [0.05, -0.1, 0.3, 0.0, 0.0, 0.0])):
        view = sparsifier.layers[name]
        view.mask.copy_(torch.tensor([[True, True, True, False, False, False]]))
        view.weight.data = torch.tensor([weights])
        view.weight.grad = torch.ones(1, 6)
    return model, optimizer, sparsifier


def test_a_reallocation_by_hand() -> None:
    model, optimizer, sparsifier = start()
    optimizer.step()
    # Below .15: one weight of layer 0, two of layer 1. What remains is 2 and 1, so of the 3, layer 0 grows 2.
    first, second = (sparsifier.layers[name].mask[0] for name in "01")
    assert first[[0, 2]].all() and not first[1] and int(first[3:].sum()) == 2
    assert second[2] and not second[[0, 1]].any() and int(second[3:].sum()) == 1
    # Grown weights start at 0 without a past, dropped ones are 0; the others have not moved.
    assert model[0].weight[0].tolist() == pytest.approx([0.9, 0.0, -0.2, 0.0, 0.0, 0.0])
    assert model[1].weight[0].tolist() == pytest.approx([0.0, 0.0, 0.3, 0.0, 0.0, 0.0])
    assert optimizer.state[model[0].weight]["momentum_buffer"][0].tolist() == [1.0, 0.0, 1.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("drop_fraction", "threshold"),
    # K = 3 of 6: N_p = 3 is met, 1 is passed, 6 is not reached.
    [(0.5, 0.15), (1 / 6, 0.075), (1.0, 0.3)],
)
def test_the_threshold_is_halved_or_doubled_where_the_count_is_off_by_a_tenth(
    drop_fraction: float, threshold: float
) -> None:
    _, optimizer, sparsifier = start(drop_fraction=drop_fraction)
    optimizer.step()
    assert sparsifier.state_dict()["method_state"] == {"threshold": pytest.approx(threshold)}


def test_the_threshold_finds_the_number_to_drop() -> None:
    torch.manual_seed(0)
    model = nn.ModuleList([nn.Linear(64, 32, bias=False), nn.Linear(64, 32, bias=False)])
    sparsifier = ts.sparsify(
        model, DSR(sparsity=0.5, drop_fraction=0.1, threshold_init=1e-5, update_every=1), total_steps=100
    )
    optimizer = torch.optim.SGD(sparsifier.param_groups(lr=0.1))
    sparsifier.attach(optimizer)
    moved = []
    for _ in range(40):
        before = {name: layer.mask.clone() for name, layer in sparsifier.layers.items()}
        for layer in model:
            layer.weight.grad = 0.1 * torch.randn_like(layer.weight)
        optimizer.step()
        moved.append(sum(int((before[name] & ~layer.mask).sum()) for name, layer in sparsifier.layers.items()))
        assert sum(int(layer.mask.sum()) for layer in sparsifier.layers.values()) == 2048
    assert moved[0] < 20
    # H moves by factors of two, so the count stays around N_p = 204.8, not on it.
    assert 0.4 * 204.8 < sum(moved[-20:]) / 20 < 2.5 * 204.8


def test_a_layer_keeps_its_largest_weight_whatever_the_threshold() -> None:
    _, optimizer, sparsifier = start(threshold_init=10.0)
    optimizer.step()
    assert sparsifier.layers["0"].mask[0, 0] and sparsifier.layers["1"].mask[0, 2]
    assert sum(int(layer.mask.sum()) for layer in sparsifier.layers.values()) == 6


def test_the_count_holds_where_more_is_dropped_than_there_is_room() -> None:
    model = nn.ModuleList(nn.Linear(6, 1, bias=False) for _ in range(2))
    sparsifier = ts.sparsify(model, DSR(sparsity=0.2, threshold_init=10.0, update_every=1), total_steps=10)
    optimizer = torch.optim.SGD(sparsifier.param_groups(lr=0.0))
    sparsifier.attach(optimizer)
    for layer in model:
        layer.weight.grad = torch.zeros(1, 6)
    optimizer.step()
    assert sum(int(layer.mask.sum()) for layer in sparsifier.layers.values()) == 10


def test_the_period_doubles_at_the_papers_epochs() -> None:
    method, clock = DSR(sparsity=0.5, update_every=10), Clock(0, 1000, None)
    # Of 1000 steps: every 10 to 250, every 20 to 500, every 40 to 750, every 80 to 950.
    due = [step for step in range(1000) if method._due(step, clock)]
    assert due == [
        *range(10, 250, 10), *range(260, 500, 20), *range(520, 750, 40), *range(800, 950, 80)
    ]  # fmt: skip


def test_growth_differs_from_layer_to_layer_and_from_step_to_step_but_not_from_run_to_run() -> None:
    found = []
    for _ in range(2):
        _, optimizer, sparsifier = start()
        masks = []
        for _ in range(6):
            for layer in sparsifier.layers.values():
                layer.weight.grad = torch.ones(1, 6)
            optimizer.step()
            masks.append(tuple(tuple(layer.mask[0].tolist()) for layer in sparsifier.layers.values()))
        found.append(masks)
    assert found[0] == found[1] and len(set(found[0])) > 1


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"threshold_init": 0.0}, "a threshold_init above 0"),
        ({"doublings": (0.5, 0.25)}, "doublings as rising fractions"),
        ({"doublings": (1.5,)}, "doublings as rising fractions"),
        ({"update_every": 0}, "update_every of at least 1"),
        ({"drop_fraction": -0.1}, r"drop_fraction in \[0, 1\]"),
    ],
)
def test_fields_that_do_not_fit_are_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=f"dsr: expected {words}"):
        DSR(**{"sparsity": 0.5, **fields})


def test_n_of_m_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"'dsr' supports \(block, channel, unstructured\), got '2:4'"):
        ts.sparsify(nn.Linear(8, 8), DSR(sparsity=0.5), pattern="2:4", total_steps=10)
