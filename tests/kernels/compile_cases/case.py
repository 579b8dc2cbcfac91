"""What a case is, and the targets."""

from dataclasses import dataclass
from typing import Any

import triton.language as tl
from triton.backends.compiler import GPUTarget

from tritonsparse.kernels import _tiles

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# Shared memory and multiprocessors of the GPU that each target stands for.
LIMITS = {
    "sm_80": _tiles.Limits(166_912, 108),
    "sm_90": _tiles.Limits(232_448, 132),
    "sm_100": _tiles.Limits(232_448, 148),
    "gfx942": _tiles.Limits(65_536, 304),
}
DTYPES = {"fp32": tl.float32, "bf16": tl.bfloat16, "fp16": tl.float16}
WIDTH = {"fp32": 4, "bf16": 2}
EVERYWHERE = tuple(TARGETS)
HOPPER = ("sm_90",)


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
            Anything else is the value of a compile-time argument: Triton makes one of None and of the integer 1.
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
