"""The convolutions' products against their references in float64, through the interpreter."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import tritonsparse as ts
from tritonsparse.kernels.block.topology import build_index_reference
from tritonsparse.kernels.conv._operands import input_flags
from tritonsparse.kernels.conv._tiles import ConvGradTiles, ConvTiles, Geometry
from tritonsparse.kernels.conv.conv2d import masked_conv2d
from tritonsparse.kernels.conv.gemm import conv_forward, conv_grad_input
from tritonsparse.kernels.conv.grad import conv_grad_weight
from tritonsparse.kernels.weight.forward import view_reference
from tritonsparse.methods import AutoSparse, Static, TopKAST

pytestmark = pytest.mark.usefixtures("poisoned_memory")

Close = Callable[[str, Tensor, Tensor, float], None]

# Of the result's rounding, 2^-11 of each value at most for float16: the expected view is rounded as the kernels' is.
BOUND = {torch.float32: 2e-6, torch.float16: 5e-4, torch.bfloat16: 1e-2}
KINDS = ("soft", "soft per row", "hard", "hard per row", "mask")


def view(kind: str, weight: Tensor, random: torch.Generator) -> dict[str, Any]:
    """The operands of a random view of this weight."""
    if kind == "mask":
        return {"kind": kind, "mask": torch.rand(weight.shape, generator=random) < 0.5}
    name = kind.removesuffix(" per row")
    threshold = torch.rand(weight.shape[0] if "per row" in kind else 1, generator=random)
    return {"kind": name, "threshold": threshold - 0.5 if name == "soft" else threshold}


def exact(operands: dict[str, Any]) -> dict[str, Any]:
    """The same operands in float64."""
    floats = {name: t.double() for name, t in operands.items() if torch.is_tensor(t) and t.is_floating_point()}
    return operands | floats


# Up to two at a time: the interpreter takes seconds for three by three.
pairs = st.sampled_from([(1, 1), (2, 2), (1, 3), (3, 1), (2, 1)])


@settings(max_examples=12)
@given(
    kernel=pairs,
    stride=pairs,
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    padding=st.tuples(*[st.integers(0, 2)] * 4),
    groups=st.sampled_from([1, 1, 2]),
    channels=st.tuples(st.sampled_from([1, 5, 17]), st.sampled_from([1, 6, 19])),
    image=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    batch=st.integers(0, 2),
    kind=st.sampled_from(KINDS),
    dtype=st.sampled_from([torch.float32, torch.float16]),
    flat=st.booleans(),
    splits=st.sampled_from([1, 1, 2, 3]),
    images_last=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_every_product_equals_the_reference_in_float64(
    assert_close: Close,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    dilation: tuple[int, int],
    padding: tuple[int, int, int, int],
    groups: int,
    channels: tuple[int, int],
    image: tuple[int, int],
    batch: int,
    kind: str,
    dtype: torch.dtype,
    flat: bool,
    splits: int,
    images_last: bool,
    seed: int,
) -> None:
    geometry = Geometry(kernel, stride, padding, dilation, groups)
    size = geometry.output(image)
    assume(min(size) >= 1)
    random = torch.Generator().manual_seed(seed)
    inputs, outputs = channels
    weight = torch.randn(groups * outputs, geometry.taps * inputs, generator=random)
    given = view(kind, weight, random) | {"weight": weight, "geometry": geometry}
    x = torch.randn(batch, groups * inputs, *image, generator=random).to(dtype)
    grad_y = torch.randn(batch, groups * outputs, *size, generator=random).to(dtype)
    if images_last:
        x, grad_y = (each.contiguous(memory_format=torch.channels_last) for each in (x, grad_y))
    tiles = ConvTiles(32, 16, 16, flat, splits, 4, 2)

    forward = given | {"x": x, "bias": torch.randn(groups * outputs, generator=random).to(dtype)}
    y = conv_forward(**forward, backend="triton", tiles=tiles)
    whole = {"threshold": None, "kind": "mask", "mask": torch.ones_like(weight, dtype=torch.bool)}
    whole["weight"] = view_reference(weight, given.get("threshold"), given.get("mask"), given["kind"], dtype)
    assert_close("y", y, conv_forward(**exact(forward | whole)).to(dtype), BOUND[dtype])
    backward = given | {"grad_y": grad_y, "image": image}
    grad_x = conv_grad_input(**backward, backend="triton", tiles=tiles)
    assert_close("grad_x", grad_x, conv_grad_input(**exact(backward | whole)).to(dtype), BOUND[dtype])
    assert all(each.permute(0, 2, 3, 1).is_contiguous() for each in (y, grad_x))

    both = given | {"x": x, "grad_y": grad_y, "alpha": torch.tensor(0.25)}
    both["grad_mask"] = torch.rand(weight.shape, generator=random) < 0.6
    sums = ConvGradTiles(16, 16, 16, flat, splits, 1, 4, 2)
    grad_weight, grad_threshold = conv_grad_weight(**both, backend="triton", tiles=sums)
    expected = conv_grad_weight(**exact(both))
    # Products of float16 are exact in float32, in which dW stays.
    assert_close("grad_weight", grad_weight, expected[0].float(), BOUND[torch.float32])
    if kind.startswith("soft"):
        # A sum that cancels: measured against its terms.
        scale = expected[0].norm().item()
        assert (grad_threshold - expected[1]).norm().item() <= 1e-5 * scale


STRIDED = Geometry((2, 2), (2, 3), (1, 1, 0, 1), (1, 2), 2)


@pytest.mark.parametrize(
    ("geometry", "block", "kind"),
    [
        (Geometry((3, 2), (1, 1), (1, 0, 1, 1)), (16, 32), "soft per row"),
        (STRIDED, (48, 16), "mask"),
        (STRIDED, (16, 16), "whole"),
    ],
    ids=["one group", "strided groups", "an index alone"],
)
def test_blocks_outside_the_index_are_neither_read_nor_written_by_any_product(
    assert_close: Close, geometry: Geometry, block: tuple[int, int], kind: str
) -> None:
    random = torch.Generator().manual_seed(0)
    n, k = 48, 32
    weight = torch.randn(n * geometry.groups, geometry.taps * k, generator=random)
    flags = torch.rand(weight.shape[0] // block[0], weight.shape[1] // block[1], generator=random) < 0.4
    flags[0] = False
    listed = flags.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    given: dict[str, Any] = {"kind": "mask"} if kind == "whole" else view(kind, weight, random)
    # Only what is listed may be read.
    given |= {"weight": torch.where(listed, weight, torch.nan), "geometry": geometry, "block": block}
    x = torch.randn(1, k * geometry.groups, 4, 5, generator=random)
    grad_y = torch.randn(1, weight.shape[0], *geometry.output((4, 5)), generator=random)
    index, turned = build_index_reference(flags), build_index_reference(input_flags(flags, geometry))
    clean = {"weight": torch.where(listed, weight, 0.0)}
    for splits in (1, 2) if kind == "whole" else (1,):
        tiles, sums = ConvTiles(32, 16, 16, False, splits, 4, 2), ConvGradTiles(32, 16, 16, False, splits, 1, 4, 2)
        forward = given | {"x": x, "index": index}
        y = conv_forward(**forward, backend="triton", tiles=tiles)
        assert_close("y", y, conv_forward(**exact(forward | clean)).float(), BOUND[torch.float32])
        backward = given | {"grad_y": grad_y, "image": (4, 5), "index": turned}
        grad_x = conv_grad_input(**backward, backend="triton", tiles=tiles)
        assert_close("grad_x", grad_x, conv_grad_input(**exact(backward | clean)).float(), BOUND[torch.float32])
        both = given | {"x": x, "grad_y": grad_y, "index": index, "alpha": torch.tensor(0.5)}
        grad_weight, grad_threshold = conv_grad_weight(**both, backend="triton", tiles=sums)
        expected = conv_grad_weight(**exact(both | clean))
        assert_close("grad_weight", grad_weight, expected[0].float(), BOUND[torch.float32])
        assert not grad_weight[~listed].any()
        if "soft" in kind:
            assert_close("grad_threshold", grad_threshold, expected[1].float(), 1e-5)


def test_bfloat16_products_are_upcast_under_the_interpreter(assert_close: Close) -> None:
    random = torch.Generator().manual_seed(0)
    geometry = Geometry((2, 2), padding=(0, 1, 1, 0))
    weight = torch.randn(20, 4 * 18, generator=random)
    x = torch.randn(1, 18, 4, 4, generator=random).bfloat16()
    given = view("soft", weight, random) | {"weight": weight, "geometry": geometry, "x": x}
    y = conv_forward(**given, backend="triton", tiles=ConvTiles(16, 16, 16))
    assert_close("y", y, conv_forward(**exact(given)).bfloat16(), BOUND[torch.bfloat16])


@pytest.mark.parametrize("stride", [(1, 1), (2, 1)])
def test_kernels_of_more_positions_than_a_register_has_bits_and_far_strides(
    stride: tuple[int, int], assert_close: Close
) -> None:
    random = torch.Generator().manual_seed(0)
    geometry = Geometry((17, 1), stride, (9, 0, 8, 0))
    weight = torch.randn(16, 17 * 16, generator=random)
    flags = torch.rand(1, 17, generator=random) < 0.5
    view: dict[str, Any] = {"kind": "mask", "weight": weight, "geometry": geometry, "block": (16, 16)}
    x, grad_y = (torch.randn(1, 16, *size, generator=random) for size in ((6, 2), geometry.output((6, 2))))
    # A batch of one whose next image would lie beyond 2^31: offsets are then of 64 bits.
    last = [each.contiguous(memory_format=torch.channels_last) for each in (x, grad_y)]
    x, grad_y = (each.as_strided(each.shape, (2**31, *each.stride()[1:])) for each in last)
    forward = view | {"x": x, "index": build_index_reference(flags)}
    y = conv_forward(**forward, backend="triton")
    assert_close("y", y, conv_forward(**exact(forward)).float(), BOUND[torch.float32])
    turned = build_index_reference(input_flags(flags, geometry))
    backward = view | {"grad_y": grad_y, "image": (6, 2), "index": turned}
    grad_x = conv_grad_input(**backward, backend="triton")
    assert_close("grad_x", grad_x, conv_grad_input(**exact(backward)).float(), BOUND[torch.float32])


def test_an_image_without_positions_to_read_gives_the_bias_and_zeros() -> None:
    """A 1 x 1 kernel at every third pixel: no other pixel has a gradient; padding gives the bias."""
    geometry = Geometry((1, 1), (3, 3), (1, 1, 1, 1))
    weight, bias = torch.randn(3, 2), torch.randn(3)
    mask = {"kind": "mask", "mask": torch.ones(3, 2, dtype=torch.bool), "geometry": geometry, "backend": "triton"}
    y = conv_forward(torch.randn(1, 2, 5, 5), weight, bias, **mask)
    assert y.shape == (1, 3, 3, 3)
    assert torch.equal(y[:, :, 0], bias[None, :, None].expand(1, 3, 3))
    grad_x = conv_grad_input(torch.ones(1, 3, 3, 3), weight, (5, 5), **mask)
    touched = torch.zeros(5, 5, dtype=torch.bool)
    touched[2, 2] = True
    assert torch.equal(grad_x[0, 0] != 0, touched) and torch.equal(grad_x[0, 1] != 0, touched)


def test_computed_configurations_give_the_reference_and_a_product_of_pixels_is_one(assert_close: Close) -> None:
    random = torch.Generator().manual_seed(0)
    for kernel, stride, inputs in (((1, 1), (1, 1), 20), ((3, 3), (2, 2), 3)):
        weight = torch.randn(24, kernel[0] * kernel[1] * inputs, generator=random)
        how: dict[str, Any] = {"kernel": kernel, "stride": stride, "alpha": torch.tensor(0.5)}
        given = view("soft", weight, random)
        x, bias = torch.randn(2, inputs, 5, 4, generator=random), torch.randn(24, generator=random)
        found = {}
        for backend in ("torch", "fused"):
            leaves = [each.clone().requires_grad_() for each in (x, weight, bias, given["threshold"])]
            y = masked_conv2d(*leaves[:3], **how, kind="soft", threshold=leaves[3], backend=backend)
            grads = torch.autograd.grad(y, leaves, torch.linspace(-1, 1, y.numel()).reshape(y.shape))
            found[backend] = [y.detach(), *grads]
        for name, ours, theirs in zip(
            ("y", "x", "weight", "bias", "threshold"), *reversed(found.values()), strict=True
        ):
            assert_close(name, ours, theirs, 1e-5)


METHODS: dict[str, Any] = {
    "fused soft": AutoSparse(threshold_init=-2.0, alpha=0.5, alpha_schedule="constant", backward_density=0.7),
    "fused mask": TopKAST(sparsity=0.6, backward_sparsity=0.3, alpha=0.25),
    "block mask": Static(sparsity=0.5),
    "block larger": TopKAST(sparsity=0.6, backward_sparsity=0.3, alpha=0.25),
}


@pytest.mark.parametrize("case", METHODS)
@pytest.mark.parametrize(("padding", "mode"), [(1, "zeros"), ("same", "zeros"), ((0, 1), "circular")], ids=str)
def test_a_layer_gives_what_its_reference_gives(case: str, padding: Any, mode: str, assert_close: Close) -> None:
    backend = case.partition(" ")[0]
    torch.manual_seed(0)
    stride, groups = (1, 1) if padding == "same" else (2, 2), 1 if mode == "zeros" else 2
    stock = nn.Conv2d(32, 32, (2, 1), stride=stride, padding=padding, padding_mode=mode, groups=groups)
    nn.init.normal_(stock.weight, std=0.2)
    # One of these is a copy as a matrix, the other a view.
    stock.to(memory_format=torch.channels_last if mode == "zeros" else torch.contiguous_format)
    x = torch.randn(1, 32, 4, 3)
    found = {}
    for each in ("torch", backend):
        model = nn.Sequential(copy.deepcopy(stock))
        pattern = "block:16" if backend == "block" else "unstructured"
        ts.sparsify(model, METHODS[case], backend=each, pattern=pattern, total_steps=10, steps_per_epoch=5)
        assert model[0].backend == each
        inputs = x.clone().requires_grad_()
        y = model(inputs)
        y.backward(torch.linspace(-1, 1, y.numel()).reshape(y.shape))
        tensors = {"y": y.detach(), "dx": inputs.grad, "dw": model[0].weight.grad, "db": model[0].bias.grad}
        if model[0].threshold is not None:
            tensors["ds"] = model[0].threshold.grad
        found[each] = tensors
    for name, expected in found["torch"].items():
        assert_close(name, found[backend][name].contiguous(), expected.contiguous(), 1e-5)


def test_narrow_groups_keep_their_view_beside_the_product_and_say_so() -> None:
    model = nn.Sequential(nn.Conv2d(32, 32, 3, groups=32))
    ts.sparsify(model, METHODS["fused mask"], backend="fused", include=["*"], total_steps=10, steps_per_epoch=5)
    assert model[0].backend == "triton" and "32 groups" in model[0].backend_reason
