"""The learning rate of the image programs: transformers' schedules, and the steps of the ImageNet papers.

    "multistep"    eta_t = eta min(1, t / t_w) gamma^(number of milestones that epoch t / steps_per_epoch has reached)

Linear warm-up over the first t_w steps, then a factor gamma at each milestone, as He et al. (arXiv:1512.03385, section
3.4) and SWAT (arXiv:2001.01969, section 4.1) train. Milestones are epochs, so a run on other hardware has the same.
"""

from __future__ import annotations

import argparse
import logging
from bisect import bisect_right
from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler

__all__ = ["MULTISTEP", "make_scheduler", "multistep"]

logger = logging.getLogger(__name__)

MULTISTEP = "multistep"


def make_scheduler(args: argparse.Namespace, optimizer: Optimizer, steps_per_epoch: int, total_steps: int) -> Any:
    """The schedule that `--lr_scheduler_type` names, with its warm-up and milestones."""
    warmup = args.num_warmup_steps
    if args.warmup_epochs is not None:
        warmup = round(args.warmup_epochs * steps_per_epoch)
    if args.lr_scheduler_type != MULTISTEP:
        return get_scheduler(args.lr_scheduler_type, optimizer, warmup, total_steps)
    milestones = args.lr_milestones
    if milestones[-1] * steps_per_epoch >= total_steps:
        # As in a trial of a long recipe.
        logger.warning(
            "--lr_milestones %s: the run of %g epochs does not reach all of them",
            milestones, total_steps / steps_per_epoch,
        )  # fmt: skip
    gamma = 0.1 if args.lr_gamma is None else args.lr_gamma
    return LambdaLR(optimizer, multistep([epoch * steps_per_epoch for epoch in milestones], gamma, warmup))


def multistep(milestones: list[float], gamma: float, warmup: int) -> Callable[[int], float]:
    """Step t, from 0 -> the factor on the learning rate; milestones and warm-up in steps."""

    def factor(step: int) -> float:
        rising = min(1.0, step / warmup) if warmup else 1.0
        return float(rising * gamma ** bisect_right(milestones, step))

    return factor
