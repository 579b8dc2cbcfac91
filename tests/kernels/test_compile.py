"""What the compiler makes of every kernel: four architectures, two versions of Triton, no GPU."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")

SCRIPT = Path(__file__).with_name("compile_kernels.py")
# The oldest Triton we hold ourselves to. It cannot be imported beside the installed one, so it lives in a
# folder of its own that `make test` fills and names in this variable.
OLDEST = "3.6."
OLDEST_FOLDER = "TRITONSPARSE_TRITON36"
# What one program may ask for: 163 KiB, 227 KiB and 227 KiB on NVIDIA, 64 KiB on AMD.
SHARED_LIMIT = {"sm_80": 166_912, "sm_90": 232_448, "sm_100": 232_448, "gfx942": 65_536}


# Under it, the targets that `make test` compiles for: Hopper is what it runs on. `make test-long` compiles for all.
OLDEST_TARGETS = {"sm_90"}


def compile_everything(cache: Path, triton_folder: str | None, *options: str) -> list[dict[str, Any]]:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(cache), "PYTHONSAFEPATH": "1"}
    if triton_folder is not None:
        environment["PYTHONPATH"] = triton_folder
    run = subprocess.run([sys.executable, str(SCRIPT), *options], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    return [json.loads(line) for line in run.stdout.splitlines()]


@pytest.fixture(
    scope="module", params=["installed", "oldest", pytest.param("oldest, every target", marks=pytest.mark.long)]
)
def rows(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """One row per case and target. The oldest version missing is a failure: nobody would notice a skip."""
    folder, options = None, []
    if request.param != "installed":
        options = [f"--target={each}" for each in OLDEST_TARGETS] if request.param == "oldest" else []
        folder = os.environ.get(OLDEST_FOLDER)
        if not folder:
            pytest.fail(
                f"compile tests: expected {OLDEST_FOLDER} to name a folder with triton {OLDEST}x, "
                f"got nothing; "
                f"run `make test`, or `pip install --no-deps --target FOLDER triton=={OLDEST}0` and set it"
            )
    head, *rows = compile_everything(tmp_path_factory.mktemp("triton_cache"), folder, *options)
    if folder and not head["triton"].startswith(OLDEST):
        pytest.fail(
            f"compile tests: expected {OLDEST_FOLDER} to name a folder with triton {OLDEST}x, got {folder}, "
            f"with which triton {head['triton']} is imported; "
            f"run `pip install --no-deps --target FOLDER triton=={OLDEST}0`"
        )
    return rows


def label(row: dict[str, Any]) -> str:
    return f"{row['case']} on {row['target']}"


def test_no_kernel_spills_registers(rows: list[dict[str, Any]]) -> None:
    assert {label(row): row["spill_bytes"] for row in rows if row["spill_bytes"]} == {}


def test_no_matrix_instruction_waits_for_the_one_before(rows: list[dict[str, Any]]) -> None:
    assert {label(row): row["serialized"] for row in rows if row["serialized"]} == {}
    # The products of a step are in one loop: were it not found, nothing would be known of it.
    products = [row for row in rows if row["target"] == "sm_90" and row["matrix_instructions"]]
    assert products
    assert [label(row) for row in products if not row["loop_products"]] == []


def test_every_kernel_leaves_registers_for_the_programs_it_means_to_have_in_flight(
    rows: list[dict[str, Any]],
) -> None:
    assert {label(row): row["registers"] for row in rows if row["registers"] > row["max_registers"]} == {}


def test_every_kernel_fits_into_shared_memory(rows: list[dict[str, Any]]) -> None:
    over = {label(r): r["shared_bytes"] for r in rows if r["shared_bytes"] > SHARED_LIMIT[r["target"]]}
    assert over == {}


def test_contiguous_operands_are_read_by_loads_of_at_least_128_bits_and_by_no_others(
    rows: list[dict[str, Any]],
) -> None:
    asked = [row for row in rows if row["asked_wide_load_bytes"] is not None]
    assert asked
    wide = {label(row): row["wide_load_bytes"] for row in asked}
    assert wide == {label(row): row["asked_wide_load_bytes"] for row in asked}


def test_products_run_on_matrix_instructions(rows: list[dict[str, Any]]) -> None:
    asked = [row for row in rows if row["asked_matrix"]]
    assert {row["target"] for row in asked} == {row["target"] for row in rows}
    assert [label(row) for row in asked if not row["matrix_instructions"]] == []


def test_on_hopper_the_view_reaches_the_product_through_registers(rows: list[dict[str, Any]]) -> None:
    asked = [row for row in rows if row["asked_from_registers"]]
    assert asked
    assert [label(row) for row in asked if row["from_registers"] != row["matrix_instructions"]] == []


def test_pipelined_loops_hold_the_buffers_they_mean_to(rows: list[dict[str, Any]]) -> None:
    assert any(row["asked_buffers"] for row in rows)
    assert {label(row): row["buffers"] for row in rows if row["buffers"] < row["asked_buffers"]} == {}


def test_tiles_behind_descriptors_are_fetched_by_the_copy_engine(rows: list[dict[str, Any]]) -> None:
    asked = [row for row in rows if row["asked_descriptors"]]
    assert asked
    assert [label(row) for row in asked if not row["descriptor_loads"]] == []


def test_every_target_is_compiled_for(rows: list[dict[str, Any]], request: pytest.FixtureRequest) -> None:
    expected = OLDEST_TARGETS if request.node.callspec.params["rows"] == "oldest" else set(SHARED_LIMIT)
    assert {row["target"] for row in rows} == expected
