"""The memory of a Transformer-XL in training: carried by column, new where a stream begins, saved by rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from tritonsparse.models.transfo_xl import TransfoXLConfig, TransfoXLLMHeadModel
from tritonsparse.train.text.memory import SegmentMemory
from tritonsparse.train.text.segments import SegmentBatches

STREAM = np.random.default_rng(0).integers(30, size=100).astype(np.int32)


@pytest.fixture
def model() -> TransfoXLLMHeadModel:
    torch.manual_seed(0)
    config = TransfoXLConfig(
        vocab_size=30, cutoffs=[10], d_model=16, d_embed=16, n_head=2, d_head=8, d_inner=32, div_val=1, n_layer=2,
        mem_len=64, clamp_len=-1, same_length=False, init_std=0.3, dropout=0.0,
    )  # fmt: skip
    return TransfoXLLMHeadModel(config).double()


def losses(memory: SegmentMemory, model: Any, batches: SegmentBatches, steps: range) -> list[float]:
    return [sum(memory(model, segment).item() for segment in batches.step_batches(0, step)) for step in steps]


def test_the_losses_of_an_epoch_are_those_of_whole_columns(model: TransfoXLLMHeadModel) -> None:
    batches = SegmentBatches(STREAM, batch_size=2, tgt_len=7)
    columns = torch.from_numpy(STREAM.reshape(2, 50).astype(np.int64))
    whole = model(columns[:, :-1], target_ids=columns[:, 1:]).losses
    expected = [piece.sum().item() for piece in whole.split(7, dim=1)]
    assert losses(SegmentMemory(), model, batches, range(7)) == pytest.approx(expected, rel=1e-9)


def test_each_chunk_of_columns_has_a_memory_of_its_own(model: TransfoXLLMHeadModel) -> None:
    together = SegmentBatches(STREAM, batch_size=4, tgt_len=6)
    apart = SegmentBatches(STREAM, batch_size=4, tgt_len=6, chunks=2)
    steps = range(together.steps_per_epoch)
    memory = SegmentMemory()
    assert losses(memory, model, apart, steps) == pytest.approx(losses(SegmentMemory(), model, together, steps))
    assert sorted(memory.chunks) == [0, 1] and memory.chunks[0][0].shape[1] == 2


def test_the_memory_starts_anew_where_the_stream_does(model: TransfoXLLMHeadModel) -> None:
    batches = SegmentBatches(STREAM, batch_size=2, tgt_len=7)
    memory = SegmentMemory()
    first = losses(memory, model, batches, range(batches.steps_per_epoch))
    again = losses(memory, model, batches, range(batches.steps_per_epoch))
    assert again == first
    assert losses(SegmentMemory(), model, batches, range(1)) == first[:1]


def test_the_memory_holds_no_graph(model: TransfoXLLMHeadModel) -> None:
    memory = SegmentMemory()
    (segment,) = SegmentBatches(STREAM, batch_size=2, tgt_len=7).step_batches(0, 0)
    assert memory(model, segment).requires_grad
    assert not any(tensor.requires_grad for tensor in memory.chunks[0])


@pytest.mark.parametrize("chunks", [1, 12], ids=["one chunk", "twelve chunks, of which 10 sorts before 2"])
def test_a_saved_memory_goes_on_as_if_never_stopped(tmp_path: Path, model: TransfoXLLMHeadModel, chunks: int) -> None:
    batches = SegmentBatches(STREAM, batch_size=12, tgt_len=3, chunks=chunks)

    def fresh() -> tuple[SegmentMemory, Accelerator]:
        memory, accelerator = SegmentMemory(), Accelerator(cpu=True)
        accelerator.prepare(model)
        memory.register(accelerator)
        return memory, accelerator

    memory, accelerator = fresh()
    losses(memory, model, batches, range(2))
    accelerator.save_state(str(tmp_path / "state"))
    expected = losses(memory, model, batches, range(2, 3))
    resumed, accelerator = fresh()
    accelerator.load_state(str(tmp_path / "state"))
    assert losses(resumed, model, batches, range(2, 3)) == expected
    assert (tmp_path / "state" / "memory_0.safetensors").is_file()
