"""Training on the kept blocks alone, for as long as the topology stays: weights, gradients and optimizer state packed.

    compact   W [N, K] -> V [nnz, r, c], and with it W.grad and every state tensor of W's shape
    expand    V -> W, zeros elsewhere

A sparse layer is re-classed into its compact class, which multiplies by packed blocks (kernels/block/packed.py). Its
`weight` stays the same Parameter object under the same name, with other data: optimizers, schedulers and lists of
parameters that somebody keeps go on as they were. What methods zero outside their masks after every step does not exist
here, so a step is that of the dense storage: the same products, the same elementwise update, the same bits in float32
on a CPU where blocks are multiples of 16. Three things may differ in the last place: the products of a `Conv1D`, whose
dense weight lies transposed in memory; a sum over a whole tensor, such as a gradient's norm; and under autocast dW,
which is summed in float32 here and rounded to the low precision there.
Convolutions are packed in storage and gradient, and unpacked for each forward.

When the topology stays is the method's to say (`Method.frozen_topology`); the Sparsifier follows it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from .block_modules import block_product, product_backend
from .clock import Clock
from .conv import SparseConv2d
from .kernels.block.packed import pack_blocks, unpack_blocks
from .kernels.block.topology import block_flags, build_index_reference
from .layers import SparseConv1D, SparseLayer, SparseLinear, _reclass
from .methods import Method
from .optimizer_state import check_elementwise, map_state
from .pattern import Block, Pattern

__all__ = ["Compaction"]


class CompactLayer(SparseLayer):
    """A sparse layer of kind "mask" that stores only its kept blocks; made and unmade in place.

    Attributes:
        weight: Parameter `[max(1, nnz), r, c]`.
        index: int32, which blocks they are.
        mask: None; the index says what it said.
    """

    wide_class: type[SparseLayer]
    compacted: ClassVar[bool] = True
    # Whether the forward multiplies by packed blocks, or by the weight that they stand for.
    skips_blocks: ClassVar[bool] = True

    index: Tensor
    wide_shape: torch.Size
    wide_stride: tuple[int, ...]
    wide_backend: tuple[str, str]
    matrix_shape: tuple[int, int]

    @property
    def dense_shape(self) -> torch.Size:
        return self.wide_shape

    def unpacked(self, values: Tensor) -> Tensor:
        """Packed blocks as the dense weight, of its shape and strides, zeros elsewhere; differentiable."""
        dense = self.stored(unpack_blocks(values, self.index, self.matrix_shape))
        return dense if dense.stride() == self.wide_stride else dense.contiguous()

    def view_tensor(self, name: str) -> Tensor | None:
        if name != "mask":
            return super().view_tensor(name)
        return self.unpacked(torch.ones_like(self.weight, dtype=torch.bool))

    @torch.no_grad()
    def effective_weight(self) -> Tensor:
        return self.unpacked(self.weight)

    @torch.no_grad()
    def kept_count(self) -> int:
        return int(torch.count_nonzero(self.weight))

    def forward(self, x: Tensor) -> Tensor:
        backend = "triton" if self.backend == "block" else "torch"
        return block_product(x, self.weight, self.bias, self.index, self.matrix_shape, backend)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight"] = self.effective_weight()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SparseLayer:
        super()._apply(fn, recurse)
        self.index = self.index.to(self.weight.device)
        return self

    def _choose_backend(self) -> None:
        super()._choose_backend()
        self.wide_backend = self.backend, self.backend_reason
        if not self.skips_blocks:
            if self.backend == "block":
                self.backend, self.backend_reason = "triton", "a convolution unpacks its blocks"
        elif product_backend(self.backend_choice, self.weight) == "triton":
            self.backend, self.backend_reason = "block", "packed blocks"


class CompactLinear(CompactLayer, SparseLinear):  # type: ignore[misc]  # as SparseLinear
    """`SparseLinear` on packed blocks."""

    wide_class = SparseLinear


class CompactConv1D(CompactLayer, SparseConv1D):  # type: ignore[misc]  # as SparseConv1D
    """`SparseConv1D` on packed blocks of its weight as [N, K]."""

    wide_class = SparseConv1D


class CompactConv2d(CompactLayer, SparseConv2d):  # type: ignore[misc]  # as SparseConv2d
    """`SparseConv2d` that stores packed blocks; its forward unpacks them for the vendor's convolution."""

    wide_class = SparseConv2d
    skips_blocks = False

    def stored(self, matrix: Tensor) -> Tensor:
        out, inputs, height, width = self.wide_shape
        return matrix.reshape(out, height, width, inputs).permute(0, 3, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        values: Tensor = self.weight
        if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
            values = values.to(torch.get_autocast_dtype(x.device.type))
        return nn.Conv2d._conv_forward(self, x, self.unpacked(values), self.bias)


_COMPACT: dict[type[SparseLayer], type[CompactLayer]] = {
    cls.wide_class: cls for cls in (CompactLinear, CompactConv1D, CompactConv2d)
}


class Compaction:
    """Packs the layers of one Sparsifier while its method's topology stays.

    Args:
        layers, method, clock, pattern: the Sparsifier's own.
    """

    def __init__(self, layers: Mapping[str, SparseLayer], method: Method, clock: Clock, pattern: Pattern) -> None:
        self.layers, self.method, self.clock, self.pattern = layers, method, clock, pattern
        self._optimizer: Optimizer | None = None
        self._handles: list[Any] = []

    def start(self, optimizer: Optimizer | None, *, cached: bool) -> None:
        """Pack now and after every step, where the method allows; raises as `Sparsifier.compact` says."""
        if optimizer is None:
            raise RuntimeError("compact: expected an attached optimizer, got none; call attach(optimizer) first")
        if dist.is_available() and dist.is_initialized():
            raise RuntimeError(
                "compact: expected a single process, got an initialised process group: DistributedDataParallel reduces "
                "gradients in buckets of the size that the weights had; train in dense storage there"
            )
        if cached:
            raise ValueError(
                "compact: expected an optimizer attached without cache_dtype and defer, got cached views or deferred "
                "multipliers of dense weights; attach without them"
            )
        if not isinstance(self.pattern, Block):
            raise ValueError(
                f"compact: expected a pattern of blocks, got '{self.pattern}'; sparsify with pattern='block:32' or "
                f"another size"
            )
        if self.method.frozen_topology(self.clock) is None:
            raise ValueError(
                f"compact: expected a method whose topology stays for a while, got {self.method.name!r} as it is "
                f"configured, which needs pruned weights at every step; train in dense storage"
            )
        check_elementwise("compact", optimizer)
        for name, layer in self.layers.items():
            choice = layer.backend_choice
            if choice not in ("auto", "torch") and (self.pattern.rows % 16 or self.pattern.columns % 16):
                raise ValueError(
                    f"compact: expected blocks with sides that are multiples of 16 for backend={choice!r}, got "
                    f"'{self.pattern}' on {name}; use backend='auto' or 'torch', or such blocks"
                )
        self._pack(optimizer)
        if self._optimizer is None:
            self._handles = [
                optimizer.register_state_dict_post_hook(self._as_dense),
                optimizer.register_load_state_dict_pre_hook(self._refuse_load),
            ]
        self._optimizer = optimizer

    def stop(self) -> None:
        """Dense storage, for good."""
        if self._optimizer is not None:
            self._unpack(self._optimizer)
            self._optimizer = None
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def before_hook(self) -> None:
        """A step is taken and `after_step` comes: what it will change, or the coming step needs, is dense again."""
        if self._optimizer is not None and not self.method.frozen_topology(self.clock):
            self._unpack(self._optimizer)

    def after_hook(self) -> None:
        """`after_step` has run."""
        if self._optimizer is not None:
            self._pack(self._optimizer)

    def refuse_load(self) -> None:
        """Refuse to put the tensors of a checkpoint where packed ones are."""
        if any(layer.compacted for layer in self.layers.values()):
            raise RuntimeError(
                "load_state_dict: expected weights in dense storage, got packed blocks; call expand() before and "
                "compact() after"
            )

    def _refuse_load(self, optimizer: Optimizer, saved: dict[str, Any]) -> None:
        self.refuse_load()

    @torch.no_grad()
    def _as_dense(self, optimizer: Optimizer, saved: dict[str, Any]) -> dict[str, Any]:
        """The optimizer's state dict as it would be in dense storage; its own state stays as it is."""
        held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        keys = [key for group in saved["param_groups"] for key in group["params"]]
        packed = {id(layer.weight): layer for layer in self.layers.values() if isinstance(layer, CompactLayer)}
        state = dict(saved["state"])
        for parameter, key in zip(held, keys, strict=True):
            if (layer := packed.get(id(parameter))) is not None and key in state:
                state[key] = {
                    name: layer.unpacked(value)
                    if isinstance(value, Tensor) and value.shape == parameter.shape
                    else value
                    for name, value in state[key].items()
                }
        return {**saved, "state": state}

    @torch.no_grad()
    def _pack(self, optimizer: Optimizer) -> None:
        """Pack every layer of kind "mask" if the topology stays; all checks come before the first change."""
        if not self.method.frozen_topology(self.clock):
            return
        assert isinstance(self.pattern, Block)  # start
        chosen = {name: layer for name, layer in self.layers.items() if layer.kind == "mask" and not layer.compacted}
        for name, layer in chosen.items():
            _check_layer(name, layer, optimizer)
        for layer in chosen.values():
            _compact(layer, (self.pattern.rows, self.pattern.columns), optimizer)

    @torch.no_grad()
    def _unpack(self, optimizer: Optimizer) -> None:
        for layer in self.layers.values():
            if isinstance(layer, CompactLayer):
                _expand(layer, optimizer)


def _check_layer(name: str, layer: SparseLayer, optimizer: Optimizer) -> None:
    assert layer.mask is not None  # kind "mask"
    what = None
    if layer.grad_mask is not None or (layer.alpha is not None and bool(layer.alpha > 0)):
        what = "gradients of pruned weights (grad_mask, alpha > 0)"
    elif layer.exponent is not None:
        what = "a view of a power of the weight"
    elif layer.activation_density is not None:
        what = "packed activations"
    if what is not None:
        raise ValueError(
            f"compact: expected a layer that only its mask makes sparse, got {what} on {name}; expand() it"
        )
    map_state("compact", optimizer, layer.weight, None)
    if bool((layer.weight * ~layer.mask).any()):
        raise RuntimeError(
            f"compact: expected zeros outside the mask of {name}, got weights that would be lost; take a step first, "
            f"after which methods with masks write their zeros"
        )


def _compact(layer: SparseLayer, block: tuple[int, int], optimizer: Optimizer) -> None:
    assert layer.mask is not None  # kind "mask"
    flags = block_flags(layer.oriented(layer.mask), block)
    index, count = build_index_reference(flags), max(1, int(flags.sum()))

    def packed(tensor: Tensor) -> Tensor:
        return pack_blocks(layer.oriented(tensor), index, block, count)

    wide = {
        "index": index,
        "wide_shape": layer.weight.shape,
        "wide_stride": layer.weight.stride(),
        "matrix_shape": tuple(layer.oriented(layer.weight).shape),
    }
    map_state("compact", optimizer, layer.weight, packed)
    _refill(layer.weight, packed)
    layer.mask = None
    # The index of the dense storage, which also holds on to the mask that it was made of.
    layer.block_index = layer.grad_index = layer.block_flags = None
    layer.index_versions = ()
    vars(layer).update(wide)
    backend = layer.backend, layer.backend_reason
    _reclass(layer, _COMPACT[type(layer)])
    layer._choose_backend()
    # What `auto` has decided so far, not what it would begin with.
    cast(CompactLayer, layer).wide_backend = backend


def _expand(layer: CompactLayer, optimizer: Optimizer) -> None:
    shape, stride = layer.wide_shape, layer.wide_stride

    def dense(tensor: Tensor) -> Tensor:
        made = torch.empty_strided(shape, stride, dtype=tensor.dtype, device=tensor.device)
        return made.copy_(layer.unpacked(tensor))

    mask = dense(torch.ones_like(layer.weight, dtype=torch.bool))
    map_state("expand", optimizer, layer.weight, dense)
    _refill(layer.weight, dense)
    _reclass(layer, layer.wide_class)
    layer.mask = mask
    layer.backend, layer.backend_reason = layer.wide_backend
    for name in ("index", "wide_shape", "wide_stride", "wide_backend", "matrix_shape"):
        delattr(layer, name)


def _refill(parameter: nn.Parameter, change: Callable[[Tensor], Tensor]) -> None:
    """Give a Parameter and its gradient other data of another shape, under the same identity."""
    data, grad = change(parameter.detach()), parameter.grad
    parameter.grad = None
    # A graph that somebody still holds (the last loss) keeps the Parameter's gradient accumulator alive, which expects
    # the old shape. Torch makes a new one only where the dtype or the device changes: so it changes twice.
    other = torch.float16 if data.dtype != torch.float16 else torch.float32
    parameter.data = data.new_empty(0, dtype=other)
    parameter.data = data
    if grad is not None:
        parameter.grad = change(grad)
