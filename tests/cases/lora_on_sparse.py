"""LoRA over a live sparse model: what is saved loads, and a merge keeps the zeros and says what it dropped.

Corrected: the base under a loaded adapter is the saved one, for no adapter can prune a dense one. A merge that is cut
to the masks is what is right, and it is not silent: its outputs are those of PEFT, with the zeros put back.
"""

import sys
import tempfile
import warnings
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import tritonsparse as ts

ids, bad = torch.randint(64, (2, 8)), []


def base() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, num_key_value_heads=2, **sizes))


def out(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


def train(model: Any, optimizer: Any) -> None:
    model.train()
    for _ in range(4):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def config() -> LoraConfig:
    return LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)


for order in ("sparsify, then LoRA", "LoRA, then sparsify"):
    model = base() if order.startswith("sparsify") else get_peft_model(base(), config())
    sparsifier = ts.sparsify(model, ts.methods.Static(sparsity=0.7, criterion="magnitude"))
    adapted = get_peft_model(model, config()) if order.startswith("sparsify") else model
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.1)
    sparsifier.attach(optimizer)
    train(adapted, optimizer)
    want = out(adapted)
    with tempfile.TemporaryDirectory() as folder:
        sparsifier.save_pretrained(folder)
        back, info = LlamaForCausalLM.from_pretrained(folder, output_loading_info=True)
        got = out(PeftModel.from_pretrained(back, folder + "/adapters/default"))
        if info["missing_keys"] or info["unexpected_keys"] or not torch.equal(got, want):
            bad.append(f"{order}: what was saved does not load as it was")
        # PEFT's own merge into the loaded base, whose zeros are put back.
        loaded = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(folder), folder + "/adapters/default")
        plain = loaded.merge_and_unload()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        merged = adapted.merge_and_unload()
    with torch.no_grad():
        for name, layer in merged.named_modules():
            if isinstance(layer, torch.nn.Linear) and getattr(layer, "mask", None) is not None:
                plain.get_submodule(name).weight.mul_(layer.mask)
    if not torch.allclose(out(merged), out(plain), atol=1e-6):
        bad.append(f"{order}: the merge is not PEFT's, cut to the masks")
    if not any("were kept" in str(each.message) for each in said) or abs(sparsifier.sparsity() - 0.7) > 0.01:
        bad.append(f"{order}: the merge is silent, or lost zeros")
print("FAIL: " + "; ".join(bad) if bad else "PASS")
sys.exit(bool(bad))
