"""The joint byte-pair vocabulary: exact in size, lossless on its own text, the same every time."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tritonsparse.train.embedded.corpus import generate
from tritonsparse.train.text.subwords import train_tokenizer

PAIRS = generate(0, {"train": 400, "validation": 0, "test": 0})["train"]
SIZE = 300


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(PAIRS, SIZE)


def test_the_vocabulary_has_exactly_the_size_asked_for(tokenizer: PreTrainedTokenizerFast) -> None:
    assert len(tokenizer) == SIZE
    assert sorted(tokenizer.get_vocab().values()) == list(range(SIZE))


def test_special_tokens_come_first(tokenizer: PreTrainedTokenizerFast) -> None:
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (0, 1, 2)
    assert tokenizer.convert_ids_to_tokens([0, 1, 2]) == ["<pad>", "</s>", "<unk>"]


def test_every_sentence_of_the_text_survives_the_round_trip(tokenizer: PreTrainedTokenizerFast) -> None:
    sentences = [side for pair in PAIRS for side in pair]
    assert any(letter in sentence for sentence in sentences for letter in "äöüß"), "the case needs umlauts"
    rows = tokenizer(sentences)["input_ids"]
    assert tokenizer.batch_decode(rows, skip_special_tokens=True, clean_up_tokenization_spaces=False) == sentences


def test_spaces_before_punctuation_are_kept() -> None:
    tokenizer = train_tokenizer([("Is it 3 p.m. ? Yes , it is .", "Süße Größe !")] * 2, 30)
    for text in ("Is it 3 p.m. ? Yes , it is .", "Süße Größe !"):
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False) == text


def test_composed_and_decomposed_umlauts_are_one(tokenizer: PreTrainedTokenizerFast) -> None:
    assert tokenizer("m\u00fcde")["input_ids"] == tokenizer("mu\u0308de")["input_ids"]


def test_sources_and_targets_end_in_the_end_token_and_share_ids(tokenizer: PreTrainedTokenizerFast) -> None:
    source, target = tokenizer("Hotel")["input_ids"], tokenizer(text_target="Hotel")["input_ids"]
    assert source == target
    assert source[-1] == tokenizer.eos_token_id
    assert source.count(tokenizer.eos_token_id) == 1


def test_a_letter_outside_the_text_is_unknown_not_lost(tokenizer: PreTrainedTokenizerFast) -> None:
    assert tokenizer.unk_token_id in tokenizer("\u4f60")["input_ids"]


def test_training_is_deterministic(tokenizer: PreTrainedTokenizerFast) -> None:
    again = train_tokenizer(PAIRS, SIZE)
    assert again.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()


def test_a_vocabulary_larger_than_the_text_supports_names_the_one_that_can_be_reached() -> None:
    pairs = [("ab ab", "cd cd")]
    # <pad> </s> <unk>, the mark of a word start, a b c d; merges _a and _ab, _c and _cd: 12.
    with pytest.raises(ValueError, match=r"1 sentence pairs support \(here 12\), got.*=500; pass --vocab_size 12"):
        train_tokenizer(pairs, 500)
    assert len(train_tokenizer(pairs, 12)) == 12


def test_a_vocabulary_smaller_than_the_alphabet_names_the_least() -> None:
    with pytest.raises(ValueError, match=r"vocab_size of at least 8 \(the characters.*got 5; pass a larger"):
        train_tokenizer([("ab ab", "cd cd")], 5)
    assert len(train_tokenizer([("ab ab", "cd cd")], 8)) == 8


def test_a_saved_tokenizer_reloads_as_any_other(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    tokenizer.save_pretrained(tmp_path)
    reloaded = AutoTokenizer.from_pretrained(tmp_path)
    text = "Der kleine Hund läuft."
    assert reloaded(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert reloaded.decode(reloaded(text)["input_ids"]) == tokenizer.decode(tokenizer(text)["input_ids"])
    for name in ("pad_token_id", "eos_token_id", "unk_token_id", "model_max_length"):
        assert getattr(reloaded, name) == getattr(tokenizer, name)
