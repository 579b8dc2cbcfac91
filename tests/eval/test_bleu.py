"""What BLEU and the translations under it promise."""

from __future__ import annotations

import gzip
import json
import runpy
import shutil
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import MarianMTModel, PreTrainedTokenizerFast

from tritonsparse.eval.bleu import compound_split, compound_split_bleu, corpus_bleu, main, translate

WORDS = ["pad", "eos", "unk", *(f"w{i}" for i in range(29))]
HYPOTHESES = ["Der Hund, der bellt, beißt nicht oft.", "Das ist ein kleines Haus am See.", "Guten Morgen!"]
REFERENCES = ["Der Hund, der bellt, beißt nicht.", "Das ist ein kleines Haus an einem See.", "Guten Morgen!"]
SOURCES = ["w1 w2 w3", "w4", "w9 w8 w7 w6 w5 w4 w3 w2 w1", "", "w5 w6", "w4 w4 w28 w1 w2", "w20"]
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="unk"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(single="$A eos", special_tokens=[("eos", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="pad", eos_token="eos", unk_token="unk")


@pytest.fixture
def model(marian: Any) -> MarianMTModel:
    """Random, with weights large enough that beams and sentences differ."""
    sizes = {"vocab_size": len(WORDS), "decoder_vocab_size": len(WORDS), "max_position_embeddings": 128}
    return marian(3, **sizes, init_std=0.5).eval()


@pytest.fixture
def words(model: MarianMTModel, tokenizer: PreTrainedTokenizerFast) -> Any:
    """`words(sources=SOURCES, **options)`: their translations by the model, short unless told otherwise."""
    return lambda sources=SOURCES, **options: translate(model, tokenizer, sources, **{"extra_tokens": 8, **options})


def test_scores_worked_out_by_hand_and_what_cannot_be_scored() -> None:
    assert corpus_bleu(REFERENCES, REFERENCES).score == pytest.approx(100.0)
    # hypothesis a b c d e (5 words), reference a b c d f g (6 words):
    # p1..p4 = 4/5, 3/4, 2/3, 1/2; product 1/5; BP = exp(1 - 6/5); BLEU = 100 * exp(-0.2) * 0.2**0.25 = 54.75
    assert corpus_bleu(["a b c d e"], ["a b c d f g"]).score == pytest.approx(54.7518, abs=1e-3)
    for hypotheses, references, options, remedy in (
        (["a"], ["a", "b"], {}, "got 1 hypotheses and 2 references; check that both cover the same test set"),
        ([], [], {}, "got none; pass the whole test set"),
        ("a", ["a"], {}, r"got one string; pass \[sentence\]"),
        (["a"], ["a"], {"tokenize": "moses"}, r"13a, .*got 'moses'; use '13a'"),
    ):
        with pytest.raises(ValueError, match=remedy):
            corpus_bleu(hypotheses, references, **options)


@pytest.mark.parametrize("lowercase", [False, True])
def test_score_line_and_signature_equal_those_of_sacrebleus_own_program(tmp_path: Path, lowercase: bool) -> None:
    (tmp_path / "ref").write_text("\n".join(REFERENCES).upper() + "\n", encoding="utf-8")
    (tmp_path / "hyp").write_text("\n".join(HYPOTHESES) + "\n", encoding="utf-8")
    command = [sys.executable, "-m", "sacrebleu", str(tmp_path / "ref"), "-i", str(tmp_path / "hyp")]
    command += ["--format", "text", "--width", "2", *(["--lowercase"] if lowercase else [])]
    theirs = subprocess.run(command, capture_output=True, text=True, check=True, encoding="utf-8").stdout.strip()
    ours = corpus_bleu(HYPOTHESES, [line.upper() for line in REFERENCES], lowercase=lowercase)
    assert ours.line == theirs and ours.signature in theirs and f"{ours.score:.2f}" in theirs
    assert f"case:{'lc' if lowercase else 'mixed'}" in ours.signature


def test_compound_split_bleu_counts_the_parts_of_a_compound(monkeypatch: Any) -> None:
    class MosesTokenizer:
        def __init__(self, lang: str) -> None:
            assert lang == "de"

        def tokenize(self, text: str, return_str: bool) -> str:
            return text

    # Only hyphens inside words are split.
    assert compound_split("rein-deutsch - aber -x y-") == "rein ##AT##-##AT## deutsch - aber -x y-"
    monkeypatch.setitem(sys.modules, "sacremoses", types.SimpleNamespace(MosesTokenizer=MosesTokenizer))
    # a b-c d -> a b # c d: 5 tokens against a b # e d: p1..p4 = 4/5, 2/4, 1/3, 0: unsmoothed, so 0
    assert compound_split_bleu(["a b-c d"], ["a b-e d"]).score == 0.0
    # one word more on the left: p1..p4 = 5/6, 3/5, 2/4, 1/3, product 1/12
    result = compound_split_bleu(["z a b-c d"], ["z a b-e d"])
    assert result.score == pytest.approx(100 * (1 / 12) ** 0.25)
    assert "tok:none|smooth:none" in result.signature
    monkeypatch.setitem(sys.modules, "sacremoses", None)
    with pytest.raises(ImportError, match="run `pip install sacremoses`, or use corpus_bleu"):
        compound_split_bleu(["a"], ["a"])


@pytest.mark.parametrize("num_beams", [1, 4])
@pytest.mark.parametrize("extra_tokens", [3, 12])
def test_batched_translations_equal_those_made_one_by_one(words: Any, num_beams: int, extra_tokens: int) -> None:
    options = {"num_beams": num_beams, "extra_tokens": extra_tokens}
    together = words(**options)
    assert together == [words([source], **options)[0] for source in SOURCES]
    assert together == words(max_tokens_per_batch=12, **options)
    assert len(set(together)) > 3, "the model must tell its sources apart for this test to mean anything"


@pytest.mark.parametrize("num_beams", [1, 3])
def test_no_translation_is_longer_than_its_own_source_allows(model: Any, words: Any, num_beams: int) -> None:
    model.final_logits_bias[0, 1] = -50.0  # never ends of its own accord
    # n words and eos may become n + 1 + 4 tokens, the last of which is eos
    lengths = [len(text.split()) for text in words(num_beams=num_beams, extra_tokens=4)]
    assert lengths == [len(source.split()) + 4 for source in SOURCES]


def test_padding_and_banned_words_of_the_checkpoint_are_never_generated(model: Any, words: Any) -> None:
    first = next(text.split()[0] for text in words() if text)
    model.generation_config.bad_words_ids = [[WORDS.index(first)]]
    assert first not in " ".join(words()).split()
    model.final_logits_bias[0, 0] = 50.0
    assert all(text.split() for text in words(SOURCES[:2], num_beams=2, extra_tokens=5))


def test_beams_and_length_penalty_reach_the_search(model: Any, words: Any) -> None:
    model.final_logits_bias[0, 1] = 2.0  # so that some translations end before their limit
    assert words(num_beams=1, extra_tokens=12) != words(num_beams=4, extra_tokens=12)
    short, long = (words(length_penalty=penalty, extra_tokens=12) for penalty in (-3.0, 3.0))
    assert sum(map(len, short)) < sum(map(len, long))


def test_neither_generation_values_of_the_checkpoint_nor_dropout_change_a_translation(model: Any, words: Any) -> None:
    expected = words()
    model.train()
    assert words() == expected
    config = model.generation_config
    config.update(num_beams=1, length_penalty=-3.0, do_sample=True, min_new_tokens=20, repetition_penalty=9.0)
    config.update(no_repeat_ngram_size=1, max_length=3, forced_eos_token_id=7, eos_token_id=9, pad_token_id=5)
    model.config.num_beams = 2  # transformers refuses generate() without a generation config after this
    assert words() == expected
    assert model.generation_config is config and config.no_repeat_ngram_size == 1


def test_every_module_gets_its_own_mode_back_even_after_a_failure(model: Any, words: Any, monkeypatch: Any) -> None:
    def out_of_memory(**_: Any) -> None:
        raise torch.OutOfMemoryError

    model.train()
    model.model.encoder.eval()  # a frozen part stays frozen
    config, before = model.generation_config, {name: module.training for name, module in model.named_modules()}
    words(SOURCES[:1])
    assert {name: module.training for name, module in model.named_modules()} == before
    monkeypatch.setattr(model, "generate", out_of_memory)
    with pytest.raises(torch.OutOfMemoryError):
        words()
    assert {name: module.training for name, module in model.named_modules()} == before
    assert model.generation_config is config


def test_sources_of_every_length_are_translated(tokenizer: Any, words: Any, caplog: Any) -> None:
    assert len(words([" ".join(["w1"] * 200), "w1"], num_beams=1)) == 2
    assert "1 of 2 sources are cut to the model's 128 positions" in caplog.text
    assert words([]) == []
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A")
    assert words([""]) == [""]


def test_bad_arguments_are_errors_with_their_remedy(model: Any, tokenizer: Any, words: Any) -> None:
    for call, remedy in (
        (lambda: words(num_beams=0), "num_beams of at least 1, got 0"),
        (lambda: words("w1"), r"pass \[sentence\]"),
        (lambda: translate(torch.nn.Linear(1, 1), tokenizer, SOURCES), "unwrap it first"),
        (lambda: (model.resize_token_embeddings(8), words()), r"below 8 .* same checkpoint"),
        (lambda: (setattr(tokenizer, "pad_token", None), words()), r"set tokenizer\.pad_token"),
    ):
        with pytest.raises(ValueError, match=remedy):
            call()


@pytest.fixture
def checkpoint(model: Any, tokenizer: Any, tmp_path: Path) -> Path:
    for saved in (model, tokenizer):
        saved.save_pretrained(tmp_path / "model")
    (tmp_path / "source.gz").write_bytes(gzip.compress("".join(f"{source}\n" for source in SOURCES).encode()))
    # a stray carriage return and a Unicode line separator end no line
    references = [*SOURCES[:-2], "w1\rw2", "w1\u2028w2"]
    (tmp_path / "reference").write_text("".join(f"{line}\n" for line in references), "utf-8", newline="\n")
    return tmp_path


def arguments(folder: Path, **changes: str | Path) -> list[str]:
    options = {"model": folder / "model", "source_file": folder / "source.gz", "reference_file": folder / "reference"}
    return [f"--{name}={value}" for name, value in (options | changes).items()]


def test_the_program_prints_a_score_and_one_json_document(checkpoint: Path, words: Any, capsys: Any) -> None:
    output = checkpoint / "translations"
    assert main([*arguments(checkpoint, output_file=output, num_beams="2"), "--lowercase"]) == 0
    printed = capsys.readouterr().out.strip().splitlines()
    document = json.loads(printed[-1])
    assert printed[:2] == [f"BLEU {document['bleu']:.2f}", document["line"]]
    assert "case:lc" in document["signature"] and document["signature"] in printed[2]
    assert (document["sentences"], document["num_beams"]) == (len(SOURCES), 2)
    assert output.read_text("utf-8").split("\n")[:-1] == words(num_beams=2, extra_tokens=50)


def test_bad_input_is_one_sentence(checkpoint: Path, refusal: Any, monkeypatch: Any) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    contents = {"one": b"w1\n", "latin-1": "ß\n".encode("latin-1"), "empty": b"", "empty.gz": gzip.compress(b"")}
    for name, raw in (contents | {"cut.gz": (checkpoint / "source.gz").read_bytes()[:-9]}).items():
        (checkpoint / name).write_bytes(raw)
    (checkpoint / "bare").mkdir()
    damaged, partial, mute = (checkpoint / name for name in ("damaged", "partial", "mute"))
    for folder in (damaged, partial, mute):
        shutil.copytree(checkpoint / "model", folder)
    (damaged / "model.safetensors").write_bytes(b"not weights")
    kept = {name: value for name, value in load_file(partial / "model.safetensors").items() if "fc1.w" not in name}
    save_file(kept, partial / "model.safetensors", metadata={"format": "pt"})
    for file in mute.glob("token*"):
        file.unlink()
    for changes, remedy in (
        ({"source_file": "missing"}, "check the path"),
        ({"reference_file": "one"}, "7 source lines and 1 references; check"),
        ({"reference_file": "latin-1"}, "convert it"),
        ({"source_file": "empty.gz", "reference_file": "empty"}, "pass the whole test set"),
        ({"source_file": "cut.gz"}, "check the path"),
        *(({"model": name}, "give the directory that save_pretrained wrote") for name in ("bare", "damaged", "mute")),
        ({"model": "partial"}, "fc1.weight"),
        ({"tokenize": "moses"}, "use '13a'"),
    ):
        given = {name: value if name == "tokenize" else checkpoint / value for name, value in changes.items()}
        assert main(arguments(checkpoint, **given)) == 2
        assert remedy in refusal(), changes


def test_the_program_starts_as_a_module(monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.delitem(sys.modules, "tritonsparse.eval.bleu")
    monkeypatch.setattr(sys, "argv", ["bleu", "--model=none", "--source_file=none", "--reference_file=none"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("tritonsparse.eval.bleu", run_name="__main__")
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("error: bleu: expected a readable file, got none")
