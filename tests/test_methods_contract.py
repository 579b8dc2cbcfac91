"""What every registered method promises, under every kind of optimizer."""

from __future__ import annotations

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

import tritonsparse as ts
import tritonsparse.methods as m
from tritonsparse.masks.topk import kept_count
from tritonsparse.masks.units import to_units
from tritonsparse.methods import METHODS, Method
from tritonsparse.methods.masked import MaskMethod
from tritonsparse.pattern import Block, Channel, parse

STEPS = 12  # in epochs of 3
# Dense, sparse, dense, sparse: an epoch each.
TURNS = m.Phases([(0, "dense"), (1, "sparse"), (2, "dense"), (3, "sparse")], 4)
SOFT_MEST = {"softness": (0.1, 0.1, 0.0), "update_every": 2, "gradient_weight": 0.1, "distribution": "erk"}
CACHED_SWAT = {"refresh_every": 3, "activation_sparsity": 0.5, "distribution": "momentum", "slack": 1.0}
TABLE: dict[str, Method] = {
    "acdc": m.ACDC(sparsity=0.7, phases=TURNS),
    "acdc, uniform": m.ACDC(sparsity=0.7, phases=TURNS, scope="uniform", reset_moments=False),
    "dense": m.Dense(),
    "dsr": m.DSR(sparsity=0.7, threshold_init=0.05, update_every=2, doublings=(0.5,)),
    "dsr, erk": m.DSR(sparsity=0.7, threshold_init=0.1, drop_fraction=0.2, update_every=3, distribution="erk"),
    "dst": m.DST(penalty=0.05),
    "dst, restarting": m.DST(penalty=2.0, min_density=0.3),
    "gmp": m.GMP(sparsity=0.7, update_every=2),
    "gmp, erk": m.GMP(sparsity=0.7, initial_sparsity=0.2, distribution="erk", begin=0.25, end=1.0, update_every=5),
    "mest": m.MEST(sparsity=0.7, mutation=(0.1, 0.0), softness=(0.0, 0.0), stages=(0.8,), update_every=2),
    "mest, soft": m.MEST(sparsity=0.7, **SOFT_MEST),
    "optg": m.OptG(sparsity=0.7),
    "optg, slow": m.OptG(sparsity=0.7, beta=0.05, score_momentum=0.0),
    "powerprop": m.PowerProp(sparsity=0.7),
    "powerprop, topkast": m.PowerProp(sparsity=0.7, exponent=1.5, backward_sparsity=0.4, alpha=0.5, penalty=1e-3),
    "rigl": m.RigL(sparsity=0.7, update_every=3, stop_at=0.9),
    "rigl, uniform": m.RigL(sparsity=0.7, update_every=2, distribution="uniform"),
    "set": m.SET(sparsity=0.7, update_every=3, distribution="uniform"),
    "snfs": m.SNFS(sparsity=0.7, update_every=2),
    "snfs, erk": m.SNFS(sparsity=0.7, update_every=3, stop_at=0.6, drop_fraction=0.3, distribution="erk"),
    "static": m.Static(sparsity=0.7),
    "static, magnitude": m.Static(sparsity=0.7, criterion="magnitude", distribution="erk"),
    "str": m.STR(threshold_init=-3.0, threshold_weight_decay=0.05, threshold_lr_scale=3.0),
    "str, aimed": m.STR(sparsity=0.6, threshold_init=-3.0, control_every=2),
    "swat": m.SWAT(sparsity=0.7),
    "swat, cached": m.SWAT(sparsity=0.7, **CACHED_SWAT),
    "swat, structured": m.SWAT(sparsity=0.7, structure="channel", distribution="erk", activation_scope="sample"),
    "topkast": m.TopKAST(sparsity=0.7, backward_sparsity=0.4),
    "topkast, annealed": m.TopKAST(sparsity=0.7, alpha=0.5, refresh_every=2, distribution="erk"),
    "autosparse": m.AutoSparse(threshold_init=-3.0, alpha=0.5, backward_density=0.8, zero_alpha_epoch=3),
    "autosparse, aimed": m.AutoSparse(sparsity=0.7, backward_density=0.8, reach_by=0.6, control_every=1),
    "autosparse, tuned": m.AutoSparse(threshold_init=-3.0, auto_tune=m.AutoTune(reference_losses=[1.0, 0.01])),
}
# The ways to ask a method for no sparsity at all.
IDENTITIES: dict[str, Method] = {
    **{name: METHODS[name](sparsity=0.0) for name in METHODS if name not in ("dense", "str", "autosparse")},
    **{
        "dense": m.Dense(),
        "str": m.STR(threshold_init=-math.inf),
        "autosparse": m.AutoSparse(threshold_init=-math.inf),
    },
}
# Methods whose weights outside the mask are gone; Top-KAST and OptG keep them, AC/DC has dense phases.
HELD = (m.GMP, m.MEST, m.SET, m.Static)  # RigL, SNFS and DSR are kinds of SET
# Every pattern that every mask method supports, on weights [16, 8] and [4, 16].
OFTEN: dict[str, Any] = {"sparsity": 0.5, "update_every": 2}
OF_PATTERNS: tuple[Method, ...] = (
    *(m.GMP(**OFTEN), m.Static(sparsity=0.5), m.TopKAST(sparsity=0.5), m.ACDC(sparsity=0.5, phases=TURNS)),
    *(m.RigL(**OFTEN, distribution="uniform"), m.SET(**OFTEN), m.SNFS(**OFTEN), m.DSR(**OFTEN, threshold_init=0.1)),
    *(m.OptG(sparsity=0.5), m.PowerProp(sparsity=0.5), m.SWAT(sparsity=0.5), m.STR(sparsity=0.5)),
    *(m.AutoSparse(sparsity=0.5, control_every=2), m.AutoSparse(sparsity=0.5, backward_density=0.8)),
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
# Every method meets each of them, and both kinds of layers.
KINDS = {"sgd with momentum": "linear", "adamw foreach": "convolution", "adamw fused": "linear"}
every_optimizer = pytest.mark.parametrize(("optimizer", "kind"), KINDS.items())


class Convolutions(nn.Sequential):
    """[B, 8] -> [B, 4] as the perceptron, of as many weights in layers of the same names."""

    def forward(self, x: torch.Tensor) -> Any:
        first, relu, dropout, last = self
        return last(dropout(relu(first(x.reshape(-1, 4, 1, 2)))).reshape(-1, 4, 2, 2)).flatten(1)


def build(kind: str, seed: int = 0) -> nn.Sequential:
    """[16, 8] and [4, 16] as linear layers, or as [16, 4, 1, 2] and [4, 4, 2, 2]."""
    torch.manual_seed(seed)
    if kind == "linear":
        return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Dropout(0.1), nn.Linear(16, 4))
    return Convolutions(nn.Conv2d(4, 16, (1, 2)), nn.ReLU(), nn.Dropout(0.1), nn.Conv2d(4, 4, 2))


def begin(method: Method, optimizer: str, kind: str, seed: int = 0, **options: Any) -> Run:
    return Run(build(kind, seed), method, OPTIMIZERS[optimizer], seed=5, **options)


def outside(run: Run) -> bool:
    """Whether a weight outside a mask is not zero."""
    masked = [layer for layer in run.sparsifier.layers.values() if layer.kind == "mask"]
    return any(bool(layer.weight[~layer.mask].any()) for layer in masked)


def assert_resumes(run: Run, *arguments: Any, **options: Any) -> Run:
    """A second run stops not at an epoch's end, so that losses seen so far count; a new one loads it from a file."""
    first, file = begin(*arguments, **options).train(STEPS // 2 - 1), io.BytesIO()
    torch.save(first.state(), file)
    file.seek(0)
    second = begin(*arguments, 9, **options).load(torch.load(file, weights_only=True))
    second.train(STEPS - second.sparsifier.step)
    assert_same([second.state(), first.losses + second.losses], [run.state(), run.losses])
    return second


def assert_asked_for(run: Run, method: Any) -> None:
    """The sparsity is met to one element."""
    kept = {key: int(layer.mask.sum()) for key, layer in run.sparsifier.layers.items()}
    total, uniform = sum(kept.values()), getattr(method, "distribution", "uniform") == "uniform"
    if getattr(method, "scope", None) == "global" or isinstance(method, m.OptG):
        assert total == kept_count(192, 0.7)
    elif isinstance(method, m.SNFS | m.DSR) and uniform:
        # What they share out over layers is what the layers started with.
        assert total == 38 + 19
    elif uniform:
        assert kept == {"0": kept_count(128, 0.7), "3": kept_count(64, 0.7)}
    else:
        # ERK spends the budget n - floor(.7 n) = 39 + 20, each layer rounded.
        assert abs(total - 59) <= 1
    # What RigL and SET have just grown is 0 until the next step, and what MEST has until a gradient reaches it.
    nonzero = {key: layer.kept_count() for key, layer in run.sparsifier.layers.items()}
    assert isinstance(method, m.SET | m.MEST) or nonzero == kept


@every_optimizer
@pytest.mark.parametrize("name", TABLE)
def test_a_run_holds_its_zeros_resumes_learns_and_becomes_a_stock_model(name: str, optimizer: str, kind: str) -> None:
    method, run = TABLE[name], begin(TABLE[name], optimizer, kind)
    masked = any(layer.kind == "mask" for layer in run.sparsifier.layers.values())
    assert masked == isinstance(method, (*HELD, m.TopKAST, m.OptG, m.SWAT))
    plain = run.sparsifier.state_dict()
    assert all(type(tensor) is torch.Tensor and tensor.is_cpu for tensor in plain.pop("tensors").values())
    assert json.loads(json.dumps(plain))
    found = [outside(run.train(1)) for _ in range(STEPS)]
    assert not (isinstance(method, HELD) and any(found))
    if isinstance(method, MaskMethod):
        assert_asked_for(run, method)
    second = assert_resumes(run, method, optimizer, kind)
    stock, x, sparsity = build(kind), torch.randn(4, 8), run.sparsifier.sparsity()
    expected = run.model.eval()(x)
    assert run.sparsifier.finalize() is run.model and torch.equal(run.model(x), expected)
    for look in (type, lambda module: vars(module).keys()):
        assert [look(module) for module in run.model] == [look(module) for module in stock]
    assert run.model.state_dict().keys() == stock.state_dict().keys()
    zeros = sum(int((run.model[i].weight == 0).sum()) for i in (0, 3))
    assert zeros == round(sparsity * 192)
    if optimizer.startswith("adamw"):
        assert (zeros > 0) == (method.name != "dense")
        assert sum(second.train(16).losses[-5:]) < 0.8 * sum(run.losses[:5])


@pytest.mark.parametrize("kind", ["linear", "convolution"])
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
    assert_resumes(run, method, "adamw foreach", kind, pattern=pattern)


@every_optimizer
@pytest.mark.parametrize("method", IDENTITIES.values(), ids=IDENTITIES)
def test_no_sparsity_trains_bit_for_bit_as_the_untouched_model(method: Method, optimizer: str, kind: str) -> None:
    run, untouched = begin(method, optimizer, kind), build(kind)
    assert run.sparsifier.method.idle == (hasattr(method, "sparsity") and not isinstance(method, m.STR))
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


@pytest.mark.parametrize("name", TABLE)
def test_torchs_default_dtype_changes_neither_views_nor_masks(name: str) -> None:
    def views(model: nn.Module) -> dict[str, torch.Tensor]:
        sparsifier = ts.sparsify(model, TABLE[name], total_steps=STEPS, steps_per_epoch=3)
        parts = ((key, layer.view._asdict()) for key, layer in sparsifier.layers.items())
        return {f"{key}.{part}": value for key, view in parts for part, value in view.items() if value is not None}

    wanted = views(build("linear"))
    for dtype in (torch.float64, torch.bfloat16):
        model = build("linear")
        torch.set_default_dtype(dtype)
        try:
            found = views(model)
        finally:
            torch.set_default_dtype(torch.float32)
        assert_same(found, wanted)


def test_every_method_is_in_the_tables_comes_back_from_json_and_names_its_paper_and_what_differs_from_it() -> None:
    assert {method.name for method in TABLE.values()} == METHODS.keys() == IDENTITIES.keys()
    assert {name: cls.name for name, cls in METHODS.items()} == {name: name for name in METHODS}
    for method in (*TABLE.values(), *IDENTITIES.values()):
        assert METHODS[method.name](**json.loads(json.dumps(method.to_dict()))) == method
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    for name, cls in METHODS.items():
        text = sys.modules[cls.__module__].__doc__ or ""
        assert name == "dense" or re.search(r"arXiv:\d{4}\.\d{5}", text), name
        assert text.strip().split("\n\n")[-1].startswith("Differs from the paper in:"), name
        assert cls.__doc__ and f"| `{name}` |" in readme, name
