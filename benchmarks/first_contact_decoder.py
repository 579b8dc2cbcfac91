"""The step of `first_contact.py` that trains a decoder of 1.1e9 weights: dense, and with 90 % of its blocks pruned.

A Llama of 22 layers (hidden 2048, MLP 5632), all linear layers of its attention and MLP sparse in blocks of 128, masks
that stay (`static`), embeddings and head dense; bf16 autocast over float32 masters, fused AdamW, 8 sequences of 2,048
tokens (4 on a card of 80 GB). The layers are compiled, one by one, as all are one compilation.

    dense       the stock model
    blocks      forward, dX and dW skip what is pruned; products read a bf16 copy that is written once a step
    no copy     the same from the float32 masters
    default     the same as if nothing is said: a compiled forward casts its weight first

Gate: as that of the training step; float64 takes a sequence at a time and recomputes its activations.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import tritonsparse as ts

sys.path.append(str(Path(__file__).parent))  # PYTHONSAFEPATH keeps a script's own folder off it
from bench_block_step import BILLION, TINY
from first_contact_child import Context
from first_contact_steps import Trained, Variant, compile_layers, run_variants
from first_contact_timing import backend, device

SPARSITY = 0.9


def build(name: str, exact: bool, smoke: bool) -> Trained:
    """A variant ready to train; in float64 and plain PyTorch if `exact`."""
    config, block = (TINY | {"num_hidden_layers": 2}, 16) if smoke else (BILLION, 128)
    sequences, length = (2, 8) if smoke else (_sequences(), 2048)
    torch.manual_seed(0)
    with torch.device(device()):
        model = LlamaForCausalLM(LlamaConfig(**config, attn_implementation="sdpa"))
    model = model.double() if exact else model
    sparsifier = None
    groups: Any = model.parameters()
    if name != "dense":
        method = ts.methods.Static(sparsity=0.5 if smoke else SPARSITY, distribution="uniform")
        skips = backend() == "triton" and not exact
        sparsifier = ts.sparsify(
            model, method, pattern=f"block:{block}", backend="block" if skips else "torch", total_steps=10_000
        )
        groups = sparsifier.param_groups(lr=1e-5)
    # The exact model does not learn: no moments.
    optimizer = torch.optim.SGD(groups, lr=0.0) if exact else torch.optim.AdamW(groups, lr=1e-5, fused=True)
    if sparsifier is not None:
        sparsifier.attach(optimizer, **_copies(name, exact))
        for layer in sparsifier.layers.values():
            layer.casts_first = name != "no copy"

    def loss(ids: Tensor) -> Callable[[], Tensor]:
        def forward() -> Tensor:
            with torch.autocast(device(), torch.bfloat16, enabled=not exact):
                logits = model(input_ids=ids, use_cache=False).logits
            logits = logits[:, :-1] if exact else logits[:, :-1].float()
            return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())

        return forward

    if exact:
        # The name that transformers 5.24 gives it, and the one before.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable()
        model.train()
    else:
        compile_layers(list(model.model.layers), smoke)
    random = torch.Generator().manual_seed(0)
    ids = torch.randint(3, config["vocab_size"], (sequences, length), generator=random).to(device())
    losses = [loss(part) for part in (ids.split(1) if exact else [ids])]
    return Trained(model, losses, optimizer, sparsifier)


def _sequences() -> int:
    """Eight, or on a card of 80 GB four: the dense model and ours are timed in turn and stay."""
    total = torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else 0
    return 8 if total > 100 * 2**30 else 4


def _copies(name: str, exact: bool) -> dict[str, Any]:
    """How `attach` is told of the bf16 copies."""
    copies: dict[str, dict[str, Any]] = {"blocks": {"cache_dtype": torch.bfloat16}, "no copy": {"cache_dtype": None}}
    return {} if exact else copies.get(name, {})


def variants(smoke: bool) -> Iterator[Variant]:
    for name, target in (("dense", ""), ("blocks", "T24"), ("no copy", ""), ("default", "T24")):
        ratios = (
            ()
            if name == "dense"
            else ((f"decoder, 90 % of blocks of 128, {name}: training step / dense", target, 1.0),)
        )

        def make(exact: bool, name: str = name) -> Trained:
            return build(name, exact, smoke)

        yield Variant(name, make, {"model": "tiny" if smoke else "1.1e9"}, ratios)


def run(context: Context) -> None:
    run_variants(context, list(variants(context.smoke)), seconds=45)
