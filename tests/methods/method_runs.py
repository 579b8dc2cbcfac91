"""What tests of methods run: small sparse layers with their optimizer, and a regression that trains them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import tritonsparse as ts
from tritonsparse.methods import Method

# One number stands for all elements of a gradient.
Gradient = float | Sequence[float] | Tensor


def linear(*rows: Sequence[float]) -> nn.Linear:
    """A linear layer without bias, of these rows of weights."""
    layer = nn.Linear(len(rows[0]), len(rows), bias=False)
    layer.weight.data = torch.tensor(rows, dtype=torch.float32)
    return layer


def two(size: int) -> nn.ModuleList:
    """Layers "0" and "1" of one row."""
    return nn.ModuleList(nn.Linear(size, 1, bias=False) for _ in range(2))


class Run:
    """A model under a method, trained by gradients that a test writes; without another optimizer by SGD."""

    def __init__(
        self, model: nn.Module, method: Method, *, lr: float = 0.0, weight_decay: float = 0.0, momentum: float = 0.0,
        optimizer: Callable[[Any], torch.optim.Optimizer] | None = None, **options: Any,
    ) -> None:  # fmt: skip
        self.model: Any = model
        self.sparsifier = ts.sparsify(model, method, **options)
        groups = self.sparsifier.param_groups(lr=lr, weight_decay=weight_decay)
        self.optimizer: Any = optimizer(groups) if optimizer else torch.optim.SGD(groups, momentum=momentum)
        self.sparsifier.attach(self.optimizer)

    @property
    def views(self) -> list[Any]:
        return list(self.sparsifier.layers.values())

    @property
    def parts(self) -> tuple[Any, ...]:
        """What a checkpoint holds the states of."""
        return self.model, self.optimizer, self.sparsifier

    @property
    def view(self) -> Any:
        """The only sparse layer."""
        (view,) = self.views
        return view

    @property
    def method(self) -> Any:
        """As it is while it runs."""
        return self.sparsifier.method

    def place(self, *weights: Sequence[float], kept: int | None = None) -> Run:
        """These weights for each sparse layer, all of one row; its mask keeps the first `kept` of them."""
        for view, row in zip(self.views, weights, strict=True):
            view.weight.data = torch.tensor([row], dtype=torch.float32)
            if kept is not None:
                view.mask.copy_(torch.arange(len(row))[None] < kept)
        return self

    def give(self, *gradients: Gradient) -> None:
        """A gradient for each sparse layer."""
        for view, gradient in zip(self.views, gradients, strict=True):
            given = torch.as_tensor(gradient, dtype=view.weight.dtype)
            view.weight.grad = given.expand(view.weight.shape).clone()

    def step(self, *gradients: Gradient) -> None:
        """An optimizer's step, with gradients for all layers or with those that are there."""
        if gradients:
            self.give(*gradients)
        self.optimizer.step()

    def gradient(self, x: Tensor) -> list[float]:
        """That of the sum of the outputs, in the only sparse layer's only row."""
        self.model(x).sum().backward()
        found: list[float] = self.view.weight.grad[0].tolist()
        return found

    def before_step(self, scale: float | None = None) -> None:
        """What the method does with gradients, times a loss scale, ahead of a step."""
        given = None if scale is None else torch.tensor(scale)
        self.method.before_step(self.sparsifier.layers, self.sparsifier.clock, self.optimizer, given)

    def train(self, steps: int, loss: Callable[[], Tensor]) -> None:
        for _ in range(steps):
            loss().backward()
            self.optimizer.step()
            self.optimizer.zero_grad()

    def masks(self) -> list[list[list[int]]]:
        return [view.mask.int().tolist() for view in self.views]

    def kept(self) -> list[int]:
        return [int(view.mask.sum()) for view in self.views]

    def momentum(self, number: int = 0) -> Tensor:
        buffer: Tensor = self.optimizer.state[self.views[number].weight]["momentum_buffer"]
        return buffer

    def saved(self, name: str) -> Any:
        """What the method saves of the only sparse layer, as a list."""
        return self.sparsifier.state_dict()["tensors"][f"method:{name}/"][0].tolist()


class Regression(Run):
    """[width, 32] and [32, width] that learn relu(X T^t); a step depends on its number alone."""

    def __init__(
        self, method: Method, steps: int, truth: Tensor, width: int, lr: float = 3e-3, pattern: str = "unstructured"
    ) -> None:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(32, width), nn.ReLU(), nn.Linear(width, 32))
        options: dict[str, Any] = {"pattern": pattern, "total_steps": steps, "steps_per_epoch": 20}
        super().__init__(model, method, lr=lr, weight_decay=0.01, optimizer=torch.optim.AdamW, **options)
        self.truth = truth

    def loss(self) -> Tensor:
        x = torch.randn(64, 32, generator=torch.Generator().manual_seed(self.sparsifier.step))
        error: Tensor = self.model(x) - (x @ self.truth.t()).relu()
        return error.square().mean()

    def seen(self, steps: int) -> list[float]:
        """The sparsity after each of so many steps."""
        found = []
        for _ in range(steps):
            self.train(1, self.loss)
            found.append(self.sparsifier.sparsity())
        return found
