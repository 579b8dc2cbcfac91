"""The convolutions' kernels on a GPU: bfloat16, odd shapes, strides, groups, blocks, tf32, graphs, offsets beyond 2^31.

A bound is 1.1 times the error that the reference makes on the same data in the dtypes of the case, at least that of
`tolerances.py`: relative RMS against the reference in float64.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tolerances import CANCELLING, product_bound
from torch import Tensor, nn

import tritonsparse as ts
from tritonsparse.kernels.block.topology import build_index_reference
from tritonsparse.kernels.conv._operands import input_flags
from tritonsparse.kernels.conv._tiles import Geometry
from tritonsparse.kernels.conv.conv2d import masked_conv2d
from tritonsparse.kernels.conv.gemm import conv_forward, conv_grad_input
from tritonsparse.kernels.conv.grad import conv_grad_weight
from tritonsparse.methods import AutoSparse, Static

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.usefixtures("poisoned_memory"),
]

DEVICE = "cuda"
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# (master, product)
DTYPES = [(FP32, BF16), (FP32, FP16), (FP32, FP32), (BF16, BF16)]
SAME = (1, 1, 1, 1)
# Batch, input and output channels, image, geometry: a first layer, wide tiles, strides, a split reduction, odd sizes,
# groups, and a dilated kernel with zeros on two sides only.
SHAPES: list[tuple[int, int, int, tuple[int, int], Geometry]] = [
    (4, 3, 64, (64, 64), Geometry((7, 7), (2, 2), (3, 3, 3, 3))),
    (16, 64, 64, (56, 56), Geometry((3, 3), (1, 1), SAME)),
    (8, 128, 128, (28, 28), Geometry((3, 3), (2, 2), SAME)),
    (4, 512, 512, (7, 7), Geometry((3, 3), (1, 1), SAME)),
    (4, 256, 512, (28, 28), Geometry((1, 1), (2, 2))),
    (3, 33, 65, (13, 17), Geometry((3, 2), (1, 3), (0, 2, 1, 0))),
    (2, 128, 96, (20, 19), Geometry((3, 3), (2, 1), SAME, (1, 2), 2)),
    (2, 64, 64, (30, 30), Geometry((4, 4), (1, 1), (3, 3, 6, 6), (3, 3))),
]
# (number of the shape, kind, dtypes): every shape, then every kind and dtype on one: each compiles its own kernels.
CASES = [
    *((number, ("soft per row", "mask")[number % 2], DTYPES[0]) for number in range(len(SHAPES))),
    *((2, kind, DTYPES[0]) for kind in ("soft", "hard", "mask")),
    *((2, "soft per row", dtypes) for dtypes in DTYPES[1:]),
]


def operands(
    shape: tuple[int, int, int, tuple[int, int], Geometry], kind: str, master: torch.dtype, dtype: torch.dtype
) -> dict[str, Any]:
    """Random operands of one case; no weight so close to its threshold that rounding could prune it."""
    batch, inputs, outputs, image, geometry = shape
    random = torch.Generator(DEVICE).manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=random, device=DEVICE)

    weight = normal(outputs, geometry.taps * inputs // geometry.groups)
    threshold = normal(outputs if kind == "soft per row" else 1)
    name = kind.removesuffix(" per row")
    cutoff = (threshold.sigmoid() if name == "soft" else threshold.abs_())[:, None]
    weight = torch.where((weight.to(master).float().abs() / cutoff - 1).abs() < 1e-2, 1.1 * weight, weight)
    last = {"memory_format": torch.channels_last}
    return {
        "geometry": geometry,
        "image": image,
        "weight": weight.to(master),
        "kind": name,
        "threshold": None if name == "mask" else threshold,
        "mask": torch.rand(weight.shape, generator=random, device=DEVICE) < 0.3 if name == "mask" else None,
        "x": normal(batch, inputs, *image).to(dtype).contiguous(**last),
        "grad_y": normal(batch, outputs, *geometry.output(image)).to(dtype).contiguous(**last),
        "bias": normal(outputs).to(dtype),
        "grad_mask": torch.rand(weight.shape, generator=random, device=DEVICE) < 0.5,
        "alpha": torch.tensor(0.25, device=DEVICE),
    }


def products(case: dict[str, Any], backend: str, flags: Tensor | None = None) -> dict[str, Tensor]:
    view = {name: case[name] for name in ("weight", "geometry", "kind", "threshold", "mask")} | {"backend": backend}
    index = turned = None
    if flags is not None:
        view["block"] = case["block"]
        index, turned = build_index_reference(flags), build_index_reference(input_flags(flags, case["geometry"]))
    rows = {"grad_mask": case["grad_mask"], "alpha": case["alpha"]}
    grad_weight, grad_threshold = conv_grad_weight(case["grad_y"], case["x"], **rows, **view, index=index)
    return {
        "y": conv_forward(case["x"], bias=case["bias"], **view, index=index),
        "grad_x": conv_grad_input(case["grad_y"], image=case["image"], **view, index=turned),
        "grad_weight": grad_weight,
        **({"grad_threshold": grad_threshold} if case["kind"] == "soft" else {}),
    }


def exact(case: dict[str, Any]) -> dict[str, Any]:
    return case | {name: t.double() for name, t in case.items() if torch.is_tensor(t) and t.is_floating_point()}


def error(actual: Tensor, expected: Tensor) -> float:
    return ((actual.double() - expected).norm() / expected.norm()).item()


def compare(case: dict[str, Any], tf32: bool = False, flags: Tensor | None = None) -> None:
    dtype, precision, geometry = case["x"].dtype, "tf32" if tf32 else "full float32", case["geometry"]
    (batch, inputs), outputs = case["x"].shape[:2], case["grad_y"].shape[1]
    pixels = batch * case["grad_y"].shape[2:].numel()
    forward, backward = (geometry.taps * channels // geometry.groups for channels in (inputs, outputs))
    lengths = {"y": forward, "grad_x": backward, "grad_weight": pixels}
    expected = products(exact(case), "torch", flags)
    reference = products(case, "torch", flags)
    actual, again = products(case, "triton", flags), products(case, "triton", flags)
    for name, value in actual.items():
        bound = 1.1 * error(reference[name], expected[name])
        if name == "grad_threshold":
            # A sum that cancels: measured against its terms, sigmoid' <= 1/4 of what |dW| sums to.
            bound = max(bound, CANCELLING * product_bound(dtype, FP32, pixels, precision))
            assert (value - expected[name]).norm() <= bound * expected["grad_weight"].norm() / 4, name
        else:
            bound = max(bound, product_bound(dtype, value.dtype, lengths[name], precision))
            assert error(value, expected[name]) <= bound, name
        assert torch.equal(value, again[name]), f"{name}: another result the second time"


@pytest.fixture(params=["full float32", "tf32"])
def precision(request: pytest.FixtureRequest) -> Iterator[str]:
    before, vendor = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high" if request.param == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = request.param == "tf32"
    yield request.param
    torch.set_float32_matmul_precision(before)
    torch.backends.cudnn.allow_tf32 = vendor


@pytest.mark.parametrize(("number", "kind", "dtypes"), CASES, ids=str)
def test_every_product_is_as_exact_as_the_two_steps_of_the_reference(
    number: int, kind: str, dtypes: tuple[torch.dtype, torch.dtype], precision: str
) -> None:
    if precision == "tf32" and dtypes[1] != FP32:
        pytest.skip("16 bits are exact either way")
    compare(operands(SHAPES[number], kind, *dtypes), precision == "tf32")


@pytest.mark.parametrize("density", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize(
    ("number", "block", "kind"),
    [
        (1, (64, 64), "soft per row"),
        (2, (128, 32), "mask"),
        (4, (32, 128), "mask"),
        (3, (64, 256), "mask"),
        (6, (48, 64), "soft per row"),
        (7, (16, 16), "mask"),
    ],
)
def test_blocks_outside_the_index_are_skipped_exactly(
    number: int, block: tuple[int, int], kind: str, density: float
) -> None:
    case = operands(SHAPES[number], kind, FP32, BF16) | {"block": block}
    rows, columns = (size // side for size, side in zip(case["weight"].shape, block, strict=True))
    flags = torch.rand(rows, columns, device=DEVICE) < density
    listed = flags.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    if not flags.any():
        found = products(case, "triton", flags)
        assert torch.equal(found["y"], case["bias"][None, :, None, None].expand_as(found["y"]))
        assert not any(found[name].any() for name in found if name != "y")
        return
    compare(case, flags=flags)
    # What is not listed is not read.
    dirty = case | {"weight": torch.where(listed, case["weight"], torch.nan)}
    clean = products(case, "triton", flags)
    assert all(torch.equal(value, clean[name]) for name, value in products(dirty, "triton", flags).items())


def test_products_replay_in_a_graph() -> None:
    case = operands(SHAPES[2], "soft per row", FP32, BF16)
    expected = products(case, "triton")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = products(case, "triton")
    for tensor in captured.values():
        tensor.fill_(float("nan"))
    graph.replay()
    assert all(torch.equal(captured[name], expected[name]) for name in expected)


def test_offsets_beyond_two_to_the_31_reach_their_element() -> None:
    # More than 2^31 elements in x; one weight carries its last pixel to the last of y, and back.
    batch, channels, height, width = 9, 64, 2048, 2048
    assert batch * channels * height * width > 2**31
    x = torch.zeros(batch, height, width, channels, device=DEVICE, dtype=BF16).permute(0, 3, 1, 2)
    x[-1, 5, -1, -1] = 3.0
    weight = torch.zeros(16, 9 * channels, device=DEVICE)
    # Position (0, 0) of the kernel, which with zeros after the image alone reads the pixel itself.
    weight[7, 5] = 1.0
    view: dict[str, Any] = {"kind": "hard", "threshold": torch.tensor([0.5], device=DEVICE), "backend": "triton"}
    geometry = Geometry((3, 3), padding=(0, 0, 2, 2))
    y = conv_forward(x, weight, geometry=geometry, **view)
    assert y.count_nonzero() == 1 and y[-1, 7, -1, -1] == 3.0
    grad_weight, _ = conv_grad_weight(y, x, weight, geometry=geometry, **view)
    assert grad_weight.count_nonzero() == 1 and grad_weight[7, 5] == 9.0
    grad_x = conv_grad_input(y, weight, (height, width), geometry=geometry, **view)
    assert grad_x.count_nonzero() == 1 and grad_x[-1, 5, -1, -1] == 3.0


@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_the_op_takes_a_product_of_pixels_and_any_memory_format(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    torch.manual_seed(0)
    x = torch.randn(4, 128, 14, 14, device=DEVICE, dtype=dtype)
    weight = torch.randn(256, 128, device=DEVICE)
    threshold = torch.zeros(1, device=DEVICE)
    found: dict[str, list[Tensor]] = {}
    for backend in ("torch", "fused"):
        leaves = [each.clone().requires_grad_() for each in (x, weight, threshold)]
        y = masked_conv2d(
            *leaves[:2], kernel=(1, 1), kind="soft", threshold=leaves[2], alpha=torch.tensor(0.5, device=DEVICE),
            backend=backend, out_dtype=dtype,
        )  # fmt: skip
        grads = torch.autograd.grad(y, leaves, torch.ones_like(y).cumsum(1) / 256)
        found[backend] = [y.detach(), *grads[:2]]
    for ours, theirs in zip(found["fused"], found["torch"], strict=True):
        assert error(ours, theirs.double()) < (2e-2 if dtype == BF16 else 1e-4)


@pytest.mark.parametrize("backend", ["fused", "block"])
def test_a_network_trains_as_under_the_torch_back_end(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    losses = {}
    for each in ("torch", backend):
        torch.manual_seed(0)
        model: Any = nn.Sequential(
            nn.Conv2d(16, 64, 3, padding=1, stride=2), nn.BatchNorm2d(64), nn.ReLU(), nn.Conv2d(64, 128, 1), nn.ReLU(),
            nn.Conv2d(128, 64, 3, padding="same", groups=4),
        ).to(DEVICE, memory_format=torch.channels_last)  # fmt: skip
        soft = AutoSparse(threshold_init=-3.0, alpha=0.4, alpha_schedule="constant")
        method, pattern = (soft, "unstructured") if backend == "fused" else (Static(sparsity=0.5), "block:16")
        sparsifier = ts.sparsify(model, method, backend=each, pattern=pattern, total_steps=5, steps_per_epoch=5)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        sparsifier.attach(optimizer)
        x = torch.randn(8, 16, 28, 28, device=DEVICE)
        losses[each] = []
        for _ in range(5):
            optimizer.zero_grad()
            loss = model(x).square().mean()
            loss.backward()
            optimizer.step()
            losses[each].append(float(loss.detach()))
    assert losses[backend] == pytest.approx(losses["torch"], rel=1e-3)
    assert losses["torch"][-1] < losses["torch"][0]
