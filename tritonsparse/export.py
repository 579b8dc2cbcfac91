"""From sparse layers to ordinary checkpoints, and back.

The portable artefact is a dense safetensors file with exact zeros under the model's own names: it loads
everywhere without this package. The sidecar `tritonsparse.safetensors` holds what the zeros do not say:
views, thresholds, the method, and the master weights where S(W) has forgotten something of them: soft views
shrink the survivors, and some methods train the weights that their masks hide.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from . import state
from .layers import SparseLayer

if TYPE_CHECKING:
    from .sparsifier import Sparsifier

__all__ = ["SIDECAR", "finalize", "finalized_state_dict", "freeze_unsaved", "load", "save_pretrained"]

SIDECAR = "tritonsparse.safetensors"

logger = logging.getLogger(__name__)


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


def save_pretrained(sparsifier: Sparsifier, directory: Path) -> None:
    """`model.save_pretrained` of the finalized weights plus the sidecar, written beside and moved into place."""
    model: Any = sparsifier.model
    if not hasattr(model, "save_pretrained"):
        raise TypeError(
            f"save_pretrained: expected a transformers model, got {type(model).__name__}; save "
            f"sparsifier.finalized_state_dict() with safetensors instead"
        )
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=f".{directory.name}-") as temporary:
        model.save_pretrained(temporary, state_dict=sparsifier.finalized_state_dict())
        _write_sidecar(sparsifier, Path(temporary) / SIDECAR)
        directory.mkdir(exist_ok=True)
        for file in Path(temporary).iterdir():
            os.replace(file, directory / file.name)


def _write_sidecar(sparsifier: Sparsifier, path: Path) -> None:
    packed = state.pack(sparsifier)
    tensors: dict[str, Tensor] = {f"view.{key}": value for key, value in packed.pop("tensors").items()}
    for name, layer in sparsifier.layers.items():
        if layer.threshold is not None:
            tensors[f"threshold.{name}"] = layer.threshold.detach().cpu().clone()
        # Packed blocks are all that there is.
        if not layer.compacted and not torch.equal(layer.effective_weight(), layer.weight):
            tensors[f"master.{name}"] = layer.weight.detach().cpu().contiguous().clone()
    save_file(tensors, path, metadata={"tritonsparse": json.dumps(packed)})


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


def load(directory: str | Path, auto_class: Any, **kwargs: Any) -> tuple[Any, Sparsifier]:
    """A model saved by `Sparsifier.save_pretrained`, sparsified again as it was.

    Parameters that checkpoints of this class leave out are frozen, and the log names them.

    Args:
        directory: a local folder.
        auto_class: a transformers class with `from_pretrained`, such as `AutoModelForSeq2SeqLM`.
        kwargs: passed on to `from_pretrained`.

    Returns:
        The model with sparse layers and its Sparsifier, at the step where it was saved, not attached.

    Raises:
        FileNotFoundError: the folder has no sidecar.
        ValueError: the sidecar does not fit the model.
    """
    from .methods import METHODS
    from .sparsify import sparsify

    directory = Path(directory)
    if not (directory / SIDECAR).is_file():
        raise FileNotFoundError(
            f"load: expected {SIDECAR} in {directory}, got no such file; load the checkpoint with "
            f"{auto_class.__name__}.from_pretrained, it is an ordinary one"
        )
    with safe_open(str(directory / SIDECAR), framework="pt") as file:
        saved: dict[str, Any] = json.loads(file.metadata()["tritonsparse"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - no mapping
    model = auto_class.from_pretrained(directory, **kwargs)
    if frozen := freeze_unsaved(model):
        logger.info("load: froze %s, which checkpoints of %s leave out", ", ".join(frozen), type(model).__name__)
    config = {key: float(value) if value in ("inf", "-inf") else value for key, value in saved["config"].items()}
    sparsifier = sparsify(
        model,
        METHODS[saved["method"]](**config),
        pattern=saved["pattern"],
        include=list(saved["kinds"]),
        total_steps=saved["total_steps"],
        steps_per_epoch=saved["steps_per_epoch"],
        seed=saved["seed"],
        embedding_sparsity=saved["embedding_sparsity"],
    )
    views = {key.removeprefix("view."): value for key, value in tensors.items() if key.startswith("view.")}
    sparsifier.load_state_dict({**saved, "tensors": views})
    with torch.no_grad():
        for name, layer in sparsifier.layers.items():
            if layer.threshold is not None:
                layer.threshold.copy_(tensors[f"threshold.{name}"])
            if f"master.{name}" in tensors:
                layer.weight.copy_(tensors[f"master.{name}"])
    return model, sparsifier
