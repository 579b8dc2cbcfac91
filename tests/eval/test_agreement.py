"""Agreement of twins: the definitions by hand, every token compared once, and the programs' loaders."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tritonsparse.eval.agreement import Agreement, agreement, classification, language, main, translation
from tritonsparse.models.transfo_xl import Vocabulary
from tritonsparse.train.text.subwords import train_tokenizer

STREAM = np.random.default_rng(0).integers(40, size=50)
SENTENCES = ["a b c", "b", "c a b b"] * 3
Build = Callable[..., Any]


def same(found: Agreement, expected: Agreement, predictions: int, rel: float = 1e-6) -> None:
    assert found.predictions == expected.predictions == predictions and found.agreement == expected.agreement
    assert found.cross_entropy == pytest.approx(expected.cross_entropy, rel=rel)


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
    extra, counted = torch.tensor([[9.0, 0.0]], dtype=torch.float64), torch.tensor([True, False])
    shifted = (torch.cat([p[:1] + 3, extra]), torch.cat([q[:1] - 2, -extra]), counted)
    same(agreement([shifted, (p[1:], q[1:], None)]), found, 2, rel=1e-9)
    # A class that cannot be adds nothing.
    impossible = torch.tensor([[0.0, -math.inf]])
    assert agreement([(impossible, impossible, None)]) == Agreement(1.0, 0.0, 0.0, 1)


def test_what_cannot_be_compared_is_refused(transfo_xl: Build, gpt: Build) -> None:
    zeros = torch.zeros(2, 2)
    for compare, words in (
        (lambda: agreement([(zeros[:1], torch.zeros(1, 3), None)]), r"equal shape, got \[1, 2\] and \[1, 3\]"),
        (lambda: agreement([(zeros, zeros, torch.zeros(2, dtype=torch.bool))]), "at least one prediction"),
        (lambda: language(transfo_xl(), gpt(), STREAM), "two models of one kind"),
        (lambda: translation(None, None, None, ["a"], []), "a reference for each source"),
    ):
        with pytest.raises(ValueError, match=words):
            compare()


def test_a_model_agrees_with_itself(transfo_xl: Build, gpt: Build) -> None:
    for model in (transfo_xl(mem_len=60).train(), gpt().train()):
        found = language(model, copy.deepcopy(model), STREAM, tgt_len=7, window=8)
        assert (found.agreement, found.predictions) == (1.0, 49)
        assert found.cross_entropy == pytest.approx(found.entropy, rel=1e-6)
        assert model.training


@torch.no_grad()
@pytest.mark.parametrize("columns", [1, 2])
def test_transformer_xls_are_compared_each_with_its_own_memory(columns: int, transfo_xl: Build) -> None:
    models = [transfo_xl(seed, mem_len=60).double().eval() for seed in (0, 1)]
    # Columns of 49 / 2 = 25 and 24 predictions, each from the start of its column.
    edges = [(0, 49)] if columns == 1 else [(0, 25), (25, 49)]
    texts = [torch.from_numpy(STREAM[begin:end])[None] for begin, end in edges]
    expected = agreement([(models[0](ids).logits, models[1](ids).logits, None) for ids in texts])
    assert expected.agreement < 1
    same(language(*models, STREAM, tgt_len=6, batch_size=columns), expected, 49)


@torch.no_grad()
def test_causal_models_are_compared_on_every_token_once(gpt: Build) -> None:
    models, pairs = [gpt(seed).double().eval() for seed in (0, 1)], []
    for place in range(1, 50):
        end = 16 if place <= 16 else min(49, 16 + -(-(place - 16) // 8) * 8)
        ids = torch.from_numpy(STREAM[max(0, end - 16) : place])[None]
        pairs.append((*(model(ids).logits[0, -1:] for model in models), None))
    same(language(*models, STREAM, window=16, batch_size=2), agreement(pairs), 49, rel=1e-9)


@torch.no_grad()
def test_translations_are_compared_token_by_token_without_padding(marian: Build) -> None:
    tokenizer = train_tokenizer([(line, line) for line in SENTENCES], 10)
    models = [marian(seed, pad_token_id=0, eos_token_id=1, decoder_start_token_id=1).double().eval() for seed in (0, 1)]
    pairs = []
    for sentence in SENTENCES:
        ids = torch.tensor([tokenizer(sentence)["input_ids"]])
        shifted = torch.cat([torch.tensor([[1]]), ids[:, :-1]], dim=1)
        pairs.append((*(model(input_ids=ids, decoder_input_ids=shifted).logits for model in models), None))
    same(translation(*models, tokenizer, SENTENCES, SENTENCES, batch_size=4), agreement(pairs), 3 * (4 + 2 + 5))


def test_classifiers_may_return_logits_or_an_output_with_them() -> None:
    class Wrapped(nn.Linear):
        def forward(self, input: torch.Tensor) -> Any:
            return type("Output", (), {"logits": super().forward(input)})

    first, second = nn.Linear(4, 3), Wrapped(4, 3)
    batches = [{"input": torch.randn(5, 4)} for _ in range(3)]
    expected = agreement([(first(batch["input"]), second(batch["input"]).logits, None) for batch in batches])
    assert classification(first, second, batches) == expected and expected.predictions == 15


def test_saved_language_models_are_compared(tmp_path: Path, transfo_xl: Build, document: Any, refusal: Any) -> None:
    lines = ["the cat sat", "the dog sat on the cat"] * 5
    vocabulary, text = Vocabulary.count(lines), tmp_path / "text.txt"
    text.write_text("".join(f"{line}\n" for line in lines))
    models = [transfo_xl(seed, vocab_size=len(vocabulary), cutoffs=[3], mem_len=60) for seed in (0, 1)]
    for name, model in zip(("first", "second"), models, strict=True):
        model.save_pretrained(tmp_path / name)
        vocabulary.save(tmp_path / name / "vocabulary.txt")
    options = [f"--first={tmp_path / 'first'}", f"--second={tmp_path / 'second'}", "--device=cpu", "--tgt_len=8"]
    assert main([*options, f"--text_file={text}"]) == 0
    printed, expected = document(), language(*models, vocabulary.encode(lines), tgt_len=8)
    assert printed["predictions"] == expected.predictions == 5 * (4 + 7) - 1
    assert printed["cross_entropy"] == pytest.approx(expected.cross_entropy, rel=1e-6)
    Vocabulary([vocabulary.words[0], *reversed(vocabulary.words[1:])]).save(tmp_path / "second" / "vocabulary.txt")
    for given, words in (([], "expected --text_file, or --source_file"), ([f"--text_file={text}"], "one vocabulary")):
        assert main([*options, *given]) == 1
        assert words in refusal()


def test_saved_translation_models_are_compared(tmp_path: Path, marian: Build, document: Any, refusal: Any) -> None:
    tokenizer = train_tokenizer([(line, line) for line in SENTENCES], 10)
    (tmp_path / "text.txt").write_text("".join(f"{line}\n" for line in SENTENCES))
    for seed, name in enumerate(("first", "second")):
        marian(seed).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    options = [f"--first={tmp_path / 'first'}", f"--second={tmp_path / 'second'}", "--device=cpu", "--batch_size=4"]
    files = [f"--{side}_file={tmp_path / 'text.txt'}" for side in ("source", "reference")]
    assert main([*options, *files]) == 0
    assert document()["predictions"] == 3 * (4 + 2 + 5)
    assert main([*options, files[0]]) == 1
    assert "expected --text_file, or --source_file" in refusal()
