"""Checkpoint folders that are whole or not there: written under a temporary name, then renamed.

output_dir/step_200/   what accelerate's save_state writes (model, optimizer, RNG), the Sparsifier's state,
                       the scheduler's, and run.json: position, configuration, history, checksums
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from tritonsparse.eval.command_line import naming
from tritonsparse.methods import METHODS

from .damage import RUN_FILE, read, write

__all__ = [
    "average_weights",
    "checkpoint_folders",
    "clear_unfinished",
    "find",
    "read_run",
    "refuse_other_model",
    "save",
    "whole",
    "writing",
]

logger = logging.getLogger(__name__)

_NAME = re.compile(r"(?:step|epoch)_(\d+)")
_UNFINISHED = ".unfinished-"


def save(
    accelerator: Accelerator,
    output_dir: Path,
    name: str,
    run: Mapping[str, Any],
    keep: int | None,
    finish: Callable[[Path], None] | None = None,
) -> Path:
    """Write checkpoint `name`; drop the oldest ones beyond `keep`. Called by every process.

    finish: called by the main process with the folder before it gets its name.

    Raises:
        OSError: the disk is full, gone or read-only; what was whole before is whole still, and named.
    """
    final, temporary = output_dir / name, output_dir / f"{_UNFINISHED}{name}"
    with writing(final, output_dir, temporary if accelerator.is_main_process else None):
        if accelerator.is_main_process:
            shutil.rmtree(temporary, ignore_errors=True)
        accelerator.wait_for_everyone()
        accelerator.save_state(str(temporary))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            if finish is not None:
                finish(temporary)
            write(run, temporary)
            _remove(final)
            os.replace(temporary, final)
            if keep is not None:
                for old in checkpoint_folders(output_dir)[:-keep]:
                    _remove(old)
        accelerator.wait_for_everyone()
    return final


@contextlib.contextmanager
def writing(target: Path, output_dir: Path, unfinished: Path | None = None) -> Iterator[None]:
    """Around what writes alone: torch, safetensors and tokenizers have errors of their own for a full disk.

    unfinished: removed where it fails, for half a checkpoint would keep the disk full.

    Raises:
        OSError: for any; it names what could not be written, the room that there was, and what is whole.
    """
    try:
        yield
    except Exception as error:
        try:
            room = f"{shutil.disk_usage(output_dir).free / 2**20:.1f} MiB were free"
        except OSError:
            room = "the folder is gone"
        if unfinished is not None:
            shutil.rmtree(unfinished, ignore_errors=True)
        raise OSError(f"checkpoint: expected to write {target}, got {error}; {room}; {whole(output_dir)}") from error


def whole(output_dir: Path) -> str:
    """In words: the checkpoints that a stopped run can go on from, those of runs in its own folders too."""
    try:
        inside = [each for each in output_dir.iterdir() if each.is_dir() and not _NAME.fullmatch(each.name)]
        folders = [each for place in (output_dir, *sorted(inside)) for each in checkpoint_folders(place)]
    except (OSError, ValueError) as error:
        return f"no checkpoint can be read ({error})"
    if not folders:
        return f"no checkpoint is in {output_dir}"
    names = ", ".join(str(folder.relative_to(output_dir)) for folder in folders)
    return f"whole in {output_dir}: {names}; go on with --resume_from_checkpoint latest"


def _remove(folder: Path) -> None:
    """Delete a finished checkpoint, if it is there; a process killed meanwhile leaves none in part."""
    if folder.exists():
        doomed = folder.with_name(f"{_UNFINISHED}removed-{folder.name}")
        shutil.rmtree(doomed, ignore_errors=True)
        os.replace(folder, doomed)
        shutil.rmtree(doomed)


def checkpoint_folders(output_dir: Path) -> list[Path]:
    """Finished checkpoints under `output_dir`, oldest first."""
    folders = [path for path in output_dir.glob("*_*") if _NAME.fullmatch(path.name) and (path / RUN_FILE).is_file()]
    return sorted(folders, key=lambda path: int(read_run(path)["step"]))


def clear_unfinished(output_dir: Path) -> None:
    """Remove what a killed process left half-written."""
    for path in output_dir.glob(f"{_UNFINISHED}*"):
        logger.warning("removing the unfinished checkpoint %s", path.name)
        shutil.rmtree(path)


def find(resume: str, output_dir: Path) -> Path | None:
    """The folder that `--resume_from_checkpoint` means; None when "latest" finds none (a fresh start).

    Raises:
        ValueError: a path that is no finished checkpoint, or "latest" finds one whose run.json is missing or damaged.
    """
    if resume == "latest":
        for path in sorted(output_dir.glob("*_*")):
            if _NAME.fullmatch(path.name) and not (path / RUN_FILE).is_file() and any(path.iterdir()):
                read(path)
        folders = checkpoint_folders(output_dir)
        return folders[-1] if folders else None
    expected = f"a checkpoint folder (with {RUN_FILE})"
    with naming("resume", expected, resume, "name a step_N or epoch_N folder, or 'latest'"):
        if not (Path(resume) / RUN_FILE).is_file():
            raise FileNotFoundError("no such file")
    return Path(resume)


def read_run(folder: Path) -> dict[str, Any]:
    """What the run.json of a checkpoint says of the run.

    Raises:
        ValueError: it is damaged.
    """
    return read(folder)[0]


def refuse_other_model(folder: Path, model: nn.Module, configuration: Mapping[str, Any]) -> None:
    """Refuse to resume from a checkpoint of another model or another configuration; nothing is loaded.

    Raises:
        ValueError: the first difference, named.
    """
    saved = read_run(folder)["configuration"]
    for key, value in configuration.items():
        was = saved.get(key)
        if key == "method_fields" and saved.get("method") in METHODS:
            method = METHODS[saved["method"]]
            was, value = method.completed(was or {}), method.completed(value)
            # Left to the run's length: what that run had.
            value |= {name: was[name] for name in method.fits() if value[name] is None}
        if was != value:
            raise ValueError(
                f"resume: expected a checkpoint of a run with {key} = {value!r}, got {saved.get(key)!r} in "
                f"{folder.name}; repeat the arguments of that run or start afresh in another --output_dir"
            )
    expected = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    with safe_open(str(folder / "model.safetensors"), framework="pt") as file:
        found = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 - no mapping
    # Tied tensors are stored once, under any of their names: every stored tensor must fit, not the reverse.
    for name, shape in found.items():
        if expected.get(name) != shape:
            raise ValueError(
                f"resume: expected a checkpoint of this model ({name}: {expected.get(name, 'no such tensor')}), got "
                f"{shape} in {folder.name}; resume with the model that was saved"
            )


def average_weights(folders: Sequence[Path]) -> dict[str, Tensor]:
    """Mean of the model's tensors over checkpoints: master weights and thresholds, before any view; others of the last.

    Averaging what the views show instead would join the supports of all checkpoints and lose sparsity.
    """
    mean: dict[str, Tensor] = {}
    for folder in folders:
        for name, tensor in load_file(folder / "model.safetensors").items():
            value = tensor.double() if tensor.is_floating_point() else tensor
            mean[name] = mean[name] + value if name in mean and tensor.is_floating_point() else value
    return {
        name: (tensor / len(folders)).to(torch.float32) if tensor.dtype == torch.float64 else tensor
        for name, tensor in mean.items()
    }
