"""Language models from scratch: Transformer-XL at NVIDIA's sizes, and a tiny GPT-2.

    preset             layers  d_model  heads x d_head  ffn   d_embed, div_val  dropout, dropatt  tgt = mem
    transfoxl-tiny     4       128      4 x 32          512   128, 1            0.1, 0            64        (for CPUs)
    transfoxl-base     16      512      8 x 64          2048  512, 1            0.1, 0            192
    transfoxl-large    18      1024     16 x 64         4096  1024, 4           0.2, 0.2          384
    gpt2-tiny          4       128      4 x 32          512                     0.1               128 positions

base and large are wt103_base.yaml and wt103_large.yaml of NVIDIA's DeepLearningExamples (PyTorch/LanguageModeling/
Transformer-XL): r_w and r_r shared by all layers, no clamping, not same_length in training.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import GPT2Config, GPT2LMHeadModel

from tritonsparse.eval.language_models import load_language_model
from tritonsparse.models.transfo_xl import TransfoXLConfig, TransfoXLLMHeadModel

__all__ = ["PRESETS", "TRANSFO_XL", "Sizes", "build_gpt2", "build_transfo_xl", "is_transfo_xl", "load_model"]


@dataclass(frozen=True)
class Sizes:
    """A Transformer-XL: fields of `TransfoXLConfig`, and the tokens of a segment and of its memory in training."""

    n_layer: int
    d_model: int
    n_head: int
    d_head: int
    d_inner: int
    div_val: int
    dropout: float
    dropatt: float
    init_std: float
    cutoffs: tuple[int, ...]
    tgt_len: int


# The published cutoffs are of 267,735 types; those beyond a smaller vocabulary are left out.
_WIKITEXT_103 = (19997, 39997, 199997)
TRANSFO_XL = {
    "transfoxl-tiny": Sizes(4, 128, 4, 32, 512, 1, 0.1, 0.0, 0.02, (2000, 10000), 64),
    "transfoxl-base": Sizes(16, 512, 8, 64, 2048, 1, 0.1, 0.0, 0.02, _WIKITEXT_103, 192),
    "transfoxl-large": Sizes(18, 1024, 16, 64, 4096, 4, 0.2, 0.2, 0.005, _WIKITEXT_103, 384),
}
# name -> (layers, n_embd, heads, positions)
GPT2 = {"gpt2-tiny": (4, 128, 4, 128)}
PRESETS = (*TRANSFO_XL, *GPT2)


def build_transfo_xl(
    preset: str, types: int, *, mem_len: int | None = None, dropout: float | None = None, dropatt: float | None = None
) -> TransfoXLLMHeadModel:
    """A randomly initialised Transformer-XL; draws from torch's global generator.

    Args:
        preset: one of `TRANSFO_XL`.
        types: size of the vocabulary.
        mem_len: tokens of memory; None: the preset's.
        dropout, dropatt: None: the preset's.
    """
    sizes = TRANSFO_XL[preset]
    config = TransfoXLConfig(
        vocab_size=types,
        cutoffs=[edge for edge in sizes.cutoffs if edge < types],
        d_model=sizes.d_model,
        d_embed=sizes.d_model,
        n_head=sizes.n_head,
        d_head=sizes.d_head,
        d_inner=sizes.d_inner,
        div_val=sizes.div_val,
        n_layer=sizes.n_layer,
        mem_len=sizes.tgt_len if mem_len is None else mem_len,
        clamp_len=-1,
        same_length=False,
        same_length_rule="nvidia",
        dropout=sizes.dropout if dropout is None else dropout,
        dropatt=sizes.dropatt if dropatt is None else dropatt,
        untie_r=False,
        init_std=sizes.init_std,
        proj_init_std=0.01,
    )
    return TransfoXLLMHeadModel(config)


def build_gpt2(preset: str, tokenizer: Any, *, dropout: float | None = None) -> GPT2LMHeadModel:
    """A randomly initialised GPT-2; draws from torch's global generator."""
    layers, width, heads, positions = GPT2[preset]
    rate = 0.1 if dropout is None else dropout
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=positions, n_embd=width, n_layer=layers, n_head=heads,
        resid_pdrop=rate, embd_pdrop=rate, attn_pdrop=rate,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def load_model(name_or_path: str) -> tuple[Any, Any]:
    """Vocabulary (Transformer-XL) or tokenizer, and model, in float32, of a saved causal language model.

    Raises:
        ValueError: there is none of that name, or its vocabulary is of another size.
    """
    model, encoder = load_language_model("language_modeling", name_or_path, "cpu")
    return encoder, model


def is_transfo_xl(model: Any) -> bool:
    """Whether a model has a memory and a word-level vocabulary."""
    return isinstance(model, TransfoXLLMHeadModel)
