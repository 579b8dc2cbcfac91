"""The small programs of tests/train, for sweeps over all of them."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType


def load(name: str) -> ModuleType:
    """A file of tests/train as a module: pytest's import mode has no names for them."""
    path = Path(__file__).parents[1] / "train" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"sweep_{name}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Its dataclasses look themselves up.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


programs = load("conftest")
command_lines = load("test_command_lines")
# Fixtures are found by their names here.
translation, language, images = programs.translation, programs.language, programs.images
texts, saved_marian, fresh_accelerate = programs.texts, programs.saved_marian, programs.fresh_accelerate
