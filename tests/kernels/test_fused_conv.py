"""Sparse convolutions on the CPU: the references against float64, the op and its registration, walks and tiles."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from cases.fused_conv import CASES, F32, F64, GROUPED, PIXELS, SAME, UNEVEN, Case, answer, errors, operands, run
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend

from tritonsparse.kernels._tiles import Limits
from tritonsparse.kernels.block.topology import Topology
from tritonsparse.kernels.conv._tiles import ConvShape, conv_grad_tiles, conv_tiles
from tritonsparse.kernels.conv.conv2d import fused_conv2d
from tritonsparse.kernels.conv.gemm import conv_grad_input
from tritonsparse.kernels.conv.geometry import phases
from tritonsparse.kernels.conv.grad import conv_grad_weight
from tritonsparse.kernels.weight.view import View


@pytest.mark.parametrize("case", CASES, ids=str)
def test_value_and_all_gradients_equal_the_plain_formulation(case: Case) -> None:
    o = operands(case, F64)
    wrong = errors(o, run(o, "torch"), answer(o))
    assert max(wrong.values()) <= 1e-12, wrong


@pytest.mark.parametrize("case", [case for case in CASES if case.geometry in (UNEVEN, GROUPED)][1:4:2], ids=str)
def test_both_ops_pass_opcheck(case: Case) -> None:
    o = operands(case, F32)
    (kind, threshold, *masks), index = o.view, o.topology
    leaves = [None if each is None else each.requires_grad_() for each in (o.x, o.weight, o.bias, threshold)]
    indices = [None] * 3 if index is None else [index.index, index.input_index, index.grad_index]
    rest = [*masks, *indices, case.geometry.numbers, list(case.block or ()), kind, "torch"]
    torch.library.opcheck(torch.ops.tritonsparse.fused_conv2d.default, (*leaves, *rest))
    saved = [None if each is None else each.detach() for each in (o.x, o.weight, threshold)]
    for needs in ((True, True),) if kind == "soft" else ((True, False), (False, True)):
        backward = (o.grad_y, *saved, *rest, *needs)
        torch.library.opcheck(torch.ops.tritonsparse.fused_conv2d_backward.default, backward)


@pytest.mark.parametrize("case", [CASES[1], CASES[-2]], ids=str)
def test_compiled_it_gives_the_same_numbers_and_moving_the_view_does_not_recompile(case: Case) -> None:
    o, counter = operands(case, F32), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(fused_conv2d, fullgraph=True, backend=counter)
    for step in range(3):
        ours, theirs = run(o, "torch", compiled), run(o, "torch")
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
        o.view.alpha.fill_(0.3 / (step + 1))
        if o.topology is None:
            o.view.threshold.add_(0.3)
        else:
            o.weight.nan_to_num_()
            o.view.mask.copy_(o.view.mask.roll(16, 0))
            assert o.topology.rewrite(o.view.mask, o.view.grad_mask, turn=case.geometry.input_flags)
    assert counter.frame_count == 1


@given(*(st.integers(*ends) for ends in ((1, 5), (1, 5), (0, 6), (1, 4), (1, 20))), st.booleans())
@settings(max_examples=40, deadline=None)
def test_walks_meet_what_touches(kernel: int, stride: int, padding: int, dilation: int, size: int, apart: bool) -> None:
    out = max(0, (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1)
    touching = {(o * stride - padding + t * dilation, t, o) for o in range(out) for t in range(kernel)}
    found = []
    for walk in phases(kernel, stride, padding, dilation, apart):
        for number, h in enumerate(range(walk.first, size, walk.every)):
            for step in range(walk.taps):
                pixel = number * walk.mul + walk.offset + step * walk.step
                if pixel >= 0 and pixel % walk.divisor == 0 and pixel // walk.divisor < out:
                    found.append((h, walk.tap + step * walk.tap_step, pixel // walk.divisor))
    assert len(found) == len(set(found)) and set(found) == {each for each in touching if 0 <= each[0] < size}


@pytest.mark.parametrize("kind", ["soft", "hard", "mask"])
def test_an_infinity_that_meets_pruned_weights_alone_leaves_no_gradient_behind(kind: str) -> None:
    view = View(kind, torch.tensor([0.5])) if kind != "mask" else View(kind, mask=torch.tensor([[True, False]]))
    x = torch.tensor([1.0, float("inf")]).reshape(1, 2, 1, 1)
    grad_weight, _ = conv_grad_weight(torch.ones(1, 1, 1, 1), x, torch.tensor([[2.0, 0.1]]), view, PIXELS)
    assert grad_weight.tolist() == [[1.0, 0.0]]


X, W, KEPT = torch.ones(1, 32, 8, 8), torch.ones(32, 9 * 32), torch.ones(32, 9 * 32, dtype=torch.bool)
HARD, MASK = View("hard", torch.tensor([0.5])), View("mask", mask=KEPT)
WHOLE, NARROW, UNTURNED, OTHER = (
    {"view": MASK, "topology": Topology.of(mask, None, block, turn=turn)}
    for mask, block, turn in (
        (KEPT, (16, 16), SAME.input_flags), (KEPT, (8, 16), SAME.input_flags), (KEPT, (16, 16), None),
        (KEPT[:, :16], (16, 16), PIXELS.input_flags),
    )
)  # fmt: skip


@pytest.mark.parametrize(("message", "changed"), [
    (r'kind "soft", "hard" or "mask", got "step"', {"view": HARD._replace(kind="step")}),
    (r"F a multiple of 3 groups", {"geometry": replace(SAME, groups=3)}),
    (r"expected threshold of shape \[1\] or \[32\]", {"view": View("hard", torch.ones(2, 2))}),
    (r"cast x or run under torch.autocast", {"x": X.double()}),
    (r"expected x to be .* \[B, 32, H, W\]", {"x": X[:, 1:]}),
    (r"at least the dilated kernel", {"x": X[:, :, :0]}),
    (r"expected bias to be torch.float32 \[32\]", {"bias": X[0, 0, 0]}),
    (r'"torch" or "triton", got .fused.', {"backend": "fused"}),
    (r"weight in float16, bfloat16 or float32", {"weight": W.double(), "backend": "triton"}),
    (r'kind "mask" with a topology, got .hard.', WHOLE | {"view": HARD}),
    (r"multiples of 16 .* got \[8, 16\]", NARROW),
    (r"with an input_index, got one without", UNTURNED),
    (r"with a grad_index, got one without", WHOLE | {"view": MASK._replace(grad_mask=KEPT)}),
    (r"index to be contiguous int32", OTHER),
])  # fmt: skip
def test_what_does_not_fit_is_refused_with_the_remedy(message: str, changed: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=message):
        fused_conv2d(**{"x": X, "weight": W, "view": HARD, "bias": None, "geometry": SAME} | changed)


def test_gradients_of_images_of_another_size_are_refused() -> None:
    with pytest.raises(ValueError, match=r"grad_y to be \[9, 9\] pixels"):
        conv_grad_input(X, W, HARD, (9, 9), SAME)
    with pytest.raises(ValueError, match=r"grad_y to be torch.float32 of 1 images"):
        conv_grad_weight(X[:, :, 1:], X, W, HARD, SAME)


def test_configurations_follow_the_shape() -> None:
    h200: dict[str, Any] = {"precision": "ieee", "limits": Limits(232_448, 132)}
    given = h200 | {"weight_bytes": 4, "x_bytes": 2, "masked": False}
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
    grad = conv_grad_tiles(ConvShape(100_352, 64, 64, 9), operand_bytes=2, **h200)
    assert (grad.n, grad.k, grad.splits) == (64, 64, 2 * 132 // 9)
    assert conv_grad_tiles(ConvShape(98, 64, 64, 9), operand_bytes=2, **h200).splits == 1
