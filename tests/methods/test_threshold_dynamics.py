"""STR's published schedule: what weight decay alone does to a threshold logit of -3200."""

from __future__ import annotations

import math

import pytest
import torch
from method_runs import Run, linear

from tritonsparse.methods import STR

STEPS_PER_EPOCH = 5005  # ImageNet at batch 256
DECAY = 2.251757813e-5


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


PUBLISHED = {10: -505.6, 20: -53.4, 25: -18.4, 30: -6.72, 35: -2.63}  # by running the published code


def test_the_recurrence_is_that_of_the_published_run() -> None:
    after = recurrence(35)
    assert {epoch: after[epoch - 1] for epoch in PUBLISHED} == pytest.approx(PUBLISHED, rel=2e-3)


def test_our_threshold_follows_the_recurrence_through_short_epochs() -> None:
    assert train(6, 100) == pytest.approx(recurrence(6, 100), rel=1e-5)


@pytest.mark.long
def test_our_threshold_follows_the_published_run_to_epoch_35() -> None:
    after = train(35)
    assert {epoch: after[epoch - 1] for epoch in PUBLISHED} == pytest.approx(PUBLISHED, rel=2e-3)
