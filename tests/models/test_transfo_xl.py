"""Transformer-XL: equal to the class that transformers had, and a good citizen of the transformers there are."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

import tritonsparse as ts
from tritonsparse.models.transfo_xl import TransfoXLConfig, TransfoXLLMHeadModel, Vocabulary
from tritonsparse.models.transfo_xl.adaptive import adaptive_nll, adaptive_nll_reference
from tritonsparse.models.transfo_xl.checkpoint import from_original, rename
from tritonsparse.models.transfo_xl.modeling import relative_shift, visible

HERE = Path(__file__).parent
_spec = importlib.util.spec_from_file_location("vectors", HERE / "make_transfo_xl_vectors.py")
assert _spec is not None and _spec.loader is not None
vectors = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(vectors)


def build(**changes: Any) -> TransfoXLLMHeadModel:
    torch.manual_seed(0)
    sizes = {**vectors.SIZES, "d_embed": 32, "n_layer": 2, "div_val": 2, **changes}
    return TransfoXLLMHeadModel(TransfoXLConfig(**sizes)).eval()


@pytest.mark.parametrize("title", vectors.CONFIGURATIONS)
def test_forward_memory_losses_and_gradients_are_those_of_the_class_that_was(title: str) -> None:
    expected = np.load(HERE / "transfo_xl_vectors.npz")
    model = build(**{"same_length": True, "first_memory": "zeros", **vectors.CONFIGURATIONS[title]})
    vectors.fill(model, {})
    mems, total = None, torch.zeros(())

    def close(name: str, actual: torch.Tensor) -> None:
        wanted = torch.from_numpy(expected[f"{title}/{name}"])
        assert (actual.detach() - wanted).norm() <= 1e-5 * wanted.norm() + 1e-7, name

    for step, (ids, targets) in enumerate(zip(*vectors.segments(), strict=True)):
        with torch.no_grad():
            close(f"logits/{step}", model(ids, mems=mems).logits[:, -1])
        outputs = model(ids, mems=mems, target_ids=targets)
        mems, total = outputs.mems, total + outputs.loss
        close(f"losses/{step}", outputs.losses)
    for layer, memory in enumerate(mems):
        close(f"mems/{layer}", memory)
    total.backward()
    names = {name.removeprefix(f"{title}/grads/") for name in expected.files if name.startswith(f"{title}/grads/")}
    assert names == {name for name, _ in model.named_parameters()}
    for name, parameter in model.named_parameters():
        grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        probe = torch.from_numpy(vectors.values(f"probe {name}", tuple(grad.shape)))
        wanted, norm = (float(value) for value in expected[f"{title}/grads/{name}"])
        assert abs(float(grad.norm()) - norm) <= 1e-5 * norm + 1e-6, name
        assert abs(float((grad * probe).sum()) - wanted) <= 1e-5 * norm * float(probe.norm()) + 1e-6, name


@torch.no_grad()
def test_a_long_text_scores_alike_however_it_is_cut_into_segments() -> None:
    """Without clamping and with memory for everything, segments are only a way of computing."""
    model, ids = build(mem_len=64, clamp_len=-1, same_length=False), torch.randint(100, (2, 25))
    whole, mems, pieces = model(ids[:, :-1], target_ids=ids[:, 1:]).losses, None, []
    for start, stop in ((0, 7), (7, 8), (8, 24)):
        outputs = model(ids[:, start:stop], mems=mems, target_ids=ids[:, start + 1 : stop + 1])
        mems = outputs.mems
        pieces.append(outputs.losses)
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=1e-4, atol=1e-5)
    assert mems is not None and mems[0].shape == (24, 2, 32)


def test_the_memory_keeps_the_last_inputs_and_no_graph() -> None:
    model = build(mem_len=5)
    outputs = model(torch.randint(100, (2, 3)))
    assert [memory.shape for memory in outputs.mems] == [(3, 2, 32)] * 2
    longer = model(torch.randint(100, (2, 4)), mems=outputs.mems)
    assert [memory.shape for memory in longer.mems] == [(5, 2, 32)] * 2
    assert torch.equal(longer.mems[0][0], outputs.mems[0][2]) and not longer.mems[0].requires_grad


def test_log_probabilities_sum_to_one_and_are_the_losses_and_labels_are_targets_that_the_model_shifts() -> None:
    model, ids = build(), torch.randint(100, (2, 9))
    logp = model(ids[:, :-1]).logits
    torch.testing.assert_close(logp.exp().sum(-1), torch.ones(2, 8))
    by_targets = model(ids[:, :-1], target_ids=ids[:, 1:])
    torch.testing.assert_close(by_targets.losses, -logp.gather(-1, ids[:, 1:, None]).squeeze(-1))
    ignored = ids.clone()
    ignored[0, 3] = -100
    by_labels = model(ids, labels=ignored)
    assert by_labels.losses.shape == (2, 8) and by_labels.losses[0, 2] == 0
    kept = by_labels.losses != 0
    torch.testing.assert_close(by_labels.losses[kept], by_targets.losses[kept])
    torch.testing.assert_close(by_labels.loss, by_targets.losses[kept].mean())


def test_same_length_shows_every_position_as_many_tokens_and_the_shift_puts_each_distance_at_its_key() -> None:
    config = TransfoXLConfig(**{**vectors.SIZES, "mem_len": 4, "d_embed": 32})
    # Three new positions after four of memory: each sees four tokens with itself, one more by NVIDIA's rule.
    seen = visible(3, 4, config, torch.device("cpu"))
    assert seen.int().tolist() == [[0, 1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1, 0], [0, 0, 0, 1, 1, 1, 1]]
    config.same_length_rule = "nvidia"
    wider = visible(3, 4, config, torch.device("cpu"))
    assert wider.int().tolist() == [[1, 1, 1, 1, 1, 0, 0], [0, 1, 1, 1, 1, 1, 0], [0, 0, 1, 1, 1, 1, 1]]
    # Two queries, four keys: column j of the input is distance 3 - j. Query 1 (the last) sees them as they are,
    # query 0 one to the left.
    scores = torch.tensor([[[[3.0, 2.0, 1.0, 0.0], [30.0, 20.0, 10.0, 0.0]]]])
    shifted = relative_shift(scores)[0, 0]
    assert shifted[1].tolist() == [30, 20, 10, 0] and shifted[0, :3].tolist() == [2, 1, 0]


@pytest.mark.parametrize("projected", [True, False])
def test_the_loss_op_has_the_reference_s_gradients(projected: bool) -> None:
    torch.manual_seed(1)
    edges, widths = [0, 5, 9, 12], [4, 3, 2] if projected else [4, 4, 4]
    hidden = torch.randn(7, 4, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([0, 11, 5, -100, 8, 4, 9])
    sizes = [5 + 2, 4, 3]
    weights = [torch.randn(n, k, dtype=torch.float64, requires_grad=True) for n, k in zip(sizes, widths, strict=True)]
    biases = [torch.randn(n, dtype=torch.float64, requires_grad=True) for n in sizes]
    projections = [torch.randn(4, k, dtype=torch.float64, requires_grad=True) for k in widths] if projected else []
    leaves, grad = [hidden, *weights, *biases, *projections], torch.randn(7, dtype=torch.float64)
    ours = adaptive_nll(hidden, targets, weights, biases, projections, edges)
    theirs = adaptive_nll_reference(hidden, targets, weights, biases, projections, edges)
    assert ours[3] == 0
    torch.testing.assert_close(ours, theirs)
    pairs = zip(torch.autograd.grad(ours, leaves, grad), torch.autograd.grad(theirs, leaves, grad), strict=True)
    for our, their in pairs:
        torch.testing.assert_close(our, their)
    arguments = (hidden, targets, weights, biases, projections, edges)
    torch.library.opcheck(torch.ops.tritonsparse.adaptive_nll.default, arguments)


def test_the_loss_compiles_as_one_graph_and_equals_eager() -> None:
    model, ids = build(), torch.randint(100, (2, 9))
    eager = model(ids[:, :-1], target_ids=ids[:, 1:])
    torch._dynamo.reset()
    step = torch.compile(lambda ids, targets: model(ids, target_ids=targets).loss, backend="aot_eager", fullgraph=True)
    loss = step(ids[:, :-1], ids[:, 1:])
    torch.testing.assert_close(loss, eager.loss)
    loss.backward()
    assert model.transformer.layers[0].dec_attn.qkv_net.weight.grad is not None


def test_attention_weights_explain_the_output_of_the_fused_path() -> None:
    model, ids = build(), torch.randint(100, (2, 6))
    fused, told = model(ids), model(ids, output_attentions=True, output_hidden_states=True)
    torch.testing.assert_close(fused.logits, told.logits)
    assert told.attentions[0].shape == (2, 4, 6, 6) and len(told.hidden_states) == 3
    assert torch.allclose(told.attentions[0].sum(-1), torch.ones(2, 4, 6))


def test_gradient_checkpointing_changes_nothing_but_memory() -> None:
    ids, grads = torch.randint(100, (2, 9)), []
    for checkpointed in (False, True):
        model = build().train()
        if checkpointed:
            model.gradient_checkpointing_enable()
        model(ids[:, :-1], target_ids=ids[:, 1:]).loss.backward()
        grads.append(model.transformer.layers[0].dec_attn.qkv_net.weight.grad)
    torch.testing.assert_close(grads[0], grads[1])


def test_a_saved_model_is_loaded_by_the_auto_class_with_its_ties(tmp_path: Path) -> None:
    model, ids = build(div_val=2), torch.randint(100, (1, 5))
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert isinstance(AutoConfig.from_pretrained(tmp_path), TransfoXLConfig)
    assert torch.equal(model(ids).logits, again(ids).logits)
    embedding = again.transformer.word_emb
    assert again.crit.out_layers[1].weight is embedding.emb_layers[1].weight
    assert [again.crit.out_projs[i] is embedding.emb_projs[i] for i in (0, 1)] == [False, True]


def test_generation_by_memory_equals_reading_everything_again() -> None:
    model = build(clamp_len=-1, same_length=False, mem_len=32)
    ids = expected = torch.randint(1, 100, (1, 5))
    for _ in range(4):
        expected = torch.cat([expected, model(expected).logits[:, -1:].argmax(-1)], dim=1)
    generated = model.generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert torch.equal(generated, expected)


def test_its_layers_become_sparse_and_its_softmax_stays_dense() -> None:
    model = build()
    sparsifier = ts.sparsify(model, "gmp", sparsity=0.5, total_steps=1)
    names = ("dec_attn.qkv_net", "dec_attn.r_net", "dec_attn.o_net", "pos_ff.CoreNet.0", "pos_ff.CoreNet.3")
    assert set(sparsifier.layers) == {f"transformer.layers.{layer}.{name}" for layer in range(2) for name in names}
    assert type(model.crit.out_layers[0]) is nn.Linear


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"cutoffs": [50, 20]}, "cutoffs that rise strictly below vocab_size = 100"),
        ({"cutoffs": [20, 100]}, "cutoffs that rise strictly"),
        ({"tie_projs": [True]}, "3 values of tie_projs"),
        ({"div_val": 9}, "lower div_val"),
        ({"same_length_rule": "mine"}, "choose one"),
        ({"first_memory": "full"}, "choose one"),
        ({"d_model": 31}, "an even d_model"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        TransfoXLConfig(**{**vectors.SIZES, "d_embed": 32, "n_layer": 2, **arguments})


def test_a_memory_of_another_shape_is_refused() -> None:
    model, ids = build(), torch.randint(100, (2, 4))
    mems = model(ids).mems
    for call, words in (
        (lambda: model(ids[:1], mems=mems), r"each \[M, 1, 32\], got .*or None for a new batch"),
        (lambda: model(ids, mems=mems[:1]), "mems of 2 layers"),
        (lambda: model(ids, mems=[torch.zeros(40, 2, 32)] * 2), "at most mem_len = 16 tokens, got 40; cut"),
        (lambda: model(ids, labels=ids, target_ids=ids), "got both; pass one"),
    ):
        with pytest.raises(ValueError, match=words):
            call()


def test_a_vocabulary_counts_words_as_the_papers_do(tmp_path: Path) -> None:
    vocabulary = Vocabulary.count([" b a b \n", "\n", "c a b <unk>\n"])
    # b 3, a 2, then c and <unk> once each in order of appearance; <eos> is id 0 whatever its count.
    assert vocabulary.words == ["<eos>", "b", "a", "c", "<unk>"]
    assert vocabulary.encode(["b x", ""]).tolist() == [1, 4, 0, 0]
    vocabulary.save(tmp_path / "vocabulary.txt")
    assert Vocabulary.load(tmp_path / "vocabulary.txt").words == vocabulary.words
    for call, words in (
        (lambda: Vocabulary(["<eos>", "b"]).encode(["b x"]), "got 'x' in line 1"),
        (lambda: Vocabulary(["<eos>", "b", "b"]), "expected every word once, got 'b' twice"),
        (lambda: Vocabulary(["b"]), "<eos> as the first word"),
    ):
        with pytest.raises(ValueError, match=words):
            call()


def as_nvidia(model: TransfoXLLMHeadModel) -> dict[str, torch.Tensor]:
    """The state dict that NVIDIA's code would have saved of this model under DDP."""
    result = {"module.pos_emb.inv_freq": torch.zeros(16)}
    for name, tensor in model.state_dict().items():
        name = name.removeprefix("transformer.").replace("crit.out_layers.0.weight", "crit.out_layers_weights.0")
        name = name.replace("crit.out_layers.0.bias", "crit.out_layers_biases.0")
        result[f"module.{name}"] = tensor.flip(0) if "cluster" in name else tensor
    return result


def test_a_checkpoint_of_the_original_codes_is_the_same_model_and_one_of_other_sizes_is_refused() -> None:
    model, ids = build(div_val=1, untie_r=False), torch.randint(100, (1, 5))
    state = as_nvidia(model)
    again = from_original(state, model.config).eval()
    assert torch.equal(again(ids).logits, model(ids).logits)
    assert again.crit.out_layers[0].weight is again.transformer.word_emb.emb_layers[0].weight
    assert set(rename(state)) == set(model.state_dict())
    # By the first tensor that differs.
    for layers, words in (
        (3, r"expected transformer.layers.2.* of shape \[.*got no such tensor"),
        (1, r"expected transformer.layers.1.* of shape None, got \["),
    ):
        with pytest.raises(ValueError, match=words):
            from_original(state, build(div_val=1, untie_r=False, n_layer=layers).config)
