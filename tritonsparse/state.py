"""The Sparsifier's own state: views by module path, the clock, the method's state. No weights, no thresholds.

Tensors are keyed "<layer>.<view tensor>", the method's own ones "method:<key>".

state_dict()  {"format_version", "method", "config", "pattern", "step", "steps_per_epoch", "total_steps",
               "epoch_losses", "loss_sum", "loss_count", "method_state", "kinds", "tensors"}
on disk       tritonsparse_state.json and tritonsparse_state.safetensors
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from .layers import VIEW_TENSORS

if TYPE_CHECKING:
    from .sparsifier import Sparsifier

__all__ = ["as_dense", "load_state", "pack", "register", "save_state", "unpack", "write_state"]

FORMAT_VERSION = 1
_METHOD = "method:"
_EMBEDDING = "embedding:"
_JSON, _TENSORS = "tritonsparse_state.json", "tritonsparse_state.safetensors"
_KEYS = {
    "method", "config", "pattern", "step", "steps_per_epoch", "total_steps", "epoch_losses", "loss_sum", "loss_count",
    "method_state", "kinds", "tensors",
}  # fmt: skip


def pack(sparsifier: Sparsifier) -> dict[str, Any]:
    """Plain tensors (on the CPU) and numbers; loads with `weights_only=True`."""
    tensors = {}
    for name, layer in sparsifier.layers.items():
        for key in VIEW_TENSORS:
            if (tensor := layer.view_tensor(key)) is not None:
                tensors[f"{name}.{key}"] = _plain(tensor)
    method_state: dict[str, float | int] = {}
    for key, value in sparsifier.method.state_dict().items():
        if isinstance(value, Tensor):
            tensors[f"{_METHOD}{key}"] = _plain(value)
        else:
            method_state[key] = value
    if sparsifier.embeddings is not None:
        for key, mask in sparsifier.embeddings.state_dict().items():
            tensors[f"{_EMBEDDING}{key}"] = mask.cpu().clone()
    loss_sum = sparsifier._loss_sum
    return {
        "format_version": FORMAT_VERSION,
        "method": sparsifier.method.name,
        "config": sparsifier.method.to_dict(),
        "pattern": str(sparsifier.pattern),
        "seed": sparsifier.seed,
        "embedding_sparsity": None if sparsifier.embeddings is None else sparsifier.embeddings.sparsity,
        "step": sparsifier.clock.step,
        "total_steps": sparsifier.clock.total_steps,
        "steps_per_epoch": sparsifier.clock.steps_per_epoch,
        "epoch_losses": list(sparsifier.epoch_losses),
        "loss_sum": None if loss_sum is None else float(loss_sum),
        "loss_count": sparsifier._loss_count,
        "method_state": method_state,
        "kinds": {name: layer.kind for name, layer in sparsifier.layers.items()},
        "tensors": tensors,
    }


@torch.no_grad()
def unpack(sparsifier: Sparsifier, saved: Mapping[str, Any]) -> None:
    """Restore what `pack` returned; everything is checked before anything changes."""
    sparsifier._compaction.refuse_load()
    _check(sparsifier, saved)
    tensors: Mapping[str, Tensor] = saved["tensors"]
    if sparsifier.embeddings is not None:
        masks = {key.removeprefix(_EMBEDDING): mask for key, mask in tensors.items() if key.startswith(_EMBEDDING)}
        sparsifier.embeddings.load_state_dict(masks)
    for name, layer in sparsifier.layers.items():
        layer.kind = saved["kinds"][name]
        for key in VIEW_TENSORS:
            tensor = tensors.get(f"{name}.{key}")
            setattr(layer, key, None if tensor is None else _beside(layer.weight, tensor))
    sparsifier.clock.step = int(saved["step"])
    sparsifier.epoch_losses = [float(loss) for loss in saved["epoch_losses"]]
    device = next(iter(sparsifier.layers.values())).weight.device
    loss_sum = saved["loss_sum"]
    sparsifier._loss_sum = None if loss_sum is None else torch.tensor(loss_sum, device=device)
    sparsifier._loss_count = int(saved["loss_count"])
    own = {key.removeprefix(_METHOD): tensor for key, tensor in tensors.items() if key.startswith(_METHOD)}
    sparsifier.method.load_state_dict({**saved["method_state"], **own})
    sparsifier.method.resume(sparsifier.layers)


def _plain(tensor: Tensor) -> Tensor:
    """A copy on the CPU, contiguous: safetensors takes no channels-last mask."""
    return tensor.detach().cpu().clone(memory_format=torch.contiguous_format)


def _beside(weight: Tensor, tensor: Tensor) -> Tensor:
    """A copy on the weight's device; of the weight's strides too, where it is of its shape."""
    if tensor.shape != weight.shape:
        return tensor.to(weight.device, copy=True)
    return torch.empty_like(weight, dtype=tensor.dtype).copy_(tensor)


def _check(sparsifier: Sparsifier, saved: Mapping[str, Any]) -> None:
    def refuse(what: str, expected: object, got: object) -> None:
        raise ValueError(
            f"load_state_dict: expected {what} {expected!r}, got {got!r}; sparsify the model with the arguments of "
            f"the run that was saved"
        )

    if saved.get("format_version") != FORMAT_VERSION:
        refuse("format_version", FORMAT_VERSION, saved.get("format_version"))
    if absent := sorted(_KEYS - saved.keys()):
        refuse("the key", absent[0], sorted(saved))
    if saved["method"] != sparsifier.method.name:
        refuse("a state of method", sparsifier.method.name, saved["method"])
    config = sparsifier.method.to_dict()
    for key in config.keys() | saved["config"].keys():
        if config.get(key) != saved["config"].get(key):
            refuse(f"{sparsifier.method.name}.{key} =", config.get(key), saved["config"].get(key))
    for key, value in (
        ("pattern", str(sparsifier.pattern)),
        ("total_steps", sparsifier.clock.total_steps),
        ("steps_per_epoch", sparsifier.clock.steps_per_epoch),
        ("embedding_sparsity", None if sparsifier.embeddings is None else sparsifier.embeddings.sparsity),
    ):
        if saved.get(key) != value:
            refuse(f"{key} =", value, saved[key])
    names, others = set(sparsifier.layers), set(saved["kinds"])
    if names != others:
        odd = sorted(names ^ others)
        refuse(f"the same {len(names)} layers", sorted(names)[0], f"{len(others)} layers, differing in {odd[:3]}")
    for name, layer in sparsifier.layers.items():
        kind = saved["kinds"][name]
        possible = ["dense"]
        possible += ["soft", "hard", "step"] if layer.threshold is not None else []
        possible += ["mask"] if f"{name}.mask" in saved["tensors"] else []
        if kind not in possible:
            refuse(f"the view of {name!r} among", possible, kind)
    for key, tensor in saved["tensors"].items():
        if key.startswith((_METHOD, _EMBEDDING)):
            continue
        name, _, part = key.rpartition(".")
        if name not in names or part not in VIEW_TENSORS:
            refuse("tensors of", [f"<layer>.{each}" for each in VIEW_TENSORS], key)
        shape = torch.Size() if part == "alpha" else sparsifier.layers[name].weight.shape
        if tensor.shape != shape:
            refuse(f"{key} of shape", list(shape), list(tensor.shape))


def as_dense(saved: Mapping[str, Any]) -> dict[str, Any]:
    """The state that a dense run of the same model would have at this step: what a dense twin goes on from."""
    from .methods import METHODS

    return {
        **saved,
        "method": "dense",
        "config": METHODS["dense"]().to_dict(),
        "pattern": "unstructured",
        "embedding_sparsity": None,
        "method_state": {},
        "kinds": dict.fromkeys(saved["kinds"], "dense"),
        "tensors": {},
    }


def save_state(sparsifier: Sparsifier, directory: Path) -> None:
    """Write the state into `directory` as JSON and safetensors."""
    write_state(pack(sparsifier), directory)


def write_state(saved: dict[str, Any], directory: Path) -> None:
    """Write what `pack` or `as_dense` returned into `directory`."""
    save_file(saved.pop("tensors"), directory / _TENSORS)
    (directory / _JSON).write_text(json.dumps(saved, indent=1), encoding="utf-8")


def load_state(sparsifier: Sparsifier, directory: Path) -> None:
    """Read what `save_state` wrote.

    Raises:
        FileNotFoundError: `directory` holds no such state.
        ValueError: it is of another method or model.
    """
    if not (directory / _JSON).is_file():
        raise FileNotFoundError(
            f"load_state: expected {_JSON} in {directory}, got no such file; resume from a checkpoint of a sparse run"
        )
    saved = json.loads((directory / _JSON).read_text(encoding="utf-8"))
    unpack(sparsifier, {**saved, "tensors": load_file(directory / _TENSORS)})


def register(accelerator: Any, sparsifier: Sparsifier) -> None:
    """Hook the state into `accelerator.save_state` (main process) and `load_state` (every process)."""

    def save(models: list[Any], weights: list[Any], output_dir: str) -> None:
        if accelerator.is_main_process:
            Path(output_dir).mkdir(parents=True, exist_ok=True)
            save_state(sparsifier, Path(output_dir))

    def load(models: list[Any], input_dir: str) -> None:
        load_state(sparsifier, Path(input_dir))

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)
