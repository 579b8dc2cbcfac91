"""Sparse convolutions on a GPU: every case in bfloat16, large ones in all dtypes, tf32, graphs, offsets beyond 2^31.

A bound is 1.1 times the error that the reference makes on the same data in the dtypes of the case, at least that of
`tolerances.py`: relative RMS against float64.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tolerances import CANCELLING, product_bound
from torch import Tensor

# At the end of the path: the folder's modules have names of their own.
sys.path.append(str(Path(__file__).parents[1] / "kernels"))

from cases.fused_conv import CASES, LARGE, Case, Operands, answer, errors, operands, run

from tritonsparse.kernels.conv.conv2d import fused_conv2d
from tritonsparse.kernels.conv.geometry import Geometry
from tritonsparse.kernels.weight.view import View

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.usefixtures("poisoned_memory"),
]

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# Case, product, master, tf32: every case, then every kind and dtype on one: each compiles its own kernels.
STEP = LARGE[2]
TABLE = [
    *((case, BF16, FP32, False) for case in CASES + LARGE),
    *((replace(STEP, kind=kind), BF16, FP32, False) for kind in ("soft", "hard", "mask")),
    *((STEP, FP16, FP32, False), (STEP, FP32, FP32, False), (STEP, FP32, FP32, True), (STEP, BF16, BF16, False)),
]


def check(o: Operands, tf32: bool = False) -> dict[str, Tensor]:
    """What the kernels give, and give again, is within its bounds; returned."""
    case, expected, found, again = o.case, answer(o), run(o, "triton"), run(o, "triton")
    reference = errors(o, run(o, "torch"), expected)
    pixels = case.batch * o.grad_y.shape[2:].numel()
    channels = {"y": case.inputs, "x": case.outputs}
    for name, error in errors(o, found, expected).items():
        length = case.geometry.taps * channels[name] // case.geometry.groups if name in channels else pixels
        # dW stays in float32; so does the sum over it, whose bound is in its terms.
        out = FP32 if name == "threshold" else found[name].dtype
        bound = product_bound(o.x.dtype, out, length, "tf32" if tf32 else "full float32")
        bound *= CANCELLING if name == "threshold" else 1
        assert error <= max(1.1 * reference[name], bound), name
        assert torch.equal(found[name], again[name]), f"{name}: another result the second time"
    return found


@contextmanager
def float32_products(tf32: bool) -> Iterator[None]:
    """Ours and the library's in tf32, or both in full float32."""
    before, library = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = tf32
    yield
    torch.set_float32_matmul_precision(before)
    torch.backends.cudnn.allow_tf32 = library


@pytest.mark.parametrize(("case", "dtype", "master", "tf32"), TABLE, ids=str)
def test_every_product_is_as_exact_as_the_unfused_reference(
    case: Case, dtype: torch.dtype, master: torch.dtype, tf32: bool
) -> None:
    with float32_products(tf32):
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
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        expected = run(o, "triton")
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(o, "triton")
    for tensor in captured.values():
        tensor.fill_(float("nan"))
    graph.replay()
    assert all(torch.equal(captured[name], expected[name]) for name in expected)


def test_offsets_beyond_two_to_the_31_reach_their_element() -> None:
    # More than 2^31 elements in x; one weight carries its last pixel to the last of y, and back.
    batch, channels, height, width = 9, 64, 2048, 2048
    assert batch * channels * height * width > 2**31
    x = torch.zeros(batch, height, width, channels, device="cuda", dtype=BF16).permute(0, 3, 1, 2)
    x[-1, 5, -1, -1] = 3.0
    weight = torch.zeros(16, 9 * channels, device="cuda")
    # Position (0, 0) of the kernel, which with zeros after the image alone reads the pixel itself.
    weight[7, 5] = 1.0
    view, geometry = View("hard", torch.tensor([0.5], device="cuda")), Geometry((3, 3), padding=(0, 0, 2, 2))
    for leaf in (x, weight):
        leaf.requires_grad_()
    y = fused_conv2d(x, weight, view, None, geometry, dtype=BF16, backend="triton")
    assert y.count_nonzero() == 1 and y[-1, 7, -1, -1] == 3.0
    grad_x, grad_weight = torch.autograd.grad(y, (x, weight), y.detach())
    assert grad_weight.count_nonzero() == 1 and grad_weight[7, 5] == 9.0
    assert grad_x.count_nonzero() == 1 and grad_x[-1, 5, -1, -1] == 3.0
