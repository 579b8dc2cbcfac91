"""Sparse training of Hugging Face models.

    sparsifier = tritonsparse.sparsify(model, "autosparse", total_steps=..., steps_per_epoch=...)
    optimizer = torch.optim.AdamW(sparsifier.param_groups(lr=..., weight_decay=...))
    sparsifier.attach(optimizer)
    ...                                    # the training loop, unchanged
    model = sparsifier.finalize()          # stock modules, zeros baked in

Layers hold state, methods decide, kernels compute, eval measures. ARCHITECTURE.md says more.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import flops, methods, pattern, schedules
    from .api import load, sparsify
    from .callback import SparsityCallback
    from .checkpoint.bsr import load_bsr, save_bsr
    from .sparsifier import Sparsifier
    from .trainer import SparseSeq2SeqTrainer, SparseTrainer

# Imported when they are asked for: kernels need neither transformers nor the layers, and who has no Trainer should not
# wait for the callback.
_HOMES = {
    "SparseSeq2SeqTrainer": "trainer",
    "SparseTrainer": "trainer",
    "Sparsifier": "sparsifier",
    "SparsityCallback": "callback",
    "load": "api",
    "load_bsr": "checkpoint.bsr",
    "save_bsr": "checkpoint.bsr",
    "sparsify": "api",
}
_MODULES = ("flops", "methods", "pattern", "schedules")

__all__ = [
    "SparseSeq2SeqTrainer",
    "SparseTrainer",
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
    if name in _MODULES:
        return import_module(f"{__name__}.{name}")
    if name in _HOMES:
        value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
