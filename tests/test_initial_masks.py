"""What a run starts from: a checkpoint's own zeros, magnitude, the paper's choice, or masks that are given."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import Build, assert_same
from torch import Tensor, nn
from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification, GPT2LMHeadModel

import tritonsparse as ts
from tritonsparse.methods import DSR, GMP, MEST, SET, SNFS, RigL, Static, TopKAST

STARTING: dict[str, Callable[[float], Any]] = {
    "rigl": lambda p: RigL(sparsity=p, update_every=2),
    "set": lambda p: SET(sparsity=p, update_every=2),
    "mest": lambda p: MEST(sparsity=p, update_every=2),
    "dsr": lambda p: DSR(sparsity=p, update_every=2),
    "snfs": lambda p: SNFS(sparsity=p, update_every=2),
    "static": lambda p: Static(sparsity=p),
    "gmp": lambda p: GMP(sparsity=p, update_every=2),
}


def masks(sparsifier: ts.Sparsifier) -> dict[str, Tensor]:
    return {name: layer.mask for name, layer in sparsifier.layers.items()}


def unevenly_pruned(pattern: str = "unstructured") -> tuple[nn.Sequential, dict[str, Tensor]]:
    """Two layers with 50 % and 90 % of zeros, 73 % together, and the masks that say where."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 24))
    found = {}
    for place, sparsity in (("0", 0.5), ("2", 0.9)):
        part = ts.sparsify(nn.Sequential(model[int(place)]), Static(sparsity=sparsity), pattern=pattern)
        found[place] = part.layers["0"].mask.clone()
        part.finalize()
    return model, found


@pytest.mark.parametrize("method", STARTING)
@pytest.mark.parametrize("pattern", ["unstructured", "block:4", "channel"])
def test_a_checkpoint_s_own_zeros_are_kept_exactly(method: str, pattern: str) -> None:
    model, expected = unevenly_pruned(pattern)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    share = sum(int((~mask).sum()) for mask in expected.values()) / sum(mask.numel() for mask in expected.values())
    sparsifier = ts.sparsify(model, STARTING[method](share), pattern=pattern, total_steps=20)
    assert_same(masks(sparsifier), expected)
    assert_same({name: model.state_dict()[name] for name in before}, before)
    assert f"first masks: zeros (the model's own, {share:.1%})" in sparsifier.summary()
    assert "first masks: zeros" in str(sparsifier.report())
    optimizer = torch.optim.AdamW(sparsifier.param_groups(lr=1e-2))
    sparsifier.attach(optimizer)
    for _ in range(20):
        model(torch.randn(8, 16)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    if method in ("static", "gmp"):  # what is pruned stays pruned, and nothing else is
        assert_same(masks(sparsifier), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sparsifier.finalize()


@pytest.mark.parametrize("method", STARTING)
def test_fewer_zeros_than_asked_for_are_no_mask(method: str) -> None:
    model, own = unevenly_pruned()
    sparsifier = ts.sparsify(model, STARTING[method](0.9), total_steps=20)
    assert "first masks: paper" in sparsifier.summary()
    assert any(not torch.equal(mask, own[name]) for name, mask in masks(sparsifier).items())
    asked = ts.sparsify(unevenly_pruned()[0], STARTING[method](0.9), total_steps=20, initial_mask="zeros")
    assert_same(masks(asked), own)


def test_what_was_loaded_is_pruned_by_magnitude_and_what_was_built_as_the_paper_has_it(
    gpt2: Build, tmp_path: Path
) -> None:
    gpt2().save_pretrained(tmp_path)
    loaded = ts.sparsify(GPT2LMHeadModel.from_pretrained(tmp_path), RigL(sparsity=0.7), total_steps=10)
    assert f"first masks: magnitude (loaded from {tmp_path})" in loaded.summary()
    by_magnitude = ts.sparsify(gpt2(), RigL(sparsity=0.7), total_steps=10, initial_mask="magnitude")
    drawn = ts.sparsify(gpt2(), RigL(sparsity=0.7), total_steps=10)
    asked = ts.sparsify(
        GPT2LMHeadModel.from_pretrained(tmp_path), RigL(sparsity=0.7), total_steps=10, initial_mask="random"
    )
    assert_same(masks(loaded), masks(by_magnitude))
    assert_same(masks(asked), masks(drawn))
    for name, layer in by_magnitude.layers.items():
        weight = gpt2().get_submodule(name).weight.abs()
        assert not layer.mask.all() and weight[layer.mask].min() >= weight[~layer.mask].max()
        assert not torch.equal(layer.mask, drawn.layers[name].mask)


@pytest.mark.parametrize("method", STARTING)
def test_given_masks_are_taken(method: str) -> None:
    model, own = unevenly_pruned()
    torch.manual_seed(1)
    given = {name: torch.rand(mask.shape) < 0.3 for name, mask in own.items()}
    sparsifier = ts.sparsify(model, STARTING[method](0.7), total_steps=20, initial_mask=given)
    assert_same(masks(sparsifier), given)


HALF = {"0": torch.ones(16, 16, dtype=torch.bool), "2": torch.ones(24, 16, dtype=torch.bool)}
REFUSED: list[tuple[Any, Any, str, str]] = [
    (
        RigL(sparsity=0.5),
        "biggest",
        "unstructured",
        "expected initial_mask among magnitude, random, zeros .*got 'biggest'",
    ),
    (
        TopKAST(sparsity=0.5),
        "magnitude",
        "unstructured",
        "no initial_mask for method 'topkast', which starts from none",
    ),
    (RigL(sparsity=0.0), "magnitude", "unstructured", "no initial_mask for method 'rigl'"),
    (RigL(sparsity=0.5), {"0": HALF["0"]}, "unstructured", "each of the 2 sparse layers, got none for '2'"),
    (RigL(sparsity=0.5), {**HALF, "7": HALF["0"]}, "unstructured", "each of the 2 sparse layers, got one for '7'"),
    (
        RigL(sparsity=0.5),
        {**HALF, "0": HALF["2"]},
        "unstructured",
        r"of shape \[16, 16\] for '0', got torch.bool \[24, 16\]",
    ),
    (RigL(sparsity=0.5), {**HALF, "0": HALF["0"].int()}, "unstructured", "expected a bool mask .*got torch.int32"),
    (
        RigL(sparsity=0.5),
        {**HALF, "0": torch.eye(16) > 0},
        "block:4",
        "keeps parts of its units; keep or prune each whole",
    ),
    (Static(sparsity=0.5), HALF, "2:4", "keeps parts of its units"),
    (Static(sparsity=0.5), "zeros", "2:4", "expected zeros of pattern '2:4' in '0'"),
]


@pytest.mark.parametrize(("method", "asked", "pattern", "words"), REFUSED)
def test_what_does_not_fit_is_refused_and_nothing_changed(method: Any, asked: Any, pattern: str, words: str) -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 24))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=f"sparsify: .*{words}"):
        ts.sparsify(model, method, pattern=pattern, total_steps=20, initial_mask=asked)
    assert [type(module) for module in model] == [nn.Linear, nn.ReLU, nn.Linear]
    assert_same({**model.state_dict()}, before)


def test_a_sidecar_goes_on_under_another_head(tmp_path: Path) -> None:
    config = BertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64, num_labels=3
    )
    sparsifier = ts.sparsify(BertForMaskedLM(config), RigL(sparsity=0.7, update_every=2), total_steps=8)
    sparsifier.save_pretrained(tmp_path)
    encoder = {name: layer.mask for name, layer in sparsifier.layers.items() if ".encoder." in name}
    assert len(encoder) == 6
    model, again = ts.load(tmp_path, BertForSequenceClassification)
    assert_same(masks(again), encoder)
    assert [skip.name for skip in again.skipped if skip.name == "classifier"] == ["classifier"]
    optimizer = torch.optim.AdamW(again.param_groups(lr=1e-3))
    again.attach(optimizer)
    model(input_ids=torch.arange(8)[None], labels=torch.tensor([1])).loss.backward()
    optimizer.step()
