"""What every registered method promises, under every kind of optimizer."""

from __future__ import annotations

import functools
import io
import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import Optimizers, Run, assert_same, squares
from torch import nn

from tritonsparse.masks.topk import kept_count
from tritonsparse.masks.units import to_units
from tritonsparse.methods import (
    ACDC,
    DSR,
    DST,
    GMP,
    MEST,
    METHODS,
    SET,
    SNFS,
    STR,
    SWAT,
    AutoSparse,
    AutoTune,
    Dense,
    Method,
    OptG,
    Phases,
    PowerProp,
    RigL,
    Static,
    TopKAST,
)
from tritonsparse.methods.masked import MaskMethod
from tritonsparse.pattern import Block, Channel, parse

STEPS = 12  # in epochs of 3
# Dense, sparse, dense, sparse: an epoch each.
TURNS = Phases([(0, "dense"), (1, "sparse"), (2, "dense"), (3, "sparse")], 4)
TABLE: dict[str, Method] = {
    "acdc": ACDC(sparsity=0.7, phases=TURNS),
    "acdc, uniform": ACDC(sparsity=0.7, phases=TURNS, scope="uniform", reset_moments=False),
    "dense": Dense(),
    "dsr": DSR(sparsity=0.7, threshold_init=0.05, update_every=2, doublings=(0.5,)),
    "dsr, erk": DSR(sparsity=0.7, threshold_init=0.1, drop_fraction=0.2, update_every=3, distribution="erk"),
    "dst": DST(penalty=0.05),
    "dst, restarting": DST(penalty=2.0, min_density=0.3),
    "gmp": GMP(sparsity=0.7, update_every=2),
    "gmp, erk": GMP(sparsity=0.7, initial_sparsity=0.2, distribution="erk", begin=0.25, end=1.0, update_every=5),
    "mest": MEST(sparsity=0.7, mutation=(0.1, 0.0), softness=(0.0, 0.0), stages=(0.8,), update_every=2),
    "mest, soft": MEST(sparsity=0.7, softness=(0.1, 0.1, 0.0), update_every=2, gradient_weight=0.1, distribution="erk"),
    "optg": OptG(sparsity=0.7),
    "optg, slow": OptG(sparsity=0.7, beta=0.05, score_momentum=0.0),
    "powerprop": PowerProp(sparsity=0.7),
    "powerprop, topkast": PowerProp(sparsity=0.7, exponent=1.5, backward_sparsity=0.4, alpha=0.5, penalty=1e-3),
    "rigl": RigL(sparsity=0.7, update_every=3, stop_at=0.9),
    "rigl, uniform": RigL(sparsity=0.7, update_every=2, distribution="uniform"),
    "set": SET(sparsity=0.7, update_every=3, distribution="uniform"),
    "snfs": SNFS(sparsity=0.7, update_every=2),
    "snfs, erk": SNFS(sparsity=0.7, update_every=3, stop_at=0.6, drop_fraction=0.3, distribution="erk"),
    "static": Static(sparsity=0.7),
    "static, magnitude": Static(sparsity=0.7, criterion="magnitude", distribution="erk"),
    "str": STR(threshold_init=-3.0, threshold_weight_decay=0.05, threshold_lr_scale=3.0),
    "str, aimed": STR(sparsity=0.6, threshold_init=-3.0, control_every=2),
    "swat": SWAT(sparsity=0.7),
    "swat, cached": SWAT(sparsity=0.7, refresh_every=3, activation_sparsity=0.5, distribution="momentum", slack=1.0),
    "swat, structured": SWAT(sparsity=0.7, structure="channel", distribution="erk", activation_scope="sample"),
    "topkast": TopKAST(sparsity=0.7, backward_sparsity=0.4),
    "topkast, annealed": TopKAST(sparsity=0.7, alpha=0.5, refresh_every=2, distribution="erk"),
    "autosparse": AutoSparse(threshold_init=-3.0, alpha=0.5, backward_density=0.8, zero_alpha_epoch=3),
    "autosparse, aimed": AutoSparse(sparsity=0.7, backward_density=0.8, reach_by=0.6, control_every=1),
    "autosparse, tuned": AutoSparse(threshold_init=-3.0, auto_tune=AutoTune(reference_losses=[1.0, 0.01])),
}
# The ways to ask a method for no sparsity at all.
IDENTITIES: dict[str, Method] = {
    **{name: METHODS[name](sparsity=0.0) for name in METHODS if name not in ("dense", "str", "autosparse")},
    **{"dense": Dense(), "str": STR(threshold_init=-math.inf), "autosparse": AutoSparse(threshold_init=-math.inf)},
}
# Methods whose weights outside the mask are gone; Top-KAST and OptG keep them, AC/DC has dense phases.
HELD = (GMP, MEST, SET, Static)  # RigL, SNFS and DSR are kinds of SET
# Every pattern that every mask method supports, on weights [16, 8] and [4, 16].
OF_PATTERNS: tuple[Method, ...] = (
    *(GMP(sparsity=0.5, update_every=2), Static(sparsity=0.5), TopKAST(sparsity=0.5), ACDC(sparsity=0.5, phases=TURNS)),
    *(RigL(sparsity=0.5, update_every=2, distribution="uniform"), SET(sparsity=0.5, update_every=2)),
    *(SNFS(sparsity=0.5, update_every=2), DSR(sparsity=0.5, update_every=2, threshold_init=0.1)),
    *(OptG(sparsity=0.5), PowerProp(sparsity=0.5), SWAT(sparsity=0.5)),
    *(AutoSparse(sparsity=0.5, control_every=2), STR(sparsity=0.5), AutoSparse(sparsity=0.5, backward_density=0.8)),
)
PATTERNS = [
    pytest.param(method, pattern, id=f"{method.name}, {pattern}")
    for method in OF_PATTERNS
    for pattern in ("block:2", "block:4x2", "channel", "2:4", "1:2", "2:4:transposable")
    if isinstance(parse(pattern), method.patterns)
]
OPTIMIZERS: Optimizers = {
    "sgd with momentum": lambda groups: torch.optim.SGD(groups, momentum=0.9),
    "adamw foreach": lambda groups: torch.optim.AdamW(groups, foreach=True),
    "adamw fused": lambda groups: torch.optim.AdamW(groups, fused=True),
}
every_method = pytest.mark.parametrize("name", TABLE)
every_optimizer = pytest.mark.parametrize("optimizer", OPTIMIZERS)
every_kind = pytest.mark.parametrize("kind", ["linear", "convolution"])


class Convolutions(nn.Sequential):
    """[B, 8] -> [B, 4] as the perceptron, of as many weights in layers of the same names."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, *between, last = self
        for module in (first, *between):
            x = module(x.reshape(-1, 4, 1, 2) if module is first else x)
        y: torch.Tensor = last(x.reshape(-1, 4, 2, 2)).flatten(1)
        return y


def build(kind: str, seed: int = 0) -> nn.Sequential:
    """[16, 8] and [4, 16] as linear layers, or as [16, 4, 1, 2] and [4, 4, 2, 2]."""
    torch.manual_seed(seed)
    if kind == "linear":
        return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Dropout(0.1), nn.Linear(16, 4))
    return Convolutions(nn.Conv2d(4, 16, (1, 2)), nn.ReLU(), nn.Dropout(0.1), nn.Conv2d(4, 4, 2))


def begin(method: Method, optimizer: str, kind: str, seed: int = 0, **options: Any) -> Run:
    return Run(build(kind, seed), method, OPTIMIZERS[optimizer], seed=5, **options)


def resumed(run: Run, method: Method, optimizer: str, kind: str, **options: Any) -> Run:
    """The rest of all steps, by a new process's run that loads a state from a file."""
    file = io.BytesIO()
    torch.save(run.state(), file)
    file.seek(0)
    second = begin(method, optimizer, kind, 9, **options).load(torch.load(file, weights_only=True))
    return second.train(STEPS - second.sparsifier.step)


def outside(run: Run) -> bool:
    """Whether a weight outside a mask is not zero."""
    return any(
        bool(layer.weight[~layer.mask].any()) for layer in run.sparsifier.layers.values() if layer.kind == "mask"
    )


@functools.cache
def unbroken(name: str, optimizer: str, kind: str) -> tuple[Run, list[bool]]:
    """A run of all steps, left as it is by those who look at it, and whether weights were outside after each step."""
    run = begin(TABLE[name], optimizer, kind)
    return run, [outside(run.train(1)) for _ in range(STEPS)]


def test_no_registered_method_is_missing_from_the_tables() -> None:
    assert {method.name for method in TABLE.values()} == METHODS.keys() == IDENTITIES.keys()
    assert {name: cls.name for name, cls in METHODS.items()} == {name: name for name in METHODS}


@every_kind
@every_optimizer
@every_method
def test_it_resumes_as_if_never_stopped_and_weights_outside_masks_are_exactly_zero_after_every_step(
    name: str, optimizer: str, kind: str
) -> None:
    method, (run, found) = TABLE[name], unbroken(name, optimizer, kind)
    masked = any(layer.kind == "mask" for layer in begin(method, optimizer, kind).sparsifier.layers.values())
    assert masked == isinstance(method, (*HELD, TopKAST, OptG, SWAT))
    assert not (isinstance(method, HELD) and any(found))
    # Not at an epoch's end: the losses seen so far count.
    first = begin(method, optimizer, kind).train(STEPS // 2 - 1)
    assert_same(resumed(first, method, optimizer, kind).state(), run.state())


@every_kind
@every_optimizer
@pytest.mark.parametrize("name", [name for name, method in TABLE.items() if isinstance(method, MaskMethod)])
def test_the_sparsity_asked_for_is_met_to_one_element(name: str, optimizer: str, kind: str) -> None:
    (run, _), method = unbroken(name, optimizer, kind), TABLE[name]
    kept = {key: int(layer.mask.sum()) for key, layer in run.sparsifier.layers.items()}
    if getattr(method, "scope", None) == "global" or isinstance(method, OptG):
        assert sum(kept.values()) == kept_count(192, 0.7)
    elif isinstance(method, SNFS | DSR):
        # What they share out over layers is what the layers started with: 38 + 19, ERK's 59 rounded by layer.
        assert sum(kept.values()) == 57 if method.distribution == "uniform" else abs(sum(kept.values()) - 59) <= 1
    elif getattr(method, "distribution", "uniform") == "uniform":
        assert kept == {"0": kept_count(128, 0.7), "3": kept_count(64, 0.7)}
    else:
        # ERK spends the budget n - floor(.7 n) = 39 + 20, each layer rounded.
        assert abs(sum(kept.values()) - 59) <= 1
    nonzero = {key: layer.kept_count() for key, layer in run.sparsifier.layers.items()}
    # What RigL and SET have just grown is 0 until the next step, and what MEST has until a gradient reaches it.
    assert isinstance(method, SET | MEST) or nonzero == kept


@every_kind
@pytest.mark.parametrize(("method", "pattern"), PATTERNS)
def test_masks_obey_the_pattern_to_one_unit_and_resume(method: Method, pattern: str, kind: str) -> None:
    run = begin(method, "adamw foreach", kind, pattern=pattern).train(STEPS)
    shape, total = parse(pattern), 0
    for layer in run.sparsifier.layers.values():
        mask = layer.oriented(layer.mask).float()
        if isinstance(shape, Block | Channel):
            size = mask.shape[1] if isinstance(shape, Channel) else shape.rows * shape.columns
            assert set(to_units(mask, shape).unique().tolist()) <= {0.0, float(size)}
        else:
            assert (mask.reshape(-1, shape.m).sum(1) == shape.n).all()
            assert not shape.transposable or (mask.t().reshape(-1, shape.m).sum(1) == shape.n).all()
        total += int(mask.sum())
    assert not (isinstance(method, HELD) and outside(run))
    # ERK and the global top-k divide units of several sizes: within one unit of the largest a layer.
    assert abs(total - 96) <= (2 * 16 if isinstance(shape, Channel) else 16 if isinstance(shape, Block) else 0)
    first = begin(method, "adamw foreach", kind, pattern=pattern).train(5)
    assert_same(resumed(first, method, "adamw foreach", kind, pattern=pattern).state(), run.state())


@every_kind
@every_optimizer
@pytest.mark.parametrize("method", IDENTITIES.values(), ids=IDENTITIES)
def test_no_sparsity_trains_bit_for_bit_as_the_untouched_model(method: Method, optimizer: str, kind: str) -> None:
    run, untouched = begin(method, optimizer, kind), build(kind)
    assert run.sparsifier.method.idle == (hasattr(method, "sparsity") and not isinstance(method, STR))
    run.train(5)
    decayed, others = ([p for p in untouched.parameters() if (p.dim() > 1) == weights] for weights in (True, False))
    rates = {"lr": 0.02, "weight_decay": 0.01}
    other = OPTIMIZERS[optimizer]([{"params": decayed, **rates}, {"params": others, **rates, "weight_decay": 0.0}])
    for step in range(5):
        torch.manual_seed(1000 + step)
        squares(untouched).backward()
        other.step()
        other.zero_grad()
    assert run.sparsifier.step == 5 and run.sparsifier.sparsity() == 0.0
    assert_same(run.model.state_dict(), untouched.state_dict())


@every_kind
@every_method
def test_the_same_seed_gives_the_same_run_which_finalize_makes_a_stock_model_with_real_zeros(
    name: str, kind: str
) -> None:
    run, (other, _) = begin(TABLE[name], "adamw foreach", kind).train(STEPS), unbroken(name, "adamw foreach", kind)
    assert_same([run.state(), run.losses], [other.state(), other.losses])
    stock, x, sparsity = build(kind), torch.randn(4, 8), run.sparsifier.sparsity()
    expected = run.model.eval()(x)
    assert run.sparsifier.finalize() is run.model
    assert torch.equal(run.model(x), expected)
    for look in (type, lambda module: vars(module).keys()):
        assert [look(module) for module in run.model] == [look(module) for module in stock]
    assert run.model.state_dict().keys() == stock.state_dict().keys()
    zeros = sum(int((run.model[i].weight == 0).sum()) for i in (0, 3))
    assert zeros == round(sparsity * 192) and (zeros > 0) == (TABLE[name].name != "dense")


@every_kind
@every_method
def test_the_loss_of_a_small_problem_falls(name: str, kind: str) -> None:
    losses = torch.stack(begin(TABLE[name], "adamw fused", kind).train(4 * STEPS).losses)
    assert losses[-5:].sum() < 0.8 * losses[:5].sum()


@every_kind
@every_method
def test_the_state_is_plain_json_and_tensors(name: str, kind: str) -> None:
    state = begin(TABLE[name], "adamw foreach", kind).sparsifier.state_dict()
    assert all(type(tensor) is torch.Tensor and tensor.device.type == "cpu" for tensor in state["tensors"].values())
    assert json.loads(json.dumps({key: value for key, value in state.items() if key != "tensors"}))


@pytest.mark.parametrize("method", [*TABLE.values(), *IDENTITIES.values()], ids=repr)
def test_a_method_comes_back_from_its_dictionary_through_json(method: Method) -> None:
    assert METHODS[method.name](**json.loads(json.dumps(method.to_dict()))) == method


@pytest.mark.parametrize("name", METHODS)
def test_the_module_names_its_paper_and_ends_with_what_differs_from_it(name: str) -> None:
    text = sys.modules[METHODS[name].__module__].__doc__ or ""
    assert name == "dense" or re.search(r"arXiv:\d{4}\.\d{5}", text)
    assert text.strip().split("\n\n")[-1].startswith("Differs from the paper in:")
    assert METHODS[name].__doc__
    assert f"| `{name}` |" in (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
