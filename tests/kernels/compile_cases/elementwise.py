"""Kernels that read each element once: weights and their gradients, selections; and packed activations."""

from collections.abc import Iterator
from typing import Any

from tritonsparse.kernels.activation import compress, grad_weight
from tritonsparse.kernels.select import _keys, _select, masks, n_of_m
from tritonsparse.kernels.weight import backward, backward_many, forward, forward_many, table

from .case import DTYPES, WIDTH, Case, Constant, case_of

STRIDED = ", any strides"


def threshold_cases() -> Iterator[Case]:
    """Each kind on contiguous matrices, in the dtypes of mixed and pure training; then any strides."""
    kinds = [(kind, "fp32", "bf16", True) for kind in ("soft", "soft per block", "hard", "step", "mask")]
    others = [("soft", "fp32", "fp32", True), ("soft", "bf16", "bf16", True), ("soft", "fp32", "bf16", False)]
    for kind, weight, out, contiguous in (*kinds, *others):
        soft, step, per_block = kind.startswith("soft"), kind == "step", kind.endswith("per block")
        masked = kind == "mask"
        size, one = ("i32", 1) if contiguous else ("i32?", "i32?")
        values: dict[str, Any] = {
            **{"w_hat": f"*{out}", "weight": f"*{weight}", "grad_weight": f"*{weight}", "grad": f"*{out}"},
            **{"sums": "*fp32" if soft or step else None, "threshold": None if masked else "*fp32"},
            **{"mask": "*i1" if masked else None, "grad_mask": None if step else "*i1"},
            **{"alpha": None if step else "*fp32", "N": size, "K": size, "TILE": forward.TILE},
            **{f"stride_{matrix}n": size for matrix in "wgmb"},
            **{f"stride_{matrix}k": one for matrix in "wgmb"},
            **{"stride_tn": "i32?" if per_block or not contiguous else 1, "stride_tk": 1 if per_block else "i32"},
            **{"block_n": "i32" if per_block else 1, "block_k": "i32" if per_block else 1},
            **{"SOFT": soft, "STEP": step, "PER_BLOCK": per_block, "SUM_COLUMNS": backward.SUM_COLUMNS},
        }
        read = 1 if masked else WIDTH[weight]
        what = f"{kind}, weight {weight}, product {out}{'' if contiguous else STRIDED}"
        backward_registers, bytes_back = 96 if per_block else 80, WIDTH[out] + (not step) + read
        for kernel, num_warps, registers, bytes_read in (
            # Four programs of 128 threads on one multiprocessor, three of the cast with a threshold a block; three of
            # 256 threads.
            (forward._threshold_cast_kernel, forward.NUM_WARPS, 168 if per_block else 128, WIDTH[weight] + masked),
            (backward._threshold_backward_kernel, backward.NUM_WARPS, backward_registers, bytes_back),
        ):
            # With 8 warps a thread reads 8 bytes of a mask: wide or not, as the target's compiler has it.
            wide = bytes_read * forward.TILE**2 if contiguous and num_warps == forward.NUM_WARPS else None
            yield case_of(kernel, what, values, num_warps, registers if contiguous else 255, wide)


def many_cases() -> Iterator[Case]:
    """One launch over many layers, whose rows start on 16 bytes."""
    for kind, weight, out in (("soft", "fp32", "bf16"), ("soft", "bf16", "bf16"), ("mask", "fp32", "bf16")):
        soft = kind == "soft"
        values: dict[str, Any] = {
            **{"table": "*i64", "layer_of": "*i32", "first": "*i64", "sums": "*fp32", "grad_thresholds": "*fp32"},
            **{"threshold_of": "*i32", "first_threshold": "*i64", "WEIGHT": DTYPES[weight], "OUT": DTYPES[out]},
            **{"ALPHA": True, "GRAD_MASK": True, "SOFT": soft, "STEP": False, "MASKED": not soft, "PER_BLOCK": False},
            **{"ALIGNED": True, "WIDTH": table.WIDTH, "TILE": forward.TILE},
            **{"SUM_COLUMNS": backward.SUM_COLUMNS, "SUM_TILE": backward_many.SUM_TILE},
        }
        for kernel, registers, bytes_read in (
            (forward_many._cast_many_kernel, 128, WIDTH[weight] + (not soft)),
            # Two programs of the backward under triton 3.6, three under 3.9.
            (backward_many._backward_many_kernel, 180, WIDTH[weight] + 1 + (WIDTH[weight] if soft else 1)),
            *([(backward_many._sum_thresholds_kernel, 128, None)] if soft else []),
        ):
            wide = None if bytes_read is None else bytes_read * forward.TILE**2
            what = f"{kind}, weight {weight}, product {out}"
            yield case_of(kernel, what, values, forward.NUM_WARPS, registers, wide)


def topk_cases() -> Iterator[Case]:
    """Magnitudes in the dtypes of weights; then any scores, at addresses that are multiples of nothing."""
    for dtype, magnitude, aligned in (("fp32", True, True), ("bf16", True, True), ("fp32", False, False)):
        values: dict[str, Any] = {
            **dict.fromkeys(("counts", "cursor", "state", "histogram", "predicted", "cutoff"), "*i64"),
            **dict.fromkeys(("addresses", "masks", "ties", "ties_before", "ties_kept"), "*i64"),
            **{"held": "*i32", "sizes": "*i32", "tiles": "i32?", "capacity": "i32?", "margin": "i32?"},
            **{"kept": "i64?", "shift": "i32?", "step": "i32?", "DTYPE": DTYPES[dtype]},
            **{"MAGNITUDE": magnitude, "ALIGNED": aligned, "TILE": _keys.TILE},
        }
        what = f"{'magnitudes' if magnitude else 'unaligned scores'}, {dtype}"
        # Three and six programs of 128 threads on one multiprocessor.
        for kernel in (_select._bracket_kernel, _select._histogram_kernel, masks._mask_kernel, masks._take_back_kernel):
            registers = 168 if kernel is _select._bracket_kernel else 80
            wide = WIDTH[dtype] * _keys.TILE if aligned else None
            yield case_of(kernel, what, values, _keys.NUM_WARPS, registers, wide)
    narrow = {**dict.fromkeys(("state", "histogram", "counts", "predicted"), "*i64"), "kept": "i64?", "shift": "i32?"}
    yield case_of(_select._narrow_kernel, "", narrow, 1, 255)


def n_of_m_cases() -> Iterator[Case]:
    """The common pattern in the dtypes of scores; the longest group, and one that is no power of two."""
    for kept, length, dtype, contiguous in ((2, 4, "fp32", True), (2, 4, "bf16", True), (8, 64, "fp32", True),
                                            (2, 3, "fp32", False)):  # fmt: skip
        width = 1 << (length - 1).bit_length()
        values: dict[str, Any] = {
            **{"mask": "*i1", "nan_found": "*i32", "scores": f"*{dtype}", "G": "i32", "groups_per_row": "i32"},
            **{"stride_sn": "i32" if contiguous else "i32?", "stride_sk": 1 if contiguous else "i32?"},
            **{"KEPT": kept, "LENGTH": length, "MAGNITUDE": True, "GROUPS": n_of_m.TILE // width, "WIDTH": width},
        }
        what = f"{kept}:{length}, {dtype}{'' if contiguous else STRIDED}"
        # Four programs of 128 threads on one multiprocessor; three where every score has an address of its own.
        # Groups of four bfloat16 are 8 bytes: a thread's load is no wider.
        registers, wide = 128 if contiguous else 168, WIDTH[dtype] * n_of_m.TILE
        wide_or_none = wide if contiguous and dtype == "fp32" else None
        yield case_of(n_of_m._n_of_m_kernel, what, values, n_of_m.NUM_WARPS, registers, wide_or_none)


def packed_activation_cases() -> Iterator[Case]:
    """Packing, of bf16 and of fp32 behind any strides; the product in each of its precisions."""
    packed = {"bits": "*i32", "row_offsets": "*i64", "word_offsets": "*i32", "counts": "*i32", "capacity": "i32?"}
    packed |= {"M": "i32", "N": "i32", "K": "i32", "words": "i32"}
    bits, pack = compress._activation_bits_kernel, compress._pack_activation_kernel
    unpack = compress._unpack_activation_kernel
    for kernel, dtype, contiguous in ((bits, "bf16", True), (pack, "fp32", False), (unpack, "bf16", True)):
        values: dict[str, Any] = {
            **packed,
            **{"x": f"*{dtype}", "values": f"*{dtype}", "cutoff": "*fp32", "row_mask": "*i1", "TILE": compress.TILE},
            **{"stride_xm": "i32", "stride_xk": 1 if contiguous else "i32?", "stride_c": "i32", "stride_r": 1},
        }
        # Eight programs of 128 threads on one multiprocessor.
        yield case_of(kernel, f"{dtype}{'' if contiguous else STRIDED}", values, compress.NUM_WARPS, 64)
    yield case_of(grad_weight._word_offsets_kernel, "", packed | {"TILE": grad_weight.WORDS_TILE}, 1, 64)
    for dtype, precision in (("bf16", "half"), ("fp32", "tf32"), ("fp32", "ieee")):
        tile_m, tile_n, tile_k, num_warps = grad_weight.TILES[precision]
        values = {
            **packed,
            **{"grad_weight": f"*{dtype}", "grad_y": f"*{dtype}", "values": f"*{dtype}"},
            **{"stride_ym": "i32", "stride_yn": 1, "stride_wn": "i32", "stride_wk": 1},
            **{"TILE_M": tile_m, "TILE_N": tile_n, "TILE_K": tile_k},
            "PRECISION": Constant("tf32" if precision == "tf32" else "ieee"),
        }
        # Two programs of 256 threads on one multiprocessor; full float32 has no matrix instruction on NVIDIA.
        yield case_of(
            grad_weight._packed_grad_weight_kernel, f"{dtype}, {precision}", values, num_warps,
            128 if precision == "half" else 255, num_stages=grad_weight.NUM_STAGES, matrix=precision != "ieee",
        )  # fmt: skip
