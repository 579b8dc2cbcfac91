"""Whatever moves weights moves their views, or says that it does not."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small_runs import Build, Run, assert_same, language
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import GPT2LMHeadModel, Trainer, TrainingArguments

import tritonsparse as ts
from tritonsparse.checkpoint import bits
from tritonsparse.methods import ACDC, DST, GMP, SET, STR, AutoSparse, Phases, PowerProp, RigL, Static, TopKAST

TURNS = Phases([(0, "dense"), (1, "sparse"), (2, "dense"), (3, "sparse")], 4)
# Masks that move, masks that come later, weights that live on outside their masks, thresholds, a power.
METHODS: dict[str, Callable[[], Any]] = {
    "rigl": lambda: RigL(sparsity=0.7, update_every=2),
    "set": lambda: SET(sparsity=0.7, update_every=2),
    "gmp": lambda: GMP(sparsity=0.7, begin=0.2, update_every=2),
    "acdc": lambda: ACDC(sparsity=0.7, phases=TURNS),
    "topkast": lambda: TopKAST(sparsity=0.7),
    "powerprop": lambda: PowerProp(sparsity=0.7),
    "str": lambda: STR(threshold_init=-3.0),
    "autosparse": lambda: AutoSparse(threshold_init=-3.0, alpha_schedule="constant"),
    "dst": lambda: DST(penalty=1e-2),
}
STEPS = 12


@pytest.fixture(params=METHODS)
def run(request: pytest.FixtureRequest, mlp: Build) -> Run:
    return Run(mlp(), METHODS[request.param]())


def output(model: nn.Module) -> Tensor:
    model.eval()
    with torch.no_grad():
        result = model(torch.linspace(-1, 1, 32).view(4, 8))
    model.train()
    return result


def test_a_state_dict_brings_its_views_back(run: Run) -> None:
    run.train(5)
    saved, then = copy.deepcopy(run.model.state_dict()), output(run.model)
    run.train(6)
    assert not torch.equal(output(run.model), then)
    run.model.load_state_dict(saved)
    assert torch.equal(output(run.model), then)
    run.train(1)  # and training goes on


def test_a_copy_keeps_the_views_of_its_moment(run: Run) -> None:
    run.train(5)
    then, copied = output(run.model), copy.deepcopy(run.model)
    assert torch.equal(output(copied), then)
    run.train(6)
    assert torch.equal(output(copied), then) and not torch.equal(output(run.model), then)


@pytest.mark.parametrize("use_buffers", [False, True])
@pytest.mark.parametrize("average", [None, get_ema_multi_avg_fn(0.5)], ids=["mean", "ema"])
def test_an_averaged_model_sees_averages_of_masters_through_todays_masks(
    run: Run, use_buffers: bool, average: Any
) -> None:
    averaged = AveragedModel(run.model, multi_avg_fn=average, use_buffers=use_buffers)
    masters: list[dict[str, Tensor]] = []
    for _ in range(STEPS):
        run.train(1)
        averaged.update_parameters(run.model)
        masters.append({name: value.detach().clone() for name, value in run.model.named_parameters()})
    expected = copy.deepcopy(run.model)
    for name, parameter in expected.named_parameters():
        values = [each[name].double() for each in masters]
        mean = values[0]
        for number, value in enumerate(values[1:], 1):
            mean = mean + (value - mean) * (0.5 if average else 1 / (number + 1))
        parameter.data.copy_(mean)
    torch.testing.assert_close(output(averaged.module), output(expected))
    for name, layer in run.sparsifier.layers.items():
        if layer.mask is not None:
            assert torch.equal(averaged.module.get_submodule(name).mask, layer.mask)


def test_an_average_of_a_model_that_was_dense_is_refused(mlp: Build) -> None:
    model = mlp()
    averaged = AveragedModel(model)
    ts.sparsify(model, Static(sparsity=0.5))
    with pytest.raises(
        ValueError, match="AveragedModel: expected a copy of a model with 2 sparse layers, got one with 0"
    ):
        averaged.update_parameters(model)


def test_shadow_weights_of_others_are_seen_through_todays_masks_by_one_call(run: Run) -> None:
    run.train(4)
    shadow = copy.deepcopy(run.model)
    run.train(8)
    masters = {name: value.detach().clone() for name, value in shadow.named_parameters()}
    expected = copy.deepcopy(run.model)
    for name, value in expected.named_parameters():
        value.data.copy_(masters[name])
    run.sparsifier.copy_views(shadow)
    assert torch.equal(output(shadow), output(expected))
    stock = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Dropout(0.1), nn.Linear(16, 4))
    stock.load_state_dict(run.sparsifier.finalized_state_dict(masters))
    torch.testing.assert_close(output(stock), output(expected))
    with pytest.raises(ValueError, match=r"expected a copy .* with a sparse layer at '0', got Linear"):
        run.sparsifier.copy_views(stock)


@pytest.mark.parametrize("pattern", ["unstructured", "block:4", "channel", "2:4"])
def test_ordinary_weights_with_zeros_bring_their_mask(mlp: Build, pattern: str) -> None:
    sparsity = 0.5
    source = ts.sparsify(mlp(1), Static(sparsity=sparsity, criterion="magnitude"), pattern=pattern)
    target = Run(mlp(), Static(sparsity=sparsity), pattern=pattern)
    assert any(
        not torch.equal(layer.mask, source.layers[name].mask) for name, layer in target.sparsifier.layers.items()
    )
    target.model.load_state_dict(source.finalized_state_dict())
    assert_same(
        {name: layer.mask for name, layer in target.sparsifier.layers.items()},
        {name: layer.mask for name, layer in source.layers.items()},
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(output(target.model), output(source.model))
    target.train(1)


def test_weights_that_are_zero_outside_the_mask_leave_it(mlp: Build) -> None:
    run = Run(mlp(), RigL(sparsity=0.5, update_every=4))
    run.train(5)  # a grown weight is 0 inside its mask
    masks = {name: layer.mask.clone() for name, layer in run.sparsifier.layers.items()}
    run.model.load_state_dict(run.sparsifier.finalized_state_dict())
    assert_same({name: layer.mask for name, layer in run.sparsifier.layers.items()}, masks)


@pytest.mark.parametrize(
    ("method", "part"), [("rigl", "mask"), ("str", "threshold"), ("dst", "threshold"), ("powerprop", "mask")]
)
def test_weights_that_tell_nothing_of_their_view_are_named_once(mlp: Build, method: str, part: str) -> None:
    run = Run(mlp(), METHODS[method]())
    saved = run.model.state_dict()
    run.model.load_state_dict(mlp(1).state_dict())
    with pytest.warns(UserWarning, match=f"expected every sparse layer's {part} beside its weight, got weights alone"):
        output(run.model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        output(run.model)
        run.model.load_state_dict(mlp(1).state_dict())
        run.model.load_state_dict(saved)
        output(run.model)


def save_by(how: str, run: Run, folder: Path) -> Any:
    model: Any = run.model
    if how == "the model":
        model.save_pretrained(folder)
    elif how == "its state dict":
        model.save_pretrained(folder, state_dict=model.state_dict())
    elif how == "the Trainer":
        Trainer(model, TrainingArguments(str(folder), use_cpu=True, report_to="none")).save_model(str(folder))
    elif how == "accelerate":
        Accelerator(cpu=True).save_model(model, folder)
        model.config.save_pretrained(folder)
    else:
        run.sparsifier.save_pretrained(folder)


@pytest.mark.parametrize("how", ["the model", "its state dict", "the Trainer", "accelerate", "the Sparsifier"])
@pytest.mark.parametrize("method", METHODS)
def test_every_save_writes_an_ordinary_checkpoint_from_which_training_goes_on(
    gpt2: Build, tmp_path: Path, method: str, how: str
) -> None:
    def begin(model: Any) -> Run:
        return Run(model, METHODS[method](), loss=language)

    run = begin(gpt2())
    run.train(7)
    save_by(how, run, tmp_path)
    written = load_file(tmp_path / "model.safetensors")
    finalized = run.sparsifier.finalized_state_dict()
    assert written.keys() <= finalized.keys()
    assert_same(written, {key: finalized[key] for key in written})
    stock = GPT2LMHeadModel.from_pretrained(tmp_path)
    tokens = torch.arange(16)[None]
    with torch.no_grad():
        torch.testing.assert_close(stock(tokens).logits, run.model.eval()(tokens).logits)
    model, sparsifier = ts.load(tmp_path, GPT2LMHeadModel)
    assert sparsifier.step == 7
    assert_same({**model.state_dict()}, {**run.model.state_dict()})
    other = begin(gpt2(seed=5))
    other.model.load_state_dict(written, strict=False)
    other.model.tie_weights()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        other.sparsifier.restore(tmp_path)
        other.model(tokens)
    assert_same({**other.model.state_dict()}, {**run.model.state_dict()})


def test_a_copy_and_a_larger_model_save_zeros_and_no_sidecar_that_is_not_theirs(
    gpt2: Build, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = Run(gpt2(), METHODS["str"](), loss=language)
    run.train(3)
    run.sparsifier.save_pretrained(tmp_path)
    assert (tmp_path / "tritonsparse.safetensors").is_file()
    copied = copy.deepcopy(run.model)
    finalized = copy.deepcopy(run.sparsifier.finalized_state_dict())
    run.train(1)
    copied.save_pretrained(tmp_path)
    assert not (tmp_path / "tritonsparse.safetensors").exists() and "without tritonsparse.safetensors" in caplog.text
    written = load_file(tmp_path / "model.safetensors")
    assert_same(written, {key: finalized[key] for key in written})
    outer = gpt2(seed=3)
    part = ts.sparsify(outer.transformer, STR(threshold_init=-2.0))
    outer.save_pretrained(tmp_path / "outer")
    written = load_file(tmp_path / "outer" / "model.safetensors")
    for name, layer in part.layers.items():
        assert torch.equal(written[f"transformer.{name}.weight"], layer.effective_weight())
    assert not any(key.endswith(("mask", "threshold")) for key in written)


def test_a_finalized_model_saves_as_it_always_did(gpt2: Build, tmp_path: Path) -> None:
    run = Run(gpt2(), METHODS["gmp"](), loss=language)
    run.train(STEPS)
    model: Any = run.sparsifier.finalize()
    model.save_pretrained(tmp_path)
    assert not (tmp_path / "tritonsparse.safetensors").exists()
    assert_same({**GPT2LMHeadModel.from_pretrained(tmp_path).state_dict()}, {**model.state_dict()})


def damaged(change: Callable[[dict[str, Tensor]], Any], checked: bool = False) -> Callable[[Path], None]:
    """checked: with the checksum left in, which version 0.1 did not write."""

    def spoil(folder: Path) -> None:
        file = folder / "tritonsparse.safetensors"
        with safe_open(str(file), "pt") as opened:
            metadata = opened.metadata()
        if not checked:
            head = json.loads(metadata["tritonsparse"])
            metadata = {"tritonsparse": json.dumps({key: value for key, value in head.items() if key != "crc32"})}
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file, metadata=metadata)

    return spoil


NAME = "transformer.h.0.attn.c_attn"
SPOILED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a tensor is missing": (damaged(lambda t: t.pop(f"master.{NAME}")), "damaged file .tensors are missing"),
    "not a number": (damaged(lambda t: t[f"master.{NAME}"].fill_(float("nan"))), "expected numbers.*got NaN"),
    "another shape": (
        damaged(lambda t: t.update({f"master.{NAME}": torch.ones(3, 3)})),
        r"of shape \[16, 48\].*\[3, 3\]",
    ),
    "one bit of a mask": (
        damaged(lambda t: t[f"view.{NAME}.mask"][:1].bitwise_xor_(1), checked=True),
        "damaged file .its checksum is another",
    ),
    "cut off": (lambda f: (f / "tritonsparse.safetensors").write_bytes(b"12345678"), "damaged file"),
    "other weights": (
        lambda f: save_file(
            {k: v + 1 for k, v in load_file(f / "model.safetensors").items()}, f / "model.safetensors", {"format": "pt"}
        ),
        "expected the weights that .* was written beside, got others in",
    ),
}


@pytest.mark.parametrize("case", SPOILED)
def test_a_spoiled_checkpoint_is_refused_and_nothing_changed(gpt2: Build, tmp_path: Path, case: str) -> None:
    spoil, words = SPOILED[case]
    run = Run(gpt2(), METHODS["topkast"](), loss=language)
    run.train(3)
    run.sparsifier.save_pretrained(tmp_path)
    spoil(tmp_path)
    with pytest.raises(ValueError, match=words):
        ts.load(tmp_path, GPT2LMHeadModel)
    run.train(2)
    before = copy.deepcopy([run.model.state_dict(), run.sparsifier.state_dict()])
    with pytest.raises(ValueError, match=words):
        run.sparsifier.restore(tmp_path)
    assert_same([run.model.state_dict(), run.sparsifier.state_dict()], before)


def test_masks_take_a_bit_a_weight_on_disk(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tensors = {f"{shape}": torch.rand(shape) < 0.3 for shape in ((), (1,), (7, 5), (64, 64), (2, 3, 3, 3))}
    tensors = {key: value for key, value in tensors.items()} | {"alpha": torch.tensor(0.5)}
    packed, shapes = bits.packed(tensors)
    assert {key: value.numel() for key, value in packed.items() if value.dtype == torch.uint8} == {
        key: -(-value.numel() // 8) for key, value in tensors.items() if value.dtype == torch.bool
    }
    assert_same(bits.unpacked(packed, shapes), tensors)
    with pytest.raises(ValueError, match=r"expected 35 bits in '\(7, 5\)'"):
        bits.unpacked(packed | {"(7, 5)": torch.zeros(4, dtype=torch.uint8)}, shapes)
