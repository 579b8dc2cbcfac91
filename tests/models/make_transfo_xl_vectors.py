"""Makes transfo_xl_vectors.npz by the Transformer-XL of transformers==4.35.2 (torch==2.13.0, numpy<2, sacremoses).

Parameters are small integers over 64 drawn from a generator by name, which the file can leave out; losses come
in the order of the targets, which transformers' own `losses` do not.
"""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch

CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "one width": {"div_val": 1, "d_embed": 32, "n_layer": 2},
    "four widths": {"div_val": 4, "d_embed": 64, "n_layer": 1, "same_length": False},
    "projected": {"div_val": 1, "d_embed": 16, "n_layer": 1, "pre_lnorm": True},
    "shared biases": {"div_val": 2, "d_embed": 32, "n_layer": 2, "untie_r": False},
}
SIZES: dict[str, Any] = {
    "vocab_size": 100, "cutoffs": [20, 50], "d_model": 32, "n_head": 4, "d_head": 8, "d_inner": 48, "mem_len": 16,
    "clamp_len": 12, "dropout": 0.0, "dropatt": 0.0,
}  # fmt: skip


def values(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The parameter `name`, the same wherever it is computed."""
    random = np.random.RandomState(zlib.crc32(name.encode()) % 2**31)
    noise = random.randint(-16, 17, size=shape).astype(np.float32) / 64
    return noise + (1 if name.endswith("layer_norm.weight") else 0)


@torch.no_grad()
def fill(model: torch.nn.Module) -> None:
    for name, parameter in model.named_parameters():
        parameter.copy_(torch.from_numpy(values(name, tuple(parameter.shape))))


def segments(length: int = 9) -> tuple[torch.Tensor, torch.Tensor]:
    """Three segments of ids and the ids that follow them, [3, 2, length] each."""
    stream = torch.from_numpy(np.random.RandomState(5).randint(0, 100, size=(2, 3 * length + 1))).long()
    inputs, targets = (each.view(2, 3, length).transpose(0, 1).contiguous() for each in (stream[:, :-1], stream[:, 1:]))
    return inputs, targets


def main() -> None:
    from transformers import TransfoXLConfig, TransfoXLLMHeadModel

    arrays: dict[str, np.ndarray] = {}
    for title, changes in CONFIGURATIONS.items():
        model = TransfoXLLMHeadModel(TransfoXLConfig(**{"same_length": True, **SIZES, **changes})).eval()
        fill(model)
        mems, total = None, 0.0
        for step, (ids, targets) in enumerate(zip(*segments(), strict=True)):
            outputs = model(ids, mems=mems)
            mems, logp = outputs.mems, outputs.prediction_scores
            losses = -logp.gather(-1, targets[..., None]).squeeze(-1)
            total = total + losses.mean()
            arrays[f"{title}/losses/{step}"] = losses.detach().numpy()
            arrays[f"{title}/logits/{step}"] = logp[:, -1].detach().numpy()
        for layer, memory in enumerate(mems):
            arrays[f"{title}/mems/{layer}"] = memory.detach().numpy()
        total.backward()
        for name, parameter in model.named_parameters():
            # A projection of each gradient, and its norm: the whole of it would make a large file.
            grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            probe = torch.from_numpy(values(f"probe {name}", tuple(grad.shape)))
            arrays[f"{title}/grads/{name}"] = np.array([float((grad * probe).sum()), float(grad.norm())])
    np.savez_compressed(Path(__file__).with_name("transfo_xl_vectors.npz"), **arrays)


if __name__ == "__main__":
    main()
