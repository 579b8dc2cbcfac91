"""AutoSparse and STR on blocks: gates, scores and masks by hand, the target, the floor, and a topology to be found."""

from __future__ import annotations

import logging
import math
from typing import Any

import pytest
import torch
from method_runs import Regression, Run, linear
from small_runs import assert_same
from torch import Tensor

from tritonsparse.masks.units import from_units, to_units
from tritonsparse.methods import STR, AutoSparse
from tritonsparse.methods.block_autosparse import across_layers, block_scores
from tritonsparse.pattern import Block
from tritonsparse.schedules import cubic


def start(method: STR, steps: int = 4) -> Run:
    """One row of three blocks of two."""
    row = linear([1.0, -2.0, 3.0, 1.0, 0.5, -0.5])
    return Run(row, method, pattern="block:1x2", total_steps=steps, steps_per_epoch=2)


def constant(alpha: float = 0.5, **fields: Any) -> AutoSparse:
    return AutoSparse(**{"sparsity": 0.6, "alpha_schedule": "constant", "alpha": alpha, "control_every": 1, **fields})


def test_the_score_of_a_block_and_how_layers_compare_by_hand() -> None:
    weight = torch.tensor([[1.0, 2.0, 0.0, 1.0], [3.0, 4.0, -1.0, 2.0]])
    gradient = torch.tensor([[1.0, -1.0, 5.0, 2.0], [0.5, 0.25, 1.0, 0.0]])
    # 1 + 2 + 1.5 + 1;  0 + 2 + 1 + 0
    assert block_scores(gradient, weight, Block(2, 2)).tolist() == [[5.5, 3.0]]
    assert block_scores(gradient, weight, Block(1, 4)).tolist() == [[5.0], [3.5]]
    assert block_scores(gradient.half(), weight.half(), Block(2, 2)).dtype == torch.float32
    # By how they spread what they are worth. Mean 4; sixteen times the worth counts as much.
    score = torch.tensor([[1.0, 7.0], [8.0, 0.0]])
    assert across_layers(score).tolist() == [[0.25, 1.75], [2.0, 0.0]]
    assert torch.equal(across_layers(16.0 * score), across_layers(score))
    assert across_layers(torch.zeros(2, 2)).tolist() == [[0.0, 0.0], [0.0, 0.0]]


def test_a_score_sums_what_autograd_and_differences_say_of_a_gate_a_weight() -> None:
    torch.manual_seed(0)
    pattern, x = Block(2, 3), torch.randn(5, 6, dtype=torch.float64)
    weight = torch.randn(4, 6, dtype=torch.float64)

    def loss(gates: Tensor) -> Tensor:
        return (torch.tanh(x @ (gates * weight).t()) ** 3).sum()

    # Open and closed blocks, and gates are differentiated in both.
    blocks = torch.tensor([[True, False], [False, True]])
    gates = from_units(blocks, pattern, (4, 6)).to(torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(loss, gates)
    (expected,) = torch.autograd.grad(loss(gates), gates)
    view = (gates.detach() * weight).requires_grad_()
    (torch.tanh(x @ view.t()) ** 3).sum().backward()
    assert view.grad is not None
    assert torch.allclose(block_scores(view.grad, weight, pattern), to_units(expected.abs(), pattern), rtol=1e-12)


GRADIENT = torch.tensor([1.0, 0.0, 0.0, -2.0, 8.0, -8.0])


@pytest.mark.parametrize("scale", [None, 8.0])
def test_scores_and_masks_by_hand(scale: float | None) -> None:
    run = start(constant(reach_by=0.0))
    view = run.view
    run.give(GRADIENT * (scale or 1.0))
    # sum |G W| = 1, 2, 8; beta = .98
    run.before_step(scale)
    assert run.saved("scores") == pytest.approx([0.02, 0.04, 0.16])
    run.sparsifier.clock.step += 1
    run.method.after_step(run.sparsifier.layers, run.sparsifier.clock, run.optimizer)
    # .4 of 3 blocks is one: the smallest by norm, the one that the loss asks for.
    assert run.masks() == [[[0, 0, 0, 0, 1, 1]]]
    assert (view.kind, float(view.alpha), view.threshold) == ("mask", 0.5, None)
    x = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]])
    assert run.model(x).item() == 0.5 * 5.0 - 0.5 * 6.0
    view.weight.grad = None
    assert run.gradient(x) == [0.5, 1.0, 1.5, 2.0, 5.0, 6.0]
    run.before_step()
    # .5 + 2, 4.5 + 2, 2.5 + 3
    expected = [0.98 * old + 0.02 * new for old, new in zip([0.02, 0.04, 0.16], [2.5, 6.5, 5.5], strict=True)]
    assert run.saved("scores") == pytest.approx(expected)


def test_b_is_what_is_kept_and_the_largest_of_the_rest_while_alpha_is_above_zero() -> None:
    run = start(constant(reach_by=0.0, backward_density=0.67))
    run.step(GRADIENT)
    # Two of three blocks: the kept one, and the second, of norm sqrt(10), before the first, of norm sqrt(5).
    assert run.view.grad_mask.int().tolist() == [[0, 0, 1, 1, 1, 1]]
    run.view.weight.grad = None
    assert run.gradient(torch.ones(1, 6)) == [0.0, 0.0, 0.5, 0.5, 1.0, 1.0]
    assert run.method.densities(run.view, 1 / 3).grad_weight == pytest.approx(0.67)
    # Once alpha is zero it is what is kept; STR has none.
    run = start(constant(zero_alpha_epoch=1, reach_by=0.5), steps=8)
    view = run.view
    for step in range(1, 5):
        run.step(torch.randn(6))
        # Two steps an epoch.
        assert view.grad_mask is None if step < 2 else torch.equal(view.grad_mask, view.mask)
    assert view.mask.sum() == 2
    view = start(STR(sparsity=0.6)).view
    assert (view.alpha, view.grad_mask) == (None, None)
    # No sparsity is dense.
    for method in (AutoSparse(sparsity=0.0), AutoSparse(threshold_init=-math.inf)):
        run = start(method)
        assert run.view.kind == "dense" and run.method.state_dict().keys() <= {"initial_sparsity"}


def test_pruned_blocks_may_get_their_gradients_in_every_rth_step_alone() -> None:
    run = start(constant(alpha=0.5, reach_by=0.0, refresh_every=3), steps=8)
    view, seen = run.view, []
    for _ in range(6):
        run.step(1.0)
        seen.append(float(view.alpha))
        # Where nothing reaches pruned blocks, a mask says so, by which their part of dW is skipped.
        assert view.grad_mask is None if view.alpha > 0 else torch.equal(view.grad_mask, view.mask)
        # A third of the steps computes all of dW, the others a third of it.
        assert run.method.densities(view, 1 / 3).grad_weight == pytest.approx(1 / 3 + (2 / 3) / 3)
    assert seen == [0.0, 0.0, 1.5, 0.0, 0.0, 1.5]


class Planted(Regression):
    """A regression on blocks of eight in which the first 16 inputs and no others say anything of the outputs."""

    def __init__(self, method: STR, steps: int) -> None:
        truth = torch.randn(32, 32, generator=torch.Generator().manual_seed(1))
        truth[:, 16:] = 0.0
        super().__init__(method, steps, truth, width=48, pattern="block:8")

    def units(self) -> dict[str, Tensor]:
        layers = self.sparsifier.layers.items()
        return {name: to_units(layer.mask.float(), Block(8, 8)) / 64.0 for name, layer in layers}


@pytest.mark.parametrize("method", [STR(sparsity=0.7), AutoSparse(sparsity=0.7)], ids=["str", "autosparse"])
def test_the_target_is_met_to_one_block_along_the_cubic_without_a_cliff(method: STR) -> None:
    run, blocks = Planted(method, 100), 48
    seen = run.seen(100)
    assert seen[-1] == pytest.approx(0.7, abs=0.5 / blocks + 1e-9)
    for step in range(10, 101, 10):
        assert seen[step - 1] == pytest.approx(cubic(step, 75, 0.0, 0.7), abs=0.5 / blocks + 1e-6), step
    # Between two looks no more moves than the cubic's steepest ten steps, at its start, and a block.
    steps = [after - before for before, after in zip([0.0, *seen], seen, strict=False)]
    assert max(steps) <= 3 * 0.7 * 10 / 75 + 1 / blocks and min(steps) >= -1e-9
    assert all(set(unit.unique().tolist()) <= {0.0, 1.0} for unit in run.units().values())


def test_gates_find_the_inputs_that_matter_and_layers_come_to_differ() -> None:
    run = Planted(AutoSparse(sparsity=0.6, control_every=10), 160)
    assert run.units()["0"].sum(0).tolist() == [6.0] * 4
    run.seen(160)
    first, second = run.units()["0"], run.units()["2"]
    # Input blocks 0 and 1 carry everything; norms started alike.
    assert first[:, :2].sum() > 4 * first[:, 2:].sum()
    assert abs(float(first.mean()) - float(second.mean())) > 0.02


def test_what_is_pruned_comes_back_only_while_alpha_is_above_zero() -> None:
    returned = {}
    for alpha in (0.0, 0.75):
        run = Planted(AutoSparse(sparsity=0.7, alpha=alpha, alpha_schedule="constant", control_every=2), 120)
        before, returned[alpha] = run.units(), 0
        for _ in range(60):
            run.seen(2)
            after = run.units()
            returned[alpha] += sum(int(((after[name] > 0) & (before[name] == 0)).sum()) for name in after)
            before = after
    assert returned[0.0] == 0 < returned[0.75]


def test_no_layer_falls_below_the_floor_and_it_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    kept = {}
    for floor in (0.0, 0.25, None):
        run = Planted(AutoSparse(sparsity=0.7, min_density=floor), 20)
        # A layer whose first gate alone is worth anything: its other blocks go first.
        with torch.no_grad():
            run.model[2].weight[:, 8:] = 0.0
            run.model[2].weight.requires_grad_(False)
        with caplog.at_level(logging.WARNING):
            caplog.clear()
            run.sparsifier.layers["2"].weight.grad = torch.zeros(32, 48)
            run.sparsifier.method._gates.scores["2"][0, 0] = 1.0
            run.seen(20)
        assert sum(int(unit.sum()) for unit in run.units().values()) == 14  # .3 of 48
        kept[floor] = int(run.units()["2"].sum())
        said = [("min_density" in record.message, "layer 2" in record.message) for record in caplog.records]
        assert said == ([] if floor == 0.0 else [(True, True)])
    # None: half of .3, of 24 blocks.
    assert kept == {0.0: 1, 0.25: 6, None: 4}


def test_saved_and_loaded_it_goes_on_as_if_never_stopped_with_gradients_in_every_other_step() -> None:
    method = AutoSparse(sparsity=0.7, backward_density=0.8, refresh_every=2)
    unbroken, first, second = (Planted(method, 30) for _ in range(3))
    unbroken.seen(30)
    first.seen(13)
    for ours, theirs in zip(second.parts, first.parts, strict=True):
        ours.load_state_dict(theirs.state_dict())
    second.seen(17)
    for ours, theirs in zip(second.parts, unbroken.parts, strict=True):
        assert_same(ours.state_dict(), theirs.state_dict())
    assert second.sparsifier.state_dict()["tensors"].keys() >= {"method:scores/0", "method:scores/2"}
    # A layer without a gradient keeps its scores.
    run, scores = second, second.method._gates.scores
    before = {name: score.clone() for name, score in scores.items()}
    run.model[0].weight.grad, run.model[2].weight.grad = None, torch.zeros(32, 48)
    run.before_step()
    assert torch.equal(scores["0"], before["0"]) and torch.allclose(scores["2"], 0.98 * before["2"])
