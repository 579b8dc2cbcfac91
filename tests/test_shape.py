"""The shape of the repository: who imports whom, how long code is, what an import brings, what a wheel holds."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
ROOMS = ("kernels", "tritonsparse", "eval", "train")  # each may import those before it
MODULES = {
    ".".join(("tritonsparse", *parts)).removesuffix(".__init__"): path
    for room in ROOMS
    for path in sorted((ROOT / room).rglob("*.py"))
    for parts in [path.relative_to(ROOT).with_suffix("").parts[room == "tritonsparse" :]]
}
MOST_PARAMETERS, MOST_WIDE, MOST_LINES = 8, 15, 300
# Functions of more than eight parameters, and why.
WIDE = {
    "kernels/activation/conv2d.py:sparse_input_conv2d": "the geometry of torch's own conv2d",
    "kernels/block/linear.py:block_linear": "x, weight, topology, view, bias, and how to multiply",
    "tritonsparse/api.py:sparsify": "the one call: what users set, by keyword",
    "tritonsparse/models/transfo_xl/configuration.py:__init__": "the fields of the published configuration",
}
# Modules of more than 300 lines, and why.
LONG = {
    "tritonsparse/sparsifier.py": "the one object that users hold; half of it is its documentation",
    "tritonsparse/methods/str_autosparse.py": "two methods of one rule",
    "tritonsparse/models/transfo_xl/modeling.py": "one published class, in its own order",
}
# Sub-packages of kernels in the order in which they may import: each those before it.
KERNELS = ("weight", "select", "fused", "block", "conv", "activation")


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def ops(module: ast.Module) -> set[str]:
    """Functions that torch.library registers, whose schemas are flat, their fakes, and Triton's."""
    exempt = set()
    for node in ast.walk(module):
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "custom_op" and len(node.args) > 1:
            exempt |= {node.args[1].id} if isinstance(node.args[1], ast.Name) else set()
        if isinstance(node, ast.FunctionDef):
            decorators = " ".join(map(ast.unparse, node.decorator_list))
            if any(word in decorators for word in ("custom_op", "register_fake", "triton.jit")):
                exempt.add(node.name)
    return exempt


def wide_functions() -> Iterator[str]:
    for path in MODULES.values():
        exempt = ops(tree(path))
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.FunctionDef) and node.name not in exempt:
                names = [each.arg for each in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
                if len(names) - (names[:1] in (["self"], ["cls"])) > MOST_PARAMETERS:
                    yield f"{path.relative_to(ROOT).as_posix()}:{node.name}"


def test_functions_take_objects_instead_of_long_lists_and_modules_stay_short() -> None:
    assert sorted(wide_functions()) == sorted(WIDE) and len(WIDE) <= MOST_WIDE
    lines = {path.relative_to(ROOT).as_posix(): path.read_text("utf-8").count("\n") for path in MODULES.values()}
    assert {name for name, count in lines.items() if count > MOST_LINES} == set(LONG)


@cache
def imports() -> dict[str, set[str]]:
    """Module -> modules that it imports, wherever in it: in functions and under TYPE_CHECKING too."""
    return {name: set(_imported(name, path)) - {name} for name, path in MODULES.items()}


def _imported(name: str, path: Path) -> Iterator[str]:
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            # A name is a module of the package, or something that the package's own module holds.
            names = [f"{module}.{alias.name}" for alias in node.names]
            yield from (each if each in MODULES else module for each in names)


def room_of(name: str) -> str:
    return next((room for room in name.split(".")[1:2] if room in ROOMS), "tritonsparse")


def test_imports_follow_the_arrow_and_triton_has_one_door() -> None:
    for name, others in imports().items():
        rooms = {room_of(other) for other in others if other.split(".")[0] == "tritonsparse"}
        assert rooms <= set(ROOMS[: ROOMS.index(room_of(name)) + 1]), name
        tops = {other.split(".")[0] for other in others}
        assert not tops & {"kernels", "eval", "train", "benchmarks", "tests"}, name
        assert "triton" not in tops or name == "tritonsparse.kernels._triton"
        assert room_of(name) != "kernels" or not tops & {"transformers", "accelerate", "peft"}, name


def test_no_module_imports_itself_by_a_circle() -> None:
    done: set[str] = set()

    def walk(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, " -> ".join([*above[above.index(name) :], name])
        if name not in done:
            for other in sorted(imports()[name] & MODULES.keys()):
                walk(other, (*above, name))
            done.add(name)

    for name in MODULES:
        walk(name, ())


def test_kernels_import_downwards_and_what_they_share_imports_no_sub_package() -> None:
    for name, others in imports().items():
        _, room, *inside = [*name.split("."), ""]
        if room == "kernels" and name != "tritonsparse.kernels.semi_structured":
            parts = [other.split(".") for other in others]
            rooms = {each[2] for each in parts if len(each) > 3 and each[1] == "kernels"}
            # The last of `inside` is empty: a module of a sub-package has two before it.
            allowed = KERNELS[: KERNELS.index(inside[0]) + 1] if len(inside) > 2 else ()
            assert rooms <= set(allowed), f"{name} imports {rooms}"


def test_files_are_where_they_belong_and_every_package_is_listed_for_the_wheel() -> None:
    assert not {"utils.py", "helpers.py", "common.py"} & {path.name for path in MODULES.values()}
    assert not (ROOT / "conftest.py").exists()
    (docstring,) = tree(ROOT / "kernels" / "__init__.py").body
    assert isinstance(docstring, ast.Expr) and isinstance(docstring.value, ast.Constant)
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    assert set(settings["packages"]) == {name for name, path in MODULES.items() if path.name == "__init__.py"}


# What is asked of the installed package in one process, which has no Triton.
INSTALLED = """
import importlib, importlib.util, sys
site, modules, root = sys.argv[1], sys.argv[2].split(), sys.argv[3]
sys.path.insert(0, site)
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in repr(finder).lower()]
sys.modules["triton"] = None
# A kernel imports neither transformers nor the layers.
import tritonsparse.kernels.weight.op
found = [name for name in sys.modules if name.split(".")[0] in ("transformers", "accelerate", "peft")]
found += [name for name in sys.modules if name.startswith(("tritonsparse.layers", "tritonsparse.methods"))]
found += [name for name in ("tritonsparse.api", "tritonsparse.sparsifier") if name in sys.modules]
assert found == [], found
# Public names are listed, and imported when they are asked for.
import tritonsparse as ts
assert "sparsify" in dir(ts) and set(ts.__all__) <= set(dir(ts))
assert "sparsify" not in vars(ts) and "tritonsparse.api" not in sys.modules
ts.sparsify
assert "tritonsparse.callback" not in sys.modules and "transformers.trainer" not in sys.modules
ts.SparsityCallback
assert "tritonsparse.callback" in sys.modules
found = {name: getattr(ts, name) for name in ts.__all__}
assert all(getattr(ts, name) is value for name, value in found.items())
found_modules = {name for name, value in found.items() if type(value).__name__ == "module"}
assert found_modules == {"flops", "methods", "pattern", "schedules"}
assert found["sparsify"].__module__ == found["load"].__module__ == "tritonsparse.api"
try:
    ts.sparsfy
except AttributeError as error:
    assert "module 'tritonsparse' has no attribute 'sparsfy'" in str(error)
else:
    raise AssertionError("a wrong name was found")
# transformers, at the repository's root, does not meet our kernels.
from transformers import Trainer
spec = importlib.util.find_spec("kernels")
assert spec is None or not (spec.origin or "").startswith(root), spec
assert "kernels" not in sys.modules
# Every module imports, and lies where it was installed; `sparsify` is still the function.
for name in modules:
    assert importlib.import_module(name).__file__.startswith(site), name
from tritonsparse import sparsify
assert sparsify is ts.sparsify is ts.api.sparsify and callable(sparsify)
assert ts.Sparsifier is ts.sparsifier.Sparsifier
# It trains without Triton, which is refused by name.
import torch
model = torch.nn.Linear(4, 4)
sparsify(model, "str")
model(torch.ones(1, 4)).sum().backward()
try:
    sparsify(torch.nn.Linear(4, 4), "str", backend="triton")
except RuntimeError as error:
    assert "installed Triton" in str(error)
else:
    raise AssertionError("backend='triton' was taken without Triton")
"""


def test_the_wheel_holds_all_modules_and_recipes_and_works_where_it_is_installed(tmp_path: Path) -> None:
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    offline = ["-q", "--no-deps", "--no-build-isolation", "--no-index"]
    # From a copy: setuptools leaves build/ and egg-info where it builds.
    sources, site = tmp_path / "sources", str(tmp_path / "site")
    ignored = shutil.ignore_patterns(".*", "runs", "build", "tests", "benchmarks", "__pycache__")
    shutil.copytree(ROOT, sources, ignore=ignored)
    subprocess.run([*pip, "wheel", *offline, "-w", tmp_path, sources], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    files = {name: "/__init__.py" if path.name == "__init__.py" else ".py" for name, path in MODULES.items()}
    expected = {name.replace(".", "/") + end for name, end in files.items()}
    recipes = {f"tritonsparse/train/recipes/{path.name}" for path in (ROOT / "train" / "recipes").glob("*.toml")}
    assert recipes and expected | recipes <= names
    assert not any(name.startswith(("tests/", "benchmarks/", "kernels/")) for name in names)
    subprocess.run([*pip, "install", *offline, "--no-compile", "--target", site, wheel], check=True)
    command = [sys.executable, "-c", INSTALLED, site, " ".join(MODULES), str(ROOT)]
    environment = os.environ | {"PYTHONSAFEPATH": "1"}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
