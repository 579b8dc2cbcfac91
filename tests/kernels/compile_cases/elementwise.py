"""Effective weights, their gradients, and selections: kernels that read each weight once."""

from collections.abc import Iterator
from typing import Any

from tritonsparse.kernels.weight import backward, backward_many, forward, forward_many, table

from .case import DTYPES, WIDTH, Case


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
        warps = backward.HARD_WARPS if kind == "hard" else forward.NUM_WARPS
        for kernel, num_warps, max_registers, bytes_read in (
            # Four and three programs of 128 threads on one multiprocessor; three of the cast with a threshold a block.
            (forward._threshold_cast_kernel, forward.NUM_WARPS, 168 if per_block else 128, WIDTH[weight] + masked),
            (backward._threshold_backward_kernel, warps, 168, WIDTH[out] + (not step) + read),
        ):
            yield Case(
                f"{kernel.__name__} ({kind}, weight {weight}, product {out}{'' if contiguous else ', any strides'})",
                kernel,
                {name: values[name] for name in kernel.arg_names},
                num_warps,
                max_registers if contiguous else 255,
                # With 8 warps a thread reads 8 bytes of a mask: wide or not, as the target's compiler has it.
                bytes_read * forward.TILE**2 if contiguous and num_warps == forward.NUM_WARPS else None,
            )


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
        for kernel, max_registers, bytes_read in (
            (forward_many._cast_many_kernel, 128, WIDTH[weight] + (not soft)),
            # Two programs of the backward under triton 3.6, three under 3.9.
            (backward_many._backward_many_kernel, 180, WIDTH[weight] + 1 + (WIDTH[weight] if soft else 1)),
            *([(backward_many._sum_thresholds_kernel, 128, None)] if soft else []),
        ):
            yield Case(
                f"{kernel.__name__} ({kind}, weight {weight}, product {out})",
                kernel,
                {name: values[name] for name in kernel.arg_names},
                forward.NUM_WARPS,
                max_registers,
                None if bytes_read is None else bytes_read * forward.TILE**2,
            )
