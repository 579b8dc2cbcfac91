"""The benchmark of block-sparse products: its break-even by hand, and what others cannot do."""

from __future__ import annotations

import bench_block
import block_products
import pytest


def of_times(times: dict[float, float]) -> list[bench_block.Row]:
    """Rows of "ours" beside a dense product that takes 1."""
    return [{"density": density, "speedup": 1 / time} for density, time in times.items()]


def test_break_even_is_where_a_line_between_measured_times_meets_the_dense_one() -> None:
    # From 1.2 at 1 to 0.7 at 0.5: two fifths of the way down.
    assert bench_block.break_even(of_times({1.0: 1.2, 0.5: 0.7, 0.1: 0.2})) == pytest.approx(0.8)
    assert bench_block.break_even(of_times({1.0: 1.0, 0.5: 0.7})) == 1.0
    assert bench_block.break_even(of_times({1.0: 3.0, 0.5: 2.0})) is None
    # A density whose result was wrong has no time.
    rows = [{"density": 1.0}, *of_times({0.5: 1.5, 0.1: 0.5})]
    assert bench_block.break_even(rows) == pytest.approx(0.3)


def test_another_library_that_fails_is_a_row_with_its_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(*_: object) -> block_products.Provider:
        raise RuntimeError("no such operator")

    made = block_products.providers_of(16, 0.5, "step", others=True, tune=False, tiles=False)
    monkeypatch.setattr(bench_block, "providers_of", lambda *_, **__: made | {"torch bsr": absent})
    rows = list(bench_block.bench(bench_block.SMOKE_CASES[0], 7, 16, 0.5, "step"))
    assert [row["verdict"] for row in rows] == ["right"] * 3 + ["failed"]
    assert "no such operator" in rows[3]["failure"] and "median_ms" not in rows[3]
    assert rows[2]["of_ideal"] == pytest.approx(rows[2]["speedup"] * 0.5)


def test_other_configurations_are_lines_of_their_own() -> None:
    rows = list(bench_block.bench(bench_block.SMOKE_CASES[0], 7, 16, 0.5, "forward", tiles=True))
    names = [row["provider"] for row in rows]
    assert names[:4] == ["dense random", "dense masked", "ours", "ours, pointers"] and len(names) == 7
    assert {row["verdict"] for row in rows} == {"right"}
    assert block_products.other_tiles(64)["512 rows"]["m"] == 512
