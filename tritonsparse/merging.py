"""Adapters of PEFT over sparse layers: what a merge may change, and which adapters fit.

PEFT merges by adding to `weight`, or by replacing it. Over a layer that holds a mask a merge changes kept weights
alone, so that the zeros stay zeros, and says how much of what the adapter adds was dropped for that; unmerging takes it
back. An adapter that is sparse itself is merged as its forward sees it.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .checkpoint.adapters import tuner_layers
from .layers import SparseLayer

__all__ = ["check_adapters", "wrap_merges"]

# What the merges of one call dropped: squared norms (all that was added, what fell on zeros), one pair a layer.
_tallies: list[list[tuple[float, float]]] = []
_busy: set[int] = set()
# What a merged layer of PEFT would have where its base is pruned: without it a rotation (OFT) could not be taken back.
_hidden: weakref.WeakKeyDictionary[nn.Module, Tensor] = weakref.WeakKeyDictionary()


def wrap_merges(wrap: Callable[[type, str, Callable[..., Any]], None]) -> None:
    """Wrap PEFT's merges, where it is installed; `wrap` takes a class, the name of a method and what goes around it."""
    if importlib.util.find_spec("peft") is None:
        return
    utilities = importlib.import_module("peft.tuners.tuners_utils")
    for cls in (utilities.BaseTunerLayer, *_subclasses(utilities.BaseTunerLayer)):
        for name in {"merge", "unmerge"} & vars(cls).keys():
            wrap(cls, name, _merge if name == "merge" else _unmerge)
    for cls in (utilities.BaseTuner, *_subclasses(utilities.BaseTuner)):
        for name in {"merge_adapter", "_unload_and_optionally_merge"} & vars(cls).keys():
            wrap(cls, name, _merge_all)


def check_adapters(function: str, model: nn.Module) -> None:
    """Refuse adapters over sparse layers whose `weight`, which PEFT reads and merges, is not what they multiply by.

    Raises:
        ValueError: as said, naming the layer.
    """
    for name, tuner in tuner_layers(model):
        layer = tuner.get_base_layer()
        if not isinstance(layer, SparseLayer):
            continue
        if why := _unfit(layer):
            raise ValueError(
                f"{function}: expected adapters over layers that hold masks, got one over {name!r}, {why}; {_REMEDY}"
            )
        if layer.kind == "mask" and layer.mask is not None and layer.weight[~layer.mask].any():
            raise ValueError(
                f"{function}: expected weights that are 0 where {name!r} is pruned, as PEFT reads them, got others: "
                f"the adapter was initialised from its base (PiSSA, OLoRA, CorDA), or the method trains what it hides; "
                f"start the adapter at zero, and use method 'static' or 'gmp'"
            )


_REMEDY = (
    "call finalize(), then tritonsparse.sparsify(model, 'static', sparsity=..., initial_mask=\"zeros\"), and merge "
    "into that"
)


def _unfit(layer: SparseLayer) -> str:
    if layer.compacted:
        return "which is stored as its kept blocks"
    if layer.kind not in ("dense", "mask"):
        return f"which sees its weight through a threshold (kind {layer.kind!r})"
    return "" if layer.exponent is None else "which sees a power of its weight"


def _merge_all(stock: Callable[..., Any], tuner: Any, *args: Any, **kwargs: Any) -> Any:
    _tallies.append([])
    try:
        result = stock(tuner, *args, **kwargs)
    finally:
        tally = _tallies.pop()
    _say(tally)
    return result


def _merge(stock: Callable[..., Any], tuner: Any, *args: Any, **kwargs: Any) -> Any:
    return _change(stock, tuner, args, kwargs, says=True)


def _unmerge(stock: Callable[..., Any], tuner: Any, *args: Any, **kwargs: Any) -> Any:
    return _change(stock, tuner, args, kwargs, says=False)


@torch.no_grad()
def _change(stock: Callable[..., Any], tuner: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], says: bool) -> Any:
    layer = tuner.get_base_layer()
    if id(tuner) in _busy:
        # A class whose merge calls its parent's.
        return stock(tuner, *args, **kwargs)
    inside = set(layer.modules())
    parts = [module for module in tuner.modules() if isinstance(module, SparseLayer) and module not in inside]
    sparse = isinstance(layer, SparseLayer)
    if sparse and (why := _unfit(layer)):
        raise ValueError(
            f"merge: expected a base layer that holds a mask, got {type(layer).__name__}, {why}; {_REMEDY}"
        )
    _busy.add(id(tuner))
    try:
        with _as_seen(parts):
            if not (sparse and layer.kind == "mask"):
                return stock(tuner, *args, **kwargs)
            return _change_kept(stock, tuner, args, kwargs, says)
    finally:
        _busy.discard(id(tuner))


def _change_kept(
    stock: Callable[..., Any], tuner: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], says: bool
) -> Any:
    layer: SparseLayer = tuner.get_base_layer()
    weight, mask = layer.weight, layer.mask
    assert mask is not None  # kind "mask"
    own = weight.data
    seen = torch.where(mask, own, _hidden.get(tuner, torch.zeros_like(own)))
    weight.data = seen.clone()
    try:
        result = stock(tuner, *args, **kwargs)
        changed = weight.data
    finally:
        # Back in the place that graphs and kernels know.
        weight.data = own
    added = (changed - seen).double()
    weight.copy_(torch.where(mask, changed, own))
    if tuner.merged:
        _hidden[tuner] = torch.where(mask, 0, changed)
    else:
        _hidden.pop(tuner, None)
    if says:
        tally = (float(added.square().sum()), float(added[~mask].square().sum()))
        if _tallies:
            _tallies[-1].append(tally)
        else:
            _say([tally])
    return result


@contextlib.contextmanager
def _as_seen(parts: list[SparseLayer]) -> Iterator[None]:
    """Weights as their forwards see them."""
    own = [part.weight.data for part in parts]
    for part in parts:
        part.weight.data = part.effective_weight()
    try:
        yield
    finally:
        for part, data in zip(parts, own, strict=True):
            part.weight.data = data


def _say(tally: list[tuple[float, float]]) -> None:
    added, dropped = (sum(pair[side] for pair in tally) for side in (0, 1))
    if dropped == 0:
        return
    share = (dropped / added) ** 0.5
    shares = [(lost / all_of_it) ** 0.5 for all_of_it, lost in tally if all_of_it > 0]
    warnings.warn(
        f"merge: the zeros of {len(tally)} sparse layers were kept, so {share:.1%} of the norm of what the adapters "
        f"add to them was dropped ({max(shares):.1%} in the layer that lost most); outputs change by that",
        stacklevel=4,
    )


def _subclasses(cls: Any) -> Iterator[type]:
    each: type
    for each in cls.__subclasses__():
        yield each
        yield from _subclasses(each)
