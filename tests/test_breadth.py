"""Forty and more architectures of transformers, tiny, are sparsified, trained, saved and loaded without us."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from small_runs import Run
from torch import Tensor

# What most configurations call their sizes; keys that a configuration does not know are left out.
SIZES: dict[str, Any] = {
    "vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "head_dim": 8,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
ENCODER_DECODER = {
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "decoder_start_token_id": 2,
}  # fmt: skip
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
IMAGE = {"image_size": 32, "patch_size": 4, "num_channels": 3, "num_hidden_layers": 4}
TOWER = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64}
WAVE = {
    "conv_dim": (32, 32), "conv_kernel": (8, 3), "conv_stride": (4, 2), "num_feat_extract_layers": 2, "vocab_size": 32,
    "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 4, "num_hidden_layers": 4,
    "layerdrop": 0.0, "mask_time_prob": 0.0, "ctc_loss_reduction": "mean",
}  # fmt: skip
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
SEGFORMER = {
    "depths": [2, 2], "hidden_sizes": [16, 32], "num_encoder_blocks": 2, "num_attention_heads": [1, 2],
    "sr_ratios": [1, 1], "patch_sizes": [3, 3], "strides": [4, 2], "mlp_ratios": [4, 4],
}  # fmt: skip
AST = {"patch_size": 8, "frequency_stride": 8, "time_stride": 8, "max_length": 32, "num_mel_bins": 16, "num_labels": 2}
WHISPER = {
    **ENCODER_DECODER, "num_mel_bins": 16, "max_source_positions": 20, "max_target_positions": 32,
    "suppress_tokens": None, "begin_suppress_tokens": None,
}  # fmt: skip
CLIP = {
    "projection_dim": 16, "text_config": {**TOWER, "vocab_size": 99, "num_hidden_layers": 2},
    "vision_config": {**TOWER, **IMAGE},
}  # fmt: skip


def text(random: torch.Generator) -> dict[str, Any]:
    ids = torch.randint(3, 99, (2, 12), generator=random)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def pixels(random: torch.Generator) -> dict[str, Any]:
    return {"pixel_values": torch.randn(2, 3, 32, 32, generator=random)}


def some(random: torch.Generator, least: int, below: int, *shape: int) -> dict[str, Any]:
    return {"labels": torch.randint(least, below, shape, generator=random)}


# What a batch of each kind of model holds; those of the first three generate.
BATCHES: dict[str, Callable[[torch.Generator], dict[str, Any]]] = {
    "causal": lambda random: (batch := text(random)) | {"labels": batch["input_ids"].clone()},
    "seq2seq": lambda random: text(random) | some(random, 3, 99, 2, 7),
    "speech": lambda random: {"input_features": torch.randn(2, 16, 40, generator=random)} | some(random, 3, 99, 2, 7),
    "masked": lambda random: BATCHES["causal"](random),
    "image": lambda random: pixels(random) | some(random, 0, 2, 2),
    "wave": lambda random: {"input_values": torch.randn(2, 400, generator=random)} | some(random, 3, 32, 2, 3),
    "spectrogram": lambda random: {"input_values": torch.randn(2, 32, 16, generator=random)} | some(random, 0, 2, 2),
    "pairs": lambda random: text(random) | pixels(random) | {"return_loss": True},
}
GENERATING = ("causal", "seq2seq", "speech")
ENDINGS = {
    "causal": "ForCausalLM", "seq2seq": "ForConditionalGeneration", "masked": "ForMaskedLM",
    "image": "ForImageClassification", "wave": "ForCTC",
}  # fmt: skip
# Models of each kind for which the general sizes are enough, and those that need their own.
PLAIN = {
    "causal": "Llama Mistral Qwen2 Qwen3 Gemma Gemma2 Phi StableLm Starcoder2 Olmo Olmo2 Cohere Granite GPTNeoX Helium "
    "Nemotron Persimmon BioGpt",
    "masked": "Bert Roberta Electra XLMRoberta MPNet ConvBert DebertaV2",
}
OWN: dict[str, dict[str, dict[str, Any]]] = {
    "causal": {
        "Phi3": {"resid_pdrop": 0.0}, "OPT": {"ffn_dim": 64, "word_embed_proj_dim": 32},
        "Bloom": {"n_layer": 2, "n_head": 4}, "GPT2LMHeadModel": GPT, "GPTJ": {**GPT, "rotary_dim": 4},
        "CodeGen": {**GPT, "rotary_dim": 4},
        "XGLM": {"d_model": 32, "num_layers": 2, "attention_heads": 4, "ffn_dim": 64},
        "GPTNeo": {"num_layers": 2, "num_heads": 4, "window_size": 8, "attention_types": [[["global", "local"], 1]]},
        "Mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2}, "Olmoe": EXPERTS,
        "Qwen2Moe": {**EXPERTS, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32},
    },
    "masked": {
        "DistilBert": {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64}, "Albert": {"embedding_size": 32},
        "MobileBert": {"hidden_size": 64, "embedding_size": 32, "intra_bottleneck_size": 32},
        "ModernBert": {"global_attn_every_n_layers": 1},
    },
    "seq2seq": {
        "Bart": ENCODER_DECODER, "MBart": ENCODER_DECODER, "Pegasus": ENCODER_DECODER, "M2M100": ENCODER_DECODER,
        "BlenderbotSmall": ENCODER_DECODER, "MarianMTModel": ENCODER_DECODER, "T5": T5, "MT5": T5,
    },
    "image": {
        "ViT": IMAGE, "DeiT": IMAGE, "Beit": IMAGE, "Dinov2": IMAGE, "Segformer": SEGFORMER,
        "Swin": {"image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2],
                 "window_size": 2},
        "ConvNext": {"depths": [1, 1, 1, 1], "hidden_sizes": [8, 16, 32, 32], "num_stages": 4},
    },
    "wave": {"Wav2Vec2": WAVE, "Hubert": WAVE}, "spectrogram": {"ASTForAudioClassification": AST},
    "speech": {"WhisperForConditionalGeneration": WHISPER}, "pairs": {"CLIPModel": CLIP},
}  # fmt: skip
ARCHITECTURES = {
    name if "Model" in name or "For" in name else f"{name}{ENDINGS[kind]}": (kind, sizes)
    for kind, own in OWN.items()
    for name, sizes in ({name: {} for name in PLAIN.get(kind, "").split()} | own).items()
}


def build(name: str) -> Any:
    cls = getattr(transformers, name)
    sizes = ARCHITECTURES[name][1] | ({"num_labels": 2} if name.endswith("ImageClassification") else {})
    # A configuration may know a size by another name too, and refuse to have both set or one that it derives.
    other_names: Mapping[str, str] = cls.config_class.attribute_map
    fields = cls.config_class().to_dict().keys() | other_names.keys()
    general = {key: SIZES[key] for key in SIZES.keys() & fields if other_names.get(key, key) not in sizes}
    return cls(cls.config_class(**general | sizes))


HERE = [name for name in ARCHITECTURES if hasattr(transformers, name)]
# What lies mostly in weights that are listed as staying dense, and the reason that says so.
BELOW = {f"{name}ForCausalLM": f"stacked weights of {name}Experts" for name in ("Mixtral", "Qwen2Moe", "Olmoe")}
BELOW["BloomForCausalLM"] = "read by BloomMLP"
# Not eligible: embeddings, tied parameters and output heads stay dense by design.
BY_DESIGN = ("embedding", "tied parameter", "output head")


def _numbers(model: Any, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        output = model(**batch)
    logits = getattr(output, "logits", None)
    numbers: Tensor = output.logits_per_image if logits is None else logits
    return numbers


@pytest.mark.parametrize("name", HERE)
def test_an_architecture_lives_a_sparse_life(name: str, tmp_path: Path) -> None:
    """Sparsified, trained, generating, saved, and loaded with the stock class, which gives the same logits."""
    torch.manual_seed(0)
    batch = BATCHES[ARCHITECTURES[name][0]](torch.Generator().manual_seed(1))
    run = Run(
        build(name).train(), "gmp", torch.optim.AdamW, lambda model: model(**batch).loss,
        groups={"lr": 1e-3}, sparsity=0.5, total_steps=3,
    ).train(3)  # fmt: skip
    assert torch.stack(run.losses).isfinite().all()
    model: Any = run.model.eval()
    if ARCHITECTURES[name][0] in GENERATING:
        prompt = {key: value for key, value in batch.items() if key != "labels"}
        model.generate(**prompt, max_new_tokens=3, do_sample=False)
    layers = run.sparsifier.layers.values()
    covered = sum(layer.weight.numel() for layer in layers)
    assert abs(sum(int((layer.effective_weight() == 0).sum()) for layer in layers) / covered - 0.5) < 0.01
    reasons = {skip.reason: 0 for skip in run.sparsifier.skipped if skip.reason not in BY_DESIGN}
    for skip in run.sparsifier.skipped:
        reasons |= {skip.reason: reasons[skip.reason] + skip.numel} if skip.reason in reasons else {}
    assert BELOW[name] in reasons if name in BELOW else covered >= 0.8 * (covered + sum(reasons.values())), reasons
    ours, finalized = _numbers(model, batch), run.sparsifier.finalize()
    assert not any(type(module).__name__.startswith("Sparse") for module in finalized.modules())
    finalized.save_pretrained(tmp_path)
    assert torch.equal(_numbers(type(finalized).from_pretrained(tmp_path).eval(), batch), ours)


def test_the_sweep_is_as_broad_as_promised() -> None:
    assert len(HERE) >= 40 and len(set(HERE) - BELOW.keys()) >= 35
