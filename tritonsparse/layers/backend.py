"""Which code computes a layer's products: chosen here and nowhere else.

    torch             the PyTorch definitions and the dense library's products; any device
    triton            the effective weight by one kernel, the dense library's products; single products are fused where
                      `kernels/plan.py` says that this is faster
    fused             the effective weight inside every product
    block             products of the kept blocks alone
    semi_structured   the GPU's 2:4 product

A back end that was asked for by name is never replaced silently. `auto` follows the weight's device, and goes by what
was measured: blocks and 2:4 products only where they were faster than dense.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..kernels import _triton
from ..kernels.conv.conv2d import conv_op_name
from ..kernels.conv.geometry import Geometry
from ..kernels.measured import block_choice, semi_structured_choice
from ..kernels.plan import CONV_OPS, choose
from ..kernels.semi_structured import hardware_reason, operand_reason
from ..pattern import NM, Block, Pattern

__all__ = [
    "BACKENDS",
    "Backend",
    "check_backend",
    "check_semi_structured",
    "choose_backend",
    "conv_is_fused",
    "follow_density",
    "packed_block_backend",
    "product_is_fused",
]

BACKENDS = ("auto", "torch", "triton", "fused", "block", "semi_structured")


@dataclass(frozen=True)
class Backend:
    """What computes one layer's products.

    Attributes:
        asked: what `sparsify` was asked for.
        name: "torch", "triton", "fused", "block" or "semi_structured".
        reason: why, in a sentence for the report.
        sparse_grad_input: whether dX is a 2:4 product too, under "semi_structured".
        without_triton: make the effective weight by PyTorch, where a back end that is not Triton's runs without it.
    """

    asked: str
    name: str
    reason: str
    sparse_grad_input: bool = False
    without_triton: bool = False

    @property
    def elementwise(self) -> str:
        """What makes the effective weight: "torch" or "triton"."""
        return "torch" if self.name == "torch" or self.without_triton else "triton"


def check_backend(asked: str, pattern: Pattern) -> None:
    """Refuse a back end that is unknown, does not fit the pattern, or cannot run here.

    Raises:
        ValueError: unknown, or not one for this pattern.
        RuntimeError: no GPU, or no Triton.
    """
    if asked not in BACKENDS:
        raise ValueError(f"sparsify: expected a backend among {', '.join(BACKENDS)}, got {asked!r}; choose one")
    if asked == "block" and not (isinstance(pattern, Block) and pattern.rows % 16 == pattern.columns % 16 == 0):
        raise ValueError(
            f"sparsify: expected a pattern of blocks whose sides 16 divides with backend='block', got '{pattern}'; "
            f"choose 'block:64', or backend='auto'"
        )
    if asked == "semi_structured":
        if pattern not in (NM(2, 4), NM(2, 4, transposable=True)):
            raise ValueError(
                f"sparsify: expected pattern '2:4' or '2:4:transposable' with backend='semi_structured', got "
                f"'{pattern}'; choose one, or backend='auto'"
            )
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if (reason := hardware_reason(device)) is not None:
            raise RuntimeError(
                f"sparsify: expected a GPU with 2:4 products for backend='semi_structured', got none: {reason}; use "
                f"backend='auto' or 'torch'"
            )
    if asked in ("triton", "fused", "block") and not (
        _triton.AVAILABLE and (_triton.INTERPRETED or torch.cuda.is_available())
    ):
        raise RuntimeError(
            f"sparsify: expected a GPU and an installed Triton for backend={asked!r}, got none of the two or one of "
            f"them; use backend='auto' or 'torch'"
        )


def check_semi_structured(asked: str, shapes: Mapping[str, tuple[int, ...]], pattern: Pattern) -> None:
    """Refuse layers that 2:4 products do not take, where they were asked for.

    Args:
        asked: the back end.
        shapes: of each weight by layer name: outputs, inputs; a convolution's has four sizes.
        pattern: of the masks.

    Raises:
        ValueError: names the first such layer.
    """
    if asked != "semi_structured":
        return
    both = isinstance(pattern, NM) and pattern.transposable
    for name, shape in shapes.items():
        reason: str | None = "it is a convolution"
        if len(shape) == 2:
            n, k = shape
            # dX of a transposable mask is the product with the transpose.
            reason = operand_reason(torch.bfloat16, n, k) or (operand_reason(torch.bfloat16, k, n) if both else None)
        if reason is not None:
            raise ValueError(
                f"sparsify: expected layers that 2:4 products take with backend='semi_structured', got {name}: "
                f"{reason}; exclude it"
            )


def choose_backend(asked: str, weight: Tensor, shape: tuple[int, int] | None, pattern: Pattern) -> Backend:
    """The back end of a layer where its weight is now.

    Args:
        asked: a name in `BACKENDS`.
        weight: the layer's.
        shape: N and K of its matrix; None for a convolution, of which structured products were not measured.
        pattern: of its masks.
    """
    transposable = isinstance(pattern, NM) and pattern.transposable
    kernels_run = weight.is_cuda and _triton.AVAILABLE
    if asked != "auto":
        # The 2:4 product is torch's own and needs no Triton.
        return Backend(asked, asked, "asked for", transposable, asked == "semi_structured" and not kernels_run)
    if not kernels_run:
        reason = "no GPU" if not weight.is_cuda else "Triton is not installed"
        return Backend(asked, "torch", f"auto: {reason}", transposable)
    if shape is not None and isinstance(pattern, NM) and (pattern.n, pattern.m) == (2, 4):
        (n, k), dtype, device = shape, _product_dtype(weight), torch.cuda.get_device_name(weight.device)
        faster, reason = semi_structured_choice(n, k, dtype, device)
        # dX is the product with the transpose.
        sparse_grad_input = transposable and semi_structured_choice(k, n, dtype, device)[0]
        return Backend(asked, "semi_structured" if faster else "triton", reason, sparse_grad_input)
    # 6 bytes a weight in one pass instead of the eager chain's 50: counted, not yet measured here.
    return Backend(asked, "triton", "auto: fewer bytes than eager (analytic)", transposable)


def _product_dtype(weight: Tensor) -> torch.dtype:
    """Master weights in float32 are multiplied in bfloat16 under the usual autocast."""
    return torch.bfloat16 if weight.dtype == torch.float32 else weight.dtype


def follow_density(
    backend: Backend, weight: Tensor, shape: tuple[int, int], block: tuple[int, int], density: float
) -> Backend:
    """Under `auto`, the back end of a layer of blocks at this density: "block" where that was measured faster."""
    device = torch.cuda.get_device_name(weight.device)
    skips, reason = block_choice(*shape, block, density, _product_dtype(weight), device)
    return replace(backend, name="block" if skips else "triton", reason=reason)


def packed_block_backend(asked: str, values: Tensor) -> str:
    """ "torch" or "triton" for products of packed blocks `[nnz, r, c]`; `auto` takes the kernels where they can run."""
    if asked != "auto":
        return "torch" if asked == "torch" else "triton"
    fits = values.shape[1] % 16 == 0 and values.shape[2] % 16 == 0 and values.dtype != torch.float64
    return "triton" if values.is_cuda and _triton.AVAILABLE and fits else "torch"


def product_is_fused(op: str, x: Tensor, shape: torch.Size, kind: str, dtype: torch.dtype) -> bool:
    """Whether a linear layer's "forward" or "grad_weight" is faster with the effective weight inside (`plan.py`)."""
    rows = x.numel() // max(1, x.shape[-1])
    return _planned(op, rows, shape[0], shape[1], dtype, kind, x.device)


@functools.cache
def _planned(op: str, rows: int, n: int, k: int, dtype: torch.dtype, kind: str, device: torch.device) -> bool:
    return choose(op, rows, n, k, dtype, kind, torch.cuda.get_device_name(device)).fused


def conv_is_fused(
    geometry: Geometry, x: Tensor, shape: tuple[int, int], kind: str, dtype: torch.dtype, backward: bool
) -> bool:
    """Whether every product of this convolution was measured to be faster fused (`plan.py`).

    Args:
        geometry: of the convolution.
        x: images `[B, C, H, W]` on a GPU.
        shape: N and K of the weight's matrix.
        kind: of the view.
        dtype: of the products.
        backward: the gradients' products count too.
    """
    return _conv_planned(geometry, tuple(x.shape), shape, kind, dtype, backward, torch.cuda.get_device_name(x.device))


@functools.cache
def _conv_planned(
    geometry: Geometry,
    images: tuple[int, ...],
    shape: tuple[int, int],
    kind: str,
    dtype: torch.dtype,
    backward: bool,
    device_name: str,
) -> bool:
    height, width = geometry.output(images[2:])
    m = images[0] * height * width
    ops = CONV_OPS if backward else CONV_OPS[:1]
    return all(choose(conv_op_name(op, geometry), m, *shape, dtype, kind, device_name).fused for op in ops)
