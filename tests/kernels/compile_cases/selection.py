"""Exact top-k and N:M masks: kernels that read each score once."""

from collections.abc import Iterator
from typing import Any

from tritonsparse.kernels.select import _keys, _select, masks, n_of_m

from .case import DTYPES, WIDTH, Case


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
        for kernel, max_registers in (
            # Three and six programs of 128 threads on one multiprocessor.
            (_select._bracket_kernel, 168),
            (_select._histogram_kernel, 80),
            (masks._mask_kernel, 80),
            (masks._take_back_kernel, 80),
        ):
            yield Case(
                f"{kernel.__name__} ({'magnitudes' if magnitude else 'unaligned scores'}, {dtype})",
                kernel,
                {name: values[name] for name in kernel.arg_names},
                _keys.NUM_WARPS,
                max_registers,
                {"fp32": 4, "bf16": 2}[dtype] * _keys.TILE if aligned else None,
            )
    narrow = {**dict.fromkeys(("state", "histogram", "counts", "predicted"), "*i64"), "kept": "i64?", "shift": "i32?"}
    yield Case("_narrow_kernel", _select._narrow_kernel, narrow, 1, 255)


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
