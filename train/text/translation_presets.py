"""Transformer presets for translation from scratch: Marian classes at the sizes of Vaswani et al. (2017).

    preset              layers  d_model  heads  ffn   dropout
    transformer-tiny    2 + 2   128      4      512   0.1     CPU minutes; the demo
    transformer-small   3 + 3   256      4      512   0.1     Multi30k on a CPU
    transformer-base    6 + 6   512      8      2048  0.1     Vaswani et al., table 3, "base"
    transformer-big     6 + 6   1024     16     4096  0.3     Vaswani et al., table 3, "big"

Post-norm, sinusoidal positions, ReLU, embeddings times sqrt(d_model), one joint vocabulary with encoder,
decoder and output embeddings tied. Linears are initialised xavier-uniform and embeddings N(0, 1/d_model),
as fairseq and tensor2tensor do; transformers' own N(0, 0.02) everywhere trains differently.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    GenerationConfig,
    MarianConfig,
    MarianMTModel,
    PreTrainedTokenizerFast,
)

from tritonsparse.checkpoint.files import freeze_unsaved
from tritonsparse.eval.command_line import naming

__all__ = ["PRESETS", "build_model", "load_model"]

# name -> (layers each side, d_model, heads, ffn, dropout)
PRESETS: dict[str, tuple[int, int, int, int, float]] = {
    "transformer-tiny": (2, 128, 4, 512, 0.1),
    "transformer-small": (3, 256, 4, 512, 0.1),
    "transformer-base": (6, 512, 8, 2048, 0.1),
    "transformer-big": (6, 1024, 16, 4096, 0.3),
}


def build_model(
    preset: str,
    tokenizer: PreTrainedTokenizerFast,
    *,
    dropout: float | None = None,
    max_positions: int = 1024,
) -> MarianMTModel:
    """A randomly initialised Marian model of the preset's size; draws from torch's global generator.

    Raises:
        ValueError: unknown preset.
    """
    if preset not in PRESETS:
        raise ValueError(f"build_model: expected a preset among {', '.join(PRESETS)}, got {preset!r}; choose one")
    layers, d_model, heads, ffn, default_dropout = PRESETS[preset]
    vocabulary = len(tokenizer)
    special = {
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": None,
        "decoder_start_token_id": tokenizer.eos_token_id,
        "forced_eos_token_id": None,
    }
    config = MarianConfig(
        vocab_size=vocabulary,
        decoder_vocab_size=vocabulary,
        d_model=d_model,
        encoder_layers=layers,
        decoder_layers=layers,
        encoder_attention_heads=heads,
        decoder_attention_heads=heads,
        encoder_ffn_dim=ffn,
        decoder_ffn_dim=ffn,
        activation_function="relu",
        dropout=default_dropout if dropout is None else dropout,
        attention_dropout=0.0,
        activation_dropout=0.0,
        scale_embedding=True,
        max_position_embeddings=max_positions,
        tie_word_embeddings=True,
        share_encoder_decoder_embeddings=True,
        **special,
    )
    model = MarianMTModel(config)
    _initialise(model, d_model, tokenizer.pad_token_id)
    # transformers 5 drops generation values on the model config: they live here or are passed.
    model.generation_config = GenerationConfig(**special)
    return model


@torch.no_grad()
def _initialise(model: MarianMTModel, d_model: int, pad: int) -> None:
    embedding: Tensor = model.get_input_embeddings().weight  # type: ignore[assignment]
    for module in model.modules():
        if type(module) is nn.Linear and module.weight is not embedding:
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    nn.init.normal_(embedding, std=1.0 / math.sqrt(d_model))
    embedding[pad].zero_()
    # Fixed sinusoids, looked up without gradients; DDP would wait for theirs for ever.
    for side in (model.get_encoder(), model.get_decoder()):
        side.embed_positions.weight.requires_grad_(False)


def load_model(name_or_path: str) -> tuple[Any, Any]:
    """Tokenizer and model of a saved seq2seq checkpoint.

    Raises:
        ValueError: there is none of that name, or no way to it.
    """
    expected = "a seq2seq checkpoint (a local folder or a reachable hub id)"
    with naming("translation", expected, name_or_path, "pass another --model_name_or_path"):
        tokenizer = AutoTokenizer.from_pretrained(name_or_path)
        model = AutoModelForSeq2SeqLM.from_pretrained(name_or_path)
    # Where no gradient reaches what is not saved, DDP would wait for it.
    freeze_unsaved(model)
    return tokenizer, model
