"""The sidecar `tritonsparse.safetensors` beside an ordinary checkpoint: what its zeros do not say.

Views, thresholds, the method and the clock, and the master weights where S(W) has forgotten something of them: soft
views shrink the survivors, and some methods train the weights that their masks hide. Training goes on from it bit for
bit.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..layers import SparseLayer
from . import bits
from .checksum import KEY, checksum, refuse_changed
from .state import State, pack, renamed

__all__ = ["SIDECAR", "read_sidecar", "restore_weights", "write_sidecar"]

SIDECAR = "tritonsparse.safetensors"
_METADATA = "tritonsparse"


def write_sidecar(
    state: State, directory: Path, names: Mapping[str, str] | None = None, elsewhere: Collection[str] = ()
) -> None:
    """Write what a Sparsifier hands over into `directory`, in one move.

    Args:
        names: what the file calls each layer; layers that are not in it are left out. None: all, as they are called.
        elsewhere: layers whose weights are not in `directory`: of the base beside adapters.
    """
    names = {name: name for name in state.layers} if names is None else names
    packed = renamed(pack(state), names)
    tensors: dict[str, Tensor] = {f"view.{key}": value for key, value in packed["tensors"].items()}
    nonzero = {}
    for old, name in names.items():
        layer = state.layers[old]
        if layer.threshold is not None:
            tensors[f"threshold.{name}"] = layer.threshold.detach().cpu().clone()
        if old in elsewhere:
            nonzero[name] = int(torch.count_nonzero(layer.effective_weight()))
        # Packed blocks are all that there is.
        elif not layer.compacted and not torch.equal(layer.effective_weight(), layer.weight):
            tensors[f"master.{name}"] = layer.weight.detach().cpu().contiguous().clone()
    tensors, shapes = bits.packed(tensors)
    head = {key: value for key, value in packed.items() if key != "tensors"}
    head |= {"bits": shapes, "keys": sorted(tensors)} | ({"elsewhere": nonzero} if nonzero else {})
    head[KEY] = checksum(head, tensors)
    temporary = directory / f".{SIDECAR}"
    save_file(tensors, temporary, metadata={_METADATA: json.dumps(head)})
    os.replace(temporary, directory / SIDECAR)


def read_sidecar(directory: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The Sparsifier's state as `pack` returned it, and the thresholds and master weights by "threshold.<layer>" and
    "master.<layer>".

    Raises:
        FileNotFoundError: `directory` has no sidecar.
        ValueError: it is damaged.
    """
    file = directory / SIDECAR
    if not file.is_file():
        raise FileNotFoundError(f"read_sidecar: expected {SIDECAR} in {directory}, got no such file")
    try:
        with safe_open(str(file), framework="pt") as opened:
            head: dict[str, Any] = json.loads(opened.metadata()[_METADATA])
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118 - no mapping
        refuse_changed(head, tensors)
        head.pop(KEY, None)
        if sorted(tensors) != head.pop("keys", sorted(tensors)):
            raise ValueError("tensors are missing")
        tensors = bits.unpacked(tensors, head.pop("bits", {}))
    except (SafetensorError, TypeError, KeyError, ValueError) as error:
        raise ValueError(
            f"read_sidecar: expected {file} as it was written, got a damaged file ({error}); take another checkpoint"
        ) from error
    for key, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.isnan().any():
            raise ValueError(f"read_sidecar: expected numbers in {file}, got NaN in {key!r}; take another checkpoint")
    views = {key.removeprefix("view."): value for key, value in tensors.items() if key.startswith("view.")}
    rest = {key: value for key, value in tensors.items() if not key.startswith("view.")}
    return {**head, "tensors": views}, rest


@torch.no_grad()
def restore_weights(
    layers: Mapping[str, SparseLayer],
    tensors: Mapping[str, Tensor],
    directory: Path,
    elsewhere: Mapping[str, int] | None = None,
) -> None:
    """Thresholds and master weights back into layers whose views are restored and whose weights are effective ones.

    Args:
        elsewhere: layers whose weights were not saved in `directory`, and how many of each were not 0: theirs are the
            base's, and become 0 where they are pruned.

    Raises:
        ValueError: tensors are missing or of another shape, or the weights are not those that the sidecar was written
            beside; nothing has been changed then.
    """
    for name, layer in layers.items():
        own: dict[str, Tensor | None] = {"weight": layer.weight, "threshold": layer.threshold}
        given: dict[str, Tensor] = {}
        for part, key in (("weight", f"master.{name}"), ("threshold", f"threshold.{name}")):
            there, saved = own[part], tensors.get(key)
            if part == "weight" and saved is None:
                continue
            shapes = [None if each is None else list(each.shape) for each in (there, saved)]
            if shapes[0] != shapes[1]:
                raise ValueError(
                    f"restore: expected a {part} of shape {shapes[0]} for {name!r} in {directory / SIDECAR}, got "
                    f"{shapes[1]}; load the model that was saved"
                )
            if there is not None and saved is not None:
                given[part] = saved.to(there)
        weight = layer.weight
        effective = layer.effective_weight(given)
        if elsewhere and name in elsewhere:
            if (kept := int(torch.count_nonzero(effective))) != elsewhere[name]:
                raise ValueError(
                    f"restore: expected the base of {directory / SIDECAR}, with {elsewhere[name]} weights under the "
                    f"mask of {name!r}, got {kept} that are not 0; load the base anew, and sparsify it as that run did"
                )
            continue
        close = 16 * torch.finfo(weight.dtype).eps
        if not torch.equal(effective, weight) and not torch.allclose(
            effective, weight, rtol=close, atol=close, equal_nan=True
        ):
            raise ValueError(
                f"restore: expected the weights that {directory / SIDECAR} was written beside, got others in {name!r}; "
                f"load the weights of the same folder first"
            )
    for name, layer in layers.items():
        if layer.threshold is not None:
            layer.threshold.copy_(tensors[f"threshold.{name}"])
        if f"master.{name}" in tensors:
            layer.weight.copy_(tensors[f"master.{name}"])
        if elsewhere and name in elsewhere:
            layer.weight.copy_(layer.effective_weight())
        layer.unseen = ""
