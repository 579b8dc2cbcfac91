"""`finalize(format="bsr")`, and saving and loading models of packed blocks.

A folder holds the model's `config.json` and one file, `tritonsparse_blocks.safetensors`: all tensors of the model, with
`values` and `index` of every packed layer, and in its metadata which layers those are. It is read where this package
is installed (`load_bsr`), and by nothing else: a checkpoint for everybody is `finalize()`'s dense one.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import Tensor, nn
from transformers import AutoConfig

from ..kernels.block._index import flags_of
from ..kernels.block.topology import block_flags, grid_of
from ..layers import SparseLayer
from ..layers.bsr import BLOCK_CLASSES, BlockLayer, matrix_shape, packs
from ..pattern import Block, Pattern
from .checksum import KEY, checksum, refuse_changed

__all__ = ["BLOCKS", "finalize_blocks", "load_bsr", "plan_blocks", "save_bsr"]

logger = logging.getLogger(__name__)

BLOCKS = "tritonsparse_blocks.safetensors"
FORMAT_VERSION = 1
_METADATA = "tritonsparse"


@torch.no_grad()
def plan_blocks(layers: Mapping[str, SparseLayer], pattern: Pattern, max_density: float) -> dict[str, Tensor]:
    """Which layers are packed, by name, and their kept blocks: bool `[N/r, K/c]`. Changes nothing.

    A layer stays dense, with its zeros, where more than `max_density` of its blocks are kept, and where it is a
    convolution that no packed module stands for.

    Raises:
        ValueError: the pattern is not of blocks, `max_density` is outside (0, 1], or no layer would be packed.
    """
    if not isinstance(pattern, Block):
        raise ValueError(
            f"finalize: expected a pattern of blocks for format=\"bsr\", got '{pattern}'; sparsify with "
            f'pattern="block:32" or another size, or finalize(format="dense")'
        )
    if not 0.0 < max_density <= 1.0:
        raise ValueError(f"finalize: expected max_density in (0, 1], got {max_density}; 1 packs every layer")
    plan: dict[str, Tensor] = {}
    dense: dict[str, str] = {}
    for name, layer in layers.items():
        if (reason := packs(layer)) is not None:
            dense[name] = reason
            continue
        mask = layer.mask if layer.kind == "mask" else layer.effective_weight() != 0
        assert mask is not None  # kind "mask"
        flags = block_flags(layer.oriented(mask), (pattern.rows, pattern.columns))
        density = int(flags.sum()) / flags.numel()
        if density > max_density or layer.kind == "dense":
            dense[name] = f"{density:.0%} of its blocks kept"
        else:
            plan[name] = flags
    if not plan:
        name, reason = next(iter(dense.items()))
        raise ValueError(
            f'finalize: expected a layer with at most {max_density:.0%} of its blocks kept for format="bsr", got none: '
            f'{name} has {reason}; raise max_density, or finalize(format="dense")'
        )
    stay = "; ".join(f"{name}: {reason}" for name, reason in dense.items())
    logger.info("finalize: %d layers packed, %d stay dense%s", len(plan), len(dense), f" ({stay})" if stay else "")
    return plan


@torch.no_grad()
def finalize_blocks(
    model: nn.Module, layers: Mapping[str, SparseLayer], pattern: Pattern, plan: Mapping[str, Tensor]
) -> None:
    """Re-class the planned layers into modules of packed blocks, in place."""
    if plan:
        refuse_dense_save(model)
    for name, flags in plan.items():
        assert isinstance(pattern, Block)  # plan_blocks
        layer = layers[name]
        matrix = layer.oriented(layer.effective_weight())
        module = layer.restore()
        BLOCK_CLASSES[type(module)].pack(module, matrix, flags, (pattern.rows, pattern.columns))


def refuse_dense_save(model: Any) -> None:
    """Make `model.save_pretrained` an error: `from_pretrained` draws weights at random that it does not find."""
    if hasattr(model, "save_pretrained"):
        model.save_pretrained = _unreadable


def _unreadable(*args: Any, **kwargs: Any) -> None:
    raise RuntimeError(
        "save_pretrained: expected a model of dense weights, got packed blocks, for which from_pretrained would draw "
        "random weights; call tritonsparse.save_bsr(model, directory)"
    )


def save_bsr(model: nn.Module, directory: str | Path) -> None:
    """Write a model that `finalize(format="bsr")` returned; `load_bsr` reads it.

    Args:
        model: with modules of packed blocks; tied parameters are written once.
        directory: created if need be; nothing is left in it in part.

    Raises:
        ValueError: the model holds no packed blocks.
    """
    layers = {
        name: {"block": module.block, "count": len(module.values)}
        for name, module in model.named_modules()
        if isinstance(module, BlockLayer)
    }
    if not layers:
        raise ValueError(
            'save_bsr: expected a model with packed blocks, got none; pass what finalize(format="bsr") returned, or '
            "save this one with its own save_pretrained"
        )
    directory = Path(directory)
    directory.parent.mkdir(parents=True, exist_ok=True)
    head = {"format_version": FORMAT_VERSION, "layers": layers}
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=f".{directory.name}-") as temporary:
        file = Path(temporary) / BLOCKS
        save_model(model, str(file), metadata={_METADATA: json.dumps(head)})
        # Which of tied tensors are written is known then.
        tensors = load_file(file)
        with safe_open(str(file), framework="pt") as opened:
            metadata = opened.metadata() | {_METADATA: json.dumps(head | {KEY: checksum(head, tensors)})}
        save_file(tensors, file, metadata=metadata)
        for part in ("config", "generation_config"):
            config: Any = getattr(model, part, None)
            if hasattr(config, "save_pretrained"):
                config.save_pretrained(temporary)
        directory.mkdir(exist_ok=True)
        for file in Path(temporary).iterdir():
            os.replace(file, directory / file.name)


def load_bsr(directory: str | Path, model: Any, **kwargs: Any) -> Any:
    """A model that `save_bsr` wrote, on the CPU.

    Args:
        directory: a local folder.
        model: a transformers class such as `AutoModelForCausalLM`, which the folder's `config.json` configures; or a
            freshly built stock `nn.Module`, which is changed in place.
        kwargs: for the class's `from_config`, such as `attn_implementation`.

    Returns:
        The model, with tensors in the dtypes that were saved; in eval mode where a class was given.

    Raises:
        FileNotFoundError: the folder has no such file.
        ValueError: it is of another version or of another model.

    Example:
        >>> import tempfile, torch, tritonsparse as ts
        >>> def build(): return torch.nn.Sequential(torch.nn.Linear(4, 4, bias=False))
        >>> sparsifier = ts.sparsify(build(), "static", sparsity=0.75, pattern="block:2")
        >>> model = sparsifier.finalize(format="bsr")
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     ts.save_bsr(model, directory)
        ...     again = ts.load_bsr(directory, build())
        >>> again
        Sequential(
          (0): BlockLinear(4, 4, bias=False, blocks=1 of 2x2)
        )
        >>> torch.equal(again[0].to_dense(), model[0].to_dense())
        True
    """
    file = Path(directory) / BLOCKS
    if not file.is_file():
        raise FileNotFoundError(
            f"load_bsr: expected {BLOCKS} in {directory}, got no such file; load an ordinary checkpoint with its "
            f"class's from_pretrained"
        )
    try:
        with safe_open(str(file), framework="pt") as opened:
            head = json.loads((opened.metadata() or {}).get(_METADATA, "{}"))
            dtypes = {key: opened.get_slice(key).get_dtype() for key in opened.keys()}  # noqa: SIM118 - no mapping
    except (SafetensorError, ValueError) as error:
        raise _damaged(file, str(error)) from error
    if head.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"load_bsr: expected format_version {FORMAT_VERSION} in {file}, got {head.get('format_version')}; load it "
            f"with the version of tritonsparse that wrote it"
        )
    built = not isinstance(model, nn.Module)
    if built:
        model = _build(Path(directory), model, kwargs)
    _check_blocks(file, head.get("layers"))
    modules = {name: _fitting(model, name, entry) for name, entry in head["layers"].items()}
    with safe_open(str(file), framework="pt") as opened:
        for name, entry in head["layers"].items():
            _check_index(file, name, opened.get_tensor(f"{name}.index"), matrix_shape(modules[name]), entry)
    _check_tensors(file, model, head)
    for name, entry in head["layers"].items():
        module = modules[name]
        BLOCK_CLASSES[type(module)].adopt(module, tuple(entry["block"]), entry["count"])
    _cast(model, dtypes)
    load_model(model, str(file))
    refuse_dense_save(model)
    return model.eval() if built else model


def _damaged(file: Path, what: str) -> ValueError:
    return ValueError(f"load_bsr: expected {file} as save_bsr wrote it, got a damaged file ({what}); take another copy")


def _check_blocks(file: Path, layers: Any) -> None:
    """What the file's head says of its packed layers, against the tensors that are there."""
    if not isinstance(layers, dict) or not layers:
        raise _damaged(file, "no packed layers are named")
    with safe_open(str(file), framework="pt") as opened:
        keys = set(opened.keys())
        for name, entry in layers.items():
            count, block = (entry.get("count"), entry.get("block")) if isinstance(entry, dict) else (None, None)
            sizes = [count, *block] if isinstance(block, list) and len(block) == 2 else []
            if not sizes or not all(type(size) is int and size > 0 for size in sizes):
                raise _damaged(file, f"layer {name!r} has blocks {block!r} and count {count!r}")
            if not {f"{name}.values", f"{name}.index"} <= keys:
                raise _damaged(file, f"no values or no index of {name!r}")
            if (shape := opened.get_slice(f"{name}.values").get_shape()) != sizes:
                raise _damaged(file, f"values of {name!r} are of shape {shape}, not {sizes}")


def _check_index(file: Path, name: str, index: Tensor, shape: tuple[int, int], entry: Mapping[str, Any]) -> None:
    """The index itself: an edited one would lead a kernel out of its tensors."""
    rows, columns = grid_of("load_bsr", shape, tuple(entry["block"]))
    flags = flags_of(index, rows, columns)
    if flags is None or max(1, int(flags.sum())) != entry["count"]:
        raise _damaged(file, f"the index of {name!r} names no {entry['count']} of {rows} x {columns} blocks")


def _check_tensors(file: Path, model: nn.Module, head: Mapping[str, Any]) -> None:
    """All other tensors: their names, their shapes, and the checksum of all."""
    state = dict(model.state_dict(keep_vars=True))
    packed = {f"{name}.{part}" for name in head["layers"] for part in ("weight", "values", "index")}
    with safe_open(str(file), framework="pt") as opened:
        there = set(opened.keys())
        if odd := sorted(there - packed - state.keys()):
            raise _damaged(file, f"{odd[0]!r} is no tensor of the model")
        for key in sorted(there - packed):
            if (shape := opened.get_slice(key).get_shape()) != list(state[key].shape):
                raise _damaged(file, f"{key!r} is of shape {shape}, not {list(state[key].shape)}")
        # Of tied tensors one is written, of a shared layer one name.
        held = {id(state[key]) for key in (there | packed) & state.keys()}
        if absent := [key for key, tensor in state.items() if id(tensor) not in held]:
            raise _damaged(file, f"{absent[0]!r} is missing")
        try:
            refuse_changed(head, {key: opened.get_tensor(key) for key in there})
        except ValueError as error:
            raise _damaged(file, str(error)) from error


def _build(directory: Path, auto_class: Any, kwargs: Mapping[str, Any]) -> Any:
    if hasattr(auto_class, "from_config"):
        return auto_class.from_config(AutoConfig.from_pretrained(directory), **kwargs)
    return auto_class(auto_class.config_class.from_pretrained(directory), **kwargs)


def _fitting(model: nn.Module, name: str, entry: Mapping[str, Any]) -> nn.Module:
    """The stock module that a packed layer of this name takes the place of."""
    module: nn.Module | None = dict(model.named_modules()).get(name)
    if module is None or type(module) not in BLOCK_CLASSES or packs(module) is not None:
        raise ValueError(
            f"load_bsr: expected a stock linear layer at {name!r}, got "
            f"{'nothing' if module is None else type(module).__name__}; build the model that was saved"
        )
    (n, k), (r, c) = matrix_shape(module), entry["block"]
    if n % r or k % c:
        raise ValueError(
            f"load_bsr: expected blocks of {r}x{c} to divide {name!r}, got a weight of shape [{n}, {k}]; build the "
            f"model that was saved"
        )
    return module


def _cast(model: nn.Module, dtypes: Mapping[str, str]) -> None:
    """Give every tensor the dtype it was saved in; loading would round to the one it has."""
    names = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    for key, tensor in model.state_dict(keep_vars=True).items():
        dtype = names.get(dtypes.get(key, ""))
        if dtype is not None and tensor.is_floating_point() and tensor.dtype != dtype:
            # In place, so that ties stay.
            tensor.data = tensor.data.to(dtype)
