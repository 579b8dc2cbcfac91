"""Packed activations: packing, unpacking, and the product that reads them."""

from collections.abc import Iterator
from typing import Any

from tritonsparse.kernels.activation import compress, grad_weight

from .case import Case, Constant


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
        arguments = {name: values[name] for name in kernel.arg_names}
        name = f"{kernel.__name__} ({dtype}{'' if contiguous else ', any strides'})"
        # Eight programs of 128 threads on one multiprocessor.
        yield Case(name, kernel, arguments, compress.NUM_WARPS, 64)

    offsets, product = grad_weight._word_offsets_kernel, grad_weight._packed_grad_weight_kernel
    values = packed | {"TILE": grad_weight.WORDS_TILE}
    yield Case(offsets.__name__, offsets, {name: values[name] for name in offsets.arg_names}, 1, 64)
    for dtype, precision in (("bf16", "half"), ("fp32", "tf32"), ("fp32", "ieee")):
        tile_m, tile_n, tile_k, num_warps = grad_weight.TILES[precision]
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
            num_stages=grad_weight.NUM_STAGES,
            matrix=precision != "ieee",
        )
