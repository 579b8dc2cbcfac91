"""Auto-tuned alpha (AutoSparse, Algorithm 1) against the published listing, replayed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from method_runs import Run
from torch import nn

from tritonsparse.methods import AutoSparse, AutoTune, Dense
from tritonsparse.schedules import sigmoid_cosine

STEPS = 3  # in an epoch


def run(tune: AutoTune, losses: list[list[float]], **fields: Any) -> tuple[list[float], list[float]]:
    """alpha in each epoch of a run that observes `losses`, one list an epoch; and the epochs' losses."""
    made = Run(
        nn.Linear(2, 2), AutoSparse(auto_tune=tune, **fields), total_steps=STEPS * len(losses), steps_per_epoch=STEPS
    )
    alphas = []
    for epoch in losses:
        alphas.append(float(made.view.alpha))
        for loss in epoch:
            made.sparsifier.observe(loss=torch.tensor(loss))
            made.step()
    return alphas, made.sparsifier.epoch_losses


def listing(reference: list[float], losses: list[float]) -> list[float]:
    """The published listing's arithmetic, with the paper's order: alpha changes as an epoch starts."""
    alpha, alphas = 0.5, []
    for epoch, loss in enumerate(losses):
        if epoch < len(reference):
            alphas.append(alpha)
            if loss > (1 + 0.01) * reference[epoch]:
                alpha *= 1 + 0.05
            else:
                alpha *= 1 - 0.005
        else:
            alphas.append(alpha * sigmoid_cosine(epoch - len(reference), len(losses) - len(reference)))
    return alphas


def test_alpha_rises_by_5_percent_when_the_loss_is_1_percent_too_high_and_else_falls_by_half_a_percent() -> None:
    reference, means = [2.0, 1.5, 1.25], [2.5, 1.4, 1.2626, 1.0, 0.9, 0.8]
    alphas, losses = run(AutoTune(reference_losses=reference), [[mean - 0.3, mean, mean + 0.3] for mean in means])
    # 2.5 > 2.02: .5 * 1.05 = .525;  1.4 < 1.515: * .995 = .522375;  1.2626 > 1.2625: * 1.05 = .54849375
    # then three epochs of sigmoid-cosine at 0, 1/3, 2/3: max(1, .998), max(.75, .8808), max(.25, .1192)
    by_hand = [0.5, 0.525, 0.522375, 0.54849375, 0.54849375 * 0.8807971, 0.54849375 * 0.25]
    assert alphas == pytest.approx(by_hand, rel=1e-6)
    assert alphas == pytest.approx(listing(reference, means), rel=1e-6)
    assert losses == pytest.approx(means, rel=1e-6)


@pytest.mark.parametrize(
    ("fields", "means", "alphas"),
    [
        ({"reference_losses": [1.0] * 16}, [2.0] * 17, [0.5 * 1.05**epoch for epoch in range(17)]),  # 1.09 at the end
        # 1.4 < 1.5: * .5;  1.6 > 1.5: * 2
        (
            {"reference_losses": [1.0, 1.0], "alpha_init": 0.25, "tolerance": 0.5, "increase": 1.0, "decrease": 0.5},
            [1.4, 1.6, 0.0],
            [0.25, 0.125, 0.25],
        ),
    ],
    ids=["alpha may pass 1", "the tuner's own constants"],
)
def test_what_the_tuner_makes_of_losses(fields: dict[str, Any], means: list[float], alphas: list[float]) -> None:
    assert run(AutoTune(**fields), [[mean] * STEPS for mean in means])[0] == pytest.approx(alphas)


def test_zero_alpha_epoch_rules_over_the_tuner() -> None:
    tune = AutoTune(reference_losses=[1.0, 1.0])
    assert run(tune, [[2.0] * STEPS] * 3, zero_alpha_epoch=2)[0] == pytest.approx([0.5, 0.525, 0.0])


def test_an_epoch_without_losses_is_an_error_that_names_the_call() -> None:
    method = AutoSparse(auto_tune=AutoTune(reference_losses=[1.0]))
    made = Run(nn.Linear(2, 2), method, total_steps=4, steps_per_epoch=1)
    with pytest.raises(RuntimeError, match=r"losses of epoch 0 for auto_tune, got none; call sparsifier.observe"):
        made.step()


def test_a_dense_run_records_the_reference_losses() -> None:
    made = Run(nn.Linear(2, 2), Dense(), steps_per_epoch=2)
    for loss in (3.0, 1.0, 0.5, 1.5, 7.0):
        made.sparsifier.observe(loss=loss)
        made.step()
    assert made.sparsifier.epoch_losses == [2.0, 1.0]
