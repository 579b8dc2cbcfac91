"""What holds of every kernel: examples run, and a back end that cannot is an error that names the other."""

import doctest
import importlib
import sys

import pytest
import torch

from tritonsparse import kernels
from tritonsparse.kernels import weight
from tritonsparse.kernels.block.gemm import BlockLayout, block_forward
from tritonsparse.kernels.block.grad import block_grad_weight
from tritonsparse.kernels.block.topology import build_index_reference, build_indices
from tritonsparse.kernels.fused.gemm import fused_forward
from tritonsparse.kernels.fused.linear import fused_linear
from tritonsparse.kernels.weight.backward import threshold_backward
from tritonsparse.kernels.weight.forward import threshold_cast
from tritonsparse.kernels.weight.op import effective_weight
from tritonsparse.kernels.weight.table import Viewed, ViewTable
from tritonsparse.kernels.weight.view import View

EXAMPLES = {
    "weight": ("forward", "backward"),
    "fused": ("gemm", "grad"),
    "block": ("_index", "gemm", "grad", "linear", "packed", "storage", "topology"),
    "conv": ("gemm", "grad", "conv2d"),
    "select": ("transposable",),
}


@pytest.mark.parametrize("name", ["plan", *(f"{room}.{name}" for room, names in EXAMPLES.items() for name in names)])
def test_the_examples_in_the_docstrings_hold(name: str) -> None:
    result = doctest.testmod(importlib.import_module(f"tritonsparse.kernels.{name}"))
    assert result.attempted >= (1 if name.startswith(("conv", "select")) else 3) and result.failed == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_triton_off_the_gpu_is_an_error_that_names_the_other_back_end() -> None:
    pytest.importorskip("triton")
    w, x, view = torch.ones(16, 32), torch.zeros(2, 32), View("soft", torch.zeros(1))
    flags = torch.ones(1, 2, dtype=torch.bool)
    layout = BlockLayout(build_index_reference(flags), (16, 16), (16, 32))
    calls = {
        threshold_cast: (w, view), threshold_backward: (w, w, view), effective_weight: (w, view),
        ViewTable: ([Viewed(w, view)],), block_forward: (x, w, layout), block_grad_weight: (x[:, :16], x, layout),
        build_indices: ([flags], [layout.index]), fused_forward: (x, w, view), fused_linear: (x, w, view),
    }  # fmt: skip
    for function, given in calls.items():
        with pytest.raises(RuntimeError) as error:
            function(*given, backend="triton")
        assert str(error.value) == (
            f'{function.__name__}: expected tensors on a GPU for backend="triton", got device cpu; move them to a GPU '
            f'or pass backend="torch"'
        )


def test_without_triton_modules_import_and_their_triton_back_end_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for package, name in ((kernels, "_triton"), (kernels, "_tile_view"), (weight, "forward")):
        monkeypatch.setattr(package, name, getattr(package, name))
        monkeypatch.delitem(sys.modules, f"{package.__name__}.{name}")
    monkeypatch.setitem(sys.modules, "triton", None)  # makes `import triton` fail as if it were not there
    fresh = importlib.import_module("tritonsparse.kernels.weight.forward")
    w, view = torch.ones(2, 3), View("soft", torch.zeros(1))
    assert fresh.threshold_cast(w, view).tolist() == [[0.5] * 3] * 2
    with pytest.raises(RuntimeError) as error:
        fresh.threshold_cast(w, view, backend="triton")
    message = str(error.value)
    assert message.startswith('threshold_cast: expected triton to be importable for backend="triton", got "')
    assert message.endswith('"; install triton or pass backend="torch"')
