"""Implicit-GEMM convolutions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import triton.language as tl

from tritonsparse.kernels._tiles import GROUP
from tritonsparse.kernels.conv._gemm_kernel import _conv_gemm_kernel
from tritonsparse.kernels.conv._grad_kernel import _conv_grad_kernel, _finish_splits_kernel
from tritonsparse.kernels.conv._tiles import ConvGradTiles, ConvShape, ConvTiles, conv_grad_tiles, conv_tiles
from tritonsparse.kernels.conv.grad import SUM_COLUMNS, SUM_ROWS

from .case import EVERYWHERE, HOPPER, LIMITS, WIDTH, Case, Constant


def conv_cases() -> Iterator[Case]:
    """Convolutions of ResNet-50 in the configurations that their launchers compute; `whole` is an index alone."""
    amd = ("sm_90", "gfx942")
    for m, n, k, taps, kind, weight, exchanged, block, divisor, targets in (
        (100_352, 64, 64, 9, "soft", "fp32", False, None, 1, HOPPER),
        (25_088, 128, 128, 9, "soft", "fp32", False, None, 1, EVERYWHERE),
        (25_088, 128, 128, 9, "soft per row", "fp32", True, None, 1, HOPPER),
        (1_568, 512, 512, 9, "mask", "fp32", False, None, 1, HOPPER),
        (25_088, 128, 128, 9, "whole", "fp32", False, (64, 64), 1, amd),
        (25_088, 128, 128, 9, "whole", "bf16", True, (128, 128), 2, HOPPER),
        (401_408, 64, 3, 49, "soft", "fp32", False, None, 1, HOPPER),
    ):
        for target in targets:
            tiles = conv_tiles(
                ConvShape(m, n, k, taps), weight_bytes=WIDTH[weight], x_bytes=2, masked=kind == "mask",
                precision="ieee", limits=LIMITS[target], block=block,
            )  # fmt: skip
            kernel = _conv_gemm_kernel
            yield Case(
                f"{kernel.__name__} ({m} positions, {n} from {k} at {taps}, {kind}, blocks {block}, weight {weight}"
                f"{', exchanged' if exchanged else ''}{', strided' if divisor > 1 else ''})",
                kernel,
                conv_arguments(kernel, tiles, kind, weight, exchanged, block, divisor),
                tiles.num_warps,
                # A thread of AMD's has 512.
                512 if target == "gfx942" else 255,
                num_stages=tiles.num_stages,
                matrix=True,
                left_in_registers=weight == "fp32" and target == "sm_90",
                # As many as stages, but for the one that is in registers.
                buffers=tiles.num_stages - (weight == "fp32") if target == "sm_90" and k % 16 == 0 else 0,
                targets=(target,),
            )
    for m, n, k, taps, kind, weight, block, targets in (
        (100_352, 64, 64, 9, "soft", "fp32", None, HOPPER),
        (25_088, 128, 128, 9, "soft", "fp32", None, EVERYWHERE),
        (1_568, 1_024, 1_024, 9, "mask", "fp32", None, HOPPER),
        (25_088, 128, 128, 9, "whole", "fp32", (64, 64), HOPPER),
        (401_408, 64, 3, 49, "soft", "fp32", None, HOPPER),
    ):
        for target in targets:
            sums = conv_grad_tiles(
                ConvShape(m, n, k, taps), operand_bytes=2, precision="ieee", limits=LIMITS[target], block=block
            )
            kernel = _conv_grad_kernel
            yield Case(
                f"{kernel.__name__} ({n} x {taps} * {k} over {m}, {kind}, blocks {block})",
                kernel,
                conv_arguments(kernel, sums, kind, weight, False, block, 1),
                sums.num_warps,
                255,
                num_stages=sums.num_stages,
                matrix=True,
                buffers=sums.num_stages if target == "sm_90" and k % 16 == 0 else 0,
                targets=(target,),
            )
    finish = _finish_splits_kernel
    last = ConvGradTiles(64, SUM_ROWS, SUM_COLUMNS, splits=14)
    for block in (None, (64, 64)):
        arguments = conv_arguments(finish, last, "soft", "fp32", False, block, 1)
        yield Case(f"{finish.__name__} (blocks {block})", finish, arguments, 4, 64, targets=HOPPER)


def conv_arguments(
    kernel: Any,
    tiles: ConvTiles | ConvGradTiles,
    kind: str,
    weight: str,
    exchanged: bool,
    block: tuple[int, int] | None,
    divisor: int,
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
        **dict.fromkeys(("x", "grad_y", "bias"), "*bf16"),
        **{"y": "*fp32" if split else "*bf16", "parts": "*fp32" if split else None},
        **{"weight": f"*{weight}", "grad_weight": f"*{weight}", "alpha": "*fp32"},
        **{"threshold": "*fp32" if soft else None, "row_sums": "*fp32" if soft else None},
        **{"mask": "*i1" if masked else None, "grad_mask": "*i1" if masked else None},
        **dict.fromkeys(("row_start", "row_block", "row_order"), "*i32?" if block else None),
        **dict.fromkeys(("y_height", "y_width", "x_height", "x_width", "taps", "taps_w", "M"), "i32?"),
        **dict.fromkeys(("offset_h", "step_h", "offset_w", "step_w", "tap_step_h"), "i32?"),
        **dict.fromkeys(("groups", "mul_h", "mul_w"), 1),
        **dict.fromkeys(("tap", "tap_step_w", "splits"), "i32?"),
        **{"N": "i32", "K": size, "part_size": "i32"},
        **{f"stride_{name}": size for name in ("xb", "xh", "xw", "wt", "mt")},
        **{f"stride_{name}": "i32" for name in ("yb", "yh", "yw", "wg", "mg", "bn", "t")},
        **{"stride_bk": 1, "SOFT": soft, "THRESHOLD_ALONG_K": exchanged and huge},
        **dict(zip(("stride_wn", "stride_wk", "stride_mn", "stride_mk"), strides * 2, strict=True)),
        **{"DIVISOR_H": divisor, "DIVISOR_W": divisor, "INPUT_PRECISION": Constant("ieee"), "UPCAST": False},
        **{"BLOCK_N": block and block[0], "BLOCK_K": block and block[1], "FLAT": tiles.flat, "SPLITS": tiles.splits},
        **{"TILE_M": tiles.m, "TILE_N": tiles.n, "TILE_K": tiles.k, "GROUP": GROUP},
        **{"SUBTILES": getattr(tiles, "subtiles", 1), "OFFSET": tl.int64 if huge else tl.int32, "SMALL": not huge},
    }
    return {name: values[name] for name in kernel.arg_names}
