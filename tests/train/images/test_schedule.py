"""Schedules of the image programs: the factor of every step by hand, and what cannot be one."""

from __future__ import annotations

import argparse
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tritonsparse.train.images.schedule import make_scheduler, multistep

GIVEN = {"lr_scheduler_type": "multistep", "lr_milestones": [1.0, 2.5], "lr_gamma": None, "warmup_epochs": None}


def schedule(steps: int, per_epoch: int, rate: float = 0.4, **changes: Any) -> tuple[torch.optim.Optimizer, Any]:
    sgd = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=rate)
    return sgd, make_scheduler(argparse.Namespace(**GIVEN | {"num_warmup_steps": 0} | changes), sgd, per_epoch, steps)


def taken(sgd: torch.optim.Optimizer, scheduler: Any, steps: int) -> list[float]:
    """The rates that the next steps are taken with."""
    found = []
    for _ in range(steps):
        found.append(float(sgd.param_groups[0]["lr"]))
        sgd.step()
        scheduler.step()
    return found


# 4 steps an epoch, but for two: milestones at steps 4 and 10.
@pytest.mark.parametrize(
    ("steps", "per_epoch", "changes", "rates"),
    [
        (12, 4, {}, [0.4] * 4 + [0.04] * 6 + [0.004] * 2),
        (12, 4, {"lr_gamma": 0.5, "lr_milestones": [2]}, [0.4] * 8 + [0.2] * 4),
        (8, 4, {"warmup_epochs": 0.75, "lr_milestones": [1.5]}, [0.0, 0.4 / 3, 0.8 / 3, 0.4, 0.4, 0.4, 0.04, 0.04]),
        (4, 2, {"num_warmup_steps": 1, "lr_milestones": [1]}, [0.0, 0.4, 0.04, 0.04]),
        # Transformers' own.
        (10, 5, {"lr_scheduler_type": "cosine", "lr_milestones": None, "warmup_epochs": 0.4},
         [0.0, 0.2, 0.4, 0.38478, 0.34142, 0.27654, 0.2, 0.12346, 0.05858, 0.01522]),
    ],
)  # fmt: skip
def test_rates_rise_in_a_line_and_fall_at_milestones_in_epochs(
    steps: int, per_epoch: int, changes: dict[str, Any], rates: list[float]
) -> None:
    assert taken(*schedule(steps, per_epoch, **changes), steps) == pytest.approx(rates, abs=1e-5)


@settings(max_examples=50, deadline=None)
@given(
    st.sets(st.integers(1, 40), min_size=1, max_size=4), st.floats(0.05, 0.9), st.integers(0, 10), st.integers(0, 50)
)
def test_without_warm_up_it_is_torch_s_own(milestones: set[int], gamma: float, warmup: int, step: int) -> None:
    sgd = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = torch.optim.lr_scheduler.MultiStepLR(sgd, sorted(milestones), gamma)
    taken(sgd, theirs, step)
    ours = multistep([float(each) for each in sorted(milestones)], gamma, warmup)(step)
    rising = min(1.0, step / warmup) if warmup else 1.0
    assert ours == pytest.approx(rising * theirs.get_last_lr()[0], rel=1e-9)


def test_milestones_beyond_the_run_are_said_and_not_reached(caplog: Any) -> None:
    assert taken(*schedule(6, 2, lr_milestones=[2, 30]), 6) == pytest.approx([0.4] * 4 + [0.04] * 2)
    assert "does not reach all of them" in caplog.text
    caplog.clear()
    schedule(6, 2, lr_milestones=[2])
    assert not caplog.text


def test_what_is_no_schedule_is_refused() -> None:
    for changes, words in (
        ({"lr_milestones": None}, "rising --lr_milestones in epochs, above 0, got none"),
        ({"lr_milestones": []}, "got none"),
        ({"lr_milestones": [2, 1]}, "rising"),
        ({"lr_milestones": [0, 1]}, "above 0"),
        ({"lr_milestones": ["1"]}, "in epochs"),
        ({"lr_gamma": 1.0}, r"--lr_gamma in \(0, 1\)"),
        ({"lr_gamma": 0.0}, r"--lr_gamma in \(0, 1\)"),
        ({"lr_scheduler_type": "cosine"}, "--lr_scheduler_type multistep, got them with 'cosine'"),
        ({"lr_scheduler_type": "cosine", "lr_milestones": None, "lr_gamma": 0.1}, "or name multistep"),
    ):
        with pytest.raises(ValueError, match=words):
            schedule(12, 4, **changes)
