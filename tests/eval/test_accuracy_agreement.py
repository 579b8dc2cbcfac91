"""Accuracy and the agreement of twins: exact by hand, over any batching and ranks, and from the command line."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tritonsparse.eval import accuracy as accuracy_program
from tritonsparse.eval.accuracy import Accuracy, Sums, accuracy, accuracy_sums
from tritonsparse.eval.agreement import Agreement, agreement, classification, language, main, translation
from tritonsparse.eval.image_sets import ImageSet, load_images
from tritonsparse.eval.preprocessing import Preprocessing, channel_statistics
from tritonsparse.models.cifar_resnet import CifarResNetConfig, CifarResNetForImageClassification
from tritonsparse.models.transfo_xl import Vocabulary
from tritonsparse.train.images.batch_norm import reestimate
from tritonsparse.train.text.subwords import train_tokenizer

PLAIN = Preprocessing((0.0,), (1.0,))
EMBEDDED = ["--dataset_name", "embedded", "--device", "cpu"]


class Scripted(nn.Module):
    """Logits by the first pixel's value: row i of a table."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.table = nn.Parameter(table)

    def forward(self, pixel_values: Tensor) -> SimpleNamespace:
        rows = (pixel_values[:, 0, 0, 0] * 255).round().long()
        return SimpleNamespace(logits=self.table[rows])


def images(labels: list[int]) -> ImageSet:
    pixels = torch.arange(len(labels), dtype=torch.uint8)[:, None, None, None].expand(-1, 1, 2, 2)
    return ImageSet(torch.tensor(labels), [str(i) for i in range(7)], pixels)


def build() -> CifarResNetForImageClassification:
    torch.manual_seed(0)
    return CifarResNetForImageClassification(CifarResNetConfig(depth=8, widths=[4, 4, 8], num_channels=1, image_size=8))


def test_top1_top5_and_loss_are_counted_by_hand() -> None:
    # Row 0: label 0 first. Row 1: label 4 is fifth. Row 2: label 6 is sixth, out of five. Row 3: all alike.
    table = torch.tensor([
        [9.0, 1, 1, 1, 1, 1, 1], [5, 4, 2, 3, 1, 0, 0], [6, 5, 4, 3, 2, 0, 1], [0, 0, 0, 0, 0, 0, 0],
    ])  # fmt: skip
    labels = [0, 4, 6, 0]
    found = accuracy(Scripted(table), images(labels), PLAIN, batch_size=3)
    pairs = zip(table.tolist(), labels, strict=True)
    losses = [math.log(sum(math.exp(value) for value in row)) - row[label] for row, label in pairs]
    # The tie of row 3 is topk's: label 0 may or may not come first, but it is counted as one of them.
    assert found.images == 4 and found.top1 in (0.25, 0.5) and found.top5 in (0.5, 0.75)
    assert found.loss == pytest.approx(sum(losses) / 4, rel=1e-6)
    three = accuracy(Scripted(table[:3]), images(labels[:3]), PLAIN)
    assert (three.top1, three.top5) == pytest.approx((1 / 3, 2 / 3))
    # Fewer than six classes are always among five; other labels can be asked about.
    assert accuracy(Scripted(torch.randn(4, 3)), images([0, 1, 2, 0]), PLAIN).top5 == 1.0
    certain, truth = Scripted(torch.eye(7)[:4]), images([0, 1, 2, 3])
    assert accuracy_sums(certain, truth, PLAIN).mean().top1 == 1.0
    assert accuracy_sums(certain, truth, PLAIN, labels=torch.tensor([0, 0, 0, 3])).mean().top1 == 0.5


@pytest.mark.parametrize("world", [1, 2, 3])
def test_ranks_and_batches_add_up_to_the_whole(world: int) -> None:
    torch.manual_seed(0)
    model, tests = Scripted(torch.randn(10, 7)), images(torch.randint(7, (10,)).tolist())
    whole = accuracy(model, tests, PLAIN, batch_size=10)
    parts = [accuracy_sums(model, tests, PLAIN, batch_size=2, rank=rank, world=world).values for rank in range(world)]
    found = Sums(torch.stack(parts).sum(0)).mean()
    assert (found.top1, found.top5, found.images) == (whole.top1, whole.top5, 10)
    assert found.loss == pytest.approx(whole.loss, rel=1e-6)


def test_the_model_is_evaluated_in_evaluation_mode_and_left_as_it_was() -> None:
    model, digits = build().train(), load_images("embedded")["test"]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    preprocessing = Preprocessing(*channel_statistics(digits))
    first = accuracy(model, digits, preprocessing, batch_size=100)
    assert model.training and first == accuracy(model, digits, preprocessing, batch_size=100)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())


def test_twins_are_compared_image_by_image() -> None:
    # First choices 0, 1, 2 against 0, 2, 2; certain twins, so that the cross-entropy is the model's own loss on them.
    twin = torch.tensor([[99.0, 0, 0], [0, 99, 0], [0, 0, 99]])
    model = torch.tensor([[2.0, 0, 0], [0, 0, 1], [0, 0, 3]])
    first, second = Scripted(twin).train(), Scripted(model).eval()
    found = accuracy_program.twins_agreement(first, second, images([0, 0, 0]), PLAIN, batch_size=2)
    losses = [math.log(math.exp(right) + 1 + math.exp(other)) - right for right, other in ((2, 0), (0, 1), (3, 0))]
    assert found.agreement == pytest.approx(2 / 3) and found.predictions == 3
    assert found.cross_entropy == pytest.approx(sum(losses) / 3, rel=1e-6) and found.entropy < 1e-6
    assert first.training and not second.training


def test_the_command_line_reads_a_saved_model_and_compares_twins(tmp_path: Path, document: Any) -> None:
    digits = load_images("embedded")
    preprocessing, model = Preprocessing(*channel_statistics(digits["train"])), build()
    expected = accuracy(model, digits["test"], preprocessing)
    for name in ("sparse", "dense"):
        model.save_pretrained(tmp_path / name)
        preprocessing.save(tmp_path / name)
        with torch.no_grad():
            model.blocks[0].get_parameter("conv1.weight").zero_()  # the second is another model

    def run(*options: str) -> Any:
        assert accuracy_program.main(["--model", str(tmp_path / "sparse"), *EMBEDDED, *options]) == 0
        return document()

    printed = run()
    assert Accuracy(**{key: printed[key] for key in ("top1", "top5", "loss", "images")}) == expected
    assert run("--max_samples", "10")["images"] == 10
    itself, other = (run("--twin", str(tmp_path / name))["twin"] for name in ("sparse", "dense"))
    assert itself["agreement"] == 1.0 and itself["top1"] == expected.top1
    assert itself["cross_entropy"] == pytest.approx(itself["entropy"])
    assert other["cross_entropy"] > other["entropy"] and other["predictions"] == other["images"] == expected.images


def test_bad_input_is_one_sentence(tmp_path: Path, refusal: Any) -> None:
    for name, mean in (("model", 0.3), ("other", 0.5)):
        build().save_pretrained(tmp_path / name)
        Preprocessing((mean,), (0.4,)).save(tmp_path / name)
    for options, words in (
        ([*EMBEDDED, "--split", "validation"], "--split among train, test"),
        (["--data_dir", "nowhere"], "IDX files"),
        ([], "a dataset's name or a folder"),
        ([*EMBEDDED, "--twin", str(tmp_path / "other")], "same classes and preprocessing"),
    ):
        assert accuracy_program.main(["--model", str(tmp_path / "model"), *options]) == 2
        assert words in refusal()


def test_reestimated_statistics_are_the_plain_averages_over_the_batches() -> None:
    class Named(nn.Sequential):
        def forward(self, pixel_values: Tensor) -> Tensor:
            return super().forward(pixel_values)

    model = Named(nn.Conv2d(1, 3, 1), nn.BatchNorm2d(3), nn.Dropout(0.5)).train()
    batches = [torch.randn(5, 1, 4, 4) + shift for shift in (0.0, 2.0, -1.0)]
    with torch.no_grad():
        outputs = [model[0](batch).transpose(0, 1).flatten(1).double() for batch in batches]
    model[1].running_mean.fill_(7.0)
    model[2].eval()
    assert reestimate(model, batches) == 1
    mean = torch.stack([output.mean(1) for output in outputs]).mean(0)
    variance = torch.stack([output.var(1) for output in outputs]).mean(0)
    assert torch.allclose(model[1].running_mean.double(), mean, atol=1e-6)
    assert torch.allclose(model[1].running_var.double(), variance, rtol=1e-5)
    assert model[1].momentum == 0.1 and model[0].training and not model[2].training
    assert reestimate(nn.Sequential(nn.Linear(2, 2)), []) == 0


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


def test_a_model_agrees_with_itself_and_what_cannot_be_compared_is_refused(transfo_xl: Build, gpt: Build) -> None:
    for model in (transfo_xl(mem_len=60).train(), gpt().train()):
        found = language(model, copy.deepcopy(model), STREAM, tgt_len=7, window=8)
        assert (found.agreement, found.predictions) == (1.0, 49)
        assert found.cross_entropy == pytest.approx(found.entropy, rel=1e-6)
        assert model.training
    zeros = torch.zeros(2, 2)
    for compare, words in (
        (lambda: agreement([(zeros[:1], torch.zeros(1, 3), None)]), r"equal shape, got \[1, 2\] and \[1, 3\]"),
        (lambda: agreement([(zeros, zeros, torch.zeros(2, dtype=torch.bool))]), "at least one prediction"),
        (lambda: language(transfo_xl(), gpt(), STREAM), "two models of one kind"),
        (lambda: translation(None, None, None, ["a"], []), "a reference for each source"),
    ):
        with pytest.raises(ValueError, match=words):
            compare()


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
        assert main([*options, *given]) == 2
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
    assert main([*options, files[0]]) == 2
    assert "expected --text_file, or --source_file" in refusal()
