"""The op of a sparse convolution against the plain formulation that autograd differentiates by itself, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from tritonsparse.kernels._tiles import Limits
from tritonsparse.kernels.block.topology import build_index_reference
from tritonsparse.kernels.conv._operands import input_flags, kept_blocks
from tritonsparse.kernels.conv._tiles import Geometry, conv_grad_tiles, conv_tiles, phases
from tritonsparse.kernels.conv.conv2d import conv_op_name, masked_conv2d, prefers_fused
from tritonsparse.kernels.conv.gemm import conv_forward, conv_grad_input
from tritonsparse.kernels.conv.grad import conv_grad_weight
from tritonsparse.kernels.plan import choose

F64 = torch.float64
quick = settings(max_examples=40, deadline=None)
H200 = Limits(232_448, 132)

# Kernel, stride, padding (top, left, bottom, right), dilation, groups.
GEOMETRIES = [
    Geometry((3, 3), (1, 1), (1, 1, 1, 1)),
    Geometry((1, 1)),
    Geometry((1, 1), (2, 2)),
    Geometry((3, 2), (2, 3), (0, 1, 2, 0), (2, 1), 2),
    Geometry((4, 4), (1, 1), (1, 1, 2, 2), (1, 1), 4),
]


def operands(geometry: Geometry, kind: str, dtype: torch.dtype = F64) -> dict[str, Any]:
    """8 -> 12 channels; for "soft" no |W| lies within 1e-3 of its T, and W holds an exact 0."""
    weight = torch.randn(12, geometry.taps * 8 // geometry.groups, dtype=dtype)
    threshold = torch.linspace(-2, 0, 12, dtype=dtype) if kind == "soft" else None
    if threshold is not None:
        near = (weight.abs() - threshold.sigmoid()[:, None]).abs() < 1e-3
        weight = torch.where(near, weight + 0.01, weight)
    weight[0, 0] = 0.0
    return {
        "x": torch.randn(2, 8, 11, 10, dtype=dtype, requires_grad=True),
        "weight": weight.requires_grad_(),
        "bias": torch.randn(12, dtype=dtype, requires_grad=True),
        "threshold": None if threshold is None else threshold.requires_grad_(),
        "mask": None if kind == "soft" else torch.rand(weight.shape) < 0.5,
        "grad_mask": torch.rand(weight.shape) < 0.7,
        "alpha": torch.tensor(0.4),
    }


def options(geometry: Geometry) -> dict[str, Any]:
    return {
        "kernel": geometry.kernel,
        "stride": geometry.stride,
        "padding": geometry.padding,
        "dilation": geometry.dilation,
        "groups": geometry.groups,
    }


def plain(
    geometry: Geometry,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    threshold: Tensor | None,
    mask: Tensor | None,
    grad_mask: Tensor,
    alpha: Tensor,
) -> Tensor:
    """u - u.detach() is worth 0 and has gradient 1: `leak` of it is the annealed gradient of pruned weights."""
    if threshold is not None:
        u = weight.abs() - torch.sigmoid(threshold)[:, None]
        leak = alpha.double() * (grad_mask & (u <= 0))
        w_hat = weight.sign() * (u.relu() + leak * (u - u.detach()))
    else:
        assert mask is not None
        w_hat = weight * mask + alpha.double() * (grad_mask & ~mask) * (weight - weight.detach())
    image = w_hat.reshape(12, *geometry.kernel, -1).permute(0, 3, 1, 2)
    top, left, bottom, right = geometry.padding
    wide = F.pad(x, (left, right, top, bottom))
    return F.conv2d(wide, image, bias, geometry.stride, 0, geometry.dilation, geometry.groups)


def grads(y: Tensor, grad_y: Tensor, given: dict[str, Any]) -> dict[str, Tensor]:
    leaves = {name: value for name, value in given.items() if value is not None and value.requires_grad}
    return dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), grad_y), strict=True))


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("kind", ["soft", "mask"])
def test_value_and_all_gradients_equal_the_plain_formulation(kind: str, geometry: Geometry) -> None:
    given = operands(geometry, kind)
    y = masked_conv2d(**given, kind=kind, **options(geometry))
    expected = plain(geometry, **given)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    assert y.permute(0, 2, 3, 1).is_contiguous()
    grad_y = torch.randn_like(y)
    ours, theirs = grads(y, grad_y, given), grads(expected, grad_y, given)
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-11, atol=1e-11, msg=f"d{name}")


def test_a_hand_sized_convolution() -> None:
    """A row of three pixels under a kernel of two positions; T = 1/2 prunes the second, and half of its G comes back.

    dW = [1*1 + 2*2, (1*2 + 2*4)/2] = [5, 5]; dX = [1, 2] under (3/4, 0), each position a pixel further.
    """
    geometry = Geometry((1, 2))
    x = torch.tensor([[[[1.0, 2.0, 4.0]]]], requires_grad=True)
    weight = torch.tensor([[0.75, -0.25]], requires_grad=True)
    view = {"kind": "hard", "threshold": torch.tensor([0.5]), "alpha": torch.tensor(0.5)}
    y = masked_conv2d(x, weight, kernel=geometry.kernel, **view)
    assert y.tolist() == [[[[0.75, 1.5]]]]
    y.backward(torch.tensor([[[[1.0, 2.0]]]]))
    assert x.grad.tolist() == [[[[0.75, 1.5, 0.0]]]]
    assert weight.grad.tolist() == [[5.0, 5.0]]


@pytest.mark.parametrize("kind", ["soft", "mask"])
def test_both_ops_pass_opcheck(kind: str) -> None:
    geometry = GEOMETRIES[3]
    given = operands(geometry, kind, torch.float32)
    how = tuple(list(value) if isinstance(value, tuple) else value for value in options(geometry).values())
    names = ("x", "weight", "bias", "threshold", "mask", "grad_mask", "alpha")
    forward = (*(given[name] for name in names), None, None, None, *how, [], kind, "torch", torch.float32)
    torch.library.opcheck(torch.ops.tritonsparse.masked_conv2d.default, forward)
    tensors = [None if given[n] is None else given[n].detach() for n in names if n != "bias"]
    grad_y = torch.randn(2, 12, *geometry.output((11, 10)))
    for need_x, need_weight in ((True, True),) if kind == "soft" else ((True, False), (False, True)):
        backward = (grad_y, *tensors, None, None, None, *how, [], kind, "torch", need_x, need_weight)
        torch.library.opcheck(torch.ops.tritonsparse.masked_conv2d_backward.default, backward)


def test_compiled_it_gives_the_same_numbers_and_moving_the_view_does_not_recompile() -> None:
    geometry = GEOMETRIES[0]
    given = operands(geometry, "soft", torch.float32)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(masked_conv2d, fullgraph=True, backend=counter)
    for step in range(3):
        y, expected = (op(**given, kind="soft", **options(geometry)) for op in (compiled, masked_conv2d))
        grad_y = torch.randn_like(y)
        ours, theirs = grads(y, grad_y, given), grads(expected, grad_y, given)
        assert torch.equal(y, expected)
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
        given["alpha"].fill_(0.3 / (step + 1))
        given["threshold"].data.add_(0.3)
    assert counter.frame_count == 1


BLOCKED = Geometry((2, 3), (2, 1), (1, 0, 1, 1), (2, 1), 2)


def blocked(kind: str, dtype: torch.dtype = F64) -> tuple[dict[str, Any], Tensor]:
    """Operands with an index of blocks [16, 32] for 2 groups of 32 -> 32 channels, one block row empty; the flags."""
    flags = torch.rand(4, 6) < 0.5
    flags[1] = False
    given = {
        "x": torch.randn(2, 64, 7, 6, dtype=dtype, requires_grad=True),
        "weight": torch.randn(64, 6 * 32, dtype=dtype, requires_grad=True),
        "bias": torch.randn(64, dtype=dtype, requires_grad=True),
        "kind": kind,
        "threshold": torch.zeros(64, dtype=dtype, requires_grad=True) if kind == "soft" else None,
        "index": build_index_reference(flags),
        "input_index": build_index_reference(input_flags(flags, BLOCKED)),
        "block": (16, 32),
    }
    return given, flags


@pytest.mark.parametrize("kind", ["soft", "mask"])
def test_blocks_outside_the_index_count_as_zero_and_get_no_gradient(kind: str) -> None:
    given, flags = blocked(kind)
    listed = flags.repeat_interleave(16, 0).repeat_interleave(32, 1)
    y = masked_conv2d(**given, **options(BLOCKED))
    leaves = {name: value for name, value in given.items() if name in ("x", "weight", "bias", "threshold")}
    view = {"kind": kind, "threshold": given["threshold"], "mask": listed if kind == "mask" else None}
    # Where a block is not listed its weights count as 0, which a soft view prunes.
    masked = {**leaves, "weight": given["weight"] * listed}
    expected = masked_conv2d(**masked | view, **options(BLOCKED))
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    grad_y = torch.randn_like(y)
    ours, theirs = grads(y, grad_y, leaves), grads(expected, grad_y, leaves)
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-11, atol=1e-11, msg=f"d{name}")
    assert not ours["weight"][~listed].any() and ours["weight"][listed].any()


def test_gradients_reach_the_larger_set_of_blocks_or_all_with_alpha() -> None:
    given, flags = blocked("mask")
    mask = flags.repeat_interleave(16, 0).repeat_interleave(32, 1)
    larger = flags | (torch.rand(flags.shape) < 0.3)
    alpha = torch.tensor(0.25)
    given |= {"mask": mask, "alpha": alpha}
    x, weight = given["x"].detach(), given["weight"]
    y = masked_conv2d(**given | {"x": x}, **options(BLOCKED))
    grad_y = torch.randn_like(y)
    w_hat = (weight.detach() * mask).requires_grad_()
    whole = {"kernel": BLOCKED.kernel, "kind": "mask", "mask": torch.ones_like(mask)}
    (dense,) = torch.autograd.grad(masked_conv2d(x, w_hat, None, **options(BLOCKED) | whole), w_hat, grad_y)
    for grad_index, reached in ((None, torch.ones_like(flags)), (build_index_reference(larger), larger)):
        y = masked_conv2d(**given | {"x": x, "grad_index": grad_index}, **options(BLOCKED))
        (grad_weight,) = torch.autograd.grad(y, weight, grad_y)
        b = reached.repeat_interleave(16, 0).repeat_interleave(32, 1)
        expected = torch.where(mask, 1.0, 0.25 * b) * dense
        torch.testing.assert_close(grad_weight, expected, rtol=1e-11, atol=1e-11)


def test_flags_turned_over_for_the_input_gradient_come_back_and_list_each_block_once() -> None:
    flags = torch.rand(4, 12) < 0.5
    geometry = Geometry((2, 3), groups=2)
    turned = input_flags(flags, geometry)
    # Rows: 2 groups of 2 blocks of inputs. Columns: 6 positions of 2 blocks of outputs.
    assert turned.shape == (4, 12)
    for group, out, tap, inp in ((0, 0, 0, 0), (1, 0, 4, 1), (0, 1, 5, 1), (1, 1, 2, 0)):
        assert turned[2 * group + inp, 2 * tap + out] == flags[2 * group + out, 2 * tap + inp]
    assert torch.equal(input_flags(turned, geometry), flags)


@given(st.integers(1, 5), st.integers(1, 6), st.floats(0, 1), st.integers(0, 2**31))
@quick
def test_an_index_gives_its_flags_back(rows: int, columns: int, density: float, seed: int) -> None:
    flags = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) < density
    assert torch.equal(kept_blocks(build_index_reference(flags), rows, columns), flags)


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
    geometry = Geometry((1, 1))
    weight = torch.tensor([[2.0, 0.1]])
    view: dict[str, Any] = {"kind": kind, "threshold": torch.tensor([0.5])}
    if kind == "mask":
        view = {"kind": kind, "mask": torch.tensor([[True, False]])}
    x = torch.tensor([1.0, float("inf")]).reshape(1, 2, 1, 1)
    grad_weight, _ = conv_grad_weight(torch.ones(1, 1, 1, 1), x, weight, geometry=geometry, **view)
    assert grad_weight.tolist() == [[1.0, 0.0]]


def test_what_does_not_fit_is_refused_with_the_remedy() -> None:
    weight, x = torch.randn(32, 9 * 32), torch.randn(1, 32, 8, 8)
    geometry = Geometry((3, 3), padding=(1, 1, 1, 1))
    view: dict[str, Any] = {"kind": "hard", "threshold": torch.tensor([0.5]), "geometry": geometry}
    thirds = Geometry((3, 3), groups=3)
    index = build_index_reference(torch.ones(2, 18, dtype=torch.bool))
    for message, call in (
        (r"kind .soft., .hard. or .mask., got .step.", lambda: conv_forward(x, weight, **view | {"kind": "step"})),
        (r"expected x to be .* \[B, 32, H, W\]", lambda: conv_forward(x[:, 1:], weight, **view)),
        (r"only an index; pass both or neither", lambda: conv_forward(x, weight, **view, index=index)),
        (r"multiples of 16 .* got \[8, 16\]", lambda: conv_forward(x, weight, **view, index=index, block=(8, 16))),
        (r"index to be contiguous int32", lambda: conv_forward(x, weight, **view, index=index[1:], block=(16, 16))),
        (r"F a multiple of 3 groups", lambda: conv_forward(x, weight, **view | {"geometry": thirds})),
        (r"at least the dilated kernel", lambda: conv_forward(x[:, :, :0], weight, **view)),
        (r"grad_y to be \[9, 9\] pixels", lambda: conv_grad_input(x, weight, (9, 9), **view)),
        (r"grad_y to be torch.float32 of 1 images", lambda: conv_grad_weight(x[:, :, 1:], x, weight, **view)),
        (r"cast x or run under torch.autocast", lambda: masked_conv2d(
            x.double(), weight, kernel=(3, 3), kind="hard", threshold=torch.tensor([0.5]))),
        (r'"torch" or "fused", got .triton.', lambda: masked_conv2d(
            x, weight, kernel=(3, 3), kind="hard", threshold=torch.tensor([0.5]), backend="triton")),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            call()


def test_configurations_follow_the_shape() -> None:
    given: dict[str, Any] = {"groups": 1, "weight_bytes": 4, "x_bytes": 2, "mask_bytes": 0, "precision": "ieee"}
    wide = conv_tiles(100_352, 64, 64, 9, **given, limits=H200)
    assert (wide.m, wide.n, wide.k, wide.splits, wide.flat) == (256, 64, 64, 1, False)
    # ResNet-50's last 3 x 3 at batch 32: too few positions for 132 multiprocessors, so the reduction is split.
    late = conv_tiles(1_568, 512, 512, 9, **given, limits=H200)
    assert late.splits > 1 and (-(-1_568 // late.m)) * (512 // late.n) * late.splits <= 2 * 132
    stem = conv_tiles(401_408, 64, 3, 49, **given, limits=H200)
    assert stem.flat and stem.k == 32
    blocks = conv_tiles(100_352, 64, 64, 9, **given, limits=H200, block=(48, 96))
    # 16 is the largest power of two that divides 48, and 32 that of 96.
    assert (blocks.n, blocks.k, blocks.flat) == (16, 32, False)
    grad = conv_grad_tiles(100_352, 64, 64, 9, groups=1, operand_bytes=2, precision="ieee", limits=H200)
    assert (grad.n, grad.k, grad.splits) == (64, 64, 2 * 132 // 9)
    few = conv_grad_tiles(98, 64, 64, 9, groups=1, operand_bytes=2, precision="ieee", limits=H200)
    assert few.splits == 1


def test_auto_takes_a_fused_convolution_only_where_every_product_was_measured_faster(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    geometry = Geometry((3, 3), (2, 2), (1, 1, 1, 1))
    name = conv_op_name("conv_forward", geometry)
    assert name == "conv_forward 3x3/2x2"
    choice = choose(name, 25_088, 128, 1_152, torch.bfloat16, "soft", "NVIDIA H200", table=())
    assert (choice.fused, choice.source) == (False, "analytic") and "measured" in choice.reason
    entry = {
        "device": "some-gpu", "op": name, "m": 25_088, "n": 128, "k": 1_152, "dtype": "bfloat16", "kind": "soft",
        "beside_ms": 2.0, "inside_ms": 1.0,
    }  # fmt: skip
    assert choose(name, 25_088, 128, 1_152, torch.bfloat16, "soft", "Some GPU", table=(entry,)).fused
    table = [entry]
    monkeypatch.setattr("tritonsparse.kernels.plan.read_table", lambda: tuple(table))
    shape = (geometry, 32, (56, 56), 128, 1_152, torch.bfloat16, "soft", "Some GPU")
    prefers_fused.cache_clear()
    assert prefers_fused(*shape, False) and not prefers_fused(*shape, True)
    table += [entry | {"op": conv_op_name(op, geometry)} for op in ("conv_grad_input", "conv_grad_weight")]
    prefers_fused.cache_clear()
    assert prefers_fused(*shape, True)
    table[-1] = table[-1] | {"inside_ms": 3.0}
    prefers_fused.cache_clear()
    assert not prefers_fused(*shape, True)
    prefers_fused.cache_clear()
