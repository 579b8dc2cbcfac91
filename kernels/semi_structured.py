"""Y = X What^T + b through the GPU's own 2:4 sparse products (cuSPARSELt, by way of torch), What = W on a 2:4 mask.

    forward    Y  = X What^T + b        sparse: What [N, K] has at most two non-zeros in every four along a row
    backward   dX = dY What             sparse where What has no more in every four along a column either, else dense
               dW = m * (dY^T X)        dense, m: 1 kept, alpha pruned, 0 outside B; fused/linear.py's backward

cuSPARSELt skips zeros in fours along the reduction, which is K in the forward and N in dX, and a mask that is 2:4 along
the rows of Ŵ is not 2:4 along its columns. Masks that are both are `select/transposable.py`'s, a smaller set. In dW no
operand has zeros: it could be sparse only by sparsifying dY (arXiv:2404.01847), which changes the gradient and is not
done here. So training through this op equals training through the dense products up to rounding.

What to expect: twice the tensor cores' arithmetic is at most 1.2 times a product's speed on an H100 (NVIDIA's figure at
8192^3, CUDALibrarySamples issue 203), on one or two of three products, less the compression of What for every forward.
`benchmarks/bench_semi_structured.py` measures it; `auto` takes this op where that found it faster (block/plan.py).
"""

# M rows of x (tokens)   N output features   K input features

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _triton
from ._operands import check_estimator, check_operands, check_w_hat, expect
from .fused.linear import masked_linear
from .weight.forward import cast_alone, view_reference

__all__ = [
    "hardware_reason",
    "operand_reason",
    "pack_semi_structured",
    "semi_structured_linear",
    "semi_structured_reason",
]

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


def _elementwise(tensor: Tensor) -> str:
    return "triton" if _triton.AVAILABLE and tensor.is_cuda else "torch"


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


def pack_semi_structured(w_hat: Tensor, *, transposed: bool = False) -> Tensor:
    """The two of four that the sparse product reads, and where they are, of a matrix that has no more.

    What has more than two non-zeros in four is packed wrongly, and nobody looks: `semi_structured_reason` does.

    Args:
        w_hat: `[N, K]` (`[K, N]` when `transposed`), float16 or bfloat16, on the GPU.
        transposed: as in `semi_structured_linear`.

    Returns:
        cuSPARSELt's form, opaque, 9/16 of the bytes of w_hat; newly allocated.

    Raises:
        ValueError: dtype or shape are not those of 2:4 products.
        RuntimeError: the GPU or torch has no 2:4 products.
    """
    _require("pack_semi_structured", w_hat.dtype, w_hat, transposed)
    return torch._cslt_compress((w_hat.t() if transposed else w_hat).contiguous())


def _require(function: str, dtype: torch.dtype, weight: Tensor, transposed: bool) -> None:
    n, k = reversed(weight.shape) if transposed else weight.shape
    for error, reason in ((ValueError, operand_reason(dtype, n, k)), (RuntimeError, hardware_reason(weight.device))):
        if reason is not None:
            raise error(f'{function}: expected operands that 2:4 products take, but {reason}; pass backend="torch"')


def _multiply(rows: Tensor, packed: Tensor, bias: Tensor | None, features: int) -> Tensor:
    """rows [M, K] times the transpose of what is packed, of `features` rows."""
    count = rows.shape[0]
    if not count:
        return rows.new_empty((0, features))
    # cuSPARSELt takes the sparse operand on the left: (What X^T)^T, with X^T the transpose of contiguous rows.
    padded = F.pad(rows, (0, 0, 0, -count % _shape_constraints(rows.dtype).dense_min_rows)).contiguous()
    return torch._cslt_sparse_mm(packed, padded.t(), bias=bias, transpose_result=True)[:count]


@torch.library.custom_op("tritonsparse::semi_structured_grad_input", mutates_args=())
def _grad_input_op(grad_y: Tensor, w_hat: Tensor, transposed: bool) -> Tensor:
    # The transpose of What [N, K], 2:4 along its own rows.
    packed = torch._cslt_compress((w_hat if transposed else w_hat.t()).contiguous())
    k = w_hat.shape[0] if transposed else w_hat.shape[1]
    grad_x = _multiply(grad_y.reshape(-1, grad_y.shape[-1]), packed, None, k)
    return grad_x.reshape(*grad_y.shape[:-1], k)


@_grad_input_op.register_fake
def _(grad_y: Tensor, w_hat: Tensor, transposed: bool) -> Tensor:
    return grad_y.new_empty((*grad_y.shape[:-1], w_hat.shape[0] if transposed else w_hat.shape[1]))


@torch.library.custom_op("tritonsparse::semi_structured_linear", mutates_args=())
def _forward_op(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor,
    grad_mask: Tensor | None,
    alpha: Tensor | None,
    w_hat: Tensor | None,
    packed: Tensor | None,
    transposed: bool,
    defer: bool,
    save_view: bool,
    sparse_grad_input: bool,
) -> tuple[Tensor, Tensor]:
    # grad_mask, alpha, defer and sparse_grad_input are the backward's: autograd saves op inputs only.
    saved = None
    if w_hat is None and (packed is None or save_view):
        view = view_reference if _elementwise(weight) == "torch" else cast_alone
        w_hat = saved = view(weight, None, mask, "mask", x.dtype)
    if packed is None:
        assert w_hat is not None
        packed = torch._cslt_compress((w_hat.t() if transposed else w_hat).contiguous())
    features = weight.shape[1] if transposed else weight.shape[0]
    y = _multiply(x.reshape(-1, x.shape[-1]), packed, bias, features)
    # An output must not alias an input, so a given view is saved as the input it is.
    kept = saved if saved is not None and save_view else weight.new_empty(0, dtype=x.dtype)
    return y.reshape(*x.shape[:-1], features), kept


@_forward_op.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor,
    grad_mask: Tensor | None,
    alpha: Tensor | None,
    w_hat: Tensor | None,
    packed: Tensor | None,
    transposed: bool,
    defer: bool,
    save_view: bool,
    sparse_grad_input: bool,
) -> tuple[Tensor, Tensor]:
    features = weight.shape[1] if transposed else weight.shape[0]
    saved = weight.new_empty(weight.shape if w_hat is None and save_view else 0, dtype=x.dtype)
    return x.new_empty((*x.shape[:-1], features)), saved


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, bias, mask, grad_mask, alpha, w_hat, _, transposed, defer, _, sparse = inputs
    ctx.save_for_backward(x, weight, output[1] if w_hat is None else w_hat, mask, grad_mask, alpha)
    ctx.transposed, ctx.defer, ctx.sparse_grad_input = transposed, defer, sparse
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_y: Tensor | None, grad_w_hat: Tensor | None) -> tuple[Tensor | None, ...]:
    x, weight, w_hat, mask, grad_mask, alpha = ctx.saved_tensors
    need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
    if grad_y is None:
        grad_y = x.new_zeros((*x.shape[:-1], weight.shape[1] if ctx.transposed else weight.shape[0]))
    dense_x = need_x and not ctx.sparse_grad_input
    grad_x, grad_weight, _ = torch.ops.tritonsparse.masked_linear_backward(
        grad_y, x, weight, w_hat, None, mask, grad_mask, alpha, "mask", ctx.transposed,
        _elementwise(weight), dense_x, need_weight, ctx.defer,
    )  # fmt: skip
    if need_x and not dense_x:
        grad_x = _grad_input_op(grad_y, w_hat, ctx.transposed)
    grad_bias = grad_y.reshape(-1, grad_y.shape[-1]).sum(0).to(ctx.bias_dtype) if need_bias else None
    return (grad_x if need_x else None, grad_weight if need_weight else None, grad_bias, *[None] * 9)


_forward_op.register_autograd(_backward, setup_context=_setup_context)


def semi_structured_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    mask: Tensor,
    grad_mask: Tensor | None = None,
    alpha: Tensor | None = None,
    w_hat: Tensor | None = None,
    packed: Tensor | None = None,
    transposed: bool = False,
    backend: str = "torch",
    defer: bool = False,
    sparse_grad_input: bool = False,
) -> Tensor:
    """Y = X What^T + bias with What = W on a mask that keeps at most two of four; dW is a dense product.

    Args:
        x: `[..., K]`, any strides; float16 or bfloat16 for the sparse product.
        weight: `[N, K]` (`[K, N]` when `transposed`), float16/bfloat16/float32: the dense master. N and K are multiples
            of 16 for the sparse product (of 32 in older versions of torch).
        bias: `[N]`, dtype of x, or None.
        mask: bool, shape of `weight`, True = kept: at most two of every four neighbours along a row of W `[N, K]`. That
            it is so is not looked at in every call (it would wait for the host): see `semi_structured_reason`.
        grad_mask: bool, shape of `weight`, or None = everywhere: where pruned weights get gradients.
        alpha: float32 scalar tensor, or None = 0: the gradient's multiplier on pruned weights.
        w_hat: What itself, shape of `weight`, dtype of x, if the caller keeps it; it is trusted.
        packed: what `pack_semi_structured` makes of it, if the caller keeps it; it is trusted.
        transposed: `weight` and `mask` are stored `[K, N]`, as transformers' Conv1D does.
        backend: "torch" (the reference, any device and dtype: `masked_linear`) or "semi_structured".
        defer: leave the dense gradient in the weight's, as in `masked_linear`.
        sparse_grad_input: dX is a sparse product too; then the mask keeps at most two of every four neighbours along a
            column as well (`select/transposable.py`), which is not looked at either.

    Returns:
        `[..., N]`, dtype of x; aliases nothing.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together, or are not those of 2:4 products.
        RuntimeError: backend "semi_structured" where the GPU or torch has no 2:4 products.

    Example:
        >>> import torch
        >>> from tritonsparse.kernels.semi_structured import semi_structured_linear
        >>> weight, mask = torch.tensor([[1.0, 2.0, 3.0, 4.0]]), torch.tensor([[False, False, True, True]])
        >>> semi_structured_linear(torch.ones(1, 4), weight, mask=mask)
        tensor([[7.]])
    """
    function = "semi_structured_linear"
    if backend not in BACKENDS:
        raise ValueError(f'{function}: expected backend "torch" or "semi_structured", got {backend!r}; pass either')
    check_operands(function, weight, None, {"mask": mask, "grad_mask": grad_mask}, "mask", "torch")
    check_estimator(function, "mask", grad_mask, alpha)
    n, k = reversed(weight.shape) if transposed else weight.shape
    expect(
        x.dim() > 0 and x.shape[-1] == k and x.device == weight.device,
        function,
        f"x of shape [..., {k}] on {weight.device}",
        x,
        "check the layer's input",
    )
    if bias is not None:
        expect(
            bias.shape == (n,) and bias.dtype == x.dtype and bias.device == x.device,
            function,
            f"bias to be {x.dtype} [{n}] on {x.device}",
            bias,
            "cast the bias with x",
        )
    check_w_hat(function, w_hat, weight, x.dtype)
    if backend == "torch":
        return masked_linear(
            x, weight, bias, kind="mask", mask=mask, grad_mask=grad_mask, alpha=alpha, w_hat=w_hat,
            transposed=transposed, out_dtype=x.dtype, defer=defer,
        )  # fmt: skip
    _require(function, x.dtype, weight, transposed)
    if sparse_grad_input:
        _require(function, x.dtype, weight, not transposed)
    view = (mask, grad_mask, alpha, w_hat, packed)
    y, _ = _forward_op(x, weight, bias, *view, transposed, defer, torch.is_grad_enabled(), sparse_grad_input)
    return y
