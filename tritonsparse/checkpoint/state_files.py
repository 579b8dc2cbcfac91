"""A Sparsifier's state beside master weights: tritonsparse_state.json and tritonsparse_state.safetensors.

Several Sparsifiers with one accelerator number theirs.
"""

from __future__ import annotations

import json
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from . import bits
from .checksum import KEY, checksum, refuse_changed

__all__ = ["read_state", "register", "write_state"]

_JSON, _TENSORS = "tritonsparse_state.json", "tritonsparse_state.safetensors"


def write_state(saved: Mapping[str, Any], directory: Path, number: int = 0) -> None:
    """Write what `pack`, `Sparsifier.state_dict` or `as_dense` returned into `directory` as JSON and safetensors.

    number: which of the states that share the folder.
    """
    tensors, shapes = bits.packed(saved["tensors"])
    save_file(tensors, directory / _numbered(_TENSORS, number))
    rest = {key: value for key, value in saved.items() if key != "tensors"} | {"bits": shapes}
    rest[KEY] = checksum(rest, tensors)
    (directory / _numbered(_JSON, number)).write_text(json.dumps(rest, indent=1), encoding="utf-8")


def _numbered(name: str, number: int) -> str:
    stem, dot, suffix = name.partition(".")
    return f"{stem}_{number}{dot}{suffix}" if number else name


def read_state(directory: Path, number: int = 0) -> dict[str, Any]:
    """What `write_state` wrote, for `Sparsifier.load_state_dict`.

    Raises:
        FileNotFoundError: `directory` holds no such state.
    """
    head = directory / _numbered(_JSON, number)
    if not head.is_file():
        raise FileNotFoundError(
            f"load_state: expected {head.name} in {directory}, got no such file; resume from a checkpoint of a sparse "
            f"run"
        )
    tensors = directory / _numbered(_TENSORS, number)
    try:
        saved, loaded = json.loads(head.read_text(encoding="utf-8")), load_file(tensors)
        refuse_changed(saved, loaded)
        saved.pop(KEY, None)
        return {**saved, "tensors": bits.unpacked(loaded, saved.pop("bits", {}))}
    except (SafetensorError, OSError, TypeError, KeyError, ValueError) as error:
        raise ValueError(
            f"load_state: expected {head} and {tensors.name} as they were written, got a damaged file ({error}); take "
            f"another checkpoint"
        ) from error


def register(accelerator: Any, owner: Any) -> None:
    """Hook the `state_dict` of a Sparsifier into `accelerator.save_state` (main process) and `load_state` (all).

    Several with one accelerator are told apart by the order of these calls; a second call changes nothing. Those that
    are gone or finalized do not count.
    """
    if any(each is owner for each in _registered(accelerator)):
        return
    reference = weakref.ref(owner)

    def number() -> int | None:
        return next((place for place, each in enumerate(_registered(accelerator)) if each is reference()), None)

    def save(models: list[Any], weights: list[Any], output_dir: str) -> None:
        if accelerator.is_main_process and (place := number()) is not None:
            Path(output_dir).mkdir(parents=True, exist_ok=True)
            write_state(reference().state_dict(), Path(output_dir), place)  # type: ignore[union-attr]  # it has a place

    def load(models: list[Any], input_dir: str) -> None:
        if (place := number()) is not None:
            reference().load_state_dict(read_state(Path(input_dir), place))  # type: ignore[union-attr]  # as above

    vars(save)["tritonsparse_owner"] = reference
    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)


def _registered(accelerator: Any) -> list[Any]:
    """The live Sparsifiers that are saved with an accelerator's state."""
    references = [vars(hook).get("tritonsparse_owner") for hook in accelerator._save_model_state_pre_hook.values()]
    owners = [reference() for reference in references if reference is not None]
    return [owner for owner in owners if owner is not None and owner.is_live]
