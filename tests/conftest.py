"""Tiny models, an accelerator of its own, and the check that a refusal leaves the model as it was."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from torch import nn
from transformers import BertForMaskedLM, GPT2LMHeadModel, MarianMTModel

# For `small_runs`. This folder itself must not reach sys.path: its `kernels` would pose as a package of that name.
sys.path.append(str(Path(__file__).with_name("small")))

Build = Callable[..., Any]


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def nothing_compiled() -> None:
    """torch.compile gives up on a function compiled eight times, and all `nn.Sequential`s of a process are one."""
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


@pytest.fixture
def mlp() -> Build:
    """8 -> 16 -> 4: the linear layers are "0" (128 weights) and "3" (64 weights)."""

    def build(seed: int = 0) -> nn.Sequential:
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Dropout(0.1), nn.Linear(16, 4))

    return build


def _transformer(cls: type[Any], **sizes: Any) -> Build:
    def build(seed: int = 0, **changes: Any) -> Any:
        torch.manual_seed(seed)
        return cls(cls.config_class(**sizes | changes))

    return build


@pytest.fixture
def marian() -> Build:
    """One layer each side, d = 16, ffn = 32; shared tied embeddings and output head."""
    return _transformer(
        MarianMTModel, vocab_size=40, decoder_vocab_size=40, d_model=16, encoder_layers=1, decoder_layers=1,
        encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32,
        max_position_embeddings=16, pad_token_id=0, eos_token_id=1, bos_token_id=2, decoder_start_token_id=1,
        forced_eos_token_id=None, tie_word_embeddings=True, share_encoder_decoder_embeddings=True,
    )  # fmt: skip


@pytest.fixture
def gpt2() -> Build:
    """Two blocks, d = 16: every linear layer but the tied head is a Conv1D."""
    sizes = {"vocab_size": 32, "n_positions": 16, "n_embd": 16, "n_layer": 2, "n_head": 2}
    return _transformer(GPT2LMHeadModel, bos_token_id=0, eos_token_id=1, **sizes)


@pytest.fixture
def bert() -> Build:
    """One block, d = 16, ffn = 32; the decoder of the head is tied to the embeddings."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    return _transformer(BertForMaskedLM, vocab_size=32, max_position_embeddings=16, **sizes)


@pytest.fixture
def fresh_accelerate() -> Iterator[None]:
    """accelerate keeps one state a process, which would refuse another run's settings."""

    def reset() -> None:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()

    reset()
    yield
    reset()


@pytest.fixture
def accelerator(fresh_accelerate: None) -> Accelerator:
    """Two micro-batches a step, for those who use `accumulate`."""
    return Accelerator(cpu=True, gradient_accumulation_steps=2)


def _snapshot(model: nn.Module) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    modules = {name: (type(module), sorted(vars(module))) for name, module in model.named_modules()}
    return modules, {key: value.clone() for key, value in model.state_dict().items()}


@pytest.fixture
def refused() -> Callable[..., AbstractContextManager[None]]:
    """`with refused(model, error, *words)`: the body raises `error`, its text has `words`, nothing has changed."""

    @contextmanager
    def check(model: nn.Module, error: type[Exception], *words: str) -> Iterator[None]:
        modules, tensors = _snapshot(model)
        with pytest.raises(error) as caught:
            yield
        assert [word for word in words if word not in str(caught.value)] == [], str(caught.value)
        modules_now, tensors_now = _snapshot(model)
        assert modules_now == modules and tensors_now.keys() == tensors.keys()
        assert all(torch.equal(tensors_now[key], tensors[key]) for key in tensors if tensors[key].device.type != "meta")

    return check
