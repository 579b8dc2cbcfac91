"""The op that skips pruned blocks: by hand, against the masked weight in float64, and as torch wants an op."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tritonsparse.kernels.block import linear as module
from tritonsparse.kernels.block.linear import block_matmul
from tritonsparse.kernels.block.topology import block_flags, build_index_reference

FLAGS = torch.tensor([[True, False, True], [False, False, False]])
SUPERSET = torch.tensor([[True, True, True], [False, True, False]])
BLOCK = (2, 3)


def spread(flags: Tensor) -> Tensor:
    """Flags of blocks as a mask [4, 9]."""
    return flags.repeat_interleave(BLOCK[0], 0).repeat_interleave(BLOCK[1], 1)


def gradients_of(case: str) -> dict[str, Any]:
    """What the op is told of gradients, by case; `multiplier` is what dW must then be multiplied by."""
    mask = spread(FLAGS)
    if case == "kept":
        return {"multiplier": mask.double()}
    alpha = torch.tensor(0.25)
    if case == "superset":
        both = {"grad_index": build_index_reference(SUPERSET), "kept": FLAGS, "alpha": alpha}
        return {**both, "multiplier": mask + 0.25 * (spread(SUPERSET) & ~mask)}
    return {"mask": mask, "alpha": alpha, "multiplier": mask + 0.25 * ~mask}


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("case", ["kept", "superset", "everywhere"])
def test_values_and_gradients_are_those_of_the_masked_weight(case: str, transposed: bool) -> None:
    options = gradients_of(case)
    multiplier = options.pop("multiplier")
    weight, bias = torch.randn(4, 9, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    x, grad_y = torch.randn(2, 5, 9, dtype=torch.float64), torch.randn(2, 5, 4, dtype=torch.float64)
    # What is pruned is not read.
    stored = weight.masked_fill(~spread(FLAGS), float("nan")) if case != "everywhere" else weight
    stored = stored.t().contiguous() if transposed else stored
    if "mask" in options and transposed:
        options["mask"] = options["mask"].t()
    ours = [tensor.clone().requires_grad_() for tensor in (x, stored, bias)]
    y = block_matmul(*ours, build_index_reference(FLAGS), block=BLOCK, transposed=transposed, **options)
    y.backward(grad_y)
    w_hat = torch.where(spread(FLAGS), weight, 0.0)
    torch.testing.assert_close(y, x @ w_hat.t() + bias)
    grad_weight = multiplier * (grad_y.reshape(-1, 4).t() @ x.reshape(-1, 9))
    grads = [each.grad for each in ours]
    torch.testing.assert_close(grads[0], grad_y @ w_hat)
    torch.testing.assert_close(grads[1], grad_weight.t() if transposed else grad_weight)
    torch.testing.assert_close(grads[2], grad_y.reshape(-1, 4).sum(0))


def test_two_blocks_by_hand() -> None:
    weight = torch.tensor([[1.0, 2.0, 3.0, 4.0]], requires_grad=True)
    x = torch.tensor([[1.0, 1.0, 10.0, 10.0]], requires_grad=True)
    index = build_index_reference(torch.tensor([[False, True]]))
    y = block_matmul(x, weight, torch.tensor([0.5]), index, block=(1, 2))
    y.backward()
    assert y.item() == 70.5
    assert x.grad is not None and x.grad.tolist() == [[0.0, 0.0, 3.0, 4.0]]
    assert weight.grad is not None and weight.grad.tolist() == [[0.0, 0.0, 10.0, 10.0]]


@pytest.mark.parametrize("case", ["kept", "superset", "everywhere"])
def test_it_is_a_custom_op_as_torch_wants_one(case: str) -> None:
    options = gradients_of(case)
    x, weight, bias = (torch.randn(*shape, requires_grad=True) for shape in ((3, 9), (4, 9), (4,)))
    names = ("grad_index", "kept", "mask", "alpha")
    torch.library.opcheck(
        torch.ops.tritonsparse.block_matmul.default,
        (x, weight, bias, None, build_index_reference(FLAGS), *(options.get(name) for name in names)),
        {"block": list(BLOCK), "transposed": False, "backend": "torch", "out_dtype": torch.float32},
    )


def test_a_kept_view_is_multiplied_by_in_place_of_the_weight() -> None:
    weight = torch.randn(4, 9)
    view = torch.where(spread(FLAGS), weight, 0.0).bfloat16()
    x = torch.randn(3, 9, dtype=torch.bfloat16)
    options: dict[str, Any] = {"block": BLOCK, "out_dtype": torch.bfloat16}
    y = block_matmul(
        x, torch.full_like(weight, float("nan")), None, build_index_reference(FLAGS), w_hat=view, **options
    )
    torch.testing.assert_close(y, x @ view.t())


def test_flags_of_a_mask_and_back() -> None:
    assert torch.equal(block_flags(spread(FLAGS), BLOCK), FLAGS)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"x": torch.zeros(3, 8)}, r"expected x of shape \[..., 9\]"),
        ({"x": torch.zeros(3, 9).half()}, "expected x in torch.float32"),
        ({"index": torch.zeros(3, dtype=torch.int32)}, "expected index to be int32"),
        ({"grad_index": build_index_reference(SUPERSET)}, "expected grad_index with kept, or mask"),
        ({"mask": torch.zeros(4, 8, dtype=torch.bool)}, "expected mask to be torch.bool"),
        ({"w_hat": torch.zeros(4, 9).half()}, "expected w_hat to be torch.float32"),
    ],
)
def test_operands_that_do_not_fit_are_refused(changed: dict[str, Tensor], message: str) -> None:
    operands: dict[str, Any] = {
        "x": torch.zeros(3, 9), "weight": torch.zeros(4, 9), "bias": None, "index": build_index_reference(FLAGS),
    }  # fmt: skip
    with pytest.raises(ValueError, match=f"block_matmul: {message}"):
        block_matmul(**{**operands, **changed}, block=BLOCK)


@pytest.mark.parametrize("case", ["kept", "superset", "everywhere"])
def test_eager_code_and_the_registered_op_agree_bit_for_bit(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options = gradients_of(case)
    del options["multiplier"]
    weight, bias, x, grad_y = torch.randn(4, 9), torch.randn(4), torch.randn(2, 5, 9), torch.randn(2, 5, 4)
    results = []
    for eager in (True, False):
        if not eager:
            monkeypatch.setattr(module, "is_eager", lambda *_: False)
        given = [tensor.clone().requires_grad_() for tensor in (x, weight, bias)]
        y = block_matmul(*given, build_index_reference(FLAGS), block=BLOCK, **options)
        assert ("BlockMatmul" in type(y.grad_fn).__name__) == eager
        y.backward(grad_y)
        with torch.no_grad():
            plain = block_matmul(*given, build_index_reference(FLAGS), block=BLOCK, **options)
        results.append([y.detach(), plain, *(each.grad for each in given)])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*results, strict=True))
