"""Saved language models and texts for them, as the evaluation programs take them."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from tritonsparse.models.transfo_xl import TransfoXLLMHeadModel, Vocabulary

__all__ = ["VOCABULARY_FILE", "encode", "load_language_model", "read_lines"]

VOCABULARY_FILE = "vocabulary.txt"


def read_lines(program: str, path: str) -> list[str]:
    """Lines of a UTF-8 file, `.gz` or not, without their ends.

    Raises:
        ValueError: it is not there, or no such text.
    """
    opener = gzip.open if path.endswith(".gz") else open
    try:
        with opener(path, "rt", encoding="utf-8", newline="\n") as file:
            return [line.rstrip("\r\n") for line in file]
    except UnicodeDecodeError as error:
        raise ValueError(f"{program}: expected UTF-8 text in {path}, got {error.reason}; convert it") from error
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"{program}: expected a readable file, got {path} ({reason}); check the path") from error


def load_language_model(program: str, name: str, device: str | None = None) -> tuple[nn.Module, Any]:
    """A checkpoint and its `Vocabulary` (Transformer-XL) or tokenizer (any other causal model).

    Args:
        program: who asks, for messages.
        name: a local folder, or a hub id.
        device: None: the GPU if there is one.

    Raises:
        ValueError: there is no such checkpoint, weights are missing, or vocabulary and model are of different sizes.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(name, output_loading_info=True)
        model, info = loaded
        if isinstance(model, TransfoXLLMHeadModel):
            encoder: Any = Vocabulary.load(Path(name) / VOCABULARY_FILE)
        else:
            encoder = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ValueError(
            f"{program}: expected a language model with its vocabulary or tokenizer, got {name!r} ({reason}); give the "
            f"output folder of a training run"
        ) from error
    if info["missing_keys"]:  # transformers fills these with random numbers and goes on
        missing = ", ".join(sorted(info["missing_keys"])[:3])
        raise ValueError(
            f"{program}: expected all weights in {name!r}, got none for {missing}; give a whole checkpoint"
        )
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
