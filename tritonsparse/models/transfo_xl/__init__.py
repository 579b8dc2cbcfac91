"""Transformer-XL as a transformers model: `AutoModelForCausalLM.from_pretrained` loads it once this is imported.

Dai et al., "Transformer-XL: Attentive Language Models Beyond a Fixed-Length Context", arXiv:1901.02860.
"""

from __future__ import annotations

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from .configuration import TransfoXLConfig
from .modeling import TransfoXLLMHeadModel, TransfoXLModel
from .vocabulary import Vocabulary

__all__ = ["TransfoXLConfig", "TransfoXLLMHeadModel", "TransfoXLModel", "Vocabulary"]

AutoConfig.register(TransfoXLConfig.model_type, TransfoXLConfig, exist_ok=True)
AutoModel.register(TransfoXLConfig, TransfoXLModel, exist_ok=True)
AutoModelForCausalLM.register(TransfoXLConfig, TransfoXLLMHeadModel, exist_ok=True)
