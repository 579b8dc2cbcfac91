"""Sparse layers: stock modules re-classed in place, holding state and deciding nothing.

`nn.Linear` becomes `SparseLinear` and transformers' `Conv1D` becomes `SparseConv1D` by assignment to
`__class__`: the same Parameter objects stay under the same names, so optimizers, checkpoints, ties and
`from_pretrained` see the model they knew. What the method decides is the *view*:

    kind        "dense" (the stock forward on W itself), "soft" or "mask"
    threshold   Parameter [1], float32: the logit s; only on layers of threshold methods
    mask        bool, shape of W, True = kept
    grad_mask   bool, shape of W: the set B in which pruned weights get gradients; None = everywhere
    alpha       float32 scalar: the multiplier on the gradient of pruned weights; None = 0

Masks and alpha are plain tensor attributes, not buffers: DDP would broadcast buffers at every forward, and
`from_pretrained` would fill non-persistent ones with garbage. They follow the weight's device (`_apply`)
and keep their dtype. The forward is pure: it changes no state.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from accelerate.hooks import add_hook_to_module, remove_hook_from_module
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .kernels import _triton
from .kernels.masked_matmul import masked_linear
from .kernels.threshold import view_reference

__all__ = ["BACKENDS", "SPARSE_CLASSES", "VIEW_TENSORS", "SparseConv1D", "SparseLayer", "SparseLinear"]

BACKENDS = ("auto", "torch", "triton")

VIEW_TENSORS = ("mask", "grad_mask", "alpha")
_ATTRIBUTES = ("kind", *VIEW_TENSORS, "backend_choice", "backend", "backend_reason")


class SparseLayer(nn.Module):
    """What the sparse layers share; never constructed, only re-classed into (`adopt`)."""

    stock_class: type[nn.Module]
    transposed: bool

    weight: nn.Parameter
    bias: nn.Parameter | None
    threshold: nn.Parameter | None
    kind: str
    mask: Tensor | None
    grad_mask: Tensor | None
    alpha: Tensor | None
    backend_choice: str
    backend: str
    backend_reason: str

    @classmethod
    def adopt(cls, module: nn.Module, backend: str) -> SparseLayer:
        """Re-class `module` (of `stock_class`) in place with a dense view; nothing is allocated."""
        _reclass(module, cls)
        layer = cast(SparseLayer, module)
        layer.kind = "dense"
        layer.mask = layer.grad_mask = layer.alpha = None
        layer.register_parameter("threshold", None)
        layer.backend_choice = backend
        layer._choose_backend()
        return layer

    def restore(self) -> nn.Module:
        """Back to the stock class, `weight` as it stands; the view is dropped."""
        for name in _ATTRIBUTES:
            delattr(self, name)
        del self._parameters["threshold"]
        _reclass(self, self.stock_class)
        return self

    def oriented(self, tensor: Tensor) -> Tensor:
        """A tensor of the weight's shape as [N, K], outputs by inputs; a view that shares its memory."""
        return tensor.t() if self.transposed else tensor

    @torch.no_grad()
    def effective_weight(self) -> Tensor:
        """S(W) as the forward uses it: a new tensor, shape and dtype of `weight`, exact zeros where pruned."""
        if self.kind == "dense":
            return self.weight.detach().clone()
        return view_reference(self.weight, self.threshold, self.mask, self.kind, self.weight.dtype)

    @torch.no_grad()
    def kept_count(self) -> int:
        """How many weights the view keeps (for a dense view: all of them)."""
        if self.kind == "dense":
            return self.weight.numel()
        return int(torch.count_nonzero(self.effective_weight()))

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "dense":
            return cast(Tensor, super().forward(x))
        bias: Tensor | None = self.bias
        out_dtype = self.weight.dtype
        device = x.device.type
        # float64 stays out of autocast, as it does for torch's own ops.
        if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
            out_dtype = torch.get_autocast_dtype(device)
            x = x.to(out_dtype)
            bias = None if bias is None else bias.to(out_dtype)
        return masked_linear(
            x,
            self.weight,
            bias,
            kind=self.kind,
            threshold=self.threshold,
            mask=self.mask,
            grad_mask=self.grad_mask,
            alpha=self.alpha,
            transposed=self.transposed,
            backend=self.backend,
            out_dtype=out_dtype,
        )

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
        self._choose_backend()
        return self

    def _choose_backend(self) -> None:
        """`auto` follows the device; a back end asked for by name is never replaced."""
        if self.backend_choice != "auto":
            self.backend, self.backend_reason = self.backend_choice, "asked for"
        elif self.weight.is_cuda and _triton.AVAILABLE:
            # 6 bytes a weight in one pass instead of the eager chain's 50: counted, not yet measured here.
            self.backend, self.backend_reason = "triton", "auto: fewer bytes than eager (analytic)"
        else:
            reason = "no GPU" if not self.weight.is_cuda else "Triton is not installed"
            self.backend, self.backend_reason = "torch", f"auto: {reason}"

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, view={self.kind}, backend={self.backend}"


def _reclass(module: nn.Module, cls: type[nn.Module]) -> None:
    # An accelerate hook keeps the old class's bound forward on the instance, and leaves it there when removed:
    # the new class would never be asked.
    hook = getattr(module, "_hf_hook", None)
    if hook is not None:
        remove_hook_from_module(module)
        vars(module).pop("forward", None)
    module.__class__ = cls
    if hook is not None:
        add_hook_to_module(module, hook)


class SparseLinear(SparseLayer, nn.Linear):  # type: ignore[misc]  # Linear types its bias as never None
    """`nn.Linear` seen through a view; `weight` [out_features, in_features]."""

    stock_class = nn.Linear
    transposed = False


class SparseConv1D(SparseLayer, Conv1D):  # type: ignore[misc]  # likewise
    """transformers' `Conv1D` (GPT-2) seen through a view; `weight` [in_features, out_features]."""

    stock_class = Conv1D
    transposed = True


SPARSE_CLASSES: dict[type[nn.Module], type[Any]] = {nn.Linear: SparseLinear, Conv1D: SparseConv1D}
