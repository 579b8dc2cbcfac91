"""What BLEU and the translations under it promise."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import MarianConfig, MarianMTModel, PreTrainedTokenizerFast

from tritonsparse.eval.bleu import compound_split, compound_split_bleu, corpus_bleu, main, translate

WORDS = ["pad", "eos", "unk", *(f"w{i}" for i in range(29))]
HYPOTHESES = ["Der Hund, der bellt, beißt nicht oft.", "Das ist ein kleines Haus am See.", "Guten Morgen!"]
REFERENCES = ["Der Hund, der bellt, beißt nicht.", "Das ist ein kleines Haus an einem See.", "Guten Morgen!"]
SOURCES = ["w1 w2 w3", "w4", "w9 w8 w7 w6 w5 w4 w3 w2 w1", "", "w5 w6", "w4 w4 w28 w1 w2", "w20"]


@pytest.fixture(autouse=True)
def one_thread():
    """On a busy machine, threads waiting for each other over 16 x 16 matrices take minutes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="unk"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(single="$A eos", special_tokens=[("eos", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="pad", eos_token="eos", unk_token="unk")


@pytest.fixture
def model() -> MarianMTModel:
    """Random, with weights large enough that beams and sentences differ."""
    torch.manual_seed(3)
    config = MarianConfig(
        vocab_size=len(WORDS),
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        max_position_embeddings=128,
        init_std=0.5,
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=1,
        forced_eos_token_id=None,
    )
    return MarianMTModel(config).eval()


# --- the score


def test_identical_text_scores_100():
    assert corpus_bleu(REFERENCES, REFERENCES).score == pytest.approx(100.0)


def test_a_score_worked_out_by_hand():
    # hypothesis a b c d e (5 words), reference a b c d f g (6 words):
    # p1..p4 = 4/5, 3/4, 2/3, 1/2; product 1/5; BP = exp(1 - 6/5); BLEU = 100 * exp(-0.2) * 0.2**0.25 = 54.75
    assert corpus_bleu(["a b c d e"], ["a b c d f g"]).score == pytest.approx(54.7518, abs=1e-3)


@pytest.mark.parametrize("lowercase", [False, True])
def test_score_line_and_signature_equal_those_of_sacrebleus_own_program(tmp_path: Path, lowercase: bool):
    (tmp_path / "ref").write_text("\n".join(REFERENCES).upper() + "\n", encoding="utf-8")
    (tmp_path / "hyp").write_text("\n".join(HYPOTHESES) + "\n", encoding="utf-8")
    command = [sys.executable, "-m", "sacrebleu", str(tmp_path / "ref"), "-i", str(tmp_path / "hyp")]
    command += ["--format", "text", "--width", "2", *(["--lowercase"] if lowercase else [])]
    theirs = subprocess.run(command, capture_output=True, text=True, check=True, encoding="utf-8").stdout.strip()
    ours = corpus_bleu(HYPOTHESES, [line.upper() for line in REFERENCES], lowercase=lowercase)
    assert ours.line == theirs
    assert ours.signature in theirs
    assert f"{ours.score:.2f}" in theirs
    assert f"case:{'lc' if lowercase else 'mixed'}" in ours.signature


@pytest.mark.parametrize(
    ("hypotheses", "references", "remedy"),
    [
        (["a"], ["a", "b"], "got 1 hypotheses and 2 references; check that both cover the same test set"),
        ([], [], "got none; pass the whole test set"),
        ("a", ["a"], r"got one string; pass \[sentence\]"),
    ],
)
def test_what_cannot_be_scored_is_an_error_with_its_remedy(hypotheses, references, remedy):
    with pytest.raises(ValueError, match=remedy):
        corpus_bleu(hypotheses, references)


def test_an_unknown_tokenizer_is_an_error_that_names_the_known_ones():
    with pytest.raises(ValueError, match=r"13a, .*got 'moses'; use '13a'"):
        corpus_bleu(["a"], ["a"], tokenize="moses")


# --- the older papers' score


def test_only_hyphens_inside_words_are_split():
    assert compound_split("rein-deutsch - aber -x y-") == "rein ##AT##-##AT## deutsch - aber -x y-"


def test_compound_split_bleu_counts_the_parts_of_a_compound(monkeypatch):
    class MosesTokenizer:
        def __init__(self, lang: str) -> None:
            assert lang == "de"

        def tokenize(self, text: str, return_str: bool) -> str:
            return text

    monkeypatch.setitem(sys.modules, "sacremoses", types.SimpleNamespace(MosesTokenizer=MosesTokenizer))
    # a b-c d -> a b # c d: 5 tokens against a b # e d: p1..p4 = 4/5, 2/4, 1/3, 0: unsmoothed, so 0
    assert compound_split_bleu(["a b-c d"], ["a b-e d"]).score == 0.0
    # one word more on the left: p1..p4 = 5/6, 3/5, 2/4, 1/3, product 1/12
    result = compound_split_bleu(["z a b-c d"], ["z a b-e d"])
    assert result.score == pytest.approx(100 * (1 / 12) ** 0.25)
    assert "tok:none|smooth:none" in result.signature


def test_without_sacremoses_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sacremoses", None)
    with pytest.raises(ImportError, match="run `pip install sacremoses`, or use corpus_bleu"):
        compound_split_bleu(["a"], ["a"])


# --- translations


@pytest.mark.parametrize("num_beams", [1, 4])
@pytest.mark.parametrize("extra_tokens", [3, 20])
def test_batched_translations_equal_those_made_one_by_one(model, tokenizer, num_beams, extra_tokens):
    options = {"num_beams": num_beams, "extra_tokens": extra_tokens}
    together = translate(model, tokenizer, SOURCES, **options)
    assert together == [translate(model, tokenizer, [source], **options)[0] for source in SOURCES]
    assert together == translate(model, tokenizer, SOURCES, max_tokens_per_batch=12, **options)
    assert len(set(together)) > 3, "the model must tell its sources apart for this test to mean anything"


@pytest.mark.parametrize("num_beams", [1, 3])
def test_no_translation_is_longer_than_its_own_source_allows(model, tokenizer, num_beams):
    model.final_logits_bias[0, 1] = -50.0  # never ends of its own accord
    translations = translate(model, tokenizer, SOURCES, num_beams=num_beams, extra_tokens=4)
    # n words and eos may become n + 1 + 4 tokens, the last of which is eos
    assert [len(text.split()) for text in translations] == [len(source.split()) + 4 for source in SOURCES]


def test_padding_is_never_generated(model, tokenizer):
    model.final_logits_bias[0, 0] = 50.0
    for text in translate(model, tokenizer, SOURCES[:2], num_beams=2, extra_tokens=5):
        assert text.split()


def test_beams_and_length_penalty_reach_the_search(model, tokenizer):
    def words(**options) -> list[str]:
        return translate(model, tokenizer, SOURCES, extra_tokens=12, **options)

    model.final_logits_bias[0, 1] = 2.0  # so that some translations end before their limit
    assert words(num_beams=1) != words(num_beams=4)
    short, long = words(length_penalty=-3.0), words(length_penalty=3.0)
    assert sum(map(len, short)) < sum(map(len, long))


def test_generation_values_of_the_checkpoint_do_not_change_a_translation(model, tokenizer):
    expected = translate(model, tokenizer, SOURCES)
    config = model.generation_config
    config.update(num_beams=1, length_penalty=-3.0, do_sample=True, min_new_tokens=20, repetition_penalty=9.0)
    config.update(no_repeat_ngram_size=1, max_length=3, forced_eos_token_id=7, eos_token_id=9, pad_token_id=5)
    model.config.num_beams = 2  # transformers refuses generate() without a generation config after this
    assert translate(model, tokenizer, SOURCES) == expected
    assert model.generation_config is config
    assert config.no_repeat_ngram_size == 1


def test_banned_words_of_the_checkpoint_stay_banned(model, tokenizer):
    first = next(text.split()[0] for text in translate(model, tokenizer, SOURCES) if text)
    model.generation_config.bad_words_ids = [[WORDS.index(first)]]
    assert first not in " ".join(translate(model, tokenizer, SOURCES)).split()


def test_every_module_gets_its_own_mode_back_even_after_a_failure(model, tokenizer, monkeypatch):
    model.train()
    model.model.encoder.eval()  # a frozen part stays frozen
    before = {name: module.training for name, module in model.named_modules()}
    translate(model, tokenizer, SOURCES[:1])
    assert {name: module.training for name, module in model.named_modules()} == before

    def out_of_memory(**_):
        raise torch.OutOfMemoryError

    config = model.generation_config
    monkeypatch.setattr(model, "generate", out_of_memory)
    with pytest.raises(torch.OutOfMemoryError):
        translate(model, tokenizer, SOURCES)
    assert {name: module.training for name, module in model.named_modules()} == before
    assert model.generation_config is config


def test_dropout_does_not_reach_a_translation(model, tokenizer):
    expected = translate(model, tokenizer, SOURCES)
    assert translate(model.train(), tokenizer, SOURCES) == expected


def test_an_empty_slice_and_a_sentence_without_tokens_are_translated_to_nothing(model, tokenizer):
    assert translate(model, tokenizer, []) == []
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A")
    assert translate(model, tokenizer, [""]) == [""]


def test_a_source_beyond_the_models_positions_is_cut_and_logged(model, tokenizer, caplog):
    long = " ".join(["w1"] * 200)
    assert len(translate(model, tokenizer, [long, "w1"], num_beams=1)) == 2
    assert "1 of 2 sources are cut to the model's 128 positions" in caplog.text


def test_bad_arguments_are_errors_with_their_remedy(model, tokenizer):
    with pytest.raises(ValueError, match="num_beams of at least 1, got 0"):
        translate(model, tokenizer, SOURCES, num_beams=0)
    with pytest.raises(ValueError, match=r"pass \[sentence\]"):
        translate(model, tokenizer, "w1")
    with pytest.raises(ValueError, match="unwrap it first"):
        translate(torch.nn.Linear(1, 1), tokenizer, SOURCES)
    model.resize_token_embeddings(8)
    with pytest.raises(ValueError, match=r"below 8 .* same checkpoint"):
        translate(model, tokenizer, SOURCES)
    tokenizer.pad_token = None
    with pytest.raises(ValueError, match=r"set tokenizer\.pad_token"):
        translate(model, tokenizer, SOURCES)


# --- the program


@pytest.fixture
def checkpoint(model, tokenizer, tmp_path: Path) -> Path:
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    with gzip.open(tmp_path / "source.gz", "wt", encoding="utf-8") as file:
        file.write("".join(f"{source}\n" for source in SOURCES))
    # a stray carriage return and a Unicode line separator end no line
    references = [*SOURCES[:-2], "w1\rw2", "w1\u2028w2"]
    (tmp_path / "reference").write_text("".join(f"{line}\n" for line in references), "utf-8", newline="\n")
    return tmp_path


def arguments(folder: Path, **changes: str) -> list[str]:
    options = {"model": folder / "model", "source_file": folder / "source.gz"}
    options |= {"reference_file": folder / "reference", **changes}
    return [part for name, value in options.items() for part in (f"--{name}", str(value))]


def test_the_program_prints_score_line_signature_and_one_json_document(checkpoint, model, tokenizer, capsys):
    output = checkpoint / "translations"
    assert main([*arguments(checkpoint, output_file=output, num_beams="2"), "--lowercase"]) == 0
    printed = capsys.readouterr().out.strip().splitlines()
    document = json.loads(printed[-1])
    assert printed[0] == f"BLEU {document['bleu']:.2f}"
    assert printed[1] == document["line"]
    assert "case:lc" in document["signature"] and document["signature"] in printed[2]
    assert (document["sentences"], document["num_beams"]) == (len(SOURCES), 2)
    assert output.read_text("utf-8").split("\n")[:-1] == translate(model, tokenizer, SOURCES, num_beams=2)


def spoil(folder: Path, kind: str) -> dict[str, str]:
    """Damages one thing in `folder`; returns the arguments that lead to it."""
    bad = folder / "bad"
    if kind == "missing file":
        return {"source_file": str(bad)}
    if kind == "unequal":
        bad.write_text("w1\n", "utf-8")
    elif kind == "latin-1":
        bad.write_bytes("ß\n".encode("latin-1"))
    elif kind == "empty":
        (folder / "source.gz").write_bytes(gzip.compress(b""))
        bad.write_bytes(b"")
    elif kind == "cut gzip":
        cut = folder / "cut.gz"
        cut.write_bytes((folder / "source.gz").read_bytes()[:-9])
        return {"source_file": str(cut)}
    elif kind == "no checkpoint":
        bad.mkdir()
        return {"model": str(bad)}
    elif kind == "damaged weights":
        (folder / "model" / "model.safetensors").write_bytes(b"not weights")
        return {}
    elif kind == "incomplete weights":
        from safetensors.torch import load_file, save_file

        weights = folder / "model" / "model.safetensors"
        kept = {name: value for name, value in load_file(weights).items() if not name.endswith("fc1.weight")}
        save_file(kept, weights, metadata={"format": "pt"})
        return {}
    elif kind == "no tokenizer":
        for file in (folder / "model").glob("token*"):
            file.unlink()
        return {}
    elif kind == "unknown tokenizer":
        return {"tokenize": "moses"}
    return {"reference_file": str(bad)}


@pytest.mark.parametrize(
    ("kind", "remedy"),
    [
        ("missing file", "check the path"),
        ("unequal", "7 source lines and 1 references; check"),
        ("latin-1", "convert it"),
        ("empty", "pass the whole test set"),
        ("cut gzip", "check the path"),
        ("no checkpoint", "give the directory that save_pretrained wrote"),
        ("damaged weights", "give the directory that save_pretrained wrote"),
        ("incomplete weights", "fc1.weight"),
        ("no tokenizer", "give the directory that save_pretrained wrote"),
        ("unknown tokenizer", "use '13a'"),
    ],
)
def test_bad_input_is_one_sentence_and_a_failing_exit_status(checkpoint, capsys, monkeypatch, kind, remedy):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert main(arguments(checkpoint, **spoil(checkpoint, kind))) == 1
    captured = capsys.readouterr()
    errors = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and remedy in errors[0]
    assert "Traceback" not in captured.err
    assert captured.out == ""


def test_the_program_starts_as_a_module(tmp_path: Path):
    command = [sys.executable, "-m", "tritonsparse.eval.bleu", "--model", "none"]
    command += ["--source_file", "none", "--reference_file", "none"]
    finished = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert finished.returncode == 1
    assert finished.stderr.strip().splitlines()[-1].startswith("error: bleu: expected a readable file, got none")
