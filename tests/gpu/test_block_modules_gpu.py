"""Packed blocks on a GPU: inference of one token and of many, training in compact form, graphs and compilers."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from cases.matrices import error as relative_error
from graphs import captured
from tolerances import product_bound
from torch import nn
from transformers.pytorch_utils import Conv1D

import tritonsparse as ts
from tritonsparse.layers.backend import packed_block_backend
from tritonsparse.layers.bsr import BlockLayer

pytestmark = pytest.mark.usefixtures("fresh_compiler")

DEVICE = "cuda"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def network(block: int = 32) -> nn.Sequential:
    torch.manual_seed(0)
    first, last = nn.Linear(8 * block, 16 * block), nn.Linear(8 * block, 4 * block)
    return nn.Sequential(first, nn.ReLU(), Conv1D(8 * block, 16 * block), nn.GELU(), last).to(DEVICE)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("m", [1, 700])
def test_a_packed_model_takes_the_kernels_and_gives_what_the_dense_one_gives(dtype: torch.dtype, m: int) -> None:
    sparsifier = ts.sparsify(network().to(dtype), "static", sparsity=0.8, pattern="block:32")
    dense, packed = copy.deepcopy(sparsifier).finalize(), sparsifier.finalize(format="bsr")
    layers = [layer for layer in packed.modules() if isinstance(layer, BlockLayer)]
    assert [packed_block_backend(layer.backend, layer.values) for layer in layers] == ["triton"] * 3
    x = torch.randn(m, 256, device=DEVICE, dtype=dtype)
    with torch.no_grad():
        assert relative_error(packed(x), dense(x)) <= 3 * product_bound(dtype, dtype, 512)


def test_one_token_is_replayed_from_a_graph_and_compiles_whole() -> None:
    packed: Any = ts.sparsify(network(), "static", sparsity=0.8, pattern="block:32").finalize(format="bsr")
    packed.bfloat16().requires_grad_(False)
    x = torch.randn(1, 256, device=DEVICE, dtype=torch.bfloat16)
    expected = packed(x)
    # Three layers; the compiler may leave out roundings in between.
    bound = 3 * product_bound(torch.bfloat16, torch.bfloat16, 512)
    assert relative_error(torch.compile(packed, fullgraph=True)(x), expected) <= bound
    graph, y = captured(lambda: packed(x))
    x.normal_()
    graph.replay()
    assert torch.equal(y, packed(x))


def test_a_saved_model_moves_to_the_gpu(tmp_path: Path) -> None:
    packed = ts.sparsify(network(), "static", sparsity=0.8, pattern="block:32").finalize(format="bsr")
    ts.save_bsr(packed, tmp_path)
    again = ts.load_bsr(tmp_path, network().cpu()).to(DEVICE)
    x = torch.randn(5, 256, device=DEVICE)
    assert torch.equal(again(x), packed(x))


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("backend", ["torch", "auto"])
def test_compact_training_follows_the_dense_storage(backend: str, autocast: bool) -> None:
    method = ts.methods.RigL(sparsity=0.8, update_every=4)
    losses = []
    for packs in (False, True):
        model = network()
        sparsifier = ts.sparsify(model, method, pattern="block:32", backend=backend, total_steps=20)
        optimizer = torch.optim.AdamW(sparsifier.param_groups(lr=1e-3, weight_decay=0.1), fused=True)
        sparsifier.attach(optimizer)
        if packs:
            sparsifier.compact()
        run = []
        for step in range(12):
            torch.manual_seed(step)
            with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
                loss = model(torch.randn(64, 256, device=DEVICE)).float().square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            run.append(loss.detach())
        losses.append(torch.stack(run))
    assert relative_error(losses[1], losses[0]) <= (1e-2 if autocast else 1e-4)


def test_compact_training_allocates_less() -> None:
    peaks = []
    for packs in (False, True):
        torch.cuda.empty_cache()
        model = nn.Linear(4096, 4096, bias=False, device=DEVICE)
        sparsifier = ts.sparsify(model, "static", sparsity=0.9, pattern="block:64")
        optimizer = torch.optim.AdamW(sparsifier.param_groups(lr=1e-3))
        sparsifier.attach(optimizer)
        if packs:
            sparsifier.compact()
        for _ in range(3):
            torch.cuda.reset_peak_memory_stats()
            model(torch.ones(16, 4096, device=DEVICE)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        peaks.append(torch.cuda.max_memory_allocated())
        del model, sparsifier, optimizer
    assert peaks[1] < 0.2 * peaks[0]


def test_blocks_that_are_no_multiples_of_16_take_the_reference() -> None:
    packed = ts.sparsify(network(8), "static", sparsity=0.5, pattern="block:8").finalize(format="bsr", max_density=0.6)
    layer = next(layer for layer in packed.modules() if isinstance(layer, BlockLayer))
    assert packed_block_backend(layer.backend, layer.values) == "torch"
    assert packed(torch.randn(2, 64, device=DEVICE)).shape == (2, 32)
