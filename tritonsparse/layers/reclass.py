"""Changing a module's class in place: the same object, the same Parameters, under every name it has."""

from __future__ import annotations

from accelerate.hooks import add_hook_to_module, remove_hook_from_module
from torch import nn

__all__ = ["reclass"]


def reclass(module: nn.Module, cls: type[nn.Module]) -> None:
    """Assign `cls` to `module.__class__`, with an accelerate hook taken off and put on again."""
    # The hook keeps the old class's bound forward on the instance, and leaves it there when removed: the new class
    # would never be asked.
    hook = getattr(module, "_hf_hook", None)
    if hook is not None:
        remove_hook_from_module(module)
        vars(module).pop("forward", None)
    module.__class__ = cls
    if hook is not None:
        add_hook_to_module(module, hook)
