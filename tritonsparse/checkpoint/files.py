"""From sparse layers to ordinary checkpoints: dense tensors with exact zeros under the model's own names, which load
everywhere without this package."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping, MutableMapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..layers import SparseLayer
from .adapters import (
    ADAPTERS,
    as_plain,
    base_model,
    carries_adapters,
    file_names,
    is_peft_model,
    refuse_merged,
    stock_entries,
    write_adapters,
)
from .sidecar import write_sidecar
from .state import State

__all__ = ["check_weights", "finalize", "finalize_entries", "finalized_state_dict", "freeze_unsaved", "save_pretrained"]


def finalize_entries(
    entries: MutableMapping[str, Tensor], model: nn.Module, prefix: str = "", dense: bool = False
) -> None:
    """Turn a state dict of a model with sparse layers into one of the stock model, in place.

    Args:
        entries: weights, with masks and thresholds or without; what is missing is taken from the model's layers.
        model: the model, or a copy of it.
        prefix: what the model's keys begin with.
        dense: weights as they stand, rather than effective ones.
    """
    effective: dict[int, Tensor] = {}
    # A module that is registered twice has its keys under both names.
    for name, module in model.named_modules(remove_duplicate=False):
        if not isinstance(module, SparseLayer):
            continue
        at = f"{prefix}{name}." if name else prefix
        given = {part: entries[at + part] for part in ("weight", "mask", "threshold") if at + part in entries}
        if "weight" in given and not dense:
            if id(module) not in effective:
                effective[id(module)] = module.effective_weight(given)
            entries[f"{at}weight"] = effective[id(module)]
        for part in ("mask", "threshold"):
            entries.pop(at + part, None)


def check_weights(function: str, model: nn.Module, weights: Mapping[str, Tensor] | None) -> None:
    """Refuse weights that are not the model's by name and shape.

    Raises:
        ValueError: as said, naming the first.
    """
    own = model.state_dict() if weights else {}
    for name, tensor in (weights or {}).items():
        if name not in own or not isinstance(tensor, Tensor) or tensor.shape != own[name].shape:
            got = list(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
            wanted = f"of shape {list(own[name].shape)}" if name in own else "by names of the model's state dict"
            raise ValueError(f"{function}: expected tensors {wanted}, got {name!r} of {got}; pass the model's own")


def finalized_state_dict(
    model: nn.Module, weights: Mapping[str, Tensor] | None = None, dense: bool = False
) -> dict[str, Tensor]:
    """State dict of the stock model: effective weights, no views; `weights` are taken instead of the model's own."""
    result = {**model.state_dict(), **(weights or {})}
    finalize_entries(result, model, dense=dense)
    return result


@torch.no_grad()
def finalize(layers: Mapping[str, SparseLayer]) -> None:
    """Write the effective weights into the Parameters and restore the stock classes."""
    for layer in layers.values():
        layer.weight.copy_(layer.effective_weight())
        layer.restore()


def save_pretrained(model: Any, state: State, directory: Path) -> None:
    """`model.save_pretrained` of the finalized weights plus the sidecar, written beside and moved into place.

    Args:
        model: a transformers model with sparse layers.
        state: what its Sparsifier hands over.
        directory: created if need be. Adapters that the model carries go into a folder inside (adapters.py).

    Raises:
        TypeError: the model has no `save_pretrained`.
    """
    if not hasattr(model, "save_pretrained"):
        raise TypeError(
            f"save_pretrained: expected a transformers model, got {type(model).__name__}; save "
            f"sparsifier.finalized_state_dict() with safetensors instead"
        )
    refuse_merged("save_pretrained", model)
    finalized = finalized_state_dict(model)
    if state.embeddings is not None:
        finalized = state.embeddings.apply(finalized)
    base, names = base_model(model), file_names(model, state.layers, "base")
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=f".{directory.name}-") as temporary:
        written = Path(temporary)
        if carries_adapters(model) or is_peft_model(model):
            write_adapters(model, finalized, written, directory)
            finalized = stock_entries(model, finalized)
        with as_plain(base):
            base.save_pretrained(written, state_dict=finalized)
        if names:
            write_sidecar(state, written, names)
        directory.mkdir(exist_ok=True)
        shutil.rmtree(directory / ADAPTERS, ignore_errors=True)
        for file in written.iterdir():
            os.replace(file, directory / file.name)


def freeze_unsaved(model: nn.Module) -> list[str]:
    """Freeze the Parameters that the model's own save leaves out, and say which were trainable.

    `save_pretrained` drops the keys in `_keys_to_ignore_on_save`: tables that the class computes again, such as
    Marian's sinusoids. `from_pretrained` gives them back as trainable, and from transformers 5.24 on gradients reach
    them: training would change them, and the next checkpoint would forget it. A Parameter that is saved under another
    name as well stays as it is.
    """
    left_out = set(getattr(model, "_keys_to_ignore_on_save", None) or ())
    named = list(model.named_parameters(remove_duplicate=False))
    saved = {id(parameter) for name, parameter in named if name not in left_out}
    frozen = [name for name, parameter in named if id(parameter) not in saved and parameter.requires_grad]
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    return frozen
