"""LAMB: Adam's direction, scaled for each tensor by the norm of its weights.

You et al., "Large Batch Optimization for Deep Learning: Training BERT in 76 minutes", arXiv:1904.00962, Algorithm 2,
in the form that NVIDIA trains Transformer-XL with: no bias correction, norms of weights clamped to [0, 10].

    m = beta1 m + (1 - beta1) g          v = beta2 v + (1 - beta2) g^2
    u = m / (sqrt(v) + eps) + lambda w
    w = w - lr r u                       r = min(|w|, 10) / (|u| + eps), 1 where |w| or |u| is 0
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

__all__ = ["Lamb", "lamb_update"]

LARGEST_WEIGHT_NORM = 10.0


def lamb_update(
    weight: Tensor, m: Tensor, v: Tensor, gradient: Tensor, *, beta1: float, beta2: float, eps: float, decay: float
) -> Tensor:
    """r u of the equations above, `[*weight.shape]` in the dtype of `m`; `m` and `v` are changed in place."""
    m.mul_(beta1).add_(gradient, alpha=1 - beta1)
    v.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    update = m / (v.sqrt() + eps) + decay * weight
    weight_norm = torch.linalg.vector_norm(weight).clamp(max=LARGEST_WEIGHT_NORM)
    update_norm = torch.linalg.vector_norm(update)
    # As tensors: nothing is read back from the device.
    ratio = torch.where((weight_norm > 0) & (update_norm > 0), weight_norm / (update_norm + eps), 1.0)
    return update * ratio


class Lamb(Optimizer):
    """LAMB with one trust ratio a parameter tensor.

    Args:
        params: parameters or groups, as every torch optimizer takes them.
        lr: learning rate, per unit of weight norm.
        betas: decay of the first and the second moment, each in [0, 1).
        eps: added to the root of the second moment and to the norm of the update.
        weight_decay: lambda above, inside the trust ratio.

    Raises:
        ValueError: a hyper-parameter is out of its range.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
    ) -> None:
        for name, value, fits in (
            ("lr of at least 0", lr, lr >= 0),
            ("betas in [0, 1)", betas, all(0 <= beta < 1 for beta in betas)),
            ("eps above 0", eps, eps > 0),
            ("weight_decay of at least 0", weight_decay, weight_decay >= 0),
        ):
            if not fits:
                raise ValueError(f"Lamb: expected {name}, got {value}; correct it")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of every parameter that has a gradient; returns what `closure`, if given, returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
                    state["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
                update = lamb_update(
                    parameter, state["exp_avg"], state["exp_avg_sq"], parameter.grad,
                    beta1=beta1, beta2=beta2, eps=group["eps"], decay=group["weight_decay"],
                )  # fmt: skip
                parameter.add_(update, alpha=-group["lr"])
        return loss
