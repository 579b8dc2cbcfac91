"""Models whose predictions differ, one thread for what is timed, and what a program prints."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from tritonsparse.models.transfo_xl import TransfoXLConfig, TransfoXLLMHeadModel


@pytest.fixture
def transfo_xl() -> Callable[..., TransfoXLLMHeadModel]:
    """`transfo_xl(seed, **changes)`: two layers, d = 16, of weights large enough that predictions differ."""
    sizes = dict(
        vocab_size=50, cutoffs=[10, 30], d_model=16, d_embed=16, n_head=2, d_head=8, d_inner=32, div_val=2, n_layer=2,
        mem_len=8, clamp_len=-1, same_length=False, init_std=0.3, proj_init_std=0.3, dropout=0.3,
    )  # fmt: skip

    def build(seed: int = 0, **changes: Any) -> TransfoXLLMHeadModel:
        torch.manual_seed(seed)
        return TransfoXLLMHeadModel(TransfoXLConfig(**sizes | changes))

    return build


@pytest.fixture
def gpt(gpt2: Callable[..., Any]) -> Callable[..., Any]:
    """`gpt(seed, **changes)`, with the same words."""
    return lambda seed=0, **changes: gpt2(seed, **{"vocab_size": 50, "initializer_range": 0.3, **changes})


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Threads that wait for a busy core take the time, not the products."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def document(capsys: Any) -> Callable[[], Any]:
    """The JSON that a program printed last."""
    return lambda: json.loads(capsys.readouterr().out.strip().rpartition("\n")[2])


@pytest.fixture
def refusal(capsys: Any) -> Callable[[], str]:
    """The one sentence by which a program refused its input; it printed nothing else."""

    def error() -> str:
        printed = capsys.readouterr()
        (line,) = [line for line in printed.err.splitlines() if line.startswith("error: ")]
        assert "Traceback" not in printed.err and printed.out == ""
        return str(line)

    return error
