"""The op of a sparse convolution with its view inside: Y = conv(X, S(W)) + b, with the multiplier on dW.

    forward    Y  = conv(X, S(W)) + b                [B, F, OH, OW]    gemm.py
    backward   dX = conv_transposed(dY, S(W))        [B, C, H, W]      gemm.py
               dW = m * G, and the threshold's gradient     G = conv_weight(dY, X), grad.py
               db = sum over b, o of dY              [F]

Called by `tritonsparse.conv`. W is the dense master as a matrix [F, kh kw C/groups] and is only read; S(W) is never
built, so that the op saves X and nothing of its own. By `backend`:

    "torch"    the references, on the vendor's convolution
    "fused"    the kernels; a 1 x 1 convolution at every pixel is the matrix product of fused/gemm.py, and its dW
               fused/grad.py's where that has a tile for every multiprocessor

The view beside the product is weight/op.py's. Images are channels-last; others are copied.
"""

# B images of C x H x W   F output channels   OH x OW pixels of the result

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from .._operands import check_estimator
from .._tiles import limits_of
from ..fused.gemm import fused_grad_input, fused_linear
from ..fused.grad import fused_grad_weight
from ..plan import CONV_OPS, choose
from ._operands import Block, check_conv_view, image_like
from ._tiles import Geometry
from .gemm import conv_forward, conv_grad_input
from .grad import conv_grad_weight

__all__ = ["conv_op_name", "masked_conv2d", "prefers_fused"]


def _rows(image: Tensor) -> Tensor:
    """Pixels by channels; a view where the image is channels-last."""
    return image.permute(0, 2, 3, 1).reshape(-1, image.shape[1])


def _block(sides: list[int]) -> Block | None:
    return (sides[0], sides[1]) if sides else None


@torch.library.custom_op("tritonsparse::masked_conv2d", mutates_args=())
def _forward_op(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    threshold: Tensor | None,
    mask: Tensor | None,
    grad_mask: Tensor | None,
    alpha: Tensor | None,
    index: Tensor | None,
    input_index: Tensor | None,
    grad_index: Tensor | None,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    block: list[int],
    kind: str,
    backend: str,
    out_dtype: torch.dtype,
) -> Tensor:
    # grad_mask, alpha and two of the indices are the backward's; they pass here because autograd saves op inputs only.
    geometry = Geometry.of(kernel, stride, padding, dilation, groups)
    view: dict[str, Any] = {"kind": kind, "threshold": threshold, "out_dtype": out_dtype}
    # Listed blocks are kept whole: the index says all that the mask does.
    view["mask"] = mask if index is None else None
    if backend == "fused" and geometry.is_product and index is None:
        y = fused_linear(_rows(x), weight, bias, **view, backend="triton")
        return y.view(x.shape[0], x.shape[2], x.shape[3], weight.shape[0]).permute(0, 3, 1, 2)
    return conv_forward(
        x, weight, bias, geometry=geometry, **view, index=index, block=_block(block), backend=_engine(backend)
    )


@_forward_op.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    threshold: Tensor | None,
    mask: Tensor | None,
    grad_mask: Tensor | None,
    alpha: Tensor | None,
    index: Tensor | None,
    input_index: Tensor | None,
    grad_index: Tensor | None,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    block: list[int],
    kind: str,
    backend: str,
    out_dtype: torch.dtype,
) -> Tensor:
    geometry = Geometry.of(kernel, stride, padding, dilation, groups)
    return image_like(x, x.shape[0], weight.shape[0], geometry.output(x.shape[2:]), out_dtype)


def _engine(backend: str) -> str:
    return "triton" if backend == "fused" else "torch"


@torch.library.custom_op("tritonsparse::masked_conv2d_backward", mutates_args=())
def _backward_op(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor,
    threshold: Tensor | None,
    mask: Tensor | None,
    grad_mask: Tensor | None,
    alpha: Tensor | None,
    index: Tensor | None,
    input_index: Tensor | None,
    grad_index: Tensor | None,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    block: list[int],
    kind: str,
    backend: str,
    need_x: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    geometry = Geometry.of(kernel, stride, padding, dilation, groups)
    product = backend == "fused" and geometry.is_product and index is None
    view: dict[str, Any] = {"kind": kind, "threshold": threshold, "backend": _engine(backend)}
    image, block_ = (x.shape[2], x.shape[3]), _block(block)
    if not need_x:
        grad_x = x.new_empty(0)
    elif product:
        rows = fused_grad_input(_rows(grad_y), weight, **view, mask=mask, out_dtype=x.dtype)
        grad_x = rows.view(x.shape[0], *image, x.shape[1]).permute(0, 3, 1, 2)
    else:
        grad_x = conv_grad_input(
            grad_y, weight, image, geometry=geometry, **view, mask=mask if index is None else None, index=input_index,
            block=block_, out_dtype=x.dtype,
        )  # fmt: skip
    if not need_weight:
        return grad_x, weight.new_empty(0), weight.new_empty(0)
    view |= {"grad_mask": grad_mask, "alpha": alpha}
    if product and -(-weight.shape[0] // 128) * -(-weight.shape[1] // 128) >= limits_of(x.device).multiprocessors:
        return grad_x, *fused_grad_weight(_rows(grad_y), _rows(x), weight, **view, mask=mask)
    listed = grad_index
    if listed is None and (kind != "mask" or mask is None or alpha is None):
        # Nothing is due outside the forward's blocks; where it is, the mask tells them apart.
        listed, mask = index, mask if index is None else None
    # Of a 1 x 1 convolution too: that kernel alone cuts the pixels into parts.
    grads = conv_grad_weight(
        grad_y, x, weight, geometry=geometry, **view, mask=mask, index=listed, block=None if listed is None else block_
    )
    return grad_x, *grads


@_backward_op.register_fake
def _(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor,
    threshold: Tensor | None,
    mask: Tensor | None,
    grad_mask: Tensor | None,
    alpha: Tensor | None,
    index: Tensor | None,
    input_index: Tensor | None,
    grad_index: Tensor | None,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    block: list[int],
    kind: str,
    backend: str,
    need_x: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_x = image_like(x, x.shape[0], x.shape[1], (x.shape[2], x.shape[3]), x.dtype) if need_x else x.new_empty(0)
    if not need_weight:
        return grad_x, weight.new_empty(0), weight.new_empty(0)
    if threshold is None:
        return grad_x, weight.new_empty(weight.shape), weight.new_empty(0, dtype=torch.float32)
    return grad_x, weight.new_empty(weight.shape), threshold.new_empty(threshold.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, threshold, mask, grad_mask, alpha, index, input_index, grad_index, *how, _ = inputs
    ctx.save_for_backward(x, weight, threshold, mask, grad_mask, alpha, index, input_index, grad_index)
    ctx.how = how
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
    need_x, need_weight, need_bias, need_threshold = ctx.needs_input_grad[:4]
    grad_x, grad_weight, grad_threshold = torch.ops.tritonsparse.masked_conv2d_backward(
        grad_y, *ctx.saved_tensors, *ctx.how, need_x, need_weight or need_threshold
    )
    return (
        grad_x if need_x else None,
        grad_weight if need_weight else None,
        grad_y.sum((0, 2, 3)).to(ctx.bias_dtype) if need_bias else None,
        # DDP waits for every parameter: a threshold gets a gradient, zeros included, never None.
        grad_threshold if need_threshold else None,
        *[None] * 15,
    )


_forward_op.register_autograd(_backward, setup_context=_setup_context)


def masked_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    kernel: tuple[int, int],
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int, int, int] = (0, 0, 0, 0),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
    kind: str,
    threshold: Tensor | None = None,
    mask: Tensor | None = None,
    grad_mask: Tensor | None = None,
    alpha: Tensor | None = None,
    index: Tensor | None = None,
    input_index: Tensor | None = None,
    grad_index: Tensor | None = None,
    block: Block | None = None,
    backend: str = "torch",
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Y = conv2d(x, S(W)) + bias through the view (kind, threshold, mask, grad_mask, alpha), on listed blocks.

    Args:
        x: `[B, C, H, W]`, `out_dtype`; channels-last, or it is copied.
        weight: `[F, kh kw C/groups]`, float16/bfloat16/float32/float64, columns in the order (kh, kw, in): the master.
        bias: `[F]`, `out_dtype`, or None.
        kernel, stride, dilation, groups: as `torch.nn.functional.conv2d`.
        padding: zeros (top, left, bottom, right).
        kind: "soft" (sign(W) relu(|W| - sigma(s))), "hard" (W above the cut-off t), or "mask".
        threshold: "soft": the logits s; "hard": the cut-offs t; `[1]` or `[F]`, float32 (float64 beside a float64
            weight).
        mask: "mask": bool, shape of `weight`, True = kept. With an index it is True on the listed blocks and False
            elsewhere, which is trusted; dW alone reads it, and only where pruned weights get gradients.
        grad_mask: bool, shape of `weight`, or None = everywhere: the set B outside which pruned weights get no
            gradient. Kept weights always get theirs.
        alpha: float32 scalar tensor, or None = 0: the gradient's multiplier on pruned weights.
        index: `block/topology.py`'s of the blocks that are kept; S(W) is zero elsewhere. None = all.
        input_index: that of `_conv_operands.input_flags` of the same flags; needed where x has a gradient.
        grad_index: that of the blocks whose weights get a gradient, at least the kept ones. None = the kept ones; all
            where there are `mask` and `alpha`.
        block: (r, c) of all three: output by input channels, multiples of 16 that divide those of a group.
        backend: "torch" (any device) or "fused" (a GPU, or Triton's interpreter; head of this file).
        out_dtype: dtype of the products and of Y; the weight's by default.

    Returns:
        `[B, F, OH, OW]`, `out_dtype`, channels-last; aliases nothing.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together, or `kind`/`backend` is unknown.
        RuntimeError: `backend="fused"` where Triton cannot run.
    """
    function = "masked_conv2d"
    out_dtype = out_dtype or weight.dtype
    if backend not in ("torch", "fused"):
        raise ValueError(
            f'{function}: expected backend "torch" or "fused", got {backend!r}; for the view beside the product use '
            f"masked_weight"
        )
    geometry = Geometry(kernel, stride, padding, dilation, groups)
    masks = {"mask": mask, "grad_mask": grad_mask}
    check_conv_view(function, weight, threshold, masks, index, block, geometry, kind, _engine(backend))
    check_estimator(function, kind, grad_mask, alpha)
    if (index is None and (input_index, grad_index) != (None, None)) or (
        index is not None and input_index is None and x.requires_grad and torch.is_grad_enabled()
    ):
        raise ValueError(
            f"{function}: expected index and input_index together, got only one; build both of the same flags"
        )
    if grad_index is not None and kind == "mask" and mask is None:
        raise ValueError(f"{function}: expected a mask beside grad_index, got None; pass the mask of the index")
    if x.dtype != out_dtype:
        raise ValueError(
            f"{function}: expected x in {out_dtype} (the weight's dtype outside autocast), got {x.dtype}; "
            f"cast x or run under torch.autocast"
        )
    y: Tensor = _forward_op(
        x, weight, bias, threshold, mask, grad_mask, alpha, index, input_index, grad_index,
        list(kernel), list(stride), list(padding), list(dilation), groups, list(block or ()), kind, backend, out_dtype,
    )  # fmt: skip
    return y


def conv_op_name(op: str, geometry: Geometry) -> str:
    """What `plan.py` calls a convolution's product: "conv_forward 3x3/2x1", dilation and groups where they are not 1.

    Example:
        >>> from tritonsparse.kernels.conv._tiles import Geometry
        >>> from tritonsparse.kernels.conv.conv2d import conv_op_name
        >>> conv_op_name("conv_forward", Geometry((3, 3), stride=(2, 2), groups=4))
        'conv_forward 3x3/2x2 groups 4'
    """
    (kh, kw), (sh, sw), (dh, dw) = geometry.kernel, geometry.stride, geometry.dilation
    dilated = f" dilation {dh}x{dw}" if (dh, dw) != (1, 1) else ""
    grouped = f" groups {geometry.groups}" if geometry.groups > 1 else ""
    return f"{op} {kh}x{kw}/{sh}x{sw}{dilated}{grouped}"


@functools.cache
def prefers_fused(
    geometry: Geometry,
    batch: int,
    image: tuple[int, int],
    n: int,
    k: int,
    dtype: torch.dtype,
    kind: str,
    device_name: str,
    backward: bool,
) -> bool:
    """Whether every product of this convolution was measured to be faster with its view inside (`plan.py`).

    Args:
        geometry, batch, image: of the convolution, and of the images it is given.
        n, k: rows and columns of the weight's matrix.
        dtype: of the products.
        kind: of the view.
        device_name: as `torch.cuda.get_device_name()` gives it.
        backward: the gradients' products count too.
    """
    height, width = geometry.output(image)
    m = batch * height * width
    ops = CONV_OPS if backward else CONV_OPS[:1]
    return all(choose(conv_op_name(op, geometry), m, n, k, dtype, kind, device_name).fused for op in ops)
