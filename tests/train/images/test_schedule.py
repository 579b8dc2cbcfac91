"""Schedules of the image programs: the factor of every step by hand, and what cannot be one."""

from __future__ import annotations

import argparse
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tritonsparse.train.images.schedule import make_scheduler, multistep


def arguments(**changes: Any) -> argparse.Namespace:
    given = {
        "lr_scheduler_type": "multistep", "lr_milestones": [1.0, 2.5], "lr_gamma": None, "warmup_epochs": None,
        "num_warmup_steps": 0,
    }  # fmt: skip
    return argparse.Namespace(**{**given, **changes})


def optimizer(rate: float = 0.4) -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=rate)


def rates(steps: int, steps_per_epoch: int, **changes: Any) -> list[float]:
    """The rate that each step is taken with."""
    sgd = optimizer()
    scheduler = make_scheduler(arguments(**changes), sgd, steps_per_epoch, steps)
    found = []
    for _ in range(steps):
        found.append(float(sgd.param_groups[0]["lr"]))
        sgd.step()
        scheduler.step()
    return found


def test_the_rate_falls_at_each_milestone_counted_in_epochs() -> None:
    # 4 steps an epoch: milestones at steps 4 and 10.
    assert rates(12, 4) == pytest.approx([0.4] * 4 + [0.04] * 6 + [0.004] * 2)
    assert rates(12, 4, lr_gamma=0.5, lr_milestones=[2]) == pytest.approx([0.4] * 8 + [0.2] * 4)


def test_the_rate_rises_in_a_line_before_the_milestones() -> None:
    assert rates(8, 4, warmup_epochs=0.75, lr_milestones=[1.5]) == pytest.approx(
        [0.0, 0.4 / 3, 0.8 / 3, 0.4, 0.4, 0.4, 0.04, 0.04]
    )
    assert rates(4, 2, num_warmup_steps=1, lr_milestones=[1]) == pytest.approx([0.0, 0.4, 0.04, 0.04])


def test_swat_s_rates_on_imagenet_are_those_of_its_table_14() -> None:
    """Epochs 1 - 30: 0.1, 31 - 60: 0.01, 61 - 80: 0.001, 81 - 90: 0.0001, after 5 epochs of warm-up."""
    factor = multistep([epoch * 5005 for epoch in (30, 60, 80)], 0.1, 5 * 5005)
    firsts = [0.1 * factor(5005 * (epoch - 1)) for epoch in (1, 6, 30, 31, 60, 61, 80, 81, 90)]
    assert firsts == pytest.approx([0.0, 0.1, 0.1, 0.01, 0.01, 0.001, 0.001, 0.0001, 0.0001])
    lasts = [0.1 * factor(5005 * epoch - 1) for epoch in (30, 60, 80, 90)]
    assert lasts == pytest.approx([0.1, 0.01, 0.001, 0.0001])


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=4, unique=True), st.floats(0.05, 0.9), st.integers(0, 10),
    st.integers(0, 50),
)  # fmt: skip
def test_without_warm_up_it_is_torch_s_own(milestones: list[int], gamma: float, warmup: int, step: int) -> None:
    sgd = optimizer(1.0)
    theirs = torch.optim.lr_scheduler.MultiStepLR(sgd, sorted(milestones), gamma)
    for _ in range(step):
        sgd.step()
        theirs.step()
    ours = multistep([float(each) for each in sorted(milestones)], gamma, warmup)(step)
    rising = min(1.0, step / warmup) if warmup else 1.0
    assert ours == pytest.approx(rising * theirs.get_last_lr()[0], rel=1e-9)


def test_milestones_beyond_the_run_are_said_and_not_reached(caplog: pytest.LogCaptureFixture) -> None:
    assert rates(6, 2, lr_milestones=[2, 30]) == pytest.approx([0.4] * 4 + [0.04] * 2)
    assert "does not reach all of them" in caplog.text
    caplog.clear()
    rates(6, 2, lr_milestones=[2])
    assert not caplog.text


def test_a_saved_schedule_goes_on_where_it_was() -> None:
    sgd = optimizer()
    scheduler = make_scheduler(arguments(), sgd, 4, 12)
    for _ in range(5):
        sgd.step()
        scheduler.step()
    other = optimizer()
    resumed = make_scheduler(arguments(), other, 4, 12)
    other.load_state_dict(sgd.state_dict())
    resumed.load_state_dict(scheduler.state_dict())
    for _ in range(6):
        for each, its in ((sgd, scheduler), (other, resumed)):
            each.step()
            its.step()
        assert resumed.get_last_lr() == scheduler.get_last_lr()
    assert resumed.get_last_lr() == pytest.approx([0.004])


def test_the_other_schedules_are_transformers_own() -> None:
    found = rates(10, 5, lr_scheduler_type="cosine", lr_milestones=None, warmup_epochs=0.4)
    assert found[:3] == pytest.approx([0.0, 0.2, 0.4]) and found[6] == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lr_milestones": None}, "rising --lr_milestones in epochs, above 0, got none"),
        ({"lr_milestones": []}, "got none"),
        ({"lr_milestones": [2, 1]}, "rising"),
        ({"lr_milestones": [0, 1]}, "above 0"),
        ({"lr_milestones": ["1"]}, "in epochs"),
        ({"lr_gamma": 1.0}, r"--lr_gamma in \(0, 1\)"),
        ({"lr_gamma": 0.0}, r"--lr_gamma in \(0, 1\)"),
        ({"lr_scheduler_type": "cosine"}, "--lr_scheduler_type multistep, got them with 'cosine'"),
        ({"lr_scheduler_type": "cosine", "lr_milestones": None, "lr_gamma": 0.1}, "or name multistep"),
    ],
)
def test_what_is_no_schedule_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make_scheduler(arguments(**changes), optimizer(), 4, 12)
