"""Saved language models and texts for them, as the evaluation programs take them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from tritonsparse.models.transfo_xl import TransfoXLLMHeadModel, Vocabulary

from .checkpoints import load_beside, load_pretrained, load_tokenizer
from .text_files import read_lines

__all__ = ["VOCABULARY_FILE", "encode", "load_language_model", "read_lines"]

VOCABULARY_FILE = "vocabulary.txt"


def load_language_model(program: str, name: str, device: str | None = None) -> tuple[nn.Module, Any]:
    """A checkpoint, in float32, and its `Vocabulary` (Transformer-XL) or tokenizer (any other causal model).

    Args:
        program: who asks, for messages.
        name: a local folder, or a hub id.
        device: None: the GPU if there is one.

    Raises:
        ValueError: there is no such checkpoint, weights are missing, or vocabulary and model are of different sizes.
    """
    from transformers import AutoModelForCausalLM

    model = load_pretrained(program, AutoModelForCausalLM, name, "a causal language model")
    if isinstance(model, TransfoXLLMHeadModel):
        file = Path(name) / VOCABULARY_FILE
        encoder: Any = load_beside(program, name, "a vocabulary", lambda: Vocabulary.load(file))
    else:
        encoder = load_tokenizer(program, name)
    if isinstance(encoder, Vocabulary) and len(encoder) != model.config.vocab_size:
        raise ValueError(
            f"{program}: expected a vocabulary of the model's {model.config.vocab_size} types, got {len(encoder)} "
            f"words in {VOCABULARY_FILE}; give the one that the model was trained with"
        )
    return model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")), encoder


def encode(encoder: Any, lines: list[str]) -> tuple[NDArray[np.int64], int | None]:
    """The ids of a text end to end, and its words and lines where ids are of subwords.

    A tokenizer's text begins with its begin-of-text (or else end-of-text) token, so that the first token of the text
    is scored too; where it has neither, the first token is only read.
    """
    if isinstance(encoder, Vocabulary):
        return encoder.encode(lines).astype(np.int64), None
    rows = encoder([f"{line}\n" for line in lines], add_special_tokens=False)["input_ids"]
    start = encoder.bos_token_id if encoder.bos_token_id is not None else encoder.eos_token_id
    ids = [*([] if start is None else [start]), *(token for row in rows for token in row)]
    return np.asarray(ids, dtype=np.int64), sum(len(line.split()) for line in lines) + len(lines)
