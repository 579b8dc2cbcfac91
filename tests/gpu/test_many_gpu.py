"""One launch over all layers on a GPU: bfloat16, odd shapes, graphs, and a training run with cache and deferral."""

from __future__ import annotations

import pytest
import torch
from tolerances import ELEMENTWISE
from torch import Tensor, nn

import tritonsparse as ts
from tritonsparse.kernels.weight.backward_many import backward_many, backward_many_reference
from tritonsparse.kernels.weight.forward_many import cast_many, cast_many_reference
from tritonsparse.kernels.weight.table import View, ViewTable
from tritonsparse.methods import AutoSparse

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.usefixtures("poisoned_memory"),
]

DEVICE = "cuda"
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# One element, one column, around tiles of 64, nothing divisible, layers.
SHAPES = [(1, 1), (257, 1), (65, 63), (127, 513), (1000, 511), (2048, 512), (512, 2048)]
KINDS = ["soft", "soft per row", "soft per block", "hard", "step per row", "mask"]


def views(master: torch.dtype, product: torch.dtype) -> list[View]:
    """Every kind on every shape it fits; no weight so close to its threshold that rounding could prune it."""
    random = torch.Generator(DEVICE).manual_seed(0)
    made = []
    for n, k in SHAPES:
        for named in KINDS:
            kind, _, per = named.partition(" per ")
            if per == "block" and k % 64:
                continue
            weight = torch.randn(n, k, generator=random, device=DEVICE)
            shape = {"": (1,), "row": (n,), "block": (1, k // 64)}[per]
            threshold = torch.randn(shape, generator=random, device=DEVICE)
            cutoff = threshold.sigmoid() if kind == "soft" else threshold
            spread = cutoff[:, None] if cutoff.dim() == 1 else cutoff.repeat_interleave(64, 1)
            weight = torch.where((weight.to(master).float().abs() - spread).abs() < 1e-2, weight + 0.05, weight)
            weight[torch.rand(n, k, generator=random, device=DEVICE) < 0.1] = 0.0
            annealed = kind != "step"
            made.append(
                View(
                    kind,
                    weight.to(master),
                    None if kind == "mask" else threshold,
                    torch.rand(n, k, generator=random, device=DEVICE) < 0.3 if kind == "mask" else None,
                    torch.rand(n, k, generator=random, device=DEVICE) < 0.5 if annealed else None,
                    torch.tensor(0.25, device=DEVICE) if annealed else None,
                    torch.empty(n, k, dtype=product, device=DEVICE),
                )
            )
    return made


def error(actual: Tensor, expected: Tensor) -> float:
    scale = expected.double().norm().item()
    return (actual.double() - expected.double()).norm().item() / (scale or 1.0)


@pytest.mark.parametrize(("master", "product"), [(FP32, BF16), (FP32, FP16), (FP32, FP32), (BF16, BF16)])
def test_all_layers_equal_the_references(master: torch.dtype, product: torch.dtype) -> None:
    given = views(master, product)
    bracket = torch.tensor([0.25, 0.75], device=DEVICE)
    table = ViewTable(given, "triton")
    counted = cast_many(table, bracket)
    ours = [view.w_hat.clone() for view in given if view.w_hat is not None]
    expected = cast_many_reference(given, bracket)
    assert torch.equal(counted.kept, expected.kept)
    assert counted.below is not None and expected.below is not None and torch.equal(counted.below, expected.below)
    assert counted.inside is not None and expected.inside is not None and torch.equal(counted.inside, expected.inside)
    for view, w_hat in zip(given, ours, strict=True):
        assert view.w_hat is not None
        # T may differ by an ulp of float32 before the one rounding to the product's dtype.
        assert error(w_hat, view.w_hat) <= (ELEMENTWISE if product == FP32 else 1e-3), view.kind

    grads = [torch.randn_like(view.weight) for view in given]
    left, right = [grad.clone() for grad in grads], [grad.clone() for grad in grads]
    of_thresholds = backward_many(table, left)
    expected_of = backward_many_reference(given, right)
    for view, a, b, ds, expected_ds in zip(given, left, right, of_thresholds, expected_of, strict=True):
        assert error(a, b) <= (ELEMENTWISE if master == FP32 else 4e-3), view.kind
        terms = view.weight.numel() ** 0.5
        assert not ds.numel() or (ds - expected_ds).abs().max().item() <= 1e-5 * terms, view.kind
    again = [grad.clone() for grad in grads]
    repeated = backward_many(table, again)
    assert all(torch.equal(a, b) for a, b in zip(left, again, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(of_thresholds, repeated, strict=True))


def test_both_passes_replay_in_a_graph_as_weights_and_thresholds_move() -> None:
    given = [view for view in views(FP32, BF16) if view.weight.shape == (2048, 512)]
    table = ViewTable(given, "triton")
    dense = [torch.randn_like(view.weight) for view in given]
    grads = [grad.clone() for grad in dense]

    def passes() -> tuple[Tensor, list[Tensor]]:
        for grad, source in zip(grads, dense, strict=True):
            grad.copy_(source)
        return cast_many(table).kept, backward_many(table, grads)

    passes()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept, of_thresholds = passes()
    for view in given:
        view.weight.mul_(1.5)
        if view.threshold is not None:
            view.threshold.add_(0.3)
    graph.replay()
    torch.cuda.synchronize()
    replayed = [grad.clone() for grad in grads]
    expected_kept, expected_of = passes()
    assert torch.equal(kept, expected_kept)
    assert all(torch.equal(a, b) for a, b in zip(replayed, grads, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(of_thresholds, expected_of, strict=True))


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
