"""Checkpoints of the original PyTorch codes, renamed to ours.

transformers' own `transfo-xl-wt103` needs nothing but `from_pretrained`: names agree. kimiyoung/transformer-xl and
NVIDIA's DeepLearningExamples differ in three ways:

    no prefix `transformer.`; NVIDIA's softmax has `out_layers_weights.i` and `out_layers_biases.i`
    the column of cluster i is the i-th from the end of the head, ours the i-th of the extra ones
    r_w_bias and r_r_bias are shared by all layers (`untie_r=False`)
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from .configuration import TransfoXLConfig
from .modeling import TransfoXLLMHeadModel

__all__ = ["from_original", "rename"]

_IGNORED = re.compile(r"pos_emb\.inv_freq$")
_RENAMED = (
    (re.compile(r"^crit\.out_layers_weights\.(\d+)$"), r"crit.out_layers.\1.weight"),
    (re.compile(r"^crit\.out_layers_biases\.(\d+)$"), r"crit.out_layers.\1.bias"),
    (re.compile(r"^crit\.shared_out_projs\.(\d+)$"), r"crit.out_projs.\1"),
    (re.compile(r"^(word_emb|layers|r_w_bias|r_r_bias)"), r"transformer.\1"),
)
_CLUSTERS = ("crit.cluster_weight", "crit.cluster_bias")


def rename(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our names for an original state dict; a `module.` prefix of DDP is dropped, cluster columns are turned round."""
    result: dict[str, Tensor] = {}
    for name, tensor in state.items():
        name = name.removeprefix("module.")
        if _IGNORED.search(name):
            continue
        for pattern, replacement in _RENAMED:
            name = pattern.sub(replacement, name)
        result[name] = tensor.flip(0) if name in _CLUSTERS else tensor
    return result


def from_original(state: Mapping[str, Tensor], config: TransfoXLConfig) -> TransfoXLLMHeadModel:
    """A model with the weights of an original checkpoint.

    Args:
        state: its state dict (the value under "model" or "model_state" of its file).
        config: the sizes it was trained with.

    Raises:
        ValueError: tensors are missing, left over or of another shape; the first of them is named.
    """
    renamed = rename(state)
    with torch.device("meta"):
        expected = {name: tensor.shape for name, tensor in TransfoXLLMHeadModel(config).state_dict().items()}
    tied = set(TransfoXLLMHeadModel._ties(config))
    for name in sorted(expected.keys() | renamed.keys()):
        found, wanted = renamed.get(name), expected.get(name)
        if (found is None and name in tied) or (found is not None and found.shape == wanted):
            continue
        raise ValueError(
            f"from_original: expected {name} of shape {None if wanted is None else list(wanted)}, got "
            f"{'no such tensor' if found is None else list(found.shape)}; correct the sizes in the configuration"
        )
    model = TransfoXLLMHeadModel(config)
    model.load_state_dict(renamed, strict=False)
    model.tie_weights()
    return model
