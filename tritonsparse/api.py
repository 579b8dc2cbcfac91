"""The two ways in: a model's layers made sparse under a method's control, and a saved sparse model gone on with."""

from __future__ import annotations

import copy
import dataclasses
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from . import pattern as patterns
from .checkpoint.files import freeze_unsaved
from .checkpoint.sidecar import SIDECAR, read_sidecar
from .checkpoint.state import renamed
from .clock import Clock
from .initial_masks import Initial, InitialMask, resolve
from .layers import SparseLayer
from .layers.backend import check_backend, check_semi_structured
from .layers.classes import SPARSE_CLASSES
from .masks.embeddings import EmbeddingMasks
from .methods import METHODS, Method
from .pattern import Pattern
from .readers import no_fast_path
from .selection import named_sparsities, refuse_unfit, select
from .sparsifier import Sparsifier

__all__ = ["load", "sparsify"]

logger = logging.getLogger(__name__)


def sparsify(
    model: nn.Module,
    method: str | Method,
    *,
    sparsity: float | Mapping[str, float] | None = None,
    pattern: str | Pattern = "unstructured",
    include: list[str] | None = None,
    exclude: list[str] | None = None,
    distribution: str | None = None,
    backend: str = "auto",
    total_steps: int | None = None,
    steps_per_epoch: int | None = None,
    seed: int = 0,
    embedding_sparsity: float | None = None,
    initial_mask: InitialMask = None,
    output_heads: bool = False,
) -> Sparsifier:
    """Make the linear and convolution layers of `model` sparse, in place, and return the object that controls them.

    Every `nn.Linear`, `nn.Conv2d` and transformers `Conv1D` is re-classed: the same Parameter objects stay under the
    same names. Tied parameters, output heads, depthwise convolutions, `lora_*` layers and children of
    `nn.MultiheadAttention` stay dense.
    Call it before the optimizer is built and before any wrapping (DDP, `accelerator.prepare`, torch.compile).

    Args:
        model: any transformers model, or any `nn.Module`; changed in place.
        method: a name of `tritonsparse.methods.METHODS`, or a method object (copied, so that one object can
            configure several models).
        sparsity: fraction of zeros to reach, in [0, 1), for methods that take it; or such fractions by layer, fnmatch
            patterns on module names of which the first that matches counts, for methods in which every layer keeps its
            own. A layer that none matches stays dense.
        pattern: shape of the masks ("unstructured", "block:32", "2:4", "2:4:transposable", "channel"), as the method
            supports.
        include: fnmatch patterns on module names; naming a module overrides the default skips except ties.
        exclude: fnmatch patterns on module names that stay dense.
        distribution: "uniform" or "erk", for methods that take it.
        backend: "auto", "torch" (the reference, any device), or on a GPU "triton", "fused" (the effective weight inside
            the products), "block" (products that skip pruned blocks, for patterns of blocks whose sides 16 divides) or
            "semi_structured" (the GPU's sparse product in the forward, for pattern "2:4" in 16 bits; in dX too for
            "2:4:transposable").
        total_steps: optimizer steps planned; schedules that end need it.
        steps_per_epoch: optimizer steps in an epoch; schedules in epochs need it.
        embedding_sparsity: also keep this fraction of every embedding table at zero, tied output layers with it,
            whenever the layers are sparse (masks/embeddings.py); None = tables stay dense.
        initial_mask: what a method that starts from a mask starts from: "magnitude", "random", "zeros" (those that the
            weights have), or bool masks by layer name. None: the weights' own zeros if they are as many as asked for,
            else "magnitude" if the model was loaded from a checkpoint, else as the method's paper has it
            (initial_masks.py). The report says which.
        output_heads: take classifiers and other output heads too, as papers on images do.
        seed: seed of every random choice of the method.

    Returns:
        The Sparsifier; call `.attach(optimizer)` next.

    Raises:
        ValueError: an argument does not fit; nothing has been changed then.
        TypeError: `model` or `method` is of a wrong type.
        RuntimeError: a back end of Triton's where Triton cannot run.

    Example:
        >>> import torch, tritonsparse as ts
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> sparsifier = ts.sparsify(model, "gmp", sparsity=0.5, total_steps=10)
        >>> sorted(sparsifier.layers)
        ['0', '2']
    """
    refuse_unfit(model)
    chosen_method = _resolve_method(method, sparsity=sparsity, distribution=distribution)
    chosen_pattern = patterns.parse(pattern)
    if not isinstance(chosen_pattern, chosen_method.patterns):
        supported = ", ".join(sorted(kind.__name__.lower() for kind in chosen_method.patterns))
        raise ValueError(
            f"sparsify: expected a pattern that method {chosen_method.name!r} supports ({supported}), got "
            f"'{chosen_pattern}'; choose another pattern or method"
        )
    check_backend(backend, chosen_pattern)
    _check_names(include, exclude)
    modules, skipped = select(model, include, exclude, output_heads)
    if isinstance(by_layer := getattr(chosen_method, "distribution", None), Mapping):
        modules, rest = named_sparsities(by_layer, modules, skipped)
        skipped += rest
    chosen_method.settle({name: tuple(cast(Tensor, module.weight).shape) for name, module in modules.items()})
    clock = Clock(0, total_steps, steps_per_epoch)
    # The method may still refuse (a schedule without its length): it decides on the layers once re-classed, so a
    # refusal puts the stock classes back.
    embeddings = None if embedding_sparsity is None else EmbeddingMasks(model, embedding_sparsity)
    check_semi_structured(backend, {name: _shape(module) for name, module in modules.items()}, chosen_pattern)
    layers: dict[str, SparseLayer] = {
        name: SPARSE_CLASSES[type(module)].adopt(module, backend, chosen_pattern) for name, module in modules.items()
    }
    try:
        chosen_method.fit(clock)
        initial = resolve(initial_mask, model, chosen_method, layers)
        # `load` says what the masks are, so that none need be chosen.
        chosen_method.initial = chosen_method.initial or initial
        chosen_method.setup(layers, clock, chosen_pattern, seed)
        chosen_method.initial = initial
    except Exception:
        for layer in layers.values():
            layer.restore()
        raise
    no_fast_path(model, layers)
    sparsifier = Sparsifier(model, chosen_method, layers, skipped, clock, chosen_pattern, seed, embeddings)
    logger.info("%s", sparsifier.summary())
    return sparsifier


def load(directory: str | Path, auto_class: Any, **kwargs: Any) -> tuple[Any, Sparsifier]:
    """A model saved by `Sparsifier.save_pretrained`, sparsified again as it was.

    Parameters that checkpoints of this class leave out are frozen, and the log names them. Under another head, sparse
    layers that it lacks are left out, and its new ones are dense; the log names those too.

    Args:
        directory: a local folder.
        auto_class: a transformers class with `from_pretrained`, such as `AutoModelForSeq2SeqLM`.
        kwargs: passed on to `from_pretrained`.

    Returns:
        The model with sparse layers and its Sparsifier, at the step where it was saved, not attached.

    Raises:
        FileNotFoundError: the folder has no sidecar.
        ValueError: the sidecar does not fit the model.
    """
    directory = Path(directory)
    if not (directory / SIDECAR).is_file():
        raise FileNotFoundError(
            f"load: expected {SIDECAR} in {directory}, got no such file; load the checkpoint with "
            f"{auto_class.__name__}.from_pretrained, it is an ordinary one"
        )
    saved, tensors = read_sidecar(directory)
    if "elsewhere" in saved:
        raise ValueError(
            f"load: expected a folder with the base, got adapters alone in {directory}; load their base, sparsify it "
            f"as that run did, put the adapters on with PeftModel.from_pretrained, then sparsifier.restore(directory)"
        )
    model = auto_class.from_pretrained(directory, **kwargs)
    if frozen := freeze_unsaved(model):
        logger.info("load: froze %s, which checkpoints of %s leave out", ", ".join(frozen), type(model).__name__)
    here = dict(model.named_modules())
    names = [name for name in saved["kinds"] if name in here]
    if absent := [name for name in saved["kinds"] if name not in here]:
        if not names:
            raise ValueError(
                f"load: expected a model with {absent[0]!r}, which was sparse, got {type(model).__name__} without any "
                f"of the {len(absent)} sparse layers; load the class that was saved, or one of the same base"
            )
        logger.warning("load: %s has no %s; left out", type(model).__name__, ", ".join(absent))
    # What `sparsify` does to the weights of a new run (zeros outside its first masks) is undone.
    weights = {name: model.get_submodule(name).weight.detach().clone() for name in names}
    method = METHODS[saved["method"]](**saved["config"])
    masks = {name: saved["tensors"][key] for name in names if (key := f"{name}.mask") in saved["tensors"]}
    if masks.keys() == set(names):
        method.initial = Initial("restored", "", masks)
    sparsifier = sparsify(
        model,
        method,
        pattern=saved["pattern"],
        include=names,
        total_steps=saved["total_steps"],
        steps_per_epoch=saved["steps_per_epoch"],
        seed=saved["seed"],
        embedding_sparsity=saved["embedding_sparsity"],
    )
    with torch.no_grad():
        for name, weight in weights.items():
            sparsifier.layers[name].weight.copy_(weight)
    sparsifier.restore_sidecar(renamed(saved, {name: name for name in names}), tensors, directory)
    return model, sparsifier


def _resolve_method(method: str | Method, **overrides: Any) -> Method:
    given = {name: value for name, value in overrides.items() if value is not None}
    if isinstance(given.get("sparsity"), Mapping) and "distribution" in given:
        raise ValueError(
            f"sparsify: expected no distribution= beside sparsities by layer, got {given['distribution']!r}; leave "
            f"it out"
        )
    if isinstance(method, Method):
        for name, value in given.items():
            if isinstance(value, Mapping) and getattr(method, "distribution", None) == dict(value):
                continue
            if getattr(method, name, None) != value:
                raise ValueError(
                    f"sparsify: expected {name}= to agree with the method object ({name} = "
                    f"{getattr(method, name, 'no such field')!r}), got {value!r}; give it in one place"
                )
        return copy.deepcopy(method)
    if not isinstance(method, str):
        raise TypeError(
            f"sparsify: expected a method name or object, got {type(method).__name__}; try one of {', '.join(METHODS)}"
        )
    if method not in METHODS:
        raise ValueError(f"sparsify: expected a method among {', '.join(METHODS)}, got {method!r}; choose one of them")
    cls = METHODS[method]
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
    for name, value in given.items():
        if name not in fields:
            raise ValueError(
                f"sparsify: expected no {name}= for method {method!r}, which has no such field, got "
                f"{value!r}; leave it out"
            )
    missing = [
        name
        for name, field in fields.items()
        if name not in given and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ValueError(
            f"sparsify: expected {', '.join(missing)}= for method {method!r}, got nothing; pass it, as in "
            f"sparsify(model, {method!r}, {missing[0]}=0.8)"
        )
    return cls(**given)


def _shape(module: nn.Module) -> tuple[int, ...]:
    """Of a weight, outputs first."""
    shape = tuple(cast(Tensor, module.weight).shape)
    return shape[::-1] if isinstance(module, Conv1D) else shape


def _check_names(*groups: list[str] | None) -> None:
    for group in groups:
        if isinstance(group, str):
            raise TypeError(f"sparsify: expected a list of name patterns, got the string {group!r}; write [{group!r}]")
        if group is not None and not (isinstance(group, list | tuple) and all(isinstance(each, str) for each in group)):
            raise TypeError(f"sparsify: expected a list of name patterns, got {group!r}; write them as strings")
