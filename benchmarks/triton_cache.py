"""A warm Triton cache for the GPU machines, made where there is no GPU: one file that saves them the compiling.

    make triton-cache
    python benchmarks/triton_cache.py build [--tests] [--only SOURCE]    compile, and pack triton-cache.tar.xz
    python benchmarks/triton_cache.py check [FILE]                       ask for it all again: nothing may be compiled
    python benchmarks/triton_cache.py unpack FILE DIR                    `first_contact.py` does so by itself

The launches of `first_contact.py`, and with `--tests` those of the GPU tests, are compiled for sm_90 under triton 3.6
(`first_contact_dry.py`). The file holds the machine code and its description, most valuable first, and is at most
16 MB: what does not fit is left out, from the end.

In Triton's cache a kernel lies in a folder whose name is a hash over Triton's own code, its C++ library included, which
is another file for every version of Python; then over the kernel's source, types and constants, ptxas's version and
the options. The file keeps that second part of the name. Where it is unpacked the first part is computed anew, by the
Triton that will look for it. So the kernels are found under any Python, and under another release of Triton, another
ptxas or sources that have changed since, they are not: that costs what it would have cost without the file.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import io
import json
import lzma
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parent))  # PYTHONSAFEPATH keeps a script's own folder off it
from row_log import read_rows

ROOT = Path(__file__).resolve().parents[1]
ARCHIVE = "triton-cache.tar.xz"
VERSION = "3.6.0"
LIMIT = 16_000_000
INDEX = "index.json"
# In the order of their value: a file that is full lacks the last ones.
SOURCES = ("blocks", "decoder", "train_step", "threshold", "grad", "topk")

Kernel = dict[str, Any]


def folder_name(digest: str) -> str:
    """The folder of a kernel in Triton's cache, from the hash of its key."""
    return base64.b32encode(bytes.fromhex(digest)).decode().rstrip("=")


def own_key() -> tuple[str, str]:
    """Version and first part of a kernel's key, of the Triton that this Python imports."""
    import triton
    from triton.runtime.cache import triton_key

    return triton.__version__, triton_key()


def pack(kernels: Sequence[Kernel], cache: Path, archive: Path, limit: int = LIMIT) -> tuple[int, int]:
    """Write the file.

    Args:
        kernels: rows of `first_contact_dry.py`, most valuable first.
        cache: the Triton cache that they were compiled into.
        limit: bytes that the file may have.

    Returns:
        How many kernels it holds, and how many were left out.

    Raises:
        ValueError: not even one fits.
    """
    found, seen = [], set()
    for kernel in kernels:
        folder = cache / folder_name(kernel["hash"])
        parts = {path.suffix: path for path in folder.glob("*.*") if not path.name.startswith("__grp__")}
        if kernel["hash"] not in seen and ".json" in parts and ".cubin" in parts:
            seen.add(kernel["hash"])
            found.append((kernel, parts[".json"].read_bytes(), parts[".cubin"].read_bytes()))
    count = len(found)
    while count:
        data = _compressed(found[:count])
        if len(data) <= limit:
            temporary = archive.with_name(f".{archive.name}.{os.getpid()}")
            temporary.write_bytes(data)
            os.replace(temporary, archive)
            return count, len(found) - count
        # A little less than would fit if all were alike.
        count = min(count - 1, int(0.98 * count * limit / len(data)))
    raise ValueError(f"pack: expected kernels that fit into {limit} bytes, got {len(found)}; raise the limit")


def _compressed(found: Sequence[tuple[Kernel, bytes, bytes]]) -> bytes:
    index = [{"rest": kernel["rest"], "name": kernel["kernel"], "source": kernel["source"]} for kernel, _, _ in found]
    document = {"triton": VERSION, "kernels": index}
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w") as tar:

        def add(name: str, data: bytes) -> None:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))

        add(INDEX, json.dumps(document).encode())
        # Descriptions first: they are all but alike.
        for number, (_, description, _) in enumerate(found):
            add(f"{number}.json", description)
        for number, (_, _, code) in enumerate(found):
            add(f"{number}.cubin", code)
    return lzma.compress(raw.getvalue(), preset=6)


def unpack(archive: Path, folder: Path, key: tuple[str, str] | None = None) -> str:
    """Put the kernels of a file where Triton looks for them.

    Args:
        archive: of `pack`; there need not be one.
        folder: the cache, TRITON_CACHE_DIR; an absolute path.
        key: `own_key`, asked for only where there is a file.

    Returns:
        What came of it, in a sentence: a file that is damaged, or of another Triton, is no error.
    """
    if not archive.is_file():
        return f"no {ARCHIVE}: kernels are compiled here"
    try:
        version, first = key or own_key()
        if version != VERSION:
            return f"{archive.name} is of triton {VERSION}, this is {version}: kernels are compiled here"
        with tarfile.open(archive, "r:xz") as tar:
            members = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
        document = json.loads(members[INDEX])
        for number, kernel in enumerate(document["kernels"]):
            _place(folder, first, kernel, members[f"{number}.json"], members[f"{number}.cubin"])
    # Whatever is wrong with it, kernels can be compiled.
    except Exception as error:
        return f"{archive.name} cannot be used ({type(error).__name__}: {error}): kernels are compiled here"
    return f"{archive.name}: {len(document['kernels'])} kernels in {folder}"


def _place(folder: Path, first: str, kernel: Kernel, description: bytes, code: bytes) -> None:
    digest = hashlib.sha256((first + kernel["rest"]).encode()).hexdigest()
    place, name = folder / folder_name(digest), kernel["name"][:150]
    if (place / f"__grp__{name}.json").exists():
        return
    place.mkdir(parents=True, exist_ok=True)
    metadata = json.loads(description) | {"hash": digest}
    (place / f"{name}.json").write_text(json.dumps(metadata))
    (place / f"{name}.cubin").write_bytes(code)
    paths = {each: str(place / each) for each in (f"{name}.json", f"{name}.cubin")}
    # Last: Triton takes the kernel as there once this file is.
    temporary = place / f".grp.{os.getpid()}"
    temporary.write_text(json.dumps({"child_paths": paths}))
    os.replace(temporary, place / f"__grp__{name}.json")


def triton_folder() -> Path:
    """Where the GPU machines' Triton lies here."""
    given = os.environ.get("TRITONSPARSE_TRITON36")
    folder = Path(given) if given else ROOT / ".venv" / "triton-3.6"
    if not (folder / "triton" / "__init__.py").is_file():
        raise FileNotFoundError(
            f"triton_folder: expected triton {VERSION} in {folder}, got nothing; run `make test` once, or set "
            f"TRITONSPARSE_TRITON36"
        )
    return folder


def launches(sources: Sequence[str], cache: Path, variables: Mapping[str, str]) -> list[Kernel]:
    """Compile what the sources launch into `cache`, one process each; a row for each kernel, in order."""
    from first_contact import linked_environment

    with tempfile.TemporaryDirectory(prefix="tritonsparse-") as scratch:
        environment = linked_environment(Path(scratch) / "links") | dict(variables)
        environment["PYTHONPATH"] = os.pathsep.join([str(triton_folder()), environment["PYTHONPATH"]])
        # What neither unpacking nor launching reads is not kept.
        environment |= {"TRITON_CACHE_DIR": str(cache), "TRITON_STORE_BINARY_ONLY": "1"}
        records = Path(scratch) / "records.jsonl"
        for source in sources:
            command = [sys.executable, str(ROOT / "benchmarks" / "first_contact_dry.py"), source]
            run = subprocess.run(
                [*command, "--records", str(records)], env=environment, cwd=ROOT, capture_output=True, text=True
            )
            rows = [row for row in read_rows(records) if row["source"] == source]
            made = sum(row.get("compiled", False) for row in rows)
            failed = [row for row in rows if "failure" in row]
            print(f"{source}: {len(rows) - len(failed)} kernels, {made} compiled, {len(failed)} failed", flush=True)
            slow = sorted({row["kernel"] for row in rows if row.get("serialized")})
            if slow:
                print(f"  products wait for each other: {', '.join(slow)}", flush=True)
            for row in failed[:5]:
                print(f"  {row['kernel']}: {row['failure']}", flush=True)
            if run.returncode:
                print((run.stdout + run.stderr)[-1500:], flush=True)
        return read_rows(records)


def build(sources: Sequence[str], archive: Path, cache: Path) -> int:
    rows = [row for row in launches(sources, cache, {}) if "rest" in row]
    count, left = pack(rows, cache, archive)
    print(f"{archive}: {count} kernels, {archive.stat().st_size / 1e6:.2f} MB; {left} left out")
    return 0


def check(sources: Sequence[str], archive: Path) -> int:
    """Unpack into an empty folder and ask for every kernel again; the status is 1 where one had to be compiled."""
    with tempfile.TemporaryDirectory(prefix="triton-cache-") as folder:
        cache = Path(folder) / "cache"
        variables = os.environ | {"PYTHONPATH": str(triton_folder()), "PYTHONSAFEPATH": "1"}
        program = [sys.executable, __file__, "unpack", str(archive), str(cache)]
        print(subprocess.run(program, env=variables, capture_output=True, text=True, check=True).stdout.strip())
        rows = launches(sources, cache, {})
        compiled = sorted({row["kernel"] for row in rows if row.get("compiled")})
        print(f"{len(rows)} kernels asked for, compiled anew: {', '.join(compiled) or 'none'}")
        return int(bool(compiled))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("build", "check"):
        command = commands.add_parser(name)
        command.add_argument("file", type=Path, nargs="?", default=ROOT / ARCHIVE)
        command.add_argument("--only", action="append", metavar="SOURCE", help="of the steps, or a file of tests/gpu")
        command.add_argument("--tests", action="store_true", help="the kernels of the GPU tests too (many minutes)")
        command.add_argument("--cache", type=Path, default=ROOT / "runs" / "triton-cache", help="kept between builds")
    command = commands.add_parser("unpack")
    command.add_argument("file", type=Path)
    command.add_argument("folder", type=Path)
    args = parser.parse_args(argv)
    if args.command == "unpack":
        print(unpack(args.file, args.folder.absolute()))
        return 0
    tests = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "tests" / "gpu").glob("test_*.py"))
    sources = args.only or [*SOURCES, *(tests if args.tests else ())]
    return build(sources, args.file, args.cache.absolute()) if args.command == "build" else check(sources, args.file)


if __name__ == "__main__":
    sys.exit(main())
