"""Y = X W_hat^T + b through the GPU's own 2:4 sparse products (cuSPARSELt, by way of torch); W_hat has 2 of every 4.

    forward    Y      = X W_hat^T + b     sparse: W_hat [N, K] has at most two non-zeros in every four along a row
    backward   dX     = dY W_hat          sparse where W_hat has no more in every four along a column either, else dense
               dW_hat = dY^T X            dense; the effective weight's own backward (weight/op.py) multiplies it

cuSPARSELt skips zeros in fours along the reduction, which is K in the forward and N in dX, and a matrix that is 2:4
along its rows is not 2:4 along its columns. Masks that are both are `select/transposable.py`'s, a smaller set. In
dW_hat no operand has zeros: it could be sparse only by sparsifying dY (arXiv:2404.01847), which changes the gradient
and is not done here. So training through this op equals training through the dense products up to rounding.

What to expect: twice the tensor cores' arithmetic is at most 1.2 times a product's speed on an H100 (NVIDIA's figure at
8192^3, CUDALibrarySamples issue 203), on one or two of three products, less the compression of W_hat for every forward.
`benchmarks/bench_semi_structured.py` measures it; `auto` takes this op where that found it faster (measured.py).
"""

# M rows of x (tokens)   N output features   K input features

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._eager import as_dtype, is_eager, outside_autocast
from ._operands import FLOATS, check_input, refuse

__all__ = ["hardware_reason", "operand_reason", "semi_structured_linear", "semi_structured_reason"]

DTYPES = (torch.float16, torch.bfloat16)
BACKENDS = ("torch", "semi_structured")


def hardware_reason(device: torch.device) -> str | None:
    """Why this device has no 2:4 products; None if it has."""
    if device.type != "cuda":
        return f"2:4 products need a GPU, and the operands are on {device}"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return f"2:4 products need compute capability 8.0, and {torch.cuda.get_device_name(device)} has less"
    if not torch.backends.cusparselt.is_available():
        return "this build of torch has no cuSPARSELt"
    return None


def _shape_constraints(dtype: torch.dtype) -> Any:
    """What torch asks of shapes for cuSPARSELt, which has changed with its versions."""
    return torch.sparse.SparseSemiStructuredTensorCUSPARSELT._DTYPE_SHAPE_CONSTRAINTS[dtype]


def operand_reason(dtype: torch.dtype, n: int, k: int) -> str | None:
    """Why a weight [N, K] has no 2:4 product in this dtype; None if it has."""
    if dtype not in DTYPES:
        return f"2:4 products are in float16 or bfloat16, and x is in {dtype}"
    asked = _shape_constraints(dtype)
    if n == 0 or k == 0 or n % asked.sparse_min_rows or k % asked.sparse_min_cols:
        multiples = f"{asked.sparse_min_rows} rows and {asked.sparse_min_cols} columns"
        return f"2:4 products in {dtype} need a weight [N, K] in multiples of {multiples}, and this one is {n} x {k}"
    return None


def semi_structured_reason(
    x: Tensor, weight: Tensor, mask: Tensor | None = None, *, transposed: bool = False, sparse_grad_input: bool = False
) -> str | None:
    """Why `semi_structured_linear` cannot multiply these through 2:4 products; None if it can.

    Waits for the host where a mask is given.

    Args:
        x: `[..., K]`, in the dtype of the product.
        weight: `[N, K]` (`[K, N]` when `transposed`).
        mask: bool, shape of `weight`, True = kept; None leaves out whether it is 2:4.
        transposed: `weight` and `mask` are stored `[K, N]`, as transformers' Conv1D does.
        sparse_grad_input: for dX too.

    Returns:
        All that stands in the way, joined by "; ".

    Example:
        >>> import torch
        >>> from tritonsparse.kernels.semi_structured import semi_structured_reason
        >>> semi_structured_reason(torch.zeros(8, 64, dtype=torch.float16), torch.zeros(64, 64))
        '2:4 products need a GPU, and the operands are on cpu'
    """
    n, k = reversed(weight.shape) if transposed else weight.shape
    reasons = [operand_reason(x.dtype, n, k) or (operand_reason(x.dtype, k, n) if sparse_grad_input else None)]
    reasons.append(hardware_reason(x.device))
    if mask is not None:
        along_rows = mask.t() if transposed else mask
        if sparse_grad_input and not _is_2_of_4(along_rows.t()):
            reasons.insert(0, "the mask keeps more than 2 of some 4 neighbours along a column of W [N, K]")
        if not _is_2_of_4(along_rows):
            reasons.insert(0, "the mask keeps more than 2 of some 4 neighbours along a row of W [N, K]")
    return "; ".join(reason for reason in reasons if reason is not None) or None


def _is_2_of_4(mask: Tensor) -> bool:
    n, k = mask.shape
    return k % 4 == 0 and bool((mask.reshape(n, k // 4, 4).sum(2) <= 2).all())


def _require(function: str, dtype: torch.dtype, w_hat: Tensor, transposed: bool) -> None:
    n, k = reversed(w_hat.shape) if transposed else w_hat.shape
    for error, reason in ((ValueError, operand_reason(dtype, n, k)), (RuntimeError, hardware_reason(w_hat.device))):
        if reason is not None:
            raise error(f'{function}: expected operands that 2:4 products take, but {reason}; pass backend="torch"')


def _multiply(x: Tensor, w_hat: Tensor, bias: Tensor | None) -> Tensor:
    """x [..., K] times the transpose of w_hat [N, K], of any strides, which is compressed for this one product."""
    n, k = w_hat.shape
    rows = x if x.dim() == 2 else x.reshape(-1, k)
    count = rows.shape[0]
    if not count:
        return x.new_empty((*x.shape[:-1], n))
    compressed = torch._cslt_compress(w_hat.contiguous())
    # cuSPARSELt takes the sparse operand on the left: (W_hat X^T)^T, with X^T the transpose of contiguous rows.
    padded = F.pad(rows, (0, 0, 0, -count % _shape_constraints(x.dtype).dense_min_rows)).contiguous()
    y = torch._cslt_sparse_mm(compressed, padded.t(), bias=bias, transpose_result=True)[:count]
    return y.reshape(*x.shape[:-1], n)


def _forward(x: Tensor, w_hat: Tensor, bias: Tensor | None, transposed: bool, sparse_grad_input: bool) -> Tensor:
    # sparse_grad_input is the backward's; it passes through here because autograd saves op inputs only.
    with outside_autocast(x, bias):
        return _multiply(x, w_hat.t() if transposed else w_hat, bias)


_forward_op = torch.library.custom_op("tritonsparse::semi_structured_linear", _forward, mutates_args=())


@_forward_op.register_fake
def _(x: Tensor, w_hat: Tensor, bias: Tensor | None, transposed: bool, sparse_grad_input: bool) -> Tensor:
    return x.new_empty((*x.shape[:-1], w_hat.shape[1 if transposed else 0]))


def _grad_input(grad_y: Tensor, w_hat: Tensor, transposed: bool) -> Tensor:
    # The transpose of W_hat [N, K] is 2:4 along its own rows.
    return _multiply(grad_y, w_hat if transposed else w_hat.t(), None)


_grad_input_op = torch.library.custom_op("tritonsparse::semi_structured_grad_input", _grad_input, mutates_args=())


@_grad_input_op.register_fake
def _(grad_y: Tensor, w_hat: Tensor, transposed: bool) -> Tensor:
    return grad_y.new_empty((*grad_y.shape[:-1], w_hat.shape[0 if transposed else 1]))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, w_hat, bias, *ctx.how = inputs
    ctx.save_for_backward(x, w_hat)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
    x, w_hat = ctx.saved_tensors
    transposed, sparse = ctx.how
    need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
    rows = grad_y.reshape(-1, grad_y.shape[-1])
    grad_x = grad_w_hat = None
    with outside_autocast(grad_y):
        if need_x and sparse:
            # The op has no derivative: under create_graph it is in the graph, so that asking for one is an error.
            eager = is_eager(grad_y, w_hat) and not torch.is_grad_enabled()
            grad_x = (_grad_input if eager else _grad_input_op)(grad_y, w_hat, transposed)
        elif need_x:
            grad_x = torch.mm(rows, w_hat.t() if transposed else w_hat).reshape(x.shape)
        if need_weight:
            columns = x.reshape(-1, x.shape[-1])
            grad_w_hat = torch.mm(columns.t(), rows) if transposed else torch.mm(rows.t(), columns)
    return grad_x, grad_w_hat, as_dtype(rows.sum(0), ctx.bias_dtype) if need_bias else None, None, None


_forward_op.register_autograd(_backward, setup_context=_setup_context)


class _SemiStructuredLinear(torch.autograd.Function):
    """The op as eager code runs it (`_eager.py`)."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        y = _forward(*inputs)
        _setup_context(ctx, inputs, y)
        return y

    backward = staticmethod(_backward)


def semi_structured_linear(
    x: Tensor,
    w_hat: Tensor,
    bias: Tensor | None = None,
    *,
    transposed: bool = False,
    backend: str = "torch",
    sparse_grad_input: bool = False,
) -> Tensor:
    """Y = x w_hat^T + bias with a w_hat that keeps at most two of four; its gradient is a dense product.

    Args:
        x: `[..., K]`, any strides; float16 or bfloat16 for the sparse product.
        w_hat: `[N, K]` (`[K, N]` when `transposed`), dtype of x: the effective weight, with at most two non-zeros in
            every four neighbours along a row of `[N, K]`. That it is so is not looked at (it would wait for the host):
            see `semi_structured_reason`. N and K are multiples of 16 for the sparse product (of 32 in older versions
            of torch). It is saved as it is.
        bias: `[N]`, dtype of x, or None.
        transposed: `w_hat` is stored `[K, N]`, as transformers' Conv1D does.
        backend: "torch" (the dense product, any device and dtype) or "semi_structured".
        sparse_grad_input: dX is a sparse product too; then w_hat has at most two non-zeros in every four neighbours
            along a column as well (`select/transposable.py`), which is not looked at either.

    Returns:
        `[..., N]`, dtype of x; aliases nothing.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together, or are not those of 2:4 products.
        RuntimeError: backend "semi_structured" where the GPU or torch has no 2:4 products.

    Example:
        >>> import torch
        >>> from tritonsparse.kernels.semi_structured import semi_structured_linear
        >>> semi_structured_linear(torch.ones(1, 4), torch.tensor([[0.0, 0.0, 3.0, 4.0]]))
        tensor([[7.]])
    """
    function = "semi_structured_linear"
    if backend not in BACKENDS:
        raise ValueError(f'{function}: expected backend "torch" or "semi_structured", got {backend!r}; pass either')
    if w_hat.dim() != 2 or w_hat.dtype not in FLOATS or w_hat.device != x.device:
        expected = f"w_hat to be a floating-point matrix [N, K] on {x.device}"
        refuse(function, expected, w_hat, "pass the effective weight")
    n, k = reversed(w_hat.shape) if transposed else w_hat.shape
    check_input(function, x, k, w_hat.dtype)
    if bias is not None and not (bias.shape == (n,) and bias.dtype == x.dtype and bias.device == x.device):
        refuse(function, f"bias to be {x.dtype} [{n}] on {x.device}", bias, "cast the bias with x")
    if backend == "torch":
        with outside_autocast(x, bias):
            return F.linear(x, w_hat.t() if transposed else w_hat, bias)
    _require(function, x.dtype, w_hat, transposed)
    if sparse_grad_input:
        _require(function, x.dtype, w_hat, not transposed)
    if not is_eager(x, w_hat):
        return _forward_op(x, w_hat, bias, transposed, sparse_grad_input)
    if not torch.is_grad_enabled():
        return _forward(x, w_hat, bias, transposed, sparse_grad_input)
    y: Tensor = _SemiStructuredLinear.apply(x, w_hat, bias, transposed, sparse_grad_input)
    return y
