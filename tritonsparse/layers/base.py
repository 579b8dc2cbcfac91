"""Sparse layers: stock modules re-classed in place, holding state and deciding nothing.

`nn.Linear` becomes `SparseLinear`, transformers' `Conv1D` becomes `SparseConv1D` and `nn.Conv2d` becomes `SparseConv2d`
by assignment to `__class__`: the same Parameter objects stay under the same names, so optimizers, checkpoints, ties and
`from_pretrained` see the model they knew. A layer holds

    view            what the method wrote: `kind`, `threshold`, `mask`, `grad_mask`, `alpha` (kernels/weight/view.py),
                    and `exponent`, the a of PowerPropagation, whose view is of W |W|^(a-1)
    pattern         the shape of its masks
    backend         which code computes its products (backend.py)
    topology        where its kept blocks are, for products that skip the others
    sparse_input    how it packs the input it saves (SWAT); None = it saves its input as it is
    cache           the effective weight that the Sparsifier wrote last; None = every forward makes its own

The mask is a buffer, all True while a method that holds masks is dense: whatever moves weights (state dicts, copies,
averages) moves it too. Loaded without its view, a layer takes the mask from the zeros of its weight where it has any,
and warns at its next forward where it has none. `grad_mask` and `alpha`, which say only where gradients go, are
attributes: they follow the weight's device and keep their dtype. The forward changes none of this.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from ..kernels._eager import as_dtype
from ..kernels.block.topology import Topology, mask_versions
from ..kernels.weight.op import effective_weight
from ..pattern import Pattern
from .backend import Backend, choose_backend
from .cache import Cache
from .older import from_older
from .reclass import reclass
from .sparse_input import SparseInput
from .view_state import VIEW_TENSORS, Viewed

__all__ = ["RESERVED", "SparseLayer", "autocast_operands", "product_dtype"]

_ATTRIBUTES = ("kind", "grad_mask", "alpha", "exponent", "pattern", "backend", "topology", "sparse_input", "cache")
# Names that a module must not have of its own to become a sparse layer.
RESERVED = (*_ATTRIBUTES, "mask", "threshold", "unseen", "called", "view")


def product_dtype(x: Tensor, weight: Tensor) -> torch.dtype:
    """The dtype of a layer's product: autocast's, or the weight's. float64 stays out, as for torch's own ops."""
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return weight.dtype


def autocast_operands(x: Tensor, bias: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """x and the bias in autocast's dtype, as autocast casts them: for ops that are not on its list, and because it
    keeps its cast of a Parameter until its context ends, whatever an optimizer does meanwhile."""
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        x, bias = as_dtype(x, dtype), None if bias is None else as_dtype(bias, dtype)
    return x, bias


class SparseLayer(Viewed):
    """What the sparse layers share; never constructed, only re-classed into (`adopt`)."""

    stock_class: type[nn.Module]
    # Whether a kept effective weight can be used: the forward multiplies by a matrix stored as the weight is.
    caches: ClassVar[bool] = False
    # Whether `weight` holds the kept blocks only (compact.py).
    compacted: ClassVar[bool] = False
    # Whether the forward has run outside compiled code.
    called: bool = False

    bias: nn.Parameter | None
    backend: Backend
    topology: Topology | None
    sparse_input: SparseInput | None
    cache: Cache | None

    @classmethod
    def adopt(cls, module: nn.Module, backend: str, pattern: Pattern) -> SparseLayer:
        """Re-class `module` (of `stock_class`) in place with a dense view; nothing is allocated."""
        reclass(module, cls)
        layer = cast(SparseLayer, module)
        layer.kind, layer.pattern = "dense", pattern
        layer.grad_mask = layer.alpha = layer.exponent = None
        layer.topology = layer.sparse_input = layer.cache = None
        layer.register_parameter("threshold", None)
        layer.register_buffer("mask", None)
        layer.backend = layer.choose_backend(backend)
        return layer

    def restore(self) -> nn.Module:
        """Back to the stock class, `weight` as it stands; the view is dropped."""
        for name in _ATTRIBUTES:
            delattr(self, name)
        for name in ("unseen", "called"):
            vars(self).pop(name, None)
        del self._parameters["threshold"], self._buffers["mask"]
        reclass(self, self.stock_class)
        return self

    def forward(self, x: Tensor) -> Tensor:
        """The effective weight, then any product: of a stock layer where nothing is sparse."""
        # Asked first, so that compiled code has no guard on the others.
        if not torch.compiler.is_compiling() and (self.unseen or not self.called):
            self._note_call()
        packs = self.packs_input()
        if self.kind == "dense" and not packs:
            return cast(Tensor, super().forward(x))
        # Every look at a Parameter goes through nn.Module's __getattr__.
        weight: Tensor = self.weight
        dtype = product_dtype(x, weight)
        if packs:
            return self.packed_product(x, self.weight_for(weight, dtype))
        if self.backend.name == "block" and self.kind == "mask":
            return self.block_product(x, weight, dtype)
        if self.is_fused(x, weight, dtype):
            return self.fused_product(x, weight, dtype)
        return self.product(x, self.weight_for(weight, dtype))

    def _note_call(self) -> None:
        self.called = True
        if self.unseen:
            self._warn_unseen()

    def weight_for(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """The effective weight in `dtype`, differentiable in the weight and the threshold."""
        if self.kind == "dense":
            return weight.to(dtype)
        view, cache = self.view, self.cache
        cached, defer = None, False
        if cache is not None:
            cached, defer = cache.read(dtype, weight, view.threshold, view.mask), cache.defer
        return effective_weight(
            self.powered(weight), view, dtype=dtype, backend=self.backend.elementwise, cached=cached, defer=defer
        )

    def product(self, x: Tensor, w_hat: Tensor) -> Tensor:
        """y of the dense library, or of the GPU's 2:4 product."""
        raise NotImplementedError

    def packed_product(self, x: Tensor, w_hat: Tensor) -> Tensor:
        """y, with the input saved packed for the weight's gradient."""
        raise NotImplementedError

    def block_product(self, x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """y of the kept blocks alone."""
        raise NotImplementedError

    def is_fused(self, x: Tensor, weight: Tensor, dtype: torch.dtype) -> bool:
        """Whether this forward's products make the effective weight themselves: asked for, or known to be faster."""
        raise NotImplementedError

    def fused_product(self, x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """y with the effective weight made inside the products."""
        raise NotImplementedError

    def current_topology(self) -> Topology:
        """The Sparsifier's, or one of this forward's own where the masks were edited since."""
        topology = self.topology
        if topology is None or not (torch.compiler.is_compiling() or topology.is_current(self.mask, self.grad_mask)):
            topology = self.make_topology()
        return topology

    @torch.no_grad()
    def make_topology(self) -> Topology:
        """Where the kept blocks of the masks are as they stand, in new tensors."""
        assert self.block is not None  # backend "block"
        topology = Topology.of(*self.mask_matrices(), self.block, turn=self.input_flags)
        topology.versions = mask_versions(self.mask, self.grad_mask)
        return topology

    def mask_matrices(self) -> tuple[Tensor, Tensor | None]:
        """mask and grad_mask as [N, K]."""
        assert self.mask is not None  # kind "mask"
        return self.oriented(self.mask), None if self.grad_mask is None else self.oriented(self.grad_mask)

    def input_flags(self, flags: Tensor) -> Tensor | None:
        """Flags of blocks in the order of the input's gradient, where that needs an index of its own."""
        return None

    def choose_backend(self, asked: str) -> Backend:
        """The back end where the weight is now."""
        return choose_backend(asked, self.weight, None, self.pattern)

    @property
    def follows_density(self) -> bool:
        """Whether `auto` may skip this layer's blocks where that was measured faster: of matrices on a GPU."""
        return False

    def packs_input(self) -> bool:
        """Whether this forward saves a packed input: for a gradient of the weight, and there alone."""
        sparse = self.sparse_input
        return sparse is not None and sparse.density < 1 and torch.is_grad_enabled() and self.weight.requires_grad

    def __getstate__(self) -> dict[str, Any]:
        # A copy has no Sparsifier that would keep its buffer true, or finish its gradients, or change its kind: it
        # follows its mask.
        kind = "mask" if self.kind == "dense" and self._buffers.get("mask") is not None else self.kind
        return vars(self) | {"topology": None, "cache": None, "kind": kind}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(from_older(state))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SparseLayer:
        logits = None if self.threshold is None else self.threshold.detach().clone()
        super()._apply(fn, recurse)
        device = self.weight.device
        if self.threshold is not None and logits is not None and self.threshold.dtype.itemsize < 4:
            # `.half()` must not round a threshold: 1e-3 has eight bits in bfloat16.
            self.threshold.data = logits.to(device)
        for name in VIEW_TENSORS:
            if (tensor := getattr(self, name)) is not None:
                setattr(self, name, tensor.to(device))
        if self.sparse_input is not None:
            self.sparse_input.to(device)
        # Written at another place, or of other values: the Sparsifier allocates and writes them anew.
        self.topology = None
        if self.cache is not None:
            self.cache.w_hat, self.cache.versions = None, ()
        self.backend = self.choose_backend(self.backend.asked)
        return self

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, view={self.kind}, backend={self.backend.name}"
