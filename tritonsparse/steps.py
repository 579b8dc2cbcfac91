"""When a training step begins and ends: hooks on the optimizer, or on several that step one after the other.

    begin    all gradients are complete and nothing has moved: before the first optimizer's step, or after the closure
             that it calls to make them
    end      the last optimizer has moved

A step that a GradScaler skips is none. Where one of several optimizers is skipped, the step ends when the next begins.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch.optim import Optimizer

from .optimizer_state import is_real_step

__all__ = ["Steps"]

Call = Callable[[Optimizer], None]


class Steps:
    """The steps of `optimizers`, each begun and ended once whatever their number.

    Args:
        optimizers: torch's own, unwrapped.
        begin: called with the optimizer that is about to step.
        end: called with the optimizer that stepped last.
    """

    def __init__(self, optimizers: Sequence[Optimizer], begin: Call, end: Call) -> None:
        self.optimizers = list(optimizers)
        self._begin, self._end = begin, end
        # Those that have taken the step under way.
        self._stepped: list[Optimizer] = []
        self._begun = False
        self._handles = [
            handle
            for optimizer in self.optimizers
            for handle in (
                optimizer.register_step_pre_hook(self._before),
                optimizer.register_step_post_hook(self._after),
            )
        ]

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _before(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        # The first argument is the optimizer.
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is None:
            self._ready(optimizer)
            return None

        def with_gradients() -> Any:
            loss = closure()
            self._ready(optimizer)
            return loss

        if len(args) > 1:
            return (args[0], with_gradients, *args[2:]), kwargs
        return args, {**kwargs, "closure": with_gradients}

    def _ready(self, optimizer: Optimizer) -> None:
        if not is_real_step(optimizer):
            return
        if any(other is optimizer for other in self._stepped):
            self._finish(self._stepped[-1])
        if not self._begun:
            self._begun = True
            self._begin(optimizer)

    def _after(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if not is_real_step(optimizer):
            return
        self._stepped.append(optimizer)
        if len(self._stepped) == len(self.optimizers):
            self._finish(optimizer)

    def _finish(self, optimizer: Optimizer) -> None:
        self._stepped, self._begun = [], False
        self._end(optimizer)
