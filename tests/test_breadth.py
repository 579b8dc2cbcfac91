"""Forty and more architectures of transformers, tiny, are sparsified, trained, saved and loaded without us."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from small_runs import Run
from torch import Tensor, nn

# What most configurations call their sizes; keys that a configuration does not know are left out.
SIZES: dict[str, Any] = {
    **{"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64},
    **{"num_key_value_heads": 2, "max_position_embeddings": 64, "head_dim": 8},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
}
ENCODER_DECODER = {
    **{"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4},
    **{"decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "decoder_start_token_id": 2},
}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
IMAGE = {"image_size": 32, "patch_size": 4, "num_channels": 3, "num_hidden_layers": 4}
TOWER = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64}
WAVE = {
    **{"conv_dim": (32, 32), "conv_kernel": (8, 3), "conv_stride": (4, 2), "num_feat_extract_layers": 2},
    **{"num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 4, "num_hidden_layers": 4},
    **{"layerdrop": 0.0, "mask_time_prob": 0.0, "ctc_loss_reduction": "mean"},
}

Inputs = Callable[[torch.Generator], dict[str, Tensor]]


def _random(name: str, *shape: int, labels: tuple[int, ...] = (2,), below: int = 2, least: int = 0) -> Inputs:
    """A random tensor under a name, and labels."""

    def inputs(random: torch.Generator) -> dict[str, Tensor]:
        given = torch.randn(*shape, generator=random)
        return {name: given, "labels": torch.randint(least, below, labels, generator=random)}

    return inputs


def _text(random: torch.Generator) -> dict[str, Tensor]:
    ids = torch.randint(3, 99, (2, 12), generator=random)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _lm(random: torch.Generator) -> dict[str, Tensor]:
    batch = _text(random)
    return {**batch, "labels": batch["input_ids"].clone()}


def _translation(random: torch.Generator) -> dict[str, Tensor]:
    return {**_text(random), "labels": torch.randint(3, 99, (2, 7), generator=random)}


def _pairs(random: torch.Generator) -> dict[str, Any]:
    return {**_text(random), "pixel_values": torch.randn(2, 3, 32, 32, generator=random), "return_loss": True}


_image = _random("pixel_values", 2, 3, 32, 32)
_wave = _random("input_values", 2, 400, labels=(2, 3), below=32, least=3)
_spectrogram = _random("input_values", 2, 32, 16)
_speech = _random("input_features", 2, 16, 40, labels=(2, 7), below=99, least=3)


@dataclass(frozen=True)
class Architecture:
    """A class of transformers, the sizes that make it tiny, its inputs, and whether it generates."""

    model: str
    inputs: Inputs
    sizes: Mapping[str, Any] = field(default_factory=dict)
    generates: bool = False

    def build(self) -> nn.Module:
        cls = getattr(transformers, self.model)
        config_class = cls.config_class
        known = {**SIZES, **self.sizes}
        # A configuration may know a size by another name too, and refuse to have both set or one that it derives.
        other_names: Mapping[str, str] = config_class.attribute_map
        fields = config_class().to_dict().keys() | other_names.keys()
        general = {key for key in SIZES.keys() & fields if other_names.get(key, key) not in self.sizes}
        model: nn.Module = cls(config_class(**{key: known[key] for key in self.sizes.keys() | general}))
        return model


def _causal(model: str, **sizes: Any) -> Architecture:
    return Architecture(f"{model}ForCausalLM", _lm, sizes, generates=True)


def _seq2seq(model: str, sizes: Mapping[str, Any] = ENCODER_DECODER, **more: Any) -> Architecture:
    return Architecture(f"{model}ForConditionalGeneration", _translation, {**sizes, **more}, generates=True)


def _masked(model: str, **sizes: Any) -> Architecture:
    return Architecture(f"{model}ForMaskedLM", _lm, sizes)


def _images(model: str, **sizes: Any) -> Architecture:
    return Architecture(f"{model}ForImageClassification", _image, {"num_labels": 2, **sizes})


ARCHITECTURES: tuple[Architecture, ...] = (
    # decoders
    *(
        _causal(name)
        for name in (
            *("Llama", "Mistral", "Qwen2", "Qwen3", "Gemma", "Gemma2", "Phi", "StableLm", "Starcoder2", "Olmo"),
            *("Olmo2", "Cohere", "Granite", "GPTNeoX", "Helium", "Nemotron", "Persimmon"),
        )
    ),
    _causal("Phi3", resid_pdrop=0.0),
    _causal("OPT", ffn_dim=64, word_embed_proj_dim=32),
    _causal("Bloom", n_layer=2, n_head=4),
    _causal("XGLM", d_model=32, num_layers=2, attention_heads=4, ffn_dim=64),
    _causal("GPTNeo", num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]], window_size=8),
    Architecture("GPT2LMHeadModel", _lm, {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}, generates=True),
    _causal("GPTJ", n_embd=32, n_layer=2, n_head=4, n_positions=64, rotary_dim=4),
    _causal("CodeGen", n_embd=32, n_layer=2, n_head=4, n_positions=64, rotary_dim=4),
    _causal("BioGpt"),
    # mixtures of experts
    _causal("Mixtral", num_local_experts=4, num_experts_per_tok=2),
    _causal(
        "Qwen2Moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, shared_expert_intermediate_size=32
    ),
    _causal("Olmoe", num_experts=4, num_experts_per_tok=2),
    # encoders
    *(_masked(name) for name in ("Bert", "Roberta", "Electra", "XLMRoberta", "MPNet", "ConvBert", "DebertaV2")),
    _masked("DistilBert", dim=32, n_layers=2, n_heads=4, hidden_dim=64),
    _masked("Albert", embedding_size=32),
    _masked("MobileBert", hidden_size=64, embedding_size=32, intra_bottleneck_size=32),
    _masked("ModernBert", global_attn_every_n_layers=1),
    # sequence to sequence
    *(_seq2seq(name) for name in ("Bart", "MBart", "Pegasus", "M2M100", "BlenderbotSmall")),
    Architecture("MarianMTModel", _translation, ENCODER_DECODER, generates=True),
    _seq2seq("T5", T5),
    _seq2seq("MT5", T5),
    # vision
    *(_images(name, **IMAGE) for name in ("ViT", "DeiT", "Beit", "Dinov2")),
    _images("Swin", image_size=32, patch_size=2, embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=2),
    _images("ConvNext", depths=[1, 1, 1, 1], hidden_sizes=[8, 16, 32, 32], num_stages=4),
    _images(
        "Segformer", depths=[2, 2], hidden_sizes=[16, 32], num_encoder_blocks=2, num_attention_heads=[1, 2],
        sr_ratios=[1, 1], patch_sizes=[3, 3], strides=[4, 2], mlp_ratios=[4, 4],
    ),
    # audio
    Architecture("Wav2Vec2ForCTC", _wave, {**WAVE, "vocab_size": 32}),
    Architecture("HubertForCTC", _wave, {**WAVE, "vocab_size": 32}),
    Architecture(
        "ASTForAudioClassification", _spectrogram,
        {"num_labels": 2, "patch_size": 8, "frequency_stride": 8, "time_stride": 8, "max_length": 32,
         "num_mel_bins": 16},
    ),
    Architecture(
        "WhisperForConditionalGeneration", _speech,
        {**ENCODER_DECODER, "num_mel_bins": 16, "max_source_positions": 20, "max_target_positions": 32,
         "suppress_tokens": None, "begin_suppress_tokens": None},
        generates=True,
    ),
    # two towers
    Architecture(
        "CLIPModel", _pairs,
        {"projection_dim": 16, "text_config": {**TOWER, "vocab_size": 99, "num_hidden_layers": 2},
         "vision_config": {**TOWER, **IMAGE}},
    ),
)  # fmt: skip


HERE = [architecture for architecture in ARCHITECTURES if hasattr(transformers, architecture.model)]
# What lies mostly in weights that are listed as staying dense, and the reason that says so.
BELOW = {f"{name}ForCausalLM": f"stacked weights of {name}Experts" for name in ("Mixtral", "Qwen2Moe", "Olmoe")}
# Not eligible: embeddings, tied parameters and output heads stay dense by design.
BY_DESIGN = ("embedding", "tied parameter", "output head")


def _numbers(model: Any, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        output = model(**batch)
    logits = getattr(output, "logits", None)
    numbers: Tensor = output.logits_per_image if logits is None else logits
    return numbers


@pytest.mark.parametrize("architecture", HERE, ids=lambda architecture: architecture.model)
def test_an_architecture_lives_a_sparse_life(architecture: Architecture, tmp_path: Path) -> None:
    """Sparsified, trained, generating, saved, and loaded with the stock class, which gives the same logits."""
    torch.manual_seed(0)
    batch = architecture.inputs(torch.Generator().manual_seed(1))
    rates = {"lr": 1e-3}
    run = Run(
        architecture.build().train(), "gmp", torch.optim.AdamW, lambda model: model(**batch).loss,
        groups=rates, sparsity=0.5, total_steps=3,
    ).train(3)  # fmt: skip
    assert torch.stack(run.losses).isfinite().all()
    model: Any = run.model.eval()
    if architecture.generates:
        prompt = {key: value for key, value in batch.items() if key != "labels"}
        model.generate(**prompt, max_new_tokens=3, do_sample=False)
    layers = run.sparsifier.layers.values()
    covered = sum(layer.weight.numel() for layer in layers)
    assert abs(sum(int((layer.effective_weight() == 0).sum()) for layer in layers) / covered - 0.5) < 0.01
    reasons: Counter[str] = Counter()
    for skip in run.sparsifier.skipped:
        if skip.reason not in BY_DESIGN:
            reasons[skip.reason] += skip.numel
    if architecture.model in BELOW:
        assert BELOW[architecture.model] in reasons
    else:
        assert covered >= 0.8 * (covered + reasons.total()), dict(reasons)
    ours, finalized = _numbers(model, batch), run.sparsifier.finalize()
    assert not any(type(module).__name__.startswith("Sparse") for module in finalized.modules())
    finalized.save_pretrained(tmp_path)
    assert torch.equal(_numbers(type(finalized).from_pretrained(tmp_path).eval(), batch), ours)


def test_the_sweep_is_as_broad_as_promised() -> None:
    assert len(HERE) >= 40 and len([each for each in HERE if each.model not in BELOW]) >= 35
