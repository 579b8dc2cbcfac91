"""The benchmark of whole models: its check of a cut-off notices a wrong one, and what is slow is bounded in size."""

from __future__ import annotations

import bench_whole_model
import pytest
import torch

from tritonsparse.kernels.select.topk import topk_cutoff


def test_a_cut_off_is_checked_by_counting() -> None:
    # Magnitudes 4, 3, 3, 2, 1: of three kept, one is above the cut-off 3 and both ties are kept.
    weights = [torch.tensor([3.0, -1.0, 4.0]), torch.tensor([[-3.0], [2.0]])]
    cutoffs = {kept: topk_cutoff(weights, kept, magnitude=True, backend="torch") for kept in range(1, 6)}
    assert all(bench_whole_model.is_exact(weights, kept, cutoff) for kept, cutoff in cutoffs.items())
    wrong = [(kept, other) for kept in cutoffs for other in cutoffs if kept != other]
    assert not any(bench_whole_model.is_exact(weights, kept, cutoffs[other]) for kept, other in wrong)
    off_by_one = cutoffs[3]._replace(above=cutoffs[3].above + 1)
    assert not bench_whole_model.is_exact(weights, 3, off_by_one)


def test_what_is_slow_is_timed_on_a_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_whole_model, "SORTED", 100)
    monkeypatch.setattr(bench_whole_model, "RANKED", 10)
    rows = {row["provider"]: row for row in bench_whole_model.bench(bench_whole_model.SMOKE_CASES[1], samples=1)}
    assert {name: rows[name]["elements"] for name in ("select", "hinted", "read", "sort", "kthvalue")} == {
        "select": 561, "hinted": 561, "read": 561, "sort": 100, "kthvalue": 10,
    }  # fmt: skip
    # Bytes are of the elements that were ranked: four each.
    assert rows["sort"]["gb_per_s"] == pytest.approx(4 * 100 / rows["sort"]["median_ms"] / 1e6)
    assert all(row["verdict"] == "right" for row in rows.values())
