"""Statistics of batch norms, counted again for weights that they were not counted with."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["reestimate"]


@torch.no_grad()
def reestimate(
    model: nn.Module,
    inputs: Iterable[Tensor],
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> int:
    """Replace the running mean and variance of every batch norm by their plain averages over `inputs`.

    Where a mask has changed, the running statistics still describe the old weights (AC/DC, appendix: the switch of
    phases). The weights are not touched, and the modules' modes and momenta are left as they were.

    Args:
        model: `model(pixel_values=...)`.
        inputs: batches [B, C, H, W], on the model's device, of more than one image each.
        autocast: makes the context of the forward.

    Returns:
        How many batch norms there are; with none, nothing is run.
    """
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    norms = [norm for norm in norms if norm.track_running_stats]
    if not norms:
        return 0
    modes = {module: module.training for module in model.modules()}
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        # None: the cumulative average.
        norm.momentum = None
    try:
        model.eval()
        for norm in norms:
            norm.train()
        for pixel_values in inputs:
            with autocast():
                model(pixel_values=pixel_values)
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        for module, mode in modes.items():
            module.training = mode
    return len(norms)
