"""Models of packed blocks: the same function as the finalized dense model, in a file and in memory of their own."""

from __future__ import annotations

import copy
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from small_runs import IDS, Build, assert_same
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, GPT2LMHeadModel, T5Config
from transformers import T5ForConditionalGeneration as T5
from transformers.pytorch_utils import Conv1D

import tritonsparse as ts
from tritonsparse.checkpoint.bsr import BLOCKS
from tritonsparse.layers.bsr import BlockConv2d, BlockLayer, BlockLinear


def mixed() -> nn.Sequential:
    """A linear layer, a Conv1D, a convolution of one pixel with a stride, and one of nine."""
    torch.manual_seed(0)
    convolutions = nn.Conv2d(16, 8, 1, stride=2), nn.Conv2d(8, 8, 3, padding=1)
    return nn.Sequential(nn.Linear(16, 24), Conv1D(64, 24), nn.Unflatten(1, (16, 2, 2)), *convolutions)


def sparse(model: nn.Module, sparsity: float = 0.75, pattern: str = "block:8") -> ts.Sparsifier:
    return ts.sparsify(model, "static", sparsity=sparsity, pattern=pattern)


def both(model: nn.Module) -> tuple[Any, Any]:
    """The model finalized as a dense one, and with packed blocks."""
    sparsifier = sparse(model)
    return copy.deepcopy(sparsifier).finalize().eval(), sparsifier.finalize(format="bsr").eval()


def block_layers(model: nn.Module) -> dict[str, BlockLayer]:
    return {name: module for name, module in model.named_modules() if isinstance(module, BlockLayer)}


def test_outputs_and_gradients_are_those_of_the_dense_model_eager_and_compiled_into_one_graph() -> None:
    dense, packed = both(mixed())
    classes = {"0": BlockLinear, "1": BlockLinear, "3": BlockConv2d}
    assert {name: type(layer) for name, layer in block_layers(packed).items()} == classes
    x, grad_y, found = torch.randn(5, 16), torch.randn(5, 8, 1, 1), []
    for model in (dense, packed, torch.compile(packed, backend="aot_eager", fullgraph=True)):
        given = x.clone().requires_grad_()
        packed.zero_grad()
        y = model(given)
        y.backward(grad_y)
        found.append([y.detach(), given.grad])
        for name, layer in block_layers(packed).items() if model is not dense else ():
            stock = dense.get_submodule(name)
            torch.testing.assert_close(layer.bias.grad, stock.bias.grad)
            # In the dense model pruned weights have gradients too.
            matrix = stock.weight.grad.t() if name == "1" else stock.weight.grad.flatten(1)
            kept = copy.deepcopy(layer)
            with torch.no_grad():
                kept.values.copy_(layer.values.grad)
                assert torch.allclose(kept.to_dense(), torch.where(kept.to_dense() != 0, matrix, 0.0), atol=1e-6), name
    torch.testing.assert_close(found[1:], found[:1] * 2)


def test_only_kept_blocks_are_held_and_the_dense_weight_is_there_when_asked_for(tmp_path: Path) -> None:
    dense, packed = both(mixed())
    linear = packed[0]
    # A quarter of 3 x 2 blocks, rounded half up, is 2.
    assert list(dict(linear.named_parameters())) == ["values", "bias"] and linear.values.shape == (2, 8, 8)
    assert linear.density() == pytest.approx(2 / 6) and linear.in_features == 16
    assert torch.equal(packed[1].to_dense(), dense[1].weight.t())
    assert all(torch.equal(packed[i].weight, dense[i].weight) for i in (0, 3))
    assert repr(linear) == "BlockLinear(16, 24, bias=True, blocks=2 of 8x8)"
    ts.save_bsr(packed, tmp_path)
    with safe_open(str(tmp_path / BLOCKS), framework="pt") as file:
        shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118 - no mapping
    assert shapes["0.values"] == [2, 8, 8] and "0.weight" not in shapes and shapes["4.weight"] == [8, 8, 3, 3]
    # Packed layers train and keep their topology.
    pruned, optimizer, losses = linear.to_dense() == 0, torch.optim.AdamW(packed.parameters(), lr=0.01), []
    for _ in range(5):
        losses.append(packed(torch.ones(4, 16)).square().mean())
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] and bool((linear.to_dense()[pruned] == 0).all())
    assert sum(value.numel() for value in optimizer.state[linear.values].values()) == 2 * 128 + 1


def test_what_stays_dense_is_logged_and_a_layer_of_nothing_or_of_zeros_is_packed(caplog: Any) -> None:
    sparsifier = sparse(mixed())
    sparsifier.layers["0"].mask.fill_(True)
    with caplog.at_level(logging.INFO):
        packed: Any = sparsifier.finalize(format="bsr", max_density=0.9)
    assert type(packed[0]) is nn.Linear and block_layers(packed).keys() == {"1", "3"}
    assert "2 layers packed, 2 stay dense (0: 100% of its blocks kept; 4: a convolution of more than" in caplog.text
    sparsifier = sparse(mixed())
    sparsifier.layers["0"].mask.zero_()
    with torch.no_grad():
        sparsifier.layers["1"].weight.zero_()
    kept, packed = int(sparsifier.layers["1"].mask.sum()) // 64, sparsifier.finalize(format="bsr")
    assert torch.equal(packed[0](torch.randn(3, 16)), packed[0].bias.expand(3, 24)) and packed[0].density() == 0.0
    assert len(packed[1].values) == kept > 0


REFUSED: list[tuple[dict[str, Any], dict[str, Any], list[str]]] = [
    ({}, {"format": "csr"}, ['expected format "dense" or "bsr", got \'csr\'']),
    ({"pattern": "unstructured"}, {}, ["expected a pattern of blocks", "got 'unstructured'; sparsify"]),
    ({}, {"max_density": 0.0}, ["max_density in (0, 1], got 0.0"]),
    ({}, {"max_density": 0.1}, ["at most 10% of its blocks kept", "0 has 33% of its blocks kept; raise"]),
    ({"sparsity": 0.0}, {}, ["0 has 100% of its blocks kept"]),
]


def test_what_cannot_be_packed_is_refused_and_autocast_multiplies_in_its_dtype(refused: Build) -> None:
    for options, finalized, words in REFUSED:
        model = mixed()
        sparsifier = sparse(model, **options)
        with refused(model, ValueError, *words):
            sparsifier.finalize(**{"format": "bsr", **finalized})
        assert sparsifier.sparsity() >= 0.0  # it lives on
    (_, packed), x = both(mixed()), torch.randn(5, 16)
    with torch.autocast("cpu", torch.bfloat16):
        y = packed[0](x)
    expected = nn.functional.linear(x.bfloat16(), packed[0].to_dense().bfloat16(), packed[0].bias.bfloat16())
    assert y.dtype == torch.bfloat16 and torch.equal(y, expected)
    assert packed.half()[0](x.half()).dtype == torch.float16 and packed[0].index.dtype == torch.int32


AUTO = [("gpt2", AutoModelForCausalLM), ("gpt2", GPT2LMHeadModel), ("marian", AutoModelForSeq2SeqLM)]


@pytest.mark.parametrize(("name", "auto"), AUTO)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_saved_model_loads_as_it_was(request: Any, tmp_path: Path, name: str, auto: Any, dtype: torch.dtype) -> None:
    dense, packed = both(request.getfixturevalue(name)().to(dtype))
    ts.save_bsr(packed, tmp_path / "saved")
    again = ts.load_bsr(tmp_path / "saved", auto)
    inputs = {"input_ids": IDS} | ({"decoder_input_ids": IDS} if name == "marian" else {})
    expected = packed(**inputs).logits
    assert torch.equal(again(**inputs).logits, expected) and not again.training
    torch.testing.assert_close(dense(**inputs).logits, expected)
    ours, theirs = again.state_dict(), packed.state_dict()
    assert {key: value.dtype for key, value in ours.items()} == {key: value.dtype for key, value in theirs.items()}
    assert_same(ours, theirs)
    # The table and the head that is tied to it are one tensor still.
    assert again.get_input_embeddings().weight is again.get_output_embeddings().weight
    assert sorted(path.name for path in tmp_path.iterdir()) == ["saved"]


def test_models_generate_the_tokens_of_the_dense_one_and_run_where_they_ask_for_weights(gpt2: Build) -> None:
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 1}
    assert torch.equal(*(model.generate(IDS, **options) for model in both(gpt2())))
    # T5 looks at the dtype of `wo.weight` in every forward.
    sizes = {"vocab_size": 32, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    models = both(T5(T5Config(**sizes, decoder_start_token_id=0)))
    torch.testing.assert_close(*(model(input_ids=IDS, decoder_input_ids=IDS).logits for model in models))


def test_any_module_is_saved_with_shared_layers_shared_and_what_does_not_fit_it_is_refused(
    tmp_path: Path, refused: Build, mlp: Build, gpt2: Build
) -> None:
    (shared, again), x = (nn.Linear(16, 16) for _ in range(2)), torch.randn(3, 16)
    packed = both(nn.Sequential(shared, nn.ReLU(), shared, nn.Linear(16, 8)))[1]
    assert isinstance(packed[2], BlockLinear) and packed[0] is packed[2]
    ts.save_bsr(packed, tmp_path)
    loaded: Any = ts.load_bsr(tmp_path, nn.Sequential(again, nn.ReLU(), again, nn.Linear(16, 8)))
    assert torch.equal(loaded(x), packed(x)) and loaded[0] is loaded[2]
    ts.save_bsr(both(mixed())[1], tmp_path)
    model, odd = mlp(), mixed()
    with refused(model, ValueError, "stock linear layer at '1', got ReLU", "build the model that was saved"):
        ts.load_bsr(tmp_path, model)
    odd[0] = nn.Linear(12, 24)
    with refused(odd, ValueError, "blocks of 8x8 to divide '0', got a weight of shape [24, 12]"):
        ts.load_bsr(tmp_path, odd)
    with pytest.raises(FileNotFoundError, match=rf"expected {BLOCKS} in .*from_pretrained"):
        ts.load_bsr(tmp_path / "elsewhere", mixed())
    with pytest.raises(ValueError, match="model with packed blocks, got none"):
        ts.save_bsr(mixed(), tmp_path)
    # Nor the dense way of saving while blocks are packed, nor does the folder look like an ordinary checkpoint.
    packed, folder = both(gpt2())[1], tmp_path / "gpt2"
    with pytest.raises(RuntimeError, match=r"from_pretrained would draw random weights; call tritonsparse.save_bsr"):
        packed.save_pretrained(folder)
    ts.save_bsr(packed, folder)
    with pytest.raises(RuntimeError, match=r"call tritonsparse.save_bsr"):
        ts.load_bsr(folder, AutoModelForCausalLM).save_pretrained(folder)
    with pytest.raises(OSError, match=r"no file named model.safetensors"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_an_edited_index_leads_no_product_out_of_its_tensors(tmp_path: Path) -> None:
    save = both(mixed())[1]
    ts.save_bsr(save, tmp_path)
    file = tmp_path / BLOCKS
    with safe_open(str(file), framework="pt") as opened:
        metadata, tensors = opened.metadata(), {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    model = mixed()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    for key in (key for key in tensors if key.endswith(".index")):
        for number in (-1, 1, 7, 1000, 2**31 - 1, -(2**31)):
            for place in torch.randint(len(tensors[key]), (20,), generator=generator).tolist():
                edited = tensors[key].clone()
                if int(edited[place]) == number:
                    continue
                edited[place] = number
                save_file(tensors | {key: edited}, file, metadata)
                with pytest.raises(ValueError, match=r"load_bsr: expected .* as save_bsr wrote it, got a damaged file"):
                    ts.load_bsr(tmp_path, model)
    head = json.loads(metadata["tritonsparse"])
    for change in (
        {"layers": {}}, {"layers": []}, {"layers": {"0": 3}}, {"layers": {"0": {"block": [8, 0], "count": 3}}},
        {"layers": {"0": {"block": [8, 8], "count": 1}}}, {"layers": head["layers"] | {"7": head["layers"]["0"]}},
    ):  # fmt: skip
        save_file(tensors, file, {"tritonsparse": json.dumps(head | change)})
        with pytest.raises(ValueError, match=r"load_bsr: expected .* got a damaged file"):
            ts.load_bsr(tmp_path, model)
    for key in ("0.values", "1.index"):
        save_file({name: tensor for name, tensor in tensors.items() if name != key}, file, metadata)
        with pytest.raises(ValueError, match=r"load_bsr: expected .* got a damaged file"):
            ts.load_bsr(tmp_path, model)
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(ValueError, match=r"load_bsr: expected .* got a damaged file"):
        ts.load_bsr(tmp_path, model)
    assert [type(module) for module in model] == [type(module) for module in mixed()]
    assert_same({**model.state_dict()}, before)
