"""The op behind a linear layer whose mask is whole blocks: what is pruned is neither read nor multiplied.

    forward    Y    = X (W on the kept blocks)^T + b      [M, N]    gemm.py
    backward   dX   = dY (W on the kept blocks)           [M, K]    gemm.py
               dW_b = m_b (dY^T X)_b                      [N, K]    grad.py
               db   = sum_M dY                            [N]

with the multiplier m_b of kind "mask" (`weight/reference.py`): 1 on kept blocks, alpha on pruned ones, 0 outside the
set B. Only where all pruned blocks get a gradient (alpha and no B) is the product for dW dense. W is the dense master:
a kept block goes from it into the product, in the dtype of x, so that no copy of W is stored; where the caller
keeps the weight in that dtype (`w_hat`), the products read it instead. Called by `tritonsparse.layers`.
"""

# M rows of x (tokens)   N output features   K input features   R, C block rows and columns of W

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .._eager import as_dtype, is_eager, outside_autocast
from .._operands import check_input, refuse
from ..weight.backward import gradient
from ..weight.view import View, check_view
from ._layout import BlockLayout
from .gemm import block_forward, block_grad_input
from .grad import block_grad_weight
from .topology import Topology

__all__ = ["block_linear"]


def _matrix(tensor: Tensor) -> Tensor:
    return tensor if tensor.dim() == 2 else tensor.reshape(-1, tensor.shape[-1])


def _layout(weight: Tensor, index: Tensor, block: list[int], transposed: bool) -> BlockLayout:
    n, k = weight.shape
    return BlockLayout(index, (block[0], block[1]), (k, n) if transposed else (n, k), transposed)


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
    dtype: torch.dtype,
) -> Tensor:
    # grad_index, kept, mask and alpha are the backward's; they pass through because autograd saves op inputs only.
    factor, layout = weight if w_hat is None else w_hat, _layout(weight, index, block, transposed)
    y = block_forward(_matrix(x), factor, layout, bias, out_dtype=dtype, backend=backend)
    return y.view(*x.shape[:-1], y.shape[-1])


_forward_op = torch.library.custom_op("tritonsparse::block_linear", _forward, mutates_args=())


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
    dtype: torch.dtype,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[1 if transposed else 0]), dtype=dtype)


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
    """Those of x and the weight; empty where not needed, for a schema has no optional results."""
    rows, inputs, layout = _matrix(grad_y), _matrix(x), _layout(weight, index, block, transposed)
    grad_x, grad_weight = x.new_empty(0), weight.new_empty(0)
    if need_x:
        factor = weight if w_hat is None else w_hat
        grad_x = block_grad_input(rows, factor, layout, out_dtype=x.dtype, backend=backend).view(x.shape)
    if need_weight and mask is not None:
        with outside_autocast(x):
            dense = inputs.t() @ rows if transposed else rows.t() @ inputs
        grad_weight, _ = gradient(dense, weight, View("mask", mask=mask, alpha=alpha), backend)
    elif need_weight:
        wanted = layout if grad_index is None else replace(layout, index=grad_index)
        grad_weight = block_grad_weight(
            rows, inputs, wanted, kept=kept, alpha=alpha, out_dtype=weight.dtype, backend=backend
        )
    return grad_x, grad_weight


_backward_op = torch.library.custom_op("tritonsparse::block_linear_backward", _gradients, mutates_args=())


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
    x, weight, bias, *saved, ctx.block, ctx.transposed, ctx.backend, _ = inputs
    ctx.save_for_backward(x, weight, *saved)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
    need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
    saved = ctx.saved_tensors  # Read once: a checkpoint unpacks them once.
    # The op has no derivative: under create_graph it is in the graph, so that asking for one is an error.
    eager = is_eager(grad_y, saved[1]) and not torch.is_grad_enabled()
    gradients: Any = _gradients if eager else _backward_op
    grad_x, grad_weight = gradients(grad_y, *saved, ctx.block, ctx.transposed, ctx.backend, need_x, need_weight)
    grad_bias = as_dtype(_matrix(grad_y).sum(0), ctx.bias_dtype) if need_bias else None
    return grad_x if need_x else None, grad_weight if need_weight else None, grad_bias, *[None] * 10


_forward_op.register_autograd(_backward, setup_context=_setup_context)


class _BlockLinear(torch.autograd.Function):
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


def _check(
    x: Tensor,
    weight: Tensor,
    topology: Topology,
    view: View,
    w_hat: Tensor | None,
    transposed: bool,
    dtype: torch.dtype,
    backend: str,
) -> None:
    """Refuse what does not fit together; the shapes of index and bias are the product's to check."""
    if view.kind != "mask":
        raise ValueError(f'block_linear: expected a view of kind "mask", got "{view.kind}"; call fused_linear')
    check_view("block_linear", weight, view, backend)
    check_input("block_linear", x, weight.shape[0 if transposed else 1], dtype)
    if (view.grad_mask is None) != (topology.grad_index is None):
        given = "grad_index alone" if view.grad_mask is None else "grad_mask alone"
        raise ValueError(
            f"block_linear: expected grad_mask in the view and grad_index in the topology, or neither, got {given}; "
            f"make the topology of the view's masks"
        )
    if w_hat is not None and not (
        w_hat.shape == weight.shape and w_hat.dtype == dtype and w_hat.device == weight.device
    ):
        expected = f"w_hat to be {dtype} {list(weight.shape)} on {weight.device}"
        refuse("block_linear", expected, w_hat, "leave it out, and the products read the weight")


def block_linear(
    x: Tensor,
    weight: Tensor,
    topology: Topology,
    view: View,
    bias: Tensor | None = None,
    *,
    w_hat: Tensor | None = None,
    transposed: bool = False,
    dtype: torch.dtype | None = None,
    backend: str = "torch",
) -> Tensor:
    """Y = x (W on the kept blocks)^T + bias, differentiable in x, the weight and the bias.

    Args:
        x: `[..., K]`, `dtype`; any strides.
        weight: `[N, K]` (`[K, N]` when `transposed`), float16/bfloat16/float32/float64: the dense master. Its pruned
            blocks are not read.
        topology: of the view's masks as [N, K]; it is trusted to be current.
        view: kind "mask", its mask constant on blocks. With alpha and without grad_mask every pruned block gets alpha
            times its gradient, and the product for dW is dense; else dW is made on the blocks that get one.
        bias: `[N]`, `dtype`, or None.
        w_hat: W in `dtype`, shape of `weight`, right on kept blocks, if the caller keeps it; it is trusted, and gets no
            gradient: W does.
        transposed: `weight` is stored `[K, N]`, as transformers' Conv1D does.
        dtype: of the matrix products and of Y; the weight's by default.
        backend: "torch" (any device) or "triton" (a GPU, or Triton's interpreter; sides of blocks that 16 divides).

    Returns:
        `[..., N]`, `dtype`; aliases nothing.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together, or the view is none of blocks.
        RuntimeError: backend "triton" where Triton cannot run.

    Example:
        >>> import torch
        >>> from tritonsparse.kernels.block.linear import block_linear
        >>> from tritonsparse.kernels.block.topology import Topology
        >>> from tritonsparse.kernels.weight.view import View
        >>> mask = torch.tensor([[False, False, True, True]])
        >>> x, weight = torch.tensor([[9.0, 9.0, 1.0, 2.0]]), torch.tensor([[1.0, 2.0, 3.0, 4.0]])
        >>> block_linear(x, weight, Topology.of(mask, None, (1, 2)), View("mask", mask=mask))
        tensor([[11.]])
    """
    dtype = dtype or weight.dtype
    _check(x, weight, topology, view, w_hat, transposed, dtype, backend)
    mask = kept = grad_index = None
    if view.alpha is not None:
        if view.grad_mask is None:
            mask = view.mask
        else:
            kept, grad_index = topology.flags, topology.grad_index
    rest = (
        *(w_hat, topology.index, grad_index, kept, mask, view.alpha),
        *(list(topology.block), transposed, backend, dtype),
    )
    if not is_eager(x, weight):
        return _forward_op(x, weight, bias, *rest)
    if not torch.is_grad_enabled():
        return _forward(x, weight, bias, *rest)
    y: Tensor = _BlockLinear.apply(x, weight, bias, rest)
    return y
