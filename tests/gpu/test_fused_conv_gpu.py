"""Sparse convolutions on a GPU: every case in bfloat16, large ones in all dtypes, tf32, graphs, offsets beyond 2^31."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from cases.fused_conv import BF16, CASES, F16, F32, LARGE, Case, Operands, answer, errors, operands, run
from graphs import captured
from tolerances import CANCELLING, product_bound
from torch import Tensor

from tritonsparse.kernels.conv.conv2d import fused_conv2d
from tritonsparse.kernels.conv.geometry import Geometry
from tritonsparse.kernels.weight.view import View

pytestmark = pytest.mark.usefixtures("poisoned_memory")

STEP = LARGE[2]
# Case, product, master, tf32: every case, then every kind and dtype on one: each compiles its own kernels.
TABLE = [
    *((case, BF16, F32, False) for case in (*CASES, *LARGE)),
    *((replace(STEP, kind=kind), BF16, F32, False) for kind in ("soft", "hard", "mask")),
    *((STEP, F16, F32, False), (STEP, F32, F32, False), (STEP, F32, F32, True), (STEP, BF16, BF16, False)),
]


@pytest.fixture
def precision() -> Iterator[None]:
    before, library = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    yield
    torch.set_float32_matmul_precision(before)
    torch.backends.cudnn.allow_tf32 = library


def check(o: Operands, tf32: bool = False) -> dict[str, Tensor]:
    """The kernels' results, which repeat, and err at most 1.1 times as the unfused reference or as `tolerances.py`."""
    case, expected, found, again = o.case, answer(o), run(o, "triton"), run(o, "triton")
    reference, channels = errors(o, run(o, "torch"), expected), {"y": case.inputs, "x": case.outputs}
    for name, error in errors(o, found, expected).items():
        length = case.batch * o.grad_y.shape[2:].numel()
        if name in channels:
            length = case.geometry.taps * channels[name] // case.geometry.groups
        bound = product_bound(o.x.dtype, found[name].dtype, length, "tf32" if tf32 else "full float32")
        bound *= CANCELLING if name == "threshold" else 1
        assert error <= max(1.1 * reference[name], bound), name
        assert torch.equal(found[name], again[name]), f"{name}: another result the second time"
    return found


@pytest.mark.parametrize(("case", "dtype", "master", "tf32"), TABLE, ids=str)
def test_products_are_exact(case: Case, dtype: torch.dtype, master: torch.dtype, tf32: bool, precision: None) -> None:
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = tf32
    check(operands(case, dtype, master, "cuda"), tf32)


@pytest.mark.parametrize("density", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("case", [case for case in LARGE if case.block], ids=str)
def test_blocks_are_skipped_exactly_at_any_density(case: Case, density: float) -> None:
    o = operands(replace(case, density=density), BF16, device="cuda")
    found = check(o)
    if not density:
        assert torch.equal(found["y"], o.bias[None, :, None, None].expand_as(found["y"])) and not found["x"].any()


def test_products_replay_in_a_graph() -> None:
    o = operands(STEP, BF16, device="cuda")
    expected, (graph, found) = run(o, "triton"), captured(lambda: run(o, "triton"))
    for tensor in found.values():
        tensor.fill_(float("nan"))
    graph.replay()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_offsets_beyond_two_to_the_31_reach_their_element() -> None:
    # More than 2^31 elements in x; one weight carries its last pixel to the last of y, and back.
    x = torch.zeros(9, 2048, 2048, 64, device="cuda", dtype=BF16).permute(0, 3, 1, 2)
    assert x.numel() > 2**31
    x[-1, 5, -1, -1] = 3.0
    weight = torch.zeros(16, 9 * 64, device="cuda")
    # Position (0, 0) of the kernel, which with zeros after the image alone reads the pixel itself.
    weight[7, 5] = 1.0
    view, leaves = View("hard", torch.tensor([0.5], device="cuda")), (x.requires_grad_(), weight.requires_grad_())
    y = fused_conv2d(x, weight, view, None, Geometry((3, 3), padding=(0, 0, 2, 2)), dtype=BF16, backend="triton")
    assert y.count_nonzero() == 1 and y[-1, 7, -1, -1] == 3.0
    grad_x, grad_weight = torch.autograd.grad(y, leaves, y.detach())
    assert grad_weight.count_nonzero() == 1 and grad_weight[7, 5] == 9.0
    assert grad_x.count_nonzero() == 1 and grad_x[-1, 5, -1, -1] == 3.0
