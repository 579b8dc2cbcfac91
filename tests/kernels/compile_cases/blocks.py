"""Products over kept blocks, and the index of these."""

from collections.abc import Iterator
from typing import Any

from tritonsparse.kernels.block import _gemm_kernel, _grad_kernel, _index_kernels
from tritonsparse.kernels.block._gemm_tiles import block_tiles
from tritonsparse.kernels.block._grad_tiles import block_grad_tiles, takes_rows
from tritonsparse.kernels.block.packed import FEW, few_rows_tiles
from tritonsparse.kernels.fused.gemm import SUM_TILE

from .case import EVERYWHERE, HOPPER, LIMITS, WIDTH, Case, Constant, case_of


def block_index_cases() -> Iterator[Case]:
    """The index of all layers' kept blocks, from their flags."""
    values: dict[str, Any] = {
        **{"sums": "*i32", "before": "*i32", "table": "*i64", "layer_of": "*i32", "first": "*i64"},
        **{name: getattr(_index_kernels, name) for name in ("WIDTH", "TILE", "SCAN_TILE")},
    }
    for kernel in (_index_kernels.count_kernel, _index_kernels.scan_kernel, _index_kernels.write_kernel):
        arguments = {name: values[name] for name in kernel.arg_names}
        # Three programs of 128 threads on one multiprocessor.
        yield Case(f"_block_index_kernels.{kernel.__name__}", kernel, arguments, _index_kernels.NUM_WARPS, 168)


def block_gemm_cases() -> Iterator[Case]:
    """The block-sparse products in the configurations that their launcher computes for 4096 x 4096 weights."""
    for rows, block, weight, x, layout, contiguous, precision, targets in (
        (8192, (128, 128), "bf16", "bf16", "rows", True, "ieee", EVERYWHERE),
        (8192, (64, 64), "bf16", "bf16", "columns", True, "ieee", HOPPER),
        (8192, (64, 64), "bf16", "bf16", "packed columns", True, "ieee", ("sm_80", "sm_90")),
        (8192, (32, 32), "bf16", "bf16", "packed rows", True, "ieee", HOPPER),
        (8192, (48, 96), "bf16", "bf16", "rows", True, "ieee", HOPPER),
        (128, (128, 128), "bf16", "bf16", "rows", True, "ieee", ("sm_90", "sm_100")),
        (16, (64, 64), "bf16", "bf16", "rows", True, "ieee", HOPPER),
        (1, (32, 32), "bf16", "bf16", "packed rows", True, "ieee", EVERYWHERE),
        (1, (64, 64), "fp32", "bf16", "packed rows", True, "ieee", HOPPER),
        (1, (16, 128), "fp32", "fp32", "packed rows", True, "ieee", HOPPER),
        (8192, (128, 128), "fp32", "bf16", "columns", True, "ieee", ("sm_90", "gfx942")),
        (8192, (128, 128), "bf16", "bf16", "rows", False, "ieee", HOPPER),
        (8192, (64, 64), "fp32", "fp32", "rows", True, "tf32", HOPPER),
        (8192, (64, 64), "fp32", "fp32", "columns", True, "ieee", HOPPER),
    ):
        for target in targets:
            along_columns, packed = layout.endswith("columns"), layout.startswith("packed")
            sides = block[::-1] if along_columns else block
            tiles = block_tiles(
                (rows, 4096, 4096), block=sides, weight_bytes=WIDTH[weight], x_bytes=WIDTH[x], precision=precision,
                aligned=contiguous, limits=LIMITS[target],
            )  # fmt: skip
            if packed and rows <= FEW:
                tiles = few_rows_tiles((4096, 4096), block, LIMITS[target])
            kernel = _gemm_kernel._block_gemm_kernel
            size, one = ("i32", 1) if contiguous else ("i32?", "i32?")
            read = {"x": (x, (tiles.m, tiles.k)), "weight": (weight, (tiles.n, tiles.k))}
            if along_columns:
                read["weight"] = (weight, (tiles.k, tiles.n))
            strides = (one, size) if along_columns else (size, one)
            values: dict[str, Any] = {
                **{"y": f"*{x}", "y_parts": "*fp32" if tiles.splits > 1 else None, "bias": f"*{x}", "index": "*i32"},
                "M": "i32?",
                **{
                    name: f"tensordesc<{dtype}[{shape[0]}, {shape[1]}]>?" if tiles.descriptors else f"*{dtype}"
                    for name, (dtype, shape) in read.items()
                },
                **{"N": size, "K": size, "ROWS": "i32?", "COLUMNS": "i32?", "stride_xm": size, "stride_xk": one},
                **dict(zip(("stride_wn", "stride_wk"), strides, strict=True)),
                **{"ALONG_COLUMNS": along_columns, "PACKED": packed, "DESCRIPTORS": tiles.descriptors},
                **{"N_FIRST": not along_columns, "EVEN_N": contiguous, "EVEN_K": contiguous},
                **{"INPUT_PRECISION": Constant(precision), "UPCAST": False},
                **{"SIDE_N": sides[0], "SIDE_K": sides[1], "SPLITS": tiles.splits, "SUBTILES": tiles.subtiles},
                **{"TILE_M": tiles.m, "TILE_N": tiles.n, "TILE_K": tiles.k, "GROUP": tiles.group},
            }
            wide = target == "sm_90" and contiguous and tiles.m >= 64
            what = f"{rows} rows, {layout} of blocks of {block[0]} x {block[1]}, weight {weight}, x {x} {precision}"
            # Hopper's matrix instruction takes 64 rows and more; fewer go to that of its forerunners. As many buffers
            # as stages: the index is carried. A weight that is converted takes one for the result.
            yield case_of(
                kernel, what + ("" if contiguous else ", any strides"), values, tiles.num_warps, 255,
                num_stages=tiles.num_stages, descriptors=tiles.descriptors and target == "sm_90",
                matrix=(x == "bf16" or precision == "tf32") and (target != "sm_90" or tiles.m >= 64),
                buffers=tiles.num_stages - (weight != x) if wide and x == "bf16" else 0, targets=(target,),
            )  # fmt: skip
    sums: dict[str, Any] = {
        **{"y": "*bf16", "y_parts": "*fp32", "bias": "*bf16", "p_start": "*i32?", "total": "i32", "N": "i32"},
        **{"lines": "i32?", "tiles": "i32?", "programs": "i32?", "SIDE_N": 64},
        **{"TILES_K": 2, "SPLITS": 4, "SUM_TILE": SUM_TILE},
    }
    kernel = _gemm_kernel._sum_line_parts_kernel
    yield case_of(kernel, "", sums, 4, 64, targets=HOPPER)


def block_grad_cases() -> Iterator[Case]:
    """The gradient of kept blocks by 8192 rows: either axis of W gathered, dense and packed, split, any strides."""
    kernel, sums = _grad_kernel._block_grad_kernel, _grad_kernel._sum_parts_kernel
    square, odd = (64, 64), (48, 48)
    for (n, k), block, x, packed, precision, targets in (
        ((4096, 14336), square, "bf16", False, "ieee", EVERYWHERE),
        ((14336, 4096), square, "bf16", False, "ieee", HOPPER),
        ((4096, 14336), (128, 128), "bf16", False, "ieee", ("sm_90", "sm_100")),
        ((4096, 4096), (128, 128), "bf16", False, "ieee", HOPPER),
        ((4096, 4096), square, "bf16", False, "ieee", HOPPER),
        ((4096, 4096), (32, 32), "bf16", False, "ieee", HOPPER),
        ((2048, 5632), (32, 32), "bf16", True, "ieee", HOPPER),
        ((4096, 14336), (16, 16), "bf16", False, "ieee", HOPPER),
        ((1024, 4096), (128, 64), "bf16", False, "ieee", HOPPER),
        ((4100, 14340), odd, "bf16", False, "ieee", HOPPER),
        ((4096, 14336), square, "fp32", False, "tf32", HOPPER),
        ((4096, 14336), square, "fp32", False, "ieee", HOPPER),
    ):
        aligned = n % 16 == k % 16 == 0
        by_rows = takes_rows((n, k), block, False)
        (own, other), (side_n, side_k) = ((n, k), block) if by_rows else ((k, n), block[::-1])
        for target in targets:
            tiles = block_grad_tiles(
                8192, (-(-own // side_n), side_n), -(-other // side_k) * side_k, operand_bytes=WIDTH[x],
                precision=precision, aligned=aligned, limits=LIMITS[target],
            )  # fmt: skip
            matrix = x == "bf16" or precision == "tf32"
            split, size, one = tiles.splits > 1, *(("i32", 1) if aligned else ("i32?", "i32?"))
            stored, flags = ("i32", 1) if aligned else ("i32?", 1), ("i32?", 1)
            if not by_rows:
                stored, flags = stored[::-1], flags[::-1]
            values: dict[str, Any] = {
                **{"grad_weight": "*fp32", "parts": "*fp32" if split else None},
                **{"left": f"*{x}", "right": f"*{x}", "start": "*i32?", "blocks": "*i32?"},
                **{"positions": "*i32?" if packed and not by_rows else None, "kept": "*i1", "alpha": "*fp32"},
                **{"M": "i32?", "N": size, "K": size, "BLOCKS": "i32?"},
                **{"total": size, "stride_lm": size, "stride_ln": one, "stride_rm": size, "stride_rk": one},
                **{"stride_gn": stored[0], "stride_gk": stored[1], "stride_fn": flags[0], "stride_fk": flags[1]},
                **{"PACKED": packed, "ALIGNED": aligned},
                **{"INPUT_PRECISION": Constant(precision), "UPCAST": False, "SPLITS": tiles.splits},
                **{"SUBTILES": tiles.subtiles, "SIDE_N": side_n, "SIDE_K": side_k},
                **{"LIST_TILE": _grad_kernel.LIST_TILE, "TILE_M": tiles.m, "TILE_N": tiles.n, "TILE_K": tiles.k},
            }
            what = f"{n} x {k} in blocks of {block[0]} x {block[1]}, x {x} {precision}{', packed' if packed else ''}"
            # Two programs share 65,536 registers. As many buffers as the launcher asks for; one is in registers where
            # the product has no matrix instruction.
            shared = min(255, 65_536 // (2 * 32 * tiles.num_warps))
            yield case_of(
                kernel, what, values, tiles.num_warps, shared if target == "sm_90" and x == "bf16" and aligned else 255,
                num_stages=tiles.num_stages, matrix=matrix,
                buffers=tiles.num_stages - (not matrix) if target == "sm_90" and aligned else 0, targets=(target,),
            )  # fmt: skip
            if split:
                values["TILE_N"] = _grad_kernel.SUM_ROWS
                yield case_of(sums, "", values, 4, 128, targets=(target,))
