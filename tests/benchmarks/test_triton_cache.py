"""The warm Triton cache: what is packed is found again by the key of the Triton that unpacks it."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import triton_cache

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
FIRST = "3.6.0abc"


@pytest.fixture
def compiled(tmp_path: Path) -> list[dict[str, Any]]:
    """Three kernels in a cache at tmp_path/built, as Triton leaves them; hardly compressible code."""
    kernels = []
    for number in range(3):
        digest = hashlib.sha256(bytes([number])).hexdigest()
        folder = tmp_path / "built" / triton_cache.folder_name(digest)
        folder.mkdir(parents=True)
        (folder / "k.json").write_text(json.dumps({"hash": digest, "name": f"kernel_{number}"}))
        (folder / "k.cubin").write_bytes(b"".join(hashlib.sha256(bytes([number, i])).digest() for i in range(100)))
        (folder / "k.source").write_text("not packed")
        (folder / "__grp__k.json").write_text("{}")
        kernels.append({"hash": digest, "rest": f"-part {number}", "kernel": "k", "source": "blocks"})
    return kernels


def place(cache: Path, number: int) -> Path:
    return cache / triton_cache.folder_name(hashlib.sha256(f"{FIRST}-part {number}".encode()).hexdigest())


def test_kernels_lie_where_the_triton_that_unpacks_them_looks(tmp_path: Path, compiled: list[dict[str, Any]]) -> None:
    archive, cache = tmp_path / triton_cache.ARCHIVE, tmp_path / "cache"
    # Asked for twice: packed once.
    assert triton_cache.pack([*compiled, compiled[0]], tmp_path / "built", archive) == (3, 0)
    said = triton_cache.unpack(archive, cache, ("3.6.0", FIRST))
    assert said == f"{triton_cache.ARCHIVE}: 3 kernels in {cache}"
    for number in range(3):
        group = json.loads((place(cache, number) / "__grp__k.json").read_text())["child_paths"]
        assert {name: Path(path).name for name, path in group.items()} == {"k.json": "k.json", "k.cubin": "k.cubin"}
        assert json.loads(Path(group["k.json"]).read_text())["name"] == f"kernel_{number}"
        assert len(Path(group["k.cubin"]).read_bytes()) == 3200
    assert not list(cache.rglob("*.source"))
    # Again changes nothing.
    assert triton_cache.unpack(archive, cache, ("3.6.0", FIRST)) == said


def test_what_is_too_large_loses_its_last_kernels(tmp_path: Path, compiled: list[dict[str, Any]]) -> None:
    archive, cache = tmp_path / triton_cache.ARCHIVE, tmp_path / "cache"
    assert triton_cache.pack(compiled, tmp_path / "built", archive, limit=8000) == (2, 1)
    assert archive.stat().st_size <= 8000
    triton_cache.unpack(archive, cache, ("3.6.0", FIRST))
    assert [place(cache, number).is_dir() for number in range(3)] == [True, True, False]
    with pytest.raises(ValueError, match=r"pack: expected kernels that fit into 100 bytes, got 3; raise the limit"):
        triton_cache.pack(compiled, tmp_path / "built", archive, limit=100)


def test_a_file_that_cannot_be_used_is_a_sentence(tmp_path: Path, compiled: list[dict[str, Any]]) -> None:
    archive, cache = tmp_path / triton_cache.ARCHIVE, tmp_path / "cache"
    key = ("3.6.0", FIRST)
    assert triton_cache.unpack(archive, cache, key).startswith("no triton-cache.tar.xz")
    triton_cache.pack(compiled, tmp_path / "built", archive)
    assert "is of triton 3.6.0, this is 3.9.0" in triton_cache.unpack(archive, cache, ("3.9.0", FIRST))
    for damaged in (archive.read_bytes()[:500], b"", b"nothing that was packed"):
        archive.write_bytes(damaged)
        assert "cannot be used" in triton_cache.unpack(archive, cache, key)
    assert not cache.exists() or not list(cache.rglob("__grp__*"))


@pytest.mark.long
@pytest.mark.skipif("TRITONSPARSE_TRITON36" not in os.environ, reason="triton 3.6 is not at hand")
def test_a_second_process_compiles_nothing(tmp_path: Path) -> None:
    archive = tmp_path / triton_cache.ARCHIVE
    program = [sys.executable, str(BENCHMARKS / "triton_cache.py")]
    for command, more in (("build", ["--cache", str(tmp_path / "built")]), ("check", [])):
        run = subprocess.run(
            [*program, command, str(archive), "--only", "topk", "--only", "threshold", *more],
            env=os.environ | {"PYTHONSAFEPATH": "1"}, capture_output=True, text=True,
        )  # fmt: skip
        assert run.returncode == 0, run.stdout + run.stderr
    assert "5 kernels asked for, compiled anew: none" in run.stdout


@pytest.mark.long
@pytest.mark.skipif("TRITONSPARSE_TRITON36" not in os.environ, reason="triton 3.6 is not at hand")
def test_no_kernel_of_the_first_call_makes_its_products_wait(tmp_path: Path) -> None:
    rows = triton_cache.launches(triton_cache.SOURCES, tmp_path / "cache", {})
    assert {row["source"] for row in rows if "rest" in row} == set(triton_cache.SOURCES)
    assert [row for row in rows if "failure" in row] == []
    # The two that the call times beside today's: how it was.
    assert [row["kernel"] for row in rows if row["serialized"]] == ["_masked_grad_kernel"] * 2
