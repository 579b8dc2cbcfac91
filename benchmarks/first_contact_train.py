"""The step of `first_contact.py` that trains transformer-big: dense, AutoSparse, and AutoSparse cached and deferred.

A training step is forward, loss with label smoothing, backward, fused AdamW and the Sparsifier's hooks, under bf16
autocast, on 64 x 128 source and as many target tokens. The layers of encoder and decoder are compiled, one by one: all
of a kind are one compilation, so that a minute does for every variant. The products are dense: the ratio says what
unstructured sparsity costs (1 would be free).

    dense       the stock model
    autosparse  Ŵ and the multiplier in every layer
    cached      Ŵ written once a step, gradients multiplied once a step, all layers in one launch

Gate: the gradients with which the optimizer steps, of all parameters and of the batch that is timed, by relative RMS
against the same variant in float64 and plain PyTorch, a part of the batch at a time. What bf16 activations do to them
in twelve layers is measured, not derived: the bound is 1.5 times what they do to the dense model's.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tritonsparse as ts
from tritonsparse.train.text.translation_presets import build_model

sys.path.append(str(Path(__file__).parent))  # PYTHONSAFEPATH keeps a script's own folder off it
from first_contact_child import Context
from first_contact_steps import Trained, Variant, compile_layers, run_variants
from first_contact_timing import device

ALPHA, LOGIT = 0.4, -4.0


@dataclass(frozen=True)
class Size:
    """What is trained, and on what."""

    preset: str
    vocabulary: int
    sentences: int
    parts: int
    length: int


BIG, TINY = Size("transformer-big", 32_768, 64, 4, 128), Size("transformer-tiny", 64, 4, 2, 8)


@dataclass(frozen=True)
class Vocabulary:
    """What `build_model` asks of a tokenizer."""

    size: int
    pad_token_id: int = 0
    eos_token_id: int = 1

    def __len__(self) -> int:
        return self.size


def _batches(size: Size, parts: int) -> list[dict[str, Tensor]]:
    random = torch.Generator().manual_seed(0)
    ids = torch.randint(3, size.vocabulary, (3, size.sentences, size.length), generator=random).to(device())
    names = ("input_ids", "decoder_input_ids", "labels")
    return [
        {"attention_mask": torch.ones_like(part[0]), **dict(zip(names, part, strict=True))}
        for part in ids.chunk(parts, dim=1)
    ]


def build(size: Size, name: str, exact: bool, smoke: bool) -> Trained:
    """A variant ready to train; in float64 and plain PyTorch if `exact`."""
    torch.manual_seed(0)
    vocabulary: Any = Vocabulary(size.vocabulary)
    # Dropout 0, so that every variant computes the same.
    model: nn.Module = build_model(size.preset, vocabulary, dropout=0.0).to(device())
    model = model.double() if exact else model
    sparsifier = None
    groups: Any = model.parameters()
    if name != "dense":
        method = ts.methods.AutoSparse(threshold_init=LOGIT, alpha=ALPHA, alpha_schedule="constant")
        sparsifier = ts.sparsify(model, method, backend="torch" if exact else "auto")
        groups = sparsifier.param_groups(lr=1e-4)
    # The exact model does not learn: no moments.
    optimizer = torch.optim.SGD(groups, lr=0.0) if exact else torch.optim.AdamW(groups, lr=1e-4, fused=True)
    if sparsifier is not None:
        cached = {"cache_dtype": torch.bfloat16, "defer": True} if name == "cached" and not exact else {}
        sparsifier.attach(optimizer, **cached)

    def loss(batch: dict[str, Tensor]) -> Callable[[], Tensor]:
        labels = batch.pop("labels").flatten()

        def forward() -> Tensor:
            with torch.autocast(device(), torch.bfloat16, enabled=not exact):
                logits = model(**batch, use_cache=False).logits
            logits = logits if exact else logits.float()
            return F.cross_entropy(logits.flatten(0, 1), labels, label_smoothing=0.1)

        return forward

    if not exact:
        inner: Any = model
        compile_layers([*inner.model.encoder.layers, *inner.model.decoder.layers], smoke)
    losses = [loss(batch) for batch in _batches(size, size.parts if exact else 1)]
    return Trained(model, losses, optimizer, sparsifier)


def variants(smoke: bool) -> Iterator[Variant]:
    size = TINY if smoke else BIG
    for name, target in (("dense", ""), ("autosparse", "T16"), ("cached", "T16")):
        ratios = () if name == "dense" else ((f"{size.preset}, {name}: training step / dense", target, 1.0),)
        facts = {"model": size.preset, "tokens": size.sentences * size.length}

        def make(exact: bool, name: str = name) -> Trained:
            return build(size, name, exact, smoke)

        yield Variant(name, make, facts, ratios)


def run(context: Context) -> None:
    run_variants(context, list(variants(context.smoke)), seconds=35)
