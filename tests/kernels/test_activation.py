"""Packed activations: cut-offs, packing and products; the ops' gradients, the memory they are for, what they refuse."""

import math
from dataclasses import replace
from fractions import Fraction
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import activation
from cases.product import equal
from cases.sparse_input import CASES, CONV, LINEAR, Case, product
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tritonsparse.kernels.activation.compress import pack_activation
from tritonsparse.kernels.activation.conv2d import sparse_input_conv2d
from tritonsparse.kernels.activation.cutoff import activation_cutoff
from tritonsparse.kernels.activation.linear import sparse_input_linear
from tritonsparse.kernels.activation.packing import Packing
from tritonsparse.kernels.weight.op import effective_weight
from tritonsparse.kernels.weight.view import View

F64 = torch.float64


@pytest.mark.parametrize("case", CASES, ids=str)
def test_results_and_all_gradients_equal_the_plain_formulation(case: Case) -> None:
    p = product(case)
    wrong = p.errors(p.run())
    assert max(wrong.values()) <= 1e-13, wrong


@pytest.mark.parametrize("kind", ["soft", "hard", "mask"])
def test_keeping_all_of_x_a_layer_s_step_is_the_dense_one_bit_for_bit(kind: str) -> None:
    p = product(Case((2, 3, 70), density=1.0))
    threshold = None if kind == "mask" else torch.tensor([0.3], dtype=F64, requires_grad=kind == "soft")
    mask = torch.rand(6, 70) < 0.5 if kind == "mask" else None
    view = View(kind, threshold, mask, torch.rand(6, 70) < 0.7, torch.tensor(0.4))
    leaves = [*p.leaves.values(), *([threshold] if kind == "soft" else [])]
    packed = sparse_input_linear(p.x, effective_weight(p.w_hat, view), p.bias, *p.rest)[0]
    dense = F.linear(p.x, effective_weight(p.w_hat, view), p.bias)
    ours, theirs = (torch.autograd.grad(y, leaves, p.grad_y) for y in (packed, dense))
    assert torch.equal(packed, dense) and all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("case", [LINEAR, CONV], ids=["linear", "conv2d"])
def test_numbers_do_not_depend_on_the_room(case: Case) -> None:
    for value in (0.0, 0.5, math.nan):
        p, cutoff = product(case), torch.tensor([value])
        ours, theirs = (replace(p, rest=(Packing(0.1, slack=s, cutoff=cutoff),)).run() for s in (1.25, math.inf))
        assert ours.pop("overflow") and not theirs.pop("overflow")
        assert ours.pop("cutoff") is cutoff and theirs.pop("cutoff") is cutoff
        assert equal(ours, theirs) and torch.count_nonzero(ours["dw_hat"]) > 0.1 * p.w_hat.numel()


def saved_bytes(function: Any) -> int:
    """Bytes of distinct storages that autograd holds between the passes, parameters left out."""
    held: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, torch.nn.Parameter):
            held[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function()
    return sum(tensor.untyped_storage().nbytes() for tensor in held.values())


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 0.35), (torch.float32, 0.30)], ids=str)
def test_a_fifth_of_the_elements_is_held_in_a_third_of_the_memory(dtype: torch.dtype, bound: float) -> None:
    """bf16: bits 1/16, values 1/5 with a quarter of slack, offsets 8 bytes a row; fp32: bits 1/32."""
    x, packing = torch.randn(8, 64, 512, dtype=dtype), Packing(0.2)
    weight, kernel = (torch.nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in ((64, 512), (64, 64, 1, 1)))
    view = View("mask", mask=torch.rand(weight.shape) < 0.5)
    assert saved_bytes(lambda: F.linear(x.clone(), weight)) == x.nbytes
    packed = saved_bytes(lambda: sparse_input_linear(x.clone(), weight, None, packing)[0])
    assert packed < bound * x.nbytes
    assert saved_bytes(lambda: sparse_input_conv2d(x.view(8, 64, 16, 32).clone(), kernel, None, packing)[0]) == packed
    masked = saved_bytes(lambda: sparse_input_linear(x.clone(), effective_weight(weight, view), None, packing)[0])
    assert masked == packed + weight.nbytes + view.mask.nbytes


@pytest.mark.parametrize(("change", "words"), [
    *(({"density": d}, r"a density in \(0, 1\], .*write 0.2 to keep 20 %") for d in (0.0, 1.1, math.nan, True, "1")),
    *(({"slack": slack}, "slack of at least 1, got .*; pass 1.25") for slack in (0.5, math.nan)),
    ({"scope": "token"}, r'scope "batch", "sample" or "plane", got \'token\'; pass one'),
], ids=str)  # fmt: skip
def test_a_packing_out_of_range_is_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=f"^Packing: expected {words}"):
        Packing(**{"density": 0.2} | change)


@pytest.mark.parametrize(("case", "change", "words"), [
    *((case, {"backend": "cuda"}, 'backend "torch" or "triton", got \'cuda\'; pass either') for case in (LINEAR, CONV)),
    (LINEAR, {"backend": "triton"}, 'x in float16, .* got torch.float64; pass backend="torch"'),
    (LINEAR, {"x": torch.zeros(3, 71, dtype=F64)}, r"x of shape \[..., 70\].*check the layer's input"),
    (LINEAR, {"x": torch.zeros(3, 70)}, "x in torch.float64 .*got torch.float32; cast x or run under torch.autocast"),
    (LINEAR, {"w_hat": torch.zeros(3)}, r"w_hat to be a floating-point matrix \[N, K\], got float32 \[3\]"),
    (LINEAR, {"cutoff": torch.ones(2)}, r"cutoff to be float32 \[1\] or \[6\] on cpu, got float32 \[2\]"),
    (LINEAR, {"cutoff": torch.ones(1).half()}, r"cutoff to be float32 .* got float16 \[1\].*remember one"),
    (LINEAR, {"row_mask": torch.ones(4).bool()}, r"row_mask to be bool \[2, 3\] on cpu, got bool \[4\]"),
    (LINEAR, {"row_mask": torch.ones(2, 3)}, r"got float32 \[2, 3\] on cpu; make it True for rows that count"),
    (CONV, {"x": torch.zeros(2, 3, 7, 6, dtype=F64)}, r"x to be torch.float64 \[B, 4, H, W\].*check the layer's"),
    (CONV, {"x": torch.zeros(2, 4, 7, 6)}, r"x to be torch.float64 .* got float32 \[2, 4, 7, 6\]"),
    (CONV, {"w_hat": torch.zeros(10, 4, dtype=F64)}, r"\[B, C, H, W\] beside w_hat \[F, C/groups, kh, kw\]"),
    (CONV, {"cutoff": torch.ones(2)}, r"cutoff to be float32 \[1\] or \[8\] on cpu, got float32 \[2\]"),
    (CONV, {"row_mask": torch.ones(8).bool()}, r"row_mask to be bool \[2, 4\] on cpu, got bool \[8\]"),
], ids=lambda value: next(iter(value)) if isinstance(value, dict) else "")  # fmt: skip
def test_what_does_not_fit_together_is_refused_with_the_remedy(case: Case, change: dict[str, Any], words: str) -> None:
    p = product(case)
    packing = Packing(0.2, cutoff=change.get("cutoff"), row_mask=change.get("row_mask"))
    x, w_hat = change.get("x", p.x), change.get("w_hat", p.w_hat)
    with pytest.raises(ValueError, match=f"^{p.function.__name__}: expected .*{words}"):
        p.function(x, w_hat, p.bias, packing, backend=change.get("backend", "torch"), **p.options)


@pytest.mark.parametrize("case", activation.CASES, ids=str)
def test_what_is_packed_unpacked_and_multiplied_is_what_the_definition_keeps(case: activation.Case) -> None:
    activation.packed_errors(case, "torch", half=torch.bfloat16)
    assert activation.packed_errors(case, "torch", half=torch.float64, full=torch.float64)[0] <= 1e-13


def test_a_matrix_by_hand() -> None:
    """|x| >= 2 keeps 2 and -3 of row 0 (bits 1 and 3: 2 + 8), nothing of row 1, NaN and 2 of row 2 (1 + 4)."""
    x = torch.tensor([[1.0, 2.0, 0.0, -3.0], [1.0, 1.5, -1.0, 0.0], [math.nan, -1.0, 2.0, 0.5]])
    bits, values, row_offsets, overflow = pack_activation(x, torch.tensor([2.0]), None, 6)
    assert bits.tolist() == [[10], [0], [5]] and bits.dtype == torch.int32
    torch.testing.assert_close(
        values, torch.tensor([2.0, -3.0, math.nan, 2.0, 0.0, 0.0]), rtol=0, atol=0, equal_nan=True
    )
    assert row_offsets.tolist() == [0, 2, 2, 4] and overflow.shape == () and not overflow


@settings(deadline=None, derandomize=True, max_examples=40)
@given(
    rows=st.integers(1, 40),
    k=st.integers(1, 9),
    density=st.sampled_from(["1", "0.5", "0.29", "0.35", "0.1", "0.05", "0.001", "1e-9", "0.333333333"]),
    counted=st.integers(0, 40),
    seed=st.integers(0, 2**16),
)
def test_a_cutoff_keeps_the_exact_count(rows: int, k: int, density: str, counted: int, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, k, generator=random, dtype=torch.float64)  # no ties
    row_mask = torch.randperm(rows, generator=random) < counted
    for mask, n in ((None, x.numel()), (row_mask, int(row_mask.sum()) * k)):
        cutoff = activation_cutoff(x, float(density), row_mask=mask)
        kept = int(pack_activation(x, cutoff, mask, x.numel())[2][-1])
        assert kept == (max(1, math.floor(Fraction(density) * n + Fraction(1, 2))) if n else 0)
        assert cutoff.shape == (1,) and cutoff.dtype == torch.float64


@pytest.mark.parametrize("masked", [False, True], ids=["all rows", "row mask"])
def test_scopes_are_the_batch_each_sample_and_each_row(masked: bool) -> None:
    """Density one half of [2, 2, 2]: 4 of 8, 2 of 4, 1 of 2; the last row of sample 1 does not count if masked."""
    x = torch.tensor([[[1.0, -2.0], [3.0, 4.0]], [[5.0, 6.0], [7.0, -8.0]]])
    row_mask = torch.tensor([[True, True], [True, False]]) if masked else None
    cutoffs = {scope: activation_cutoff(x, 0.5, scope, row_mask).tolist() for scope in ("batch", "sample", "plane")}
    if masked:
        assert cutoffs == {"batch": [4.0], "sample": [3.0, 3.0, 6.0, 6.0], "plane": [2.0, 4.0, 6.0, math.inf]}
    else:
        assert cutoffs == {"batch": [5.0], "sample": [3.0, 3.0, 7.0, 7.0], "plane": [2.0, 4.0, 6.0, 8.0]}


def test_a_group_without_anything_that_counts_keeps_nothing() -> None:
    x, none = torch.ones(2, 3, 4), torch.zeros(2, 3, dtype=torch.bool)
    for scope, rows in (("batch", 1), ("sample", 6), ("plane", 6)):
        assert activation_cutoff(x, 0.5, scope, none).eq(math.inf).all()
        assert activation_cutoff(x[:, :0], 0.5, scope).tolist() == [math.inf] * (rows == 1)
        assert activation_cutoff(x[:, :, :0], 0.5, scope).tolist() == [math.inf] * rows


def test_a_nan_counts_as_the_largest_and_a_half_precision_cutoff_is_exact_in_float32() -> None:
    x = torch.tensor([[math.nan, 1.0, 2.0, 3.0]])
    assert activation_cutoff(x, 0.5).tolist() == [3.0] and activation_cutoff(x, 0.25).isnan().all()
    x = torch.randn(64, 8).to(torch.bfloat16)
    cutoff = activation_cutoff(x, 0.2)
    assert cutoff.dtype == torch.float32 and cutoff.item() in x.abs().float()
