"""Compiles every kernel ahead of time and prints what the compiler made of it: one JSON object per line.

Needs no GPU. `test_compile.py` runs this under each Triton it holds us to; by hand, where `--table` also
writes the rows as a table (benchmarks/results/compile/triton-<version>.md holds that of each Triton):

    TRITON_CACHE_DIR=$(mktemp -d) python tests/kernels/compile_kernels.py [--table FILE]
"""

import argparse
import bisect
import contextlib
import io
import itertools
import json
import multiprocessing
import os
import re
import struct
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton import knobs
from triton.compiler import ASTSource

# A script under PYTHONSAFEPATH sees no folder of its own.
sys.path.insert(0, str(Path(__file__).parent))

from compile_cases import blocks, convolutions, elementwise, products
from compile_cases.case import TARGETS, Case, Constant

# `cuobjdump` and `nvdisasm` come with the wheel of each version.
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
MATRIX_INSTRUCTION = {
    "sm_80": re.compile(r"\bmma\.sync"),
    "sm_90": re.compile(r"wgmma\.mma_async"),
    "sm_100": re.compile(r"tcgen05\.mma|\bmma\.sync"),
    "gfx942": re.compile(r"v_mfma"),
}
# Hopper's, with a list of registers after that of the sums rather than the address of a tile.
LEFT_IN_REGISTERS = re.compile(r"wgmma\.mma_async[^;{]*\{[^}]*\}\s*,\s*\{")
PIPELINED = re.compile(r"ttg\.local_alloc : \(\) -> !ttg\.memdesc<(\d+)x\d+x\d+x")
# What ptxas says where it makes each matrix instruction wait for the one before (C7510, C7514, C7515 and others).
SERIALIZED = re.compile(r"wgmma\.mma_async instructions are serialized due to ([^\n]*?) in the function")
# Address, name and operands of an instruction of SASS.
INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\d+ )?\s*([A-Z][A-Z0-9_.]+)\s*([^;]*);")
WIDE_LOAD = re.compile(r"ld\.global[\w.:]*\.(?:v4\.b32|v2\.b64|v8\.b32|v4\.b64)|(?:global|buffer)_load_dwordx4")

CASES = (
    elementwise.threshold_cases, elementwise.many_cases, products.product_cases, elementwise.packed_activation_cases,
    elementwise.topk_cases, blocks.block_grad_cases, blocks.block_index_cases, blocks.block_gemm_cases,
    elementwise.n_of_m_cases, convolutions.conv_cases,
)  # fmt: skip
WORK = [(case, target) for cases in CASES for case in cases() for target in case.targets]


def compile_case(case: Case, name: str) -> dict[str, Any]:
    target = TARGETS[name]
    types = {name: value for name, value in case.arguments.items() if isinstance(value, str)}
    signature = {name: types.get(name, "constexpr").rstrip("?") for name in case.arguments}
    constants = {name: value for name, value in case.arguments.items() if name not in types}
    constants = {name: value.value if isinstance(value, Constant) else value for name, value in constants.items()}
    multiples = [i for i, name in enumerate(case.arguments) if name in types and not types[name].endswith("?")]
    attributes = {(position,): [["tt.divisibility", 16]] for position in multiples}
    source = ASTSource(case.kernel, signature=signature, constexprs=constants, attrs=attributes)
    log, options = io.StringIO(), {"num_warps": case.num_warps, "num_stages": case.num_stages}
    with contextlib.redirect_stdout(log):
        compiled = triton.compile(source, target=target, options=options)
    binary = b""
    if target.backend == "cuda":
        usage = dump(compiled.asm["cubin"], "cuobjdump", "--dump-resource-usage")
        if name == "sm_90":
            # Hopper's products alone are serialised; of remarks that were not seen nothing is known. "ptxas-blackwell",
            # which newer releases take, names itself so.
            assert re.search(r"ptxas\S* info", log.getvalue()), f"{case.name}: expected ptxas's remarks, got none"
            binary = text_of(compiled.asm["cubin"])
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
        "serialized": next(iter(SERIALIZED.findall(log.getvalue())), ""),
        "binary": binary,
    }


def dump(binary: bytes, tool: str, *options: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        command = [str(TOOLS / tool), *options, file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def text_of(cubin: bytes) -> bytes:
    """The instructions of a kernel: the ELF section of that name."""
    (table,), (size, count, names) = struct.unpack_from("<Q", cubin, 0x28), struct.unpack_from("<HHH", cubin, 0x3A)
    sections = [struct.unpack_from("<IIQQQQ", cubin, table + i * size) for i in range(count)]
    strings = cubin[sections[names][4] :]
    (text,) = (section for section in sections if strings[section[0] :].startswith(b".text."))
    return cubin[text[4] : text[4] + text[5]]


def product_loops(binaries: list[bytes]) -> list[dict[str, int]]:
    """Of each kernel. They are disassembled as one, since starting the disassembler takes longer than its work."""
    starts = [0, *itertools.accumulate(map(len, binaries))]
    sass = dump(b"".join(binaries), "nvdisasm", "--binary", "SM90") if any(binaries) else ""
    code = [(int(address, 16), opcode, rest) for address, opcode, rest in INSTRUCTION.findall(sass)]
    places = [bisect.bisect_left(code, (start,)) for start in starts]
    return [product_loop(code[begin:end]) for begin, end in itertools.pairwise(places)]


def product_loop(code: list[tuple[int, str, str]]) -> dict[str, int]:
    """Instructions of the shortest loop that holds matrix instructions, and how many these are: a step's work."""
    found = {"loop_instructions": 0, "loop_products": 0}
    for end, opcode, rest in code:
        target = re.search(r"0x([0-9a-f]+)", rest) if opcode.startswith("BRA") else None
        if target is None or int(target[1], 16) > end:
            continue
        body = [opcode for address, opcode, _ in code if int(target[1], 16) <= address <= end]
        products = sum(opcode.startswith(("HGMMA", "HMMA")) for opcode in body)
        if products and len(body) < (found["loop_instructions"] or 1 << 30):
            found = {"loop_instructions": len(body), "loop_products": products}
    return found


def compile_number(i: int) -> dict[str, Any]:
    case, name = WORK[i]
    knobs.nvidia.dump_ptxas_log = True
    # A kernel from the cache would bring no remarks. Without line numbers the same code is made sooner.
    knobs.compilation.always_compile = knobs.compilation.disable_line_info = True
    asked = {"max_registers": case.max_registers, "asked_wide_load_bytes": case.wide_load_bytes}
    asked |= {"asked_matrix": case.matrix, "asked_from_registers": case.left_in_registers}
    asked |= {"asked_buffers": case.buffers, "asked_descriptors": case.descriptors}
    return {"case": case.name, "target": name, **compile_case(case, name), **asked}


def number(pattern: str, text: str) -> int:
    match = re.search(pattern, text)
    assert match is not None, f"no {pattern} in what the compiler reports"
    return int(match[1])


def as_table(rows: list[dict[str, Any]]) -> str:
    columns = (
        *("registers", "spill_bytes", "shared_bytes", "wide_load_bytes", "matrix_instructions", "buffers"),
        *("loop_instructions", "loop_products", "serialized"),
    )
    lines = [
        f"What triton {triton.__version__} makes of each kernel (by `tests/kernels/compile_kernels.py --table`).",
        "Registers are a thread's, bytes of wide loads (128 bits and more) a program's outside loops. The loop is the",
        "one that multiplies, in SASS for sm_90 alone: its instructions and its matrix instructions.",
        "",
        "| kernel | target | " + " | ".join(column.replace("_", " ") for column in columns) + " |",
        "|---|---|" + "---|" * len(columns),
    ]
    lines += [f"| {row['case']} | {row['target']} | " + " | ".join(str(row[c]) for c in columns) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", type=Path, help="file to write the rows to as a table")
    parser.add_argument("--target", action="append", choices=tuple(TARGETS), help="compile for these alone")
    args = parser.parse_args()
    print(json.dumps({"triton": triton.__version__}))
    numbers = [i for i, (_, name) in enumerate(WORK) if args.target is None or name in args.target]
    with multiprocessing.get_context("fork").Pool(os.cpu_count()) as pool:
        rows = list(pool.imap(compile_number, numbers))
    for row, loop in zip(rows, product_loops([row.pop("binary") for row in rows]), strict=True):
        row |= loop
        print(json.dumps(row))
    if args.table:
        args.table.parent.mkdir(parents=True, exist_ok=True)
        args.table.write_text(as_table(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
