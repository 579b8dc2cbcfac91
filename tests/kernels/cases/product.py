"""A product of x and an effective weight as the rings run it, and its answer in float64."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .matrices import error


@dataclass(frozen=True)
class Product:
    """One call: `function(x, w_hat, bias, *rest, backend=, **options)`, whose result is y or y and what `also` names.

    `dense` is (x, w_hat, bias) -> y in any dtype, `x_hat` what the gradient of w_hat sees in place of x.
    """

    function: Callable[..., Any]
    x: Tensor
    w_hat: Tensor
    bias: Tensor | None
    dense: Callable[..., Tensor]
    grad_y: Tensor
    rest: tuple[Any, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)
    x_hat: Tensor | None = None
    also: dict[str, Tensor] = field(default_factory=dict)
    backend: str = "torch"

    @property
    def arguments(self) -> tuple[Any, ...]:
        return self.x, self.w_hat, self.bias, *self.rest

    @property
    def leaves(self) -> dict[str, Tensor]:
        named = {"dx": self.x, "dw_hat": self.w_hat, "db": self.bias}
        return {name: leaf.requires_grad_() for name, leaf in named.items() if leaf is not None}

    def run(self, backend: str | None = None, function: Callable[..., Any] | None = None) -> dict[str, Tensor]:
        for leaf in self.leaves.values():
            leaf.grad = None
        found = (function or self.function)(*self.arguments, backend=backend or self.backend, **self.options)
        y, *also = found if isinstance(found, tuple) else (found,)
        y.backward(self.grad_y)
        gradients = {name: leaf.grad for name, leaf in self.leaves.items()}
        assert all(each is not None and each.dtype == y.dtype for each in gradients.values())
        return {"y": y.detach(), **gradients, **dict(zip(self.also, also, strict=True))}  # type: ignore[dict-item]

    def answer(self) -> dict[str, Tensor]:
        """The same in float64: autograd of the dense product."""
        double = [None if t is None else t.detach().double().requires_grad_() for t in self.arguments[:3]]
        y, grad_y = self.dense(*double), self.grad_y.double()
        y.backward(grad_y)
        x, w_hat, bias = double
        assert x is not None and w_hat is not None
        if self.x_hat is not None:
            w_hat.grad = None
            self.dense(self.x_hat.double(), w_hat, None).backward(grad_y)
        gradients = {"dx": x.grad, "dw_hat": w_hat.grad, "db": None if bias is None else bias.grad}
        return {"y": y.detach(), **{name: grad for name, grad in gradients.items() if grad is not None}}

    def errors(self, found: dict[str, Tensor]) -> dict[str, float]:
        """Relative RMS against the answer. NaN has to be where it is there, and what else is returned, to be equal."""
        exact, wrong = self.answer(), {}
        assert found.keys() == exact.keys() | self.also.keys()
        for name, value in self.also.items():
            assert found[name].device == value.device
            torch.testing.assert_close(found[name].double(), value.double(), rtol=0, atol=0, equal_nan=True, msg=name)
        for name, value in exact.items():
            assert torch.equal(found[name].isnan(), value.isnan()), name
            wrong[name] = error(found[name].nan_to_num(), value.nan_to_num())
        return wrong


def equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)
