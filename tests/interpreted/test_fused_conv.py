"""Sparse convolutions through the interpreter: all cases, random ones in random configurations, and layers."""

import copy
from typing import Any

import pytest
import torch
from cases.fused_conv import BF16, CASES, F16, F32, LONG, Case, Operands, answer, errors, operands, run
from cases.matrices import error as relative_error
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

import tritonsparse as ts
from tritonsparse.kernels.conv import gemm, grad
from tritonsparse.kernels.conv._tiles import ConvGradTiles, ConvTiles
from tritonsparse.kernels.conv.geometry import Geometry
from tritonsparse.methods import AutoSparse, Method, Static, TopKAST

pytestmark = pytest.mark.usefixtures("poisoned_memory")

# Of the result's rounding, 2^-11 of each value at most for float16; products of float16 are exact in float32.
BOUND = {F32: 2e-6, F16: 5e-4, BF16: 1e-2}


def check(o: Operands) -> None:
    found = run(o, "triton")
    for name, error in errors(o, found, answer(o)).items():
        assert error <= (1e-5 if name == "threshold" else BOUND[found[name].dtype]), (name, error)


# bfloat16 products are upcast under the interpreter.
@pytest.mark.parametrize(("case", "dtype"), [*((case, F32) for case in CASES), (CASES[1], BF16)], ids=str)
def test_value_and_all_gradients_equal_the_plain_formulation(case: Case, dtype: torch.dtype) -> None:
    check(operands(case, dtype))


def check_configured(o: Operands, flat: bool, splits: int) -> None:
    """In tiles smaller than a block, and in so many parts."""
    tiles, sums = ConvTiles(32, 16, 16, flat, splits, 4, 2), ConvGradTiles(16, 16, 16, flat, splits, 1, 4, 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gemm, "conv_tiles", lambda *_, **__: tiles)
        patch.setattr(grad, "conv_grad_tiles", lambda *_, **__: sums)
        check(o)


# Up to two at a time: the interpreter takes seconds for three by three.
pairs = st.sampled_from([(1, 1), (2, 2), (1, 3), (3, 1), (2, 1)])
geometries = st.builds(
    Geometry, pairs, pairs, st.tuples(*[st.integers(0, 2)] * 4), st.tuples(*[st.integers(1, 2)] * 2),
    st.sampled_from([1, 1, 2]),
)  # fmt: skip
cases = st.builds(
    lambda g, inputs, outputs, **rest: Case(g, inputs=g.groups * inputs, outputs=g.groups * outputs, **rest),
    geometries, st.sampled_from([1, 5, 17]), st.sampled_from([1, 6, 19]), batch=st.integers(0, 2),
    kind=st.sampled_from(["soft", "soft per row", "hard", "hard per row", "mask"]),
    image=st.tuples(st.integers(1, 6), st.integers(1, 6)), channels_last=st.booleans(),
)  # fmt: skip


@settings(max_examples=12)
@given(cases, st.sampled_from([F32, F16]), st.booleans(), st.sampled_from([1, 1, 2, 3]), st.integers(0, 2**16))
def test_every_configuration_is_exact(case: Case, dtype: torch.dtype, flat: bool, splits: int, seed: int) -> None:
    assume(min(case.geometry.output(case.image)) >= 1)
    check_configured(operands(case, dtype, seed=seed), flat, splits)


@pytest.mark.parametrize(("case", "splits"), [(CASES[-5], 1), (CASES[-1], 1), (CASES[-1], 2)], ids=str)
def test_blocks_are_skipped_by_tiles_smaller_than_a_block_and_by_parts(case: Case, splits: int) -> None:
    check_configured(operands(case, F32), False, splits)


def test_images_whose_elements_lie_far_apart_are_read_by_offsets_of_64_bits() -> None:
    o = operands(next(case for case in CASES if case.geometry == LONG and case.block), F32)
    # A batch of one whose next image would lie beyond 2^31.
    x, grad_y = (each.as_strided(each.shape, (2**31, *each.stride()[1:])) for each in (o.x, o.grad_y))
    check(o._replace(x=x, grad_y=grad_y))


SOFT = AutoSparse(threshold_init=-2.0, alpha=0.5, alpha_schedule="constant", backward_density=0.7)
MASK = TopKAST(sparsity=0.6, backward_sparsity=0.3, alpha=0.25)
# Of a convolution, and its images.
SMALL, WIDE = ((9, 12, (3, 2)), (2, 9, 7, 8)), ((32, 32, (2, 1)), (1, 32, 4, 3))
SHAPES: dict[str, tuple[Any, dict[str, Any]]] = {
    "odd": (SMALL, {"stride": 2, "padding": 1}), "odd groups": (SMALL, {"stride": 2, "padding": 1, "groups": 3}),
    "strided": (WIDE, {"stride": 2, "padding": 1}), "same": (WIDE, {"padding": "same"}),
    "circular groups": (WIDE, {"stride": 2, "padding": (0, 1), "padding_mode": "circular", "groups": 2}),
}  # fmt: skip
BLOCKS = (("fused", SOFT), ("fused", MASK), ("block", Static(sparsity=0.5)), ("block", MASK))
LAYERS: list[tuple[str, Method, str, bool]] = [
    *(("triton", method, shape, last) for method in (SOFT, MASK) for shape in [*SHAPES][:2] for last in (False, True)),
    # One of the wide ones is a copy as a matrix, the others are views.
    *((*how, shape, shape != "circular groups") for how in BLOCKS for shape in [*SHAPES][2:]),
]


@pytest.mark.parametrize(("backend", "method", "shape", "last"), LAYERS, ids=lambda each: getattr(each, "name", None))
def test_layers_are_as_their_reference(backend: str, method: Method, shape: str, last: bool) -> None:
    (sizes, images), options = SHAPES[shape]
    torch.manual_seed(0)
    stock = nn.Conv2d(*sizes, **options)
    nn.init.normal_(stock.weight, std=0.2)
    x, found = torch.randn(images), {}
    for each in ("torch", backend):
        model = nn.Sequential(copy.deepcopy(stock))
        pattern = "block:16" if backend == "block" else "unstructured"
        ts.sparsify(model, method, backend=each, pattern=pattern, total_steps=10, steps_per_epoch=5)
        model.to(memory_format=torch.channels_last if last else torch.contiguous_format)
        layer: Any = model[0]
        assert layer.backend.name == each and layer.kind == ("soft" if method is SOFT else "mask")
        inputs = x.clone().requires_grad_()
        y = model(inputs)
        y.backward(torch.linspace(-1, 1, y.numel()).reshape(y.shape))
        found[each] = {"y": y.detach(), "dx": inputs.grad, "dw": layer.weight.grad, "db": layer.bias.grad}
        if layer.threshold is not None:
            found[each]["ds"] = layer.threshold.grad
    for name, expected in found["torch"].items():
        value = found[backend][name]
        assert (value.shape, value.dtype) == (expected.shape, expected.dtype), name
        assert relative_error(value, expected) <= 1e-5, name


def test_narrow_groups_are_not_fused_and_say_so() -> None:
    model = nn.Sequential(nn.Conv2d(32, 32, 3, groups=32))
    ts.sparsify(model, MASK, backend="fused", include=["*"], total_steps=10, steps_per_epoch=5)
    layer: Any = model[0]
    assert layer.backend.name == "triton" and "32 narrow groups" in layer.backend.reason
