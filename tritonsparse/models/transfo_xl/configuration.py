"""Configuration of Transformer-XL, under the names of the class that transformers had until 4.57."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from transformers import PretrainedConfig

__all__ = ["TransfoXLConfig"]


class TransfoXLConfig(PretrainedConfig):
    """Sizes and rules of a Transformer-XL; the defaults are those of the released WikiText-103 model.

    vocab_size, cutoffs: types, and the ids at which a new cluster of rarer types begins.
    d_model, n_layer, n_head, d_head, d_inner: widths, of layers, heads, one head, the feed-forward layer.
    d_embed, div_val: width of the first cluster's embeddings; each next one is `div_val` times narrower.
    mem_len: longest memory, in tokens. clamp_len: distances beyond it count as it; 0 or less: none do.
    same_length: every position attends to as many tokens.
    same_length_rule: "hf" (mask klen - mem_len) or "nvidia" (klen - mem_len - 1, one more visible token).
    first_memory: "empty", or "zeros": `mem_len` attended zeros, as transformers' class did.
    tie_projs: per cluster, whether softmax and embedding share the projection; None: all but the first.
    untie_r: biases r_w and r_r per layer; False: one pair for all layers.
    pre_lnorm: norm before attention and feed-forward instead of after.
    init_std, proj_init_std: deviations of normal initialisation, of weights and of adaptive projections.

    Raises:
        ValueError: cutoffs do not rise below vocab_size, or a size or rule is not one of those above.
    """

    model_type = "transfo-xl"
    keys_to_ignore_at_inference = ["mems"]  # noqa: RUF012 - transformers' own class attribute
    attribute_map = {  # noqa: RUF012 - likewise
        "n_token": "vocab_size",
        "hidden_size": "d_model",
        "num_attention_heads": "n_head",
        "num_hidden_layers": "n_layer",
    }

    def __init__(
        self,
        vocab_size: int = 267735,
        cutoffs: list[int] | None = None,
        d_model: int = 1024,
        d_embed: int = 1024,
        n_head: int = 16,
        d_head: int = 64,
        d_inner: int = 4096,
        div_val: int = 4,
        pre_lnorm: bool = False,
        n_layer: int = 18,
        mem_len: int = 1600,
        clamp_len: int = 1000,
        same_length: bool = True,
        same_length_rule: str = "hf",
        first_memory: str = "empty",
        tie_projs: list[bool] | None = None,
        dropout: float = 0.1,
        dropatt: float = 0.0,
        untie_r: bool = True,
        init_std: float = 0.02,
        proj_init_std: float = 0.01,
        layer_norm_epsilon: float = 1e-5,
        eos_token_id: int = 0,
        tie_word_embeddings: bool = True,
        **kwargs: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.cutoffs = [20000, 40000, 200000] if cutoffs is None else list(cutoffs)
        self.d_model, self.d_embed = d_model, d_embed
        self.n_head, self.d_head, self.d_inner = n_head, d_head, d_inner
        self.div_val, self.pre_lnorm, self.n_layer = div_val, pre_lnorm, n_layer
        self.mem_len, self.clamp_len = mem_len, clamp_len
        self.same_length, self.same_length_rule = same_length, same_length_rule
        self.first_memory = first_memory
        # The released configuration names it by this argument of its class.
        shared = kwargs.pop("proj_share_all_but_first", True)
        self.tie_projs = [False] + [shared] * len(self.cutoffs) if tie_projs is None else list(tie_projs)
        self.dropout, self.dropatt, self.untie_r = dropout, dropatt, untie_r
        self.init_std, self.proj_init_std = init_std, proj_init_std
        self.layer_norm_epsilon = layer_norm_epsilon
        # Only `attn_type` 0 was ever implemented for PyTorch; the others are of unused code paths.
        for unused in ("attn_type", "sample_softmax", "adaptive", "init", "init_range", "max_position_embeddings"):
            kwargs.pop(unused, None)
        # transformers 5 gives a configuration of ours no tie_word_embeddings, and without it ties nothing.
        kwargs |= {"eos_token_id": eos_token_id, "tie_word_embeddings": tie_word_embeddings}
        super().__init__(**kwargs)
        self._refuse_unfit()

    def _refuse_unfit(self) -> None:
        def refuse(expected: str, got: object, remedy: str) -> None:
            raise ValueError(f"TransfoXLConfig: expected {expected}, got {got}; {remedy}")

        edges = [0, *self.cutoffs, self.vocab_size]
        if any(low >= high for low, high in pairwise(edges)):
            refuse(f"cutoffs that rise strictly below vocab_size = {self.vocab_size}", self.cutoffs, "correct them")
        if len(self.tie_projs) != len(self.cutoffs) + 1:
            refuse(f"{len(self.cutoffs) + 1} values of tie_projs, one a cluster", self.tie_projs, "correct them")
        if self.div_val < 1 or self.d_embed // self.div_val ** len(self.cutoffs) < 1:
            refuse(
                f"d_embed = {self.d_embed} to leave the last cluster a width",
                f"div_val {self.div_val}",
                "lower div_val",
            )
        if self.same_length_rule not in ("hf", "nvidia"):
            refuse('same_length_rule "hf" or "nvidia"', repr(self.same_length_rule), "choose one")
        if self.first_memory not in ("empty", "zeros"):
            refuse('first_memory "empty" or "zeros"', repr(self.first_memory), "choose one")
        if self.mem_len < 0:
            refuse("mem_len of at least 0", self.mem_len, "0 keeps no memory")
        if self.d_model % 2:
            refuse("an even d_model, half sines and half cosines", self.d_model, "correct it")

    @property
    def max_position_embeddings(self) -> int:
        """-1: distances are relative, so there is no longest sequence."""
        return -1

    @max_position_embeddings.setter
    def max_position_embeddings(self, value: int) -> None:
        raise AttributeError("TransfoXLConfig: expected no max_position_embeddings; distances are relative")
