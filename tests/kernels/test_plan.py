"""Which products are fused, where blocks are skipped and 2:4 products taken, and on what grounds: measurements."""

import json
import tomllib
from pathlib import Path
from typing import Any

import make_plan_table
import pytest
import torch

from tritonsparse.kernels import measured, plan
from tritonsparse.kernels.plan import CARDS, FIELDS, choose, device_key, read_table

ROOT, BF16 = Path(__file__).parents[2], torch.bfloat16
H200, H100 = "NVIDIA H200", "NVIDIA H100 80GB HBM3"
# Names that torch gives to cards with other memory or another power limit.
UNKNOWN = [
    "NVIDIA H100 PCIe", "NVIDIA H100 NVL", "NVIDIA H200 NVL", "NVIDIA H200 MIG 1g.18gb", "NVIDIA H100", "NVIDIA H800",
    "NVIDIA GH200 480GB", "NVIDIA A100-SXM4-80GB", "Tesla V100-SXM2-16GB", "",
]  # fmt: skip


def entry(m: int, unfused: float, fused: float, **changed: Any) -> dict[str, Any]:
    case = {"device": "nvidia-h200", "op": "forward", "m": m, "n": 4096, "k": 1024, "dtype": "bfloat16", "kind": "soft"}
    return {**case, "unfused_ms": unfused, "fused_ms": fused, **changed}


def chosen(m: int, *entries: dict[str, Any], device: str = H200) -> plan.Choice:
    return choose("forward", m, 4096, 1024, BF16, "soft", device, table=entries)


@pytest.mark.parametrize("op", ["forward", "grad_input"])
@pytest.mark.parametrize("kind", ["soft", "hard", "step", "mask"])
@pytest.mark.parametrize("nk", [(1024, 1024), (4096, 14_336)])
def test_the_model_fuses_below_about_a_thousand_rows(op: str, kind: str, nk: tuple[int, int]) -> None:
    fused = [choose(op, m, *nk, BF16, kind, H200, table=()).fused for m in (1, 64, 512, 2048, 8192, 65_536)]
    assert fused == [True, True, True, False, False, False]


def test_the_model_s_milliseconds_by_hand_and_slower_memory_moves_the_crossover_up() -> None:
    def square(m: int, name: str) -> plan.Choice:
        return choose("forward", m, 4096, 4096, BF16, "soft", name, table=())

    # 8192 rows: 6 bytes of 2^24 weights at 4.3 TB/s, then 2^38 operations at 790 TFLOP/s: 0.0234 + 0.3479 ms.
    # The H100 has 3.0 TB/s: 0.0336 + 0.3479 ms.
    for name, ms, words in ((H200, 0.3714, "4.3 TB/s and 790 TFLOP/s"), (H100, 0.3815, "3 TB/s")):
        choice = square(8192, name)
        assert choice.predicted_ms == pytest.approx(ms, abs=1e-4) and words in choice.reason
    # Unfused takes 6 N K / B more, of which the fused product hides 4 behind its longer 2 L (1/r - 1) / P.
    last, slower = (max(m for m in range(256, 4096, 16) if square(m, name).fused) for name in (H200, H100))
    assert last < slower < 2 * last


@pytest.mark.parametrize("name", UNKNOWN)
@pytest.mark.parametrize("op", ["forward", "grad_input", "grad_weight", "conv_forward 3x3/1x1"])
def test_an_unknown_card_is_called_so_and_gets_nobody_s_rates(name: str, op: str) -> None:
    choice = choose(op, 64, 4096, 4096, BF16, "soft", name, table=())
    assert (choice.fused, choice.source, choice.predicted_ms) == (False, "unknown", None)
    assert f"unknown card {device_key(name)}" in choice.reason and "TB/s" not in choice.reason
    assert chosen(512, entry(512, 0.5, 0.25, device=device_key(name)), device=name).source == "measured"


def test_every_card_says_where_its_rates_are_from() -> None:
    # A key is the name of the folder of the card's results.
    assert list(CARDS) == ["nvidia-h200", "nvidia-h100-80gb-hbm3"]
    for key, card in CARDS.items():
        assert device_key(card.name) == key
        for source in (card.bandwidth_source, card.rate_source):
            assert source.startswith(("measured: ", "derived: ")) and "data sheet" in source
    assert CARDS["nvidia-h200"].measured and not CARDS["nvidia-h100-80gb-hbm3"].measured
    # Derived: 4.3 of 4.8 and 790 of 989 are measured on the H200.
    assert CARDS["nvidia-h100-80gb-hbm3"].bandwidth == pytest.approx(3.35e12 * 4.3 / 4.8, rel=0.01)


def test_a_fused_gradient_of_the_weight_is_chosen_only_where_it_was_measured_faster() -> None:
    shape: tuple[Any, ...] = ("grad_weight", 512, 4096, 1024, BF16, "soft", H200)
    choice = choose(*shape, table=())
    assert (choice.fused, choice.source, choice.predicted_ms) == (False, "analytic", None)
    choice = choose(*shape, table=(entry(512, 0.5, 0.25, op="grad_weight"),))
    assert (choice.fused, choice.source, choice.predicted_ms) == (True, "measured", 0.25)


def test_a_measurement_overrules_the_model_within_a_factor_of_two_of_its_rows() -> None:
    table = (entry(512, 0.25, 0.5), entry(2048, 0.5, 0.25))
    sources = {m: chosen(m, *table) for m in (200, 256, 1000, 2048)}
    assert {m: (choice.fused, choice.source) for m, choice in sources.items()} == {
        200: (True, "analytic"),
        256: (False, "measured"),  # 256 * 2 = 512
        1000: (False, "measured"),  # 1000 / 512 = 1.95 < 2048 / 1000 = 2.05
        2048: (True, "measured"),
    }
    assert sources[2048].predicted_ms == 0.25 and sources[1000].predicted_ms is None
    for other in ({"n": 1024, "k": 4096}, {"kind": "mask"}, {"dtype": "float32"}, {"device": "nvidia-h100"}):
        assert chosen(512, entry(512, 0.25, 0.5, **other)).source == "analytic"
    assert not chosen(512, entry(512, 0.5, 0.5)).fused


def test_every_entry_the_package_brings_is_whole() -> None:
    entries = read_table()
    assert all(set(found) == set(FIELDS) for found in entries)
    fields = json.loads((ROOT / "kernels" / "plan_table.json").read_text(encoding="utf-8"))["fields"]
    assert tuple(fields) == FIELDS
    for each in measured.read_block_table():
        layer = each["n"], each["k"], (each["rows"], each["columns"]), getattr(torch, each["dtype"])
        assert measured.break_even(*layer, each["device"]) == each["max_density"] and 0 <= each["max_density"] <= 1
    semi_structured = measured.read_semi_structured_table()
    assert all(set(each) == set(measured.SEMI_STRUCTURED_FIELDS) for each in semi_structured)
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert "plan_table.json" in settings["tool"]["setuptools"]["package-data"]["tritonsparse.kernels"]


def test_unknown_words_and_negative_sizes_are_refused() -> None:
    for op, m, kind, words in (
        ("backward", 1, "soft", "choose: expected op in"), ("forward", -1, "soft", "sizes of 0 or more"),
        ("forward", 1, "bits", r"kind in \['soft', 'hard', 'step', 'mask'\], got 'forward' and 'bits'; pass"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            choose(op, m, 1, 1, BF16, kind, H200)
    assert choose("forward", 0, 0, 0, BF16, "soft", H200, table=()).predicted_ms == 0.0


MEASURED = dict(zip(measured.FIELDS, ("nvidia-h200", 4096, 1024, 64, 64, "bfloat16", 0.6), strict=True))
LAYER: dict[str, Any] = {
    "n": 4096, "k": 1024, "block": (64, 64), "dtype": BF16, "device_name": "NVIDIA H200", "table": (MEASURED,),
}  # fmt: skip


def test_blocks_are_skipped_up_to_the_measured_density_and_no_further() -> None:
    choices = [measured.block_choice(**LAYER, density=density) for density in (0.1, 0.6, 0.61)]
    assert [skips for skips, _ in choices] == [True, True, False]
    assert "up to density 0.6" in choices[0][1] and "only" in choices[2][1]
    # Of what was not measured nothing is claimed.
    others = {"n": 1024, "k": 4096, "block": (32, 64), "dtype": torch.half, "device_name": "NVIDIA A100"}
    for name, value in others.items():
        skips, reason = measured.block_choice(**LAYER | {name: value}, density=0.01)
        assert not skips and "not measured" in reason and "backend='block'" in reason, name


@pytest.mark.parametrize(("k", "faster", "words"), [(1024, True, "measured faster"), (4096, False, "no faster"),
                                                    (2048, False, "not measured")])  # fmt: skip
def test_a_2_4_forward_is_taken_where_it_was_measured_faster(k: int, faster: bool, words: str) -> None:
    entry = dict(zip(measured.SEMI_STRUCTURED_FIELDS, ("nvidia-h200", 4096, 1024, "bfloat16", True), strict=True))
    table = (entry, {**entry, "k": 4096, "faster": False})
    taken, reason = measured.semi_structured_choice(4096, k, BF16, "NVIDIA H200", table=table)
    assert taken == faster and words in reason


def made(folder: Path, rows: list[dict[str, Any]], *entries: dict[str, Any]) -> dict[str, Any]:
    """What the program writes of results and of a table that has entries."""
    results, table = folder / "nvidia-h200", folder / "plan_table.json"
    results.mkdir()
    (results / "kernels.json").write_text(json.dumps({"one": {"rows": rows, "queue": {}}, "other": {"queue": {}}}))
    table.write_text(json.dumps({"fields": {}, "entries": entries, "blocks": [], "semi_structured": []}))
    make_plan_table.main([str(results / "kernels.json"), "--table", str(table)])
    return json.loads(table.read_text())


def test_the_table_is_made_of_cases_whose_two_providers_were_right(tmp_path: Path) -> None:
    case = {name: value for name, value in entry(512, 0, 0).items() if name in make_plan_table.CASE}

    def row(provider: str, median: float | None, **changed: Any) -> dict[str, Any]:
        return case | {"provider": provider, "verdict": "right", "median_ms": median} | changed

    rows = [
        *(row("fused", 0.25), row("unfused", 0.5), row("dense", 0.4)),
        *(row("fused", None, m=64, verdict="WRONG"), row("unfused", 0.5, m=64)),
        row("fused", 0.25, m=128),
    ]
    kept = entry(7, 1, 1, device="nvidia-a100")
    written = made(tmp_path, rows, entry(7, 1, 1), kept)["entries"]
    assert written == [kept, entry(512, 0.5, 0.25)]
    choice = chosen(512, *written)
    assert choice.fused and choice.source == "measured"


def test_a_layer_skips_blocks_at_densities_that_were_faster_at_every_number_of_tokens(tmp_path: Path) -> None:
    def row(m: int, density: float, speedup: float | None, **changed: Any) -> dict[str, Any]:
        facts = {"op": "step", "provider": "ours", "verdict": "right", "n": 4096, "k": 1024, "block": 64}
        return {**facts, "m": m, "dtype": "bfloat16", "density": density, "speedup": speedup, **changed}

    rows = [
        *(row(1024, density, speedup) for density, speedup in ((0.1, 3.0), (0.5, 1.2), (0.7, 1.01), (1.0, 0.9))),
        # Slower at .5, so that 1.1 at .7 counts for nothing.
        *(row(8192, density, speedup) for density, speedup in ((0.1, 4.0), (0.5, 0.99), (0.7, 1.1))),
        *(row(1024, 0.1, 0.5, n=1024), row(1024, 0.1, 9.0, n=512, op="forward")),
        *(row(1024, 0.1, None, n=256, verdict="WRONG"), row(1024, 0.1, 9.0, n=128, provider="stk")),
    ]
    written = made(tmp_path, rows, entry(7, 1, 1))
    assert written["entries"] == [entry(7, 1, 1)]
    blocks = tuple(written["blocks"])
    assert [(each["n"], each["max_density"]) for each in blocks] == [(1024, 0.0), (4096, 0.1)]
    assert measured.break_even(4096, 1024, (64, 64), BF16, H200, table=blocks) == 0.1
    assert not measured.block_choice(1024, 1024, (64, 64), 0.01, BF16, H200, table=blocks)[0]


def test_a_2_4_forward_is_faster_that_was_so_at_every_number_of_tokens(tmp_path: Path) -> None:
    def row(k: int, tokens: int, provider: str, median: float, op: str = "step") -> dict[str, Any]:
        facts = {"n": 4096, "k": k, "dtype": "bfloat16", "op": op, "verdict": "right"}
        return {**facts, "tokens": tokens, "provider": provider, "median_ms": median}

    rows = [
        *(row(1024, 64, "dense", 1.0), row(1024, 64, "2:4", 0.9)),
        *(row(1024, 8192, "dense", 1.0), row(1024, 8192, "2:4", 1.1)),
        *(row(2048, 64, "dense", 1.0), row(2048, 64, "2:4", 0.9), row(2048, 8192, "2:4", 9.0)),
        *(row(512, 64, "dense", 1.0, "forward"), row(512, 64, "2:4", 0.1, "forward")),
    ]
    found = made(tmp_path, rows)["semi_structured"]
    assert [(entry["k"], entry["faster"]) for entry in found] == [(1024, False), (2048, True)]
