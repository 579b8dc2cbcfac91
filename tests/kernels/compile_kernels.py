"""Compiles every kernel ahead of time and prints what the compiler made of it: one JSON object per line.

Needs no GPU. `test_compile.py` runs this in a subprocess under each Triton it holds us to; by hand:

    TRITON_CACHE_DIR=$(mktemp -d) python tests/kernels/compile_kernels.py [--table FILE]

`--table` also writes the rows as a table: benchmarks/results/compile/triton-<version>.md holds that of each Triton.

A kernel is added as rows of `compile_cases`.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.compiler import ASTSource

# A script under PYTHONSAFEPATH sees no folder of its own.
sys.path.insert(0, str(Path(__file__).parent))

from compile_cases import blocks, convolutions, elementwise, products
from compile_cases.case import TARGETS, Case, Constant

# `cuobjdump` comes with the wheel of each version.
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
WIDE_LOAD = re.compile(r"ld\.global[\w.:]*\.(?:v4\.b32|v2\.b64|v8\.b32|v4\.b64)|(?:global|buffer)_load_dwordx4")

CASES = (
    elementwise.threshold_cases,
    elementwise.many_cases,
    products.product_cases,
    products.packed_activation_cases,
    elementwise.topk_cases,
    blocks.block_grad_cases,
    blocks.block_index_cases,
    blocks.block_gemm_cases,
    elementwise.n_of_m_cases,
    convolutions.conv_cases,
)
WORK = [(case, target) for cases in CASES for case in cases() for target in case.targets]


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


def compile_number(i: int) -> dict[str, Any]:
    """What was found and what is asked of one entry of WORK."""
    case, name = WORK[i]
    asked = {"max_registers": case.max_registers, "asked_wide_load_bytes": case.wide_load_bytes}
    asked |= {"asked_matrix": case.matrix, "asked_from_registers": case.left_in_registers}
    asked |= {"asked_buffers": case.buffers, "asked_descriptors": case.descriptors}
    return {"case": case.name, "target": name, **compile_case(case, name), **asked}


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
    # A process a core; kernels are known to each by their number, as they cannot be sent.
    with multiprocessing.get_context("fork").Pool(os.cpu_count()) as pool:
        for row in pool.imap(compile_number, range(len(WORK))):
            print(json.dumps(row))
            rows.append(row)
    if args.table:
        args.table.parent.mkdir(parents=True, exist_ok=True)
        args.table.write_text(as_table(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
