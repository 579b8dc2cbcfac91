"""Runs `tests/interpreted` in processes where Triton interprets kernels: one pool, and one test here a file.

Neither this folder's conftest nor the package imports transformers for them: that costs more than most of the tests.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "tests" / "interpreted"
FILES = sorted(FOLDER.glob("test_*.py"))
BAD = ("failure", "error", "skipped")


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> tuple[ElementTree.Element, str]:
    xml = tmp_path_factory.mktemp("interpreted") / "report.xml"
    # Nothing of this run's own pool, if it is in one.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment |= {"TRITON_INTERPRET": "1", "PYTHONSAFEPATH": "1"}
    fixed = ["-q", "-p", "no:cacheprovider", f"--confcutdir={FOLDER}", f"--junitxml={xml}"]
    pool = ["--numprocesses", str(min(8, os.cpu_count() or 1)), "--dist", "worksteal"]
    command = [sys.executable, "-m", "pytest", *fixed, *pool, str(FOLDER)]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    output = run.stdout + run.stderr
    assert xml.is_file(), output
    return ElementTree.parse(xml).getroot(), output


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_kernels_pass_through_the_interpreter(path: Path, report: tuple[ElementTree.Element, str]) -> None:
    root, output = report
    cases = [case for case in root.iter("testcase") if case.get("classname", "").split(".")[-1] == path.stem]
    bad = {case.get("name"): part.get("message") for case in cases for part in case if part.tag in BAD}
    # A file that cannot be imported has no cases; one whose cases all skip has run nothing.
    assert cases and not bad, f"{path.stem}: {len(cases)} tests, {bad}\n{output}"


def test_there_is_something_to_interpret() -> None:
    assert FILES
