"""The rules of the repository: who may import whom, what stands at the root, what a wheel holds."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = {"kernels": "kernels", "tritonsparse": "tritonsparse", "eval": "eval", "train": "train"}
ORDER = ["kernels", "tritonsparse", "eval", "train"]  # each may import those before it
MODULES = sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))


def package_of(path: Path) -> list[str]:
    """The dotted package a file belongs to as installed: kernels/x.py lies in tritonsparse.kernels."""
    parts = list(path.relative_to(ROOT).parts[:-1])
    return parts if parts[0] == "tritonsparse" else ["tritonsparse", *parts]


def imported(path: Path) -> set[str]:
    """Absolute names of all modules that a file imports, wherever in it."""
    names: set[str] = set()
    package = package_of(path)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            names |= {module} | {f"{module}.{alias.name}" for alias in node.names}
    return names


def room_of(name: str) -> str | None:
    parts = name.split(".")
    if parts[0] != "tritonsparse":
        return None
    return parts[1] if len(parts) > 1 and parts[1] in ("kernels", "eval", "train") else "tritonsparse"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_follow_the_arrow_and_triton_has_one_door(path: Path) -> None:
    room = path.relative_to(ROOT).parts[0]
    names = imported(path)
    # `import tritonsparse.kernels.x` also names the package above it; that is no import of its contents.
    rooms = {room_of(name) for name in names if name != "tritonsparse"} - {None}
    assert rooms <= set(ORDER[: ORDER.index(room) + 1])
    assert not any(name.split(".")[0] in ("kernels", "eval", "train", "benchmarks", "tests") for name in names)
    takes_triton = any(name.split(".")[0] == "triton" for name in names)
    assert not takes_triton or path == ROOT / "kernels" / "_triton.py"


def test_no_module_is_a_collecting_place() -> None:
    assert not {"utils.py", "helpers.py", "common.py"} & {path.name for path in MODULES}


def test_the_kernels_package_is_a_docstring_and_nothing_else() -> None:
    body = ast.parse((ROOT / "kernels" / "__init__.py").read_text(encoding="utf-8")).body
    assert len(body) == 1 and isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant)


def test_there_is_no_conftest_at_the_root() -> None:
    assert not (ROOT / "conftest.py").exists()


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = os.environ | {"PYTHONSAFEPATH": "1"} | environment
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=variables, capture_output=True, text=True)


def test_transformers_imports_at_the_root_and_does_not_meet_our_kernels() -> None:
    code = f"""
import importlib.util, sys
import transformers
from transformers import Trainer
import tritonsparse
import tritonsparse.kernels.fused.linear
spec = importlib.util.find_spec("kernels")
assert spec is None or not (spec.origin or "").startswith({str(ROOT)!r}), spec
assert "kernels" not in sys.modules
"""
    run = python(code)
    assert run.returncode == 0, run.stderr


def test_everything_imports_where_triton_is_not_installed() -> None:
    names = [".".join([*package_of(path), path.stem]).removesuffix(".__init__") for path in MODULES]
    code = f"""
import importlib, sys
sys.modules["triton"] = None
for name in {names!r}:
    importlib.import_module(name)
import torch, tritonsparse as ts
model = torch.nn.Linear(4, 4)
sparsifier = ts.sparsify(model, "str")
model(torch.ones(1, 4)).sum().backward()
try:
    ts.sparsify(torch.nn.Linear(4, 4), "str", backend="triton")
except RuntimeError as error:
    assert "installed Triton" in str(error)
else:
    raise AssertionError("backend='triton' was taken without Triton")
"""
    run = python(code)
    assert run.returncode == 0, run.stderr


def test_every_package_is_listed_for_the_wheel() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    found = {".".join(package_of(path)) for path in MODULES if path.name == "__init__.py"}
    assert set(settings["packages"]) == found


def test_the_wheel_holds_all_modules_and_recipes_and_works_where_it_is_installed(tmp_path: Path) -> None:
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    offline = ["--no-deps", "--no-build-isolation", "--no-index"]
    # From a copy: setuptools leaves build/ and egg-info where it builds.
    sources = tmp_path / "sources"
    ignored = ["--exclude=./.*", "--exclude=./runs", "--exclude=./build", "--exclude=./tests", "--exclude=./benchmarks"]
    sources.mkdir()
    archive = subprocess.run(["tar", "-C", ROOT, *ignored, "-cf", "-", "."], capture_output=True, check=True).stdout
    subprocess.run(["tar", "-C", sources, "-xf", "-"], input=archive, check=True)
    subprocess.run([*pip, "wheel", "-q", *offline, "-w", tmp_path, sources], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = {"/".join([*package_of(path), path.name]) for path in MODULES}
    recipes = {f"tritonsparse/train/recipes/{path.name}" for path in (ROOT / "train" / "recipes").glob("*.toml")}
    assert recipes and expected | recipes <= names
    assert not any(name.startswith(("tests/", "benchmarks/", "kernels/")) for name in names)
    subprocess.run([*pip, "install", "-q", *offline, "--target", tmp_path / "site", wheel], check=True)
    code = f"""
import sys
sys.path.insert(0, {str(tmp_path / "site")!r})
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in repr(finder).lower()]
import tritonsparse, tritonsparse.kernels.weight.forward, tritonsparse.eval, tritonsparse.train
assert tritonsparse.__file__.startswith({str(tmp_path)!r}), tritonsparse.__file__
assert tritonsparse.kernels.__file__.startswith({str(tmp_path)!r})
"""
    run = python(code)
    assert run.returncode == 0, run.stderr
