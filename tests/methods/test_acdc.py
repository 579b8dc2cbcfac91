"""AC/DC: the paper's phase tables epoch by epoch, its update by hand, and the dense twin."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import tritonsparse as ts
from tritonsparse.methods import ACDC, PHASES, Phases

TURNS = Phases([(0, "dense"), (1, "sparse"), (2, "dense"), (3, "sparse")], 4)


def spans(*pairs: tuple[int, int]) -> set[int]:
    return {epoch for first, last in pairs for epoch in range(first, last + 1)}


@pytest.mark.parametrize(
    ("name", "sparse"),
    [
        # Peste et al., figure 1 and the published configurations; epochs from 0.
        ("imagenet100", spans(*((start, start + 4) for start in range(10, 80, 10)), (85, 99))),
        ("imagenet150", spans(*((start, start + 4) for start in range(10, 130, 10)), (135, 149))),
        ("imagenet200", spans(*((start, start + 4) for start in range(10, 180, 10)), (185, 199))),
        ("cifar100", spans((10, 29), (50, 69), (90, 109), (130, 149), (170, 199))),
        ("transfoxl48", spans((5, 7), (11, 13), (17, 19), (23, 25), (29, 31), (39, 47))),
    ],
)
def test_the_papers_tables_epoch_by_epoch(name: str, sparse: set[int]) -> None:
    table = PHASES[name]
    assert {epoch for epoch in range(int(table.epochs)) if table.at(7 * epoch, 7) == "sparse"} == sparse
    # A phase holds for all steps of its epochs.
    assert {step // 7 for step in range(7 * int(table.epochs)) if table.at(step, 7) == "sparse"} == sparse


def test_the_share_of_sparse_epochs_is_the_papers() -> None:
    for name, sparse in (("imagenet100", 50), ("transfoxl48", 24), ("cifar100", 110)):
        epochs = range(int(PHASES[name].epochs))
        assert sum(PHASES[name].at(epoch, 1) == "sparse" for epoch in epochs) == sparse


def test_a_table_scales_to_another_length() -> None:
    short = PHASES["transfoxl48"].scaled(12)
    # A quarter of 48: sparse from epoch 1.25 and from 9.75, exact at 4 steps an epoch.
    assert [short.at(step, 4) for step in (4, 5, 7, 8)] == ["dense", "sparse", "sparse", "dense"]
    assert (short.at(38, 4), short.at(39, 4), short.at(47, 4)) == ("dense", "sparse", "sparse")


@pytest.mark.parametrize(
    ("starts", "epochs"),
    [
        ([], 4),
        ([(1, "dense")], 4),
        ([(0, "dense"), (0, "sparse")], 4),
        ([(0, "dense"), (4, "sparse")], 4),
        ([(0, "d")], 4),
    ],
)
def test_a_table_that_does_not_rise_from_zero_is_refused(starts: list[Any], epochs: int) -> None:
    with pytest.raises(ValueError, match="correct the table"):
        Phases(starts, epochs)


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 1, bias=False), nn.Linear(2, 1, bias=False)
        self.a.weight.data = torch.tensor([[0.5, -0.1, 0.3, 0.2]])
        self.b.weight.data = torch.tensor([[-0.9, 0.05]])


def start(**fields: Any) -> tuple[Two, ts.Sparsifier, torch.optim.Optimizer]:
    model = Two()
    method = ACDC(sparsity=0.5, phases=TURNS, **fields)
    sparsifier = ts.sparsify(model, method, total_steps=8, steps_per_epoch=2)
    optimizer = torch.optim.SGD(sparsifier.param_groups(lr=0.1), momentum=0.5)
    sparsifier.attach(optimizer)
    return model, sparsifier, optimizer


def step(model: Two, optimizer: torch.optim.Optimizer, gradient: float = 0.0) -> None:
    for layer in (model.a, model.b):
        layer.weight.grad = torch.full_like(layer.weight, gradient)
    optimizer.step()
    optimizer.zero_grad()


def test_the_update_by_hand() -> None:
    model, sparsifier, optimizer = start()
    kinds = lambda: {layer.kind for layer in sparsifier.layers.values()}  # noqa: E731
    step(model, optimizer)
    assert kinds() == {"dense"}
    step(model, optimizer)
    # The sparse phase begins: of .5 .1 .3 .2 | .9 .05 the three largest over both layers are .9, .5, .3.
    assert kinds() == {"mask"}
    assert sparsifier.layers["a"].mask.int().tolist() == [[1, 0, 1, 0]]
    assert sparsifier.layers["b"].mask.int().tolist() == [[1, 0]]
    # The dense twin is still there, and the view is the sparse model.
    assert model.a.weight.tolist() == [pytest.approx([0.5, -0.1, 0.3, 0.2])]
    assert sparsifier.finalized_state_dict()["a.weight"].tolist() == [pytest.approx([0.5, 0.0, 0.3, 0.0])]
    assert sparsifier.trained_state_dict()["a.weight"].tolist() == [pytest.approx([0.5, -0.1, 0.3, 0.2])]
    step(model, optimizer)
    assert sparsifier.trained_state_dict()["a.weight"].tolist() == [pytest.approx([0.5, 0.0, 0.3, 0.0])]
    assert model.a.weight.tolist() == [pytest.approx([0.5, 0.0, 0.3, 0.0])]
    step(model, optimizer, gradient=-1.0)
    # Dense again: what was pruned is 0 and is trained from there.
    assert kinds() == {"dense"}
    assert model.a.weight.tolist() == [pytest.approx([0.6, 0.0, 0.4, 0.0])]
    step(model, optimizer, gradient=-1.0)
    # No momentum from before the phase: 0.1 each, not 0.15.
    assert model.a.weight.tolist() == [pytest.approx([0.7, 0.1, 0.5, 0.1])]


def test_moments_are_reset_only_where_a_dense_phase_starts_and_only_if_asked() -> None:
    for reset, expected in ((True, 0.1), (False, 0.15)):
        model, _, optimizer = start(reset_moments=reset)
        for number in range(4):
            step(model, optimizer, gradient=-1.0 if number == 3 else 0.0)
        before = model.a.weight[0, 0].item()
        step(model, optimizer, gradient=-1.0)
        assert model.a.weight[0, 0].item() - before == pytest.approx(expected)


def test_uniform_scope_prunes_each_layer_alike() -> None:
    model, sparsifier, optimizer = start(scope="uniform")
    step(model, optimizer)
    step(model, optimizer)
    assert {name: int(layer.mask.sum()) for name, layer in sparsifier.layers.items()} == {"a": 2, "b": 1}


def test_strict_keeps_one_less_as_the_published_code() -> None:
    model, sparsifier, optimizer = start(strict=True)
    step(model, optimizer)
    step(model, optimizer)
    # k = ceil(6 x .5) = 3: what lies strictly above the third largest.
    assert sparsifier.layers["a"].mask.int().tolist() == [[1, 0, 0, 0]]
    assert sparsifier.layers["b"].mask.int().tolist() == [[1, 0]]


def test_statistics_tell_how_masks_change_and_what_stays_dead() -> None:
    model, sparsifier, optimizer = start()
    for _ in range(4):
        step(model, optimizer)
    for _ in range(2):
        step(model, optimizer)
    # No gradient revived a, b's pruned weights: 3 of 6 are exactly 0 when the second mask is chosen, the same one.
    assert sparsifier.method.statistics() == {
        "dead at step 2": 0.0,
        "dead at step 6": 0.5,
        "mask change at step 6": 0.0,
    }
    saved = sparsifier.state_dict()
    _, other, _ = start()
    other.load_state_dict(saved)
    assert other.method.statistics() == sparsifier.method.statistics()


def test_a_run_of_another_length_than_the_table_is_refused() -> None:
    with pytest.raises(ValueError, match=r"a run of 100 epochs.*got 3; pass phases=Phases\(...\).scaled\(3\)"):
        ts.sparsify(Two(), ACDC(sparsity=0.5), total_steps=6, steps_per_epoch=2)
    with pytest.raises(ValueError, match="expected steps_per_epoch="):
        ts.sparsify(Two(), ACDC(sparsity=0.5), total_steps=6)
    with pytest.raises(ValueError, match="phases as a Phases table or one of imagenet100"):
        ACDC(sparsity=0.5, phases="imagenet")
