"""Embedding tables kept sparse beside the layers: counts, phases, ties, twins, resuming."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

import tritonsparse as ts
from tritonsparse.methods import ACDC, Method, Phases, Static
from tritonsparse.models.transfo_xl import TransfoXLConfig, TransfoXLLMHeadModel

# Dense, sparse, dense, sparse: two steps each.
TURNS = Phases([(0, "dense"), (1, "sparse"), (2, "dense"), (3, "sparse")], 4)


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=32, n_positions=16))


class Run:
    def __init__(self, model: Any, method: Method | None = None, embedding_sparsity: float | None = 0.5) -> None:
        self.model = model
        self.sparsifier = ts.sparsify(
            model, method or ACDC(sparsity=0.5, phases=TURNS), total_steps=8, steps_per_epoch=2,
            embedding_sparsity=embedding_sparsity,
        )  # fmt: skip
        self.optimizer = torch.optim.AdamW(self.sparsifier.param_groups(lr=0.01, weight_decay=0.01))
        self.sparsifier.attach(self.optimizer)

    def train(self, steps: int) -> None:
        for step in range(self.sparsifier.step, self.sparsifier.step + steps):
            torch.manual_seed(step)
            tokens = torch.randint(32, (2, 8))
            self.model(input_ids=tokens, labels=tokens).loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()


def zeros(table: torch.Tensor) -> int:
    return int((table == 0).sum())


def test_tables_follow_the_phases_with_an_exact_count_and_tied_output_layers_with_them() -> None:
    run = Run(gpt2())
    table, positions = run.model.transformer.wte.weight, run.model.transformer.wpe.weight
    assert run.model.lm_head.weight is table
    run.train(2)  # dense; the mask of the sparse phase is chosen, and nothing is zero yet
    assert run.sparsifier.embeddings is not None and len(run.sparsifier.embeddings.masks) == 2
    assert zeros(table) == 0
    run.train(1)
    # 512 and 256 elements at 50 %.
    assert zeros(table) == 256 and zeros(positions) == 128
    mask = table != 0
    run.train(1)  # the last sparse step: held to its end, and then free
    assert torch.equal(table != 0, mask) and run.sparsifier.embeddings.masks == {}
    run.train(2)
    assert zeros(table) < 64
    run.train(2)
    assert zeros(table) == 256


def test_the_optimizer_keeps_no_memory_outside_a_mask_and_none_of_the_sparse_phase() -> None:
    run = Run(gpt2())
    run.train(3)
    table = run.model.transformer.wte.weight
    state = run.optimizer.state[table]
    assert not state["exp_avg"][table == 0].any() and not state["exp_avg_sq"][table == 0].any()
    assert state["exp_avg"][table != 0].any()
    run.train(1)
    assert not state["exp_avg"].any()


def test_at_the_boundary_the_sparse_model_has_zeros_and_the_dense_twin_has_none() -> None:
    run = Run(gpt2())
    run.train(2)
    sparse, dense = run.sparsifier.finalized_state_dict(), run.sparsifier.trained_state_dict()
    for key in ("transformer.wte.weight", "lm_head.weight"):
        assert zeros(sparse[key]) == 256 and zeros(dense[key]) == 0
        assert torch.equal(sparse[key][sparse[key] != 0], dense[key][sparse[key] != 0])
    assert run.sparsifier.embeddings is not None and run.sparsifier.embeddings.measured() == 0.5
    model = run.sparsifier.finalize()
    assert zeros(model.transformer.wte.weight) == 256 and model.lm_head.weight is model.transformer.wte.weight


def test_a_resumed_run_is_one_that_never_stopped() -> None:
    whole = Run(gpt2())
    whole.train(8)
    first = Run(gpt2())
    first.train(3)
    second = Run(gpt2())
    second.model.load_state_dict(first.model.state_dict())
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    second.sparsifier.load_state_dict(first.sparsifier.state_dict())
    second.train(5)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, second.model.state_dict()[name]), name


def test_a_saved_folder_brings_its_masks_back(tmp_path: Path) -> None:
    run = Run(gpt2())
    run.train(3)
    run.sparsifier.save_pretrained(tmp_path / "run")
    stock = GPT2LMHeadModel.from_pretrained(tmp_path / "run")
    assert zeros(stock.transformer.wte.weight) == 256
    _, sparsifier = ts.load(tmp_path / "run", GPT2LMHeadModel)
    assert sparsifier.embeddings is not None and run.sparsifier.embeddings is not None
    for name, mask in run.sparsifier.embeddings.masks.items():
        assert torch.equal(sparsifier.embeddings.masks[name], mask)


def test_transformer_xl_prunes_every_cluster_and_its_softmax() -> None:
    torch.manual_seed(0)
    config = TransfoXLConfig(
        vocab_size=64, cutoffs=[16, 32], d_model=16, d_embed=16, n_head=2, d_head=8, d_inner=32, n_layer=1, div_val=2,
        mem_len=8,
    )  # fmt: skip
    run = Run(TransfoXLLMHeadModel(config), Static(sparsity=0.5, criterion="magnitude"))
    assert run.sparsifier.embeddings is not None and len(run.sparsifier.embeddings.tables) == 3
    tokens = torch.randint(64, (2, 8))
    run.model(input_ids=tokens, labels=tokens).loss.backward()
    run.optimizer.step()
    for embedding, output in zip(run.model.transformer.word_emb.emb_layers, run.model.crit.out_layers, strict=True):
        assert embedding.weight is output.weight and zeros(output.weight) == output.weight.numel() // 2


def test_without_it_tables_stay_dense_and_the_summary_says_what_it_does() -> None:
    run = Run(gpt2(), Static(sparsity=0.5), embedding_sparsity=None)
    run.train(2)
    assert run.sparsifier.embeddings is None and zeros(run.model.transformer.wte.weight) == 0
    assert "768 weights of embeddings at 50% in sparse phases" in Run(gpt2()).sparsifier.summary()


def test_what_does_not_fit_is_refused_and_nothing_is_changed() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    with pytest.raises(ValueError, match="an embedding that trains for embedding_sparsity, got none"):
        ts.sparsify(model, "static", sparsity=0.5, include=["*"], embedding_sparsity=0.5)
    assert type(model[0]) is nn.Linear
    with pytest.raises(ValueError, match=r"sparsity in \[0, 1\)"):
        ts.sparsify(gpt2(), "static", sparsity=0.5, embedding_sparsity=1.0)
    saved = Run(gpt2()).sparsifier.state_dict()
    with pytest.raises(ValueError, match=r"expected embedding_sparsity = None, got 0\.5"):
        Run(gpt2(), embedding_sparsity=None).sparsifier.load_state_dict(saved)
    run = Run(gpt2())
    run.train(2)
    saved = run.sparsifier.state_dict()
    saved["tensors"]["embedding:transformer.wte.weight"] = torch.ones(3, dtype=torch.bool)
    with pytest.raises(ValueError, match="expected embedding masks of"):
        run.sparsifier.load_state_dict(saved)
