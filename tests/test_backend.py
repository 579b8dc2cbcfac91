"""Which code computes a layer's products: `auto` goes by measurements, and what was asked for is never replaced."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tritonsparse as ts
from tritonsparse import topologies
from tritonsparse.kernels import _triton, measured, plan
from tritonsparse.kernels.conv.geometry import Geometry
from tritonsparse.layers import SparseLinear, backend, conv2d, linear
from tritonsparse.layers.backend import Backend, check_semi_structured, choose_backend, product_is_fused
from tritonsparse.layers.cache import Cache
from tritonsparse.pattern import NM, Block, Unstructured

BF16, F32 = torch.bfloat16, torch.float32
TWO_OF_FOUR, BOTH_WAYS, NO_PATTERN = NM(2, 4), NM(2, 4, transposable=True), Unstructured()


class OnGpu(Tensor):
    """Lies where it lies, and says that it is on a GPU; `torch.cuda` names an H200."""

    is_cuda = True  # type: ignore[assignment]


def on_gpu(*shape: int, dtype: torch.dtype = F32) -> Tensor:
    return torch.zeros(*shape, dtype=dtype).as_subclass(OnGpu)


@pytest.fixture(autouse=True)
def tables(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, list[dict[str, Any]]]]:
    """The measurements of products, of blocks and of 2:4 products: empty until a test adds to them."""
    rows: dict[str, list[dict[str, Any]]] = {"read_table": [], "read_block_table": [], "read_semi_structured_table": []}
    for name, found in rows.items():
        monkeypatch.setattr(plan if name == "read_table" else measured, name, lambda found=found: tuple(found))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA H200")
    monkeypatch.setattr(_triton, "AVAILABLE", True)
    forget()
    yield rows
    forget()


def forget() -> None:
    backend._planned.cache_clear()
    backend._conv_planned.cache_clear()


def row(fields: Any, *values: Any) -> dict[str, Any]:
    return dict(zip(fields, ("nvidia-h200", *values), strict=True))


def test_auto_follows_the_device_and_a_name_is_taken_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    here, there = torch.zeros(64, 64), on_gpu(64, 64)
    found = choose_backend("auto", here, (64, 64), NO_PATTERN)
    assert found == Backend("auto", "torch", "auto: no GPU") and found.elementwise == "torch"
    found = choose_backend("auto", there, (64, 64), NO_PATTERN)
    assert (found.name, found.elementwise) == ("triton", "triton") and "analytic" in found.reason
    for asked in ("torch", "triton", "fused", "block", "semi_structured"):
        for weight, pattern in ((here, NO_PATTERN), (here, BOTH_WAYS), (there, TWO_OF_FOUR), (there, BOTH_WAYS)):
            # The 2:4 product is torch's own, and needs no Triton where there is none.
            without = asked == "semi_structured" and weight is here
            found = choose_backend(asked, weight, (64, 64), pattern)
            assert found == Backend(asked, asked, "asked for", pattern == BOTH_WAYS, without)
            assert found.elementwise == ("torch" if without or asked == "torch" else "triton")
    monkeypatch.setattr(_triton, "AVAILABLE", False)
    assert choose_backend("auto", there, None, NO_PATTERN).reason == "auto: Triton is not installed"


# Whether the 2:4 products of [64, 32], and those of its transpose, were measured faster.
FASTER: list[tuple[NM, bool | None, bool | None, tuple[str, bool]]] = [
    (TWO_OF_FOUR, True, None, ("semi_structured", False)), (TWO_OF_FOUR, True, True, ("semi_structured", False)),
    (BOTH_WAYS, True, True, ("semi_structured", True)), (BOTH_WAYS, True, False, ("semi_structured", False)),
    (BOTH_WAYS, False, True, ("triton", True)), (TWO_OF_FOUR, None, None, ("triton", False)),
    (NM(1, 4), True, None, ("triton", False)),
]  # fmt: skip


@pytest.mark.parametrize(("pattern", "forward", "backward", "expected"), FASTER)
def test_auto_takes_faster_2_4_products(tables: Any, pattern: NM, forward: Any, backward: Any, expected: Any) -> None:
    for n, k, each in ((64, 32, forward), (32, 64, backward)):
        found = [] if each is None else [row(measured.SEMI_STRUCTURED_FIELDS, n, k, "bfloat16", each)]
        tables["read_semi_structured_table"] += found
    # Master weights in float32 are multiplied in bfloat16.
    found = choose_backend("auto", on_gpu(64, 32), (64, 32), pattern)
    assert (found.name, found.sparse_grad_input) == expected
    assert choose_backend("auto", on_gpu(64, 32, dtype=torch.float16), (64, 32), pattern).name == "triton"
    assert choose_backend("auto", on_gpu(64, 32), None, pattern).name == "triton"


def test_2_4_products_that_were_asked_for_name_the_layer_that_they_do_not_take() -> None:
    for shape, pattern, words in (
        ((64, 32, 1, 1), TWO_OF_FOUR, "it is a convolution"),
        ((64, 68), TWO_OF_FOUR, "got fc: "),
        ((72, 64), BOTH_WAYS, "got fc: "),
    ):
        shapes = {"ok": (64, 64), "fc": shape}
        check_semi_structured("auto", shapes, pattern)
        with pytest.raises(ValueError, match=f"sparsify: expected layers that 2:4 products take.*{words}.*exclude it"):
            check_semi_structured("semi_structured", shapes, pattern)
    check_semi_structured("semi_structured", {"ok": (64, 64), "fc": (64, 64)}, TWO_OF_FOUR)


@pytest.mark.parametrize("before", ["triton", "block"])
def test_blocks_are_skipped_up_to_the_density_at_which_that_was_measured_faster(tables: Any, before: str) -> None:
    tables["read_block_table"].append(row(measured.FIELDS, 128, 64, 32, 16, "bfloat16", 0.6))
    for density, dtype, name, words in (
        (0.6, F32, "block", "up to density 0.6, and 0.6 is kept"),
        (0.61, BF16, "triton", "up to density 0.6 only, and 0.61 is kept"),
        (0.1, torch.float16, "triton", "not measured"),
    ):
        old = Backend("auto", before, "decided before")
        found = backend.follow_density(old, on_gpu(128, 64, dtype=dtype), (128, 64), (32, 16), density)
        assert found.name == name and words in found.reason and found == replace(old, name=name, reason=found.reason)


def test_auto_decides_on_blocks_at_first_and_after_every_hundred_changes_of_a_mask(monkeypatch: Any) -> None:
    seen: list[tuple[Any, ...]] = []
    model = nn.Sequential(nn.Linear(32, 64), nn.Linear(64, 32))
    sparsifier = ts.sparsify(model, "static", sparsity=0.5, pattern="block:16", include=["0"])
    layer = sparsifier.layers["0"]
    assert not layer.follows_density
    monkeypatch.setattr(SparseLinear, "follows_density", True)
    monkeypatch.setattr(topologies, "follow_density", lambda old, *rest: (seen.append(rest[1:]), old)[1])
    owner = topologies.Topologies(sparsifier.layers)
    for change in range(topologies.DECIDE_EVERY + 2):
        owner.write()
        owner.write()  # nothing has changed
        assert len(seen) == (2 if change > topologies.DECIDE_EVERY else 1)
        layer.mask.copy_(~layer.mask)
    assert seen[0] == ((64, 32), (16, 16), 0.5)


def sparse(layer: nn.Module, change: dict[str, Any]) -> Any:
    """The layer, sparse, with what `change` says of it."""
    made: Any = ts.sparsify(layer, "str").layers[""]
    made.backend = Backend(change.get("asked", "auto"), change.get("name", "triton"), "")
    for name in change.keys() & {"kind", "threshold", "cache", "pattern"}:
        setattr(made, name, change[name])
    return made


PER_ELEMENT = {"threshold": nn.Parameter(torch.zeros(2, 2))}


def test_only_matrices_in_blocks_that_a_kernel_skips_follow_their_density_and_packed_ones_take_kernels() -> None:
    cases: Any = (
        (Block(16, 32), "auto", "triton", True), (Block(16, 32), "auto", "block", True),
        (Block(16, 32), "auto", "torch", False), (Block(16, 32), "block", "block", False),
        (Block(8, 16), "auto", "triton", False), (NO_PATTERN, "auto", "triton", False),
    )  # fmt: skip
    for pattern, asked, name, follows in cases:
        layer = sparse(nn.Linear(32, 64), {"pattern": pattern, "asked": asked, "name": name})
        assert not layer.follows_density
        layer._parameters["weight"] = on_gpu(64, 32)
        assert layer.follows_density == follows, (pattern, asked, name)
    packed: Any = (
        ("auto", torch.zeros(1, 16, 32), "torch"), ("auto", on_gpu(1, 16, 32), "triton"),
        ("auto", on_gpu(1, 8, 32), "torch"), ("auto", on_gpu(1, 16, 8), "torch"),
        ("auto", on_gpu(1, 16, 16, dtype=torch.float64), "torch"),
        ("torch", on_gpu(1, 16, 32), "torch"), ("block", torch.zeros(1, 8, 8), "triton"),
    )  # fmt: skip
    for asked, values, expected in packed:
        assert backend.packed_block_backend(asked, values) == expected, (asked, values.shape)


def test_a_convolution_is_fused_only_where_every_product_was_measured_faster(tables: Any) -> None:
    # 2 x 7 x 7 outputs of 13 x 13 images.
    geometry, x = Geometry((3, 3), (2, 2), (1, 1, 1, 1)), on_gpu(2, 128, 13, 13)
    rows = tables["read_table"]

    def fused(backward: bool) -> bool:
        forget()
        return backend.conv_is_fused(geometry, x, (128, 1152), "soft", BF16, backward)

    assert not fused(False)
    for number, op in enumerate(plan.CONV_OPS):
        assert not fused(True)
        rows.append(row(plan.FIELDS, f"{op} 3x3/2x2", 98, 128, 1152, "bfloat16", "soft", 2.0, 1.0))
        assert fused(False) and fused(True) == (number == 2)
    for number in range(3):
        rows[number] |= {"fused_ms": 3.0}
        assert not fused(True) and fused(False) == (number > 0)
        rows[number] |= {"fused_ms": 1.0}


CONVOLUTIONS: list[tuple[dict[str, Any], bool]] = [
    ({}, True), ({"x": torch.zeros(2, 3, 9, 9)}, False), ({"x": on_gpu(3, 9, 9)}, False),
    ({"compiling": True}, False), ({"asked": "triton"}, False), ({"asked": "fused", "name": "fused"}, True),
    ({"kind": "step"}, False), (PER_ELEMENT, False), ({"planned": False}, False),
]  # fmt: skip


@pytest.mark.parametrize(("change", "expected"), CONVOLUTIONS)
def test_which_convolutions_ask_the_plan_and_what(change: Any, expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = sparse(nn.Conv2d(3, 8, (3, 2), padding=1, padding_mode="reflect"), change)
    asked: list[Any] = []
    answer = change.get("planned", True)
    monkeypatch.setattr(conv2d, "conv_is_fused", lambda *given: (asked.append(given[2:]), answer)[1])
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: change.get("compiling", False))
    for training in (True, False):
        with torch.set_grad_enabled(training):
            assert layer.is_fused(change.get("x", on_gpu(2, 3, 9, 9)), layer.weight, BF16) is expected
    questions = [((8, 18), "soft", BF16, True), ((8, 18), "soft", BF16, False)]
    assert asked == (questions if not change or "planned" in change else [])


def test_a_linear_product_is_fused_by_its_rows_and_only_where_that_is_faster(tables: Any) -> None:
    asked = torch.Size((4096, 1024)), "soft", BF16
    # By the model, below about a thousand rows; the gradient of the weight where it was measured.
    assert product_is_fused("forward", on_gpu(4, 16, 1024), *asked)
    assert not product_is_fused("forward", on_gpu(8, 1024, 1024), *asked)
    assert not product_is_fused("grad_weight", on_gpu(512, 1024), *asked)
    forget()
    tables["read_table"].append(row(plan.FIELDS, "grad_weight", 512, 4096, 1024, "bfloat16", "soft", 0.5, 0.25))
    assert product_is_fused("grad_weight", on_gpu(2, 256, 1024), *asked)


LINEAR: list[tuple[dict[str, Any], Any, Any]] = [
    ({}, "grad_weight", "forward"), ({"name": "fused"}, True, True), ({"name": "torch"}, False, False),
    ({"name": "fused", "cache": Cache()}, False, False), ({"cache": Cache()}, "grad_weight", False),
    ({"cache": Cache(defer=True)}, False, False), ({"kind": "step"}, False, False),
    ({"x": torch.zeros(2, 8)}, False, False), (PER_ELEMENT, False, False),
]  # fmt: skip


@pytest.mark.parametrize(("change", "training", "evaluating"), LINEAR)
def test_which_linear_layers_ask_the_plan(change: Any, training: Any, evaluating: Any, monkeypatch: Any) -> None:
    layer, x = sparse(nn.Linear(8, 4), change), change.get("x", on_gpu(2, 8))
    monkeypatch.setattr(linear, "product_is_fused", lambda op, *rest: op)
    assert layer.is_fused(x, layer.weight, BF16) == training
    with torch.no_grad():
        assert layer.is_fused(x, layer.weight, BF16) == evaluating
