"""Compiles every kernel ahead of time and prints what the compiler made of it: one JSON object per line.

Needs no GPU. `test_compile.py` runs this in a subprocess under each Triton it holds us to; by hand:

    TRITON_CACHE_DIR=$(mktemp -d) python tests/kernels/compile_kernels.py [--table FILE]

`--table` also writes the rows as a table: benchmarks/results/compile/triton-<version>.md holds that of each Triton.

A kernel is added as rows of `cases`.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tritonsparse.kernels import (
    _block_grad_kernel,
    _block_grad_tiles,
    _block_index_kernels,
    _block_tiles,
    _conv_grad_kernel,
    _conv_product,
    _conv_tiles,
    _order_keys,
    _tiles,
    activation,
    block_gemm,
    block_packed,
    mask_bits,
    masked_gemm,
    masked_grad,
    n_of_m,
    packed_grad_weight,
    threshold,
    threshold_backward,
    threshold_backward_many,
    threshold_many,
    topk_masks,
    topk_select,
    view_table,
)

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# `cuobjdump` comes with the wheel of each version.
DTYPES = {"fp32": tl.float32, "bf16": tl.bfloat16, "fp16": tl.float16}
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
MATRIX_INSTRUCTION = {
    "sm_80": re.compile(r"\bmma\.sync"),
    "sm_90": re.compile(r"wgmma\.mma_async"),
    "sm_100": re.compile(r"tcgen05\.mma|\bmma\.sync"),
    "gfx942": re.compile(r"v_mfma"),
}
# Hopper's, with a list of registers after that of the sums rather than the address of a tile.
LEFT_IN_REGISTERS = re.compile(r"wgmma\.mma_async[^;{]*\{[^}]*\}\s*,\s*\{")
PIPELINED = re.compile(r"ttg\.local_alloc : \(\) -> !ttg\.memdesc<(\d+)x\d+x\d+x")
# Shared memory and multiprocessors of the GPU that each target stands for.
LIMITS = {
    "sm_80": _tiles.Limits(166_912, 108),
    "sm_90": _tiles.Limits(232_448, 132),
    "sm_100": _tiles.Limits(232_448, 148),
    "gfx942": _tiles.Limits(65_536, 304),
}
WIDE_LOAD = re.compile(r"ld\.global[\w.:]*\.(?:v4\.b32|v2\.b64|v8\.b32|v4\.b64)|(?:global|buffer)_load_dwordx4")


@dataclass(frozen=True)
class Constant:
    """A compile-time argument that is a string."""

    value: str


@dataclass(frozen=True)
class Case:
    """One specialisation of one kernel.

    Attributes:
        name: what tells it apart, for messages.
        kernel: the `@triton.jit` function.
        arguments: every parameter in order. A string is the type of a run-time argument that is a multiple of
            16, as every pointer from torch's allocator is; one ending in "?" need not be, and a descriptor's ends so.
            Anything else is
            the value of a compile-time argument: Triton makes one of None and of the integer 1.
        num_warps: as the launcher passes it.
        max_registers: per thread, the most that leaves the intended number of programs on one multiprocessor
            of 65,536 registers; 255 asks nothing.
        wide_load_bytes: what one program, if it has no loop, must load by instructions of 128 bits and wider;
            None asks nothing.
        num_stages: as the launcher passes it.
        matrix: whether products must run on the target's matrix instructions.
        left_in_registers: whether these must take their left operand from registers (sm_90, which has the choice).
        buffers: the fewest copies of each tile that a pipelined loop must hold in shared memory.
        descriptors: whether tiles must be fetched by the copy engine of Hopper and later.
        targets: those to compile for.
    """

    name: str
    kernel: Any
    arguments: dict[str, Any]
    num_warps: int
    max_registers: int
    wide_load_bytes: int | None = None
    num_stages: int = 3
    matrix: bool = False
    left_in_registers: bool = False
    buffers: int = 0
    descriptors: bool = False
    targets: tuple[str, ...] = tuple(TARGETS)


def cases() -> Iterator[Case]:
    yield from threshold_cases()
    yield from many_cases()
    yield from product_cases()
    yield from packed_activation_cases()
    yield from topk_cases()
    yield from block_grad_cases()
    yield from block_index_cases()
    yield from block_gemm_cases()
    yield from n_of_m_cases()
    yield from conv_cases()


def threshold_cases() -> Iterator[Case]:
    """Each kind on contiguous matrices, in the dtypes of mixed and pure training; then any strides."""
    for kind, weight, out, contiguous in (
        ("soft", "fp32", "bf16", True),
        ("soft", "fp32", "fp32", True),
        ("soft", "bf16", "bf16", True),
        ("soft per block", "fp32", "bf16", True),
        ("hard", "fp32", "bf16", True),
        ("step", "fp32", "bf16", True),
        ("mask", "fp32", "bf16", True),
        ("soft", "fp32", "bf16", False),
    ):
        soft, step, per_block = kind.startswith("soft"), kind == "step", kind.endswith("per block")
        masked = kind == "mask"
        size = "i32" if contiguous else "i32?"
        values: dict[str, Any] = {
            **{"w_hat": f"*{out}", "occupancy": "*i32", "weight": f"*{weight}"},
            **{"grad_weight": f"*{weight}", "sums": "*fp32" if soft or step else None, "grad": f"*{out}"},
            **{"threshold": None if masked else "*fp32", "mask": "*i1" if masked else None},
            **{"grad_mask": None if step else "*i1", "alpha": None if step else "*fp32"},
            **{"N": size, "K": size, "TILE": threshold.TILE},
            **{f"stride_{matrix}n": size for matrix in "wgmb"},
            **{f"stride_{matrix}k": 1 if contiguous else "i32?" for matrix in "wgmb"},
            **{"stride_tn": "i32?" if per_block or not contiguous else 1, "stride_tk": 1 if per_block else "i32"},
            **{"block_n": "i32" if per_block else 1, "block_k": "i32" if per_block else 1},
            **{"SOFT": soft, "STEP": step, "PER_BLOCK": per_block, "SUM_COLUMNS": threshold_backward.SUM_COLUMNS},
        }
        dtypes = f"weight {weight}, view {out}{'' if contiguous else ', any strides'}"
        width = {"fp32": 4, "bf16": 2}
        mask_width = 1
        read = mask_width if masked else width[weight]
        grad_mask_read = 0 if step else mask_width
        warps = threshold_backward.HARD_WARPS if kind == "hard" else threshold.NUM_WARPS
        cast = threshold._threshold_cast_kernel
        for kernel, num_warps, max_registers, bytes_per_element in (
            # Four and three programs of 128 threads on one multiprocessor; three of the cast with a threshold a block.
            (cast, threshold.NUM_WARPS, 168 if per_block else 128, width[weight] + (mask_width if masked else 0)),
            (threshold_backward._threshold_backward_kernel, warps, 168, width[out] + grad_mask_read + read),
        ):
            yield Case(
                f"{kernel.__name__} ({kind}, {dtypes})",
                kernel,
                {name: values[name] for name in kernel.arg_names},
                num_warps,
                max_registers if contiguous else 255,
                # With 8 warps a thread reads 8 bytes of a mask: wide or not, as the target's compiler has it.
                bytes_per_element * threshold.TILE**2 if contiguous and num_warps == threshold.NUM_WARPS else None,
            )


def many_cases() -> Iterator[Case]:
    """One launch over many layers, whose rows start on 16 bytes."""
    for kind, weight, out in (("soft", "fp32", "bf16"), ("soft", "bf16", "bf16"), ("mask", "fp32", "bf16")):
        soft = kind == "soft"
        values: dict[str, Any] = {
            **{"counts": "*i32", "table": "*i64", "layer_of": "*i32", "first": "*i64", "bracket": "*fp32"},
            **{"tiles": "i32", "sums": "*fp32", "grad_thresholds": "*fp32"},
            **{"threshold_of": "*i32", "first_threshold": "*i64", "WEIGHT": DTYPES[weight], "OUT": DTYPES[out]},
            **{"ALPHA": True, "GRAD_MASK": True, "SOFT": soft, "STEP": False, "MASKED": not soft, "PER_BLOCK": False},
            **{"ALIGNED": True, "WIDTH": view_table.WIDTH, "TILE": threshold.TILE},
            **{"SUM_COLUMNS": threshold_backward.SUM_COLUMNS, "SUM_TILE": threshold_backward_many.SUM_TILE},
        }
        width = {"fp32": 4, "bf16": 2}[weight]
        for kernel, max_registers, bytes_per_element in (
            (threshold_many._cast_many_kernel, 128, width + (not soft)),
            # Two programs of the backward under triton 3.6, three under 3.9.
            (threshold_backward_many._backward_many_kernel, 180, width + 1 + (width if soft else 1)),
            (threshold_backward_many._sum_thresholds_kernel, 128, None),
        ):
            if soft or kernel is not threshold_backward_many._sum_thresholds_kernel:
                yield Case(
                    f"{kernel.__name__} ({kind}, weight {weight}, view {out})",
                    kernel,
                    {name: values[name] for name in kernel.arg_names},
                    threshold.NUM_WARPS,
                    max_registers,
                    None if bytes_per_element is None else bytes_per_element * threshold.TILE**2,
                )


WIDTH = {"fp32": 4, "bf16": 2}
EVERYWHERE = tuple(TARGETS)
HOPPER = ("sm_90",)


def product_cases() -> Iterator[Case]:
    """The fused products in the configurations that their launchers compute for 4096 x 4096 weights."""
    for rows, kind, weight, x, bits, exchanged, contiguous, precision, targets in (
        (512, "soft", "fp32", "bf16", 0, False, True, "ieee", EVERYWHERE),
        (16, "mask", "bf16", "bf16", 1, False, True, "ieee", ("sm_90", "gfx942")),
        (512, "soft per row", "fp32", "bf16", 0, True, True, "ieee", HOPPER),
        (512, "soft", "fp32", "fp32", 0, False, True, "tf32", HOPPER),
        (512, "soft", "fp32", "fp32", 0, False, True, "ieee", HOPPER),
        (512, "soft", "fp32", "bf16", 0, False, False, "ieee", HOPPER),
    ):
        for target in targets:
            tiles = _tiles.gemm_tiles(
                rows, 4096, 4096, weight_bytes=WIDTH[weight], x_bytes=WIDTH[x], mask_bits=bits, precision=precision,
                aligned=contiguous, limits=LIMITS[target],
            )  # fmt: skip
            matrix = x == "bf16" or precision == "tf32"
            yield Case(
                f"_masked_gemm_kernel ({rows} rows, {kind}, mask of {bits} bits, weight {weight}, x {x} {precision}"
                f"{', weight transposed' if exchanged else ''}{'' if contiguous else ', any strides'})",
                masked_gemm._masked_gemm_kernel,
                gemm_arguments(tiles, kind, weight, x, bits, exchanged, contiguous, precision),
                tiles.num_warps,
                255,
                num_stages=tiles.num_stages,
                matrix=matrix,
                left_in_registers=matrix and target == "sm_90",
                # Loads as narrow as single elements of 2 bytes are beyond what is copied in the background.
                buffers=3 if target == "sm_90" and contiguous else 0,
                targets=(target,),
            )
    for n, kind, weight, x, bits, contiguous, precision, targets in (
        (4096, "soft", "fp32", "bf16", 8, True, "ieee", EVERYWHERE),
        (512, "mask", "bf16", "bf16", 1, True, "ieee", HOPPER),
        (1024, "soft", "fp32", "bf16", 8, False, "ieee", HOPPER),
    ):
        for target in targets:
            grad_tiles = _tiles.grad_tiles(
                n, 4096, operand_bytes=WIDTH[x], precision=precision, aligned=contiguous, limits=LIMITS[target]
            )
            yield Case(
                f"_masked_grad_kernel ({n} x 4096, {kind}, masks of {bits} bits, weight {weight}, x {x} {precision}"
                f"{'' if contiguous else ', any strides'})",
                masked_grad._masked_grad_kernel,
                grad_arguments(grad_tiles, kind, weight, x, bits, contiguous, precision),
                grad_tiles.num_warps,
                255,
                num_stages=grad_tiles.num_stages,
                matrix=x == "bf16" or precision == "tf32",
                buffers=3 if target == "sm_90" and contiguous else 0,
                targets=(target,),
            )
    sums: dict[str, Any] = {
        **{"y": "*bf16", "parts": "*fp32", "bias": "*bf16", "total": "i32", "N": "i32"},
        **{"ACTIVATION": Constant("gelu"), "SPLITS": 4, "SUM_TILE": masked_gemm.SUM_TILE},
    }
    yield Case("_sum_splits_kernel", masked_gemm._sum_splits_kernel, sums, 4, 64, targets=HOPPER)
    pack: dict[str, Any] = {
        **{"bits": "*i32", "mask": "*i1", "words": "i32", "total": "i32", "K": "i32", "stride_mn": "i32"},
        **{"stride_mk": 1, "WORDS": mask_bits.WORDS},
    }
    packed = mask_bits.WORDS * 32
    yield Case("_pack_bits_kernel", mask_bits._pack_bits_kernel, pack, 4, 64, packed, targets=HOPPER)


def gemm_arguments(
    tiles: _tiles.GemmTiles,
    kind: str,
    weight: str,
    x: str,
    bits: int,
    exchanged: bool,
    contiguous: bool,
    precision: str,
) -> dict[str, Any]:
    masked = kind == "mask"
    size, one = ("i32", 1) if contiguous else ("i32?", "i32?")
    strides = (one, size) if exchanged else (size, one)
    values: dict[str, Any] = {
        **{"y": "*fp32" if tiles.splits > 1 else f"*{x}", "x": f"*{x}", "weight": f"*{weight}", "bias": f"*{x}"},
        **{"threshold": None if masked else "*fp32", "mask": ("*i32" if bits == 1 else "*i1") if masked else None},
        **{"M": "i32?", "N": size, "K": size, "stride_xm": size, "stride_xk": one, "stride_t": one},
        **dict(zip(("stride_wn", "stride_wk", "stride_mn", "stride_mk"), strides * 2, strict=True)),
        **{"SOFT": kind.startswith("soft"), "THRESHOLD_ALONG_K": exchanged and not masked},
        **{"BITS": Constant("n" if exchanged else "k") if bits == 1 else None, "ACTIVATION": Constant("silu")},
        **{"INPUT_PRECISION": Constant(precision), "UPCAST": False, "SPLITS": tiles.splits, "GROUP": _tiles.GROUP},
        **{"TILE_M": tiles.m, "TILE_N": tiles.n, "TILE_K": tiles.k},
    }
    return {name: values[name] for name in masked_gemm._masked_gemm_kernel.arg_names}


def grad_arguments(
    tiles: _tiles.GradTiles, kind: str, weight: str, x: str, bits: int, contiguous: bool, precision: str
) -> dict[str, Any]:
    masked, soft = kind == "mask", kind == "soft"
    size, one = ("i32", 1) if contiguous else ("i32?", "i32?")
    mask = "*i32" if bits == 1 else "*i1"
    layout = Constant("k") if bits == 1 else None
    values: dict[str, Any] = {
        **{"grad_weight": f"*{weight}", "row_sums": "*fp32" if soft else None, "left": f"*{x}", "right": f"*{x}"},
        **{"weight": f"*{weight}", "threshold": None if masked else "*fp32", "mask": mask if masked else None},
        **{"grad_mask": mask, "alpha": "*fp32", "M": "i32?", "N": size, "K": size, "stride_t": one},
        **{f"stride_{name}": size for name in ("lm", "rm", "wn", "mn", "bn")},
        **{f"stride_{name}": one for name in ("ln", "rk", "wk", "mk", "bk")},
        **{"SOFT": soft, "MASK_BITS": layout if masked else None, "GRAD_MASK_BITS": layout},
        **{"INPUT_PRECISION": Constant(precision), "UPCAST": False, "SUBTILES": tiles.subtiles, "GROUP": _tiles.GROUP},
        **{"TILE_M": tiles.m, "TILE_N": tiles.n, "TILE_K": tiles.k},
    }
    return {name: values[name] for name in masked_grad._masked_grad_kernel.arg_names}


def packed_activation_cases() -> Iterator[Case]:
    """Packing, of bf16 and of fp32 behind any strides; the product in each of its precisions."""
    packed = {"bits": "*i32", "row_offsets": "*i64", "word_offsets": "*i32", "counts": "*i32", "capacity": "i32?"}
    packed |= {"M": "i32", "N": "i32", "K": "i32", "words": "i32"}
    bits, pack, unpack = (
        activation._activation_bits_kernel,
        activation._pack_activation_kernel,
        activation._unpack_activation_kernel,
    )
    for kernel, dtype, contiguous in ((bits, "bf16", True), (pack, "fp32", False), (unpack, "bf16", True)):
        values: dict[str, Any] = {
            **packed,
            **{"x": f"*{dtype}", "values": f"*{dtype}", "cutoff": "*fp32", "row_mask": "*i1", "TILE": activation.TILE},
            **{"stride_xm": "i32", "stride_xk": 1 if contiguous else "i32?", "stride_c": "i32", "stride_r": 1},
        }
        arguments = {name: values[name] for name in kernel.arg_names}
        name = f"{kernel.__name__} ({dtype}{'' if contiguous else ', any strides'})"
        # Eight programs of 128 threads on one multiprocessor.
        yield Case(name, kernel, arguments, activation.NUM_WARPS, 64)

    offsets, product = packed_grad_weight._word_offsets_kernel, packed_grad_weight._packed_grad_weight_kernel
    values = packed | {"TILE": packed_grad_weight.WORDS_TILE}
    yield Case(offsets.__name__, offsets, {name: values[name] for name in offsets.arg_names}, 1, 64)
    for dtype, precision in (("bf16", "half"), ("fp32", "tf32"), ("fp32", "ieee")):
        tile_m, tile_n, tile_k, num_warps = packed_grad_weight.TILES[precision]
        values = {
            **packed,
            **{"grad_weight": f"*{dtype}", "grad_y": f"*{dtype}", "values": f"*{dtype}"},
            **{"stride_ym": "i32", "stride_yn": 1, "stride_wn": "i32", "stride_wk": 1},
            **{"TILE_M": tile_m, "TILE_N": tile_n, "TILE_K": tile_k},
            "PRECISION": Constant("tf32" if precision == "tf32" else "ieee"),
        }
        arguments = {name: values[name] for name in product.arg_names}
        # Two programs of 256 threads on one multiprocessor; full float32 has no matrix instruction on NVIDIA.
        yield Case(
            f"{product.__name__} ({dtype}, {precision})",
            product,
            arguments,
            num_warps,
            128 if precision == "half" else 255,
            num_stages=packed_grad_weight.NUM_STAGES,
            matrix=precision != "ieee",
        )


def topk_cases() -> Iterator[Case]:
    """Magnitudes in the dtypes of weights; then any scores, at addresses that are multiples of nothing."""
    for dtype, magnitude, aligned in (("fp32", True, True), ("bf16", True, True), ("fp32", False, False)):
        values: dict[str, Any] = {
            **dict.fromkeys(("counts", "cursor", "state", "histogram", "predicted", "cutoff"), "*i64"),
            **dict.fromkeys(("addresses", "masks", "ties", "ties_before", "ties_kept"), "*i64"),
            **{"held": "*i32", "sizes": "*i32", "tiles": "i32?", "capacity": "i32?", "margin": "i32?"},
            **{"kept": "i64?", "shift": "i32?", "step": "i32?", "DTYPE": DTYPES[dtype]},
            **{"MAGNITUDE": magnitude, "ALIGNED": aligned, "TILE": _order_keys.TILE},
        }
        for kernel, max_registers in (
            # Three and six programs of 128 threads on one multiprocessor.
            (topk_select._bracket_kernel, 168),
            (topk_select._histogram_kernel, 80),
            (topk_masks._mask_kernel, 80),
            (topk_masks._take_back_kernel, 80),
        ):
            yield Case(
                f"{kernel.__name__} ({'magnitudes' if magnitude else 'unaligned scores'}, {dtype})",
                kernel,
                {name: values[name] for name in kernel.arg_names},
                _order_keys.NUM_WARPS,
                max_registers,
                {"fp32": 4, "bf16": 2}[dtype] * _order_keys.TILE if aligned else None,
            )
    narrow = {**dict.fromkeys(("state", "histogram", "counts", "predicted"), "*i64"), "kept": "i64?", "shift": "i32?"}
    yield Case("_narrow_kernel", topk_select._narrow_kernel, narrow, 1, 255)


def block_grad_cases() -> Iterator[Case]:
    """The gradient of kept blocks by 8192 rows: either axis of W gathered, dense and packed, split, any strides."""
    kernel, sums = _block_grad_kernel._block_grad_kernel, _block_grad_kernel._sum_parts_kernel
    square, odd = (64, 64), (48, 48)
    for (n, k), block, x, packed, weight, precision, targets in (
        ((4096, 14336), square, "bf16", False, None, "ieee", EVERYWHERE),
        ((14336, 4096), square, "bf16", False, None, "ieee", HOPPER),
        ((4096, 14336), (128, 128), "bf16", False, None, "ieee", ("sm_90", "sm_100")),
        ((14336, 4096), (128, 128), "bf16", False, "fp32", "ieee", EVERYWHERE),
        ((4096, 14336), (32, 32), "bf16", True, "bf16", "ieee", HOPPER),
        ((4096, 4096), (16, 16), "bf16", False, "fp32", "ieee", ("sm_90", "gfx942")),
        ((1024, 4096), (128, 64), "bf16", False, "fp32", "ieee", HOPPER),
        ((4100, 14340), odd, "bf16", False, None, "ieee", HOPPER),
        ((4096, 14336), square, "fp32", False, None, "tf32", HOPPER),
        ((4096, 14336), square, "fp32", False, None, "ieee", HOPPER),
    ):
        aligned = n % 16 == k % 16 == 0
        by_rows = _block_grad_tiles.takes_rows((n, k), block, False)
        (own, other), (side_n, side_k) = ((n, k), block) if by_rows else ((k, n), block[::-1])
        for target in targets:
            tiles = _block_grad_tiles.block_grad_tiles(
                8192, -(-own // side_n), side_n, -(-other // side_k) * side_k, operand_bytes=WIDTH[x],
                summed=weight is not None, precision=precision, aligned=aligned, limits=LIMITS[target],
            )  # fmt: skip
            matrix = x == "bf16" or precision == "tf32"
            split, size, one = tiles.splits > 1, *(("i32", 1) if aligned else ("i32?", "i32?"))
            stored, flags = ("i32", 1) if aligned else ("i32?", 1), ("i32?", 1)
            if not by_rows:
                stored, flags = stored[::-1], flags[::-1]
            values: dict[str, Any] = {
                **{"grad_weight": "*fp32", "parts": "*fp32" if split else None, "inner": weight and "*fp32"},
                **{"left": f"*{x}", "right": f"*{x}", "start": "*i32?", "blocks": "*i32?"},
                **{"positions": "*i32?" if packed and not by_rows else None, "kept": "*i1", "alpha": "*fp32"},
                **{"weight": weight and f"*{weight}", "M": "i32?", "N": size, "K": size, "BLOCKS": "i32?"},
                **{"total": size, "stride_lm": size, "stride_ln": one, "stride_rm": size, "stride_rk": one},
                **{"stride_gn": stored[0], "stride_gk": stored[1], "stride_fn": flags[0], "stride_fk": flags[1]},
                **{"stride_wn": stored[0], "stride_wk": stored[1], "PACKED": packed, "ALIGNED": aligned},
                **{"INPUT_PRECISION": Constant(precision), "UPCAST": False, "SPLITS": tiles.splits},
                **{"SUBTILES": tiles.subtiles, "SIDE_N": side_n, "SIDE_K": side_k},
                **{"UNIT": min(side_k & -side_k, tiles.k), "LIST_TILE": _block_grad_kernel.LIST_TILE},
                **{"TILE_M": tiles.m, "TILE_N": tiles.n, "TILE_K": tiles.k},
            }
            name = (
                f"_block_grad_kernel ({n} x {k} in blocks of {block[0]} x {block[1]}, x {x} {precision}"
                f"{f', weight {weight}' if weight else ''}{', packed' if packed else ''})"
            )
            yield Case(
                name,
                kernel,
                {argument: values[argument] for argument in kernel.arg_names},
                tiles.num_warps,
                255,
                num_stages=tiles.num_stages,
                matrix=matrix,
                # As many as the launcher asks for; one is in registers where the product has no matrix instruction.
                buffers=tiles.num_stages - (not matrix) if target == "sm_90" and aligned else 0,
                targets=(target,),
            )
            if split:
                values["TILE_N"] = _block_grad_kernel.SUM_ROWS
                arguments = {argument: values[argument] for argument in sums.arg_names}
                yield Case("_sum_parts_kernel", sums, arguments, 4, 128, targets=(target,))


def n_of_m_cases() -> Iterator[Case]:
    """The common pattern in the dtypes of scores; the longest group, and one that is no power of two."""
    kernel = n_of_m._n_of_m_kernel
    for kept, length, dtype, contiguous in (
        (2, 4, "fp32", True),
        (2, 4, "bf16", True),
        (8, 64, "fp32", True),
        (2, 3, "fp32", False),
    ):
        width = 1 << (length - 1).bit_length()
        values: dict[str, Any] = {
            **{"mask": "*i1", "nan_found": "*i32", "scores": f"*{dtype}", "G": "i32", "groups_per_row": "i32"},
            **{"stride_sn": "i32" if contiguous else "i32?", "stride_sk": 1 if contiguous else "i32?"},
            **{"KEPT": kept, "LENGTH": length, "MAGNITUDE": True, "GROUPS": n_of_m.TILE // width, "WIDTH": width},
        }
        yield Case(
            f"{kernel.__name__} ({kept}:{length}, {dtype}{'' if contiguous else ', any strides'})",
            kernel,
            {name: values[name] for name in kernel.arg_names},
            n_of_m.NUM_WARPS,
            # Four programs of 128 threads on one multiprocessor; three where every score has an address of its own.
            128 if contiguous else 168,
            # Groups of four bfloat16 are 8 bytes: a thread's load is no wider.
            WIDTH[dtype] * n_of_m.TILE if contiguous and dtype == "fp32" else None,
        )


def block_index_cases() -> Iterator[Case]:
    """The index of all layers' kept blocks, from their flags."""
    values: dict[str, Any] = {
        **{"sums": "*i32", "before": "*i32", "table": "*i64", "layer_of": "*i32", "first": "*i64"},
        **{"WIDTH": _block_index_kernels.WIDTH, "TILE": _block_index_kernels.TILE},
        **{"SCAN_TILE": _block_index_kernels.SCAN_TILE},
    }
    for kernel in (
        _block_index_kernels.count_kernel,
        _block_index_kernels.scan_kernel,
        _block_index_kernels.write_kernel,
    ):
        arguments = {name: values[name] for name in kernel.arg_names}
        # Three programs of 128 threads on one multiprocessor.
        yield Case(f"_block_index_kernels.{kernel.__name__}", kernel, arguments, _block_index_kernels.NUM_WARPS, 168)


def block_gemm_cases() -> Iterator[Case]:
    """The block-sparse products in the configurations that their launcher computes for 4096 x 4096 weights."""
    for rows, block, weight, x, layout, contiguous, precision, targets in (
        (8192, (128, 128), "bf16", "bf16", "rows", True, "ieee", EVERYWHERE),
        (8192, (64, 64), "bf16", "bf16", "columns", True, "ieee", HOPPER),
        (8192, (64, 64), "bf16", "bf16", "packed columns", True, "ieee", ("sm_80", "sm_90")),
        (8192, (32, 32), "bf16", "bf16", "packed rows", True, "ieee", HOPPER),
        (8192, (48, 96), "bf16", "bf16", "rows", True, "ieee", HOPPER),
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
            tiles = _block_tiles.block_tiles(
                rows, 4096, 4096, block=sides, weight_bytes=WIDTH[weight], x_bytes=WIDTH[x], precision=precision,
                aligned=contiguous, limits=LIMITS[target],
            )  # fmt: skip
            if packed and rows <= block_packed.FEW:
                tiles = block_packed.few_rows_tiles((4096, 4096), block, LIMITS[target])
            kernel = block_gemm._block_gemm_kernel
            size, one = ("i32", 1) if contiguous else ("i32?", "i32?")
            read = {"x": (x, (tiles.m, tiles.k)), "weight": (weight, (tiles.n, tiles.k))}
            if along_columns:
                read["weight"] = (weight, (tiles.k, tiles.n))
            strides = (one, size) if along_columns else (size, one)
            values: dict[str, Any] = {
                **{"y": "*fp32" if tiles.splits > 1 else f"*{x}", "bias": f"*{x}", "index": "*i32", "M": "i32?"},
                **{
                    name: f"tensordesc<{dtype}[{shape[0]}, {shape[1]}]>?" if tiles.descriptors else f"*{dtype}"
                    for name, (dtype, shape) in read.items()
                },
                **{"N": size, "K": size, "ROWS": "i32?", "COLUMNS": "i32?", "stride_xm": size, "stride_xk": one},
                **dict(zip(("stride_wn", "stride_wk"), strides, strict=True)),
                **{"ALONG_COLUMNS": along_columns, "PACKED": packed, "DESCRIPTORS": tiles.descriptors},
                **{"N_FIRST": not along_columns, "EVEN_N": contiguous, "EVEN_K": contiguous},
                **{"ACTIVATION": Constant("gelu"), "INPUT_PRECISION": Constant(precision), "UPCAST": False},
                **{"SIDE_N": sides[0], "SIDE_K": sides[1], "SPLITS": tiles.splits, "SUBTILES": tiles.subtiles},
                **{"TILE_M": tiles.m, "TILE_N": tiles.n, "TILE_K": tiles.k, "GROUP": tiles.group},
            }
            wide = target == "sm_90" and contiguous and tiles.m >= 64
            yield Case(
                f"{kernel.__name__} ({rows} rows, {layout} of blocks of {block[0]} x {block[1]}, weight {weight}, "
                f"x {x} {precision}{'' if contiguous else ', any strides'})",
                kernel,
                {name: values[name] for name in kernel.arg_names},
                tiles.num_warps,
                255,
                num_stages=tiles.num_stages,
                # Hopper's takes 64 rows and more; fewer go to that of its forerunners.
                matrix=(x == "bf16" or precision == "tf32") and (target != "sm_90" or tiles.m >= 64),
                # As many as stages: the index is carried. A weight that is converted takes one for the result.
                buffers=tiles.num_stages - (weight != x) if wide and x == "bf16" else 0,
                descriptors=tiles.descriptors and target == "sm_90",
                targets=(target,),
            )


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
            tiles = _conv_tiles.conv_tiles(
                m, n, k, taps, groups=1, weight_bytes=WIDTH[weight], x_bytes=2, mask_bytes=int(kind == "mask"),
                precision="ieee", limits=LIMITS[target], block=block,
            )  # fmt: skip
            kernel = _conv_product._conv_gemm_kernel
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
                buffers=3 if target == "sm_90" and k % 16 == 0 else 0,
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
            sums = _conv_tiles.conv_grad_tiles(
                m, n, k, taps, groups=1, operand_bytes=2, precision="ieee", limits=LIMITS[target], block=block
            )
            kernel = _conv_grad_kernel._conv_grad_kernel
            yield Case(
                f"{kernel.__name__} ({n} x {taps} * {k} over {m}, {kind}, blocks {block})",
                kernel,
                conv_arguments(kernel, sums, kind, weight, False, block, 1),
                sums.num_warps,
                255,
                num_stages=sums.num_stages,
                matrix=True,
                buffers=3 if target == "sm_90" and k % 16 == 0 else 0,
                targets=(target,),
            )
    finish = _conv_grad_kernel._finish_splits_kernel
    rows, columns = _conv_grad_kernel.SUM_ROWS, _conv_grad_kernel.SUM_COLUMNS
    last = _conv_tiles.ConvGradTiles(64, rows, columns, splits=14)
    for block in (None, (64, 64)):
        arguments = conv_arguments(finish, last, "soft", "fp32", False, block, 1)
        yield Case(f"{finish.__name__} (blocks {block})", finish, arguments, 4, 64, targets=HOPPER)


def conv_arguments(
    kernel: Any,
    tiles: _conv_tiles.ConvTiles | _conv_tiles.ConvGradTiles,
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
        **{"TILE_M": tiles.m, "TILE_N": tiles.n, "TILE_K": tiles.k, "GROUP": _tiles.GROUP},
        **{"SUBTILES": getattr(tiles, "subtiles", 1), "OFFSET": tl.int64 if huge else tl.int32, "SMALL": not huge},
    }
    return {name: values[name] for name in kernel.arg_names}


def compile_case(case: Case, name: str) -> dict[str, Any]:
    """Compiles one case for one target and reads off the result what the tests ask about."""
    target = TARGETS[name]
    types = {name: value for name, value in case.arguments.items() if isinstance(value, str)}
    source = ASTSource(
        case.kernel,
        signature={name: types.get(name, "constexpr").rstrip("?") for name in case.arguments},
        constexprs={
            name: value.value if isinstance(value, Constant) else value
            for name, value in case.arguments.items()
            if name not in types
        },
        attrs={
            (position,): [["tt.divisibility", 16]]
            for position, name in enumerate(case.arguments)
            if name in types and not types[name].endswith("?")
        },
    )
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages}
    compiled = triton.compile(source, target=target, options=options)
    if target.backend == "cuda":
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled.asm["cubin"])
            file.flush()
            command = [str(CUOBJDUMP), "--dump-resource-usage", file.name]
            usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        code = compiled.asm["ptx"]
        registers, spill_bytes = number(r"REG:(\d+)", usage), number(r"STACK:(\d+)", usage)
    else:
        code = compiled.asm["amdgcn"]
        registers = number(r"\.vgpr_count:\s*(\d+)", code)
        spill_bytes = number(r"\.private_segment_fixed_size:\s*(\d+)", code)
    wide = sum(256 if re.search(r"v8|v4\.b64", load) else 128 for load in WIDE_LOAD.findall(code)) // 8
    return {
        "registers": registers,
        "spill_bytes": spill_bytes,
        "shared_bytes": compiled.metadata.shared,
        "wide_load_bytes": wide * case.num_warps * target.warp_size,
        "matrix_instructions": len(MATRIX_INSTRUCTION[name].findall(code)),
        "from_registers": len(LEFT_IN_REGISTERS.findall(code)),
        "descriptor_loads": len(re.findall(r"cp\.async\.bulk\.tensor[\w.:]*shared::", code)),
        "buffers": min(map(int, PIPELINED.findall(compiled.asm["ttgir"])), default=0),
    }


def number(pattern: str, text: str) -> int:
    match = re.search(pattern, text)
    assert match is not None, f"no {pattern} in what the compiler reports"
    return int(match[1])


def as_table(rows: list[dict[str, Any]]) -> str:
    """Markdown, a row a case and target."""
    columns = ("registers", "spill_bytes", "shared_bytes", "wide_load_bytes", "matrix_instructions", "buffers")
    lines = [
        f"What triton {triton.__version__} makes of each kernel (by `tests/kernels/compile_kernels.py --table`).",
        "Registers are a thread's, bytes of wide loads (128 bits and more) a program's outside loops.",
        "",
        "| kernel | target | " + " | ".join(column.replace("_", " ") for column in columns) + " |",
        "|---|---|" + "---|" * len(columns),
    ]
    lines += [f"| {row['case']} | {row['target']} | " + " | ".join(str(row[c]) for c in columns) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", type=Path, help="file to write the rows to as a table")
    args = parser.parse_args()
    rows = []
    print(json.dumps({"triton": triton.__version__}))
    for case in cases():
        asked = {"max_registers": case.max_registers, "asked_wide_load_bytes": case.wide_load_bytes}
        asked |= {"asked_matrix": case.matrix, "asked_from_registers": case.left_in_registers}
        asked |= {"asked_descriptors": case.descriptors}
        for name in case.targets:
            row = {"case": case.name, "target": name, **compile_case(case, name), "asked_buffers": case.buffers}
            print(json.dumps(row | asked))
            rows.append(row)
    if args.table:
        args.table.parent.mkdir(parents=True, exist_ok=True)
        args.table.write_text(as_table(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
