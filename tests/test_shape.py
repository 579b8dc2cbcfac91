"""The shape of the library: how long, how wide, and who may import whom inside it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("kernels", "tritonsparse", "eval", "train")
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


def is_triton(function: ast.FunctionDef) -> bool:
    return any("triton.jit" in ast.unparse(each) for each in function.decorator_list)


def ops(module: ast.Module) -> set[str]:
    """Functions that torch.library registers, whose schemas are flat, and their fakes."""
    registered = {
        call.args[1].id
        for call in ast.walk(module)
        if isinstance(call, ast.Call) and ast.unparse(call.func).endswith("custom_op") and len(call.args) > 1
        if isinstance(call.args[1], ast.Name)
    }
    decorated = {
        node.name
        for node in ast.walk(module)
        if isinstance(node, ast.FunctionDef)
        and any(word in ast.unparse(each) for each in node.decorator_list for word in ("custom_op", "register_fake"))
    }
    return registered | decorated


def parameters(function: ast.FunctionDef) -> int:
    given = function.args
    names = [each.arg for each in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
    return len(names) - (names[:1] in (["self"], ["cls"]))


def wide_functions() -> Iterator[str]:
    for path in MODULES.values():
        exempt = ops(tree(path))
        for node in ast.walk(tree(path)):
            if not isinstance(node, ast.FunctionDef) or node.name in exempt or is_triton(node):
                continue
            if parameters(node) > MOST_PARAMETERS:
                yield f"{path.relative_to(ROOT).as_posix()}:{node.name}"


def test_functions_take_objects_instead_of_long_lists() -> None:
    assert sorted(wide_functions()) == sorted(WIDE) and len(WIDE) <= MOST_WIDE


def test_modules_stay_short() -> None:
    lines = {path.relative_to(ROOT).as_posix(): path.read_text("utf-8").count("\n") for path in MODULES.values()}
    assert {name for name, count in lines.items() if count > MOST_LINES} == set(LONG)


@cache
def imports() -> dict[str, set[str]]:
    """Module -> modules of the library that it imports, wherever in it: in functions and under TYPE_CHECKING too."""
    return {name: set(_imported(name, path)) - {name} for name, path in MODULES.items()}


def _imported(name: str, path: Path) -> Iterator[str]:
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            # A name is a module of the package, or something that the package's own module holds.
            names = [f"{module}.{alias.name}" for alias in node.names]
            found = [name if name in MODULES else module for name in names]
        else:
            continue
        yield from (each for each in found if each in MODULES)


def test_no_module_imports_itself_by_a_circle() -> None:
    done: set[str] = set()

    def walk(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, " -> ".join([*above[above.index(name) :], name])
        if name not in done:
            for other in sorted(imports()[name]):
                walk(other, (*above, name))
            done.add(name)

    for name in MODULES:
        walk(name, ())


@pytest.mark.parametrize("room", KERNELS)
def test_kernels_import_downwards(room: str) -> None:
    allowed = KERNELS[: KERNELS.index(room) + 1]
    for name, others in imports().items():
        if name.startswith(f"tritonsparse.kernels.{room}."):
            rooms = {parts[2] for other in others if len(parts := other.split(".")) > 3 and parts[1] == "kernels"}
            assert rooms <= set(allowed), f"{name} imports {rooms}"


def test_what_the_kernels_share_imports_no_sub_package() -> None:
    shared = {name: others for name, others in imports().items() if name.count(".") == 2 and ".kernels." in name}
    for name, others in shared.items():
        above = {other for other in others if other.count(".") > 2}
        assert name.endswith(".semi_structured") or not above, f"{name} imports {above}"
