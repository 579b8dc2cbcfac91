"""Language modelling on a GPU under bf16: the memory goes through checkpoints, the saved model scores as on a CPU."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from transformers import AutoModelForCausalLM

from tritonsparse.eval.perplexity import segment_perplexity
from tritonsparse.models.transfo_xl import Vocabulary
from tritonsparse.train import language_modeling
from tritonsparse.train.text.lines import load_text
from tritonsparse.train.text.source import TextSource

OPTIONS = (
    "--preset=transfoxl-tiny", "--min_count=2", "--batch_size=8", "--tgt_len=32", "--max_train_tokens=6000",
    "--max_eval_tokens=1500", "--max_test_tokens=1500", "--method=gmp", "--sparsity=0.5", "--max_train_steps=20",
    '--method_args={"update_every": 5}', "--learning_rate=0.01", "--mixed_precision=bf16", "--optim=lamb",
    "--dropout=0", "--eval_batch_size=2", "--checkpointing_steps=11", "--logging_steps=1",
)  # fmt: skip


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[None]:
    yield
    reset()


def reset() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def train(folder: Path, *options: str) -> dict[str, Any]:
    reset()
    assert language_modeling.main([*OPTIONS, f"--output_dir={folder}", *options]) == 0
    document: dict[str, Any] = json.loads((folder / "all_results.json").read_text(encoding="utf-8"))
    return document


def test_a_resumed_run_goes_on_with_its_memory_and_the_saved_model_scores_alike_on_the_cpu(tmp_path: Path) -> None:
    whole = train(tmp_path / "whole")
    resumed = train(tmp_path / "resumed", f"--resume_from_checkpoint={tmp_path / 'whole' / 'step_11'}")
    # Sums on a GPU may change their order; without the memory the twelfth loss would be another by far more.
    losses = [[row["loss"] for row in document["history"]] for document in (whole, resumed)]
    assert losses[1] == pytest.approx(losses[0], rel=2e-3)
    assert sum(losses[0][-5:]) < sum(losses[0][:5]) - 0.5
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    vocabulary = Vocabulary.load(tmp_path / "whole" / "vocabulary.txt")
    stream = vocabulary.encode(load_text(TextSource("embedded"))["test"])[:1500]
    found = segment_perplexity(model, stream, tgt_len=32)
    assert found.tokens == whole["tokens_scored"]
    assert found.perplexity == pytest.approx(whole["perplexity"], rel=1e-3)
    if torch.cuda.is_available():
        assert segment_perplexity(model.to("cuda"), stream, tgt_len=32).nll == pytest.approx(found.nll, rel=1e-3)
