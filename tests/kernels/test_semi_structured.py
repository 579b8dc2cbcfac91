"""2:4 products without a GPU: the reference, the reasons, the refusals, and the op around cuSPARSELt's two calls."""

import copy
from typing import Any

import pytest
import torch
from cases.matrices import error
from cases.semi_structured import CASES, Case, Emulated, product

import tritonsparse as ts
from tritonsparse.kernels.select.transposable import transposable_mask
from tritonsparse.kernels.semi_structured import semi_structured_linear, semi_structured_reason
from tritonsparse.layers import backend

FP16 = torch.float16
N, K = 64, 96


@pytest.mark.parametrize("case", CASES, ids=str)
def test_reference_and_sparse_op_give_the_dense_product_and_its_gradients(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    p = product(case, torch.float64)
    assert set(p.errors(p.run("torch")).values()) == {0.0}
    p, emulated = product(case, FP16), Emulated(monkeypatch)
    # The same products in half precision, summed by other kernels.
    wrong = p.errors(p.run())
    assert max(wrong.values()) < 1e-3, wrong
    # The forward, and dX where it is sparse; each compresses its own. Of no rows nothing is multiplied.
    products = (2 if case.both else 1) if p.x.numel() else 0
    assert emulated.compressed == emulated.multiplied == products


@pytest.mark.parametrize(("pattern", "products"), [("2:4", 1), ("2:4:transposable", 2)])
def test_layers_multiply_sparsely_what_their_pattern_allows(
    pattern: str, products: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    emulated = Emulated(monkeypatch)
    monkeypatch.setattr(backend, "hardware_reason", lambda device: None)
    # As it would run on a GPU, but for Triton's kernel in front.
    monkeypatch.setattr(backend.Backend, "elementwise", "torch")
    layer = torch.nn.Linear(K, N).half()
    dense, x, grads = copy.deepcopy(layer), torch.randn(5, K).half(), []
    for each, name in ((layer, "semi_structured"), (dense, "torch")):
        ts.sparsify(each, "static", sparsity=0.5, pattern=pattern, total_steps=4, backend=name)
        leaf = x.clone().requires_grad_()
        each(leaf).float().square().sum().backward()
        grads.append((leaf.grad, each.weight.grad, each.bias.grad))
    assert all(error(ours, theirs) < 5e-3 for ours, theirs in zip(*grads, strict=True))
    assert emulated.multiplied == products


def test_all_that_stands_in_the_way_is_named() -> None:
    two = torch.tensor([True, True, False, False]).repeat(64, 24)
    three, square, both = two.clone(), two.repeat(2, 1)[:96], transposable_mask(torch.rand(64, 96), 2, 4)
    three[5, 2] = True
    x, weight, reason = torch.zeros(8, 96).half(), torch.zeros(64, 96), semi_structured_reason
    on_cpu = "2:4 products need a GPU, and the operands are on cpu"
    along = "the mask keeps more than 2 of some 4 neighbours along a {} of W [N, K]; " + on_cpu
    assert reason(x.float(), weight) == f"2:4 products are in float16 or bfloat16, and x is in torch.float32; {on_cpu}"
    shape = reason(x[:, :90], torch.zeros(64, 90))
    assert shape is not None and "this one is 64 x 90" in shape and shape.endswith(on_cpu)
    # Fewer than two is no obstacle; three are.
    assert reason(x, weight, two) == reason(x, weight, weight.bool()) == on_cpu
    assert reason(x, weight, three) == along.format("row")
    # Along the inputs of a weight stored [K, N], and along those only.
    assert reason(x, weight.t(), two.t(), transposed=True) == on_cpu
    assert reason(x, torch.zeros(96, 96), square, transposed=True) == along.format("row")
    # Along the outputs too, where dX is asked for.
    assert reason(x, weight, both, sparse_grad_input=True) == on_cpu
    assert reason(x, weight.t(), both.t(), transposed=True, sparse_grad_input=True) == on_cpu
    assert reason(x, weight, two, sparse_grad_input=True) == along.format("column")


X, W_HAT = torch.zeros(2, K), torch.zeros(N, K)


@pytest.mark.parametrize(("kind", "words", "change"), [
    (ValueError, 'backend "torch" or "semi_structured", got \'cuda\'; pass either', {"backend": "cuda"}),
    (ValueError, r"x of shape \[..., 96\].*check the layer's input", {"x": X[:, :64].half()}),
    (ValueError, "x in torch.float16 .*cast x or run under torch.autocast", {"x": X}),
    (ValueError, r"bias to be torch.float16 \[64\].*cast the bias with x", {"bias": torch.zeros(N)}),
    (ValueError, r"w_hat to be a floating-point matrix \[N, K\].*effective weight", {"w_hat": W_HAT[0]}),
    (ValueError, 'x is in torch.float32; pass backend="torch"', {"x": X, "w_hat": W_HAT}),
    (ValueError, 'is 64 x 90; pass backend="torch"', {"x": X[:, :90].half(), "w_hat": W_HAT[:, :90].half()}),
    (RuntimeError, 'need a GPU, and the operands are on cpu; pass backend="torch"', {}),
])  # fmt: skip
def test_what_does_not_fit_is_refused_with_a_remedy(kind: type[Exception], words: str, change: dict[str, Any]) -> None:
    given = {"x": X.half(), "w_hat": W_HAT.half(), "backend": "semi_structured"}
    with pytest.raises(kind, match=f"^semi_structured_linear: expected .*{words}"):
        semi_structured_linear(**given | change)
