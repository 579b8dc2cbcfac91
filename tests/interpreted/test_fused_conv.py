"""Sparse convolutions through the interpreter: every case by the op, and random ones under random configurations."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

# At the end of the path: the folder's modules have names of their own.
sys.path.append(str(Path(__file__).parents[1] / "kernels"))

from cases.fused_conv import CASES, Case, Operands, answer, errors, operands, run

from tritonsparse.kernels.conv._operands import Blocks
from tritonsparse.kernels.conv._tiles import ConvGradTiles, ConvTiles
from tritonsparse.kernels.conv.gemm import conv_forward, conv_grad_input
from tritonsparse.kernels.conv.geometry import Geometry
from tritonsparse.kernels.conv.grad import conv_grad_weight

pytestmark = pytest.mark.usefixtures("poisoned_memory")

# Of the result's rounding, 2^-11 of each value at most for float16; products of float16 are exact in float32.
BOUND = {torch.float32: 2e-6, torch.float16: 5e-4, torch.bfloat16: 1e-2}


def check(o: Operands, found: dict[str, Tensor]) -> None:
    wrong = errors(o, found, answer(o))
    bounds = {name: 1e-5 if name == "threshold" else BOUND[value.dtype] for name, value in found.items()}
    assert {name: error for name, error in wrong.items() if not error <= bounds[name]} == {}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_value_and_all_gradients_equal_the_plain_formulation(case: Case) -> None:
    o = operands(case, torch.float32)
    check(o, run(o, "triton"))


def test_bfloat16_products_are_upcast_under_the_interpreter() -> None:
    o = operands(CASES[1], torch.bfloat16)
    check(o, run(o, "triton"))


def products(o: Operands, tiles: ConvTiles, sums: ConvGradTiles) -> dict[str, Tensor]:
    """The three products, each configured so."""
    geometry, topology = o.case.geometry, o.topology
    visited = turned = due = None
    if topology is not None:
        visited, turned = (Blocks(each, topology.block) for each in (topology.index, topology.input_index))
        due = visited if topology.grad_index is None else Blocks(topology.grad_index, topology.block)
    how = {"backend": "triton", "tiles": tiles}
    y = conv_forward(o.x, o.weight, o.view, o.bias, geometry, visited, **how)
    grad_x = conv_grad_input(o.grad_y, o.weight, o.view, o.case.image, geometry, turned, **how)
    assert all(each.permute(0, 2, 3, 1).is_contiguous() for each in (y, grad_x))
    grad_weight, of_threshold = conv_grad_weight(
        o.grad_y, o.x, o.weight, o.view, geometry, due, backend="triton", tiles=sums
    )
    found = {"y": y, "x": grad_x, "weight": grad_weight, "threshold": of_threshold}
    return {name: each for name, each in found.items() if each is not None}


# Up to two at a time: the interpreter takes seconds for three by three.
pairs = st.sampled_from([(1, 1), (2, 2), (1, 3), (3, 1), (2, 1)])
geometries = st.builds(
    Geometry, pairs, pairs, st.tuples(*[st.integers(0, 2)] * 4), st.tuples(*[st.integers(1, 2)] * 2),
    st.sampled_from([1, 1, 2]),
)  # fmt: skip


@settings(max_examples=12)
@given(
    geometry=geometries,
    channels=st.tuples(st.sampled_from([1, 5, 17]), st.sampled_from([1, 6, 19])),
    image=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    batch=st.integers(0, 2),
    kind=st.sampled_from(["soft", "soft per row", "hard", "hard per row", "mask"]),
    dtype=st.sampled_from([torch.float32, torch.float16]),
    flat=st.booleans(),
    splits=st.sampled_from([1, 1, 2, 3]),
    channels_last=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_every_configuration_gives_the_plain_formulation(
    geometry: Geometry,
    channels: tuple[int, int],
    image: tuple[int, int],
    batch: int,
    kind: str,
    dtype: torch.dtype,
    flat: bool,
    splits: int,
    channels_last: bool,
    seed: int,
) -> None:
    assume(min(geometry.output(image)) >= 1)
    inputs, outputs = (geometry.groups * each for each in channels)
    case = Case(geometry, kind, "B", batch, inputs, outputs, image, channels_last=channels_last)
    o = operands(case, dtype, seed=seed)
    check(o, products(o, ConvTiles(32, 16, 16, flat, splits, 4, 2), ConvGradTiles(16, 16, 16, flat, splits, 1, 4, 2)))


@pytest.mark.parametrize(("case", "splits"), [(CASES[-5], 1), (CASES[-1], 1), (CASES[-1], 2)], ids=str)
def test_blocks_are_skipped_by_tiles_smaller_than_a_block_and_by_parts(case: Case, splits: int) -> None:
    o = operands(case, torch.float32)
    found = products(o, ConvTiles(32, 16, 16, False, splits, 4, 2), ConvGradTiles(32, 16, 16, False, splits, 1, 4, 2))
    check(o, found)


def test_images_whose_elements_lie_far_apart_are_read_by_offsets_of_64_bits() -> None:
    o = operands(CASES[14], torch.float32)
    # A batch of one whose next image would lie beyond 2^31.
    x, grad_y = (each.as_strided(each.shape, (2**31, *each.stride()[1:])) for each in (o.x, o.grad_y))
    far = replace(o, x=x, grad_y=grad_y)
    check(o, run(far, "triton"))
