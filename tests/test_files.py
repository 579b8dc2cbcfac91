"""Checkpoints that load without this package, sidecars from which training goes on exactly, and sparse embeddings."""

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
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, GPT2LMHeadModel

import tritonsparse as ts
from tritonsparse.checkpoint.files import freeze_unsaved
from tritonsparse.methods import ACDC, GMP, STR, AutoSparse, Phases, Static
from tritonsparse.models.transfo_xl import TransfoXLConfig, TransfoXLLMHeadModel

METHODS = {
    "soft": AutoSparse(threshold_init=-3.5, alpha=0.5, alpha_schedule="linear", backward_density=0.6),
    "mask": GMP(sparsity=0.8, initial_sparsity=0.3, update_every=1),
    "dense": STR(threshold_init=-float("inf")),
}


def start(model: nn.Module, method: Any, steps: int = 3) -> Run:
    return Run(model, method, loss=language, groups={"lr": 0.1}, total_steps=10, steps_per_epoch=2).train(steps)


def go_on(model: nn.Module, sparsifier: ts.Sparsifier) -> None:
    """Train what `load` returned, as a Run is trained."""
    optimizer = torch.optim.SGD(sparsifier.param_groups(lr=0.1))
    sparsifier.attach(optimizer)
    model.train()
    for _ in range(2):
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
    logits, arguments = {}, []
    for cls, model, kind in (("AutoModelForSeq2SeqLM", marian(), "soft"), ("AutoModelForCausalLM", gpt2(), "mask")):
        sparsifier, folder = start(model, METHODS[kind]).sparsifier, tmp_path / cls
        sparsifier.save_pretrained(folder)
        inputs = {"input_ids": IDS} | ({"decoder_input_ids": IDS} if kind == "soft" else {})
        torch.save(inputs, folder / "inputs.pt")
        arguments += [cls, str(folder)]
        logits[folder] = model.eval()(**inputs).logits
        weights = load_file(folder / "model.safetensors")
        zeros = sum(int((weights[f"{name}.weight"] == 0).sum()) for name in sparsifier.layers)
        total = sum(layer.weight.numel() for layer in sparsifier.layers.values())
        assert zeros == round(total * sparsifier.sparsity()) > 0.3 * total
    run = subprocess.run([sys.executable, "-c", READER, *arguments], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    for folder, expected in logits.items():
        # To rounding: where a process lays its tensors out in memory may change the order a CPU library adds in.
        torch.testing.assert_close(torch.load(folder / "logits.pt"), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", METHODS)
@pytest.mark.parametrize(("name", "auto"), [("marian", AutoModelForSeq2SeqLM), ("gpt2", AutoModelForCausalLM)])
def test_from_the_sidecar_it_goes_on_as_it_was(request: Any, tmp_path: Path, name: str, auto: Any, kind: str) -> None:
    build, folder = request.getfixturevalue(name), tmp_path / "saved"
    run = start(build(), METHODS[kind], 2)
    run.sparsifier.save_pretrained(folder)
    run.train(1)
    before, stock = {key: value.clone() for key, value in run.model.state_dict().items()}, build()
    exported = run.sparsifier.finalized_state_dict()
    run.sparsifier.save_pretrained(folder)  # again: it replaces the checkpoint, and leaves nothing beside it
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]
    assert_same({**run.model.state_dict()}, before)
    assert exported.keys() == stock.state_dict().keys()
    stock.load_state_dict(exported)
    inputs = {"input_ids": IDS} | ({"decoder_input_ids": IDS} if name == "marian" else {})
    assert torch.equal(stock.eval()(**inputs).logits, run.model.eval()(**inputs).logits)
    again, loaded = ts.load(folder, auto)
    assert loaded.step == 3 and loaded.method == run.sparsifier.method
    assert list(loaded.layers) == list(run.sparsifier.layers)
    run.model.train()
    run.train(2)
    go_on(again, loaded)
    assert_same([again.state_dict(), loaded.state_dict()["tensors"]],
                [run.model.state_dict(), run.sparsifier.state_dict()["tensors"]])  # fmt: skip


def trainable(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_what_checkpoints_leave_out_is_not_trained_after_loading(marian: Build, tmp_path: Path, caplog: Any) -> None:
    """transformers gives Marian's sinusoids back as trainable, saves none of them, and computes them again."""
    start(marian(), METHODS["mask"]).sparsifier.save_pretrained(tmp_path / "first")
    with caplog.at_level(logging.INFO, logger="tritonsparse"):
        model, sparsifier = ts.load(tmp_path / "first", AutoModelForSeq2SeqLM)
    # A version of transformers that freezes them itself leaves nothing to say.
    thawed = "embed_positions" in str(trainable(AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "first")))
    assert ("froze model.encoder.embed_positions.weight, model.decoder.embed_positions" in caplog.text) is thawed
    assert trainable(model) == trainable(marian())
    go_on(model, sparsifier)
    sparsifier.save_pretrained(tmp_path / "second")
    again, _ = ts.load(tmp_path / "second", AutoModelForSeq2SeqLM)
    assert_same(again.state_dict(), model.state_dict())
    # Nor do the sinusoids pass for tables that were sparse.
    sparsifier = ts.sparsify(marian(), "static", sparsity=0.5, embedding_sparsity=0.5)
    sparsifier.save_pretrained(tmp_path / "third")
    _, loaded = ts.load(tmp_path / "third", AutoModelForSeq2SeqLM)
    assert list(loaded.embeddings.masks) == list(sparsifier.embeddings.masks) == ["model.shared.weight"]


def test_only_parameters_that_no_checkpoint_holds_are_frozen() -> None:
    model: Any = nn.Module()
    model._keys_to_ignore_on_save = ["head.weight", "sinusoids", "constant", "of_another_version"]
    model.embedding, model.head = nn.Embedding(4, 3), nn.Linear(3, 4, bias=False)
    model.head.weight = model.embedding.weight
    model.sinusoids = nn.Parameter(torch.ones(2))
    model.constant = nn.Parameter(torch.ones(2), requires_grad=False)
    assert freeze_unsaved(model) == ["sinusoids"]
    # A tied weight is in the checkpoint under its other name.
    assert trainable(model) == {"embedding.weight"} and freeze_unsaved(nn.Linear(2, 2)) == []
    model._keys_to_ignore_on_save = None
    assert freeze_unsaved(model) == []


def test_shared_modules_are_exported_and_no_checkpoint_of_ours_refused(mlp: Build, gpt2: Build, tmp_path: Path) -> None:
    shared = nn.Linear(4, 4)
    exported = ts.sparsify(nn.Sequential(shared, nn.ReLU(), shared), STR(threshold_init=-1.0)).finalized_state_dict()
    assert exported.keys() == {"0.weight", "0.bias", "2.weight", "2.bias"}
    assert all(torch.equal(exported[name], shared.effective_weight()) for name in ("0.weight", "2.weight"))
    gpt2().save_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"AutoModelForCausalLM.from_pretrained, it is an ordinary one"):
        ts.load(tmp_path, AutoModelForCausalLM)
    with pytest.raises(TypeError, match=r"got Sequential; save sparsifier.finalized_state_dict"):
        ts.sparsify(mlp(), "str").save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_merging_an_adapter_after_finalize_fills_the_zeros_of_the_layers_it_adapts(gpt2: Build) -> None:
    # A low-rank update is dense: merged, it destroys the zeros it touches. So merge first, or do not merge.
    config = peft.LoraConfig(target_modules=["c_attn"], r=2, fan_in_fan_out=True, init_lora_weights=False)
    model = peft.get_peft_model(gpt2(), config)
    # PEFT has frozen the base: only the layers that adapters train beside would be taken.
    frozen = ["*.base_layer", "*.c_fc", "*.mlp.c_proj"]
    sparsifier = ts.sparsify(model, GMP(sparsity=0.5, initial_sparsity=0.5), total_steps=2, include=frozen)
    x = model.eval()(IDS).logits
    sparsifier.finalize()
    assert torch.equal(model(IDS).logits, x)
    adapted = model.base_model.model.transformer.h[0].attn.c_attn.base_layer.weight
    assert zeros(adapted) == adapted.numel() / 2
    merged = model.merge_and_unload().transformer.h[0]
    assert zeros(merged.attn.c_attn.weight) == 0
    assert zeros(merged.mlp.c_fc.weight) == merged.mlp.c_fc.weight.numel() / 2


def zeros(table: Tensor) -> int:
    return int((table == 0).sum())


# Dense, sparse, dense, sparse: two steps each.
TURNS = ACDC(sparsity=0.5, phases=Phases([(0, "dense"), (1, "sparse"), (2, "dense"), (3, "sparse")], 4))


def embedded(model: Any, method: Any = TURNS, embedding_sparsity: float | None = 0.5) -> Run:
    def loss(model: Any) -> Tensor:
        tokens = torch.randint(32, (2, 8))
        return model(input_ids=tokens, labels=tokens).loss

    options = {"total_steps": 8, "steps_per_epoch": 2, "embedding_sparsity": embedding_sparsity}
    return Run(model, method, torch.optim.AdamW, loss, **options)


def test_tables_and_the_optimizers_memory_follow_the_phases_with_an_exact_count(gpt2: Build, tmp_path: Path) -> None:
    run = embedded(gpt2(n_layer=1))
    table, positions = run.model.transformer.wte.weight, run.model.transformer.wpe.weight
    embeddings = run.sparsifier.embeddings
    assert run.model.lm_head.weight is table
    assert "768 weights of embeddings at 50% in sparse phases" in run.sparsifier.summary()
    run.train(2)  # dense; the mask of the sparse phase is chosen, and nothing is zero yet
    assert len(embeddings.masks) == 2 and zeros(table) == 0 and embeddings.measured() == 0.5
    sparse, dense = run.sparsifier.finalized_state_dict(), run.sparsifier.trained_state_dict()
    for key in ("transformer.wte.weight", "lm_head.weight"):
        assert zeros(sparse[key]) == 256 and zeros(dense[key]) == 0
        assert torch.equal(sparse[key][sparse[key] != 0], dense[key][sparse[key] != 0])
    run.train(1)
    # 512 and 256 elements at 50 %.
    assert zeros(table) == 256 and zeros(positions) == 128
    run.sparsifier.save_pretrained(tmp_path)
    assert zeros(GPT2LMHeadModel.from_pretrained(tmp_path).transformer.wte.weight) == 256
    _, loaded = ts.load(tmp_path, GPT2LMHeadModel)
    assert embeddings.masks.keys() == {"transformer.wte.weight", "transformer.wpe.weight"}
    assert_same(loaded.embeddings.masks, embeddings.masks)
    resumed = embedded(gpt2(n_layer=1)).load(run.state()).train(5)
    run = embedded(gpt2(n_layer=1)).train(3)
    table = run.model.transformer.wte.weight
    mask, state = table != 0, run.optimizer.state[table]
    assert not state["exp_avg"][~mask].any() and not state["exp_avg_sq"][~mask].any() and state["exp_avg"][mask].any()
    run.train(1)  # the last sparse step: held to its end, and then free
    assert torch.equal(table != 0, mask) and run.sparsifier.embeddings.masks == {} and not state["exp_avg"].any()
    assert zeros(run.train(2).model.transformer.wte.weight) < 64
    assert zeros(run.train(2).model.transformer.wte.weight) == 256
    assert_same(resumed.state(), run.state())
    model = embedded(gpt2(n_layer=1)).train(2).sparsifier.finalize()
    assert zeros(model.transformer.wte.weight) == 256 and model.lm_head.weight is model.transformer.wte.weight


def test_transformer_xl_prunes_every_cluster_and_without_it_tables_stay_dense(gpt2: Build) -> None:
    sizes = {"vocab_size": 64, "d_model": 16, "d_embed": 16, "n_head": 2, "d_head": 8, "d_inner": 32, "n_layer": 1}
    model = TransfoXLLMHeadModel(TransfoXLConfig(**sizes, cutoffs=[16, 32], div_val=2, mem_len=8))
    run = embedded(model, Static(sparsity=0.5, criterion="magnitude")).train(1)
    assert len(run.sparsifier.embeddings.tables) == 3
    for embedding, output in zip(run.model.transformer.word_emb.emb_layers, run.model.crit.out_layers, strict=True):
        assert embedding.weight is output.weight and zeros(output.weight) == output.weight.numel() // 2
    run = embedded(gpt2(n_layer=1), Static(sparsity=0.5), None).train(2)
    assert run.sparsifier.embeddings is None and zeros(run.model.transformer.wte.weight) == 0


def test_embeddings_that_do_not_fit_are_refused_and_nothing_is_changed(gpt2: Build, mlp: Build, refused: Build) -> None:
    model, none = gpt2(n_layer=1), mlp()
    with refused(none, ValueError, "an embedding that trains for embedding_sparsity, got none"):
        ts.sparsify(none, "static", sparsity=0.5, include=["*"], embedding_sparsity=0.5)
    with refused(model, ValueError, "sparsity in [0, 1)"):
        ts.sparsify(model, "static", sparsity=0.5, embedding_sparsity=1.0)
    sparsifier = embedded(gpt2(n_layer=1)).train(2).sparsifier
    saved = sparsifier.state_dict()
    with pytest.raises(ValueError, match=r"expected embedding_sparsity = None, got 0\.5"):
        embedded(model, embedding_sparsity=None).sparsifier.load_state_dict(saved)
    saved["tensors"]["embedding:transformer.wte.weight"] = torch.ones(3, dtype=torch.bool)
    with pytest.raises(ValueError, match="expected embedding masks of"):
        sparsifier.load_state_dict(saved)
