"""Short training runs of small models and exact comparisons, for the test files in the folders around."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import tritonsparse as ts

Build = Callable[..., Any]
Optimizers = dict[str, Callable[[Any], Optimizer]]
IDS = torch.arange(2, 14).reshape(2, 6)


def squares(model: Any) -> Tensor:
    """The loss of most runs: a small regression, on data of torch's random state."""
    x = torch.randn(16, 8)
    loss: Tensor = (model(x) - torch.tanh(x[:, :4] + x[:, 4:])).square().mean()
    return loss


def language(model: Any) -> Tensor:
    """The loss of a language model on `IDS`."""
    loss: Tensor = model(input_ids=IDS, labels=IDS).loss
    return loss


class Run:
    """A model, its Sparsifier and its optimizer, on losses that depend on the step alone.

    `losses` are held with the graphs that made them, as training loops hold the last one. `compacted` says whether any
    layer was compacted after each step. `before_step` is called between the gradients and the optimizer's step.
    """

    def __init__(
        self, model: Any, method: Any, optimizer: Callable[[Any], Optimizer] = torch.optim.SGD,
        loss: Callable[[Any], Tensor] = squares, *, attach: Mapping[str, Any] | None = None,
        groups: Mapping[str, Any] | None = None, **options: Any,
    ) -> None:  # fmt: skip
        self.model, self.loss = model, loss
        self.sparsifier = ts.sparsify(model, method, **{"total_steps": 12, "steps_per_epoch": 3, **options})
        rates = {"lr": 0.02, "weight_decay": 0.01} if groups is None else groups
        self.optimizer = optimizer(self.sparsifier.param_groups(**rates))
        self.sparsifier.attach(self.optimizer, **(attach or {}))
        self.losses: list[Tensor] = []
        self.compacted: list[bool] = []
        self.before_step: Callable[[], None] = lambda: None

    def train(self, steps: int, micro_batches: int = 1) -> Run:
        for _ in range(steps):
            torch.manual_seed(1000 + self.sparsifier.step)
            for _ in range(micro_batches):
                self.losses.append(self.loss(self.model))
                self.sparsifier.observe(loss=self.losses[-1])
                self.losses[-1].backward()
            self.before_step()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.compacted.append(any(layer.compacted for layer in self.sparsifier.layers.values()))
        return self

    def parts(self) -> dict[str, Any]:
        return {"model": self.model, "optimizer": self.optimizer, "sparsifier": self.sparsifier}

    def state(self) -> dict[str, Any]:
        return {name: part.state_dict() for name, part in self.parts().items()}

    def load(self, state: Mapping[str, Any]) -> Run:
        for name, part in self.parts().items():
            part.load_state_dict(state[name])
        return self


def flat(value: Any, path: str = "") -> dict[str, Any]:
    """The leaves of nested dictionaries and lists, by path."""
    if isinstance(value, list | tuple):
        value = dict(enumerate(value))
    if not isinstance(value, Mapping):
        return {path: value}
    return {key: leaf for name, each in value.items() for key, leaf in flat(each, f"{path}/{name}").items()}


def assert_same(ours: Any, theirs: Any) -> None:
    """Two states are equal, tensors bit for bit."""
    ours, theirs = flat(ours), flat(theirs)
    assert ours.keys() == theirs.keys()
    same = {key: torch.equal if isinstance(value, Tensor) else lambda a, b: a == b for key, value in theirs.items()}
    different = [key for key in theirs if not same[key](ours[key], theirs[key])]
    assert not different, different


def gradients(model: nn.Module, *args: Any, call: Any = None, **kwargs: Any) -> dict[str, Tensor]:
    """The output and the gradients of a loss whose own gradient is random but the same at every call."""
    torch.manual_seed(1)
    model.zero_grad()
    y = (call or model)(*args, **kwargs)
    y = getattr(y, "logits", y)
    (y.float() * torch.randn(y.shape, generator=torch.Generator().manual_seed(2))).sum().backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"y": y.detach().clone(), **grads}


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    ours, theirs = ours.detach().double(), theirs.detach().double()
    return float((ours - theirs).norm() / (theirs.norm() or 1.0))
