"""Perplexity: every token scored once, sums exact, equal to scoring each token by itself."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GPT2Config, GPT2LMHeadModel

from tritonsparse.eval.perplexity import Perplexity, causal_perplexity, main, segment_perplexity
from tritonsparse.eval.windows import IGNORED, equal_windows, segments, windows
from tritonsparse.models.transfo_xl import TransfoXLConfig, TransfoXLLMHeadModel, Vocabulary
from tritonsparse.train.text.subwords import train_tokenizer

STREAM = np.random.default_rng(0).integers(50, size=61)


def transfo_xl(**changes: Any) -> TransfoXLLMHeadModel:
    torch.manual_seed(0)
    sizes = dict(
        vocab_size=50, cutoffs=[10, 30], d_model=16, d_embed=16, n_head=2, d_head=8, d_inner=32, div_val=2, n_layer=2,
        mem_len=8, clamp_len=-1, same_length=False, init_std=0.3, proj_init_std=0.3, dropout=0.3,
    )  # fmt: skip
    return TransfoXLLMHeadModel(TransfoXLConfig(**sizes | changes))


def gpt2(**changes: Any) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    sizes = dict(
        vocab_size=50, n_positions=16, n_embd=16, n_layer=2, n_head=2, initializer_range=0.3, bos_token_id=0,
        eos_token_id=1,
    )  # fmt: skip
    return GPT2LMHeadModel(GPT2Config(**sizes | changes))


@given(tokens=st.integers(2, 200), batch_size=st.integers(1, 5), tgt_len=st.integers(1, 20))
@settings(max_examples=60, deadline=None)
def test_segments_target_every_token_but_the_first_once_after_the_token_before_it(
    tokens: int, batch_size: int, tgt_len: int
) -> None:
    stream = np.arange(tokens)
    if tokens < batch_size * tgt_len + 1:
        with pytest.raises(ValueError, match="text of at least"):
            list(segments(stream, batch_size=batch_size, tgt_len=tgt_len))
        return
    found: list[int] = []
    for inputs, targets in segments(stream, batch_size=batch_size, tgt_len=tgt_len):
        counted = targets != IGNORED
        assert torch.equal(inputs[counted] + 1, targets[counted])
        assert inputs.shape[1] <= tgt_len and int(inputs.max()) < tokens
        found += targets[counted].tolist()
    assert sorted(found) == list(range(1, tokens))


@given(tokens=st.integers(2, 200), window=st.integers(1, 30), stride=st.integers(1, 30))
@settings(max_examples=60, deadline=None)
def test_windows_score_every_token_but_the_first_once(tokens: int, window: int, stride: int) -> None:
    if stride > window:
        with pytest.raises(ValueError, match="stride from 1 to the window"):
            list(windows(tokens, window=window, stride=stride))
        return
    every = list(windows(tokens, window=window, stride=stride))
    scored = [place for begin, end, count in every for place in range(end - count + 1, end + 1)]
    assert scored == list(range(1, tokens))
    assert all(0 <= begin < end <= tokens - 1 and end - begin <= window for begin, end, _ in every)
    # Beyond the first window, each scored token has at least window - stride tokens before it.
    assert all(end - count - begin >= window - stride for begin, end, count in every[1:] if end >= window)
    regrouped = [each for group in equal_windows(iter(every), 3) for each in group]
    assert regrouped == every


@pytest.mark.parametrize("tgt_len", [1, 7, 60])
def test_segments_with_a_memory_of_everything_score_as_one_pass_over_the_text(tgt_len: int) -> None:
    model = transfo_xl().double().eval()
    ids = torch.from_numpy(STREAM)[None]
    with torch.no_grad():
        scores = model(ids[:, :-1]).logits
    brute = -sum(float(scores[0, place, STREAM[place + 1]]) for place in range(60))
    result = segment_perplexity(model, STREAM, tgt_len=tgt_len, mem_len=60)
    assert result.tokens == 60
    assert result.nll == pytest.approx(brute, rel=1e-6)  # the softmax of `logits` is in float64, as that of the loss
    assert result.perplexity == pytest.approx(math.exp(brute / 60), rel=1e-6)


@pytest.mark.parametrize(("tgt_len", "mem_len", "same_length"), [(5, 8, False), (4, 4, True), (16, 0, False)])
def test_a_short_memory_scores_as_each_segment_by_itself_after_its_memory(
    tgt_len: int, mem_len: int, same_length: bool
) -> None:
    model = transfo_xl(mem_len=mem_len, same_length=same_length, clamp_len=6).double().eval()
    brute, mems = 0.0, None
    with torch.no_grad():
        for begin in range(0, 60, tgt_len):
            ids = torch.from_numpy(STREAM[begin : begin + tgt_len + 1])[None]
            output = model(ids[:, :-1], mems=mems)
            mems = output.mems
            brute -= float(output.logits.gather(-1, ids[:, 1:, None]).sum())
    result = segment_perplexity(
        transfo_xl().double(), STREAM, tgt_len=tgt_len, mem_len=mem_len, same_length=same_length, clamp_len=6
    )
    assert (result.tokens, result.nll) == (60, pytest.approx(brute, rel=1e-6))


def test_columns_score_every_token_and_differ_only_where_they_begin_without_memory() -> None:
    model = transfo_xl(mem_len=60).double()
    columns = [STREAM[0:21], STREAM[20:41], STREAM[40:61]]
    apart = sum(segment_perplexity(model, column, tgt_len=6).nll for column in columns)
    together = segment_perplexity(model, STREAM, tgt_len=6, batch_size=3)
    assert (together.tokens, together.nll) == (60, pytest.approx(apart, rel=1e-9))


def test_the_last_columns_are_shorter_and_no_token_is_left_out() -> None:
    model = transfo_xl(mem_len=60).double()
    columns = [STREAM[0:19], STREAM[18:37], STREAM[36:54]]
    apart = sum(segment_perplexity(model, column, tgt_len=16).nll for column in columns)
    together = segment_perplexity(model, STREAM[:54], tgt_len=16, batch_size=3)
    assert (together.tokens, together.nll) == (53, pytest.approx(apart, rel=1e-9))


def test_the_model_is_left_as_it_was() -> None:
    model = transfo_xl().train()
    segment_perplexity(model, STREAM, tgt_len=5, mem_len=3, clamp_len=2, same_length=True)
    assert model.training
    assert (model.config.mem_len, model.config.clamp_len, model.config.same_length) == (8, -1, False)
    with pytest.raises(ValueError, match="ids of the model's vocabulary"):
        segment_perplexity(model, STREAM + 50, tgt_len=5, mem_len=3)
    assert model.config.mem_len == 8 and model.training


@pytest.mark.parametrize(("window", "stride"), [(16, 16), (16, 4), (8, 8), (5, 2), (7, 1)])
def test_a_sliding_window_scores_as_each_token_by_itself(window: int, stride: int) -> None:
    model = gpt2().double()
    brute = 0.0
    model.eval()
    with torch.no_grad():
        for place in range(1, 61):
            # The window that scores this token, by its definition: they end at window, window + stride, ... and 60.
            end = window if place <= window else min(60, window + -(-(place - window) // stride) * stride)
            context = torch.from_numpy(STREAM[max(0, end - window) : place])[None]
            brute -= float(model(input_ids=context).logits[0, -1].log_softmax(-1)[STREAM[place]])
    result = causal_perplexity(model.train(), STREAM, window=window, stride=stride, batch_size=3, words=20)
    assert (result.tokens, result.nll) == (60, pytest.approx(brute, rel=1e-9))
    assert result.word_perplexity == pytest.approx(math.exp(brute / 20))
    assert model.training


def test_a_number_says_how_it_was_made() -> None:
    text = str(segment_perplexity(transfo_xl(), STREAM, tgt_len=5, mem_len=3, clamp_len=2, same_length=True))
    for word in ("tgt_len 5", "mem_len 3", "clamp_len 2", "same_length True", "60 tokens scored", "vocabulary 50"):
        assert word in text
    assert "window 8, stride 4" in str(causal_perplexity(gpt2(), STREAM, window=8, stride=4))
    assert Perplexity(nll=1e6, tokens=1, settings={}).perplexity == math.inf


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tgt_len": 0}, "tgt_len and batch_size of at least 1"),
        ({"tgt_len": 61}, "text of at least 62 tokens"),
        ({"tgt_len": 5, "batch_size": 13}, "text of at least 66 tokens"),
        ({"tgt_len": 5, "mem_len": -1}, "mem_len of at least 0"),
        ({"tgt_len": 5, "mem_len": 0, "same_length": True}, "sees nothing"),
    ],
)
def test_wrong_segment_settings_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        segment_perplexity(transfo_xl(), STREAM, **options)


def test_a_window_longer_than_the_model_s_positions_is_refused() -> None:
    with pytest.raises(ValueError, match="from 1 to the model's 16 positions"):
        causal_perplexity(gpt2(), STREAM, window=17)


LINES = ["the cat sat on the mat", "", "the dog sat on the cat"] * 10


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("".join(f"{line}\n" for line in LINES), encoding="utf-8")
    return path


def test_the_program_scores_a_transformer_xl(
    tmp_path: Path, text_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    vocabulary = Vocabulary.count(LINES)
    model = transfo_xl(vocab_size=len(vocabulary), cutoffs=[3], div_val=1)
    model.save_pretrained(tmp_path / "model")
    vocabulary.save(tmp_path / "model" / "vocabulary.txt")
    options = ["--model", str(tmp_path / "model"), "--text_file", str(text_file), "--device=cpu"]
    assert main([*options, "--tgt_len=4", "--mem_len=12", "--clamp_len=9", "--same_length"]) == 0
    printed = capsys.readouterr().out
    document = json.loads(printed.strip().rpartition("\n")[2])
    expected = segment_perplexity(model, vocabulary.encode(LINES), tgt_len=4, mem_len=12, clamp_len=9, same_length=True)
    assert document["nll"] == pytest.approx(expected.nll, rel=1e-6)
    assert document["tokens"] == expected.tokens == 10 * 15 - 1
    assert "mem_len 12, clamp_len 9, same_length True" in printed
    for wrong, words in (("--window=4", "expected no --window"), ("--tgt_len=1000", "text of at least")):
        assert main([*options, wrong]) == 1
        assert words in capsys.readouterr().err
    Vocabulary(vocabulary.words[:-1]).save(tmp_path / "model" / "vocabulary.txt")
    assert main(options) == 1
    assert f"vocabulary of the model's {len(vocabulary)} types, got {len(vocabulary) - 1}" in capsys.readouterr().err


def test_the_program_scores_any_causal_model_and_counts_words_and_lines(
    tmp_path: Path, text_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = train_tokenizer([(line, line) for line in LINES], 30)
    model = gpt2(vocab_size=len(tokenizer), bos_token_id=None, eos_token_id=1)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    options = ["--model", str(tmp_path / "model"), "--text_file", str(text_file), "--device=cpu"]
    assert main([*options, "--window=8"]) == 0
    document = json.loads(capsys.readouterr().out.strip().rpartition("\n")[2])
    assert document["words"] == 10 * (6 + 6 + 3)
    assert document["settings"] == {"window": 8, "stride": 4, "vocabulary": len(tokenizer)}
    # The text begins after </s>, so that its first token is scored too.
    assert document["tokens"] == sum(len(tokenizer(f"{line}\n", add_special_tokens=False).input_ids) for line in LINES)
    assert document["word_perplexity"] == pytest.approx(math.exp(document["nll"] / document["words"]))
    assert main([*options, "--tgt_len=4"]) == 1
    assert "expected no --tgt_len" in capsys.readouterr().err


def test_what_is_no_model_is_refused_in_a_sentence(
    tmp_path: Path, text_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--model", str(tmp_path / "none"), "--text_file", str(text_file)]) == 1
    assert "expected a language model" in capsys.readouterr().err
    assert main(["--model", str(tmp_path / "none"), "--text_file", str(tmp_path / "gone.txt")]) == 1
    assert "expected a readable file" in capsys.readouterr().err
