"""What a case is, and the targets."""

from dataclasses import dataclass
from typing import Any

import triton.language as tl
from triton.backends.compiler import GPUTarget

from tritonsparse.kernels import _tiles

TARGETS = {f"sm_{each}": GPUTarget("cuda", each, 32) for each in (80, 90, 100)}
TARGETS["gfx942"] = GPUTarget("hip", "gfx942", 64)
# Shared memory and multiprocessors of the GPU that each target stands for.
SIZES = ((166_912, 108), (232_448, 132), (232_448, 148), (65_536, 304))
LIMITS = {target: _tiles.Limits(*sizes) for target, sizes in zip(TARGETS, SIZES, strict=True)}
DTYPES = {"fp32": tl.float32, "bf16": tl.bfloat16, "fp16": tl.float16}
WIDTH = {"fp32": 4, "bf16": 2}
EVERYWHERE = tuple(TARGETS)
HOPPER = ("sm_90",)


@dataclass(frozen=True)
class Constant:
    value: str


@dataclass(frozen=True)
class Case:
    """One specialisation of one kernel, and what is asked of it.

    A string in `arguments` is the type of a run-time argument that is a multiple of 16, as every pointer from torch's
    allocator is; one ending in "?" need not be, and a descriptor's ends so. Anything else is the value of a
    compile-time argument: Triton makes one of None and of the integer 1.
    """

    name: str
    kernel: Any
    arguments: dict[str, Any]
    num_warps: int
    # A thread's, which leave 65,536 registers to the programs meant to be in flight; 255 asks nothing.
    max_registers: int
    # What a program without a loop must load by instructions of 128 bits and wider; None asks nothing.
    wide_load_bytes: int | None = None
    num_stages: int = 3
    # Whether products must run on matrix instructions; whether these must take their left operand from registers.
    matrix: bool = False
    left_in_registers: bool = False
    # The fewest copies of each tile in the shared memory of a pipelined loop; whether the copy engine must fetch them.
    buffers: int = 0
    descriptors: bool = False
    targets: tuple[str, ...] = tuple(TARGETS)


def case_of(kernel: Any, what: str, values: dict[str, Any], *rest: Any, **asked: Any) -> Case:
    """`values` may be of more parameters than the kernel has."""
    arguments = {name: values[name] for name in kernel.arg_names}
    return Case(f"{kernel.__name__} ({what})" if what else kernel.__name__, kernel, arguments, *rest, **asked)
