"""Sparse layers and methods on a GPU: back ends agree in training steps, graphs and compilers; masks stay exact."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases.block import no_synchronization
from graphs import captured
from small_runs import relative_error
from tolerances import product_bound
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import tritonsparse as ts
from tritonsparse.masks.topk import kept_count
from tritonsparse.methods import DSR, SNFS, STR, AutoSparse, OptG, PowerProp
from tritonsparse.methods.target_sparsity import common_offset
from tritonsparse.train.text.translation_presets import build_model

pytestmark = pytest.mark.usefixtures("fresh_compiler")

DEVICE = "cuda"
AUTOSPARSE = ts.methods.AutoSparse(threshold_init=-4.0, alpha=0.4, alpha_schedule="constant")


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(200, 300), nn.ReLU(), Conv1D(120, 300), nn.GELU(), nn.Linear(120, 64)).to(DEVICE)


def sparse(model: nn.Module, backend: str, method: Any = AUTOSPARSE) -> ts.Sparsifier:
    return ts.sparsify(model, method, backend=backend, include=["*"], total_steps=100)


def step(model: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    with torch.autocast(DEVICE, torch.bfloat16):
        loss = model(x).float().square().mean()
    loss.backward()
    return loss.detach()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_auto_takes_the_kernels() -> None:
    sparsifier = sparse(network(), "auto")
    assert {layer.backend.name for layer in sparsifier.layers.values()} == {"triton"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("method", ["autosparse", "gmp"])
def test_back_ends_agree_on_output_and_gradients(dtype: torch.dtype, method: str) -> None:
    # Three products forward and two back, with two activations between them; the longest sum is of 300.
    bound = 7 * product_bound(dtype, dtype, 300)
    chosen: Any = AUTOSPARSE if method == "autosparse" else ts.methods.GMP(sparsity=0.8)
    x = torch.randn(7, 33, 200, device=DEVICE, dtype=dtype)
    results = []
    for backend in ("torch", "triton"):
        model = network().to(dtype)
        sparsifier = sparse(model, backend, chosen)
        if method == "gmp":
            for layer in sparsifier.layers.values():
                random = torch.Generator(DEVICE).manual_seed(layer.weight.numel())
                layer.kind = "mask"
                layer.mask = torch.rand(layer.weight.shape, generator=random, device=DEVICE) < 0.3
        y = model(x)
        y.backward(torch.ones_like(y) + y.detach())
        results.append({"y": y.detach(), **gradients(model)})
    assert results[0].keys() == results[1].keys()
    for name, expected in results[0].items():
        assert relative_error(results[1][name], expected) <= bound, name


def test_a_captured_training_pass_follows_alpha_and_thresholds() -> None:
    model = network()
    sparsifier = sparse(model, "triton")
    x = torch.randn(64, 200, device=DEVICE)
    graph, loss = captured(lambda: step(model, x), calls=3, before=model.zero_grad)
    twin = copy.deepcopy(model)
    for alpha, shift in ((0.0, 0.5), (0.8, -1.0)):
        for one in (model, twin):
            for layer in one.modules():
                if isinstance(layer, nn.Linear | Conv1D):
                    layer.alpha.fill_(alpha)
                    layer.threshold.data.add_(shift)
        graph.replay()
        twin.zero_grad()
        expected = step(twin, x)
        assert relative_error(loss, expected) <= 1e-3
        ours = gradients(model)
        for name, gradient in gradients(twin).items():
            assert relative_error(ours[name], gradient) <= 1e-2, name
    assert len(sparsifier.layers) == 3


def test_inductor_compiles_one_graph_and_alpha_moves_without_recompiling() -> None:
    model = network()
    sparsifier = sparse(model, "triton")
    twin = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True)
    x = torch.randn(64, 200, device=DEVICE)
    step(compiled, x)
    layers = [*sparsifier.layers.values(), *(m for m in twin.modules() if isinstance(m, nn.Linear | Conv1D))]
    with torch.compiler.set_stance("fail_on_recompile"):
        for alpha in (0.9, 0.0):
            for layer in layers:
                layer.alpha.fill_(alpha)
                layer.threshold.data.add_(0.25)
            model.zero_grad()
            twin.zero_grad()
            actual, expected = step(compiled, x), step(twin, x)
            assert relative_error(actual, expected) <= 1e-2
            ours = gradients(model)
            for name, gradient in gradients(twin).items():
                assert relative_error(ours[name], gradient) <= 3e-2, name


class Vocabulary:
    pad_token_id, eos_token_id = 0, 1

    def __len__(self) -> int:
        return 512


def marian(backend: str, compiled: bool = False) -> list[dict[str, Tensor]]:
    """Gradients and parameters of three steps of a tiny Marian under bfloat16 autocast."""
    torch.manual_seed(0)
    vocabulary: Any = Vocabulary()
    model = build_model("transformer-tiny", vocabulary, dropout=0.0).to(DEVICE)
    sparsifier = ts.sparsify(model, AUTOSPARSE, backend=backend)
    optimizer = torch.optim.AdamW(sparsifier.param_groups(lr=1e-3), fused=True)
    sparsifier.attach(optimizer)
    ids = torch.randint(2, 512, (3, 8, 24), device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(1))

    def loss() -> Tensor:
        with torch.autocast(DEVICE, torch.bfloat16):
            logits = model(input_ids=ids[0], decoder_input_ids=ids[1], use_cache=False).logits
        return F.cross_entropy(logits.float().flatten(0, 1), ids[2].flatten())

    run = torch.compile(loss) if compiled else loss
    states = []
    for _ in range(3):
        value = run()
        value.backward()
        states.append({"loss": value.detach(), **gradients(model)})
        optimizer.step()
        optimizer.zero_grad()
    assert sparsifier.step == 3
    return states


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_translation_model_trains_alike_on_both_back_ends(compiled: bool) -> None:
    expected, actual = marian("torch"), marian("triton", compiled)
    assert expected[0].keys() == actual[0].keys()
    weights = [name for name in expected[0] if name.endswith("weight")]
    flat = [torch.cat([states[0][name].flatten() for name in weights]) for states in (actual, expected)]
    # Compilers fuse roundings away; eager back ends differ in the last bit of a few entries of the effective weight.
    assert relative_error(*flat) <= (3e-2 if compiled else 5e-3)
    for ours, theirs in zip(actual, expected, strict=True):
        assert relative_error(ours["loss"], theirs["loss"]) <= 1e-2
    thresholds = [name for name in expected[0] if name.endswith("threshold")]
    assert thresholds
    ours, theirs = (torch.cat([states[0][name] for name in thresholds]) for states in (actual, expected))
    assert relative_error(ours, theirs) <= 5e-2


def test_a_thresholded_layer_keeps_no_more_than_autocast_keeps_of_a_dense_one() -> None:
    """Memory held between forward and backward: the effective weight takes the place of autocast's copy of W."""
    x = torch.randn(64, 4096, device=DEVICE, dtype=torch.bfloat16)

    def held(layer: nn.Module) -> int:
        with torch.autocast(DEVICE, torch.bfloat16):
            layer(x).sum().backward()
        layer.zero_grad()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        with torch.autocast(DEVICE, torch.bfloat16):
            y = layer(x)
        torch.cuda.synchronize()
        held = torch.cuda.memory_allocated() - before
        del y
        return held

    dense = nn.Sequential(nn.Linear(4096, 4096, device=DEVICE))
    of_dense = held(dense)
    sparse(dense, "triton")
    # 1/50 byte a weight of slack, for the allocator's rounding.
    assert held(dense) <= of_dense + 4096 * 4096 / 50


METHODS = {
    "autosparse": AutoSparse(sparsity=0.75, control_every=2, alpha=0.4),
    "dsr": DSR(sparsity=0.75, update_every=2),
    "optg": OptG(sparsity=0.75),
    "powerprop": PowerProp(sparsity=0.75, backward_sparsity=0.5),
    "snfs": SNFS(sparsity=0.75, update_every=2),
    "str": STR(sparsity=0.75, control_every=2),
}


def train(method: Any, moved_after: bool) -> ts.Sparsifier:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 32))
    if not moved_after:
        model.cuda()
    sparsifier = ts.sparsify(model, method, total_steps=24, steps_per_epoch=4, seed=1)
    model.cuda()
    optimizer = torch.optim.AdamW(sparsifier.param_groups(lr=1e-3), fused=True)
    sparsifier.attach(optimizer)
    for step in range(24):
        x = torch.randn(16, 64, generator=torch.Generator().manual_seed(step)).cuda()
        (model(x) - x[:, :32]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return sparsifier


@pytest.mark.parametrize("moved_after", [False, True], ids=["on the GPU", "moved there"])
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_the_sparsity_is_met_wherever_the_model_was_sparsified(method: Any, moved_after: bool) -> None:
    sparsifier = train(method, moved_after)
    layers = sparsifier.layers.values()
    kept = sum(int(layer.mask.sum()) if layer.mask is not None else layer.kept_count() for layer in layers)
    total = 64 * 128 + 128 * 32
    assert abs(kept - kept_count(total, 0.75)) <= (0 if isinstance(method, OptG | SNFS | DSR) else 12)


def test_the_offset_is_the_cpus_and_is_found_without_a_synchronisation() -> None:
    weights = [torch.randn(300, 70), torch.randn(64, 64) * 0.1]
    logits = [torch.tensor([-3.0]), torch.tensor([-2.0])]
    most = [weight.numel() for weight in weights]
    expected = common_offset(weights, logits, most, 12_000)
    on_gpu = [weight.cuda() for weight in weights], [logit.cuda() for logit in logits]
    with no_synchronization():
        found = common_offset(*on_gpu, most, 12_000)
    assert found.item() == pytest.approx(expected.item(), abs=1e-4)
