"""Agreement of twins: the definitions by hand, every token compared once, and the programs' loaders."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from tritonsparse.eval.agreement import Agreement, agreement, classification, language, main, translation
from tritonsparse.models.transfo_xl import TransfoXLConfig, TransfoXLLMHeadModel, Vocabulary
from tritonsparse.train.text.subwords import train_tokenizer

STREAM = np.random.default_rng(0).integers(40, size=50)


def transfo_xl(seed: int = 0, **changes: Any) -> TransfoXLLMHeadModel:
    torch.manual_seed(seed)
    sizes = dict(
        vocab_size=40, cutoffs=[10], d_model=16, d_embed=16, n_head=2, d_head=8, d_inner=32, div_val=1, n_layer=1,
        mem_len=60, clamp_len=-1, same_length=False, init_std=0.3, dropout=0.3,
    )  # fmt: skip
    return TransfoXLLMHeadModel(TransfoXLConfig(**sizes | changes))


def gpt2(seed: int = 0) -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=40, n_positions=16, n_embd=16, n_layer=1, n_head=2, initializer_range=0.3, bos_token_id=0,
        eos_token_id=1,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def test_agreement_and_cross_entropy_by_hand() -> None:
    # p = (1/2, 1/2), (3/4, 1/4); q = (1/4, 3/4), (3/4, 1/4). Both prefer class 0 in the second row; in the first p has
    # a tie, which the lower class wins, and q prefers class 1.
    p = torch.tensor([[0.5, 0.5], [0.75, 0.25]], dtype=torch.float64).log()
    q = torch.tensor([[0.25, 0.75], [0.75, 0.25]], dtype=torch.float64).log()
    first = -0.5 * math.log(0.25) - 0.5 * math.log(0.75)
    second = -0.75 * math.log(0.75) - 0.25 * math.log(0.25)
    found = agreement([(p, q, None)])
    assert (found.agreement, found.predictions) == (0.5, 2)
    assert found.cross_entropy == pytest.approx((first + second) / 2)
    assert found.entropy == pytest.approx((math.log(2) + second) / 2)
    # Unnormalised, in two batches, and with a prediction that does not count.
    extra = torch.tensor([[9.0, 0.0]], dtype=torch.float64)
    counted = torch.tensor([True, False])
    batches = [
        (torch.cat([p[:1] + 3, extra]), torch.cat([q[:1] - 2, -extra]), counted),
        (p[1:], q[1:], None),
    ]
    again = agreement(batches)
    assert (again.agreement, again.predictions) == (0.5, 2)
    assert again.cross_entropy == pytest.approx(found.cross_entropy)


def test_a_class_that_cannot_be_adds_nothing() -> None:
    p = torch.tensor([[0.0, -math.inf]])
    found = agreement([(p, p, None)])
    assert (found.agreement, found.cross_entropy, found.entropy) == (1.0, 0.0, 0.0)


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(ValueError, match=r"equal shape, got \[1, 2\] and \[1, 3\]"):
        agreement([(torch.zeros(1, 2), torch.zeros(1, 3), None)])
    with pytest.raises(ValueError, match="at least one prediction"):
        agreement([(torch.zeros(2, 2), torch.zeros(2, 2), torch.zeros(2, dtype=torch.bool))])
    with pytest.raises(ValueError, match="two models of one kind"):
        language(transfo_xl(), gpt2(), STREAM)
    with pytest.raises(ValueError, match="a reference for each source"):
        translation(None, None, None, ["a"], [])


@pytest.mark.parametrize("build", [transfo_xl, gpt2])
def test_a_model_agrees_with_itself(build: Callable[..., Any]) -> None:
    model = build().train()
    found = language(model, copy.deepcopy(model), STREAM, tgt_len=7, window=8)
    assert (found.agreement, found.predictions) == (1.0, 49)
    assert found.cross_entropy == pytest.approx(found.entropy, rel=1e-6)
    assert model.training


@pytest.mark.parametrize("columns", [1, 2])
def test_transformer_xls_are_compared_each_with_its_own_memory(columns: int) -> None:
    first, second = transfo_xl(0).double().eval(), transfo_xl(1).double().eval()
    # Columns of 49 / 2 = 25 and 24 predictions, each from the start of its column.
    edges = [(0, 49)] if columns == 1 else [(0, 25), (25, 49)]
    pairs = []
    with torch.no_grad():
        for begin, end in edges:
            ids = torch.from_numpy(STREAM[begin:end])[None]
            pairs.append((first(ids).logits, second(ids).logits, None))
    expected = agreement(pairs)
    found = language(first, second, STREAM, tgt_len=6, batch_size=columns)
    assert found.predictions == expected.predictions == 49 and found.agreement == expected.agreement < 1
    assert found.cross_entropy == pytest.approx(expected.cross_entropy, rel=1e-6)


def test_causal_models_are_compared_on_every_token_once() -> None:
    first, second = gpt2(0).double().eval(), gpt2(1).double().eval()
    pairs = []
    with torch.no_grad():
        for place in range(1, 50):
            end = 16 if place <= 16 else min(49, 16 + -(-(place - 16) // 8) * 8)
            ids = torch.from_numpy(STREAM[max(0, end - 16) : place])[None]
            pairs.append((first(ids).logits[0, -1:], second(ids).logits[0, -1:], None))
    expected = agreement(pairs)
    found = language(first, second, STREAM, window=16, batch_size=2)
    assert (found.predictions, found.agreement) == (49, expected.agreement)
    assert found.cross_entropy == pytest.approx(expected.cross_entropy, rel=1e-9)


def test_translations_are_compared_token_by_token_without_padding(marian: Callable[..., Any]) -> None:
    sentences = ["a b c", "b", "c a b b"] * 3
    tokenizer = train_tokenizer([(line, line) for line in sentences], 10)
    models = [marian(seed, pad_token_id=0, eos_token_id=1, decoder_start_token_id=1).double().eval() for seed in (0, 1)]
    pairs = []
    with torch.no_grad():
        for sentence in sentences:
            ids = torch.tensor([tokenizer(sentence)["input_ids"]])
            shifted = torch.cat([torch.tensor([[1]]), ids[:, :-1]], dim=1)
            pairs.append([model(input_ids=ids, decoder_input_ids=shifted).logits for model in models])
    expected = agreement([(p, q, None) for p, q in pairs])
    found = translation(*models, tokenizer, sentences, sentences, batch_size=4)
    assert found.predictions == expected.predictions == 3 * (4 + 2 + 5)
    assert found.cross_entropy == pytest.approx(expected.cross_entropy, rel=1e-6)
    assert found.agreement == expected.agreement


def test_classifiers_may_return_logits_or_an_output_with_them() -> None:
    class Wrapped(nn.Linear):
        def forward(self, input: torch.Tensor) -> Any:
            return type("Output", (), {"logits": super().forward(input)})

    first, second = nn.Linear(4, 3), Wrapped(4, 3)
    batches = [{"input": torch.randn(5, 4)} for _ in range(3)]
    expected = agreement([(first(batch["input"]), second(batch["input"]).logits, None) for batch in batches])
    found = classification(first, second, batches)
    assert found == Agreement(expected.agreement, expected.cross_entropy, expected.entropy, 15)


def test_the_program_compares_saved_language_models(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = ["the cat sat", "the dog sat on the cat"] * 5
    vocabulary = Vocabulary.count(lines)
    (tmp_path / "text.txt").write_text("".join(f"{line}\n" for line in lines))
    models = [transfo_xl(seed, vocab_size=len(vocabulary), cutoffs=[3]) for seed in (0, 1)]
    for name, model in zip(("first", "second"), models, strict=True):
        model.save_pretrained(tmp_path / name)
        vocabulary.save(tmp_path / name / "vocabulary.txt")
    options = [f"--first={tmp_path / 'first'}", f"--second={tmp_path / 'second'}", "--device=cpu", "--tgt_len=8"]
    assert main([*options, f"--text_file={tmp_path / 'text.txt'}"]) == 0
    document = json.loads(capsys.readouterr().out.strip().rpartition("\n")[2])
    expected = language(*models, vocabulary.encode(lines), tgt_len=8)
    assert document["predictions"] == expected.predictions == 5 * (4 + 7) - 1
    assert document["cross_entropy"] == pytest.approx(expected.cross_entropy, rel=1e-6)
    assert main(options) == 1
    assert "expected --text_file, or --source_file" in capsys.readouterr().err
    Vocabulary([vocabulary.words[0], *reversed(vocabulary.words[1:])]).save(tmp_path / "second" / "vocabulary.txt")
    assert main([*options, f"--text_file={tmp_path / 'text.txt'}"]) == 1
    assert "two models of one vocabulary" in capsys.readouterr().err


def test_the_program_compares_saved_translation_models(
    tmp_path: Path, marian: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    sentences = ["a b c", "b", "c a b b"] * 3
    tokenizer = train_tokenizer([(line, line) for line in sentences], 10)
    (tmp_path / "text.txt").write_text("".join(f"{line}\n" for line in sentences))
    for seed, name in enumerate(("first", "second")):
        marian(seed).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    options = [f"--first={tmp_path / 'first'}", f"--second={tmp_path / 'second'}", "--device=cpu", "--batch_size=4"]
    files = [f"--source_file={tmp_path / 'text.txt'}", f"--reference_file={tmp_path / 'text.txt'}"]
    assert main([*options, *files]) == 0
    assert json.loads(capsys.readouterr().out.strip().rpartition("\n")[2])["predictions"] == 3 * (4 + 2 + 5)
    assert main([*options, files[0]]) == 1
    assert "expected --text_file, or --source_file" in capsys.readouterr().err
