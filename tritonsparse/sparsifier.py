"""The Sparsifier: the one object that controls a sparsified model.

It owns the clock (pre- and post-step hooks on the real optimizer), calls the method's hooks, and reads the
layers for reports and export. Layers hold no reference to it.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from . import borders
from .checkpoint import bsr, files, state, state_files
from .checkpoint.adapters import file_names, tuner_layers
from .checkpoint.sidecar import SIDECAR, read_sidecar, restore_weights, write_sidecar
from .clock import Clock
from .compaction import Compaction
from .flops.conventions import Costs
from .flops.fractions import TrainingMeter
from .layers import SparseLayer
from .losses import EpochLosses
from .masks.embeddings import EmbeddingMasks
from .masks.units import unit_size
from .merging import check_adapters
from .methods import Method
from .optimizer_state import check_stepping, gradient_scale, together, unwrap
from .param_groups import check_thresholds, param_groups, refuse_frozen
from .pattern import Pattern
from .ranks import check_same_masks, refuse_sharded
from .readers import check_called
from .report import Report, make_report, summary_line
from .selection import Skip
from .steps import Steps
from .topologies import Topologies
from .weight_cache import WeightCache

__all__ = ["Sparsifier"]


class Sparsifier:
    """Controls the sparse layers of one model; made by `tritonsparse.sparsify`.

    Attributes:
        model: the model, as it was passed.
        method: the method object (a private copy).
        layers: dotted module name -> sparse layer, in the model's order.
        skipped: weights that stayed dense, each with the reason.
        embeddings: the masks of the embedding tables, None unless `embedding_sparsity` was given.
    """

    def __init__(
        self,
        model: nn.Module,
        method: Method,
        layers: dict[str, SparseLayer],
        skipped: Sequence[Skip],
        clock: Clock,
        pattern: Pattern,
        seed: int,
        embeddings: EmbeddingMasks | None = None,
    ) -> None:
        self.model = model
        self.method = method
        self.layers = layers
        self.skipped = list(skipped)
        self.pattern = pattern
        self.seed = seed
        self.embeddings = embeddings
        self.clock = clock
        self._losses = EpochLosses()
        self._optimizer: Optimizer | None = None
        self._steps: Steps | None = None
        self._first = True
        self._cache: WeightCache | None = None
        self._topologies = Topologies(layers)
        self._compaction = Compaction(layers, method, clock, pattern)
        # Kinds of the views that the last step was taken with; a method may change them right after it.
        self.trained_kinds: dict[str, str] = {}
        # What is told of every step before it moves anything.
        self.meters: weakref.WeakSet[TrainingMeter] = weakref.WeakSet()
        self._finalized = False
        self._mask_embeddings()
        self._topologies.write()
        borders.guard(model, self)

    @property
    def epoch_losses(self) -> list[float]:
        """Mean observed training loss of every finished epoch, averaged over ranks."""
        return self._losses.epochs

    @property
    def _device(self) -> torch.device:
        return next(iter(self.layers.values())).weight.device

    @property
    def step(self) -> int:
        """Real optimizer steps taken since `sparsify`, resumed ones included."""
        return self.clock.step

    def attach(self, optimizer: Any, *, cache_dtype: torch.dtype | None = None, defer: bool = False) -> None:
        """Take the clock from `optimizer`: from now on each of its real steps is one step.

        A step that a GradScaler skips, or an accumulation micro-step, is not one. Accelerate's wrapper is
        unwrapped. Attaching again to the same optimizer changes nothing. With a closure, the work is done after it has
        made the gradients.

        Args:
            optimizer: the optimizer that trains the model, built from `param_groups()`; or a list of several that
                together hold all sparse layers' weights (Muon for matrices, AdamW for the rest), of whose steps one
                each is one step.
            cache_dtype: keep every layer's sparse weight in this dtype, that of the matrix products (bfloat16 under
                autocast), and write it once a step, all layers in one launch, instead of once a forward. Costs its
                memory all the time; pays with gradient accumulation, evaluation and checkpointed forwards. The
                results are the same bit for bit. After an edit through `.data`, or a step of another fused optimizer on
                the same weights, call `refresh()`. Without it a forward makes its own: layers that skip blocks too,
                under 16-bit autocast, where a training forward has many rows.
            defer: leave dense gradients in `.grad` and multiply them once a step, after accumulation and reduction over
                ranks, all layers in one launch. Clipping, and a GradScaler's search for infinities, then see the
                dense gradients of pruned weights, and zeros for the thresholds.

        Raises:
            TypeError: not an optimizer.
            ValueError: a weight or threshold is missing from it, a threshold shares a group with weights, another
                optimizer is attached, or it is of a kind that calls its closure several times a step.
            RuntimeError: the Sparsifier is finalized.
        """
        self._require_live("attach")
        parts = [unwrap(each) for each in (optimizer if isinstance(optimizer, list | tuple) else [optimizer])]
        if self._steps is not None and _same(self._steps.optimizers, parts):
            return
        inner = together("attach", parts)
        if self._optimizer is not None:
            raise ValueError(
                "attach: expected one optimizer, got a second one; call detach() first, or attach all that train the "
                "sparse layers as a list"
            )
        if cache_dtype is not None and not (isinstance(cache_dtype, torch.dtype) and cache_dtype.is_floating_point):
            raise ValueError(
                f"attach: expected a floating-point cache_dtype, got {cache_dtype}; pass the dtype of the matrix "
                f"products, torch.bfloat16 under bf16 autocast"
            )
        refuse_sharded("attach", self.layers)
        check_adapters("attach", self.model)
        refuse_frozen("attach", self.layers, self.method)
        check_thresholds("attach", self.layers, inner)
        check_same_masks("attach", self.layers)
        check_stepping("attach", parts)
        self._optimizer = inner
        self._steps = Steps(parts, self._begin_step, self._end_step)
        if cache_dtype is not None or defer:
            self._cache = WeightCache(self.model, self.layers, cache_dtype, defer)

    def detach(self) -> None:
        """Let go of the optimizer and of cached views, and `expand`; the views stay as they are."""
        self.expand()
        if self._cache is not None:
            self._cache.close()
            self._cache = None
        if self._steps is not None:
            self._steps.remove()
        self._steps, self._optimizer = None, None

    def compact(self) -> None:
        """Store only kept blocks of weights, gradients and optimizer state whenever the topology stays (compaction.py).

        From now on, until `expand()`: packed after every step after which the method says so (AC/DC in sparse phases,
        RigL and its kin between updates, GMP after its last, a static mask always), dense again for the steps that need
        it. A layer's `weight` is the same Parameter, then with data `[nnz, r, c]`, and so are its gradient and state.
        Training is that of the dense storage, and so are checkpoints: what is saved meanwhile, of the model, of the
        optimizer or of this object, has dense tensors. To load one, `expand()` first.

        Raises:
            RuntimeError: no optimizer is attached, a process group is initialised (DDP), or pruned weights are not 0.
            ValueError: the pattern is not of blocks, the method never has such a stretch, pruned weights get gradients,
                the optimizer's update is not elementwise or its state unknown, or views are cached.
        """
        self._require_live("compact")
        self._compaction.start(self._optimizer, cached=self._cache is not None)

    def expand(self) -> None:
        """Undo `compact()`: dense storage with zeros outside the masks, until it is called again."""
        self._require_live("expand")
        self._compaction.stop()
        self._topologies.write()

    def refresh(self) -> None:
        """Rewrite the topologies of blocks and the kept effective weights (`attach(cache_dtype=...)`) after weights
        changed in a way no counter shows; the next step writes all zeros outside the masks."""
        self._require_live("refresh")
        self.method.forget()
        self._write_derived()

    def _write_derived(self) -> None:
        """What is made of the weights and masks once a step."""
        # A tensor that is made in inference mode cannot be saved for a backward.
        with torch.inference_mode(False), torch.no_grad():
            self._topologies.write()
            if self._cache is not None:
                self._cache.write()

    def param_groups(self, **defaults: Any) -> list[dict[str, Any]]:
        """Groups for any torch optimizer: weights with decay, biases and norms without, thresholds.

        Args:
            defaults: `lr` and `weight_decay` for the weights, anything else for every group.

        Returns:
            Up to three groups, each with its `name`; every trainable parameter is in exactly one.

        Raises:
            ValueError: the method scales the thresholds' learning rate and no `lr` is given.
        """
        self._require_live("param_groups")
        return param_groups(self.model, self.layers, self.method, defaults)

    def observe(self, *, loss: Tensor | float) -> None:
        """Note a training loss of the current epoch (for auto-tuning and `epoch_losses`); no host sync.

        Call it before the optimizer step that the loss leads to. The mean over ranks is taken when the epoch
        ends, which needs `steps_per_epoch`.

        Raises:
            TypeError: the loss is no number.
        """
        if not isinstance(loss, Tensor | Real) or (isinstance(loss, Tensor) and loss.numel() != 1):
            got = f"a tensor of shape {list(loss.shape)}" if isinstance(loss, Tensor) else repr(loss)
            raise TypeError(f"observe: expected the loss as one number, got {got}; pass loss.detach()")
        self._losses.observe(loss, self._device)

    def set_row_mask(self, *masks: Tensor) -> None:
        """Say which rows of the coming batch are tokens: padding then counts for no activation threshold, and for no
        weight's gradient that is made of a packed activation (SWAT).

        A layer takes the mask that has the leading dimensions of its input; several of that shape count together, so
        that no token is ever left out, and without one every row counts. Holds until the next call.

        Args:
            masks: bool, `[B, S]` for inputs `[B, S, K]`, True = a token: of a translation batch the source's and the
                target's. None at all: every row counts.

        Raises:
            TypeError: a mask is not a bool tensor.
        """
        for mask in masks:
            if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
                got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
                raise TypeError(f"set_row_mask: expected bool tensors, got {got}; pass attention_mask.bool()")
        for layer in self.layers.values():
            if layer.sparse_input is not None:
                layer.sparse_input.row_masks = [mask.to(layer.weight.device) for mask in masks]

    def sparsity(self) -> float:
        """Zeros among the effective weights of the sparsified layers, as a fraction of them."""
        self._require_live("sparsity")
        total = sum(layer.dense_shape.numel() for layer in self.layers.values())
        return 1.0 - sum(layer.kept_count() for layer in self.layers.values()) / total

    def report(self, macs: Costs | None = None, *, convention: str = "autosparse") -> Report:
        """Per-layer table: shape, sparsity (of elements, in blocks, exploitable), threshold, cost, back end; and what
        was skipped and why.

        Args:
            macs: dense cost of one forward by layer name (`tritonsparse.flops.layer_costs` or `layer_macs`); without
                it a layer counts `weight.numel()`, one application of it.
            convention: how cost is counted, one of `tritonsparse.flops.CONVENTIONS`.

        Raises:
            ValueError: an unknown convention, or costs that have none of the sparse layers.
            TypeError: the convention needs `layer_costs`.
        """
        self._require_live("report")
        return make_report(self.method, self.layers, self.skipped, self.step, macs, self.pattern, convention)

    def summary(self) -> str:
        """One line: what was converted, what was not."""
        self._require_live("summary")
        tables = {} if self.embeddings is None else self.embeddings.tables
        sparsity = 0.0 if self.embeddings is None else self.embeddings.sparsity
        return summary_line(self.model, self.method, self.layers, self.skipped, tables, sparsity)

    def state_dict(self) -> dict[str, Any]:
        """All that training needs beside the model's and the optimizer's state: plain tensors and numbers."""
        self._require_live("state_dict")
        return state.pack(self._state())

    def _state(self) -> state.State:
        return state.State(self.method, self.pattern, self.seed, self.layers, self.clock, self._losses, self.embeddings)

    def load_state_dict(self, saved: Mapping[str, Any], *, longer: bool = False) -> None:
        """Restore `state_dict`.

        Args:
            longer: take the state of a run that was planned with fewer `total_steps`: it goes on at its step by the
                schedules of this one.

        Raises:
            ValueError: it is of another method or another model; nothing has been changed then.
        """
        self._require_live("load_state_dict")
        self._compaction.refuse_load()
        before, fields = state.pack(self._state()), dict(vars(self.method))
        try:
            state.unpack(self._state(), saved, longer)
        except Exception as error:
            # What a method makes of its own part is not known before it does.
            for name in self.method.fits():
                setattr(self.method, name, fields[name])
            state.unpack(self._state(), before)
            self.refresh()
            if isinstance(error, ValueError) and str(error).startswith("load_state_dict"):
                raise
            raise ValueError(
                f"load_state_dict: expected a state that method {self.method.name!r} can read, got a damaged one "
                f"({type(error).__name__}: {error}); take another checkpoint"
            ) from error
        self.refresh()

    def register(self, accelerator: Any) -> None:
        """Save and load this state with `accelerator.save_state` / `load_state` (safetensors + JSON)."""
        state_files.register(accelerator, self)

    def finalized_state_dict(self, weights: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """The model's state dict with zeros baked in and views left out; the model is not changed.

        Args:
            weights: taken instead of the model's own, by name: averages of master weights and thresholds that somebody
                else keeps, which are then seen through today's masks.
        """
        self._require_live("finalized_state_dict")
        files.check_weights("finalized_state_dict", self.model, weights)
        finalized = files.finalized_state_dict(self.model, weights)
        return finalized if self.embeddings is None else self.embeddings.apply(finalized)

    def trained_state_dict(self) -> dict[str, Tensor]:
        """As `finalized_state_dict`, but of the model that the last step trained.

        The two differ where a method has just ended a dense phase (AC/DC): the views are sparse by then, while the
        weights are still the dense twin.
        """
        self._require_live("trained_state_dict")
        if self.trained_kinds and set(self.trained_kinds.values()) == {"dense"}:
            return files.finalized_state_dict(self.model, dense=True)
        return self.finalized_state_dict()

    def finalize(self, format: str = "dense", *, max_density: float = 0.5) -> nn.Module:
        """Bake the zeros into the weights and restore the stock modules, in place; returns the model.

        The Sparsifier is used up: its optimizer hooks are removed and further calls raise RuntimeError.

        Args:
            format: "dense", or "bsr": layers whose pattern is of blocks become modules that hold the kept blocks only
                (layers/bsr.py), which `save_bsr` and `load_bsr` write and read.
            max_density: for "bsr": a layer that keeps more than this fraction of its blocks becomes a stock module.

        Raises:
            ValueError: an unknown format, or nothing to pack; nothing has been changed then.
        """
        self._require_live("finalize")
        if format not in ("dense", "bsr"):
            raise ValueError(f'finalize: expected format "dense" or "bsr", got {format!r}; choose one')
        self.expand()
        if any(isinstance(layer.get_base_layer(), SparseLayer) for _, layer in tuner_layers(self.model)):
            warnings.warn(
                "finalize: expected adapters to be merged first, got some over sparse layers; a merge into what is "
                "then an ordinary layer fills its zeros",
                stacklevel=2,
            )
        packed = bsr.plan_blocks(self.layers, self.pattern, max_density) if format == "bsr" else {}
        if self.method.name != "dense" and all(layer.kind == "dense" for layer in self.layers.values()):
            warnings.warn(
                f"finalize: expected sparse views, got every layer dense under method {self.method.name!r}; the "
                f"model is saved without zeros",
                stacklevel=2,
            )
        else:
            self.warn_off_target("finalize")
        self.detach()
        if self.embeddings is not None:
            self.embeddings.bake()
        bsr.finalize_blocks(self.model, self.layers, self.pattern, packed)
        files.finalize({name: layer for name, layer in self.layers.items() if name not in packed})
        borders.release(self.model)
        self._finalized = True
        return self.model

    def save_pretrained(self, directory: str | Path) -> None:
        """Write a checkpoint that loads without this package, and beside it the sidecar to go on from.

        `directory` holds what `model.save_pretrained` writes, zeros baked in, and `tritonsparse.safetensors`
        with views, thresholds and method, which `tritonsparse.load` reads. Neither is written in part. Adapters of PEFT
        go into `directory/adapters/<name>`, and the base is written under its stock names.

        Raises:
            TypeError: the model has no `save_pretrained`.
        """
        self._require_live("save_pretrained")
        self.warn_off_target("save_pretrained")
        files.save_pretrained(self.model, self._state(), Path(directory))

    def restore(self, directory: str | Path, *, longer: bool = False) -> None:
        """Go on from what was saved in `directory`, whose weights have been loaded into the model.

        The folder is one that `save_pretrained` wrote, of this object, of the model or of a Trainer, or
        `accelerator.save_model`: views, thresholds, master weights, the clock and the method's state come back.
        `longer` as in `load_state_dict`.

        Raises:
            FileNotFoundError: the folder has neither sidecar nor state.
            ValueError: it is damaged, or of another run or of other weights.
        """
        self._require_live("restore")
        directory = Path(directory)
        if not (directory / SIDECAR).is_file():
            # A checkpoint of version 0.1, or of a model without save_pretrained: its weights are the masters.
            self.load_state_dict(state_files.read_state(directory), longer=longer)
            return
        self.restore_sidecar(*read_sidecar(directory), directory, longer)

    def restore_sidecar(
        self, saved: Mapping[str, Any], tensors: Mapping[str, Tensor], directory: Path, longer: bool = False
    ) -> None:
        """`restore` of what `read_sidecar` read in `directory`."""
        self._require_live("restore")
        names = file_names(self.model, self.layers, "model")
        for of in ("base", "adapters"):
            if saved["kinds"].keys() != set(names.values()):
                names = file_names(self.model, self.layers, of)
        ours = {theirs: name for name, theirs in names.items()}
        layers = {theirs: self.layers[name] for name, theirs in names.items()}
        before = self.state_dict()
        saved = saved if names.keys() == saved["kinds"].keys() else state.renamed(saved, ours)
        self.load_state_dict(saved, longer=longer)
        try:
            restore_weights(layers, tensors, directory, saved.get("elsewhere"))
        except ValueError:
            self.load_state_dict(before)
            raise
        self.refresh()

    def write_sidecar(self, directory: str | Path, of: str = "model") -> None:
        """Write the sidecar beside an ordinary checkpoint that holds `finalized_state_dict()`.

        Args:
            of: what the checkpoint holds of a model that carries adapters of PEFT: all of it under its present names
                ("model"), its base under stock names ("base"), or the adapters without the base ("adapters").
        """
        self._require_live("write_sidecar")
        elsewhere = file_names(self.model, self.layers, "base") if of == "adapters" else {}
        names = file_names(self.model, self.layers, of)
        write_sidecar(self._state(), Path(directory), names, elsewhere)

    def copy_views(self, copy: nn.Module) -> None:
        """Make a copy of the model, of averages that somebody else keeps, see its weights through today's masks.

        Args:
            copy: of the same structure, sparse layers included, as `copy.deepcopy(model)` is.

        Raises:
            ValueError: a layer is missing in it; nothing has been changed then.
        """
        self._require_live("copy_views")
        modules = dict(copy.named_modules())
        for name, layer in self.layers.items():
            other = modules.get(name)
            if not isinstance(other, SparseLayer) or other.dense_shape != layer.dense_shape:
                raise ValueError(
                    f"copy_views: expected a copy of the model, with a sparse layer at {name!r}, got "
                    f"{type(other).__name__}; pass what copy.deepcopy(model) returned"
                )
        for name, layer in self.layers.items():
            other = modules[name]
            assert isinstance(other, SparseLayer)  # checked above
            if (mask := layer.view_tensor("mask")) is not None:
                other.hide(mask)

    def warn_off_target(self, function: str) -> None:
        """Warn, in the name of `function`, where the sparsity asked for is not there, or no step was counted."""
        target = getattr(self.method, "sparsity", None)
        if self.method.idle or not target:
            return
        never = self.step == 0 and not self.method.one_shot
        layers = self.layers.values()
        total = sum(layer.dense_shape.numel() for layer in layers)
        # A layer keeps whole units, and one at least.
        shapes = [tuple(layer.oriented(layer.weight).shape) for layer in layers if not layer.compacted]
        rounding = sum(unit_size(shape, self.pattern) for shape in shapes) / total
        got = self.sparsity()
        if abs(got - target) <= 0.01 + rounding and not never:
            return
        step, planned = self.step, self.clock.total_steps
        if never:
            why = "no step was counted: attach the optimizer that takes the steps"
        elif planned is not None and step < planned:
            why = f"the run stopped at step {step} of {planned}: train to its end, or plan it shorter"
        else:
            why = f"after {step} steps: see sparsifier.report()"
        warnings.warn(
            f"{function}: expected a sparsity of {target:g} under method {self.method.name!r}, got {got:.3f}; {why}",
            stacklevel=3,
        )

    def _begin_step(self, stepping: Optimizer) -> None:
        optimizer = self._optimizer
        assert optimizer is not None  # attached
        if self._first and not self.method.idle:
            check_called("attach", self.layers)
            check_adapters("attach", self.model)
        self._first = False
        for meter in self.meters:
            meter.before_step()
        if self._cache is not None:
            self._cache.backward()
        if self.embeddings is not None:
            self.embeddings.mask_gradients()
        if self.method.idle:
            return
        if self.method.before_step(self.layers, self.clock, optimizer, gradient_scale(stepping)):
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad = None
        self.method.guard(self.layers, optimizer)

    def _end_step(self, stepped: Optimizer) -> None:
        optimizer = self._optimizer
        assert optimizer is not None  # attached
        self.clock.step += 1
        self.trained_kinds = {name: layer.kind for name, layer in self.layers.items()}
        if self.clock.at_epoch_start:
            self.method.end_epoch(self.clock.epoch - 1, self._losses.end_epoch(self._device), self.clock)
        if not self.method.idle:
            self._compaction.before_hook()
            self.method.after_step(self.layers, self.clock, optimizer)
            self._compaction.after_hook()
        if self.embeddings is not None:
            self.embeddings.hold(optimizer)
        self._mask_embeddings()
        self._write_derived()

    def _mask_embeddings(self) -> None:
        if self.embeddings is not None:
            self.embeddings.follow(any(layer.kind != "dense" for layer in self.layers.values()))

    @property
    def is_live(self) -> bool:
        """False once it is finalized."""
        return not self._finalized

    def _require_live(self, function: str) -> None:
        if self._finalized:
            raise RuntimeError(
                f"{function}: expected a live Sparsifier, got one that is finalized; sparsify the model again"
            )


def _same(ours: Sequence[Any], theirs: Sequence[Any]) -> bool:
    return len(ours) == len(theirs) and all(a is b for a, b in zip(ours, theirs, strict=True))
