"""Sparse training of Hugging Face models.

    sparsifier = tritonsparse.sparsify(model, "autosparse", total_steps=..., steps_per_epoch=...)
    optimizer = torch.optim.AdamW(sparsifier.param_groups(lr=..., weight_decay=...))
    sparsifier.attach(optimizer)
    ...                                    # the training loop, unchanged
    model = sparsifier.finalize()          # stock modules, zeros baked in

Layers hold state, methods decide, kernels compute, eval measures. ARCHITECTURE.md says more.
"""

from __future__ import annotations

from . import flops, methods, pattern, schedules
from .callback import SparsityCallback
from .export import load
from .sparsifier import Sparsifier
from .sparsify import sparsify

__all__ = ["Sparsifier", "SparsityCallback", "flops", "load", "methods", "pattern", "schedules", "sparsify"]
