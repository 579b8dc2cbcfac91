"""Sparse convolutions on the CPU: the references against float64, the op and its registration, walks and tiles."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

# At the end of the path: the folder's modules have names of their own.
sys.path.append(str(Path(__file__).parent))

from cases.fused_conv import CASES, GROUPED, SAME, UNEVEN, Case, answer, errors, operands, run

from tritonsparse.kernels._tiles import Limits
from tritonsparse.kernels.block.topology import Topology
from tritonsparse.kernels.conv._tiles import ConvShape, conv_grad_tiles, conv_tiles
from tritonsparse.kernels.conv.conv2d import fused_conv2d
from tritonsparse.kernels.conv.gemm import conv_grad_input
from tritonsparse.kernels.conv.geometry import Geometry, phases
from tritonsparse.kernels.conv.grad import conv_grad_weight
from tritonsparse.kernels.weight.view import View

quick = settings(max_examples=40, deadline=None)
H200 = Limits(232_448, 132)
FP32 = torch.float32


@pytest.mark.parametrize("case", CASES, ids=str)
def test_value_and_all_gradients_equal_the_plain_formulation(case: Case) -> None:
    o = operands(case, torch.float64)
    wrong = errors(o, run(o, "torch"), answer(o))
    assert max(wrong.values()) <= 1e-12, wrong


def test_a_hand_sized_convolution() -> None:
    """A row of three pixels under a kernel of two positions; T = 1/2 prunes the second, and half of its G comes back.

    dW = [1*1 + 2*2, (1*2 + 2*4)/2] = [5, 5]; dX = [1, 2] under (3/4, 0), each position a pixel further.
    """
    x = torch.tensor([[[[1.0, 2.0, 4.0]]]], requires_grad=True)
    weight = torch.tensor([[0.75, -0.25]], requires_grad=True)
    view = View("hard", torch.tensor([0.5]), alpha=torch.tensor(0.5))
    y = fused_conv2d(x, weight, view, None, Geometry((1, 2)))
    assert y.tolist() == [[[[0.75, 1.5]]]]
    y.backward(torch.tensor([[[[1.0, 2.0]]]]))
    assert x.grad.tolist() == [[[[0.75, 1.5, 0.0]]]]
    assert weight.grad.tolist() == [[5.0, 5.0]]


@pytest.mark.parametrize("case", [case for case in CASES if case.geometry in (UNEVEN, GROUPED)][1:4:2], ids=str)
def test_both_ops_pass_opcheck(case: Case) -> None:
    o = operands(case, FP32)
    (kind, threshold, *masks), index = o.view, o.topology
    leaves = [each.requires_grad_() for each in (o.x, o.weight, o.bias)]
    threshold = None if threshold is None else threshold.requires_grad_()
    indices = [None] * 3 if index is None else [index.index, index.input_index, index.grad_index]
    how = [case.geometry.numbers, list(case.block or ()), kind, "torch"]
    torch.library.opcheck(torch.ops.tritonsparse.fused_conv2d.default, (*leaves, threshold, *masks, *indices, *how))
    saved = [None if each is None else each.detach() for each in (o.x, o.weight, threshold)]
    for needs in ((True, True),) if kind == "soft" else ((True, False), (False, True)):
        backward = (o.grad_y, *saved, *masks, *indices, *how, *needs)
        torch.library.opcheck(torch.ops.tritonsparse.fused_conv2d_backward.default, backward)


def test_compiled_it_gives_the_same_numbers_and_moving_the_view_does_not_recompile() -> None:
    o = operands(CASES[1], FP32)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(fused_conv2d, fullgraph=True, backend=counter)
    for step in range(3):
        ours, theirs = run(o, "torch", compiled), run(o, "torch")
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
        o.view.alpha.fill_(0.3 / (step + 1))
        o.view.threshold.add_(0.3)
    assert counter.frame_count == 1


def test_flags_turned_over_for_the_input_gradient_come_back_and_list_each_block_once() -> None:
    flags = torch.rand(4, 12) < 0.5
    geometry = Geometry((2, 3), groups=2)
    turned = geometry.input_flags(flags)
    # Rows: 2 groups of 2 blocks of inputs. Columns: 6 positions of 2 blocks of outputs.
    assert turned.shape == (4, 12)
    for group, out, tap, inp in ((0, 0, 0, 0), (1, 0, 4, 1), (0, 1, 5, 1), (1, 1, 2, 0)):
        assert turned[2 * group + inp, 2 * tap + out] == flags[2 * group + out, 2 * tap + inp]
    assert torch.equal(geometry.input_flags(turned), flags)


@given(
    st.integers(1, 5), st.integers(1, 5), st.integers(0, 6), st.integers(1, 4), st.integers(1, 20), st.booleans()
)  # fmt: skip
@quick
def test_walks_of_the_input_gradient_meet_every_pixel_and_position_that_touch(
    kernel: int, stride: int, padding: int, dilation: int, size: int, apart: bool
) -> None:
    out = (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
    wanted = {
        (o * stride - padding + t * dilation, t, o)
        for o in range(max(0, out))
        for t in range(kernel)
        if 0 <= o * stride - padding + t * dilation < size
    }
    found = []
    for walk in phases(kernel, stride, padding, dilation, apart):
        for number, h in enumerate(range(walk.first, size, walk.every)):
            for step in range(walk.taps):
                pixel = number * walk.mul + walk.offset + step * walk.step
                if pixel >= 0 and pixel % walk.divisor == 0 and pixel // walk.divisor < max(0, out):
                    found.append((h, walk.tap + step * walk.tap_step, pixel // walk.divisor))
    assert len(found) == len(set(found)) and set(found) == wanted


@pytest.mark.parametrize("kind", ["soft", "hard", "mask"])
def test_an_infinity_that_meets_pruned_weights_alone_leaves_no_gradient_behind(kind: str) -> None:
    view = View(kind, torch.tensor([0.5])) if kind != "mask" else View(kind, mask=torch.tensor([[True, False]]))
    x = torch.tensor([1.0, float("inf")]).reshape(1, 2, 1, 1)
    grad_weight, _ = conv_grad_weight(torch.ones(1, 1, 1, 1), x, torch.tensor([[2.0, 0.1]]), view, Geometry((1, 1)))
    assert grad_weight.tolist() == [[1.0, 0.0]]


X, WEIGHT = torch.ones(1, 32, 8, 8), torch.ones(32, 9 * 32)
KEPT = torch.ones(32, 9 * 32, dtype=torch.bool)
HARD, MASK = View("hard", torch.tensor([0.5])), View("mask", mask=KEPT)
WHOLE = Geometry((3, 3), padding=SAME)


def topology(mask: Tensor = KEPT, block: tuple[int, int] = (16, 16), turn: Any = WHOLE.input_flags) -> Topology:
    return Topology.of(mask, None, block, turn=turn)


@pytest.mark.parametrize(
    ("message", "changed"),
    [
        (r'kind "soft", "hard" or "mask", got "step"', {"view": HARD._replace(kind="step")}),
        (r"F a multiple of 3 groups", {"geometry": replace(WHOLE, groups=3)}),
        (r"expected threshold of shape \[1\] or \[32\]", {"view": View("hard", torch.ones(2, 2))}),
        (r"cast x or run under torch.autocast", {"x": X.double()}),
        (r"expected x to be .* \[B, 32, H, W\]", {"x": X[:, 1:]}),
        (r"at least the dilated kernel", {"x": X[:, :, :0]}),
        (r"expected bias to be torch.float32 \[32\]", {"bias": X[0, 0, 0]}),
        (r'"torch" or "triton", got .fused.', {"backend": "fused"}),
        (r"weight in float16, bfloat16 or float32", {"weight": WEIGHT.double(), "backend": "triton"}),
        (r'kind "mask" beside a topology, got .hard.', {"topology": topology()}),
        (r"multiples of 16 .* got \[8, 16\]", {"view": MASK, "topology": topology(block=(8, 16))}),
        (r"with an input_index, got one without", {"view": MASK, "topology": topology(turn=None)}),
        (r"with a grad_index, got one without", {"view": MASK._replace(grad_mask=KEPT), "topology": topology()}),
        (
            r"index to be contiguous int32",
            {"view": MASK, "topology": topology(KEPT[:, :16], turn=Geometry((1, 1)).input_flags)},
        ),
    ],
)
def test_what_does_not_fit_is_refused_with_the_remedy(message: str, changed: dict[str, Any]) -> None:
    fitting: dict[str, Any] = {"x": X, "weight": WEIGHT, "view": HARD, "bias": None, "geometry": WHOLE}
    fused_conv2d(**fitting)
    with pytest.raises(ValueError, match=message):
        fused_conv2d(**fitting | changed)


def test_gradients_of_images_of_another_size_are_refused() -> None:
    with pytest.raises(ValueError, match=r"grad_y to be \[9, 9\] pixels"):
        conv_grad_input(X, WEIGHT, HARD, (9, 9), WHOLE)
    with pytest.raises(ValueError, match=r"grad_y to be torch.float32 of 1 images"):
        conv_grad_weight(X[:, :, 1:], X, WEIGHT, HARD, WHOLE)


def test_configurations_follow_the_shape() -> None:
    given: dict[str, Any] = {"weight_bytes": 4, "x_bytes": 2, "masked": False, "precision": "ieee", "limits": H200}
    wide = conv_tiles(ConvShape(100_352, 64, 64, 9), **given)
    assert (wide.m, wide.n, wide.k, wide.splits, wide.flat) == (256, 64, 64, 1, False)
    # ResNet-50's last 3 x 3 at batch 32: too few positions for 132 multiprocessors, so the reduction is split.
    late = conv_tiles(ConvShape(1_568, 512, 512, 9), **given)
    assert late.splits > 1 and (-(-1_568 // late.m)) * (512 // late.n) * late.splits <= 2 * 132
    stem = conv_tiles(ConvShape(401_408, 64, 3, 49), **given)
    assert stem.flat and stem.k == 32
    blocks = conv_tiles(ConvShape(100_352, 64, 64, 9), **given, block=(48, 96))
    # 16 is the largest power of two that divides 48, and 32 that of 96.
    assert (blocks.n, blocks.k, blocks.flat) == (16, 32, False)
    grad = conv_grad_tiles(ConvShape(100_352, 64, 64, 9), operand_bytes=2, precision="ieee", limits=H200)
    assert (grad.n, grad.k, grad.splits) == (64, 64, 2 * 132 // 9)
    assert conv_grad_tiles(ConvShape(98, 64, 64, 9), operand_bytes=2, precision="ieee", limits=H200).splits == 1


def test_a_geometry_is_a_list_of_numbers_and_back() -> None:
    assert Geometry.of_numbers(GROUPED.numbers) == GROUPED
