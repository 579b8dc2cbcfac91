"""Adapters of PEFT: over a sparse base, sparse themselves, merged, saved and loaded again."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import peft
import pytest
import torch
from safetensors.torch import load_file
from small_runs import IDS, assert_same
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

import tritonsparse as ts
from tritonsparse.checkpoint.adapters import stock_entries
from tritonsparse.methods import DSR, GMP, MEST, SET, SNFS, AutoSparse, OptG, PowerProp, RigL, Static, TopKAST

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:.*low_cpu_mem_usage")
TARGETS = ["q_proj", "v_proj"]


@pytest.fixture(autouse=True)
def any_version() -> Iterator[None]:
    """transformers may ask for a newer PEFT than the index has."""
    with mock.patch("transformers.integrations.peft.check_peft_version"):
        yield


STATIC = Static(sparsity=0.7, criterion="magnitude")


def llama(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, num_attention_heads=4, num_key_value_heads=2, **sizes))


def lora(**options: Any) -> peft.LoraConfig:
    return peft.LoraConfig(**{"r": 2, "target_modules": TARGETS, "init_lora_weights": False, **options})


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        result: Tensor = model.eval()(input_ids=IDS).logits
    return result


def train(model: Any, sparsifier: Any, steps: int = 4) -> None:
    optimizer = torch.optim.SGD(sparsifier.param_groups(lr=0.1))
    sparsifier.detach()
    sparsifier.attach(optimizer)
    model.train()
    for _ in range(steps):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def adapters_last(config: Any = None, method: Any = STATIC, **options: Any) -> tuple[Any, Any]:
    model = llama()
    sparsifier = ts.sparsify(model, method, **options)
    return peft.get_peft_model(model, config or lora()), sparsifier


def adapters_first(config: Any = None, method: Any = STATIC, **options: Any) -> tuple[Any, Any]:
    model = peft.get_peft_model(llama(), config or lora())
    return model, ts.sparsify(model, method, **options)


def adapters_of_transformers(config: Any = None, method: Any = STATIC, **options: Any) -> tuple[Any, Any]:
    model = llama()
    sparsifier = ts.sparsify(model, method, **options)
    model.add_adapter(config or lora())
    return model, sparsifier


ORDERS: dict[str, Callable[..., tuple[Any, Any]]] = {
    "adapters last": adapters_last,
    "adapters first": adapters_first,
    "add_adapter": adapters_of_transformers,
}


@pytest.mark.parametrize("order", ORDERS)
def test_the_base_is_saved_under_stock_names_and_both_load_again(order: str, tmp_path: Path) -> None:
    model, sparsifier = ORDERS[order]()
    train(model, sparsifier)
    want, kept = logits(model), [layer.mask.clone() for layer in sparsifier.layers.values()]
    sparsifier.save_pretrained(tmp_path / "saved")
    sparsifier.save_pretrained(tmp_path / "saved")
    base, found = LlamaForCausalLM.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not any(found.values()), found
    assert base.state_dict().keys() == llama().state_dict().keys()
    zeros = [(base.model.layers[i].self_attn.q_proj.weight == 0).float().mean() for i in range(2)]
    assert zeros == pytest.approx([0.7, 0.7], abs=0.01)
    adapter = tmp_path / "saved" / "adapters" / "default"
    assert torch.equal(logits(peft.PeftModel.from_pretrained(base, adapter)), want)
    assert torch.equal(logits(peft.AutoPeftModelForCausalLM.from_pretrained(adapter)), want)
    # And to go on from.
    base, again = ts.load(tmp_path / "saved", LlamaForCausalLM)
    assert torch.equal(logits(peft.PeftModel.from_pretrained(base, adapter)), want)
    assert again.step == 4 and len(again.layers) == len(kept)
    assert all(torch.equal(layer.mask, mask) for layer, mask in zip(again.layers.values(), kept, strict=True))


@pytest.mark.parametrize("order", ORDERS)
def test_the_adapter_alone_brings_its_base_s_masks(order: str, tmp_path: Path) -> None:
    model, sparsifier = ORDERS[order](method=GMP(sparsity=0.7, update_every=1), total_steps=8)
    train(model, sparsifier, 5)
    assert 0.2 < sparsifier.sparsity() < 0.7
    want = logits(model)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    prefix = "base_model.model.model.layers"
    parts = {f"{prefix}.{i}.self_attn.{t}.lora_{x}.weight" for i in range(2) for t in TARGETS for x in "AB"}
    assert saved.keys() == parts
    with pytest.raises(ValueError, match=r"load: expected a folder with the base, got adapters alone"):
        ts.load(tmp_path, LlamaForCausalLM)
    # Whatever the order was, the base is sparsified as it was, and the adapter put on.
    fresh, again = ORDERS[order](method=GMP(sparsity=0.7, update_every=1), total_steps=8)
    peft.set_peft_model_state_dict(fresh, saved) if order != "add_adapter" else fresh.load_state_dict(
        {key.removeprefix("base_model.model.").replace(".weight", ".default.weight"): w for key, w in saved.items()},
        strict=False,
    )
    again.restore(tmp_path)
    assert torch.equal(logits(fresh), want) and again.step == 5
    train(model, sparsifier, 3)
    train(fresh, again, 3)
    assert_same(model.state_dict(), fresh.state_dict())
    assert again.sparsity() == pytest.approx(0.7, abs=0.01)
    # A base that was pruned further has lost weights that the saved masks keep.
    with pytest.raises(ValueError, match=r"restore: expected the base of .* load the base anew"):
        again.restore(tmp_path)


CONFIGS: dict[str, Callable[[], Any]] = {
    "lora": lora,
    "dora": lambda: lora(use_dora=True),
    "rslora, all": lambda: lora(use_rslora=True, target_modules="all-linear"),
    "ia3": lambda: peft.IA3Config(target_modules=TARGETS, feedforward_modules=[], init_ia3_weights=False),
    "loha": lambda: peft.LoHaConfig(target_modules=TARGETS, r=2, init_weights=False),
    "oft": lambda: peft.OFTConfig(target_modules=TARGETS, r=0, oft_block_size=4, init_weights=False),
    "vera": lambda: peft.VeraConfig(target_modules=["q_proj"], r=2, init_weights=False),
}


@pytest.mark.filterwarnings("ignore:.*were kept")
@pytest.mark.parametrize("config", CONFIGS)
def test_a_merge_keeps_the_zeros_and_says_what_it_dropped(config: str) -> None:
    # The oracle: the stock model with the same zeros, merged by PEFT, its weights cut to the masks afterwards.
    stock = llama()
    masks = {name: layer.mask.clone() for name, layer in ts.sparsify(stock, STATIC).layers.items()}
    with torch.no_grad():
        for name, mask in masks.items():
            stock.get_submodule(name).weight.mul_(mask)
    plain = llama()
    plain.load_state_dict({key: w for key, w in stock.state_dict().items() if not key.endswith(".mask")})
    before = {name: plain.get_submodule(name).weight.detach().double() for name in masks}
    torch.manual_seed(1)
    theirs = peft.get_peft_model(plain, CONFIGS[config]())
    torch.manual_seed(1)
    ours, sparsifier = adapters_last(CONFIGS[config]())
    ours.load_state_dict({key: w for key, w in theirs.state_dict().items()}, strict=False)
    assert torch.equal(logits(ours), logits(theirs))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ours.merge_adapter()
    assert sparsifier.sparsity() == pytest.approx(0.7, abs=0.01)
    ours.unmerge_adapter()
    for name, layer in sparsifier.layers.items():
        assert torch.allclose(layer.weight.double(), before[name], atol=1e-6) and not layer.weight[~layer.mask].any()
    merged = ours.merge_and_unload()
    wanted = theirs.merge_and_unload()
    added = dropped = 0.0
    for name, mask in masks.items():
        got, want = merged.get_submodule(name).weight, wanted.get_submodule(name).weight
        assert torch.allclose(got, want * mask, atol=1e-6) and not got[~mask].any()
        added += float((want.double() - before[name]).square().sum())
        dropped += float(want.double()[~mask].square().sum())
    # IA3 scales what is there.
    said = [str(each.message) for each in caught if "were kept" in str(each.message)]
    share = f"sparse layers were kept, so {(dropped / added) ** 0.5:.1%} of the norm"
    assert len(said) == (config != "ia3") and all(share in each for each in said)
    sparsifier.finalize()
    final = merged.model.layers[0].self_attn.q_proj
    assert type(final) is torch.nn.Linear and not final.weight[~masks["model.layers.0.self_attn.q_proj"]].any()


def test_a_sparse_layer_that_is_trained_and_saved_whole_beside_an_adapter_keeps_its_zeros(tmp_path: Path) -> None:
    model, sparsifier = adapters_last(lora(modules_to_save=["o_proj"]))
    whole = [p for name, p in model.named_parameters() if "modules_to_save" in name and name.endswith("weight")]
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    sparsifier.attach(optimizer)
    model.train()
    for _ in range(3):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    want = logits(model)
    assert whole and all(p.grad is None for p in whole)
    model.save_pretrained(tmp_path / "alone")
    sparsifier.save_pretrained(tmp_path / "both")
    adapter = tmp_path / "both" / "adapters" / "default"
    for folder in (tmp_path / "alone", adapter):
        saved = load_file(folder / "adapter_model.safetensors")
        kept = [float((w != 0).float().mean()) for key, w in saved.items() if "o_proj" in key]
        assert not any(key.endswith("mask") for key in saved) and kept == pytest.approx([0.3, 0.3], abs=0.01)
    base = LlamaForCausalLM.from_pretrained(tmp_path / "both")
    assert torch.equal(logits(peft.PeftModel.from_pretrained(base, adapter)), want)
    assert torch.equal(logits(model), want)


def test_a_layer_under_two_names_keeps_both_in_the_base_s_file() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    model.append(model[0])
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["1"], r=2))
    base = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    assert stock_entries(adapted, adapted.state_dict()).keys() == base.state_dict().keys()


def test_a_merge_that_fails_changes_nothing() -> None:
    model, _ = adapters_last()
    tuner = model.base_model.model.model.layers[0].self_attn.q_proj
    tuner.lora_B["default"].weight.data.fill_(float("nan"))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="NaNs detected"):
        model.merge_adapter(safe_merge=True)
    for key, value in model.state_dict().items():
        assert torch.equal(value.nan_to_num(), before[key].nan_to_num()), key


def test_what_is_merged_and_still_there_is_not_saved_twice(tmp_path: Path) -> None:
    model, sparsifier = adapters_first()
    with pytest.warns(UserWarning, match="were kept"):
        model.merge_adapter()
    with pytest.raises(ValueError, match=r"expected adapters beside their base, got merged ones"):
        sparsifier.save_pretrained(tmp_path / "saved")
    assert not list(tmp_path.iterdir())
    model.unmerge_adapter()
    with pytest.warns(UserWarning, match="were kept"):
        merged = model.merge_and_unload()
    want = logits(merged)
    sparsifier.save_pretrained(tmp_path)
    assert not (tmp_path / "adapters").exists()
    assert torch.equal(logits(LlamaForCausalLM.from_pretrained(tmp_path)), want)
    loaded, again = ts.load(tmp_path, LlamaForCausalLM)
    assert torch.equal(logits(loaded), want) and again.sparsity() == sparsifier.sparsity()


SPARSE_ADAPTERS: dict[str, Callable[[], Any]] = {
    "topkast": lambda: TopKAST(sparsity=0.5),
    "autosparse": lambda: AutoSparse(threshold_init=-4.0),
    "powerprop": lambda: PowerProp(sparsity=0.5),
    "rigl": lambda: RigL(sparsity=0.5, update_every=1),
}


@pytest.mark.parametrize("method", SPARSE_ADAPTERS)
def test_adapters_can_be_sparse_themselves(method: str, tmp_path: Path) -> None:
    def build() -> tuple[Any, Any]:
        model = peft.get_peft_model(llama(), lora(r=8))
        return model, ts.sparsify(
            model, SPARSE_ADAPTERS[method](), include=["*lora_*"], total_steps=8, steps_per_epoch=4
        )

    model, sparsifier = build()
    train(model, sparsifier, 8 if method == "powerprop" else 4)
    want = logits(model)
    sparsifier.save_pretrained(tmp_path / "both")
    model.save_pretrained(tmp_path / "alone")
    for folder in (tmp_path / "both" / "adapters" / "default", tmp_path / "alone"):
        saved = load_file(folder / "adapter_model.safetensors")
        assert {key.rpartition(".")[2] for key in saved} == {"weight"}
        assert sum(int((w == 0).sum()) for w in saved.values()) > 0
        loaded = peft.PeftModel.from_pretrained(llama(), folder)
        assert torch.allclose(logits(loaded), want, atol=1e-6)
    again, restored = build()
    peft.set_peft_model_state_dict(again, saved)
    restored.restore(tmp_path / "alone")
    assert_same(model.state_dict(), again.state_dict())
    # PEFT reads the adapters' weights: what it merges is what their forwards see.
    merged = model.merge_and_unload()
    assert torch.allclose(logits(merged), want, atol=1e-5)


def pissa() -> tuple[Any, Any]:
    return adapters_last(lora(init_lora_weights="pissa"))


REFUSED: dict[str, tuple[Callable[[], tuple[Any, Any]], str]] = {
    "thresholds": (
        lambda: adapters_last(method=AutoSparse(threshold_init=-4.0), total_steps=8, steps_per_epoch=4),
        r"through a threshold .kind 'soft'",
    ),
    "initialised from the base": (pissa, r"0 where '.*q_proj' is pruned"),
    "scores of gradients that are not there": (
        lambda: adapters_last(method=OptG(sparsity=0.5), total_steps=20, steps_per_epoch=5),
        r"expected weights that train under method 'optg'",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_adapters_that_do_not_fit_are_refused_at_attach(case: str) -> None:
    model, sparsifier = REFUSED[case][0]()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    with pytest.raises(ValueError, match=REFUSED[case][1]):
        sparsifier.attach(optimizer)
    if case == "thresholds":
        before = {key: value.clone() for key, value in model.state_dict().items()}
        with pytest.raises(ValueError, match=r"merge: expected a base layer that holds a mask"):
            model.merge_and_unload()
        assert_same(model.state_dict(), before)
        # The remedy that the message names.
        want = logits(model)
        with pytest.warns(UserWarning, match="expected adapters to be merged first"):
            sparsifier.finalize()
        ts.sparsify(model, "static", sparsity=0.1, initial_mask="zeros")
        assert torch.equal(logits(model), want)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            merged = model.merge_and_unload()
        assert (merged.model.layers[0].self_attn.q_proj.effective_weight() == 0).any()


MOVING = [cls(sparsity=0.5, update_every=1) for cls in (SET, RigL, SNFS, DSR, MEST)]


@pytest.mark.parametrize("method", MOVING, ids=lambda method: method.name)
def test_masks_over_weights_that_do_not_train_stay_where_they_are(method: Any) -> None:
    # What grew in a frozen layer would stay 0 for good, in the place of a weight that was not.
    model, sparsifier = adapters_last(method=method, total_steps=20)
    layers = sparsifier.layers.values()
    for layer in list(layers)[:3]:
        layer.weight.requires_grad_(True)
    before = [layer.mask.clone() for layer in layers]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    sparsifier.attach(optimizer)
    model.train()
    kept = sum(int(mask.sum()) for mask in before)
    for _ in range(6):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    same = [torch.equal(layer.mask, mask) for layer, mask in zip(layers, before, strict=True)]
    assert not any(same[:3]) and all(same[3:])
    # MEST keeps a few more until its last stage.
    assert sum(int(layer.mask.sum()) for layer in layers) == kept or method.name == "mest"


def test_a_trainer_saves_and_resumes_adapters_over_a_sparse_base(tmp_path: Path) -> None:
    data = [{"input_ids": (tokens := torch.arange(i, i + 8) % 32), "labels": tokens} for i in range(12)]

    def trainer(folder: Path, **options: Any) -> ts.SparseTrainer:
        torch.manual_seed(3)
        model = peft.get_peft_model(llama(), lora(init_lora_weights=True))
        settings: dict[str, Any] = {"num_train_epochs": 4, "per_device_train_batch_size": 4, "learning_rate": 1e-2}
        settings |= {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "save_steps": 3} | options
        method = GMP(sparsity=0.7, update_every=2)
        return ts.SparseTrainer(model, TrainingArguments(str(folder), **settings), train_dataset=data, method=method)

    unbroken = trainer(tmp_path / "a")
    unbroken.train()
    assert unbroken.sparsifier.sparsity() == pytest.approx(0.7, abs=0.01)
    resumed = trainer(tmp_path / "b")
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-6"))
    assert_same(unbroken.model.state_dict(), resumed.model.state_dict())
