"""Calls of other libraries that move weights and ask no layer. They are wrapped when the first model is made sparse.

    PreTrainedModel.save_pretrained   writes effective weights, as an ordinary checkpoint, and the sidecar beside them
    Accelerator.save_model            the same
    AveragedModel.update_parameters   masks are copied, never averaged (with use_buffers=True torch averages buffers)
    Trainer._save                     the same of a model without save_pretrained, once a SparsityCallback runs in one
    PeftModel.save_pretrained         writes the adapter, as ever, and the sidecar of the base that it leaves out
    PEFT's merges                     change kept weights alone (merging.py)

The saves read `state_dict()`, which holds master weights and masks because training goes on from it; nothing tells it
that an export is meant. What has no sparse layers passes through, and so does a state dict that holds no views.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import logging
import weakref
from collections.abc import Callable, MutableMapping
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from transformers import PreTrainedModel

from .checkpoint.adapters import base_model, carries_adapters, masks_hidden, refuse_merged, stock_entries
from .checkpoint.files import finalize_entries
from .checkpoint.sidecar import SIDECAR
from .layers import SparseLayer
from .masks.embeddings import EmbeddingMasks
from .merging import wrap_merges

__all__ = ["guard", "guard_trainer", "release"]

logger = logging.getLogger(__name__)


class Owner(Protocol):
    """A Sparsifier."""

    embeddings: EmbeddingMasks | None

    def write_sidecar(self, directory: str | Path, of: str = "model") -> None: ...


_owners: weakref.WeakKeyDictionary[nn.Module, weakref.ref[Any]] = weakref.WeakKeyDictionary()
_wrapped: set[tuple[type, str]] = set()


def guard(model: nn.Module, owner: Owner) -> None:
    """Let the calls above know whose sidecar belongs beside the model's weights."""
    for each in (model, base_model(model)):
        _owners[each] = weakref.ref(owner)
    # All ranks choose the same masks, so DDP need not send them at every forward.
    masks = [f"{name}.mask" if name else "mask" for name in _sparse(model)]
    vars(model).setdefault("_ddp_params_and_buffers_to_ignore", []).extend(masks)
    _wrap(PreTrainedModel, "save_pretrained", _save_pretrained)
    _wrap(Accelerator, "save_model", _save_model)
    _wrap(AveragedModel, "update_parameters", _update_parameters)
    wrap_merges(_wrap)
    if importlib.util.find_spec("peft") is not None:
        _wrap(importlib.import_module("peft").PeftModel, "save_pretrained", _save_adapters)


def guard_trainer() -> None:
    """Called where transformers' Trainer is imported anyway, which takes a second."""
    _wrap(importlib.import_module("transformers").Trainer, "_save", _save_module)


def release(model: nn.Module) -> None:
    """The model's layers are stock again."""
    for each in (model, base_model(model)):
        _owners.pop(each, None)
    vars(model).pop("_ddp_params_and_buffers_to_ignore", None)


def _wrap(cls: type, name: str, around: Callable[..., Any]) -> None:
    if (cls, name) in _wrapped:
        return
    _wrapped.add((cls, name))
    stock = getattr(cls, name)

    @functools.wraps(stock)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        return around(stock, self, *args, **kwargs)

    setattr(cls, name, wrapped)


def _sparse(model: nn.Module) -> dict[str, SparseLayer]:
    return {name: module for name, module in model.named_modules() if isinstance(module, SparseLayer)}


def _save_pretrained(stock: Callable[..., Any], model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    call = inspect.signature(stock).bind(model, *args, **kwargs)
    if (entries := _export(model, call.arguments.get("state_dict"))) is None:
        return stock(model, *args, **kwargs)
    adapted = carries_adapters(model)
    # With an adapter of `add_adapter` it writes that alone.
    alone = adapted and vars(model).get("_hf_peft_config_loaded", False)
    if adapted and not alone:
        refuse_merged("save_pretrained", model)
        entries = stock_entries(model, entries)
    call.arguments["state_dict"] = entries
    result = stock(*call.args, **call.kwargs)
    if call.arguments.get("is_main_process", True):
        _write_sidecar(model, Path(call.arguments["save_directory"]), "adapters" if alone else "base")
    return result


def _save_adapters(stock: Callable[..., Any], model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    if (entries := _export(model, kwargs.get("state_dict"))) is None:
        return stock(model, *args, **kwargs)
    call = inspect.signature(stock).bind(model, *args, **kwargs)
    call.arguments.setdefault("kwargs", {})["state_dict"] = entries
    with masks_hidden(model):
        result = stock(*call.args, **call.kwargs)
    if call.arguments.get("is_main_process", True):
        _write_sidecar(model, Path(call.arguments["save_directory"]), "adapters")
    return result


def _save_module(
    stock: Callable[..., Any], trainer: Any, output_dir: str | None = None, state_dict: Any = None
) -> None:
    plain = _owner(trainer.model) is not None and not hasattr(trainer.model, "save_pretrained")
    entries = _export(trainer.model, state_dict) if plain else None
    stock(trainer, output_dir, state_dict if entries is None else entries)
    if plain and trainer.args.should_save:
        _write_sidecar(trainer.model, Path(output_dir or trainer.args.output_dir))


def _export(model: nn.Module, given: Any) -> dict[str, Tensor] | None:
    """Effective weights in place of those of a state dict, the model's own where None is given; None where there are no
    views to take out."""
    views = [f"{name}.{part}" for name in _sparse(model) for part in ("mask", "threshold")]
    if not views or (given is not None and not any(view in given for view in views)):
        return None
    entries = dict(model.state_dict() if given is None else given)
    _finalize(entries, model)
    return entries


def _save_model(
    stock: Callable[..., Any], accelerator: Any, model: nn.Module, save_directory: Any, *args: Any, **kwargs: Any
) -> Any:
    inner = accelerator.unwrap_model(model, keep_torch_compile=False)
    if not _sparse(inner):
        return stock(accelerator, model, save_directory, *args, **kwargs)

    def export(module: nn.Module, entries: Any, prefix: str, metadata: Any) -> None:
        _finalize(entries, module, prefix)

    handle = inner.register_state_dict_post_hook(export)
    try:
        result = stock(accelerator, model, save_directory, *args, **kwargs)
    finally:
        handle.remove()
    if accelerator.is_main_process and Path(save_directory).is_dir():
        _write_sidecar(inner, Path(save_directory))
    return result


def _owner(model: nn.Module) -> Owner | None:
    reference = _owners.get(model) or _owners.get(base_model(model))
    return None if reference is None else reference()


def _finalize(entries: MutableMapping[str, Tensor], model: nn.Module, prefix: str = "") -> None:
    finalize_entries(entries, model, prefix)
    owner = _owner(model)
    if owner is not None and owner.embeddings is not None:
        entries.update(owner.embeddings.apply(entries))


def _write_sidecar(model: nn.Module, directory: Path, of: str = "model") -> None:
    if (owner := _owner(model)) is not None:
        owner.write_sidecar(directory, of)
        return
    # Of a copy, or of a model of which a part was made sparse: nothing here knows its method.
    (directory / SIDECAR).unlink(missing_ok=True)
    logger.warning(
        "save_pretrained: %s was written with its zeros and without %s, as no Sparsifier was made of this model; "
        "training goes on from a checkpoint that has both",
        *(directory, SIDECAR),
    )


@torch.no_grad()
def _update_parameters(stock: Callable[..., Any], averaged: AveragedModel, model: nn.Module) -> None:
    copies, layers = list(_sparse(averaged.module).values()), list(_sparse(model).values())
    if len(copies) != len(layers):
        raise ValueError(
            f"AveragedModel: expected a copy of a model with {len(layers)} sparse layers, got one with {len(copies)}; "
            f"make it after sparsify"
        )
    if not averaged.use_buffers or not layers:
        return stock(averaged, model)
    hidden = [(module, module.mask) for module in (*copies, *layers)]
    for module, _ in hidden:
        module.mask = None
    try:
        stock(averaged, model)
    finally:
        for module, mask in hidden:
            module.mask = mask
    for copy, layer in zip(copies, layers, strict=True):
        today = layer.view_tensor("mask")
        if copy.mask is not None and today is not None:
            copy.mask.copy_(today)
    return None
