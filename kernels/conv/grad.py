"""dW of a convolution = m * G in one product of gathered rows: the multiplier and the threshold's gradient end it.

    G[f, (t, c)] = sum over b, o of dY[b, o, f] X[b, o s - p + t d, c]
    dW           = m * G           m: 1 kept, alpha pruned, 0 outside B or in a block that the index does not list
    ds           = -sigma'(s) sum(sign(W) m G)             soft only (AutoSparse, eqs. 6-8, arXiv:2304.06941)

with o, s, p, t and d as in `gemm.py`. The definition is `weight/backward.py`'s on the vendor's G; here G stays
in float32 from the product to the multiplier. The kernels are in `_grad_kernel.py`.
"""

# F output channels   C input channels   T kernel positions

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.grad import conv2d_weight

from .._operands import compute_dtype, expect
from .._triton import require
from ..block.topology import check_index
from ..weight.backward import threshold_backward_reference
from ._grad_kernel import launch_conv_grad
from ._operands import Block, blocks_of, check_conv_view, check_image, kept_blocks, on_blocks
from ._tiles import ConvGradTiles, Geometry
from .gemm import padded

__all__ = ["conv_grad_weight"]


def conv_grad_weight_reference(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor,
    geometry: Geometry,
    threshold: Tensor | None,
    mask: Tensor | None,
    grad_mask: Tensor | None,
    alpha: Tensor | None,
    flags: Tensor | None,
    block: Block | None,
    kind: str,
) -> tuple[Tensor, Tensor]:
    """The definition of `conv_grad_weight`: the vendor's G, set to zero outside the index, then the multiplier's."""
    shape = (weight.shape[0], weight.shape[1] // geometry.taps, *geometry.kernel)
    with torch.autocast(x.device.type, enabled=False):
        image = conv2d_weight(
            padded(x, geometry), shape, grad_y,
            stride=geometry.stride, dilation=geometry.dilation, groups=geometry.groups,
        )  # fmt: skip
    dense = image.permute(0, 2, 3, 1).flatten(1)
    listed = None if flags is None or block is None else on_blocks(flags, block)
    if listed is not None:
        dense = torch.where(listed, dense, 0.0)
        if kind == "mask" and mask is None:
            mask = listed
    return threshold_backward_reference(dense, weight, threshold, mask, grad_mask, alpha, kind)


def conv_grad_weight(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor,
    *,
    geometry: Geometry,
    kind: str,
    threshold: Tensor | None = None,
    mask: Tensor | None = None,
    grad_mask: Tensor | None = None,
    alpha: Tensor | None = None,
    index: Tensor | None = None,
    block: Block | None = None,
    backend: str = "torch",
    tiles: ConvGradTiles | None = None,
) -> tuple[Tensor, Tensor]:
    """dW = m * G and ds, the multiplier applied as the product leaves its registers, or as its parts are summed.

    Where m = 0 the result is a selected 0: a NaN or infinity of the product there reaches neither dW nor ds. Sums
    are in float32 (float64 where all is float64) and in a fixed order: repeated calls agree bit for bit. float32
    operands are multiplied in full float32 unless torch allows tf32. Capturable in a CUDA graph.

    Args:
        grad_y: `[B, F, OH, OW]`, float16/bfloat16/float32 (float64 with the torch back end); channels-last, or it is
            copied.
        x: `[B, C, H, W]`, dtype of grad_y; likewise.
        weight: `[F, kh kw C/groups]`, columns in the order (kh, kw, in), any of these dtypes, any strides: the master.
        geometry: kernel, stride, padding, dilation and groups.
        kind: "soft", "hard" or "mask" (`weight/backward.py`).
        threshold: `[1]` or `[F]`, float32; for kinds "soft" and "hard".
        mask: for kind "mask": bool of the weight's shape, True = kept; with an index also None = all listed blocks.
        grad_mask: as mask, True = gradient computed; None = everywhere. Kept positions always count.
        alpha: 0-dim or `[1]`, float32, the multiplier on pruned positions; None = 0. Read on the device.
        index: `block/topology.py`'s of the blocks whose gradient is wanted, the forward's or a larger one; nothing is
            multiplied for the others. None = all.
        block: (r, c) of the index, as in `conv_forward`.
        backend: "torch" (the reference, any device) or "triton" (a GPU, or the interpreter).
        tiles: configuration of the Triton kernel; computed from the shapes if None.

    Returns:
        `grad_weight`: the weight's shape and dtype, contiguous, newly allocated; exact zeros outside the index.
        `grad_threshold`: shape and dtype of `threshold`, zeros for "hard"; empty float32 `[0]` for "mask".

    Raises:
        ValueError: an operand is missing, superfluous, or of the wrong shape, dtype or device.
        RuntimeError: backend "triton" without triton, or off the GPU.

    Example:
        >>> import torch
        >>> from tritonsparse.kernels.conv._tiles import Geometry
        >>> from tritonsparse.kernels.conv.grad import conv_grad_weight
        >>> grad_y, x = torch.tensor([[[[1.0, 2.0]]]]), torch.tensor([[[[1.0, 2.0, 4.0]]]])
        >>> weight, view = torch.tensor([[0.75, -0.25]]), {"kind": "hard", "threshold": torch.tensor([0.5])}
        >>> conv_grad_weight(grad_y, x, weight, geometry=Geometry((1, 2)), **view, alpha=torch.tensor(0.5))
        (tensor([[5., 5.]]), tensor([0.]))
    """
    function = "conv_grad_weight"
    masks = {"mask": mask, "grad_mask": grad_mask}
    check_conv_view(function, weight, threshold, masks, index, block, geometry, kind, backend)
    check_image(function, "grad_y", grad_y, weight.shape[0], weight, backend)
    check_image(function, "x", x, geometry.groups * weight.shape[1] // geometry.taps, weight, backend)
    expect(
        grad_y.shape[0] == x.shape[0]
        and tuple(grad_y.shape[2:]) == geometry.output(x.shape[2:])
        and grad_y.dtype == x.dtype,
        function,
        f"grad_y to be {x.dtype} of {x.shape[0]} images of {list(geometry.output(x.shape[2:]))}",
        grad_y,
        "pass both as the forward had them",
    )
    if alpha is not None:
        expect(
            alpha.shape in ((), (1,))
            and alpha.dtype in (torch.float32, compute_dtype(weight))
            and alpha.device == weight.device,
            function,
            f"alpha to be one float32 value on {weight.device}",
            alpha,
            "keep the schedule's value in a float32 tensor beside the weight",
        )
    if index is not None and block is not None:
        check_index(function, index, *blocks_of(weight, block))
    if backend == "torch":
        flags = None if index is None or block is None else kept_blocks(index, *blocks_of(weight, block))
        return conv_grad_weight_reference(
            grad_y, x, weight, geometry, threshold, mask, grad_mask, alpha, flags, block, kind
        )
    require(function, weight)
    return launch_conv_grad(grad_y, x, weight, geometry, threshold, mask, grad_mask, alpha, index, block, kind, tiles)
