"""Compiles every kernel ahead of time and prints what the compiler made of it: one JSON object per line.

Needs no GPU. `test_compile.py` runs this in a subprocess under each Triton it holds us to; by hand:

    TRITON_CACHE_DIR=$(mktemp -d) python tests/kernels/compile_kernels.py

A kernel is added as rows of `cases`.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tritonsparse.kernels import threshold

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# `cuobjdump` comes with the wheel of each version.
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
WIDE_LOAD = re.compile(r"ld\.global[\w.:]*\.(?:v4\.b32|v2\.b64|v8\.b32|v4\.b64)|global_load_dwordx4")


@dataclass(frozen=True)
class Case:
    """One specialisation of one kernel.

    Attributes:
        name: what tells it apart, for messages.
        kernel: the `@triton.jit` function.
        arguments: every parameter in order. A string is the type of a run-time argument that is a multiple of
            16, as every pointer from torch's allocator is; one ending in "?" need not be. Anything else is
            the value of a compile-time argument: Triton makes one of None and of the integer 1.
        num_warps: as the launcher passes it.
        max_registers: per thread, the most that leaves the intended number of programs on one multiprocessor
            of 65,536 registers; 255 asks nothing.
        wide_load_bytes: what one program, if it has no loop, must load by instructions of 128 bits and wider;
            None asks nothing.
    """

    name: str
    kernel: Any
    arguments: dict[str, Any]
    num_warps: int
    max_registers: int
    wide_load_bytes: int | None = None


def cases() -> Iterator[Case]:
    yield from threshold_cases()


def threshold_cases() -> Iterator[Case]:
    """Each kind on contiguous matrices, in the dtypes of mixed and pure training; then any strides."""
    for kind, weight, out, contiguous in (
        ("soft", "fp32", "bf16", True),
        ("soft", "fp32", "fp32", True),
        ("soft", "bf16", "bf16", True),
        ("mask", "fp32", "bf16", True),
        ("soft", "fp32", "bf16", False),
    ):
        soft = kind == "soft"
        size = "i32" if contiguous else "i32?"
        values: dict[str, Any] = {
            **{"w_hat": f"*{out}", "occupancy": "*i32", "weight": f"*{weight}"},
            **{"grad_weight": f"*{weight}", "row_sums": "*fp32" if soft else None, "grad": f"*{out}"},
            **{"threshold": "*fp32" if soft else None, "mask": None if soft else "*i1"},
            **{"grad_mask": "*i1", "alpha": "*fp32", "N": size, "K": size, "TILE": threshold.TILE},
            **{f"stride_{matrix}n": size for matrix in "wgmb"},
            **{f"stride_{matrix}k": 1 if contiguous else "i32?" for matrix in "wgmb"},
            "stride_t": 1 if contiguous else "i32?",
        }
        dtypes = f"weight {weight}, view {out}{'' if contiguous else ', any strides'}"
        width = {"fp32": 4, "bf16": 2}
        mask_width = 1
        read = width[weight] if soft else mask_width
        for kernel, max_registers, bytes_per_element in (
            # Four and three programs of 128 threads on one multiprocessor.
            (threshold._threshold_cast_kernel, 128, width[weight] + (0 if soft else mask_width)),
            (threshold._threshold_backward_kernel, 168, width[out] + mask_width + read),
        ):
            yield Case(
                f"{kernel.__name__} ({kind}, {dtypes})",
                kernel,
                {name: values[name] for name in kernel.arg_names},
                threshold.NUM_WARPS,
                max_registers if contiguous else 255,
                bytes_per_element * threshold.TILE**2 if contiguous else None,
            )


def compile_case(case: Case, target: GPUTarget) -> dict[str, Any]:
    """Compiles one case and reads registers, spills, shared memory and wide loads off the result."""
    types = {name: value for name, value in case.arguments.items() if isinstance(value, str)}
    source = ASTSource(
        case.kernel,
        signature={name: types.get(name, "constexpr").rstrip("?") for name in case.arguments},
        constexprs={name: value for name, value in case.arguments.items() if name not in types},
        attrs={
            (position,): [["tt.divisibility", 16]]
            for position, name in enumerate(case.arguments)
            if name in types and not types[name].endswith("?")
        },
    )
    compiled = triton.compile(source, target=target, options={"num_warps": case.num_warps})
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
    }


def number(pattern: str, text: str) -> int:
    match = re.search(pattern, text)
    assert match is not None, f"no {pattern} in what the compiler reports"
    return int(match[1])


def main() -> None:
    print(json.dumps({"triton": triton.__version__}))
    for case in cases():
        for name, target in TARGETS.items():
            asked = {"max_registers": case.max_registers, "asked_wide_load_bytes": case.wide_load_bytes}
            print(json.dumps({"case": case.name, "target": name, **compile_case(case, target), **asked}))


if __name__ == "__main__":
    main()
