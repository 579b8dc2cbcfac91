"""The Sparsifier's own state: views by module path, the clock, the method's state. No weights, no thresholds.

Tensors are keyed "<layer>.<view tensor>", the method's own ones "method:<key>".

state_dict()  {"format_version", "method", "config", "pattern", "step", "steps_per_epoch", "total_steps",
               "epoch_losses", "loss_sum", "loss_count", "method_state", "kinds", "tensors"}"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..clock import Clock
from ..layers import SparseLayer
from ..layers.view_state import VIEW_TENSORS
from ..losses import EpochLosses
from ..masks.embeddings import EmbeddingMasks
from ..methods import METHODS, Method
from ..pattern import Pattern

__all__ = ["State", "as_dense", "pack", "renamed", "unpack"]

FORMAT_VERSION = 1
_METHOD = "method:"
_EMBEDDING = "embedding:"
_KEYS = {
    "method", "config", "pattern", "step", "steps_per_epoch", "total_steps", "epoch_losses", "loss_sum", "loss_count",
    "method_state", "kinds", "tensors",
}  # fmt: skip


@dataclass(frozen=True)
class State:
    """What a Sparsifier hands over to be saved, and to be restored; shares all of it."""

    method: Method
    pattern: Pattern
    seed: int
    layers: Mapping[str, SparseLayer]
    clock: Clock
    losses: EpochLosses
    embeddings: EmbeddingMasks | None


def pack(state: State) -> dict[str, Any]:
    """Plain tensors (on the CPU) and numbers; loads with `weights_only=True`."""
    tensors = {}
    for name, layer in state.layers.items():
        for key in VIEW_TENSORS:
            if (tensor := layer.view_tensor(key)) is not None:
                tensors[f"{name}.{key}"] = _plain(tensor)
    method_state: dict[str, float | int] = {}
    for key, value in state.method.state_dict().items():
        if isinstance(value, Tensor):
            tensors[f"{_METHOD}{key}"] = _plain(value)
        else:
            method_state[key] = value
    if state.embeddings is not None:
        for key, mask in state.embeddings.state_dict().items():
            tensors[f"{_EMBEDDING}{key}"] = mask.cpu().clone()
    return {
        "format_version": FORMAT_VERSION,
        "method": state.method.name,
        "config": state.method.to_dict(),
        "pattern": str(state.pattern),
        "seed": state.seed,
        "embedding_sparsity": None if state.embeddings is None else state.embeddings.sparsity,
        "step": state.clock.step,
        "total_steps": state.clock.total_steps,
        "steps_per_epoch": state.clock.steps_per_epoch,
        "epoch_losses": list(state.losses.epochs),
        "loss_sum": None if state.losses.total is None else float(state.losses.total),
        "loss_count": state.losses.count,
        "method_state": method_state,
        "kinds": {name: layer.kind for name, layer in state.layers.items()},
        "tensors": tensors,
        "tensor_names": sorted(tensors),
    }


@torch.no_grad()
def unpack(state: State, saved: Mapping[str, Any], longer: bool = False) -> None:
    """Restore what `pack` returned; everything is checked before anything changes. `longer`: of a shorter run too."""
    _check(state, saved, longer)
    tensors: Mapping[str, Tensor] = saved["tensors"]
    if state.embeddings is not None:
        masks = {key.removeprefix(_EMBEDDING): mask for key, mask in tensors.items() if key.startswith(_EMBEDDING)}
        state.embeddings.load_state_dict(masks)
    for name, layer in state.layers.items():
        layer.kind = saved["kinds"][name]
        if layer.unseen == "mask":
            layer.unseen = ""
        for key in VIEW_TENSORS:
            tensor = tensors.get(f"{name}.{key}")
            if tensor is None and key == "mask" and layer.mask is not None:
                # A run of version 0.1 had none until it was sparse.
                layer.mask.fill_(True)
            else:
                setattr(layer, key, None if tensor is None else _beside(layer.weight, tensor))
    state.method.adopt(saved["config"])
    state.clock.step = int(saved["step"])
    state.losses.restore(saved["epoch_losses"], saved["loss_sum"], int(saved["loss_count"]))
    own = {key.removeprefix(_METHOD): tensor for key, tensor in tensors.items() if key.startswith(_METHOD)}
    state.method.load_state_dict({**saved["method_state"], **own})
    if not state.method.idle:
        state.method.resume(state.layers)
        if saved["total_steps"] != state.clock.total_steps:
            state.method.replan(state.layers, state.clock)


def _plain(tensor: Tensor) -> Tensor:
    """A copy on the CPU, contiguous: safetensors takes no channels-last mask."""
    return tensor.detach().cpu().clone(memory_format=torch.contiguous_format)


def _beside(weight: Tensor, tensor: Tensor) -> Tensor:
    """A copy on the weight's device; of the weight's strides too, where it is of its shape."""
    if tensor.shape != weight.shape:
        return tensor.to(weight.device, copy=True)
    return torch.empty_like(weight, dtype=tensor.dtype).copy_(tensor)


def _check(state: State, saved: Mapping[str, Any], longer: bool) -> None:
    def refuse(what: str, expected: object, got: object) -> None:
        raise ValueError(
            f"load_state_dict: expected {what} {expected!r}, got {got!r}; sparsify the model with the arguments of "
            f"the run that was saved"
        )

    if saved.get("format_version") != FORMAT_VERSION:
        refuse("format_version", FORMAT_VERSION, saved.get("format_version"))
    if absent := sorted(_KEYS - saved.keys()):
        refuse("the key", absent[0], sorted(saved))
    for key, kinds in (("step", int), ("loss_count", int), ("loss_sum", (int, float, type(None)))):
        if not isinstance(saved[key], kinds) or isinstance(saved[key], bool):
            refuse(f"{key} as a number,", "as it was saved", saved[key])
    losses = saved["epoch_losses"]
    if not isinstance(losses, list) or not all(isinstance(each, int | float) for each in losses):
        refuse("epoch_losses as numbers,", "as they were saved", losses)
    if saved["method"] != state.method.name:
        refuse("a state of method", state.method.name, saved["method"])
    config, theirs = state.method.to_dict(), state.method.completed(saved["config"])
    for key in config.keys() | theirs.keys():
        left_to_run = config.get(key) is None and key in state.method.fits()
        if config.get(key) != theirs.get(key) and not left_to_run:
            refuse(f"{state.method.name}.{key} =", config.get(key), theirs.get(key))
    for key, value in (
        ("pattern", str(state.pattern)),
        ("total_steps", state.clock.total_steps),
        ("steps_per_epoch", state.clock.steps_per_epoch),
        ("embedding_sparsity", None if state.embeddings is None else state.embeddings.sparsity),
    ):
        if key == "total_steps" and longer and value and saved[key] and saved[key] <= value:
            continue
        if saved.get(key) != value:
            refuse(f"{key} =", value, saved[key])
    names, others = set(state.layers), set(saved["kinds"])
    if names != others:
        odd = sorted(names ^ others)
        refuse(f"the same {len(names)} layers", sorted(names)[0], f"{len(others)} layers, differing in {odd[:3]}")
    for name, layer in state.layers.items():
        kind = saved["kinds"][name]
        possible = ["dense"]
        possible += ["soft", "hard", "step"] if layer.threshold is not None else []
        possible += ["mask"] if f"{name}.mask" in saved["tensors"] else []
        if kind not in possible:
            refuse(f"the view of {name!r} among", possible, kind)
    # Version 0.1 did not say which tensors there are.
    there = sorted(saved["tensors"])
    if there != (said := saved.get("tensor_names", there)):
        odd = sorted({*there} ^ {*said}) if isinstance(said, list) else []
        refuse("the tensors that it names,", len(said) if isinstance(said, list) else said, f"others ({odd[:1]})")
    own = {f"{_METHOD}{key}": value for key, value in state.method.state_dict().items() if isinstance(value, Tensor)}
    for key, tensor in saved["tensors"].items():
        if key in own and tensor.shape != own[key].shape:
            refuse(f"{key} of shape", list(own[key].shape), list(tensor.shape))
        if key.startswith((_METHOD, _EMBEDDING)):
            continue
        name, _, part = key.rpartition(".")
        if name not in names or part not in VIEW_TENSORS:
            refuse("tensors of", [f"<layer>.{each}" for each in VIEW_TENSORS], key)
        shape = torch.Size() if part == "alpha" else state.layers[name].weight.shape
        if tensor.shape != shape:
            refuse(f"{key} of shape", list(shape), list(tensor.shape))


def renamed(saved: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """The state of some of the layers under other names: old -> new."""

    def in_method(key: str) -> str | None:
        what, _, layer = key.partition("/")
        return key if not layer else f"{what}/{names[layer]}" if layer in names else None

    def in_tensors(key: str) -> str | None:
        if key.startswith(_METHOD):
            new = in_method(key.removeprefix(_METHOD))
            return None if new is None else f"{_METHOD}{new}"
        layer, _, part = key.rpartition(".")
        return key if key.startswith(_EMBEDDING) else f"{names[layer]}.{part}" if layer in names else None

    def over(entries: Mapping[str, Any], rename: Callable[[str], str | None]) -> dict[str, Any]:
        return {new: value for key, value in entries.items() if (new := rename(key)) is not None}

    tensors = over(saved["tensors"], in_tensors)
    return {
        **saved,
        "kinds": over(saved["kinds"], names.get),
        "tensors": tensors,
        "tensor_names": sorted(tensors),
        "method_state": over(saved["method_state"], in_method),
    }


def as_dense(saved: Mapping[str, Any]) -> dict[str, Any]:
    """The state that a dense run of the same model would have at this step: what a dense twin goes on from."""
    return {
        **saved,
        "method": "dense",
        "config": METHODS["dense"]().to_dict(),
        "pattern": "unstructured",
        "embedding_sparsity": None,
        "method_state": {},
        "kinds": dict.fromkeys(saved["kinds"], "dense"),
        "tensors": {},
        "tensor_names": [],
    }
