"""Ring 2: what only a GPU shows. `make gpu` runs it; pyproject.toml deselects it elsewhere."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

# For `tolerances` and `cases`.
sys.path += [str(Path(__file__).parent), str(Path(__file__).parents[1] / "kernels")]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Every test of this folder is marked `gpu`, and all but the program's, which runs anywhere, need one."""
    for item in items:
        if item.path.parent == Path(__file__).parent:
            item.add_marker("gpu")
            if item.path.name != "test_language_modeling_gpu.py" and not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Memory that a kernel forgets to write reads as NaN, as the largest integer, or as True."""
    before, warns = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.zeros(1).new_empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before, warn_only=warns)


@pytest.fixture(params=["full float32", "tf32"])
def precision(request: pytest.FixtureRequest) -> Iterator[str]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if request.param == "tf32" else "highest")
    yield request.param
    torch.set_float32_matmul_precision(before)


@pytest.fixture
def fresh_compiler() -> None:
    torch.compiler.reset()


@pytest.fixture(autouse=True)
def freed_memory() -> Iterator[None]:
    """Each test finds the memory that the one before it used."""
    yield
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
