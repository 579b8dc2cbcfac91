"""Thousands of generated calls of `sparsify`, of a Sparsifier and of the loaders, each against an oracle.

What is accepted must compute what a float64 reference of its views computes, train, and become a stock model that
computes the same. What is refused must be refused in a sentence of ours, and leave all as it was.
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import math
import random
import re
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

import tritonsparse as ts
from tritonsparse.methods import METHODS

pytestmark = [pytest.mark.long, pytest.mark.filterwarnings("ignore")]
SENTENCE = re.compile(r"^[\w.]+: expected .+", re.DOTALL)
REFUSALS = (ValueError, TypeError, RuntimeError, FileNotFoundError)
NAN, INF = math.nan, math.inf
CALLS, PARTS = 3600, 12


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8), nn.LayerNorm(8), nn.Linear(8, 4))


def convolution() -> nn.Module:
    layers = (nn.Conv2d(4, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.Flatten(), nn.Linear(8 * 16, 4))
    return nn.Sequential(nn.Unflatten(1, (4, 2, 2)), nn.Upsample((4, 4)), *layers)


def partly_frozen() -> nn.Module:
    model: Any = mlp()
    model[0].requires_grad_(False)
    return model


def zeroed() -> nn.Module:
    model: Any = mlp()
    with torch.no_grad():
        model[2].weight[torch.rand(8, 16) < 0.6] = 0.0
    return model


def tied() -> nn.Module:
    model: Any = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4))
    model[1].weight = model[0].weight
    return model


def narrow() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 3, bias=False), nn.Tanh(), nn.Linear(3, 4))


MODELS = (mlp, mlp, convolution, partly_frozen, zeroed, tied, narrow)
SPARSITIES: tuple[Any, ...] = (
    *(0.0, 0.5, 0.5, 0.7, 0.7, 0.9, 0.99, None, None),
    *(1.0, -0.1, 1.5, NAN, INF, "0.5", True, [0.5], {"0": 0.5}, {"*": 0.7}, {"nothing": 0.5}, {"0": NAN}, {}),
)
ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "pattern": (
        *["unstructured"] * 8,
        "block:2",
        "block:4",
        "2:4",
        "1:2",
        "channel",
        "block:3",
        "4:2",
        "",
        "dense",
        None,
        7,
    ),
    "include": (*[None] * 8, ["0"], ["*"], ["2", "4"], ["nothing"], "0", [], [7]),
    "exclude": (*[None] * 8, ["0"], ["*"], ["nothing"], "4", []),
    "distribution": (*[None] * 6, "uniform", "erk", "even", 7),
    "backend": (*["auto"] * 6, "torch", "triton", "fused", "block", "semi_structured", "cuda", None),
    "total_steps": (*[12] * 6, 100, 1, 2, 0, -5, None, 2.5, "12", NAN),
    "steps_per_epoch": (*[3] * 6, 1, 100, 0, -1, None, "3", 1.5),
    "initial_mask": (*[None] * 8, "magnitude", "random", "zeros", "largest", {}, {"0": torch.ones(2, 2)}, 3),
    "output_heads": (False, False, True),
    "seed": (0, 1, -1, 2**63, 2**70, "0", None),
    "embedding_sparsity": (*[None] * 10, 0.5, 2.0),
}


def fingerprint(model: nn.Module) -> str:
    """Of all that a caller could see of a model."""
    found = hashlib.sha256()
    for name, module in model.named_modules():
        found.update(f"{name} {type(module)} {sorted(vars(module))} {sorted(module._forward_pre_hooks)}".encode())
    for name, tensor in model.state_dict(keep_vars=True).items():
        found.update(f"{name} {id(tensor)} {tensor.dtype} {tensor.requires_grad}".encode())
        found.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def assert_ours(error: BaseException, what: Any) -> None:
    assert isinstance(error, REFUSALS), (what, repr(error))
    assert SENTENCE.match(str(error)), (what, repr(error))


def reference(layer: Any) -> Tensor:
    """S(W) in float64, of the view's own tensors."""
    weight = layer.weight.detach().double()
    if layer.exponent is not None:
        weight = weight.sign() * weight.abs() ** layer.exponent
    if layer.kind == "dense":
        return weight
    if layer.kind == "mask":
        return torch.where(layer.mask, weight, 0.0)
    threshold = layer.threshold.detach().double()
    if layer.kind == "soft":
        return weight.sign() * (weight.abs() - threshold.sigmoid()).clamp_min(0.0)
    cut = threshold if threshold.numel() == 1 else threshold.view(-1, *[1] * (weight.dim() - 1))
    return torch.where(weight.abs() > cut, weight, 0.0)


def assert_computes(model: Any, sparsifier: ts.Sparsifier, build: Callable[[], Any], x: Tensor, what: Any) -> None:
    """The live model, the float64 reference of its views in the stock model, and the finalized weights agree."""
    stock = build()
    finalized = sparsifier.finalized_state_dict()
    assert stock.load_state_dict(finalized), what
    assert torch.equal(model.eval()(x), stock.eval()(x)) or torch.allclose(model(x), stock(x), rtol=1e-5, atol=1e-6), (
        what
    )
    for name, layer in sparsifier.layers.items():
        wanted = reference(layer)
        stored = finalized[f"{name}.weight" if name else "weight"]
        assert torch.allclose(stored.double(), wanted, rtol=1e-5, atol=1e-7), (what, name)
        assert torch.equal(stored == 0, wanted == 0) or layer.kind != "mask", (what, name)


def train(model: Any, optimizer: Any, x: Tensor, steps: int) -> None:
    model.train()
    for _ in range(steps):
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("part", range(PARTS))
def test_every_call_of_sparsify_is_right_or_refused_and_harmless(part: int) -> None:
    draw, accepted = random.Random(part), 0
    for number in range(CALLS // PARTS):
        build = draw.choice(MODELS)
        # Half of the calls ask for one odd thing or none, and half for anything.
        tame = draw.random() < 0.5
        odd = [draw.choice(list(ARGUMENTS))] if tame else [key for key in ARGUMENTS if draw.random() < 0.4]
        options = {"total_steps": 300, "steps_per_epoch": 100, **{key: draw.choice(ARGUMENTS[key]) for key in odd}}
        method = draw.choice([*METHODS] if tame else [*METHODS, *METHODS, "magnitude", "", 3, None])
        if (sparsity := draw.choice(SPARSITIES[:9] if tame else SPARSITIES)) is not None:
            options["sparsity"] = sparsity
        what = (part, number, build.__name__, method, options)

        def same(build: Callable[[], Any] = build, number: int = number) -> Any:
            torch.manual_seed(number)
            return build()

        model = same()
        before = fingerprint(model)
        try:
            sparsifier = ts.sparsify(model, method, **options)
        except Exception as error:
            assert_ours(error, what)
            assert fingerprint(model) == before, what
            continue
        accepted += 1
        x = torch.randn(6, 16 if build is convolution else 8)
        assert_computes(model, sparsifier, same, x, what)
        if draw.random() < 0.5:
            try:
                optimizer = torch.optim.SGD(sparsifier.param_groups(lr=0.05), momentum=0.9)
                sparsifier.attach(optimizer)
                train(model, optimizer, x, draw.choice((1, 2, 12)))
            except Exception as error:
                assert_ours(error, what)
            assert_computes(model, sparsifier, same, x, what)
        live = model.eval()(x)
        finalized = sparsifier.finalize()
        assert finalized is model and {type(m) for m in model.modules()} == {type(m) for m in same().modules()}, what
        assert torch.allclose(model(x), live, rtol=1e-5, atol=1e-6), what
    assert accepted > CALLS // PARTS // 10


GARBAGE: tuple[Any, ...] = (
    *(None, 0, -1, 2.5, NAN, "", "adam", [], {}, (), object(), True, torch.ones(2), torch.tensor(NAN), nn.Linear(2, 2)),
    *(torch.ones(3, dtype=torch.bool), [1, "a"], {"a": 1}, lambda: None, Path("/nowhere"), b"bytes"),
)


def state_of(sparsifier: ts.Sparsifier, model: nn.Module) -> str:
    found = hashlib.sha256(repr(sorted(sparsifier.state_dict(), key=str)).encode())
    for key, value in sparsifier.state_dict()["tensors"].items():
        found.update(key.encode())
        found.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    rest = {
        key: value for key, value in sparsifier.state_dict().items() if key not in ("tensors", "loss_sum", "loss_count")
    }
    found.update(repr(rest).encode())
    for tensor in model.state_dict().values():
        found.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def spoiled_state(draw: random.Random, state: dict[str, Any]) -> dict[str, Any]:
    """One thing of it changed."""
    state = copy.deepcopy(state)
    key = draw.choice(list(state))
    kind = draw.randrange(5)
    if kind == 0:
        del state[key]
    elif kind == 1:
        state[key] = draw.choice(GARBAGE)
    elif kind == 2 and state["tensors"]:
        name = draw.choice(list(state["tensors"]))
        state["tensors"][name] = draw.choice((torch.ones(3), torch.zeros(0), 3, None, "x"))
    elif kind == 3 and state["tensors"]:
        del state["tensors"][draw.choice(list(state["tensors"]))]
    else:
        state["config"] = {**state["config"], draw.choice([*state["config"], "new"]): draw.choice(GARBAGE)}
    return state


def calls_of(
    draw: random.Random, sparsifier: ts.Sparsifier, optimizer: Any, model: nn.Module
) -> tuple[Callable[[], Any], ...]:
    def wild() -> Any:
        return draw.choice(GARBAGE)

    return (
        lambda: sparsifier.attach(wild()),
        lambda: sparsifier.attach(optimizer, cache_dtype=wild()),
        lambda: sparsifier.observe(loss=wild()),
        lambda: sparsifier.set_row_mask(wild(), wild()),
        lambda: sparsifier.report(wild()),
        lambda: sparsifier.report(convention=wild()),
        lambda: sparsifier.load_state_dict(spoiled_state(draw, sparsifier.state_dict())),
        lambda: sparsifier.load_state_dict(wild()),
        lambda: sparsifier.restore("/nowhere"),
        lambda: sparsifier.save_pretrained("/nowhere/at/all"),
        lambda: sparsifier.copy_views(draw.choice((nn.Linear(2, 2), mlp(), copy.deepcopy(model)))),
        lambda: sparsifier.finalize(format=draw.choice(("bsr", "sparse", None, 3))),
        lambda: sparsifier.finalized_state_dict({"0.weight": torch.ones(3, 3)}),
        lambda: sparsifier.compact(),
    )


@pytest.mark.parametrize("part", range(PARTS))
def test_every_call_of_a_sparsifier_is_right_or_refused_and_harmless(part: int) -> None:
    draw = random.Random(100 + part)
    for number in range(CALLS // PARTS // 10):
        name = draw.choice([each for each in METHODS if each != "dense"])
        torch.manual_seed(number)
        model = mlp()
        options = {} if name == "dst" else {"sparsity": 0.5}
        try:
            sparsifier = ts.sparsify(model, name, total_steps=300, steps_per_epoch=100, **options)
        except ValueError as error:
            assert_ours(error, name)  # too short for its thresholds
            continue
        optimizer = torch.optim.SGD(sparsifier.param_groups(lr=0.05), momentum=0.9)
        sparsifier.attach(optimizer)
        x = torch.randn(6, 8)
        train(model, optimizer, x, 2)
        for _ in range(10):
            calls = calls_of(draw, sparsifier, optimizer, model)
            which = draw.randrange(len(calls))
            what, before = (part, number, name, which), state_of(sparsifier, model)
            try:
                calls[which]()
            except Exception as error:
                assert_ours(error, what)
                assert state_of(sparsifier, model) == before, what
            if not sparsifier.is_live:
                break
            sparsifier.expand()
        else:
            train(model, optimizer, x, 2)
            assert_computes(model, sparsifier, mlp, x, (part, number, name))


def gpt2() -> Any:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=32, n_positions=16, n_embd=16, n_layer=1, n_head=2))


IDS = torch.arange(12).reshape(2, 6)


def changed_tensor(draw: random.Random, file: Path) -> None:
    """One tensor dropped, or of other values, shape or dtype, in a well-formed file."""
    with safe_open(str(file), "pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(file)
    key = draw.choice(list(tensors))
    kind = draw.randrange(5)
    if kind == 0:
        del tensors[key]
    elif kind == 1:
        tensors[key] = torch.zeros(3)
    elif kind == 2:
        flat = tensors[key].reshape(-1).view(torch.uint8)
        flat[draw.randrange(len(flat))] ^= 1 << draw.randrange(8)
    elif kind == 3:
        tensors[key] = tensors[key].to(torch.float64)
    else:
        tensors["intruder"] = torch.ones(2)
    save_file(tensors, file, metadata)


def changed_head(draw: random.Random, file: Path) -> None:
    """One entry of the sidecar's JSON changed."""
    with safe_open(str(file), "pt") as opened:
        metadata = dict(opened.metadata())
    key = draw.choice(list(metadata))
    head = json.loads(metadata[key])
    entry = draw.choice(list(head))
    head[entry] = draw.choice((None, 0, -1, "x", [], {}, 1e30, [1], {"a": 1}))
    save_file(load_file(file), file, {**metadata, key: json.dumps(head)})


def changed_bytes(draw: random.Random, file: Path) -> None:
    data = bytearray(file.read_bytes())
    kind = draw.randrange(4)
    if kind == 0:
        data = data[: draw.randrange(len(data))]
    elif kind == 1:
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    elif kind == 2:
        at = draw.randrange(len(data))
        data[at : at + 8] = draw.randbytes(8)
    else:
        data += draw.randbytes(5)
    file.write_bytes(bytes(data))


@pytest.mark.parametrize("name", [*(each for each in METHODS if each not in ("dense", "str")), "blocks"])
def test_every_damaged_sidecar_is_refused_or_changes_nothing(name: str, tmp_path: Path) -> None:
    model, method, pattern = (
        gpt2(),
        "static" if name == "blocks" else name,
        "block:4" if name == "blocks" else "unstructured",
    )
    if name == "autosparse":
        method = ts.methods.AutoSparse(threshold_init=-4.0)
    options = {} if name in ("dst", "autosparse") else {"sparsity": 0.5}
    sparsifier = ts.sparsify(model, method, total_steps=12, steps_per_epoch=3, pattern=pattern, **options)
    optimizer = torch.optim.AdamW(sparsifier.param_groups(lr=0.01))
    sparsifier.attach(optimizer)
    for _ in range(6):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    sparsifier.save_pretrained(tmp_path / "saved")
    whole, again = ts.load(tmp_path / "saved", GPT2LMHeadModel)
    wanted = state_of(again, whole)
    draw, refused = random.Random(name), 0
    for number in range(90):
        folder = tmp_path / "spoiled"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(tmp_path / "saved", folder)
        change = draw.choice((changed_tensor, changed_head, changed_bytes))
        change(draw, folder / "tritonsparse.safetensors")
        what = (name, number, change.__name__)
        live, before = gpt2(), None
        try:
            found, owner = ts.load(folder, GPT2LMHeadModel)
        except Exception as error:
            assert_ours(error, what)
            refused += 1
        else:
            assert state_of(owner, found) == wanted, what
        try:
            live = GPT2LMHeadModel.from_pretrained(tmp_path / "saved")
            other = ts.sparsify(live, method, total_steps=12, steps_per_epoch=3, pattern=pattern, **options)
            live.load_state_dict(GPT2LMHeadModel.from_pretrained(tmp_path / "saved").state_dict(), strict=False)
            before = state_of(other, live)
            other.restore(folder)
        except Exception as error:
            assert_ours(error, what)
            assert state_of(other, live) == before, what
        else:
            assert state_of(other, live) == wanted, what
    assert refused > 45


@pytest.mark.parametrize("part", range(4))
def test_every_damaged_file_of_packed_blocks_is_refused_or_harmless(part: int, tmp_path: Path) -> None:
    model = gpt2()
    sparsifier = ts.sparsify(model, "static", sparsity=0.5, pattern="block:4")
    sparsifier.finalize(format="bsr")
    ts.save_bsr(model, tmp_path / "saved")
    draw = random.Random(200 + part)
    files = [path.name for path in (tmp_path / "saved").iterdir()]
    with torch.no_grad():
        for number in range(100):
            folder = tmp_path / "spoiled"
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(tmp_path / "saved", folder)
            file = folder / draw.choice(files)
            change = changed_tensor if file.suffix == ".safetensors" and draw.random() < 0.5 else changed_bytes
            change(draw, file)
            what = (part, number, file.name, change.__name__)
            try:
                found = ts.load_bsr(folder, GPT2LMHeadModel)
            except Exception as error:
                # A configuration is transformers' to read.
                assert file.suffix == ".json" or SENTENCE.match(str(error)), (what, repr(error))
            else:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    assert found.eval()(input_ids=IDS).logits.shape[:2] == (2, 6), what
