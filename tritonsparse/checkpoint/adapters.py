"""Models that carry adapters of PEFT, in saved files: the base under its stock names, the adapters beside it.

PEFT puts a layer inside another (`q_proj` becomes `q_proj.base_layer`), so a plain save of the base writes names that
no stock class reads, and its own save leaves the base out, pruned as it is.

    DIR/                   the base with its zeros, an ordinary checkpoint
    DIR/adapters/<name>/   each adapter as PEFT writes it, its base named as DIR
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn

from ..layers import SparseLayer

__all__ = [
    "ADAPTERS",
    "as_plain",
    "base_model",
    "carries_adapters",
    "file_names",
    "is_peft_model",
    "masks_hidden",
    "refuse_merged",
    "stock_entries",
    "stock_names",
    "tuner_layers",
    "write_adapters",
]

ADAPTERS = "adapters"
_PREFIX = "base_model.model."


def is_peft_model(model: nn.Module) -> bool:
    """Whether it is a PeftModel."""
    return "peft" in sys.modules and isinstance(model, importlib.import_module("peft").PeftModel)


def base_model(model: nn.Module) -> Any:
    """The model inside a PeftModel; any other as it is."""
    return model.get_base_model() if is_peft_model(model) else model  # type: ignore[operator]


def tuner_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Every layer of PEFT that holds another one, by name."""
    if "peft" in sys.modules:
        tuner = importlib.import_module("peft.tuners.tuners_utils").BaseTunerLayer
        yield from ((name, module) for name, module in model.named_modules() if isinstance(module, tuner))


def carries_adapters(model: nn.Module) -> bool:
    """Whether PEFT has changed the names of the model's modules."""
    return any(name != stock for name, stock in stock_names(base_model(model)).items())


def stock_names(base: nn.Module) -> dict[str, str]:
    """Names of the base's own modules -> the names that they have without adapters. Parts of adapters are not in it."""
    found: dict[str, str] = {}

    def walk(module: nn.Module, now: str, stock: str) -> None:
        while (part := _inner(module)) is not None:
            module, now = getattr(module, part), _join(now, part)
        found[now] = stock
        for name, child in module._modules.items():
            if child is not None:
                walk(child, _join(now, name), _join(stock, name))

    walk(base, "", "")
    return found


def file_names(model: nn.Module, layers: Mapping[str, nn.Module], of: str) -> dict[str, str]:
    """Names of layers -> what a sidecar calls them.

    Args:
        of: "model", all as they are; "base", those of the base alone, by stock names; "adapters", all, those of the
            base by stock names.
    """
    if of == "model":
        return {name: name for name in layers}
    base = base_model(model)
    stock = {id(base.get_submodule(now)): name for now, name in stock_names(base).items()}
    known = {name: stock[id(layer)] for name, layer in layers.items() if id(layer) in stock}
    return known if of == "base" else {name: name for name in layers} | known


def stock_entries(model: nn.Module, entries: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The base's part of the model's state dict, under stock names."""
    base = base_model(model)
    place = next(name for name, module in model.named_modules() if module is base)
    names = {_join(place, now): stock for now, stock in stock_names(base).items()}
    result = {}
    for key, tensor in entries.items():
        module, _, own = key.rpartition(".")
        if module in names:
            result[_join(names[module], own)] = tensor
    return result


@contextlib.contextmanager
def as_plain(base: Any) -> Iterator[None]:
    """Let `base.save_pretrained` write the base: with an adapter of `add_adapter` it writes that alone."""
    flagged = vars(base).get("_hf_peft_config_loaded", False)
    if flagged:
        base._hf_peft_config_loaded = False
    try:
        yield
    finally:
        if flagged:
            base._hf_peft_config_loaded = True


@contextlib.contextmanager
def masks_hidden(model: nn.Module) -> Iterator[None]:
    """Let PEFT collect a state dict without masks: of `modules_to_save` it looks up every key that the module has."""
    layers = [module for module in model.modules() if isinstance(module, SparseLayer)]
    masks = [layer.mask for layer in layers]
    for layer in layers:
        layer.mask = None
    try:
        yield
    finally:
        for layer, mask in zip(layers, masks, strict=True):
            layer.mask = mask


def refuse_merged(function: str, model: nn.Module) -> None:
    """Refuse a model whose adapters are merged and still there: a save would hold them twice.

    Raises:
        ValueError: as said, naming the layer.
    """
    for name, layer in tuner_layers(model):
        if layer.merged:
            raise ValueError(
                f"{function}: expected adapters beside their base, got merged ones in {name!r}; call unmerge_adapter() "
                f"first, or merge_and_unload()"
            )


def write_adapters(model: Any, entries: Mapping[str, Tensor], directory: Path, base_path: Path) -> None:
    """Write every adapter into `directory`/adapters/<name>, its base named as `base_path`.

    Args:
        model: a PeftModel, or a model into which PEFT put adapters.
        entries: its state dict with the zeros of sparse adapters in it, and without views.
    """
    base, wrapped = base_model(model), is_peft_model(model)
    for name, config in _configs(model).items():
        collect = importlib.import_module("peft").get_peft_model_state_dict
        with masks_hidden(model):
            weights = collect(model, state_dict=dict(entries), adapter_name=name)
        prefix = "" if wrapped else _PREFIX
        folder = directory / ADAPTERS / name
        folder.mkdir(parents=True)
        tensors = {f"{prefix}{key}": tensor.detach().cpu().contiguous().clone() for key, tensor in weights.items()}
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        saved = copy.deepcopy(config)
        saved.inference_mode, saved.base_model_name_or_path = True, str(base_path)
        saved.save_pretrained(str(folder), auto_mapping_dict=_class_of(base) if saved.task_type is None else None)


def _configs(model: Any) -> Mapping[str, Any]:
    """Of the adapters that are there: an unloaded PeftModel still names those that it had."""
    base = base_model(model)
    if carries_adapters(model):
        return getattr(base, "peft_config", None) or model.peft_config
    known = model.peft_config if is_peft_model(model) else {}
    return {name: config for name, config in known.items() if config.is_prompt_learning}


def _class_of(base: nn.Module) -> dict[str, str]:
    return {"base_model_class": type(base).__name__, "parent_library": type(base).__module__}


def _inner(module: nn.Module) -> str | None:
    """The name under which a module of PEFT holds the one that it replaced."""
    if "peft" not in sys.modules:
        return None
    if isinstance(module, importlib.import_module("peft.tuners.tuners_utils").BaseTunerLayer):
        return "base_layer" if hasattr(module, "base_layer") else None
    if isinstance(module, importlib.import_module("peft.utils.other").AuxiliaryTrainingWrapper):
        return "original_module"
    return None


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix and name else prefix or name
