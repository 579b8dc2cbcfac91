"""The one call: turn a model's linear and convolution layers into sparse ones under a method's control."""

from __future__ import annotations

import copy
import dataclasses
import logging
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from . import pattern as patterns
from .clock import Clock
from .embeddings import EmbeddingMasks
from .kernels import _triton
from .kernels.semi_structured import hardware_reason, operand_reason
from .layer_classes import SPARSE_CLASSES
from .layers import BACKENDS, SparseLayer
from .methods import METHODS, Method
from .pattern import NM, Block, Pattern
from .selection import refuse_unfit, select
from .sparsifier import Sparsifier

__all__ = ["sparsify"]

logger = logging.getLogger(__name__)


def sparsify(
    model: nn.Module,
    method: str | Method,
    *,
    sparsity: float | None = None,
    pattern: str | Pattern = "unstructured",
    include: list[str] | None = None,
    exclude: list[str] | None = None,
    distribution: str | None = None,
    backend: str = "auto",
    total_steps: int | None = None,
    steps_per_epoch: int | None = None,
    seed: int = 0,
    embedding_sparsity: float | None = None,
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
        sparsity: fraction of zeros to reach, in [0, 1), for methods that take it.
        pattern: shape of the masks ("unstructured", "block:32", "2:4", "2:4:transposable", "channel"), as the method
            supports.
        include: fnmatch patterns on module names; naming a module overrides the default skips except ties.
        exclude: fnmatch patterns on module names that stay dense.
        distribution: "uniform" or "erk", for methods that take it.
        backend: "auto", "torch" (the reference, any device), or on a GPU "triton", "fused" (the view inside the
            products), "block" (products that skip pruned blocks, for patterns of blocks whose sides 16 divides) or
            "semi_structured" (the GPU's sparse product in the forward, for pattern "2:4" in 16 bits; in dX too for
            "2:4:transposable").
        total_steps: optimizer steps planned; schedules that end need it.
        steps_per_epoch: optimizer steps in an epoch; schedules in epochs need it.
        embedding_sparsity: also keep this fraction of every embedding table at zero, tied output layers with it,
            whenever the layers are sparse (embeddings.py); None = tables stay dense.
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
    _check_backend(backend, chosen_pattern)
    _check_names(include, exclude)
    modules, skipped = select(model, include, exclude)
    clock = Clock(0, total_steps, steps_per_epoch)
    # The method may still refuse (a schedule without its length): it decides on the layers once re-classed, so a
    # refusal puts the stock classes back.
    embeddings = None if embedding_sparsity is None else EmbeddingMasks(model, embedding_sparsity)
    _check_semi_structured(backend, modules, chosen_pattern)
    block = (chosen_pattern.rows, chosen_pattern.columns) if isinstance(chosen_pattern, Block) else None
    n_of_m = chosen_pattern if isinstance(chosen_pattern, NM) else None
    layers: dict[str, SparseLayer] = {
        name: SPARSE_CLASSES[type(module)].adopt(module, backend, block, n_of_m) for name, module in modules.items()
    }
    try:
        chosen_method.setup(layers, clock, chosen_pattern, seed)
    except Exception:
        for layer in layers.values():
            layer.restore()
        raise
    sparsifier = Sparsifier(model, chosen_method, layers, skipped, clock, chosen_pattern, seed, embeddings)
    logger.info("%s", sparsifier.summary())
    return sparsifier


def _resolve_method(method: str | Method, **overrides: Any) -> Method:
    given = {name: value for name, value in overrides.items() if value is not None}
    if isinstance(method, Method):
        for name, value in given.items():
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


def _check_backend(backend: str, pattern: Pattern) -> None:
    if backend not in BACKENDS:
        raise ValueError(f"sparsify: expected a backend among {', '.join(BACKENDS)}, got {backend!r}; choose one")
    if backend == "block" and not (isinstance(pattern, Block) and pattern.rows % 16 == pattern.columns % 16 == 0):
        raise ValueError(
            f"sparsify: expected a pattern of blocks whose sides 16 divides with backend='block', got '{pattern}'; "
            f"choose 'block:64', or backend='auto'"
        )
    if backend == "semi_structured":
        if pattern not in (NM(2, 4), NM(2, 4, transposable=True)):
            raise ValueError(
                f"sparsify: expected pattern '2:4' or '2:4:transposable' with backend='semi_structured', got "
                f"'{pattern}'; choose one, or backend='auto'"
            )
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if (reason := hardware_reason(device)) is not None:
            raise RuntimeError(
                f"sparsify: expected a GPU with 2:4 products for backend='semi_structured', but {reason}; use "
                f"backend='auto' or 'torch'"
            )
    if backend in ("triton", "fused", "block") and not (
        _triton.AVAILABLE and (_triton.INTERPRETED or torch.cuda.is_available())
    ):
        raise RuntimeError(
            f"sparsify: expected a GPU and an installed Triton for backend={backend!r}, got none of the two or one of "
            f"them; use backend='auto' or 'torch'"
        )


def _check_semi_structured(backend: str, modules: Mapping[str, nn.Module], pattern: Pattern) -> None:
    if backend != "semi_structured":
        return
    both = isinstance(pattern, NM) and pattern.transposable
    for name, module in modules.items():
        weight = cast(Tensor, module.weight)
        reason = "it is a convolution"
        if weight.dim() == 2:
            n, k = reversed(weight.shape) if isinstance(module, Conv1D) else weight.shape
            # dX of a transposable mask is the product with the transpose.
            found = operand_reason(torch.bfloat16, n, k) or (operand_reason(torch.bfloat16, k, n) if both else None)
            if found is None:
                continue
            reason = found
        raise ValueError(
            f"sparsify: expected layers that 2:4 products take with backend='semi_structured', got {name}: {reason}; "
            f"exclude it"
        )


def _check_names(*groups: list[str] | None) -> None:
    for group in groups:
        if isinstance(group, str):
            raise TypeError(f"sparsify: expected a list of name patterns, got the string {group!r}; write [{group!r}]")
