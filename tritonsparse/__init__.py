"""Sparse training of Hugging Face models.

    sparsifier = tritonsparse.sparsify(model, "autosparse", total_steps=..., steps_per_epoch=...)
    optimizer = torch.optim.AdamW(sparsifier.param_groups(lr=..., weight_decay=...))
    sparsifier.attach(optimizer)
    ...                                    # the training loop, unchanged
    model = sparsifier.finalize()          # stock modules, zeros baked in

Layers hold state, methods decide, kernels compute, eval measures. ARCHITECTURE.md says more.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from . import flops, methods, pattern, schedules
from .export import load
from .export_blocks import load_bsr, save_bsr
from .sparsifier import Sparsifier
from .sparsify import sparsify

if TYPE_CHECKING:
    from .callback import SparsityCallback

__all__ = [
    "Sparsifier",
    "SparsityCallback",
    "flops",
    "load",
    "load_bsr",
    "methods",
    "pattern",
    "save_bsr",
    "schedules",
    "sparsify",
]


def __getattr__(name: str) -> Any:
    # The callback imports transformers' Trainer, seconds that nobody without a Trainer should wait for.
    if name == "SparsityCallback":
        from .callback import SparsityCallback

        return SparsityCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
