"""Thresholds: DST's cut-offs by hand, STR's published schedule, and a sparsity to aim at for STR and AutoSparse."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from method_runs import Regression, Run, linear
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

import tritonsparse as ts
from tritonsparse.clock import Clock
from tritonsparse.methods import DST, STR, AutoSparse
from tritonsparse.methods.target_sparsity import common_offset, pruned_count
from tritonsparse.schedules import cubic

WEIGHT = [0.5, -0.25, 0.0], [0.1, 0.2, -0.3]


def test_cut_offs_start_at_zero_and_one_step_by_hand() -> None:
    run = Run(linear(*WEIGHT), DST())
    assert run.view.kind == "step" and run.view.threshold.tolist() == [0.0, 0.0]
    assert run.view.kept_count() == 5
    assert torch.equal(run.model(torch.eye(3)), run.view.weight.t())
    # y = W x with x = (1, 1, 1) and dL/dy = (1, 0): g = [[1, 1, 1], [0, 0, 0]].   t = (0.3, 0)
    view = Run(linear(*WEIGHT), DST(penalty=0.0)).view
    view.threshold.data[0] = 0.3
    view(torch.ones(3))[0].backward()
    # q = |w| - t = (0.2, -0.05, -0.3); H = 2 - 4|q| = (1.2, 1.8, 0.8)
    # m = 1[kept] + |w| H = (1 + 0.6, 0.45, 0)
    assert view.weight.grad[0].tolist() == pytest.approx([1.6, 0.45, 0.0])
    assert view.weight.grad[1].tolist() == [0.0, 0.0, 0.0]
    # dt = -sum(w H g) = -(0.6 - 0.45)
    assert view.threshold.grad.tolist() == pytest.approx([-0.15, 0.0])
    # A transposed weight has a cut-off for every output too.
    conv1d = Conv1D(2, 3)
    conv1d.weight.data = torch.tensor(WEIGHT).t().contiguous()
    view = Run(conv1d, DST(penalty=0.0)).view
    assert view.threshold.shape == (1, 2)
    view.threshold.data = torch.tensor([[0.3, 0.15]])
    assert view.effective_weight().t().tolist() == [[0.5, 0.0, 0.0], [0.0, pytest.approx(0.2), pytest.approx(-0.3)]]
    view(torch.ones(3))[0].backward()
    assert view.threshold.grad[0].tolist() == pytest.approx([-0.15, 0.0])


@pytest.mark.parametrize("scale", [None, 8.0])
def test_the_penalty_pushes_cut_offs_up_by_exp_minus_t(scale: float | None) -> None:
    run = Run(linear(*WEIGHT), DST(penalty=0.5), lr=1.0)
    threshold = run.view.threshold
    threshold.data, threshold.grad = torch.tensor([0.0, math.log(2.0)]), torch.zeros(2)
    run.before_step(scale)
    # d/dt penalty exp(-t) = -0.5 (1, 1/2)
    assert threshold.grad.tolist() == pytest.approx([-0.5 * (scale or 1.0), -0.25 * (scale or 1.0)])


def test_a_layer_that_fell_starts_again_after_the_step_and_its_weights_stay() -> None:
    run = Run(linear(*WEIGHT), DST(penalty=0.0, min_density=0.2))
    view = run.view
    view.threshold.data = torch.tensor([0.4, 0.4])  # keeps 1 of 6, at most 0.2
    weight = view.weight.detach().clone()
    view(torch.ones(3)).sum().backward()
    run.step()
    assert view.threshold.tolist() == [0.0, 0.0] and torch.equal(view.weight, weight)
    view.threshold.data = torch.tensor([0.4, 0.2])  # keeps 2
    run.step()
    assert view.threshold.tolist() == pytest.approx([0.4, 0.2])


def test_a_trained_model_gets_sparser_with_the_penalty() -> None:
    found = []
    for penalty in (0.0, 0.02):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 2))
        run = Run(model, DST(penalty=penalty), lr=0.1, weight_decay=1e-4, momentum=0.9, include=["*"])
        x = torch.randn(64, 8)

        def loss(model: nn.Module = model, x: torch.Tensor = x) -> torch.Tensor:
            return (model(x) - torch.stack([x[:, 0], x[:, 1] * 2], dim=1)).square().mean()

        run.train(60, loss)
        found.append((run.sparsifier.sparsity(), loss().item()))
    (loose, _), (tight, error) = found
    assert tight > loose + 0.1 and error < 0.3


STEPS_PER_EPOCH = 5005  # ImageNet at batch 256
DECAY = 2.251757813e-5
PUBLISHED = {10: -505.6, 20: -53.4, 25: -18.4, 30: -6.72, 35: -2.63}  # by running the published code


def learning_rate(epoch: int) -> float:
    """0.256 after five epochs of warm-up, then cosine to 0 over 95."""
    return 0.256 * ((epoch + 1) / 5 if epoch < 5 else 0.5 * (1 + math.cos(math.pi * (epoch - 5) / 95)))


def recurrence(epochs: int, steps: int = STEPS_PER_EPOCH) -> list[float]:
    """s after every epoch: v <- .875 v + wd s, s <- s - lr v; sigma'(s) underflows, so the loss has no part in it."""
    s, v, after = -3200.0, 0.0, []
    for epoch in range(epochs):
        for _ in range(steps):
            v = 0.875 * v + DECAY * s
            s -= learning_rate(epoch) * v
        after.append(s)
    return after


def train(epochs: int, steps: int = STEPS_PER_EPOCH) -> list[float]:
    run = Run(linear([0.5]), STR(threshold_init=-3200.0), lr=0.256, weight_decay=DECAY, momentum=0.875)
    s, after = run.view.threshold, []
    s.grad = torch.zeros(1)
    for epoch in range(epochs):
        for group in run.optimizer.param_groups:
            group["lr"] = learning_rate(epoch)
        for _ in range(steps):
            run.step()
        after.append(s.item())
    return after


@pytest.mark.parametrize("whole", [recurrence, pytest.param(train, marks=pytest.mark.long)])
def test_recurrence_and_threshold_follow_the_published_run_to_epoch_35(whole: Callable[[int], list[float]]) -> None:
    after = whole(35)
    assert {epoch: after[epoch - 1] for epoch in PUBLISHED} == pytest.approx(PUBLISHED, rel=2e-3)


def test_our_threshold_follows_the_recurrence_through_short_epochs() -> None:
    assert train(6, 100) == pytest.approx(recurrence(6, 100), rel=1e-5)


Build = Callable[..., Any]


def logit(value: float) -> float:
    return math.log(value / (1.0 - value))


class Aimed(Regression):
    """A regression of a sparse map."""

    def __init__(self, method: Any, steps: int, lr: float = 3e-3) -> None:
        generator = torch.Generator().manual_seed(1)
        truth = torch.randn(32, 32, generator=generator) * (torch.rand(32, 32, generator=generator) < 0.2)
        super().__init__(method, steps, truth, width=64, lr=lr)

    def logits(self) -> list[float]:
        return [view.threshold.item() for view in self.views]


def test_the_offset_by_hand() -> None:
    # Thresholds .1 and .2; |W| in logits: the weights are pruned one after the other as both thresholds rise.
    weights = [torch.tensor([0.05, -0.15, 0.5]), torch.tensor([[0.25], [-0.6]])]
    logits = [torch.tensor([logit(0.1)]), torch.tensor([logit(0.2)])]
    # Where each falls: logit |W| - s.
    falls = sorted([*(logit(w) - logit(0.1) for w in (0.05, 0.15, 0.5)), *(logit(w) - logit(0.2) for w in (0.25, 0.6))])
    for wanted in range(1, 6):
        found = float(common_offset(weights, logits, [3, 2], wanted))
        assert found == pytest.approx(falls[wanted - 1], abs=1e-4)
        assert sum(int(pruned_count(w, s, found)) for w, s in zip(weights, logits, strict=True)) == wanted
    # The first layer keeps two whatever happens: three are reached at the second layer's last weight.
    assert float(common_offset(weights, logits, [1, 2], 3)) == pytest.approx(logit(0.6) - logit(0.2), abs=1e-4)
    # Out of reach, and nothing to prune.
    assert float(common_offset(weights, logits, [1, 1], 4)) == 4.0
    assert float(common_offset(weights, logits, [3, 2], 0)) == pytest.approx(-4.0, abs=1e-4)


@settings(max_examples=20, deadline=None)
@given(sizes=st.lists(st.integers(1, 60), min_size=1, max_size=4), share=st.floats(0.0, 1.0), seed=st.integers(0, 999))
def test_the_offset_prunes_what_is_wanted_and_not_one_more(sizes: list[int], share: float, seed: int) -> None:
    torch.manual_seed(seed)
    # Logits of |W| a hundredth apart, so that an offset to 3e-5 tells any two of them apart.
    order = iter(torch.randperm(sum(sizes)).tolist())
    weights = [torch.sigmoid(torch.tensor([-3.0 + 0.01 * next(order) for _ in range(size)])) for size in sizes]
    logits = [torch.full((1,), -3.0 + 0.01 * number + 0.005) for number in range(len(sizes))]
    wanted = max(1, round(share * sum(sizes)))
    found = common_offset(weights, logits, sizes, wanted)
    # Layers' logits differ by hundredths too: two weights of two layers may fall together.
    pruned = sum(int(pruned_count(w, s, found)) for w, s in zip(weights, logits, strict=True))
    fewer = sum(int(pruned_count(w, s, found - 1e-3)) for w, s in zip(weights, logits, strict=True))
    assert pruned >= wanted > fewer


PULLED = {"threshold_weight_decay": 0.05, "threshold_lr_scale": 10.0, "control_every": 2}


@pytest.mark.parametrize(
    "method",
    [
        *(STR(sparsity=0.5, control_every=10), AutoSparse(sparsity=0.8, control_every=10)),
        *(STR(sparsity=0.95, **PULLED), AutoSparse(sparsity=0.8, **PULLED)),
    ],
    ids=["str", "autosparse", "str, pulled", "autosparse, pulled"],
)
def test_the_target_is_met_whatever_pulls_at_the_thresholds(method: STR) -> None:
    run = Aimed(method, 120)
    seen = run.seen(120)
    assert seen[-1] == pytest.approx(method.sparsity, abs=1e-3)
    # Held, within three points between corrections in so short a run, from `reach_by` on.
    assert max(abs(value - method.sparsity) for value in seen[90:]) < 0.03
    low, high = sorted(run.logits())
    assert high - low > 0.01, "the layers' thresholds must be free to differ"


def test_sparsity_follows_the_cubic_from_where_it_starts() -> None:
    run = Aimed(STR(sparsity=0.9, threshold_init=-4.0, control_every=5), 60)
    before = run.sparsifier.sparsity()
    assert 0.02 < before < 0.5
    seen = run.seen(60)
    for step in range(5, 61, 5):
        assert seen[step - 1] == pytest.approx(cubic(step, 45, before, 0.9), abs=2e-3), step
    assert run.method.wanted(Clock(0, 60)) == pytest.approx(before) and run.method.wanted(Clock(45, 60)) == 0.9


def test_all_logits_move_by_the_same_offset_also_to_a_target_below_the_start() -> None:
    run = Aimed(STR(sparsity=0.8, control_every=1, threshold_init=-3.0), 20, lr=0.0)
    first, second = run.views
    with torch.no_grad():
        second.threshold.sub_(0.75)
    run.seen(20)
    assert (first.threshold - second.threshold).item() == pytest.approx(0.75, abs=1e-4)
    assert run.sparsifier.sparsity() == pytest.approx(0.8, abs=1e-3)
    assert first.threshold.item() > -3.0
    # A target below the start brings weights back.
    run = Aimed(STR(sparsity=0.1, threshold_init=-2.0), 40)
    assert run.sparsifier.sparsity() > 0.6
    assert run.seen(40)[-1] == pytest.approx(0.1, abs=1e-3)


def test_no_target_leaves_the_logits_to_training_alone() -> None:
    """The paper: with no target and nothing to floor, the controller must not be there."""
    runs = [Aimed(STR(threshold_init=-3.0, min_density=floor), 20) for floor in (0.0, 0.01)]
    for run in runs:
        run.seen(20)
    assert runs[0].logits() == runs[1].logits() != [-3.0, -3.0]
    assert runs[0].sparsifier.state_dict()["method_state"] == {}


@pytest.mark.parametrize("cls", [STR, AutoSparse])
def test_a_target_of_zero_is_the_dense_model(mlp: Build, cls: Any) -> None:
    run = Run(mlp(), cls(sparsity=0.0), lr=0.1, total_steps=4, steps_per_epoch=2)
    assert [(view.kind, view.threshold) for view in run.views] == [("dense", None)] * 2
    run.train(4, lambda: run.model(torch.randn(2, 8)).sum())
    assert run.sparsifier.sparsity() == 0.0


def test_a_layer_that_runs_away_is_held_at_its_floor_and_named_once(caplog: pytest.LogCaptureFixture) -> None:
    run = Aimed(STR(threshold_init=-6.0, min_density=0.02, control_every=2), 40, lr=0.0)
    layer = run.sparsifier.layers["2"]
    with caplog.at_level(logging.WARNING, "tritonsparse"):
        for _ in range(4):
            with torch.no_grad():
                layer.threshold.fill_(0.0)  # T = 1/2, above every weight
            assert layer.kept_count() == 0
            run.seen(2)
            # round(.02 x 2048) = 41
            assert layer.kept_count() == 41
    assert [record.message for record in caplog.records] == [
        "str: step 2: layer 2 kept less than min_density = 0.02 of its weights; its threshold is held where it keeps "
        "as many (said once)"
    ]
    assert run.sparsifier.layers["0"].threshold.item() == -6.0
    # Half-way between the last weight to keep and the next.
    top = layer.weight.detach().abs().flatten().topk(42).values
    assert torch.sigmoid(layer.threshold).item() == pytest.approx(float(0.5 * (top[40] + top[41])), rel=1e-5)


def test_the_target_is_met_around_a_layer_at_its_floor_and_without_a_floor_a_layer_may_empty() -> None:
    run = Aimed(STR(sparsity=0.7, min_density=0.1, control_every=1), 20, lr=0.0)
    with torch.no_grad():
        run.sparsifier.layers["2"].weight.mul_(0.01)  # all of it would go first
    assert run.seen(20)[-1] == pytest.approx(0.7, abs=1e-3)
    kept = {name: layer.kept_count() / layer.weight.numel() for name, layer in run.sparsifier.layers.items()}
    assert kept["2"] == pytest.approx(0.1, abs=1e-3) and kept["0"] == pytest.approx(0.5, abs=1e-3)
    run = Aimed(STR(threshold_init=-6.0, min_density=0.0, control_every=1), 40, lr=0.0)
    with torch.no_grad():
        run.sparsifier.layers["2"].threshold.fill_(0.0)
    run.seen(2)
    assert run.sparsifier.layers["2"].kept_count() == 0


def test_sparsify_takes_a_target_and_a_saved_model_is_aimed_as_before(gpt2: Build, tmp_path: Path) -> None:
    sparsifier = ts.sparsify(gpt2(), "autosparse", sparsity=0.8, total_steps=10, steps_per_epoch=5)
    assert sparsifier.method.sparsity == 0.8
    assert {layer.kind for layer in sparsifier.layers.values()} == {"soft"}
    sparsifier = ts.sparsify(gpt2(), STR(sparsity=0.9, threshold_init=-4.0), total_steps=40)
    sparsifier.save_pretrained(tmp_path)
    _, again = ts.load(tmp_path, AutoModelForCausalLM)
    assert again.method == sparsifier.method
    # Not the start of the loaded weights, whose zeros count as pruned.
    assert again.method.wanted(Clock(10, 40)) == sparsifier.method.wanted(Clock(10, 40)) < 0.9
