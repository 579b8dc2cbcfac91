"""Implicit-GEMM convolutions of ResNet-50, in the configurations that their launchers compute."""

from collections.abc import Iterator
from typing import Any

import triton.language as tl

from tritonsparse.kernels._tiles import GROUP
from tritonsparse.kernels.conv._gemm_kernel import UNSPECIALIZED, _conv_gemm_kernel
from tritonsparse.kernels.conv._grad_kernel import _conv_grad_kernel, _finish_splits_kernel
from tritonsparse.kernels.conv._tiles import ConvGradTiles, ConvShape, ConvTiles, conv_grad_tiles, conv_tiles
from tritonsparse.kernels.conv.grad import SUM_COLUMNS, SUM_ROWS

from .case import EVERYWHERE, HOPPER, LIMITS, WIDTH, Case, Constant

Block = tuple[int, int] | None
Tiles = ConvTiles | ConvGradTiles
AMD = ("sm_90", "gfx942")
# m, n, k, kernel positions; kind ("whole": blocks that an index lists), dtype of the weight, exchanged, block, divisor.
PRODUCTS: list[tuple[tuple[int, int, int, int], str, str, bool, Block, int, tuple[str, ...]]] = [
    ((100_352, 64, 64, 9), "soft", "fp32", False, None, 1, HOPPER),
    ((25_088, 128, 128, 9), "soft", "fp32", False, None, 1, EVERYWHERE),
    ((25_088, 128, 128, 9), "soft per row", "fp32", True, None, 1, HOPPER),
    ((1_568, 512, 512, 9), "mask", "fp32", False, None, 1, HOPPER),
    ((25_088, 128, 128, 9), "whole", "fp32", False, (64, 64), 1, AMD),
    ((25_088, 128, 128, 9), "whole", "bf16", True, (128, 128), 2, HOPPER),
    ((401_408, 64, 3, 49), "soft", "fp32", False, None, 1, HOPPER),
]
GRADIENTS: list[tuple[tuple[int, int, int, int], str, Block, tuple[str, ...]]] = [
    ((100_352, 64, 64, 9), "soft", None, HOPPER),
    ((25_088, 128, 128, 9), "soft", None, EVERYWHERE),
    ((1_568, 1_024, 1_024, 9), "mask", None, HOPPER),
    ((25_088, 128, 128, 9), "whole", (64, 64), HOPPER),
    ((401_408, 64, 3, 49), "soft", None, HOPPER),
]


def conv_cases() -> Iterator[Case]:
    for (m, n, k, taps), kind, weight, exchanged, block, divisor, targets in PRODUCTS:
        what = f"{m} positions, {n} from {k} at {taps}, {kind}, blocks {block}, weight {weight}"
        what += f"{', exchanged' if exchanged else ''}{', strided' if divisor > 1 else ''}"
        for target in targets:
            tiles = conv_tiles(
                ConvShape(m, n, k, taps), weight_bytes=WIDTH[weight], x_bytes=2, masked=kind == "mask",
                precision="ieee", limits=LIMITS[target], block=block,
            )  # fmt: skip
            arguments = conv_arguments(_conv_gemm_kernel, tiles, kind, weight, exchanged, block, divisor)
            yield product_case(_conv_gemm_kernel, what, tiles, arguments, target, weight == "fp32")
    for (m, n, k, taps), kind, block, targets in GRADIENTS:
        for target in targets:
            shape, limits = ConvShape(m, n, k, taps), LIMITS[target]
            sums = conv_grad_tiles(shape, operand_bytes=2, precision="ieee", limits=limits, block=block)
            what = f"{n} x {taps} * {k} over {m}, {kind}, blocks {block}"
            arguments = conv_arguments(_conv_grad_kernel, sums, kind, "fp32", False, block, 1)
            yield product_case(_conv_grad_kernel, what, sums, arguments, target, False)
    last = ConvGradTiles(64, SUM_ROWS, SUM_COLUMNS, splits=14)
    for kind, block in (("soft", None), ("whole", (64, 64))):
        arguments = conv_arguments(_finish_splits_kernel, last, kind, "fp32", False, block, 1)
        name = f"_finish_splits_kernel (blocks {block})"
        yield Case(name, _finish_splits_kernel, arguments, 4, 64, targets=HOPPER)


def product_case(kernel: Any, what: str, tiles: Tiles, arguments: dict[str, Any], target: str, converts: bool) -> Case:
    """`converts`: the effective weight goes through registers, and needs one buffer less. A thread of AMD's has 512."""
    hopper, registers = target == "sm_90", 512 if target == "gfx942" and converts else 255
    return Case(
        f"{kernel.__name__} ({what})", kernel, arguments, tiles.num_warps, registers,
        num_stages=tiles.num_stages, matrix=True, left_in_registers=converts and hopper,
        buffers=tiles.num_stages - converts if hopper and not tiles.flat else 0, targets=(target,),
    )  # fmt: skip


def conv_arguments(
    kernel: Any, tiles: Tiles, kind: str, weight: str, exchanged: bool, block: Block, divisor: int
) -> dict[str, Any]:
    """Of either kernel, on contiguous bf16 images whose channels are a multiple of 16.

    Those with a threshold a row have more than 2^31 elements, and a kernel of more than 16 positions along an axis.
    """
    huge = kind == "soft per row"
    soft, masked, split = kind.startswith("soft"), kind == "mask", tiles.splits > 1
    strides = (1, "i32") if exchanged else ("i32", 1)
    # A flat tile is of few channels, whose rows begin anywhere.
    size = "i32?" if tiles.flat else "i32"
    values: dict[str, Any] = {
        **dict.fromkeys(kernel.arg_names, "i32"),
        **dict.fromkeys((*UNSPECIALIZED, "splits"), "i32?"),
        **dict.fromkeys(("x", "grad_y", "bias"), "*bf16"),
        **{"y": "*fp32" if split else "*bf16", "parts": "*fp32" if split else None},
        **{"weight": f"*{weight}", "grad_weight": f"*{weight}", "alpha": "*fp32"},
        **dict.fromkeys(("threshold", "row_sums"), "*fp32" if soft else None),
        **dict.fromkeys(("mask", "grad_mask"), "*i1" if masked else None),
        **dict.fromkeys(("row_start", "row_block", "row_order"), "*i32?" if block else None),
        **dict.fromkeys(("groups", "mul_h", "mul_w", "stride_bk"), 1),
        **dict.fromkeys(("K", "stride_xb", "stride_xh", "stride_xw", "stride_wt", "stride_mt"), size),
        **dict(zip(("stride_wn", "stride_wk", "stride_mn", "stride_mk"), strides * 2, strict=True)),
        **{"SOFT": soft, "THRESHOLD_ALONG_K": exchanged and huge, "DIVISOR_H": divisor, "DIVISOR_W": divisor},
        **{"BLOCK_N": block and block[0], "BLOCK_K": block and block[1], "FLAT": tiles.flat, "SPLITS": tiles.splits},
        **{"TILE_M": tiles.m, "TILE_N": tiles.n, "TILE_K": tiles.k, "GROUP": GROUP, "UPCAST": False},
        **{"SUBTILES": getattr(tiles, "subtiles", 1), "OFFSET": tl.int64 if huge else tl.int32, "SMALL": not huge},
        "INPUT_PRECISION": Constant("ieee"),
    }
    return {name: values[name] for name in kernel.arg_names}
