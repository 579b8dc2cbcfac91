"""LayerDrop and frozen layers: every method trains on where a layer has no gradient in a step.

Corrected: a layer that is frozen before sparsify stays dense, with the reason, so it is no sparse layer whose sparsity
could be asked for; the public script looked it up among them.
"""

import sys
from typing import Any

import torch
from torch import nn
from transformers import BartConfig, BartForConditionalGeneration

import tritonsparse as ts

M = ts.methods
SIZES = {"d_model": 32, "encoder_layers": 3, "decoder_layers": 1, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
HEADS = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "decoder_start_token_id": 2}
METHODS = [
    *(cls(sparsity=0.8, update_every=3) for cls in (M.RigL, M.SET, M.SNFS, M.GMP, M.DSR, M.MEST)),
    *(
        M.OptG(sparsity=0.8),
        M.STR(sparsity=0.8),
        M.TopKAST(sparsity=0.8),
        M.SWAT(sparsity=0.8, distribution="momentum"),
    ),
]


def bart() -> Any:
    config = BartConfig(vocab_size=64, encoder_layerdrop=0.5, max_position_embeddings=32, **SIZES, **HEADS)
    return BartForConditionalGeneration(config)


def frozen() -> Any:
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 8))
    model[0].requires_grad_(False)
    return model


def translation(model: Any) -> Any:
    ids = torch.randint(3, 64, (2, 8))
    return model(input_ids=ids, labels=ids).loss


bad = []
for method in METHODS:
    for build, loss in ((bart, translation), (frozen, lambda model: model(torch.randn(4, 32)).pow(2).mean())):
        torch.manual_seed(0)
        model = build().train()
        before = [p.detach().clone() for p in model.parameters() if not p.requires_grad]
        sparsifier = ts.sparsify(model, method, total_steps=30, steps_per_epoch=5)
        optimizer = torch.optim.SGD(sparsifier.param_groups(lr=0.01), momentum=0.9)
        sparsifier.attach(optimizer)
        for _ in range(30):
            loss(model).backward()
            optimizer.step()
            optimizer.zero_grad()
        if abs(sparsifier.sparsity() - 0.8) > 0.06:
            bad.append(f"{method.name}: {sparsifier.sparsity():.2f}")
        if build is frozen and [(skip.name, skip.reason) for skip in sparsifier.skipped] != [("0", "frozen")]:
            bad.append(f"{method.name}: the frozen layer has no reason")
        if not all(map(torch.equal, before, [p for p in model.parameters() if not p.requires_grad])):
            bad.append(f"{method.name}: a frozen layer moved")
print(f"FAIL: {'; '.join(bad)}" if bad else "PASS")
sys.exit(bool(bad))
