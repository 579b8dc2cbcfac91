"""The kernels of the effective weight on a GPU: bfloat16, odd shapes, graphs, and offsets beyond 2^31."""

from functools import partial

import pytest
import torch
from cases.weight import CASES, LARGE, Case, alike, check, check_many, layers, operands
from cases.weight_exact import EXACT, check_exact
from graphs import captured
from tolerances import ELEMENTWISE
from torch import Tensor, nn

import tritonsparse as ts
from tritonsparse.kernels.weight.backward import threshold_backward
from tritonsparse.kernels.weight.backward_many import backward_many
from tritonsparse.kernels.weight.forward import threshold_cast
from tritonsparse.kernels.weight.forward_many import cast_many
from tritonsparse.kernels.weight.reference import effective_weight_reference, threshold_backward_reference
from tritonsparse.kernels.weight.table import ViewTable
from tritonsparse.kernels.weight.view import View
from tritonsparse.methods import AutoSparse

pytestmark = pytest.mark.usefixtures("poisoned_memory")

DEVICE = "cuda"
BF16, FP16 = torch.bfloat16, torch.float16
cast, backward = partial(threshold_cast, backend="triton"), partial(threshold_backward, backend="triton")


@pytest.mark.parametrize("half", [BF16, FP16], ids=str)
@pytest.mark.parametrize("case", CASES + LARGE, ids=str)
def test_kernels_are_as_exact_as_the_references(case: Case, half: torch.dtype) -> None:
    check(case, ELEMENTWISE, DEVICE, half)


@pytest.mark.parametrize("half", [BF16, FP16], ids=str)
def test_all_layers_in_one_launch_are_as_exact_as_one_by_one(half: torch.dtype) -> None:
    check_many(CASES + LARGE, ELEMENTWISE, DEVICE, half)


@pytest.mark.parametrize("name", EXACT)
def test_by_hand(name: str) -> None:
    check_exact(EXACT[name], cast, backward, DEVICE)


@pytest.mark.parametrize("kind", ["soft", "step per row", "mask"])
def test_results_repeat_bit_for_bit(kind: str) -> None:
    weight, view, grad, product = operands(Case(2048, 1500, kind, product="half"), DEVICE, BF16)
    first = cast(weight, view, out_dtype=product), *backward(grad, weight, view)
    for _ in range(20):
        again = cast(weight, view, out_dtype=product), *backward(grad, weight, view)
        assert all(map(alike, first, again))


def test_a_captured_graph_follows_weights_thresholds_masks_and_alphas() -> None:
    """Of one layer of each kind, by the functions of one layer and by those of all layers."""
    viewed, dense = layers([case for case in LARGE if case.n > 1000], DEVICE, BF16)
    table, grads = ViewTable(viewed, "triton"), [grad.clone() for grad in dense]

    def passes() -> list[Tensor | None]:
        torch._foreach_copy_(grads, dense)
        cast_many(table)
        found = [layer.w_hat.clone() for layer in viewed]
        found += [cast(layer.weight, layer.view) for layer in viewed]
        for grad, layer in zip(dense, viewed, strict=True):
            found += backward(grad, layer.weight, layer.view)
        return [*found, *backward_many(table, grads), *grads]

    graph, found = captured(passes)
    for scale, shift, alpha in ((1.5, 0.3, 0.0), (1.0, -1.0, 1.0), (0.5, 0.5, 0.25)):
        for layer in viewed:
            layer.weight.mul_(scale)
            view = layer.view
            if view.threshold is not None:
                view.threshold.add_(shift)
            if view.mask is not None:
                view.mask.logical_xor_(torch.rand(view.mask.shape, device=DEVICE) < 0.2)
            if view.alpha is not None:
                view.alpha.fill_(alpha)
        graph.replay()
        replayed = [None if each is None else each.clone() for each in found]
        assert all(map(alike, replayed, passes()))


def test_offsets_beyond_two_to_the_31_reach_their_elements() -> None:
    """Both passes over 2^31 + elements; reference in bands of rows, for memory."""
    n, k, band = 32_777, 65_600, 1024
    assert n * k > 2**31 + 2 * band * k // 16
    if torch.cuda.mem_get_info()[0] < 36 * 2**30:
        pytest.skip("needs 36 GiB of free GPU memory")
    random = torch.Generator(DEVICE).manual_seed(0)
    weight, grad = (torch.empty(n, k, device=DEVICE, dtype=FP16).normal_(generator=random) for _ in range(2))
    view = View("soft", torch.zeros(n, device=DEVICE), alpha=torch.tensor(0.5, device=DEVICE))
    w_hat, (grad_weight, grad_s) = cast(weight, view), backward(grad, weight, view)
    for start in range(0, n, band):
        rows = slice(start, min(n, start + band))
        part = view._replace(threshold=view.threshold[rows])
        assert torch.equal(w_hat[rows], effective_weight_reference(weight[rows], part, FP16)), f"w_hat, rows {rows}"
        expected, expected_s = threshold_backward_reference(grad[rows], weight[rows], part)
        assert torch.equal(grad_weight[rows], expected), f"grad_weight, rows {rows}"
        # 65,600 terms of about 0.25 each, in two orders of summation.
        assert (grad_s[rows] - expected_s).abs().max().item() <= 1e-5 * 0.25 * k**0.5


@pytest.mark.parametrize("compiled", [False, True])
def test_training_with_cache_and_deferral_is_training_without(compiled: bool) -> None:
    found = {}
    for name, options in (("plain", {}), ("cached", {"cache_dtype": BF16, "defer": True})):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(256, 512), nn.GELU(), nn.Linear(512, 256)).to(DEVICE)
        method = AutoSparse(threshold_init=-4.0, alpha=0.5)
        sparsifier = ts.sparsify(model, method, include=["*"], total_steps=8, steps_per_epoch=4)
        optimizer = torch.optim.AdamW(sparsifier.param_groups(lr=1e-3, weight_decay=0.01), fused=True)
        sparsifier.attach(optimizer, **options)
        forward = torch.compile(model, fullgraph=True) if compiled else model
        random = torch.Generator(DEVICE).manual_seed(1)
        losses = []
        for _ in range(8):
            for _ in range(2):
                x = torch.randn(64, 256, generator=random, device=DEVICE)
                with torch.autocast("cuda", BF16):
                    loss = (forward(x) - x).float().square().mean()
                loss.backward()
                losses.append(loss.item())
            optimizer.step()
            optimizer.zero_grad()
        found[name] = losses
        torch.compiler.reset()
    assert found["cached"] == pytest.approx(found["plain"], rel=1e-3)
