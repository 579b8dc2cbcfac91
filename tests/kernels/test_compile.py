"""What the compiler makes of every kernel: four architectures, two versions of Triton, no GPU."""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")

SCRIPT = Path(__file__).with_name("compile_kernels.py")
# The oldest Triton we hold ourselves to. It cannot be imported beside the installed one, so it lives in a folder of its
# own that `make test` fills and names in this variable.
OLDEST = "3.6."
OLDEST_FOLDER = "TRITONSPARSE_TRITON36"
# What one program may ask for: 163 KiB, 227 KiB and 227 KiB on NVIDIA, 64 KiB on AMD.
SHARED_LIMIT = {"sm_80": 166_912, "sm_90": 232_448, "sm_100": 232_448, "gfx942": 65_536}
# Whether under the oldest version, and for which targets: others than Hopper, which it runs on, in `make test-long`.
RUNS = {
    "newest": (False, set(SHARED_LIMIT)),
    "oldest": (True, {"sm_90"}),
    "oldest, other targets": (True, set(SHARED_LIMIT) - {"sm_90"}),
}
Row = dict[str, Any]
# What no row may show.
FAULTS: dict[str, Callable[[Row], bool]] = {
    "registers are spilled": lambda row: row["spill_bytes"] > 0,
    "a matrix instruction waits for the one before": lambda row: bool(row["serialized"]),
    # The products of a step are in one loop: were it not found, nothing would be known of it.
    "no loop of products": lambda row: (
        row["target"] == "sm_90" and row["matrix_instructions"] > row["loop_products"] == 0
    ),
    "it leaves no room for the programs in flight": lambda row: row["registers"] > row["max_registers"],
    "it does not fit into shared memory": lambda row: row["shared_bytes"] > SHARED_LIMIT[row["target"]],
    "loads of less than 128 bits": lambda row: row["asked_wide_load_bytes"] not in (None, row["wide_load_bytes"]),
    "products do not run on matrix instructions": lambda row: row["asked_matrix"] and not row["matrix_instructions"],
    "on Hopper the effective weight takes the way through shared memory": lambda row: (
        row["asked_from_registers"] and row["from_registers"] != row["matrix_instructions"]
    ),
    "a pipelined loop holds too few buffers": lambda row: row["buffers"] < row["asked_buffers"],
    "the copy engine fetches no tile": lambda row: row["asked_descriptors"] and not row["descriptor_loads"],
}


def compile_everything(cache: Path, triton_folder: str | None, *options: str) -> list[Row]:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(cache), "PYTHONSAFEPATH": "1"}
    if triton_folder is not None:
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (triton_folder, os.environ.get("PYTHONPATH"))))
    run = subprocess.run([sys.executable, str(SCRIPT), *options], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    return [json.loads(line) for line in run.stdout.splitlines()]


@pytest.fixture(scope="module", params=[*list(RUNS)[:2], pytest.param([*RUNS][2], marks=pytest.mark.long)])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Row], set[str]]:
    """A row a case and target, compiled once; and the targets. The oldest version missing is a failure, not a skip."""
    oldest, targets = RUNS[request.param]
    folder = os.environ.get(OLDEST_FOLDER) if oldest else None
    expected = f"compile tests: expected {OLDEST_FOLDER} to name a folder with triton {OLDEST}x, got"
    remedy = f"run `make test`, or `pip install --no-deps --target FOLDER triton=={OLDEST}0` and set it"
    if oldest and not folder:
        pytest.fail(f"{expected} nothing; {remedy}")
    options = [f"--target={each}" for each in sorted(targets)]
    head, *rows = compile_everything(tmp_path_factory.mktemp("triton_cache"), folder, *options)
    if oldest and not head["triton"].startswith(OLDEST):
        pytest.fail(f"{expected} {folder}, with which triton {head['triton']} is imported; {remedy}")
    return rows, targets


@pytest.mark.parametrize("fault", FAULTS)
def test_of_no_kernel(fault: str, run: tuple[list[Row], set[str]]) -> None:
    assert [f"{row['case']} on {row['target']}: {row}" for row in run[0] if FAULTS[fault](row)] == []


def test_every_target_is_compiled_for_and_everything_is_asked_of_some_kernel(run: tuple[list[Row], set[str]]) -> None:
    rows, targets = run
    assert {row["target"] for row in rows} == targets == {row["target"] for row in rows if row["asked_matrix"]}
    asked = {name for row in rows for name, value in row.items() if name.startswith("asked_") and value}
    if "sm_90" in targets:
        assert asked == {name for name in rows[0] if name.startswith("asked_")} and len(asked) == 5
