"""LAMB against its formula, in float64 and by hand; schedules of the image programs, the factor of every step."""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tritonsparse.train.images.schedule import make_scheduler, multistep
from tritonsparse.train.text.lamb import Lamb


def parameter(value: float) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.full((4,), value))


@pytest.mark.parametrize("scale", [0.1, 1.0, 100.0], ids=["small", "about one", "norm beyond 10"])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_twenty_steps_equal_the_formula_in_float64(scale: float, decay: float) -> None:
    """Algorithm 2 of arXiv:1904.00962 as NVIDIA runs it, in NumPy."""
    rng = np.random.default_rng(0)
    w = scale * rng.standard_normal((7, 5))
    ours = torch.nn.Parameter(torch.from_numpy(w.copy()))
    optimizer = Lamb([ours], lr=0.03, betas=(0.8, 0.95), eps=1e-6, weight_decay=decay)
    m, v = np.zeros_like(w), np.zeros_like(w)
    for _ in range(20):
        g = rng.standard_normal((7, 5))
        ours.grad = torch.from_numpy(g)
        optimizer.step()
        m, v = 0.8 * m + 0.2 * g, 0.95 * v + 0.05 * g * g
        u = m / (np.sqrt(v) + 1e-6) + decay * w
        w = w - 0.03 * min(np.linalg.norm(w), 10.0) / (np.linalg.norm(u) + 1e-6) * u
    np.testing.assert_allclose(ours.detach().numpy(), w, rtol=1e-12, atol=1e-13)


def test_the_first_step_by_hand_with_a_closure_or_without() -> None:
    # g = (3, -4): m = 0.1 g, v = 0.001 g^2, u = m / sqrt(v) = 0.1 / sqrt(0.001) sign(g) = +-3.1623, |u| = 4.4721.
    # |w| = 5, so r = 5 / 4.4721 = 1.1180 and w moves by lr r u = 0.01 x 1.1180 x 3.1623 = 0.035355.
    ours = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
    ours.grad = torch.tensor([3.0, -4.0])
    Lamb([ours], lr=0.01, eps=1e-12).step()
    torch.testing.assert_close(ours.data, torch.tensor([3.0 - 0.0353553, 4.0 + 0.0353553]))
    # A closure is called with gradients on.
    ours = parameter(0.5)

    def closure() -> float:
        loss = (ours**2).sum()
        loss.backward()
        return loss.item()

    assert Lamb([ours], lr=0.1).step(closure) == 1.0
    assert ours.max().item() < 0.5


@pytest.mark.parametrize(("weight", "gradient"), [(0.0, 1.0), (1.0, 0.0)], ids=["no weight", "no gradient"])
def test_where_a_norm_is_zero_the_ratio_is_one(weight: float, gradient: float) -> None:
    ours = parameter(weight)
    ours.grad = torch.full((4,), gradient)
    Lamb([ours], lr=0.5, betas=(0.0, 0.0), eps=1e-8).step()
    torch.testing.assert_close(ours.data, torch.full((4,), weight - 0.5 * gradient))


def test_each_tensor_has_its_own_ratio_and_values_out_of_range_are_refused() -> None:
    first, second, idle = parameter(1.0), parameter(2.0), parameter(3.0)
    first.grad, second.grad = torch.ones(4), torch.ones(4)
    optimizer = Lamb([{"params": [first]}, {"params": [second, idle], "lr": 0.01}], lr=0.1)
    optimizer.step()
    # u = 0.1 / sqrt(0.001) in every entry, so r u is w itself.
    torch.testing.assert_close(first.data, torch.full((4,), 1.0 - 0.1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(second.data, torch.full((4,), 2.0 - 0.02), rtol=1e-5, atol=1e-5)
    assert torch.equal(idle.data, torch.full((4,), 3.0)) and idle not in optimizer.state
    refused: dict[str, dict[str, Any]] = {
        "lr of at least 0": {"lr": -1.0}, r"betas in \[0, 1\)": {"betas": (0.9, 1.0)}, "eps above 0": {"eps": 0.0},
        "weight_decay of at least 0": {"weight_decay": -0.1},
    }  # fmt: skip
    for words, fields in refused.items():
        with pytest.raises(ValueError, match=words):
            Lamb([parameter(1.0)], **fields)


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
def test_rates_rise_in_a_line_and_fall_at_milestones(
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


def test_milestones_beyond_the_run_are_said(caplog: Any) -> None:
    assert taken(*schedule(6, 2, lr_milestones=[2, 30]), 6) == pytest.approx([0.4] * 4 + [0.04] * 2)
    assert "does not reach all of them" in caplog.text
    caplog.clear()
    schedule(6, 2, lr_milestones=[2])
    assert not caplog.text
