"""Embedding tables kept sparse beside the layers: counts, phases, ties, twins, resuming."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import Build, Run, assert_same
from torch import Tensor, nn
from transformers import GPT2LMHeadModel

import tritonsparse as ts
from tritonsparse.methods import ACDC, Phases, Static
from tritonsparse.models.transfo_xl import TransfoXLConfig, TransfoXLLMHeadModel

# Dense, sparse, dense, sparse: two steps each.
TURNS = ACDC(sparsity=0.5, phases=Phases([(0, "dense"), (1, "sparse"), (2, "dense"), (3, "sparse")], 4))


def random_tokens(model: Any) -> Tensor:
    tokens = torch.randint(32, (2, 8))
    loss: Tensor = model(input_ids=tokens, labels=tokens).loss
    return loss


@pytest.fixture
def start(gpt2: Build) -> Build:
    def build(method: Any = TURNS, model: Any = None, embedding_sparsity: float | None = 0.5) -> Run:
        options = {"total_steps": 8, "steps_per_epoch": 2, "embedding_sparsity": embedding_sparsity}
        return Run(model or gpt2(n_layer=1), method, torch.optim.AdamW, random_tokens, **options)

    return build


def zeros(table: Tensor) -> int:
    return int((table == 0).sum())


def test_tables_and_the_optimizers_memory_follow_the_phases_with_an_exact_count(start: Build) -> None:
    run = start()
    table, positions = run.model.transformer.wte.weight, run.model.transformer.wpe.weight
    embeddings = run.sparsifier.embeddings
    assert run.model.lm_head.weight is table
    run.train(2)  # dense; the mask of the sparse phase is chosen, and nothing is zero yet
    assert len(embeddings.masks) == 2 and zeros(table) == 0
    run.train(1)
    # 512 and 256 elements at 50 %.
    assert zeros(table) == 256 and zeros(positions) == 128
    mask, state = table != 0, run.optimizer.state[table]
    assert not state["exp_avg"][~mask].any() and not state["exp_avg_sq"][~mask].any() and state["exp_avg"][mask].any()
    run.train(1)  # the last sparse step: held to its end, and then free
    assert torch.equal(table != 0, mask) and embeddings.masks == {} and not state["exp_avg"].any()
    assert zeros(run.train(2).model.transformer.wte.weight) < 64
    assert zeros(run.train(2).model.transformer.wte.weight) == 256


def test_at_the_boundary_the_sparse_model_has_zeros_and_the_dense_twin_has_none(start: Build) -> None:
    run = start().train(2)
    sparse, dense = run.sparsifier.finalized_state_dict(), run.sparsifier.trained_state_dict()
    for key in ("transformer.wte.weight", "lm_head.weight"):
        assert zeros(sparse[key]) == 256 and zeros(dense[key]) == 0
        assert torch.equal(sparse[key][sparse[key] != 0], dense[key][sparse[key] != 0])
    assert run.sparsifier.embeddings.measured() == 0.5
    model = run.sparsifier.finalize()
    assert zeros(model.transformer.wte.weight) == 256 and model.lm_head.weight is model.transformer.wte.weight


def test_a_resumed_run_is_one_that_never_stopped_and_a_saved_folder_brings_its_masks_back(
    start: Build, tmp_path: Path
) -> None:
    first = start().train(3)
    assert_same(start().load(first.state()).train(5).state(), start().train(8).state())
    first.sparsifier.save_pretrained(tmp_path)
    assert zeros(GPT2LMHeadModel.from_pretrained(tmp_path).transformer.wte.weight) == 256
    _, loaded = ts.load(tmp_path, GPT2LMHeadModel)
    assert first.sparsifier.embeddings.masks
    assert_same(loaded.embeddings.masks, first.sparsifier.embeddings.masks)


def test_transformer_xl_prunes_every_cluster_and_its_softmax(start: Build) -> None:
    config = TransfoXLConfig(
        vocab_size=64, cutoffs=[16, 32], d_model=16, d_embed=16, n_head=2, d_head=8, d_inner=32, n_layer=1, div_val=2,
        mem_len=8,
    )  # fmt: skip
    run = start(Static(sparsity=0.5, criterion="magnitude"), TransfoXLLMHeadModel(config)).train(1)
    assert len(run.sparsifier.embeddings.tables) == 3
    for embedding, output in zip(run.model.transformer.word_emb.emb_layers, run.model.crit.out_layers, strict=True):
        assert embedding.weight is output.weight and zeros(output.weight) == output.weight.numel() // 2


def test_without_it_tables_stay_dense_and_the_summary_says_what_it_does(start: Build, gpt2: Build) -> None:
    run = start(Static(sparsity=0.5), embedding_sparsity=None).train(2)
    assert run.sparsifier.embeddings is None and zeros(run.model.transformer.wte.weight) == 0
    assert "768 weights of embeddings at 50% in sparse phases" in start().sparsifier.summary()


def test_what_does_not_fit_is_refused_and_nothing_is_changed(start: Build, gpt2: Build, refused: Build) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    with refused(model, ValueError, "an embedding that trains for embedding_sparsity, got none"):
        ts.sparsify(model, "static", sparsity=0.5, include=["*"], embedding_sparsity=0.5)
    model = gpt2()
    with refused(model, ValueError, "sparsity in [0, 1)"):
        ts.sparsify(model, "static", sparsity=0.5, embedding_sparsity=1.0)
    run = start().train(2)
    saved = run.sparsifier.state_dict()
    with pytest.raises(ValueError, match=r"expected embedding_sparsity = None, got 0\.5"):
        start(embedding_sparsity=None).sparsifier.load_state_dict(saved)
    saved["tensors"]["embedding:transformer.wte.weight"] = torch.ones(3, dtype=torch.bool)
    with pytest.raises(ValueError, match="expected embedding masks of"):
        run.sparsifier.load_state_dict(saved)
