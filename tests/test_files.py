"""Checkpoints that load without this package, and the sidecar from which training goes on exactly."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from small_runs import IDS, Build, Run, assert_same, language
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

import tritonsparse as ts
from tritonsparse.checkpoint.files import freeze_unsaved
from tritonsparse.methods import GMP, STR, AutoSparse

METHODS = {
    "soft": AutoSparse(threshold_init=-3.5, alpha=0.5, alpha_schedule="linear", backward_density=0.6),
    "mask": GMP(sparsity=0.8, initial_sparsity=0.3, update_every=1),
    "dense": STR(threshold_init=-float("inf")),
}
every_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)


def start(model: nn.Module, method: Any, steps: int = 3) -> Run:
    return Run(model, method, loss=language, groups={"lr": 0.1}, total_steps=10, steps_per_epoch=2).train(steps)


def go_on(model: nn.Module, sparsifier: ts.Sparsifier, steps: int) -> None:
    """Train what `load` returned, as a Run is trained."""
    optimizer = torch.optim.SGD(sparsifier.param_groups(lr=0.1))
    sparsifier.attach(optimizer)
    model.train()
    for _ in range(steps):
        torch.manual_seed(1000 + sparsifier.step)
        language(model).backward()
        optimizer.step()
        optimizer.zero_grad()


# The reader has none of this package: an import of it raises, wherever it is attempted.
READER = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "tritonsparse":
            raise ImportError("blocked: " + name)
sys.meta_path.insert(0, Blocker())
import torch, transformers
for cls, folder in zip(sys.argv[1::2], sys.argv[2::2], strict=True):
    model, info = getattr(transformers, cls).from_pretrained(folder, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    torch.save(model.eval()(**torch.load(folder + "/inputs.pt")).logits, folder + "/logits.pt")
"""


def test_a_process_without_this_package_loads_the_same_model(marian: Build, gpt2: Build, tmp_path: Path) -> None:
    saved = {"AutoModelForSeq2SeqLM": (marian(), "soft"), "AutoModelForCausalLM": (gpt2(), "mask")}
    logits, arguments = {}, []
    for cls, (model, kind) in saved.items():
        sparsifier = start(model, METHODS[kind]).sparsifier
        sparsifier.save_pretrained(tmp_path / cls)
        inputs = {"input_ids": IDS} | ({"decoder_input_ids": IDS} if "Seq2Seq" in cls else {})
        torch.save(inputs, tmp_path / cls / "inputs.pt")
        arguments += [cls, str(tmp_path / cls)]
        logits[cls] = model.eval()(**inputs).logits
        weights = load_file(tmp_path / cls / "model.safetensors")
        zeros = sum(int((weights[f"{name}.weight"] == 0).sum()) for name in sparsifier.layers)
        total = sum(layer.weight.numel() for layer in sparsifier.layers.values())
        assert zeros == round(total * sparsifier.sparsity()) > 0.3 * total
    run = subprocess.run([sys.executable, "-c", READER, *arguments], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    for cls, expected in logits.items():
        # To rounding: where a process lays its tensors out in memory may change the order a CPU library adds in.
        torch.testing.assert_close(torch.load(tmp_path / cls / "logits.pt"), expected, rtol=1e-5, atol=1e-5)


@every_method
@pytest.mark.parametrize(("name", "auto"), [("marian", AutoModelForSeq2SeqLM), ("gpt2", AutoModelForCausalLM)])
def test_loaded_from_the_sidecar_the_next_steps_are_identical(
    request: pytest.FixtureRequest, tmp_path: Path, name: str, auto: Any, method: Any
) -> None:
    run = start(request.getfixturevalue(name)(), method)
    run.sparsifier.save_pretrained(tmp_path)
    again, loaded = ts.load(tmp_path, auto)
    assert loaded.step == 3 and loaded.method == run.sparsifier.method
    assert list(loaded.layers) == list(run.sparsifier.layers)
    run.train(2)
    go_on(again, loaded, 2)
    assert_same([again.state_dict(), loaded.state_dict()["tensors"]],
                [run.model.state_dict(), run.sparsifier.state_dict()["tensors"]])  # fmt: skip


def trainable(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_what_checkpoints_leave_out_is_not_trained_after_loading(
    marian: Build, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """transformers gives Marian's sinusoids back as trainable, saves none of them, and computes them again."""
    start(marian(), METHODS["mask"]).sparsifier.save_pretrained(tmp_path / "first")
    with caplog.at_level(logging.INFO, logger="tritonsparse"):
        model, sparsifier = ts.load(tmp_path / "first", AutoModelForSeq2SeqLM)
    # A version of transformers that freezes them itself leaves nothing to say.
    thawed = "embed_positions" in str(trainable(AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "first")))
    assert ("froze model.encoder.embed_positions.weight, model.decoder.embed_positions" in caplog.text) is thawed
    assert trainable(model) == trainable(marian())
    go_on(model, sparsifier, 2)
    sparsifier.save_pretrained(tmp_path / "second")
    again, _ = ts.load(tmp_path / "second", AutoModelForSeq2SeqLM)
    assert_same(again.state_dict(), model.state_dict())


def test_loaded_embedding_tables_are_those_that_were_sparse(marian: Build, tmp_path: Path) -> None:
    sparsifier = ts.sparsify(marian(), "static", sparsity=0.5, embedding_sparsity=0.5)
    sparsifier.save_pretrained(tmp_path)
    _, loaded = ts.load(tmp_path, AutoModelForSeq2SeqLM)
    assert list(loaded.embeddings.masks) == list(sparsifier.embeddings.masks) == ["model.shared.weight"]


def test_only_parameters_that_no_checkpoint_holds_are_frozen() -> None:
    class Tables(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self._keys_to_ignore_on_save: Any = ["head.weight", "sinusoids", "constant", "of_another_version"]
            self.embedding, self.head = nn.Embedding(4, 3), nn.Linear(3, 4, bias=False)
            self.head.weight = self.embedding.weight
            self.sinusoids = nn.Parameter(torch.ones(2))
            self.constant = nn.Parameter(torch.ones(2), requires_grad=False)

    model = Tables()
    assert freeze_unsaved(model) == ["sinusoids"]
    # A tied weight is in the checkpoint under its other name.
    assert trainable(model) == {"embedding.weight"}
    assert freeze_unsaved(nn.Linear(2, 2)) == []
    model._keys_to_ignore_on_save = None
    assert freeze_unsaved(model) == []


@every_method
def test_the_finalized_state_dict_leaves_the_model_as_it_is(gpt2: Build, method: Any) -> None:
    stock, run = gpt2(), start(gpt2(), method)
    before = {key: value.clone() for key, value in run.model.state_dict().items()}
    exported = run.sparsifier.finalized_state_dict()
    assert_same({**run.model.state_dict()}, before)
    assert exported.keys() == stock.state_dict().keys()
    stock.load_state_dict(exported)
    assert torch.equal(stock.eval()(IDS).logits, run.model.eval()(IDS).logits)


def test_a_module_under_two_names_is_exported_under_both() -> None:
    shared = nn.Linear(4, 4)
    exported = ts.sparsify(nn.Sequential(shared, nn.ReLU(), shared), STR(threshold_init=-1.0)).finalized_state_dict()
    assert exported.keys() == {"0.weight", "0.bias", "2.weight", "2.bias"}
    assert torch.equal(exported["0.weight"], exported["2.weight"])
    assert torch.equal(exported["0.weight"], shared.effective_weight())


def test_saving_again_replaces_the_checkpoint_and_leaves_nothing_beside_it(gpt2: Build, tmp_path: Path) -> None:
    run = start(gpt2(), METHODS["mask"])
    for _ in range(2):
        run.sparsifier.save_pretrained(tmp_path / "saved")
        run.train(1)
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]
    assert ts.load(tmp_path / "saved", AutoModelForCausalLM)[1].step == 4


def test_what_is_no_checkpoint_of_ours_is_refused_with_what_to_do(mlp: Build, gpt2: Build, tmp_path: Path) -> None:
    gpt2().save_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"AutoModelForCausalLM.from_pretrained, it is an ordinary one"):
        ts.load(tmp_path, AutoModelForCausalLM)
    with pytest.raises(TypeError, match=r"got Sequential; save sparsifier.finalized_state_dict"):
        ts.sparsify(mlp(), "str").save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_merging_an_adapter_after_finalize_fills_the_zeros_of_the_layers_it_adapts(gpt2: Build) -> None:
    """A low-rank update is dense: merged, it destroys the zeros it touches. So merge first, or do not merge."""
    config = peft.LoraConfig(target_modules=["c_attn"], r=2, fan_in_fan_out=True, init_lora_weights=False)
    model = peft.get_peft_model(gpt2(), config)
    sparsifier = ts.sparsify(model, GMP(sparsity=0.5, initial_sparsity=0.5), total_steps=2)
    x = model.eval()(IDS).logits
    sparsifier.finalize()
    assert torch.equal(model(IDS).logits, x)

    def zeros(layer: nn.Module) -> float:
        return float((layer.weight == 0).float().mean())

    assert zeros(model.base_model.model.transformer.h[0].attn.c_attn.base_layer) == 0.5
    merged = model.merge_and_unload().transformer.h[0]
    assert zeros(merged.attn.c_attn) == 0.0 and zeros(merged.mlp.c_fc) == 0.5
