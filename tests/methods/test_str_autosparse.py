"""STR and AutoSparse on layers small enough to follow by hand, and auto-tuned alpha against the published listing."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from method_runs import Run, linear
from torch import nn

from tritonsparse.clock import Clock
from tritonsparse.methods import STR, AutoSparse, AutoTune, Dense
from tritonsparse.schedules import sigmoid_cosine

W = [0.75, -0.25, -1.0, 0.5]


def constant(alpha: float, s: float = 0.0, **fields: Any) -> AutoSparse:
    return AutoSparse(threshold_init=s, alpha=alpha, alpha_schedule="constant", **fields)


# s = 0: T = 1/2, sigma' = 1/4.   W = [3/4, -1/4, -1, 1/2]: kept, pruned, kept, pruned (a tie with T).
# What = [1/4, 0, -1/2, 0].   x = [1, 2, 4, -8], dy = 2: G = dy x = [2, 4, 8, -16].
# m = [1, a, 1, a] and ds = -1/4 sum sign(W) m G = -1/4 (2 - 4 a - 8 - 16 a) = 3/2 + 5 a.
@pytest.mark.parametrize(
    ("method", "grad_weight", "grad_threshold"),
    [
        (STR(threshold_init=0.0), [2, 0, 8, 0], 1.5),
        (constant(0.5), [2, 2, 8, -8], 4.0),
        (constant(1.0), [2, 4, 8, -16], 6.5),
        # B = the largest 2 of 4 = the kept ones: what is pruned gets nothing.
        (constant(0.5, backward_density=0.5), [2, 0, 8, 0], 1.5),
        # B = the largest 3: the tie is in, -1/4 is out.   ds = -1/4 (2 - 8 - 8)
        (constant(0.5, backward_density=0.75), [2, 0, 8, -8], 3.5),
    ],
    ids=lambda value: repr(value) if isinstance(value, STR) else "",
)
def test_one_update_by_hand(method: STR, grad_weight: list[float], grad_threshold: float) -> None:
    run, x = Run(linear(W), method, lr=0.125), torch.tensor([[1.0, 2.0, 4.0, -8.0]], requires_grad=True)
    y = run.model(x)
    assert y.item() == 1 * 0.25 + 4 * -0.5
    y.backward(torch.tensor([[2.0]]))
    assert x.grad.tolist() == [[0.5, 0.0, -1.0, 0.0]]
    assert run.view.weight.grad.tolist() == [grad_weight]
    assert run.view.threshold.grad.tolist() == [grad_threshold]
    run.step()
    assert run.view.weight.tolist() == [[w - g / 8 for w, g in zip(W, grad_weight, strict=True)]]
    assert run.view.threshold.item() == -grad_threshold / 8


def test_exact_zeros_never_move_and_kept_weights_get_their_gradient_even_where_they_outnumber_b() -> None:
    run = Run(linear([0.0, 0.75]), constant(1.0))
    # A zero has no sign: ds = -1/4 (0 + 2)
    assert run.gradient(torch.full((1, 2), 2.0)) == [0.0, 2.0] and run.view.threshold.grad.tolist() == [-0.5]
    # All four pass T = 1/2.
    run = Run(linear([0.75, -0.875, -1.0, 0.625]), constant(0.5, backward_density=0.25))
    assert run.gradient(torch.full((1, 4), 2.0)) == [2.0, 2.0, 2.0, 2.0] and int(run.view.grad_mask.sum()) == 1


def test_str_is_autosparse_without_annealing(mlp: Any) -> None:
    x, results = torch.randn(4, 8), []
    for method in (STR(threshold_init=-2.0), constant(0.0, -2.0)):
        model = Run(mlp().eval(), method).model
        model(x).square().sum().backward()
        results.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(left, right) for left, right in zip(*results, strict=True))


# Four epochs of two steps: the value for each step, then the one after the last.
@pytest.mark.parametrize(
    ("fields", "epochs"),
    [
        ({"alpha_schedule": "constant"}, [1, 1, 1, 1, 1]),
        ({"alpha_schedule": "linear"}, [1, 0.75, 0.5, 0.25, 0]),
        ({"alpha_schedule": "cosine"}, [1, (2 + math.sqrt(2)) / 4, 0.5, (2 - math.sqrt(2)) / 4, 0]),
        ({"alpha_schedule": "exponential"}, [math.exp(-e) for e in range(5)]),
        ({"alpha_schedule": "linear", "zero_alpha_epoch": 2}, [1, 0.75, 0, 0, 0]),
        ({"alpha_schedule": "constant", "zero_alpha_epoch": 0}, [0, 0, 0, 0, 0]),
    ],
    ids=str,
)
def test_alpha_changes_when_an_epoch_starts(fields: dict[str, Any], epochs: list[float]) -> None:
    run = Run(linear([0.75, -0.25]), AutoSparse(alpha=0.5, **fields), total_steps=8, steps_per_epoch=2)
    seen = [float(run.view.alpha)]
    for _ in range(8):
        run.step()
        seen.append(float(run.view.alpha))
    assert seen == pytest.approx([0.5 * epochs[step // 2] for step in range(9)], rel=1e-6, abs=1e-7)


def test_b_is_chosen_anew_every_step_until_alpha_is_zero_as_in_the_translation_recipe_from_epoch_10() -> None:
    method = AutoSparse(threshold_init=0.0, alpha_schedule="constant", zero_alpha_epoch=1, backward_density=0.5)
    run = Run(linear([0.4, 0.3, 0.2, 0.1]), method, lr=1.0, total_steps=4, steps_per_epoch=2)
    assert run.view.grad_mask.tolist() == [[True, True, False, False]]
    run.step([0.4, 0.0, 0.0, -0.5])  # W = [0, .3, .2, .6]
    assert run.view.grad_mask.tolist() == [[False, True, False, True]]
    run.step()  # epoch 1: alpha = 0, and then B = A
    assert run.view.grad_mask is None and float(run.view.alpha) == 0.0
    method = AutoSparse(threshold_init=-7.0, alpha=0.4, alpha_schedule="exponential", zero_alpha_epoch=10)
    run = Run(linear([1.0]), method, steps_per_epoch=100)
    assert torch.sigmoid(run.view.threshold).item() == pytest.approx(0.000911, abs=5e-7)
    for epoch, alpha in ((0, 0.4), (1, 0.4 / math.e), (9, 0.4 * math.exp(-9)), (10, 0.0), (11, 0.0)):
        assert method.current_alpha(Clock(100 * epoch, None, 100)) == pytest.approx(alpha)


def test_decay_on_the_threshold_is_an_l2_gradient_that_the_optimizer_does_not_repeat() -> None:
    method = constant(0.0, -2.0, threshold_weight_decay=0.5, threshold_lr_scale=4.0)
    run = Run(linear([0.75, -0.25]), method, lr=0.125, weight_decay=0.3)
    groups = {group["name"]: (group["lr"], group["weight_decay"]) for group in run.optimizer.param_groups}
    assert groups == {"decay": (0.125, 0.3), "thresholds": (0.5, 0.0)}
    threshold = run.view.threshold
    threshold.grad = torch.tensor([3.0])
    run.step()
    # ds = 3 + .5 (-2) = 2;  s = -2 - .5 * 2
    assert threshold.item() == -3.0
    threshold.grad = torch.tensor([3.0])
    run.before_step(4.0)
    assert threshold.grad.item() == 3.0 + 4.0 * 0.5 * -3.0
    # Without a decay of its own the threshold takes the optimizer's.
    run = Run(linear([0.75, -0.25]), STR(threshold_init=-2.0), lr=0.5, weight_decay=0.25)
    groups = {group["name"]: (group["lr"], group["weight_decay"]) for group in run.optimizer.param_groups}
    assert groups == {"decay": (0.5, 0.25), "thresholds": (0.5, 0.25)}
    run.view.threshold.grad = torch.zeros(1)
    run.step()
    assert run.view.threshold.item() == -2.0 + 0.5 * 0.25 * 2.0


def test_annealing_keeps_more_weights_the_larger_alpha_is() -> None:
    """From one start on a sparse regression; the papers' Table: alpha trades sparsity for quality."""
    generator = torch.Generator().manual_seed(3)
    x, truth = torch.randn(64, 32, generator=generator), torch.randn(8, 32, generator=generator)
    start, kept = 0.3 * torch.randn(8, 32, generator=generator), []
    for alpha in (0.0, 0.5, 1.0):
        run = Run(linear(*start.tolist()), constant(alpha, -1.0), lr=0.05)
        run.train(60, lambda model=run.model: (model(x) - x @ truth.t()).square().mean())
        kept.append(run.view.kept_count())
    assert kept[0] < kept[1] < kept[2], kept


def tuned(tune: AutoTune, means: list[float], **fields: Any) -> tuple[list[float], list[float]]:
    """alpha in each epoch of three steps of a run that observes losses of these means; and the epochs' losses."""
    method = AutoSparse(auto_tune=tune, **fields)
    run, alphas = Run(nn.Linear(2, 2), method, total_steps=3 * len(means), steps_per_epoch=3), []
    for mean in means:
        alphas.append(float(run.view.alpha))
        for loss in (mean - 0.3, mean, mean + 0.3):
            run.sparsifier.observe(loss=torch.tensor(loss))
            run.step()
    return alphas, run.sparsifier.epoch_losses


def listing(reference: list[float], losses: list[float]) -> list[float]:
    """The published listing's arithmetic, with the paper's order: alpha changes as an epoch starts."""
    alpha, alphas = 0.5, []
    for epoch, loss in enumerate(losses):
        if epoch < len(reference):
            alphas.append(alpha)
            alpha *= 1 + 0.05 if loss > (1 + 0.01) * reference[epoch] else 1 - 0.005
        else:
            alphas.append(alpha * sigmoid_cosine(epoch - len(reference), len(losses) - len(reference)))
    return alphas


def test_alpha_rises_by_5_percent_when_the_loss_is_1_percent_too_high_and_else_falls_by_half_a_percent() -> None:
    reference, means = [2.0, 1.5, 1.25], [2.5, 1.4, 1.2626, 1.0, 0.9, 0.8]
    alphas, losses = tuned(AutoTune(reference_losses=reference), means)
    # 2.5 > 2.02: .5 * 1.05 = .525;  1.4 < 1.515: * .995 = .522375;  1.2626 > 1.2625: * 1.05 = .54849375
    # then three epochs of sigmoid-cosine at 0, 1/3, 2/3: max(1, .998), max(.75, .8808), max(.25, .1192)
    by_hand = [0.5, 0.525, 0.522375, 0.54849375, 0.54849375 * 0.8807971, 0.54849375 * 0.25]
    assert alphas == pytest.approx(by_hand, rel=1e-6)
    assert alphas == pytest.approx(listing(reference, means), rel=1e-6)
    assert losses == pytest.approx(means, rel=1e-6)


OWN = {"alpha_init": 0.25, "tolerance": 0.5, "increase": 1.0, "decrease": 0.5}


@pytest.mark.parametrize(
    ("reference", "constants", "fields", "means", "alphas"),
    [
        # alpha may pass 1: 1.09 at the end.
        ([1.0] * 16, {}, {}, [2.0] * 17, [0.5 * 1.05**epoch for epoch in range(17)]),
        ([1.0, 1.0], OWN, {}, [1.4, 1.6, 0.0], [0.25, 0.125, 0.25]),  # 1.4 < 1.5: * .5;  1.6 > 1.5: * 2
        ([1.0, 1.0], {}, {"zero_alpha_epoch": 2}, [2.0] * 3, [0.5, 0.525, 0.0]),  # rules over the tuner
    ],
    ids=["alpha may pass 1", "the tuner's own constants", "zero_alpha_epoch"],
)
def test_the_tuners_alphas(reference: Any, constants: Any, fields: Any, means: list[float], alphas: Any) -> None:
    assert tuned(AutoTune(reference_losses=reference, **constants), means, **fields)[0] == pytest.approx(alphas)


def test_an_epoch_without_losses_is_an_error_that_names_the_call_and_a_dense_run_records_them() -> None:
    run = Run(nn.Linear(2, 2), AutoSparse(auto_tune=AutoTune(reference_losses=[1.0])), total_steps=4, steps_per_epoch=1)
    with pytest.raises(RuntimeError, match=r"losses of epoch 0 for auto_tune, got none; call sparsifier.observe"):
        run.step()
    run = Run(nn.Linear(2, 2), Dense(), steps_per_epoch=2)
    for loss in (3.0, 1.0, 0.5, 1.5, 7.0):
        run.sparsifier.observe(loss=loss)
        run.step()
    assert run.sparsifier.epoch_losses == [2.0, 1.0]
