"""Sparse layers: stock modules re-classed in place, holding state and deciding nothing.

`nn.Linear` becomes `SparseLinear` and transformers' `Conv1D` becomes `SparseConv1D` by assignment to
`__class__`: the same Parameter objects stay under the same names, so optimizers, checkpoints, ties and
`from_pretrained` see the model they knew. What the method decides is the *view*:

    kind        "dense" (the stock forward on W itself), "soft", "hard", "step" or "mask"
    threshold   Parameter [1] or [N], float32: the logit s or cut-off t; only on layers of threshold methods
    mask        bool, shape of W, True = kept
    grad_mask   bool, shape of W: the set B in which pruned weights get gradients; None = everywhere
    alpha       float32 scalar: the multiplier on the gradient of pruned weights; None = 0
    exponent    a of PowerPropagation: the view is of W |W|^(a-1); None = of W itself
    block       (rows, columns) of the blocks that the mask consists of; None = elements
    n_of_m      the pattern where the mask keeps n of every m along a row of W; None = it does not
    activation_density    the share of the input that dW is made of, saved packed (activation/linear.py); None = all

Masks and alpha are plain tensor attributes, not buffers: DDP would broadcast buffers at every forward, and
`from_pretrained` would fill non-persistent ones with garbage. They follow the weight's device (`_apply`)
and keep their dtype. The forward is pure: it changes no state.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, cast

import torch
from accelerate.hooks import add_hook_to_module, remove_hook_from_module
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .block_index import MaskVersions, fresh_index, is_indexed
from .kernels import _triton
from .kernels.activation.linear import packed_linear
from .kernels.block.linear import block_matmul
from .kernels.block.plan import semi_structured_choice
from .kernels.fused.linear import masked_linear
from .kernels.semi_structured import semi_structured_linear
from .kernels.weight.forward import view_reference
from .kernels.weight.power import power
from .pattern import NM

__all__ = ["BACKENDS", "VIEW_TENSORS", "SparseConv1D", "SparseLayer", "SparseLinear", "view_versions"]

# Rows of x from which a training forward casts all of a weight in blocks before its two products, for 6 bytes a weight.
# Cast inside them it costs their loops about half their speed: at 90 % of zeros, at 4.3 TB/s and 790 TFLOP/s,
# 1.4 ps a weight are 3.7e-15 s M (1 - 0.9) twice at M of about 1,900.
CAST_ROWS = 2048
BACKENDS = ("auto", "torch", "triton", "fused", "block", "semi_structured")

VIEW_TENSORS = ("mask", "grad_mask", "alpha")
_CACHE = ("w_hat", "w_hat_versions", "defer")
_BLOCKS = ("block_index", "grad_index", "input_index", "block_flags", "index_versions")
_ACTIVATION = (
    *("activation_density", "activation_scope", "activation_slack"),
    *("activation_cutoff", "remembers_cutoff", "last_cutoff", "overflows", "last_overflow", "row_masks"),
)
_BACKEND = ("backend_choice", "backend", "backend_reason", "sparse_grad_input")
_ATTRIBUTES = ("kind", *VIEW_TENSORS, "exponent", "block", "n_of_m", *_BACKEND, *_CACHE, *_BLOCKS, *_ACTIVATION)


class SparseLayer(nn.Module):
    """What the sparse layers share; never constructed, only re-classed into (`adopt`)."""

    stock_class: type[nn.Module]
    transposed: bool
    # Whether the forward reads a cached view: it multiplies by a matrix stored as the weight is.
    caches_view: bool = False
    # Whether `weight` holds the kept blocks only (compact.py).
    compacted: ClassVar[bool] = False
    # Whether a training forward of many rows casts a weight in blocks first; turned off to time products that cast it.
    casts_first: bool = True
    # Whether `auto` may go by what was measured of matrix products on structured weights.
    plans_blocks: ClassVar[bool] = True

    weight: nn.Parameter
    bias: nn.Parameter | None
    threshold: nn.Parameter | None
    kind: str
    mask: Tensor | None
    grad_mask: Tensor | None
    alpha: Tensor | None
    exponent: float | None
    backend_choice: str
    backend: str
    backend_reason: str
    sparse_grad_input: bool
    w_hat: Tensor | None
    w_hat_versions: tuple[int, ...]
    defer: bool
    block: tuple[int, int] | None
    n_of_m: NM | None
    block_index: Tensor | None
    grad_index: Tensor | None
    input_index: Tensor | None
    block_flags: Tensor | None
    index_versions: MaskVersions
    activation_density: float | None
    activation_scope: str
    activation_slack: float
    activation_cutoff: Tensor | None
    remembers_cutoff: bool
    last_cutoff: Tensor | None
    overflows: int
    last_overflow: Tensor | None
    row_masks: list[Tensor]

    @classmethod
    def adopt(
        cls,
        module: nn.Module,
        backend: str,
        block: tuple[int, int] | None = None,
        n_of_m: NM | None = None,
    ) -> SparseLayer:
        """Re-class `module` (of `stock_class`) in place with a dense view; nothing is allocated."""
        _reclass(module, cls)
        layer = cast(SparseLayer, module)
        layer.kind = "dense"
        layer.mask = layer.grad_mask = layer.alpha = layer.exponent = None
        layer.w_hat, layer.w_hat_versions, layer.defer = None, (), False
        layer.block, layer.n_of_m, layer.index_versions = block, n_of_m, ()
        layer.block_index = layer.grad_index = layer.input_index = layer.block_flags = None
        layer.activation_density, layer.activation_scope, layer.activation_slack = None, "batch", 1.25
        layer.activation_cutoff, layer.remembers_cutoff, layer.last_cutoff = None, False, None
        layer.overflows, layer.last_overflow, layer.row_masks = 0, None, []
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

    def stored(self, matrix: Tensor) -> Tensor:
        """`oriented` undone: [N, K] -> the weight's shape; a view that shares its memory."""
        return self.oriented(matrix)

    def threshold_a_row(self, value: float) -> Tensor:
        """A threshold for every output, [N] or, beside a transposed weight, [1, N]; float32, all of them `value`."""
        n = self.oriented(self.weight).shape[0]
        return torch.full((1, n) if self.transposed else (n,), value, device=self.weight.device)

    def input_flags(self, flags: Tensor) -> Tensor | None:
        """Flags of blocks in the order of the input's gradient, where that needs an index of its own."""
        return None

    @property
    def unit_shape(self) -> tuple[int, int]:
        """(outputs, inputs) that blocks and groups of m must divide."""
        n, k = self.oriented(self.weight).shape
        return n, k

    @property
    def dense_shape(self) -> torch.Size:
        """Shape of the weight in dense storage, whatever it is stored as."""
        return self.weight.shape

    def view_tensor(self, name: str) -> Tensor | None:
        """One of `VIEW_TENSORS` as it is in dense storage."""
        tensor: Tensor | None = getattr(self, name)
        return tensor

    def dense_weight(self) -> Tensor:
        """What the view is taken of: `weight` itself, or its power where an exponent is set; differentiable."""
        return self.weight if self.exponent is None else power(self.weight, self.exponent)

    @torch.no_grad()
    def effective_weight(self) -> Tensor:
        """S(W) as the forward uses it: a new tensor, shape and dtype of `weight`, exact zeros where pruned."""
        if self.kind == "dense":
            return self.weight.detach().clone()
        return view_reference(self.dense_weight(), self.threshold, self.mask, self.kind, self.weight.dtype)

    @torch.no_grad()
    def kept_count(self) -> int:
        """How many weights the view keeps (for a dense view: all of them)."""
        if self.kind == "dense":
            return self.weight.numel()
        return int(torch.count_nonzero(self.effective_weight()))

    def packs_activation(self, x: Tensor) -> bool:
        """Whether this forward saves a packed input: for a gradient of the weight, and there alone."""
        return self.activation_density is not None and torch.is_grad_enabled() and self.weight.requires_grad

    def counted_rows(self, x: Tensor) -> Tensor | None:
        """Which rows of x are tokens: the masks of that shape, together; None where none is of that shape."""
        counted = None
        for mask in self.row_masks:
            if mask.shape == x.shape[:-1]:
                counted = mask if counted is None else counted | mask
        return counted

    def note_packing(self, cutoff: Tensor, overflow: Tensor) -> None:
        """Keep what a packing forward reports, for the method to read after the step."""
        if self.remembers_cutoff:
            self.last_cutoff = cutoff
        if torch.compiler.is_compiling():
            # A graph cannot add to a number of Python's, but it can leave the tensor behind.
            self.last_overflow = overflow
        else:
            self.overflows += int(overflow)

    def forward(self, x: Tensor) -> Tensor:
        packs = self.activation_density is not None and self.packs_activation(x)
        kind, backend = self.kind, self.backend
        if kind == "dense" and not packs:
            return cast(Tensor, super().forward(x))
        # Every look at a Parameter goes through nn.Module's __getattr__.
        weight: Tensor = self.weight
        bias: Tensor | None = self.bias
        threshold = self.threshold
        out_dtype = weight.dtype
        device = x.device.type
        # float64 stays out of autocast, as it does for torch's own ops.
        if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
            out_dtype = torch.get_autocast_dtype(device)
            x = x.to(out_dtype)
            bias = None if bias is None else bias.to(out_dtype)
        w_hat = self.w_hat
        if w_hat is not None and (
            w_hat.dtype != out_dtype
            or (not torch.compiler.is_compiling() and self.w_hat_versions != _versions(weight, threshold, self.mask))
        ):
            w_hat = None
        if backend == "block" and kind == "mask" and not packs:
            return self._skip_blocks(x, bias, w_hat, out_dtype)
        weight = weight if self.exponent is None else self.dense_weight()
        if backend == "semi_structured" and kind == "mask" and not packs:
            assert self.mask is not None  # kind "mask"
            return semi_structured_linear(
                x, weight, bias, mask=self.mask, grad_mask=self.grad_mask, alpha=self.alpha, w_hat=w_hat,
                transposed=self.transposed, backend="semi_structured", defer=self.defer,
                sparse_grad_input=self.sparse_grad_input,
            )  # fmt: skip
        if not packs:
            return masked_linear(
                x, weight, bias, kind=kind, threshold=threshold, mask=self.mask, grad_mask=self.grad_mask,
                alpha=self.alpha, w_hat=w_hat, transposed=self.transposed, out_dtype=out_dtype, defer=self.defer,
                backend="triton" if backend in ("block", "semi_structured") else backend,
            )  # fmt: skip
        assert self.activation_density is not None  # packs
        y, cutoff, overflow = packed_linear(
            x, weight, bias, kind=kind, threshold=threshold, mask=self.mask, grad_mask=self.grad_mask,
            alpha=self.alpha, w_hat=w_hat, transposed=self.transposed, out_dtype=out_dtype,
            backend="torch" if backend == "torch" else "triton", density=self.activation_density,
            cutoff=self.activation_cutoff, row_mask=self.counted_rows(x), scope=self.activation_scope,
            slack=self.activation_slack,
        )  # fmt: skip
        self.note_packing(cutoff, overflow)
        return y

    def _skip_blocks(self, x: Tensor, bias: Tensor | None, w_hat: Tensor | None, out_dtype: torch.dtype) -> Tensor:
        """The forward through an index of the kept blocks: the Sparsifier's, or one of this forward's own."""
        assert self.block is not None and self.mask is not None  # sparsify
        index, grad_index, kept = self.block_index, self.grad_index, self.block_flags
        if index is None or kept is None or (not torch.compiler.is_compiling() and not is_indexed(self)):
            index, grad_index, kept = fresh_index(self)
        everywhere = self.alpha is not None and self.grad_mask is None
        weight = self.dense_weight()
        many = self.casts_first and torch.is_grad_enabled() and x.numel() >= CAST_ROWS * x.shape[-1]
        if w_hat is None and many and weight.dtype == torch.float32 and out_dtype.itemsize == 2:
            w_hat = weight.detach().to(out_dtype)
        return block_matmul(
            x,
            weight,
            bias,
            index,
            block=self.block,
            grad_index=grad_index,
            kept=None if grad_index is None else kept,
            mask=self.mask if everywhere else None,
            alpha=self.alpha,
            w_hat=w_hat,
            transposed=self.transposed,
            backend="triton",
            out_dtype=out_dtype,
        )

    def __getstate__(self) -> dict[str, Any]:
        # A copy has no Sparsifier that would keep its buffer true, or finish its gradients.
        cached = {"w_hat": None, "w_hat_versions": (), "defer": False, "last_cutoff": None, "last_overflow": None}
        indices = {**dict.fromkeys(_BLOCKS), "index_versions": ()}
        return vars(self) | cached | indices

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
        if self.activation_cutoff is not None:
            self.activation_cutoff = self.activation_cutoff.to(device)
        # Written at another place, or of other values: the Sparsifier allocates and writes it anew.
        self.w_hat, self.w_hat_versions = None, ()
        self.block_index = self.grad_index = self.input_index = self.block_flags = None
        self.index_versions = ()
        self._choose_backend()
        return self

    def _choose_backend(self) -> None:
        """`auto` follows the device; a back end asked for by name is never replaced. Of a transposable mask dX is a 2:4
        product too, asked for or where it was measured faster."""
        self.sparse_grad_input = self.n_of_m is not None and self.n_of_m.transposable
        if self.backend_choice != "auto":
            self.backend, self.backend_reason = self.backend_choice, "asked for"
        elif self.weight.is_cuda and _triton.AVAILABLE:
            # 6 bytes a weight in one pass instead of the eager chain's 50: counted, not yet measured here.
            self.backend, self.backend_reason = "triton", "auto: fewer bytes than eager (analytic)"
            if self.n_of_m is not None and (self.n_of_m.n, self.n_of_m.m) == (2, 4) and self.plans_blocks:
                n, k = self.oriented(self.weight).shape
                dtype = torch.bfloat16 if self.weight.dtype == torch.float32 else self.weight.dtype
                device_name = torch.cuda.get_device_name(self.weight.device)
                faster, self.backend_reason = semi_structured_choice(n, k, dtype, device_name)
                self.backend = "semi_structured" if faster else "triton"
                # dX is the product with the transpose.
                self.sparse_grad_input &= semi_structured_choice(k, n, dtype, device_name)[0]
        else:
            reason = "no GPU" if not self.weight.is_cuda else "Triton is not installed"
            self.backend, self.backend_reason = "torch", f"auto: {reason}"

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, view={self.kind}, backend={self.backend}"


def view_versions(layer: SparseLayer) -> tuple[int, ...]:
    """Counters that an in-place edit of what the view is made of moves."""
    return _versions(layer.weight, layer.threshold, layer.mask)


def _versions(weight: Tensor, threshold: Tensor | None, mask: Tensor | None) -> tuple[int, ...]:
    return (
        weight._version,
        weight.data_ptr(),
        -1 if threshold is None else threshold._version,
        -1 if mask is None else mask._version,
    )


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
    caches_view = True


class SparseConv1D(SparseLayer, Conv1D):  # type: ignore[misc]  # likewise
    """transformers' `Conv1D` (GPT-2) seen through a view; `weight` [in_features, out_features]."""

    stock_class = Conv1D
    transposed = True
    caches_view = True
