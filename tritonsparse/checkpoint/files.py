"""From sparse layers to ordinary checkpoints, and back.

The portable artefact is a dense safetensors file with exact zeros under the model's own names: it loads
everywhere without this package. The sidecar `tritonsparse.safetensors` holds what the zeros do not say:
views, thresholds, the method, and the master weights where S(W) has forgotten something of them: soft views
shrink the survivors, and some methods train the weights that their masks hide.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..layers import SparseLayer

__all__ = ["SIDECAR", "finalize", "finalized_state_dict", "freeze_unsaved", "read_sidecar", "save_pretrained"]

SIDECAR = "tritonsparse.safetensors"


def finalized_state_dict(model: nn.Module, layers: Mapping[str, SparseLayer]) -> dict[str, Tensor]:
    """State dict of the stock model: effective weights, no thresholds; other tensors are the model's own."""
    result = dict(model.state_dict())
    effective = {id(layer): layer.effective_weight() for layer in layers.values()}
    # A module that is registered twice has its keys under both names.
    for name, module in model.named_modules(remove_duplicate=False):
        if id(module) in effective:
            prefix = f"{name}." if name else ""
            result[f"{prefix}weight"] = effective[id(module)]
            result.pop(f"{prefix}threshold", None)
    return result


@torch.no_grad()
def finalize(layers: Mapping[str, SparseLayer]) -> None:
    """Write the effective weights into the Parameters and restore the stock classes."""
    for layer in layers.values():
        layer.weight.copy_(layer.effective_weight())
        layer.restore()


def save_pretrained(
    model: Any,
    finalized: dict[str, Tensor],
    packed: Mapping[str, Any],
    layers: Mapping[str, SparseLayer],
    directory: Path,
) -> None:
    """`model.save_pretrained` of the finalized weights plus the sidecar, written beside and moved into place.

    Args:
        model: a transformers model.
        finalized: its state dict with zeros baked in.
        packed: the Sparsifier's `state_dict()`.
        layers: name -> sparse layer.
        directory: created if need be.

    Raises:
        TypeError: the model has no `save_pretrained`.
    """
    if not hasattr(model, "save_pretrained"):
        raise TypeError(
            f"save_pretrained: expected a transformers model, got {type(model).__name__}; save "
            f"sparsifier.finalized_state_dict() with safetensors instead"
        )
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=f".{directory.name}-") as temporary:
        model.save_pretrained(temporary, state_dict=finalized)
        _write_sidecar(packed, layers, Path(temporary) / SIDECAR)
        directory.mkdir(exist_ok=True)
        for file in Path(temporary).iterdir():
            os.replace(file, directory / file.name)


def _write_sidecar(packed: Mapping[str, Any], layers: Mapping[str, SparseLayer], path: Path) -> None:
    tensors: dict[str, Tensor] = {f"view.{key}": value for key, value in packed["tensors"].items()}
    for name, layer in layers.items():
        if layer.threshold is not None:
            tensors[f"threshold.{name}"] = layer.threshold.detach().cpu().clone()
        # Packed blocks are all that there is.
        if not layer.compacted and not torch.equal(layer.effective_weight(), layer.weight):
            tensors[f"master.{name}"] = layer.weight.detach().cpu().contiguous().clone()
    rest = {key: value for key, value in packed.items() if key != "tensors"}
    save_file(tensors, path, metadata={"tritonsparse": json.dumps(rest)})


def read_sidecar(directory: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What `save_pretrained` wrote beside the checkpoint: the Sparsifier's state without tensors, and all tensors."""
    with safe_open(str(directory / SIDECAR), framework="pt") as file:
        saved: dict[str, Any] = json.loads(file.metadata()["tritonsparse"])
        return saved, {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - no mapping


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
