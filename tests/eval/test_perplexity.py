"""Perplexity: every token scored once, sums exact, equal to scoring each token by itself."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tritonsparse.eval.perplexity import Perplexity, causal_perplexity, main, segment_perplexity
from tritonsparse.eval.windows import IGNORED, equal_windows, segments, windows
from tritonsparse.models.transfo_xl import Vocabulary
from tritonsparse.train.text.subwords import train_tokenizer

STREAM = np.random.default_rng(0).integers(50, size=61)
LINES = ["the cat sat on the mat", "", "the dog sat on the cat"] * 10
Build = Callable[..., Any]
quick = settings(max_examples=60, deadline=None)


@given(st.integers(2, 200), st.integers(1, 5), st.integers(1, 20))
@quick
def test_segments_target_every_token_but_the_first_once(tokens: int, batch_size: int, tgt_len: int) -> None:
    stream, found = np.arange(tokens), []
    if tokens < batch_size * tgt_len + 1:
        with pytest.raises(ValueError, match="text of at least"):
            list(segments(stream, batch_size=batch_size, tgt_len=tgt_len))
        return
    for inputs, targets in segments(stream, batch_size=batch_size, tgt_len=tgt_len):
        counted = targets != IGNORED
        # Each after the token before it.
        assert torch.equal(inputs[counted] + 1, targets[counted])
        assert inputs.shape[1] <= tgt_len and int(inputs.max()) < tokens
        found += targets[counted].tolist()
    assert sorted(found) == list(range(1, tokens))


@given(st.integers(2, 200), st.integers(1, 30), st.integers(1, 30))
@quick
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
    assert [each for group in equal_windows(iter(every), 3) for each in group] == every


# With a memory of everything it is one pass over the text; with a short one, each segment by itself after its memory.
@torch.no_grad()
@pytest.mark.parametrize(
    ("tgt_len", "mem_len", "same_length", "clamp_len"),
    [(1, 60, False, -1), (7, 60, False, -1), (60, 60, False, -1), (5, 8, False, 6), (4, 4, True, 6), (16, 0, False, 6)],
)
def test_segments_score_as_the_model_does(
    transfo_xl: Build, tgt_len: int, mem_len: int, same_length: bool, clamp_len: int
) -> None:
    settings = {"mem_len": mem_len, "same_length": same_length, "clamp_len": clamp_len}
    model = transfo_xl(**settings).double().eval()
    brute, mems = 0.0, None
    # The softmax of `logits` is in float64, as that of the loss.
    for begin in range(0, 60, 60 if mem_len == 60 else tgt_len):
        ids = torch.from_numpy(STREAM[begin : begin + (60 if mem_len == 60 else tgt_len) + 1])[None]
        output = model(ids[:, :-1], mems=mems)
        mems = output.mems
        brute -= float(output.logits.gather(-1, ids[:, 1:, None]).sum())
    result = segment_perplexity(transfo_xl().double(), STREAM, tgt_len=tgt_len, **settings)
    assert (result.tokens, result.nll) == (60, pytest.approx(brute, rel=1e-6))
    assert result.perplexity == pytest.approx(math.exp(brute / 60), rel=1e-6)


@pytest.mark.parametrize(("edges", "tgt_len"), [((0, 20, 40, 60), 6), ((0, 18, 36, 53), 16)])
def test_columns_score_every_token(transfo_xl: Build, edges: tuple[int, ...], tgt_len: int) -> None:
    # The last columns may be shorter; no token is left out.
    model = transfo_xl(mem_len=60).double()
    columns = [STREAM[begin : end + 1] for begin, end in pairwise(edges)]
    apart = sum(segment_perplexity(model, column, tgt_len=tgt_len).nll for column in columns)
    together = segment_perplexity(model, STREAM[: edges[-1] + 1], tgt_len=tgt_len, batch_size=3)
    assert (together.tokens, together.nll) == (edges[-1], pytest.approx(apart, rel=1e-9))


@torch.no_grad()
@pytest.mark.parametrize(("window", "stride"), [(16, 16), (16, 4), (8, 8), (5, 2), (7, 1)])
def test_a_sliding_window_scores_as_each_token_by_itself(gpt: Build, window: int, stride: int) -> None:
    model, brute = gpt().double().eval(), 0.0
    for place in range(1, 41):
        # The window that scores this token, by its definition: they end at window, window + stride, ... and 40.
        end = window if place <= window else min(40, window + -(-(place - window) // stride) * stride)
        context = torch.from_numpy(STREAM[max(0, end - window) : place])[None]
        brute -= float(model(input_ids=context).logits[0, -1].log_softmax(-1)[STREAM[place]])
    result = causal_perplexity(model.train(), STREAM[:41], window=window, stride=stride, batch_size=3, words=20)
    assert (result.tokens, result.nll) == (40, pytest.approx(brute, rel=1e-9))
    assert result.word_perplexity == pytest.approx(math.exp(brute / 20)) and model.training


def test_the_model_is_left_as_it_was_and_settings_are_said_or_refused(transfo_xl: Build, gpt: Build) -> None:
    model = transfo_xl().train()
    text = str(segment_perplexity(model, STREAM, tgt_len=5, mem_len=3, clamp_len=2, same_length=True))
    for word in ("tgt_len 5", "mem_len 3", "clamp_len 2", "same_length True", "60 tokens scored", "vocabulary 50"):
        assert word in text
    with pytest.raises(ValueError, match="ids of the model's vocabulary"):
        segment_perplexity(model, STREAM + 50, tgt_len=5, mem_len=3)
    config = model.config
    assert model.training and (config.mem_len, config.clamp_len, config.same_length) == (8, -1, False)
    assert "window 8, stride 4" in str(causal_perplexity(gpt(), STREAM, window=8, stride=4))
    assert Perplexity(nll=1e6, tokens=1, settings={}).perplexity == math.inf
    refused: dict[str, dict[str, Any]] = {
        "tgt_len and batch_size of at least 1": {"tgt_len": 0}, "text of at least 62 tokens": {"tgt_len": 61},
        "text of at least 66 tokens": {"tgt_len": 5, "batch_size": 13},
        "mem_len of at least 0": {"tgt_len": 5, "mem_len": -1},
        "sees nothing": {"tgt_len": 5, "mem_len": 0, "same_length": True},
    }  # fmt: skip
    for words, options in refused.items():
        with pytest.raises(ValueError, match=words):
            segment_perplexity(transfo_xl(), STREAM, **options)
    with pytest.raises(ValueError, match="from 1 to the model's 16 positions"):
        causal_perplexity(gpt(), STREAM, window=17)


@pytest.fixture
def score(tmp_path: Path, capsys: Any) -> Any:
    """`score(*options)` -> what the program printed of the model in tmp_path, or `score(*options, refused=...)`."""
    (tmp_path / "text.txt").write_text("".join(f"{line}\n" for line in LINES), encoding="utf-8")

    def run(*options: str, refused: str | None = None) -> tuple[str, dict[str, Any]]:
        given = [f"--model={tmp_path / 'model'}", f"--text_file={tmp_path / 'text.txt'}", "--device=cpu", *options]
        assert main(given) == (0 if refused is None else 2)
        printed = capsys.readouterr()
        assert refused is None or refused in printed.err
        return printed.out, {} if refused else json.loads(printed.out.strip().rpartition("\n")[2])

    return run


def test_the_program_scores_a_transformer_xl(tmp_path: Path, transfo_xl: Build, score: Any) -> None:
    score(refused="expected a language model")
    score(f"--text_file={tmp_path / 'gone.txt'}", refused="expected a readable file")
    vocabulary = Vocabulary.count(LINES)
    model = transfo_xl(vocab_size=len(vocabulary), cutoffs=[3], div_val=1)
    model.save_pretrained(tmp_path / "model")
    vocabulary.save(tmp_path / "model" / "vocabulary.txt")
    printed, document = score("--tgt_len=4", "--mem_len=12", "--clamp_len=9", "--same_length")
    expected = segment_perplexity(model, vocabulary.encode(LINES), tgt_len=4, mem_len=12, clamp_len=9, same_length=True)
    assert document["nll"] == pytest.approx(expected.nll, rel=1e-6)
    assert document["tokens"] == expected.tokens == 10 * 15 - 1
    assert "mem_len 12, clamp_len 9, same_length True" in printed
    score("--window=4", refused="expected no --window")
    score("--tgt_len=1000", refused="text of at least")
    Vocabulary(vocabulary.words[:-1]).save(tmp_path / "model" / "vocabulary.txt")
    score(refused=f"vocabulary of the model's {len(vocabulary)} types, got {len(vocabulary) - 1}")


def test_the_program_scores_any_causal_model_and_counts_words_and_lines(tmp_path: Path, gpt: Build, score: Any) -> None:
    tokenizer = train_tokenizer([(line, line) for line in LINES], 30)
    for saved in (gpt(vocab_size=len(tokenizer), bos_token_id=None), tokenizer):
        saved.save_pretrained(tmp_path / "model")
    _, document = score("--window=8")
    assert document["words"] == 10 * (6 + 6 + 3)
    assert document["settings"] == {"window": 8, "stride": 4, "vocabulary": len(tokenizer)}
    # The text begins after </s>, so that its first token is scored too.
    assert document["tokens"] == sum(len(tokenizer(f"{line}\n", add_special_tokens=False).input_ids) for line in LINES)
    assert document["word_perplexity"] == pytest.approx(math.exp(document["nll"] / document["words"]))
    score("--tgt_len=4", refused="expected no --tgt_len")
