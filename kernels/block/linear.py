"""The op behind a linear layer whose mask is whole blocks: what is pruned is neither read nor multiplied.

    forward    Y    = X (W on the kept blocks)^T + b      [M, N]    gemm.py
    backward   dX   = dY (W on the kept blocks)           [M, K]    gemm.py
               dW_b = m_b (dY^T X)_b                      [N, K]    grad.py
               db   = sum_M dY                            [N]

with the multiplier m_b of `fused/linear.py`: 1 on kept blocks, alpha on pruned ones, 0 outside the set B. Only where
all pruned blocks get a gradient (alpha and no B) is the product for dW dense. Called by `tritonsparse.layers`. W is the
dense master: a kept block goes from it into the product, in the dtype of x, so that nothing beside W is stored; where
the caller keeps the view in that dtype (`w_hat`), the products read it instead.

Where the blocks lie is an index of fixed size (`topology.py`), so that moving them recompiles nothing.
"""

# M rows of x (tokens)   N output features   K input features   R, C block rows and columns of W

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._eager import is_eager
from .._operands import check_input, refuse
from ..weight.backward import threshold_backward
from .gemm import block_grad_input, block_linear
from .grad import block_grad_weight
from .topology import index_size

__all__ = ["block_matmul"]


def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    w_hat: Tensor | None,
    index: Tensor,
    grad_index: Tensor | None,
    kept: Tensor | None,
    mask: Tensor | None,
    alpha: Tensor | None,
    block: list[int],
    transposed: bool,
    backend: str,
    out_dtype: torch.dtype,
) -> Tensor:
    # grad_index, kept, mask and alpha are the backward's; they pass through because autograd saves op inputs only.
    y = block_linear(
        x.reshape(-1, x.shape[-1]), weight if w_hat is None else w_hat, bias, index, block=_sides(block),
        transposed=transposed, out_dtype=out_dtype, backend=backend,
    )  # fmt: skip
    return y.view(*x.shape[:-1], y.shape[-1])


_forward_op = torch.library.custom_op("tritonsparse::block_matmul", _forward, mutates_args=())


def _sides(block: list[int]) -> tuple[int, int]:
    rows, columns = block
    return rows, columns


@_forward_op.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    w_hat: Tensor | None,
    index: Tensor,
    grad_index: Tensor | None,
    kept: Tensor | None,
    mask: Tensor | None,
    alpha: Tensor | None,
    block: list[int],
    transposed: bool,
    backend: str,
    out_dtype: torch.dtype,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[1 if transposed else 0]), dtype=out_dtype)


def _gradients(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor,
    w_hat: Tensor | None,
    index: Tensor,
    grad_index: Tensor | None,
    kept: Tensor | None,
    mask: Tensor | None,
    alpha: Tensor | None,
    block: list[int],
    transposed: bool,
    backend: str,
    need_x: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor]:
    rows, columns = grad_y.reshape(-1, grad_y.shape[-1]), x.reshape(-1, x.shape[-1])
    grad_x, grad_weight = x.new_empty(0), weight.new_empty(0)
    if need_x:
        factor = weight if w_hat is None else w_hat
        grad_x = block_grad_input(
            rows, factor, index, block=_sides(block), transposed=transposed, out_dtype=x.dtype, backend=backend
        ).view(x.shape)
    if need_weight and mask is not None:
        with torch.autocast(x.device.type, enabled=False):
            dense = columns.t() @ rows if transposed else rows.t() @ columns
        grad_weight, _ = threshold_backward(dense, weight, None, mask, None, alpha, kind="mask", backend=backend)
    elif need_weight:
        grad_weight, _ = block_grad_weight(
            rows, columns, index if grad_index is None else grad_index, block=_sides(block),
            shape=_matrix_shape(weight, transposed), kept=kept, alpha=alpha, transposed=transposed,
            out_dtype=weight.dtype, backend=backend,
        )  # fmt: skip
    return grad_x, grad_weight


_backward_op = torch.library.custom_op("tritonsparse::block_matmul_backward", _gradients, mutates_args=())


def _matrix_shape(weight: Tensor, transposed: bool) -> tuple[int, int]:
    n, k = reversed(weight.shape) if transposed else weight.shape
    return n, k


@_backward_op.register_fake
def _(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor,
    w_hat: Tensor | None,
    index: Tensor,
    grad_index: Tensor | None,
    kept: Tensor | None,
    mask: Tensor | None,
    alpha: Tensor | None,
    block: list[int],
    transposed: bool,
    backend: str,
    need_x: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape if need_x else 0), weight.new_empty(weight.shape if need_weight else 0)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, w_hat, index, grad_index, kept, mask, alpha, ctx.block, ctx.transposed, ctx.backend, _ = inputs
    ctx.save_for_backward(x, weight, w_hat, index, grad_index, kept, mask, alpha)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
    need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
    # The op has no derivative: under create_graph it is in the graph, so that asking for one is an error.
    saved = ctx.saved_tensors  # Read once: a checkpoint unpacks them once.
    eager = is_eager(grad_y, saved[1]) and not torch.is_grad_enabled()
    gradients: Any = _gradients if eager else _backward_op
    grad_x, grad_weight = gradients(grad_y, *saved, ctx.block, ctx.transposed, ctx.backend, need_x, need_weight)
    grad_bias = grad_y.reshape(-1, grad_y.shape[-1]).sum(0).to(ctx.bias_dtype) if need_bias else None
    return grad_x if need_x else None, grad_weight if need_weight else None, grad_bias, *[None] * 10


_forward_op.register_autograd(_backward, setup_context=_setup_context)


class _BlockMatmul(torch.autograd.Function):
    """The op as eager code runs it (`_eager.py`); what gets no gradient is one argument, for each costs time."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, rest: tuple[Any, ...]) -> Tensor:
        inputs = (x, weight, bias, *rest)
        y = _forward(*inputs)
        _setup_context(ctx, inputs, y)
        return y

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        return _backward(ctx, grad_y)[:4]


def block_matmul(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    index: Tensor,
    *,
    block: tuple[int, int],
    grad_index: Tensor | None = None,
    kept: Tensor | None = None,
    mask: Tensor | None = None,
    alpha: Tensor | None = None,
    w_hat: Tensor | None = None,
    transposed: bool = False,
    backend: str = "torch",
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Y = x (W on the kept blocks)^T + bias.

    Args:
        x: `[..., K]`, `out_dtype`; any strides.
        weight: `[N, K]` (`[K, N]` when `transposed`), float16/bfloat16/float32/float64: the dense master. Its pruned
            blocks are not read.
        bias: `[N]`, `out_dtype`, or None.
        index: int32, of the kept blocks (`topology.py`).
        block: (rows, columns) of a block of the matrix [N, K].
        grad_index: of the blocks that get a gradient, the kept ones among them; None: the kept ones alone.
        kept: bool `[R, C]`: which blocks of `grad_index` are kept; needed with it.
        mask: bool, shape of `weight`, constant on blocks: all pruned blocks get alpha times their gradient, and the
            product for it is dense. Excludes `grad_index`.
        alpha: float32 scalar tensor, or None = 0: the gradient's multiplier on pruned blocks.
        w_hat: the view of W, shape of `weight`, `out_dtype`, if the caller keeps it; it is trusted.
        transposed: `weight` is stored `[K, N]`, as transformers' Conv1D does.
        backend: "torch" (any device) or "triton" (a GPU, or Triton's interpreter; sides of blocks that 16 divides).
        out_dtype: dtype of the matrix products and of Y; the weight's by default.

    Returns:
        `[..., N]`, `out_dtype`; aliases nothing.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together, or `grad_index`, `kept` and `mask` do not.
        RuntimeError: backend "triton" where Triton cannot run.
    """
    out_dtype = out_dtype or weight.dtype
    n, k = _matrix_shape(weight, transposed)
    check_input("block_matmul", x, k, out_dtype)
    if (grad_index is None) != (kept is None) or (grad_index is not None and mask is not None):
        raise ValueError(
            "block_matmul: expected grad_index with kept, or mask, or none of the three, got another set; a superset "
            "of blocks is grad_index and kept, all blocks are mask"
        )
    shape, device = weight.shape, weight.device
    size = index_size(-(-n // block[0]), -(-k // block[1]))
    for name, each in (("index", index), ("grad_index", grad_index)):
        if each is not None and not (each.shape == (size,) and each.dtype == torch.int32 and each.device == device):
            expected = f"{name} to be int32 [{size}] on {device}"
            refuse("block_matmul", expected, each, "build it with block_topology.build_indices")
    for name, tensor, dtype in (("mask", mask, torch.bool), ("w_hat", w_hat, out_dtype)):
        if tensor is not None and not (tensor.shape == shape and tensor.dtype == dtype and tensor.device == device):
            expected = f"{name} to be {dtype} {list(shape)} on {device}"
            refuse("block_matmul", expected, tensor, "pass it as the layer keeps it")
    rest = (w_hat, index, grad_index, kept, mask, alpha, list(block), transposed, backend, out_dtype)
    if not is_eager(x, weight):
        return _forward_op(x, weight, bias, *rest)
    if not torch.is_grad_enabled():
        return _forward(x, weight, bias, *rest)
    y: Tensor = _BlockMatmul.apply(x, weight, bias, rest)
    return y
