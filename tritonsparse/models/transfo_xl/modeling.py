"""Transformer-XL: segments of text whose attention reaches into the memory of the segments before.

    memory    layer l keeps the last mem_len of its inputs, detached: [mem, B, d]
    scores    A_ij = (q_i + r_w) k_j + (q_i + r_r) r_{i-j}      r: sinusoids of the distance, through r_net
    p         softmax(A / sqrt(d_head)) over memory and the positions up to i

Dai et al., arXiv:1901.02860, section 3.3. Names, and so checkpoints, are those of the class transformers had
until 4.57. The position term is shifted into place once a layer and enters
`scaled_dot_product_attention` as its bias.
"""
# B: batch, T: tokens of the segment, M: tokens of memory, d: d_model, H: heads

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel, initialization
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils.generic import ModelOutput

from .adaptive import AdaptiveEmbedding, AdaptiveLogSoftmax
from .configuration import TransfoXLConfig

__all__ = ["TransfoXLLMHeadModel", "TransfoXLLMOutput", "TransfoXLModel", "TransfoXLOutput"]

IGNORED = -100


@dataclass
class TransfoXLOutput(ModelOutput):
    """last_hidden_state [B, T, d]; mems: per layer [M, B, d]; hidden_states and attentions where asked for."""

    last_hidden_state: Tensor | None = None
    mems: list[Tensor] | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass
class TransfoXLLMOutput(ModelOutput):
    """loss: mean over counted targets; losses [B, T] in order, 0 where ignored; logits: log p [B, T, V]."""

    loss: Tensor | None = None
    losses: Tensor | None = None
    logits: Tensor | None = None
    mems: list[Tensor] | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


def sinusoids(length: int, config: TransfoXLConfig, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Positions [length, d]: sines, then cosines, of the distances length-1 .. 0, clamped at clamp_len."""
    # In float32 whatever the model's dtype: bfloat16 does not tell 999 from 1000.
    distance = torch.arange(length - 1, -1, -1, device=device, dtype=torch.float32)
    if config.clamp_len > 0:
        distance = distance.clamp(max=config.clamp_len)
    halves = torch.arange(0, config.d_model, 2, device=device, dtype=torch.float32)
    angles = distance[:, None] / (10000 ** (halves / config.d_model))
    return torch.cat([angles.sin(), angles.cos()], dim=-1).to(dtype)


def visible(queries: int, memory: int, config: TransfoXLConfig, device: torch.device) -> Tensor:
    """Which of memory and segment each position sees: bool [T, M + T], True = attended."""
    row = torch.arange(queries, device=device)[:, None]
    column = torch.arange(memory + queries, device=device)
    causal = column <= row + memory
    if not config.same_length:
        return causal
    beyond = memory + queries - config.mem_len - (config.same_length_rule == "nvidia")
    # Position i forgets as many of the oldest keys as it has new ones, once there are more than mem_len.
    first = row - (queries - beyond if beyond > 0 else queries)
    return causal & (column > first)


def relative_shift(scores: Tensor) -> Tensor:
    """[B, H, T, K] by distance from the last key -> by key: row i moves T-1-i to the left; what wraps is masked."""
    batch, heads, queries, keys = scores.shape
    padded = F.pad(scores, (1, 0)).view(batch, heads, keys + 1, queries)
    return padded[:, :, 1:].reshape(batch, heads, queries, keys)


class RelativeAttention(nn.Module):
    """Multi-head attention over memory and segment, with residual and norm."""

    def __init__(self, config: TransfoXLConfig) -> None:
        super().__init__()
        self.n_head, self.d_head, self.pre_lnorm = config.n_head, config.d_head, config.pre_lnorm
        inner = config.n_head * config.d_head
        self.qkv_net = nn.Linear(config.d_model, 3 * inner, bias=False)
        self.r_net = nn.Linear(config.d_model, inner, bias=False)
        self.o_net = nn.Linear(inner, config.d_model, bias=False)
        self.drop = nn.Dropout(config.dropout)
        self.dropatt = config.dropatt
        self.layer_norm = nn.LayerNorm(config.d_model, eps=config.layer_norm_epsilon)
        if config.untie_r:
            self.r_w_bias = nn.Parameter(torch.empty(config.n_head, config.d_head))
            self.r_r_bias = nn.Parameter(torch.empty(config.n_head, config.d_head))

    def forward(
        self,
        x: Tensor,
        memory: Tensor,
        positions: Tensor,
        seen: Tensor,
        biases: tuple[Tensor, Tensor] | None,
        weights: bool,
    ) -> tuple[Tensor, Tensor | None]:
        r_w, r_r = (self.r_w_bias, self.r_r_bias) if biases is None else biases
        queries = x.shape[1]
        keys_input = torch.cat([memory, x], dim=1)
        if self.pre_lnorm:
            keys_input = self.layer_norm(keys_input)
        q, k, v = self.qkv_net(keys_input).chunk(3, dim=-1)
        q, k, v = (self._heads(each) for each in (q[:, -queries:], k, v))
        r = self._heads(self.r_net(positions)[None])
        scale = self.d_head**-0.5
        # [B, H, T, K]: the position term, and -inf where a key is not seen.
        bias = relative_shift((q + r_r[:, None].to(q.dtype)) @ r.transpose(-1, -2)) * scale
        bias = bias.masked_fill(~seen, float("-inf"))
        content = q + r_w[:, None].to(q.dtype)
        probabilities = None
        if weights:
            probabilities = (content @ k.transpose(-1, -2) * scale + bias).float().softmax(-1).to(v.dtype)
            mixed = F.dropout(probabilities, self.dropatt, self.training) @ v
        else:
            dropout = self.dropatt if self.training else 0.0
            mixed = F.scaled_dot_product_attention(
                content, k, v, attn_mask=bias.to(v.dtype), dropout_p=dropout, scale=scale
            )
        out = x + self.drop(self.o_net(mixed.transpose(1, 2).flatten(2)))
        return (out if self.pre_lnorm else self.layer_norm(out)), probabilities

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.n_head, self.d_head)).transpose(1, 2)


class PositionwiseFF(nn.Module):
    """Two linear layers around a ReLU, with residual and norm."""

    def __init__(self, config: TransfoXLConfig) -> None:
        super().__init__()
        self.pre_lnorm = config.pre_lnorm
        self.CoreNet = nn.Sequential(
            nn.Linear(config.d_model, config.d_inner),
            nn.ReLU(),
            nn.Dropout(config.dropout),
            nn.Linear(config.d_inner, config.d_model),
            nn.Dropout(config.dropout),
        )
        self.layer_norm = nn.LayerNorm(config.d_model, eps=config.layer_norm_epsilon)

    def forward(self, x: Tensor) -> Tensor:
        if self.pre_lnorm:
            return x + self.CoreNet(self.layer_norm(x))
        result: Tensor = self.layer_norm(x + self.CoreNet(x))
        return result


class TransfoXLLayer(GradientCheckpointingLayer):
    """Attention, then feed-forward."""

    def __init__(self, config: TransfoXLConfig) -> None:
        super().__init__()
        self.dec_attn = RelativeAttention(config)
        self.pos_ff = PositionwiseFF(config)

    def forward(
        self,
        x: Tensor,
        memory: Tensor,
        positions: Tensor,
        seen: Tensor,
        biases: tuple[Tensor, Tensor] | None,
        weights: bool,
    ) -> tuple[Tensor, Tensor | None]:
        attended, probabilities = self.dec_attn(x, memory, positions, seen, biases, weights)
        return self.pos_ff(attended), probabilities


class TransfoXLPreTrainedModel(PreTrainedModel):
    """Initialisation, and what transformers asks of a model."""

    config: TransfoXLConfig
    config_class = TransfoXLConfig
    base_model_prefix = "transformer"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _no_split_modules = ["TransfoXLLayer"]  # noqa: RUF012 - transformers' own class attribute
    _supports_sdpa = True
    # Sinusoids, which older checkpoints saved.
    _keys_to_ignore_on_load_unexpected = [r"pos_emb\.inv_freq"]  # noqa: RUF012 - likewise

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        std, proj_std = self.config.init_std, self.config.proj_init_std
        if isinstance(module, nn.Linear | nn.Embedding):
            initialization.normal_(module.weight, 0.0, std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                initialization.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            initialization.normal_(module.weight, 1.0, std)
            initialization.zeros_(module.bias)
        elif isinstance(module, nn.ParameterList):
            for parameter in module:
                initialization.normal_(parameter, 0.0, proj_std)
        for name, parameter in module.named_parameters(recurse=False):
            if name in ("r_w_bias", "r_r_bias", "cluster_weight"):
                initialization.normal_(parameter, 0.0, std)
            elif name == "cluster_bias":
                initialization.zeros_(parameter)


class TransfoXLModel(TransfoXLPreTrainedModel):
    """ids [B, T] and memory -> hidden states [B, T, d] and the new memory."""

    def __init__(self, config: TransfoXLConfig) -> None:
        super().__init__(config)
        self.word_emb = AdaptiveEmbedding(config)
        self.drop = nn.Dropout(config.dropout)
        if not config.untie_r:
            self.r_w_bias = nn.Parameter(torch.empty(config.n_head, config.d_head))
            self.r_r_bias = nn.Parameter(torch.empty(config.n_head, config.d_head))
        self.layers = nn.ModuleList(TransfoXLLayer(config) for _ in range(config.n_layer))
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.word_emb

    def init_mems(self, batch: int) -> list[Tensor]:
        """The memory before the first segment, per layer [M, batch, d]: empty, or zeros where the config says so."""
        length = self.config.mem_len if self.config.first_memory == "zeros" else 0
        parameter = next(self.parameters())
        shape = (length, batch, self.config.d_model)
        return [parameter.new_zeros(shape) for _ in range(self.config.n_layer)]

    def forward(
        self,
        input_ids: Tensor | None = None,
        mems: list[Tensor] | None = None,
        inputs_embeds: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> TransfoXLOutput | tuple[Any, ...]:
        """One segment.

        Args:
            input_ids: [B, T], int64; or inputs_embeds: [B, T, d].
            mems: what the segment before returned; None before the first one.
            output_attentions, output_hidden_states: return them too, [B, H, T, M + T] and [B, T, d] a layer.

        Raises:
            ValueError: neither or both inputs, or a memory of another batch, width or number of layers.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError(
                "TransfoXLModel: expected one of input_ids and inputs_embeds, got both or neither; pass one"
            )
        x = self.word_emb(input_ids) if inputs_embeds is None else inputs_embeds
        batch, queries, _ = x.shape
        if mems is None:
            mems = self.init_mems(batch)
        self._check(mems, batch)
        memory = mems[0].shape[0]
        positions = self.drop(sinusoids(memory + queries, self.config, x.device, x.dtype))
        seen = visible(queries, memory, self.config, x.device)
        biases = None if self.config.untie_r else (self.r_w_bias, self.r_r_bias)
        x = self.drop(x)
        inputs, attentions = [], []
        for layer, past in zip(self.layers, mems, strict=True):
            inputs.append(x)
            x, probabilities = layer(
                x, past.transpose(0, 1).to(x.dtype), positions, seen, biases, bool(output_attentions)
            )
            attentions.append(probabilities)
        x = self.drop(x)
        output = TransfoXLOutput(
            last_hidden_state=x,
            mems=[self._remember(past, each) for past, each in zip(mems, inputs, strict=True)],
            hidden_states=(*inputs, x) if output_hidden_states else None,
            attentions=tuple(attentions) if output_attentions else None,
        )
        return output.to_tuple() if return_dict is False else output

    @torch.no_grad()
    def _remember(self, past: Tensor, inputs: Tensor) -> Tensor:
        together = torch.cat([past.to(inputs.dtype), inputs.detach().transpose(0, 1)])
        return together[max(0, together.shape[0] - self.config.mem_len) :]

    def _check(self, mems: list[Tensor], batch: int) -> None:
        found = [list(memory.shape) for memory in mems]
        length = found[0][0] if found and found[0] else 0
        expected = [[length, batch, self.config.d_model]] * self.config.n_layer
        if found != expected:
            raise ValueError(
                f"TransfoXLModel: expected mems of {self.config.n_layer} layers, each [M, {batch}, "
                f"{self.config.d_model}], got {found}; pass what the segment before returned, or None for a new batch"
            )
        if length > max(self.config.mem_len, 0):
            raise ValueError(
                f"TransfoXLModel: expected a memory of at most mem_len = {self.config.mem_len} tokens, got {length}; "
                f"cut it or raise config.mem_len"
            )


class TransfoXLLMHeadModel(TransfoXLPreTrainedModel, GenerationMixin):
    """The language model: adaptive softmax over TransfoXLModel, its weights the embeddings' own."""

    def __init__(self, config: TransfoXLConfig) -> None:
        super().__init__(config)
        self.transformer = TransfoXLModel(config)
        self.crit = AdaptiveLogSoftmax(config)
        self._tied_weights_keys = self._ties(config)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.crit

    def forward(
        self,
        input_ids: Tensor | None = None,
        mems: list[Tensor] | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        target_ids: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> TransfoXLLMOutput | tuple[Any, ...]:
        """One segment, with the loss where targets are given and log-probabilities of all types where not.

        Args:
            input_ids, mems, inputs_embeds, output_attentions, output_hidden_states: as TransfoXLModel takes them.
            target_ids: [B, T], the id that follows each input; T losses a segment.
            labels: [B, T], usually the input_ids; shifted here, T - 1 losses a segment. -100 is ignored in both.

        Raises:
            ValueError: both kinds of targets.
        """
        if labels is not None and target_ids is not None:
            raise ValueError("TransfoXLLMHeadModel: expected labels or target_ids, got both; pass one of them")
        outputs = self.transformer(
            input_ids,
            mems,
            inputs_embeds,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
        )
        hidden = outputs.last_hidden_state
        loss = losses = logits = None
        if labels is not None:
            target_ids, hidden = labels[:, 1:], hidden[:, :-1]
        if target_ids is None:
            logits = self.crit(hidden)
        else:
            losses = self.crit.nll(hidden, target_ids)
            loss = losses.sum() / (target_ids >= 0).sum()
        output = TransfoXLLMOutput(loss, losses, logits, outputs.mems, outputs.hidden_states, outputs.attentions)
        return output.to_tuple() if return_dict is False else output

    # The memory takes the place of a Cache; not every release of transformers types what it overrides.
    def prepare_inputs_for_generation(  # type: ignore[override, unused-ignore]
        self, input_ids: Tensor, mems: list[Tensor] | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """All ids before the first step; then the last one, as the memory holds the rest."""
        return {"input_ids": input_ids if mems is None else input_ids[:, -1:], "mems": mems}

    @staticmethod
    def _ties(config: TransfoXLConfig) -> dict[str, str]:
        """Name of each tied parameter of the softmax -> name of the embedding's parameter that it is."""
        layers = 1 if config.div_val == 1 else len(config.cutoffs) + 1
        keys = {f"crit.out_layers.{i}.weight": f"transformer.word_emb.emb_layers.{i}.weight" for i in range(layers)}
        for i, tie in enumerate(config.tie_projs):
            if tie and config.div_val != 1:
                keys[f"crit.out_projs.{i}"] = f"transformer.word_emb.emb_projs.{i}"
            elif tie and config.d_model != config.d_embed:
                keys[f"crit.out_projs.{i}"] = "transformer.word_emb.emb_projs.0"
        return keys

    @staticmethod
    def _reorder_cache(mems: list[Tensor], beam_idx: Tensor) -> list[Tensor]:
        return [memory.index_select(1, beam_idx.to(memory.device)) for memory in mems]

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        # The memory is the cache.
        return False
