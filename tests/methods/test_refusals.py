"""What a method refuses: fields when it is made, and models, patterns and lengths of runs before anything changes."""

from __future__ import annotations

import math
from typing import Any

import pytest
from torch import nn

import tritonsparse as ts
from tritonsparse.methods import ACDC, METHODS, STR, SWAT, AutoSparse, AutoTune, Method, OptG, PowerProp, TopKAST

DROPS = [
    ({"drop_fraction": 1.5}, r"drop_fraction in \[0, 1\]"),
    ({"drop_fraction": -0.1}, r"drop_fraction in \[0, 1\]"),
    ({"update_every": 0}, "update_every of at least 1"),
    ({"stop_at": 2.0}, r"stop_at in \[0, 1\]"),
    ({"distribution": "even"}, "one of uniform, erk"),
]
LOSSES = r"auto_tune.reference_losses as (a list of finite numbers|finite epoch losses.*run of method 'dense')"
SCHEDULE = "0 <= begin <= end <= 1 .fractions of total_steps"
# Beside a sparsity of one half, where a method has one and the case gives none.
FIELDS: list[tuple[str, dict[str, Any], str]] = [
    ("acdc", {"phases": "imagenet"}, "phases as a Phases table or one of imagenet100"),
    ("autosparse", {"sparsity": 0.5, "refresh_every": 0}, "refresh_every of at least 1, got 0"),
    ("autosparse", {"alpha": 1.5}, "alpha in .0, 1.*1 straight-through"),
    ("autosparse", {"alpha_schedule": "sine"}, "alpha_schedule among constant, linear.*got 'sine'"),
    ("autosparse", {"backward_density": 0.0}, "backward_density in .0, 1.*None means all"),
    ("autosparse", {"threshold_init": math.inf}, ".*logit below infinity.*-5 gives"),
    ("autosparse", {"threshold_init": math.nan}, ".*threshold_init as a number, got nan"),
    ("autosparse", {"threshold_weight_decay": -1.0}, "threshold_weight_decay of at least 0"),
    ("autosparse", {"threshold_lr_scale": -1.0}, "threshold_lr_scale of at least 0"),
    ("autosparse", {"sparsity": 1.0}, r"a sparsity in \[0, 1\)"),
    (
        "autosparse",
        {"sparsity": 0.995},
        r"a sparsity of at most 1 - min_density = 0\.99, got 0\.995; lower min_density",
    ),
    ("autosparse", {"reach_by": 1.5}, r"reach_by in \[0, 1\]"),
    ("autosparse", {"control_every": 0}, "control_every of at least 1"),
    ("autosparse", {"min_density": 1.0}, r"min_density in \[0, 1\)"),
    ("autosparse", {"sparsity": 0.5, "threshold_init": -3200.0}, "threshold_init of at least -30 with a sparsity"),
    ("autosparse", {"sparsity": 0.5, "threshold_init": -math.inf}, "threshold_init of at least -30 with a sparsity"),
    ("auto_tune", {"reference_losses": []}, LOSSES),
    ("auto_tune", {"reference_losses": [1.0, math.nan]}, LOSSES),
    (
        "auto_tune",
        {"reference_losses": [1.0], "decrease": 1.5},
        "auto_tune's numbers of at least 0 and decrease below 1",
    ),
    ("auto_tune", {"reference_losses": [1.0], "alpha_init": "much"}, "auto_tune.alpha_init as a finite number"),
    ("autosparse", {"auto_tune": [1.0]}, "auto_tune as an AutoTune or its fields"),
    ("autosparse", {"zero_alpha_epoch": -1}, "zero_alpha_epoch of at least 0"),
    # Types, of every kind that is declared.
    ("acdc", {"phases": 3}, "phases as a Phases table or a name"),
    ("acdc", {"strict": 1}, "strict as true or false, got 1"),
    ("autosparse", {"alpha": "much"}, "alpha as a finite number, got 'much'"),
    ("autosparse", {"alpha": True}, "alpha as a finite number, got True"),
    ("dsr", {"doublings": "ab"}, "doublings as a list of finite numbers"),
    ("gmp", {"update_every": 2.5}, "update_every as a whole number or nothing, got 2.5"),
    ("mest", {"gradient_weight": -1.0}, "gradient_weight of at least 0"),
    ("static", {"criterion": None}, "criterion as a name, got None"),
    ("swat", {"slack": math.nan}, "slack as a number"),
    ("topkast", {"penalty": math.inf}, "penalty as a finite number"),
    ("str", {"threshold_lr_scale": 10**400}, "threshold_lr_scale as a finite number"),
    ("autosparse", {"threshold_init": 1e99}, "threshold_init as a number"),
    *((name, *case) for name in ("dsr", "rigl", "set") for case in DROPS),
    ("dsr", {"threshold_init": 0.0}, "a threshold_init above 0"),
    ("dsr", {"doublings": (0.5, 0.25)}, "doublings as rising fractions"),
    ("dsr", {"doublings": (1.5,)}, "doublings as rising fractions"),
    ("dst", {"sparsity": 0.8}, "no sparsity, or 0"),
    ("dst", {"penalty": -1.0}, "a penalty of at least 0"),
    ("dst", {"min_density": 1.0}, r"min_density in \[0, 1\)"),
    ("gmp", {"initial_sparsity": 0.6}, "initial_sparsity of at most sparsity = 0.5, got 0.6"),
    ("gmp", {"begin": 0.5, "end": 0.4}, SCHEDULE),
    ("gmp", {"end": 100}, SCHEDULE),
    ("gmp", {"update_every": 0}, "update_every of at least 1"),
    ("mest", {"mutation": (0.1,)}, "as many values of mutation as of softness"),
    ("mest", {"mutation": (0.1, 0.1, 0.1)}, ".*to end with 0"),
    ("mest", {"mutation": (0.6, 0.1, 0.0)}, r".*to stay in \[0, 1\)"),
    ("mest", {"stages": (0.8, 0.2)}, ".*rising fractions"),
    ("mest", {"update_every": 0}, "update_every of at least 1"),
    ("optg", {"beta": 0.0}, "beta above 0"),
    ("optg", {"score_momentum": 1.0}, r"score_momentum in \[0, 1\)"),
    *(("powerprop", {"exponent": each}, "(an )?exponent") for each in (0.9, math.nan, math.inf)),
    ("swat", {"activation_sparsity": 1.0}, r".*sparsity in \[0, 1\)"),
    ("swat", {"distribution": "even"}, "distribution to be one of uniform, erk, momentum"),
    ("swat", {"structure": "kernel"}, "structure to be one of None, channel, filter"),
    ("swat", {"activation_scope": "token"}, "activation_scope to be one of batch, sample, plane"),
    ("swat", {"refresh_every": 0}, "refresh_every of at least 1"),
    ("swat", {"refresh_every": 2, "activation_scope": "sample"}, 'activation_scope "batch" with refresh_every above 1'),
    ("swat", {"slack": 0.5}, "slack of at least 1"),
    ("topkast", {"backward_sparsity": 0.8}, "backward_sparsity of at most sparsity = 0.5"),
    ("topkast", {"alpha": 1.5}, r"alpha in \[0, 1\]"),
    ("topkast", {"penalty": -1.0}, "a penalty of at least 0"),
    ("topkast", {"refresh_every": 0}, "refresh_every of at least 1"),
]


@pytest.mark.parametrize(("name", "fields", "words"), FIELDS, ids=str)
def test_a_field_out_of_range_is_refused_when_the_method_is_made(name: str, fields: dict[str, Any], words: str) -> None:
    cls: Any = AutoTune if name == "auto_tune" else METHODS[name]
    given = {} if name in ("autosparse", "auto_tune", "dst") else {"sparsity": 0.5}
    said_by = "distribution" if words.startswith("one of") else name.replace("auto_tune", "autosparse")
    with pytest.raises(ValueError, match=f"{said_by}: expected {words}"):
        cls(**given | fields)


MADE: list[tuple[Method, dict[str, Any], str]] = [
    (
        ACDC(sparsity=0.5, phases="imagenet100"), {"total_steps": 6, "steps_per_epoch": 2},
        r"a run of 100 epochs.*got 3; pass phases=Phases\(...\).scaled\(3\)",
    ),
    (ACDC(sparsity=0.5), {"total_steps": 6}, "acdc: expected steps_per_epoch="),
    (OptG(sparsity=0.5), {"total_steps": 10}, "optg: expected steps_per_epoch="),
    (STR(sparsity=0.8), {"steps_per_epoch": 5}, "str: expected total_steps="),
    (AutoSparse(sparsity=0.8), {"steps_per_epoch": 5}, "autosparse: expected total_steps="),
    *(
        (METHODS[name](sparsity=0.5), {"pattern": "2:4", "total_steps": 10},
         rf"method '{name}' supports \(block, channel, unstructured\), got '2:4'")
        for name in ("dsr", "rigl", "snfs")
    ),
    (AutoSparse(sparsity=0.5), {"pattern": "2:4"}, r"supports \(block, unstructured\)"),
    (TopKAST(sparsity=0.5, backward_sparsity=0.25), {"pattern": "2:4"}, "backward_sparsity 0 with pattern '2:4'"),
    (TopKAST(sparsity=0.75), {"pattern": "2:4"}, r"sparsity 0\.5, which pattern '2:4' has, got 0\.75"),
    (
        SWAT(sparsity=0.5, structure="filter"), {"pattern": "block:2"},
        'pattern "unstructured" beside structure "filter", got "block:2"',
    ),
    *((PowerProp(sparsity=0.5), {"pattern": pattern}, "powerprop") for pattern in ("2:4", "channel", "block:3")),
    (AutoSparse(), {"pattern": "block:8"}, r"expected sparsity= with pattern 'block:8', got None; .*sparsity=0\.7"),
    (STR(sparsity=0.5, threshold_init=-5.0), {"pattern": "block:8"}, r"threshold_init left out .* got -5\.0; leave it"),
    (AutoSparse(sparsity=0.5, threshold_lr_scale=4.0), {"pattern": "block:8"}, "threshold_lr_scale left out"),
    (AutoSparse(sparsity=0.5, threshold_weight_decay=0.1), {"pattern": "block:8"}, "threshold_weight_decay left out"),
    (AutoSparse(sparsity=0.5), {"pattern": "block:7"}, "use 'block:6x8' or exclude the layer"),
]  # fmt: skip


@pytest.mark.parametrize(("method", "options", "words"), MADE, ids=str)
def test_what_a_method_cannot_train_is_refused(
    refused: Any, method: Method, options: dict[str, Any], words: str
) -> None:
    model = nn.Sequential(nn.Linear(32, 48), nn.Linear(48, 32))
    lengths = {"total_steps": 10, "steps_per_epoch": 5} if "block" in options.get("pattern", "") else {}
    with refused(model, ValueError):
        with pytest.raises(ValueError, match=words) as caught:
            ts.sparsify(model, method, **lengths | options)
        raise caught.value
