"""Habits of training loops that the product must survive: closures, several optimizers, layers that are passed by."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils.deepspeed import DeepSpeedOptimizerWrapper
from small_runs import assert_same
from torch import Tensor, nn

import tritonsparse as ts
from tritonsparse.methods import (
    ACDC,
    DST,
    GMP,
    MEST,
    SNFS,
    STR,
    SWAT,
    AutoSparse,
    OptG,
    Phases,
    RigL,
    Static,
    TopKAST,
)  # fmt: skip
from tritonsparse.optimizer_state import clear_state, reset_state

PHASES = Phases([(0, "dense"), (1, "sparse"), (2, "dense"), (3, "sparse")], 4)
METHODS: dict[str, Callable[[], Any]] = {
    "rigl": lambda: RigL(sparsity=0.7, update_every=3),
    "gmp": lambda: GMP(sparsity=0.7, update_every=3),
    "snfs": lambda: SNFS(sparsity=0.7, update_every=3),
    "mest": lambda: MEST(sparsity=0.7, update_every=3, gradient_weight=0.1),
    "acdc": lambda: ACDC(sparsity=0.7, phases=PHASES),
    "optg": lambda: OptG(sparsity=0.7),
    "topkast": lambda: TopKAST(sparsity=0.7, penalty=1e-2),
    "swat": lambda: SWAT(sparsity=0.7),
    "dst": lambda: DST(penalty=1e-2),
    "str": lambda: STR(threshold_init=-3.0, threshold_weight_decay=0.1),
    "autosparse": lambda: AutoSparse(sparsity=0.5, alpha_schedule="constant"),
}
Step = Callable[[list[Any], Callable[[], Tensor]], None]


def plain(optimizers: list[Any], closure: Callable[[], Tensor]) -> None:
    closure()
    for optimizer in optimizers:
        optimizer.step()


def by_closure(optimizers: list[Any], closure: Callable[[], Tensor]) -> None:
    (optimizer,) = optimizers
    optimizer.step(closure=closure) if torch.rand(()) < 0.5 else optimizer.step(closure)


def trained(method: str, step: Step, parts: int = 1, defer: bool = False, **options: Any) -> ts.Sparsifier:
    """Twelve steps of SGD with momentum, whose parameters are shared out over `parts` optimizers."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 4))
    sparsifier = ts.sparsify(model, METHODS[method](), total_steps=12, steps_per_epoch=3, **options)
    groups = sparsifier.param_groups(weight_decay=0.01)
    shared = [[group | {"params": group["params"][part::parts]} for group in groups] for part in range(parts)]
    optimizers = [
        torch.optim.SGD([group for group in share if group["params"]], lr=0.05, momentum=0.9) for share in shared
    ]
    sparsifier.attach(optimizers if parts > 1 else optimizers[0], defer=defer)
    generator = torch.Generator().manual_seed(1)
    for _ in range(12):
        x = torch.randn(16, 16, generator=generator)
        y = x[:, :4].argmax(1)

        def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
            for optimizer in optimizers:
                optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            return loss

        step(optimizers, closure)
    assert sparsifier.step == 12
    return sparsifier


def everything(sparsifier: ts.Sparsifier) -> list[Any]:
    return [sparsifier.model.state_dict(), sparsifier.state_dict()["tensors"]]


@pytest.mark.parametrize("method", METHODS)
def test_a_step_with_a_closure_is_the_plain_step(method: str) -> None:
    assert_same(everything(trained(method, by_closure)), everything(trained(method, plain)))


def test_a_closure_s_gradients_are_multiplied_where_they_are_deferred() -> None:
    runs = [everything(trained("str", step, defer=True)) for step in (by_closure, plain)]
    assert_same(runs[0], runs[1])


@pytest.mark.parametrize("method", METHODS)
def test_several_optimizers_are_one(method: str) -> None:
    assert_same(everything(trained(method, plain, parts=2)), everything(trained(method, plain)))


def test_an_optimizer_that_is_skipped_holds_the_others_up_by_no_step() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    sparsifier = ts.sparsify(model, GMP(sparsity=0.5, update_every=1), total_steps=6)
    first, second = (torch.optim.SGD(part.parameters(), lr=0.1) for part in model)
    sparsifier.attach([first, second])
    for number in range(6):
        model(torch.randn(4, 8)).square().mean().backward()
        first.step()
        if number != 2:
            second.step()
    assert sparsifier.step == 6


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda m: torch.optim.LBFGS(m.parameters()), "evaluates its closure once a step, got LBFGS"),
        (lambda m: [], "expected an optimizer, got an empty list"),
        (
            lambda m: torch.optim.SGD(m[0].parameters(), 0.1),
            "got none for 2 and 0 more of 2",
        ),
        (
            lambda m: [torch.optim.SGD(m.parameters(), 0.1)] * 2,
            "every parameter in one optimizer, got one",
        ),
    ],
)
def test_optimizers_that_cannot_be_followed_are_refused(make: Any, words: str) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    sparsifier = ts.sparsify(model, Static(sparsity=0.5))
    with pytest.raises(ValueError, match=words):
        sparsifier.attach(make(model))
    sparsifier.attach(torch.optim.SGD(model.parameters(), 0.1))


def test_compaction_takes_one_optimizer() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    sparsifier = ts.sparsify(model, Static(sparsity=0.5), pattern="block:4")
    sparsifier.attach([torch.optim.SGD(part.parameters(), lr=0.1) for part in model])
    with pytest.raises(ValueError, match="compact: expected one optimizer, got 2"):
        sparsifier.compact()


class Quantised(torch.optim.Optimizer):
    """As bitsandbytes keeps its moments: codes of 8 bits and the table of their values."""

    def __init__(self, parameters: Any, key: str = "state1") -> None:
        super().__init__(parameters, {"lr": 0.1})
        self.key = key

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                codes = torch.full_like(p, 200, dtype=torch.uint8, requires_grad=False)
                self.state[p] = {self.key: codes, "qmap1": torch.linspace(-1, 1, 257)[:256], "absmax1": torch.ones(1)}


def test_codes_of_eight_bits_are_cleared_to_the_code_of_zero() -> None:
    weight = nn.Parameter(torch.ones(4, 4))
    optimizer, where = Quantised([weight]), torch.eye(4) > 0
    optimizer.step()
    clear_state(optimizer, weight, where)
    state = optimizer.state[weight]
    assert torch.equal(state["qmap1"][state["state1"].long()] == 0, where)
    reset_state(optimizer)
    assert not state["qmap1"][state["state1"].long()].any() and state["qmap1"].any() and state["absmax1"].all()


def test_state_that_nobody_knows_is_refused_by_name_and_only_where_it_matters() -> None:
    for method, refused in ((Static(sparsity=0.5), True), (STR(), False)):
        model = nn.Linear(4, 4)
        sparsifier = ts.sparsify(model, method)
        optimizer = Quantised(sparsifier.param_groups(), key="codes")
        sparsifier.attach(optimizer)
        if refused:
            with pytest.raises(RuntimeError, match=r"got 'codes' of torch.uint8 in Quantised; use an"):
                optimizer.step()
        else:
            optimizer.step()


def test_a_reset_leaves_averages_of_weights_and_step_sizes_alone() -> None:
    weight = nn.Parameter(torch.ones(3))
    for cls, kept in ((torch.optim.ASGD, "ax"), (torch.optim.Rprop, "step_size")):
        optimizer = cls([weight], lr=0.1)
        weight.grad = torch.ones(3)
        optimizer.step()
        before = optimizer.state[weight][kept].clone()
        reset_state(optimizer)
        assert torch.equal(optimizer.state[weight][kept], before)
    adagrad = torch.optim.Adagrad([weight], lr=0.1, initial_accumulator_value=0.5)
    adagrad.step()
    reset_state(adagrad)
    assert adagrad.state[weight]["sum"].tolist() == [0.5] * 3


@pytest.mark.parametrize("method", METHODS)
def test_a_layer_without_a_gradient_has_one_of_zero(method: str) -> None:
    torch.manual_seed(0)
    model = nn.ModuleList([nn.Linear(16, 16) for _ in range(3)])
    sparsifier = ts.sparsify(model, METHODS[method](), total_steps=12, steps_per_epoch=3)
    optimizer = torch.optim.SGD(sparsifier.param_groups(weight_decay=0.01), lr=0.05, momentum=0.9)
    sparsifier.attach(optimizer)
    for number in range(12):
        x = torch.randn(8, 16)
        for place, layer in enumerate(model):
            if place != number % 3:
                x = layer(x)
        x.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert sparsifier.step == 12 and all(bool(value.isfinite().all()) for value in model.state_dict().values())


def test_frozen_and_quantised_layers_stay_dense_with_the_reason() -> None:
    class Codes(nn.Parameter):
        pass

    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    model[0].requires_grad_(False)
    model[1].weight = Codes(model[1].weight.data)
    model[2].weight = nn.Parameter(torch.ones(8, 8, dtype=torch.int8), requires_grad=False)
    sparsifier = ts.sparsify(model, "static", sparsity=0.5)
    assert list(sparsifier.layers) == ["3"]
    assert {skip.name: skip.reason for skip in sparsifier.skipped} == {
        "0": "frozen",
        "1": "quantised weight (Codes, torch.float32)",
        "2": "quantised weight (Parameter, torch.int8)",
    }
    named = ts.sparsify(nn.Sequential(nn.Linear(8, 8).requires_grad_(False)), "static", sparsity=0.5, include=["0"])
    assert list(named.layers) == ["0"]


class Reads(nn.Module):
    """Reads one weight, calls another layer, and does both with a third."""

    def __init__(self) -> None:
        super().__init__()
        self.read, self.called, self.both = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.called(x @ self.read.weight)
        return self.both(x) if x.shape[0] > 1 else x @ self.both.weight


class Hides(nn.Module):
    """Reads a weight in a way that its code does not show."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(x @ getattr(self, "in" + "ner").weight)


def test_weights_that_the_parent_reads_stay_dense() -> None:
    sparsifier = ts.sparsify(Reads(), "topkast", sparsity=0.5)
    assert list(sparsifier.layers) == ["called"]
    assert {skip.name: skip.reason for skip in sparsifier.skipped} == dict.fromkeys(["read", "both"], "read by Reads")
    assert list(ts.sparsify(Reads(), "topkast", sparsity=0.5, include=["*"]).layers) == ["called", "both"]
    with pytest.raises(ValueError, match=r"with a weight of their own, got 'read' \(read by Reads\)"):
        ts.sparsify(Reads(), "topkast", sparsity=0.5, include=["read"])


@pytest.mark.parametrize("method", ["str", "gmp", "rigl", "topkast", "dst", "swat"])
def test_a_layer_that_is_passed_by_is_named_at_the_first_step(method: str) -> None:
    model = Hides()
    sparsifier = ts.sparsify(model, METHODS[method](), total_steps=12)
    optimizer = torch.optim.SGD(sparsifier.param_groups(lr=0.01))
    sparsifier.attach(optimizer)
    model(torch.randn(4, 8)).sum().backward()
    with pytest.warns(UserWarning, match=r"got no call of inner and 0 more in the first step.*exclude=\['inner'\]"):
        optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(torch.randn(4, 8)).sum().backward()
        optimizer.step()


@pytest.mark.parametrize("method", METHODS)
def test_compiled_layers_are_not_taken_for_passed_by(method: str) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    sparsifier = ts.sparsify(model, METHODS[method](), total_steps=12, steps_per_epoch=3)
    optimizer = torch.optim.SGD(sparsifier.param_groups(lr=0.01), momentum=0.9)
    sparsifier.attach(optimizer)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="attach: expected every sparse layer to be called")
        torch.compile(model, backend="eager")(torch.randn(4, 8)).sum().backward()
        optimizer.step()


@pytest.mark.parametrize("method", ["topkast", "swat", "dst", "gmp"])
def test_torch_s_encoder_evaluates_as_it_trains(method: str) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2)
    sparsifier = ts.sparsify(model, METHODS[method](), total_steps=3)
    optimizer = torch.optim.SGD(sparsifier.param_groups(lr=0.01))
    sparsifier.attach(optimizer)
    for _ in range(3):
        model(torch.randn(2, 5, 16)).square().mean().backward()
        optimizer.step()
    x = torch.randn(2, 5, 16)
    trains = model(x).detach()
    with torch.no_grad():
        torch.testing.assert_close(copy.deepcopy(model).eval()(x), trains)
        torch.testing.assert_close(model.eval()(x), trains)
        torch.testing.assert_close(sparsifier.finalize().eval()(x), trains)


BY_NAME = [
    *("gmp", "rigl", "set", "mest", "dsr", "snfs", "str", "autosparse", "topkast", "powerprop", "optg", "swat"),
    *("static", "acdc"),
]


@pytest.mark.parametrize(("total", "epoch"), [(12, 2), (12, 6), (40, 10), (101, 17)])
@pytest.mark.parametrize("method", BY_NAME)
def test_a_method_s_name_alone_reaches_its_sparsity_in_a_run_of_any_length(
    method: str, total: int, epoch: int, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64))
    sparsifier = ts.sparsify(model, method, sparsity=0.8, total_steps=total, steps_per_epoch=epoch)
    optimizer = torch.optim.AdamW(sparsifier.param_groups(lr=1e-3))
    sparsifier.attach(optimizer)
    masks = {name: None if layer.mask is None else layer.mask.clone() for name, layer in sparsifier.layers.items()}
    for _ in range(total):
        nn.functional.cross_entropy(model(torch.randn(8, 32)), torch.randint(64, (8,))).backward()
        optimizer.step()
        optimizer.zero_grad()
    if method != "static":
        moved = [mask is None or not torch.equal(mask, sparsifier.layers[name].mask) for name, mask in masks.items()]
        assert any(moved), "masks have never moved"
    assert sparsifier.sparsity() == pytest.approx(0.8, abs=0.011)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sparsifier.finalize()


@pytest.mark.parametrize("every", [None, 1, 5, 50])
def test_a_run_too_short_for_its_sparsity_is_refused_with_the_shortest_that_works(every: int | None) -> None:
    def begin(total: int) -> ts.Sparsifier:
        torch.manual_seed(0)
        return ts.sparsify(nn.Linear(32, 64), STR(sparsity=0.8, control_every=every), total_steps=total)

    with pytest.raises(ValueError, match="str: expected total_steps of at least") as caught:
        begin(3)
    shortest = int(str(caught.value).split("at least ")[1].split()[0])
    with pytest.raises(ValueError, match=f"at least {shortest} "):
        begin(shortest - 1)
    sparsifier = begin(shortest)
    optimizer = torch.optim.SGD(sparsifier.param_groups(lr=1e-4))
    sparsifier.attach(optimizer)
    for _ in range(shortest):
        sparsifier.model(torch.randn(8, 32)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert sparsifier.sparsity() == pytest.approx(0.8, abs=0.01)


def test_a_target_that_was_missed_is_said_with_the_reason() -> None:
    def run(steps: int, method: Any, attach: bool = True) -> ts.Sparsifier:
        model = nn.Linear(32, 64)
        sparsifier = ts.sparsify(model, method, total_steps=20, steps_per_epoch=5)
        optimizer = torch.optim.SGD(sparsifier.param_groups(lr=1e-3))
        if attach:
            sparsifier.attach(optimizer)
        for _ in range(steps):
            model(torch.randn(8, 32)).square().mean().backward()
            optimizer.step()
        return sparsifier

    for sparsifier, words in (
        (run(20, GMP(sparsity=0.8), attach=False), "got 0.000; no step was counted: attach the optimizer"),
        (run(20, RigL(sparsity=0.8), attach=False), r"got 0\.\d+; no step was counted: attach the optimizer"),
        (run(5, GMP(sparsity=0.8)), r"got 0\.\d+; the run stopped at step 5 of 20: train to its end"),
    ):
        with pytest.warns(UserWarning, match=rf"finalize: expected a sparsity of 0.8 under method '.*', {words}"):
            sparsifier.finalize()


def test_a_state_of_explicit_intervals_goes_on_under_intervals_left_to_the_run() -> None:
    def begin(every: int | None) -> ts.Sparsifier:
        return ts.sparsify(nn.Linear(32, 64), RigL(sparsity=0.8, update_every=every), total_steps=50)

    saved = begin(7).state_dict()
    ours = begin(None)
    assert ours.method.every("update_every") == 1
    ours.load_state_dict(saved)
    assert ours.method.every("update_every") == 7
    with pytest.raises(ValueError, match=r"rigl.update_every = 3, got 7"):
        begin(3).load_state_dict(saved)


def test_modules_that_cannot_be_taken_stay_as_they_are_with_the_reason() -> None:
    taken, empty = nn.Linear(4, 4), nn.Linear(0, 4)
    taken.register_buffer("threshold", torch.ones(4))
    flagged = nn.Linear(4, 4)
    flagged.mask = torch.ones(4)
    model = nn.ModuleList([taken, empty, flagged, nn.Linear(4, 4)])
    sparsifier = ts.sparsify(model, "str")
    assert list(sparsifier.layers) == ["3"]
    assert {skip.name: skip.reason for skip in sparsifier.skipped} == {
        "0": "has an attribute 'threshold' of its own", "1": "no weights", "2": "has an attribute 'mask' of its own",
    }  # fmt: skip
    assert torch.equal(taken.threshold, torch.ones(4)) and torch.equal(flagged.mask, torch.ones(4))
    with pytest.raises(ValueError, match=r"got 'weight', which is made at the first forward; run the model once"):
        ts.sparsify(nn.LazyLinear(4), "str")


def test_a_loss_that_is_no_number_is_named() -> None:
    sparsifier = ts.sparsify(nn.Linear(4, 4), "str")
    for loss in (0.5, torch.tensor(0.5), torch.ones(1, dtype=torch.bfloat16)):
        sparsifier.observe(loss=loss)
    for loss, words in (("x", "got 'x'"), (torch.ones(2), "got a tensor of shape .2."), (None, "got None")):
        with pytest.raises(TypeError, match=f"observe: expected the loss as one number, {words}; pass loss.detach"):
            sparsifier.observe(loss=loss)


@pytest.mark.parametrize("method", METHODS)
def test_a_state_that_a_method_cannot_read_changes_nothing(method: str) -> None:
    sparsifier = trained(method, plain)
    saved = sparsifier.state_dict()
    before = copy.deepcopy(everything(sparsifier))
    spoiled = [saved | {"method_state": {"nonsense": "x"}}, saved | {"epoch_losses": ["x"]}, saved | {"step": "x"}]
    spoiled += [
        saved | {"tensors": {key: value for key, value in saved["tensors"].items() if not key.startswith("method:")}}
    ]
    refused = 0
    for state in spoiled:
        try:
            sparsifier.load_state_dict(state)
        except ValueError as error:
            refused += 1
            assert str(error).startswith("load_state_dict: expected")
            assert_same(everything(sparsifier), before)
            assert_same(sparsifier.state_dict(), saved)
    assert refused >= 2


def _attach_on(rank: int, folder: Path) -> None:
    """What attach says on each of two ranks whose models were drawn alike, and each for itself."""
    torch.distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    said = []
    for seed in (0, rank):
        torch.manual_seed(seed)
        model = nn.Linear(16, 16)
        sparsifier = ts.sparsify(model, Static(sparsity=0.5, criterion="magnitude"))
        try:
            sparsifier.attach(torch.optim.SGD(model.parameters(), lr=0.1))
            said.append("attached")
        except RuntimeError as error:
            said.append(str(error))
    (folder / str(rank)).write_text("\n".join(said))
    torch.distributed.destroy_process_group()


def test_ranks_that_chose_other_masks_are_refused_on_all_of_them(tmp_path: Path) -> None:
    torch.multiprocessing.start_processes(_attach_on, (tmp_path,), nprocs=2, start_method="fork")
    for rank in ("0", "1"):
        alike, apart = (tmp_path / rank).read_text().splitlines()
        assert alike == "attached"
        assert apart.startswith("attach: expected the same masks on all 2 ranks, got others on some; give every rank")


def test_weights_that_were_cut_up_after_sparsify_are_refused() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    sparsifier = ts.sparsify(model, "static", sparsity=0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    layer, whole = model[0], model[0].weight
    # As FSDP leaves a part of its flat parameter, under the name of a Parameter that is gone.
    layer.register_parameter("weight", whole)
    del layer._parameters["weight"]
    layer.weight = whole.detach().view(8, 8)
    with pytest.raises(ValueError, match=r"attach: expected whole weights, got no Parameter in '0'; sharding is not"):
        sparsifier.attach(optimizer)
    del layer.weight
    layer.register_parameter("weight", nn.Parameter(whole.detach().reshape(4, 2, 8)))
    with pytest.raises(ValueError, match=r"got a Parameter of shape \[4, 2, 8\] in '0'; sharding is not"):
        sparsifier.attach(optimizer)
    layer.register_parameter("weight", whole)
    sparsifier.attach(optimizer)


@pytest.mark.usefixtures("fresh_accelerate")
def test_deepspeeds_engine_is_refused_by_name() -> None:
    # Its ZeRO steps the inner optimizer once for every flat group of copies: the clock would run too fast.
    engine = type("DeepSpeedEngine", (nn.Module,), {"__module__": "deepspeed.runtime.engine"})()
    with pytest.raises(ValueError, match=r"sparsify: expected an unwrapped model, got DeepSpeedEngine"):
        ts.sparsify(engine, "str")
    sparsifier = ts.sparsify(nn.Linear(8, 8), "static", sparsity=0.5)
    inner = torch.optim.SGD(sparsifier.param_groups(lr=0.1))
    Accelerator(cpu=True)
    zero = type("DeepSpeedZeroOptimizer", (), {"__module__": "deepspeed.runtime.zero.stage_1_and_2"})()
    zero.optimizer = inner
    for optimizer in (DeepSpeedOptimizerWrapper(inner), zero, AcceleratedOptimizer(inner)):
        if isinstance(optimizer, AcceleratedOptimizer) and not isinstance(optimizer, DeepSpeedOptimizerWrapper):
            sparsifier.attach(optimizer)
            continue
        with pytest.raises(ValueError, match=r"attach: expected an optimizer that steps .* got DeepSpeed's"):
            sparsifier.attach(optimizer)
