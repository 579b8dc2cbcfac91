"""A linear layer that keeps a packed input: Y = X Ŵᵀ + b with X dense, dW from X̂, the largest elements of X.

    forward    Y  = X Ŵᵀ + b                 [M, N]   Ŵ: the view of W (weight/forward.py); kind "dense": W itself
               X̂  = X where not |X| < T      [M, K]   packed (compress.py); T given, or the exact k-th magnitude
    backward   dX = dY Ŵ                     [M, K]
               dW = m · (dYᵀ X̂)              [N, K]   m: the view's multiplier, as in fused/linear.py
               db = Σ_M dY                   [N]

SWAT (arXiv:2001.01969, algorithm 1). X is not saved: between the passes the layer holds bits, the values of X̂ and
what a masked layer holds of its weight. The values lie in a buffer of ceil(slack · density · M K) elements. If a
cut-off remembered from other batches keeps more, the op packs again into as many as it takes: the numbers never
depend on the capacity, and `overflow` says that the memory was not what was asked. Called by `tritonsparse.layers`.
"""

# M rows of x (tokens)   N output features   K input features

from __future__ import annotations

import math
from decimal import Decimal
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._operands import FLOATS, check_estimator, check_input, check_operands, compute_dtype, expect
from ..weight.backward import threshold_backward
from ..weight.forward import cast_alone, view_reference
from .compress import check_backend, pack_activation
from .cutoff import SCOPES, activation_cutoff, check_density
from .grad_weight import packed_grad_weight

__all__ = ["packed_linear"]


def packed_share(density: float, slack: float) -> Decimal:
    """The part of x's elements that the buffer holds, in exact decimal arithmetic."""
    return min(Decimal(1), Decimal(str(density)) * Decimal(str(slack)))


@torch.library.custom_op("tritonsparse::packed_linear", mutates_args=())
def _forward_op(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    threshold: Tensor | None,
    mask: Tensor | None,
    grad_mask: Tensor | None,
    alpha: Tensor | None,
    w_hat: Tensor | None,
    cutoff: Tensor | None,
    row_mask: Tensor | None,
    kind: str,
    transposed: bool,
    backend: str,
    out_dtype: torch.dtype,
    density: float,
    slack: float,
    scope: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    # grad_mask and alpha are the backward's; they pass through here because autograd saves op inputs only.
    share, nothing = packed_share(density, slack), weight.new_empty(0, dtype=out_dtype)
    refuse_capture("packed_linear", x, share, backend)
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    fresh = x.new_empty(0, dtype=compute_dtype(x))
    if cutoff is None:
        cutoff = fresh = activation_cutoff(x, density, scope, row_mask, backend=backend)
    counted = None if row_mask is None else row_mask.flatten()
    capacity = max(1, math.ceil(share * rows.numel()))
    bits, values, row_offsets, flag = pack_activation(rows, cutoff, counted, capacity, backend=backend)
    # The one host sync, and none where everything fits.
    overflow = share < 1 and bool(flag)
    if overflow:
        values = pack_activation(rows, cutoff, counted, int(row_offsets[-1]), backend=backend)[1]

    made = nothing
    if kind == "dense":
        w_hat = weight.to(out_dtype) if w_hat is None else w_hat
    elif w_hat is None and backend == "torch":
        w_hat = made = view_reference(weight, threshold, mask, kind, out_dtype)
    elif w_hat is None:
        w_hat = made = cast_alone(weight, threshold, mask, kind, out_dtype)
    with torch.autocast(x.device.type, enabled=False):
        y = F.linear(x, w_hat.t() if transposed else w_hat, bias)
    return y, made, fresh, bits, values, row_offsets, torch.tensor(overflow)


@_forward_op.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    threshold: Tensor | None,
    mask: Tensor | None,
    grad_mask: Tensor | None,
    alpha: Tensor | None,
    w_hat: Tensor | None,
    cutoff: Tensor | None,
    row_mask: Tensor | None,
    kind: str,
    transposed: bool,
    backend: str,
    out_dtype: torch.dtype,
    density: float,
    slack: float,
    scope: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    rows, k = math.prod(x.shape[:-1]), x.shape[-1]
    n = weight.shape[1] if transposed else weight.shape[0]
    made = weight.shape if w_hat is None and kind != "dense" else 0
    fresh = 0 if cutoff is not None else 1 if scope == "batch" else rows
    capacity = rows * k if packed_share(density, slack) == 1 else torch.library.get_ctx().new_dynamic_size()
    return (
        x.new_empty((*x.shape[:-1], n)),
        weight.new_empty(made, dtype=out_dtype),
        x.new_empty(fresh, dtype=compute_dtype(x)),
        x.new_empty((rows, (k + 31) // 32), dtype=torch.int32),
        x.new_empty(capacity),
        x.new_empty(rows + 1, dtype=torch.int64),
        torch.empty((), dtype=torch.bool, device="cpu"),
    )


@torch.library.custom_op("tritonsparse::packed_linear_backward", mutates_args=())
def _backward_op(
    grad_y: Tensor,
    weight: Tensor,
    w_hat: Tensor | None,
    threshold: Tensor | None,
    mask: Tensor | None,
    grad_mask: Tensor | None,
    alpha: Tensor | None,
    bits: Tensor,
    values: Tensor,
    row_offsets: Tensor,
    kind: str,
    transposed: bool,
    backend: str,
    need_x: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    rows = grad_y.reshape(bits.shape[0], grad_y.shape[-1])
    k = weight.shape[0] if transposed else weight.shape[1]
    with torch.autocast(grad_y.device.type, enabled=False):
        grad_x = grad_y.new_empty(0)
        if need_x:
            w_hat = weight.to(grad_y.dtype) if w_hat is None else w_hat
            grad_x = (rows @ (w_hat.t() if transposed else w_hat)).reshape(*grad_y.shape[:-1], k)
        if not need_weight:
            return grad_x, weight.new_empty(0), weight.new_empty(0)
        dense = packed_grad_weight(rows, bits, values, row_offsets, k, transposed=transposed, backend=backend)
    if kind == "dense":
        return grad_x, dense.to(weight.dtype), weight.new_empty(0, dtype=torch.float32)
    grad_weight, grad_threshold = threshold_backward(
        dense, weight, threshold, mask, grad_mask, alpha, kind=kind, backend=backend
    )
    return grad_x, grad_weight, grad_threshold


@_backward_op.register_fake
def _(
    grad_y: Tensor,
    weight: Tensor,
    w_hat: Tensor | None,
    threshold: Tensor | None,
    mask: Tensor | None,
    grad_mask: Tensor | None,
    alpha: Tensor | None,
    bits: Tensor,
    values: Tensor,
    row_offsets: Tensor,
    kind: str,
    transposed: bool,
    backend: str,
    need_x: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    k = weight.shape[0] if transposed else weight.shape[1]
    grad_x = grad_y.new_empty((*grad_y.shape[:-1], k) if need_x else 0)
    if not need_weight:
        return grad_x, weight.new_empty(0), weight.new_empty(0)
    if threshold is None:
        return grad_x, weight.new_empty(weight.shape), weight.new_empty(0, dtype=torch.float32)
    return grad_x, weight.new_empty(weight.shape), threshold.new_empty(threshold.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, weight, bias, threshold, mask, grad_mask, alpha, w_hat, _, _, kind, transposed, backend, *_ = inputs
    y, made, fresh, bits, values, row_offsets, overflow = output
    if w_hat is None and kind != "dense":
        w_hat = made
    ctx.save_for_backward(weight, w_hat, threshold, mask, grad_mask, alpha, bits, values, row_offsets)
    ctx.mark_non_differentiable(made, fresh, bits, values, row_offsets, overflow)
    ctx.kind, ctx.transposed, ctx.backend = kind, transposed, backend
    ctx.bias_dtype, ctx.y_shape = None if bias is None else bias.dtype, y.shape
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_y: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    need_x, need_weight, need_bias, need_threshold = ctx.needs_input_grad[:4]
    if grad_y is None:
        grad_y = saved[7].new_zeros(ctx.y_shape)
    grad_x, grad_weight, grad_threshold = torch.ops.tritonsparse.packed_linear_backward(
        grad_y, *saved, ctx.kind, ctx.transposed, ctx.backend, need_x, need_weight or need_threshold
    )
    grad_bias = grad_y.reshape(-1, grad_y.shape[-1]).sum(0).to(ctx.bias_dtype) if need_bias else None
    return (
        grad_x if need_x else None,
        grad_weight if need_weight else None,
        grad_bias,
        # DDP waits for every parameter: a threshold gets a gradient, zeros included, never None.
        grad_threshold if need_threshold else None,
        *[None] * 13,
    )


_forward_op.register_autograd(_backward, setup_context=_setup_context)


def refuse_capture(function: str, x: Tensor, share: Decimal, backend: str) -> None:
    """Refuse a CUDA graph capture in which an overflow would have to be read."""
    # Raised before anything is recorded: a read inside a capture would end it with CUDA's own error.
    if x.is_cuda and torch.cuda.is_current_stream_capturing() and (share < 1 or backend == "torch"):
        raise RuntimeError(
            f'{function}: expected backend "triton" and slack * density >= 1 under CUDA graph capture, where no '
            f'overflow can be read, got backend "{backend}" and {share} of x; pass slack=math.inf'
        )


def packed_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    density: float,
    kind: str = "dense",
    threshold: Tensor | None = None,
    mask: Tensor | None = None,
    grad_mask: Tensor | None = None,
    alpha: Tensor | None = None,
    w_hat: Tensor | None = None,
    cutoff: Tensor | None = None,
    row_mask: Tensor | None = None,
    scope: str = "batch",
    slack: float = 1.25,
    transposed: bool = False,
    backend: str = "torch",
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Y = x S(W)ᵀ + bias, with dW from the largest elements of x.

    A host sync reads whether the values fit, unless slack · density >= 1 makes room for all of x. An overflow changes
    a shape: where torch.compile does not take that in a full graph, make that room, or set
    `torch._dynamo.config.capture_dynamic_output_shape_ops`. Packs whether or not a gradient will be asked for.

    Args:
        x: `[..., K]`, `out_dtype`; any strides.
        weight: `[N, K]` (`[K, N]` when `transposed`), float16/bfloat16/float32/float64: the dense master.
        bias: `[N]`, `out_dtype`, or None.
        density: in (0, 1], the fraction of x that dW sees; of the counted rows' elements.
        kind: "dense" (Ŵ = W), or as `masked_linear` takes it, with `threshold`, `mask`, `grad_mask`, `alpha`.
        threshold: as `masked_linear`.
        mask: as `masked_linear`.
        grad_mask: as `masked_linear`.
        alpha: as `masked_linear`.
        w_hat: Ŵ where it is known already, shape of `weight`, `out_dtype`; it is saved as it is, so nobody may
            write to it before the backward. None = computed here.
        cutoff: T, `[1]`, or `[M]` for one a row, float32 (float64 beside a float64 x): as an earlier call
            returned it. None = the exact k-th magnitude of this x, k = max(1, round-half-up(density n)).
        row_mask: bool, the leading dimensions of x, True = counted; None = all. Other rows, padding, count
            neither for T nor for dW; Y, dX and db see every row.
        scope: "batch", "sample" or "plane": what a fresh cut-off is the k-th magnitude of (`activation_cutoff`).
        slack: at least 1; room for slack · density of x. math.inf: for all of it.
        transposed: `weight` is stored `[K, N]`, as transformers' Conv1D does.
        backend: "torch" (the reference, any device) or "triton" (a GPU, or Triton's interpreter).
        out_dtype: dtype of the matrix products and of Y; the weight's by default.

    Returns:
        `y`: `[..., N]`, `out_dtype`; aliases nothing.
        `cutoff`: T as used; the argument itself where it was given.
        `overflow`: 0-dim bool on the CPU: more was kept than slack allowed for, and has been saved all the same.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together, or an option is unknown or out of range.
        RuntimeError: `backend="triton"` where Triton cannot run, or a CUDA graph capture without room for all.
    """
    out_dtype = out_dtype or weight.dtype
    _check(x, weight, threshold, mask, grad_mask, alpha, w_hat, cutoff, row_mask, kind, transposed, backend, out_dtype)
    check_density("packed_linear", density)
    if scope not in SCOPES:
        raise ValueError(f'packed_linear: expected scope "batch", "sample" or "plane", got {scope!r}; pass one')
    if not slack >= 1:
        raise ValueError(
            f"packed_linear: expected slack of at least 1, got {slack!r}; pass 1.25 for a quarter more room"
        )
    y, _, fresh, _, _, _, overflow = _forward_op(
        x, weight, bias, threshold, mask, grad_mask, alpha, w_hat, cutoff, row_mask,
        kind, transposed, backend, out_dtype, float(density), float(slack), scope,
    )  # fmt: skip
    return y, fresh if cutoff is None else cutoff, overflow


def _check(
    x: Tensor,
    weight: Tensor,
    threshold: Tensor | None,
    mask: Tensor | None,
    grad_mask: Tensor | None,
    alpha: Tensor | None,
    w_hat: Tensor | None,
    cutoff: Tensor | None,
    row_mask: Tensor | None,
    kind: str,
    transposed: bool,
    backend: str,
    out_dtype: torch.dtype,
) -> None:
    function = "packed_linear"
    if kind == "dense":
        view = {"threshold": threshold, "mask": mask, "grad_mask": grad_mask, "alpha": alpha}
        if given := " and ".join(name for name, tensor in view.items() if tensor is not None):
            raise ValueError(f'{function}: expected no view with kind "dense", got {given}; name the kind it is of')
        expect(
            weight.dim() == 2 and weight.dtype in FLOATS,
            function,
            "weight to be a floating-point matrix [N, K]",
            weight,
            "flatten a convolution's weight to [N, K] first",
        )
    else:
        check_operands(function, weight, threshold, {"mask": mask, "grad_mask": grad_mask}, kind, backend)
        check_estimator(function, kind, grad_mask, alpha)
    k = weight.shape[0] if transposed else weight.shape[1]
    check_input(function, x, k, out_dtype)
    check_backend(function, x, backend)
    if w_hat is not None:
        expect(
            w_hat.shape == weight.shape and w_hat.dtype == out_dtype,
            function,
            f"w_hat to be {str(out_dtype).removeprefix('torch.')} {list(weight.shape)}",
            w_hat,
            "pass the view of this weight in the dtype of the product",
        )
    rows = math.prod(x.shape[:-1])
    if cutoff is not None:
        expect(
            cutoff.shape in ((1,), (rows,))
            and cutoff.dtype in (torch.float32, compute_dtype(x))
            and cutoff.device == x.device,
            function,
            f"cutoff to be float32 [1] or [{rows}] on {x.device}",
            cutoff,
            'remember one for the batch, or leave it out with scope "sample" and "plane"',
        )
    if row_mask is not None:
        expect(
            row_mask.shape == x.shape[:-1] and row_mask.dtype == torch.bool and row_mask.device == x.device,
            function,
            f"row_mask to be bool {list(x.shape[:-1])} on {x.device}",
            row_mask,
            "make it True for real tokens, in the leading dimensions of x",
        )
