"""Which modules of a model are sparsified, and why the others are not.

Modules are chosen by exact type and dotted name, never by model family. A subclass of `nn.Linear` belongs
to another library (LoRA, quantised, parametrized layers) and is left alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, cast

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.parameter import UninitializedParameter

from .layers import SparseLayer
from .layers.base import RESERVED
from .layers.classes import SPARSE_CLASSES
from .layers.conv2d import is_depthwise
from .masks.distribution import given
from .readers import Reader, weight_readers

__all__ = ["Skip", "named_sparsities", "refuse_unfit", "select"]


@dataclass(frozen=True)
class Skip:
    """A module that stays as it is, and the reason."""

    name: str
    reason: str
    numel: int


def refuse_unfit(model: nn.Module) -> None:
    """Refuse a model that must not be changed, with the remedy.

    Raises:
        TypeError: `model` is no `nn.Module`.
        ValueError: it is wrapped (DDP, FSDP, torch.compile), sharded, on the meta device, offloaded, or
            sparsified already.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"sparsify: expected an nn.Module, got {type(model).__name__}; pass the model itself")
    kind = type(model).__name__
    if isinstance(model, DistributedDataParallel | DataParallel) or kind.startswith(
        ("FSDP", "FullyShardedDataParallel", "DeepSpeedEngine")
    ):
        raise ValueError(
            f"sparsify: expected an unwrapped model, got {kind}; call sparsify before wrapping or "
            f"accelerator.prepare, or pass accelerator.unwrap_model(model)"
        )
    if hasattr(model, "_orig_mod"):
        raise ValueError(f"sparsify: expected an uncompiled model, got {kind}; call sparsify before torch.compile")
    for name, module in model.named_modules():
        if isinstance(module, SparseLayer):
            raise ValueError(
                f"sparsify: expected a model without sparse layers, got {name!r} sparsified already; call "
                f"finalize() on its Sparsifier first"
            )
        if _is_offloaded(module):
            raise ValueError(
                f"sparsify: expected weights that stay on one device, got {name!r} offloaded by accelerate; load "
                f"the model without device_map offloading"
            )
    for name, parameter in model.named_parameters():
        if isinstance(parameter, UninitializedParameter):
            raise ValueError(
                f"sparsify: expected weights with values, got {name!r}, which is made at the first forward; run the "
                f"model once before sparsify"
            )
        if parameter.device.type == "meta":
            raise ValueError(
                f"sparsify: expected weights with values, got {name!r} on the meta device; load the weights before "
                f"sparsify"
            )
        if type(parameter).__name__ == "DTensor" or hasattr(parameter, "device_mesh"):
            raise ValueError(
                f"sparsify: expected whole parameters, got {name!r} sharded (DTensor); call sparsify before "
                f"sharding, which is not supported yet"
            )


def select(
    model: nn.Module, include: list[str] | None, exclude: list[str] | None, output_heads: bool = False
) -> tuple[dict[str, nn.Module], list[Skip]]:
    """The modules to sparsify by dotted name, in the model's order, and those skipped with the reason.

    Args:
        model: any module.
        include: fnmatch patterns on full names; a module that one matches is taken although it is an output
            head, a depthwise convolution or a `lora_*` layer, never although it is tied: that is refused where the
            module is named in full, skipped where a wildcard matches it. None = every module.
        exclude: fnmatch patterns on full names that are left dense.
        output_heads: take output heads too.

    Raises:
        ValueError: nothing matched, a pattern that matches no module, or `include` names a tied module.
    """
    candidates = {name: module for name, module in model.named_modules() if type(module) in SPARSE_CLASSES}
    # A pattern that matches only a container ("model.encoder") names none of its children. What stays dense anyway,
    # an embedding or a norm, may be excluded.
    holders = {name for name, module in model.named_modules() if module._parameters}
    for label, patterns, known in (("include", include, candidates), ("exclude", exclude, holders)):
        for pattern in patterns or []:
            if not any(fnmatchcase(name, pattern) for name in known):
                raise ValueError(_nothing_matched(f"{label} pattern {pattern!r}", candidates))
    tied = _tied_parameters(model)
    heads = set() if output_heads else _output_heads(model)
    readers = weight_readers(model)
    chosen: dict[str, nn.Module] = {}
    skipped: list[Skip] = []
    for name, module in candidates.items():
        named = include is not None and any(fnmatchcase(name, pattern) for pattern in include)
        reason = None
        if not isinstance(module._parameters.get("weight"), nn.Parameter):
            reason = "weight is not a Parameter of the module"
        elif module.weight.numel() == 0:
            reason = "no weights"
        elif own := [each for each in RESERVED if hasattr(module, each)]:
            reason = f"has an attribute {own[0]!r} of its own"
        elif "forward" in vars(module) and not hasattr(module, "_hf_hook"):
            reason = "forward is replaced on the instance"
        elif exclude is not None and any(fnmatchcase(name, pattern) for pattern in exclude):
            reason = "excluded"
        elif include is not None and not named:
            reason = "not included"
        elif id(module.weight) in tied:
            reason = "tied parameter"
        elif (reader := readers.get(name)) is not None and not (named and reader.calls):
            # The parent computes with the weight itself: a sparse forward would never be called.
            reason = f"read by {reader.name}"
        elif type(module.weight) is not nn.Parameter or not module.weight.is_floating_point():
            reason = f"quantised weight ({type(module.weight).__name__}, {module.weight.dtype})"
        elif not named and not module.weight.requires_grad and not _carries_adapter(model, name):
            reason = "frozen"
        elif not named and id(module) in heads:
            reason = "output head"
        elif not named and is_depthwise(module):
            # Few weights, and those the papers keep or lose most by (RigL, section 4: dense; MobileNet).
            reason = "depthwise convolution"
        elif not named and any(part.startswith("lora_") for part in name.split(".")):
            reason = "LoRA adapter"
        # A wildcard sweeps; only a module that is named in full was surely meant.
        if name in (include or []) and (reason == "tied parameter" or str(reason).startswith("read by")):
            raise ValueError(
                f"sparsify: expected include to name modules with a weight of their own, got {name!r} ({reason}); "
                f"leave it out"
            )
        if reason is None:
            chosen[name] = module
        else:
            skipped.append(Skip(name, reason, module.weight.numel() if module.weight is not None else 0))
    skipped += _other_weights(model, readers)
    if not chosen:
        what = "linear or convolution layers to sparsify" if include is None else f"include patterns {include}"
        raise ValueError(_nothing_matched(what, candidates, skipped))
    return chosen, skipped


def named_sparsities(
    sparsities: Mapping[str, float], modules: dict[str, nn.Module], skipped: list[Skip]
) -> tuple[dict[str, nn.Module], list[Skip]]:
    """The modules to which sparsities by pattern give one above 0, and the others.

    Raises:
        ValueError: a pattern matches no module of those that can be sparse, or nothing is left.
    """
    known = {*modules, *(skip.name for skip in skipped)}
    for pattern in sparsities:
        if not any(fnmatchcase(name, pattern) for name in known):
            raise ValueError(_nothing_matched(f"sparsity pattern {pattern!r}", modules))
    own = given(sparsities, modules)
    chosen = {name: module for name, module in modules.items() if own.get(name)}
    if not chosen:
        raise ValueError(_nothing_matched("a sparsity above 0", modules, skipped))
    weights = {name: cast(nn.Parameter, module.weight).numel() for name, module in modules.items()}
    return chosen, [Skip(name, "no sparsity given", weights[name]) for name in modules if name not in chosen]


def _carries_adapter(model: nn.Module, name: str) -> bool:
    """Whether a layer is the base of an adapter of PEFT, which freezes it and trains beside it."""
    parent = model.get_submodule(name.rpartition(".")[0])
    return name.endswith("base_layer") and type(parent).__module__.startswith("peft.")


def _nothing_matched(what: str, candidates: dict[str, Any], skipped: list[Skip] | None = None) -> str:
    names = ", ".join(list(candidates)[:3]) or "none at all"
    reasons = Counter(skip.reason for skip in skipped or [])
    why = "; skipped: " + ", ".join(f"{count} {reason}" for reason, count in reasons.items()) if reasons else ""
    return (
        f"sparsify: expected {what} to match a module, got no match; layers of this model: {names}{why}; "
        f"correct the patterns"
    )


def _tied_parameters(model: nn.Module) -> set[int]:
    """ids of the parameters that more than one module holds, or that transformers ties by name."""
    holders = Counter(
        id(parameter)
        for module in model.modules()
        for parameter in module._parameters.values()
        if parameter is not None
    )
    tied = {identity for identity, count in holders.items() if count > 1}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    names: dict[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    for pair in names.items():
        tied |= {id(parameters[name]) for name in pair if name in parameters}
    return tied


def _output_heads(model: nn.Module) -> set[int]:
    """ids of the modules that `get_output_embeddings()` of the model or a submodel returns, and of those outside a
    transformers model's base that give one number a label or a token: classifiers, scores, spans, CTC."""
    heads = set()
    for module in model.modules():
        heads |= _task_heads(module)
        getter = getattr(module, "get_output_embeddings", None)
        if getter is None:
            continue
        try:
            heads.add(id(getter()))
        except (AttributeError, NotImplementedError):
            # transformers raises where a model has no output embeddings.
            continue
    return heads


def _task_heads(module: nn.Module) -> set[int]:
    base = module._modules.get(getattr(module, "base_model_prefix", None) or "")
    config = getattr(module, "config", None)
    if base is None or config is None:
        return set()
    sizes = {getattr(config, name, None) for name in ("num_labels", "vocab_size")} - {None}
    inside = {id(each) for each in base.modules()}
    outputs = {id(each): getattr(each, "out_features", getattr(each, "nf", None)) for each in module.modules()}
    return {each for each, size in outputs.items() if each not in inside and size is not None and size in sizes}


def _other_weights(model: nn.Module, readers: Mapping[str, Reader]) -> list[Skip]:
    """Weights with two or more dimensions that no supported module holds: named, so that none is missed silently."""
    skipped = []
    seen: set[int] = set()
    for prefix, module in model.named_modules():
        if type(module) in SPARSE_CLASSES:
            continue
        embedding = isinstance(module, nn.Embedding | nn.EmbeddingBag)
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.dim() >= 2 and id(parameter) not in seen:
                seen.add(id(parameter))
                reason = "embedding" if embedding else f"{type(module).__name__} is not supported"
                if parameter.dim() == 3 and len(parameter) > 1:
                    # Experts of a mixture: one product over all of them, which the model makes itself.
                    reason = f"stacked weights of {type(module).__name__}"
                if prefix in readers:
                    reason = f"read by {readers[prefix].name}"
                skipped.append(Skip(f"{prefix}.{name}" if prefix else name, reason, parameter.numel()))
    return skipped


def _is_offloaded(module: nn.Module) -> bool:
    hook = getattr(module, "_hf_hook", None)
    hooks = getattr(hook, "hooks", [hook])
    return any(getattr(each, "offload", False) for each in hooks)
