"""The packed linear op against SWAT written in plain torch, which autograd differentiates by itself."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from tritonsparse.kernels.activation.linear import packed_linear
from tritonsparse.kernels.fused.linear import masked_linear

F64 = torch.float64
N, K = 5, 70
DENSITY = 0.2


def operands(kind: str, transposed: bool, *x_shape: int, dtype: torch.dtype = F64) -> dict[str, Any]:
    shape = (K, N) if transposed else (N, K)
    threshold = {"soft": -1.0, "hard": 0.3}.get(kind)
    return {
        "x": torch.randn(*x_shape, K, dtype=dtype, requires_grad=True),
        "weight": torch.randn(shape, dtype=dtype, requires_grad=True),
        "bias": torch.randn(N, dtype=dtype, requires_grad=True),
        "threshold": None if threshold is None else torch.tensor([threshold], dtype=dtype),
        "mask": torch.rand(shape) < 0.5 if kind == "mask" else None,
    }


def swat(x: Tensor, w_hat: Tensor, bias: Tensor, kept: Tensor) -> Tensor:
    """Worth x w_hat^T + bias; x is differentiated through the dense product, w_hat through that of the kept x."""
    dense = F.linear(x, w_hat.detach(), bias)
    sparse = F.linear((x * kept).detach(), w_hat)
    return dense + (sparse - sparse.detach())


def view(weight: Tensor, kind: str, threshold: Tensor | None, mask: Tensor | None) -> Tensor:
    """Pruned weights get the gradients of kept ones (alpha = 1), as SWAT has it: the view is straight through."""
    if kind == "dense":
        return weight
    if threshold is None:
        return weight + (weight * mask - weight).detach()
    if kind == "hard":
        return weight + (weight * (weight.abs() > threshold) - weight).detach()
    return weight + (weight.sign() * (weight.abs() - threshold.sigmoid()).relu() - weight).detach()


def largest(x: Tensor, density: float, row_mask: Tensor | None = None) -> Tensor:
    """True on the round-half-up(density n) largest |x| of the rows that count."""
    counted = torch.ones(x.shape[:-1], dtype=torch.bool) if row_mask is None else row_mask
    magnitude = torch.where(counted[..., None], x.detach().abs(), -1.0).flatten()
    count = max(1, math.floor(density * counted.sum().item() * x.shape[-1] + 0.5))
    kept = torch.zeros_like(magnitude, dtype=torch.bool)
    kept[magnitude.argsort(descending=True)[:count]] = True
    return kept.view(x.shape)


def grads(y: Tensor, grad_y: Tensor, given: dict[str, Any]) -> dict[str, Tensor]:
    leaves = {name: value for name, value in given.items() if value is not None and value.requires_grad}
    return dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), grad_y), strict=True))


@pytest.mark.parametrize("x_shape", [(6,), (2, 3), ()], ids=["2-D", "3-D", "1-D"])
@pytest.mark.parametrize("masked", [False, True], ids=["all rows", "row mask"])
@pytest.mark.parametrize("transposed", [False, True], ids=["Linear", "Conv1D"])
@pytest.mark.parametrize("kind", ["dense", "soft", "hard", "mask"])
def test_value_and_all_gradients_equal_swat_in_plain_torch(
    kind: str, transposed: bool, masked: bool, x_shape: tuple[int, ...]
) -> None:
    given = operands(kind, transposed, *x_shape)
    row_mask = torch.rand(x_shape) < 0.7 if masked and x_shape else None
    alpha = None if kind == "dense" else torch.ones(())
    y, cutoff, overflow = packed_linear(
        **given, density=DENSITY, kind=kind, alpha=alpha, row_mask=row_mask, transposed=transposed
    )
    kept = largest(given["x"], DENSITY, row_mask)
    w_hat = view(given["weight"], kind, given["threshold"], given["mask"])
    expected = swat(given["x"], w_hat.t() if transposed else w_hat, given["bias"], kept)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    grad_y = torch.randn_like(y)
    ours, theirs = grads(y, grad_y, given), grads(expected, grad_y, given)
    assert ours.keys() == theirs.keys() == {"x", "weight", "bias"}
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-11, atol=1e-11, msg=f"d{name}")
    assert cutoff.tolist() == [given["x"].detach().abs()[kept].min().item()]
    assert not overflow and overflow.device.type == "cpu"


@pytest.mark.parametrize("kind", ["soft", "hard", "mask"])
def test_keeping_all_of_x_it_is_the_masked_linear_op_bit_for_bit(kind: str) -> None:
    given = operands(kind, False, 2, 3)
    if given["threshold"] is not None and kind == "soft":
        given["threshold"].requires_grad_()
    rest = {"kind": kind, "alpha": torch.tensor(0.4), "grad_mask": torch.rand(N, K) < 0.7}
    expected = masked_linear(**given, **rest)
    y = packed_linear(**given, **rest, density=1.0)[0]
    assert torch.equal(y, expected)
    grad_y = torch.randn_like(y)
    ours, theirs = grads(y, grad_y, given), grads(expected, grad_y, given)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_view_that_is_known_already_gives_the_same_numbers_as_one_that_is_computed() -> None:
    given = operands("mask", False, 4)
    expected = packed_linear(**given, density=DENSITY, kind="mask")[0]
    w_hat = torch.where(given["mask"], given["weight"], 0.0).detach()
    y = packed_linear(**given, density=DENSITY, kind="mask", w_hat=w_hat)[0]
    grad_y = torch.randn_like(y)
    ours, theirs = grads(y, grad_y, given), grads(expected, grad_y, given)
    assert torch.equal(y, expected) and all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_remembered_cutoff_is_used_as_it_is() -> None:
    """x = (1, -3, 0.5, 2): T = 2 keeps -3 and 2, so dW = dY (0, -3, 0, 2)."""
    x, weight = torch.tensor([[1.0, -3.0, 0.5, 2.0]]), torch.zeros(1, 4, requires_grad=True)
    cutoff = torch.tensor([2.0])
    y, used, overflow = packed_linear(x, weight, density=0.5, cutoff=cutoff)
    y.backward(torch.tensor([[10.0]]))
    assert weight.grad.tolist() == [[0.0, -30.0, 0.0, 20.0]]
    assert used is cutoff and not overflow


@pytest.mark.parametrize("scope", ["batch", "sample", "plane"])
def test_scopes_choose_over_the_batch_over_each_sample_or_over_each_token(scope: str) -> None:
    given = operands("dense", False, 3, 2)
    y, cutoff, _ = packed_linear(**given, density=DENSITY, scope=scope)
    x = given["x"].detach()
    groups = {"batch": x[None], "sample": x, "plane": x.flatten(0, 1)[:, None]}[scope]
    kept = torch.stack([largest(group, DENSITY) for group in groups]).view(x.shape)
    grad_y = torch.randn_like(y)
    expected = grad_y.flatten(0, 1).t() @ (x * kept).flatten(0, 1)
    torch.testing.assert_close(grads(y, grad_y, given)["weight"], expected, rtol=1e-12, atol=1e-12)
    assert cutoff.shape == ((1,) if scope == "batch" else (6,))


@pytest.mark.parametrize("kind", ["dense", "mask"])
def test_what_does_not_fit_is_kept_all_the_same_and_reported(kind: str) -> None:
    given = operands(kind, False, 6)
    for cutoff in (torch.zeros(1), torch.tensor([0.5]), torch.tensor([math.nan])):
        y, _, overflow = packed_linear(**given, density=0.1, cutoff=cutoff, kind=kind)
        roomy, _, fits = packed_linear(**given, density=0.1, cutoff=cutoff, kind=kind, slack=math.inf)
        assert overflow and not fits
        grad_y = torch.randn_like(y)
        ours, theirs = grads(y, grad_y, given), grads(roomy, grad_y, given)
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
        assert torch.count_nonzero(ours["weight"]) > 0.1 * N * K


def test_zeros_take_no_room_so_a_relu_does_not_overflow() -> None:
    """Nine tenths of x are 0, and so is its k-th magnitude at density 0.2."""
    given = operands("dense", False, 20)
    given["x"] = (given["x"].detach() - 1.2816).relu().requires_grad_()
    y, cutoff, overflow = packed_linear(**given, density=0.2, slack=1.0)
    grad_y = torch.randn_like(y)
    torch.testing.assert_close(grads(y, grad_y, given)["weight"], grad_y.t() @ given["x"].detach())
    assert cutoff.item() == 0 and not overflow


def test_ties_at_the_cutoff_overflow_and_every_one_is_kept() -> None:
    x, weight = torch.ones(4, 8), torch.zeros(3, 8, requires_grad=True)
    y, cutoff, overflow = packed_linear(x, weight, density=0.25)
    y.backward(torch.ones(4, 3))
    assert overflow and cutoff.item() == 1
    assert torch.equal(weight.grad, torch.full((3, 8), 4.0))


def saved_bytes(function: Any) -> int:
    """Bytes of distinct storages that autograd holds between the passes, parameters left out."""
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, torch.nn.Parameter):
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        held = function()  # so that no storage is freed and counted twice at one address
    del held
    return sum(sizes.values())


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 0.35), (torch.float32, 0.30)], ids=str)
def test_a_fifth_of_the_elements_is_held_in_a_third_of_the_memory(dtype: torch.dtype, bound: float) -> None:
    """bf16: bits 1/16, values 1/5 with a quarter of slack, offsets 8 bytes a row; fp32: bits 1/32."""
    x = torch.randn(8, 64, 512, dtype=dtype)
    weight = torch.nn.Parameter(torch.randn(64, 512, dtype=dtype))
    dense = saved_bytes(lambda: F.linear(x.clone(), weight))
    assert dense == x.nbytes
    packed = saved_bytes(lambda: packed_linear(x.clone(), weight, density=0.2)[0])
    assert packed < bound * x.nbytes
    # A view is held on top, as masked_linear holds it.
    mask = torch.rand(weight.shape) < 0.5
    masked = saved_bytes(lambda: packed_linear(x.clone(), weight, density=0.2, kind="mask", mask=mask)[0])
    assert masked == packed + weight.nbytes + mask.nbytes


def test_frozen_operands_get_no_gradient_and_the_others_keep_theirs() -> None:
    given = operands("soft", False, 3)
    given["threshold"].requires_grad_()
    full = packed_linear(**given, density=DENSITY, kind="soft")[0]
    grad_y = torch.randn_like(full)
    expected = grads(full, grad_y, given)
    for frozen in ("x", "weight", "bias", "threshold"):
        part = {name: None if t is None else t.detach().requires_grad_(name != frozen) for name, t in given.items()}
        part["mask"] = None
        ours = grads(packed_linear(**part, density=DENSITY, kind="soft")[0], grad_y, part)
        assert ours.keys() == expected.keys() - {frozen}
        assert all(torch.equal(ours[name], expected[name]) for name in ours)


def test_an_empty_batch_gives_empty_outputs_and_zero_gradients() -> None:
    given = operands("dense", False, 0)
    y, cutoff, overflow = packed_linear(**given, density=DENSITY)
    y.backward(torch.randn_like(y))
    assert y.shape == (0, N) and cutoff.tolist() == [math.inf] and not overflow
    assert not given["weight"].grad.any() and given["x"].grad.shape == (0, K)


def test_nan_in_x_reaches_the_gradient() -> None:
    given = operands("dense", False, 4)
    given["x"].data[1, 3] = math.nan
    y = packed_linear(**given, density=DENSITY)[0]
    grad = grads(y, torch.randn_like(y), given)["weight"]
    assert grad[:, 3].isnan().all() and not grad[:, :3].isnan().any()


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_runs_it_twice_and_changes_nothing(reentrant: bool) -> None:
    given = operands("mask", False, 4)
    for cutoff in (None, torch.tensor([1.0])):

        def run(x: Tensor, cutoff: Tensor | None = cutoff) -> Tensor:
            return packed_linear(**given | {"x": x}, density=DENSITY, kind="mask", cutoff=cutoff)[0]

        y, expected = checkpoint(run, given["x"], use_reentrant=reentrant), run(given["x"])
        grad_y = torch.randn_like(y)
        for result in (y, expected):
            for name in ("x", "weight", "bias"):
                given[name].grad = None
            result.backward(grad_y)
            seen = {name: given[name].grad for name in ("x", "weight", "bias")}
            if result is y:
                ours = seen
        assert all(torch.equal(ours[name], seen[name]) for name in seen)


def test_under_autocast_the_products_stay_in_the_dtype_of_x() -> None:
    given = operands("mask", False, 3, dtype=torch.float32)
    plain = packed_linear(**given, density=DENSITY, kind="mask")[0]
    with torch.autocast("cpu", torch.bfloat16):
        y = packed_linear(**given, density=DENSITY, kind="mask")[0]
    assert torch.equal(y, plain)


@pytest.mark.parametrize(
    ("kind", "transposed", "slack"),
    [("dense", False, 1.25), ("soft", True, math.inf), ("mask", True, 1.25)],
    ids=["dense", "soft and Conv1D, room for all", "mask and Conv1D"],
)
def test_both_ops_pass_opcheck(kind: str, transposed: bool, slack: float) -> None:
    given = operands(kind, transposed, 2, 3, dtype=torch.float32)
    alpha = None if kind == "dense" else torch.tensor(0.5)
    view = (given["threshold"], given["mask"], None, alpha)
    row_mask = torch.tensor([[True, True, False], [True, False, False]])
    settings = (kind, transposed, "torch", torch.float32, DENSITY, slack, "plane" if transposed else "batch")
    args = (given["x"], given["weight"], given["bias"], *view, None, None, row_mask, *settings)
    op = torch.ops.tritonsparse.packed_linear.default
    torch.library.opcheck(op, args)
    _, made, _, bits, values, offsets, _ = (tensor.detach() for tensor in op(*args))
    saved = (given["weight"].detach(), None if kind == "dense" else made, *view, bits, values, offsets)
    backward = torch.ops.tritonsparse.packed_linear_backward.default
    torch.library.opcheck(backward, (torch.randn(2, 3, N), *saved, kind, transposed, "torch", True, True))
    frozen = (torch.randn(2, 3, N), *saved, kind, transposed, "torch", transposed, not transposed)
    torch.library.opcheck(backward, frozen, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("roomy", [False, True], ids=["slack", "room for all"])
def test_compiled_it_is_one_graph_with_the_same_numbers_also_when_it_overflows(roomy: bool) -> None:
    given = operands("mask", False, 4, dtype=torch.float32)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(packed_linear, fullgraph=True, backend=counter)
    cutoff = torch.tensor([1.3])
    settings = {"density": 0.25, "kind": "mask", "cutoff": cutoff, "slack": math.inf if roomy else 1.25}
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=not roomy):
        for value, overflows in ((1.3, False), (0.1, not roomy), (2.0, False)):
            cutoff.fill_(value)
            (y, _, overflow), (expected, *_) = (op(**given, **settings) for op in (compiled, packed_linear))
            assert bool(overflow) == overflows
            grad_y = torch.randn_like(y)
            ours, theirs = grads(y, grad_y, given), grads(expected, grad_y, given)
            assert torch.equal(y, expected)
            assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert counter.frame_count == 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"density": 0.0}, r"density in \(0, 1\], .*got 0.0; write 0.2"),
        ({"slack": 0.5}, r"slack of at least 1, got 0.5; pass 1.25"),
        ({"slack": math.nan}, r"slack of at least 1, got nan"),
        ({"scope": "token"}, r'scope "batch", "sample" or "plane", got \'token\''),
        ({"kind": "dense"}, r'no view with kind "dense", got mask; name the kind'),
        ({"kind": "odd"}, r"got kind 'odd' with mask; pass only what the kind reads"),
        ({"backend": "cuda"}, r'backend "torch" or "triton", got \'cuda\''),
        ({"x": torch.zeros(3, K + 1, dtype=F64)}, rf"x of shape \[..., {K}\].*check the layer's input"),
        ({"x": torch.zeros(3, K)}, r"expected x in torch.float64.*got torch.float32.*autocast"),
        ({"cutoff": torch.ones(2)}, r"cutoff to be float32 \[1\] or \[3\] on cpu, got float32 \[2\]"),
        ({"row_mask": torch.ones(4, dtype=torch.bool)}, r"row_mask to be bool \[3\] on cpu, got bool \[4\]"),
        ({"w_hat": torch.zeros(N, K)}, rf"w_hat to be float64 \[{N}, {K}\], got float32"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_does_not_fit_together_is_refused_with_the_remedy(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        packed_linear(**{**operands("mask", False, 3), "kind": "mask", "density": DENSITY, **change})
