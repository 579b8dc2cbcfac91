"""The fused gradient of the weight against its reference, through the interpreter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tritonsparse.kernels._tiles import GradTiles
from tritonsparse.kernels.fused.bits import pack_bits
from tritonsparse.kernels.fused.grad import fused_grad_weight

pytestmark = pytest.mark.usefixtures("poisoned_memory")

Close = Callable[[str, torch.Tensor, torch.Tensor, float], None]

# By the weight's dtype, against the reference in float64 on the same operands: sums in float32, then one rounding.
BOUND = {torch.float32: 2e-6, torch.float16: 4e-4, torch.bfloat16: 1e-2}
SMALL = GradTiles(16, 16, 32, 1)

sizes = st.sampled_from([1, 7, 16, 31, 33, 70])
dtypes = st.sampled_from([torch.float32, torch.float16])
layouts = st.sampled_from(["contiguous", "transposed", "strided"])


def laid_out(matrix: torch.Tensor, layout: str) -> torch.Tensor:
    """The same values behind other strides."""
    if layout == "transposed":
        return matrix.T.contiguous().T
    if layout == "strided":
        wide = matrix.new_zeros(matrix.shape[0] + 1, 2 * matrix.shape[1])
        wide[1:, ::2] = matrix
        return wide[1:, ::2]
    return matrix


def exact(operands: dict[str, Any]) -> dict[str, Any]:
    """The same operands in float64."""
    floats = {name: t.double() for name, t in operands.items() if torch.is_tensor(t) and t.is_floating_point()}
    return operands | floats


@settings(max_examples=25)
@given(
    m=st.sampled_from([0, 1, 7, 16, 40]),
    n=sizes,
    k=sizes,
    kind=st.sampled_from(["soft", "soft per row", "hard", "hard per row", "mask", "bits"]),
    restricted=st.sampled_from([None, "bools", "bits"]),
    alpha=st.sampled_from([None, 0.0, 0.25, 1.0]),
    transposed=st.booleans(),
    weight=dtypes,
    dtype=dtypes,
    layout=layouts,
    weight_layout=layouts,
    subtiles=st.sampled_from([1, 2, 4, 8]),
    seed=st.integers(0, 2**16),
)
def test_grad_weight_and_grad_threshold_equal_the_reference_in_float64(
    assert_close: Close,
    m: int,
    n: int,
    k: int,
    kind: str,
    restricted: str | None,
    alpha: float | None,
    transposed: bool,
    weight: torch.dtype,
    dtype: torch.dtype,
    layout: str,
    weight_layout: str,
    subtiles: int,
    seed: int,
) -> None:
    random = torch.Generator().manual_seed(seed)
    shape = (k, n) if transposed else (n, k)
    w = laid_out(torch.randn(shape, generator=random).to(weight), weight_layout)
    w[torch.rand(shape, generator=random) < 0.1] = 0.0
    name = kind.removesuffix(" per row")
    mask = laid_out(torch.rand(shape, generator=random) < 0.5, layout)
    grad_mask = laid_out(torch.rand(shape, generator=random) < 0.5, layout)
    given: dict[str, Any] = {
        "grad_y": laid_out(torch.randn(m, n, generator=random).to(dtype), layout),
        "x": laid_out(torch.randn(m, k, generator=random).to(dtype), layout),
        "weight": w,
        "kind": "mask" if name == "bits" else name,
        "mask": {"mask": mask, "bits": pack_bits(mask)}.get(name),
        "grad_mask": None if restricted is None else pack_bits(grad_mask) if restricted == "bits" else grad_mask,
        "alpha": None if alpha is None else torch.tensor(alpha),
        "transposed": transposed,
    }
    if name in ("soft", "hard"):
        given["threshold"] = torch.rand(shape[0] if "per row" in kind else 1, generator=random)
    # Words of a packed mask are spread over 32 columns at least.
    tiles = GradTiles(16, 16, 32 * subtiles, subtiles)
    expected = fused_grad_weight(**exact(given))
    actual = fused_grad_weight(**given, backend="triton", tiles=tiles)
    assert_close("grad_weight", actual[0], expected[0].to(weight), BOUND[weight])
    # The sum may cancel: its error is measured against its terms, of which each is about sqrt(m)/4.
    scale = (max(m, 1) * n * k) ** 0.5
    assert actual[1].dtype == torch.float32 and actual[1].shape == expected[1].shape
    assert actual[1].numel() == 0 or (actual[1] - expected[1]).abs().max().item() <= 1e-6 * scale
    assert actual[0].is_contiguous()

    again = fused_grad_weight(**given, backend="triton", tiles=tiles)
    assert torch.equal(actual[0], again[0]) and torch.equal(actual[1], again[1])


def test_where_no_gradient_is_due_neither_nan_nor_infinity_arrives() -> None:
    inf, nan = float("inf"), float("nan")
    # Kept; pruned inside B with alpha = 0.5; pruned outside B; W = 0. sigmoid'(0) = 1/4.
    w = torch.tensor([[1.0, -0.25, 0.25, 0.0]])
    x, grad_y = torch.tensor([[2.0, 4.0, nan, inf]]), torch.ones(1, 1)
    grad_mask = torch.tensor([[False, True, False, True]])
    for b in (grad_mask, pack_bits(grad_mask)):
        grad_weight, grad_threshold = fused_grad_weight(
            grad_y, x, w, kind="soft", threshold=torch.zeros(1), grad_mask=b, alpha=torch.tensor([0.5]),
            backend="triton", tiles=SMALL,
        )  # fmt: skip
        assert grad_weight.tolist() == [[2.0, 2.0, 0.0, 0.0]]
        assert grad_threshold.tolist() == [-0.25 * (2.0 - 2.0)]


@pytest.mark.parametrize("kind", ["soft", "hard"])
def test_the_threshold_itself_zeros_nan_and_infinity_are_treated_as_the_reference_does(kind: str) -> None:
    inf, nan = float("inf"), float("nan")
    # T = 0.5 either way, without rounding.
    w = torch.tensor([[0.5, -0.5, 0.0, -0.0, nan, inf, -inf, 0.50000006, -0.50000006, 1e-40]])
    given: dict[str, Any] = {
        "kind": kind,
        "threshold": torch.tensor([0.0 if kind == "soft" else 0.5]),
        "alpha": torch.tensor(0.5),
    }
    x = torch.arange(1.0, 11.0)[None]
    expected = fused_grad_weight(torch.ones(1, 1), x, w, **given)
    actual = fused_grad_weight(torch.ones(1, 1), x, w, **given, backend="triton", tiles=SMALL)
    assert torch.equal(actual[0], expected[0]) and torch.equal(actual[1], expected[1])


@pytest.mark.parametrize("s", [-float("inf"), float("inf")])
def test_an_infinite_threshold_gets_a_gradient_of_zero(s: float) -> None:
    x = torch.tensor([[float("inf"), 1.0]])
    w = torch.tensor([[1.0, -2.0]])
    given: dict[str, Any] = {"kind": "soft", "threshold": torch.tensor([s]), "backend": "triton", "tiles": SMALL}
    assert fused_grad_weight(torch.ones(1, 1), x, w, **given)[1].tolist() == [0.0]


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)])
@pytest.mark.parametrize("per_row", [False, True])
def test_an_empty_weight_launches_nothing(shape: tuple[int, int], per_row: bool) -> None:
    n, k = shape
    given: dict[str, Any] = {"kind": "soft", "threshold": torch.zeros(n if per_row else 1)}
    operands = torch.ones(3, n), torch.ones(3, k), torch.zeros(shape)
    actual = fused_grad_weight(*operands, **given, backend="triton")
    assert all(torch.equal(a, e) for a, e in zip(actual, fused_grad_weight(*operands, **given), strict=True))


@pytest.mark.parametrize("weight", [torch.float32, torch.bfloat16])
def test_bfloat16_products_are_upcast_for_the_interpreter(assert_close: Close, weight: torch.dtype) -> None:
    random = torch.Generator().manual_seed(0)
    x, grad_y = torch.randn(40, 33, generator=random).bfloat16(), torch.randn(40, 20, generator=random).bfloat16()
    w = torch.randn(20, 33, generator=random).to(weight)
    given: dict[str, Any] = {"kind": "soft", "threshold": torch.zeros(1)}
    actual = fused_grad_weight(grad_y, x, w, **given, backend="triton", tiles=SMALL)[0]
    expected = fused_grad_weight(**exact({"grad_y": grad_y, "x": x, "weight": w} | given))[0]
    # Operands of bfloat16 are exact in float32: a float32 weight's gradient is exact to float32.
    assert_close("grad_weight", actual, expected.to(weight), BOUND[weight])
