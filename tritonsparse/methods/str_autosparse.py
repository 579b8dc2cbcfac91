"""STR and AutoSparse: one learned threshold a layer; AutoSparse lets annealed gradients reach pruned weights.

STR: Kusupati et al., "Soft Threshold Weight Reparameterization for Learnable Sparsity", arXiv:2002.03231.
AutoSparse: Kundu et al., "AutoSparse: Towards Automated Sparse Training of Deep Neural Networks",
arXiv:2304.06941.

    T_l    = sigma(s_l)                                             s_l learned, one a layer
    What_l = sign(W_l) relu(|W_l| - T_l)                            eq. (7)
    dW_l   = m . dW_hat_l,   m = 1 kept, alpha pruned, 0 outside B   eqs. (1), (8)
    ds_l   = -sigma'(s_l) sum sign(W_l) m dW_hat_l
    alpha  = alpha_0 scale(epoch), 0 from epoch `zero_alpha_epoch`  eqs. (2)-(4), (9), Algorithm 1
    B_l    = TopK(|W_l|, backward_density), joined with the kept set eq. (8)

STR is alpha = 0. At |W| = T the multiplier is alpha (the paper's x <= 0); where W = 0 it is 0, because
sign(0) = 0. Forward and dX see W_hat; dW is dense while alpha > 0, of density B with `backward_density`.

What moves the thresholds is the optimizer: the loss alone raises them slowly, weight decay on s pulls
s < 0 towards 0 and T towards 0.5. `threshold_weight_decay` adds lambda s to the gradient of s before the
step (L2, under every optimizer alike); None leaves s to the optimizer's own `weight_decay`, the same as the
weights', as both papers have it. `threshold_lr_scale` is the ratio of the learning rates of s and W. Where these
three end is found by trying; `sparsity` aims at a number instead (target_sparsity.py).

With a block pattern there is no threshold: block_autosparse.py.

Differs from the paper in:
- alpha changes when an epoch starts (paper); the listing changes it after the epoch, so that epochs 0 and 1
  share alpha_0.
- at |W| = T the multiplier is alpha (paper); the listing's strict x < 0 gives 1.
- kept weights always get their gradient (paper: B >= A); the listing zeroes them where A outgrows B.
- alpha belongs to the model; in the listing it is a class attribute shared by every model of the process.
- the auto-tuned alpha may pass 1, as in Algorithm 1 and the listing, although eq. (1) has it in [0, 1].
- `sparsity` moves all logits together towards a sparsity over the whole model; the papers have no such thing, and
  None, the default, is theirs.
- blocks are ours: gates, their scores and one cut-off in place of thresholds.
- `refresh_every` above 1 gives pruned weights r alpha times their gradient every r-th step; the papers have 1.
- a layer never stays below `min_density` = 1 % of its weights; the papers' layers may empty and die. 0 is theirs.
- STR's default s_0 is the -20 of AutoSparse's Transformer runs; STR's own -3200 goes with SGD on ImageNet.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..clock import Clock
from ..layers import SparseLayer
from ..masks.topk import kept_count, topk_mask
from ..masks.units import check_pattern
from ..pattern import Block, Pattern, Unstructured
from ..schedules import SCHEDULES, sigmoid_cosine
from .base import Densities, Layers, MethodState
from .block_autosparse import BlockGates
from .fields import check_types
from .target_sparsity import TargetSparsity

__all__ = ["STR", "AutoSparse", "AutoTune"]


@dataclass(kw_only=True)
class STR(TargetSparsity):
    """Soft thresholds learned per layer; pruned weights get no gradient.

    sparsity, reach_by, control_every, min_density: a target, and a floor under each layer (`TargetSparsity`).
    threshold_init: initial logit of every layer (s_0); -inf runs every layer dense, on W itself.
    threshold_weight_decay: lambda of the L2 gradient on s; None = the optimizer's own weight decay.
    threshold_lr_scale: learning rate of s over that of W.

    With a block pattern `sparsity` is needed, of blocks, and the three threshold fields must be left out.
    """

    name: ClassVar[str] = "str"
    infinite: ClassVar[tuple[str, ...]] = ("threshold_init",)
    patterns: ClassVar[tuple[type, ...]] = (Unstructured, Block)
    threshold_init: float = -20.0
    threshold_weight_decay: float | None = None
    threshold_lr_scale: float = 1.0
    _gates: BlockGates | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.threshold_init = float(self.threshold_init)
        if self.threshold_init == math.inf:
            raise ValueError(
                f"{self.name}: expected threshold_init as a logit below infinity, got {self.threshold_init}; -5 gives "
                f"T = sigma(-5) = 0.0067"
            )
        if self.sparsity and self.threshold_init < -30.0:
            raise ValueError(
                f"{self.name}: expected threshold_init of at least -30 with a sparsity to reach, got "
                f"{self.threshold_init}; leave it out"
            )
        for name, least in (("threshold_weight_decay", 0.0), ("threshold_lr_scale", 0.0)):
            value = getattr(self, name)
            if value is not None and not value >= least:
                raise ValueError(f"{self.name}: expected {name} of at least {least}, got {value}; correct it")

    @torch.no_grad()
    def setup(self, layers: Layers, clock: Clock, pattern: Pattern, seed: int) -> None:
        if self.threshold_init == -math.inf or self.sparsity == 0.0:
            return
        if self.sparsity is not None:
            clock.require(self.name, "total_steps")
        if isinstance(pattern, Block):
            self._begin_blocks(layers, pattern)
            return
        if self.sparsity is not None:
            self.check_length(layers, self.threshold_init, clock)
        for layer in layers.values():
            layer.kind = "soft"
            layer.threshold = nn.Parameter(layer.number(self.threshold_init, 1))
            layer.alpha = layer.number(0.0)
        if self.sparsity is not None:
            self.begin(layers)

    def _begin_blocks(self, layers: Layers, pattern: Block) -> None:
        check_pattern(self.name, {name: layer.unit_shape for name, layer in layers.items()}, pattern)
        if self.sparsity is None:
            raise ValueError(
                f"{self.name}: expected sparsity= with pattern '{pattern}', got None; blocks have no threshold that "
                f"could find one: pass the share of blocks to prune, as in sparsity=0.7"
            )
        for name, default in ((each.name, each.default) for each in dataclasses.fields(self)):
            if name.startswith("threshold") and getattr(self, name) != default:
                raise ValueError(
                    f"{self.name}: expected {name} left out with pattern '{pattern}', whose blocks have no threshold, "
                    f"got {getattr(self, name)}; leave it out"
                )
        # What is worth little before a model has learned to use it, queries and keys, would be gone when it has.
        floor = 0.5 * (1.0 - self.sparsity) if self.min_density is None else self.min_density
        self._gates = BlockGates(self.name, pattern, floor)
        self._gates.begin(layers)

    @torch.no_grad()
    def before_step(self, layers: Layers, clock: Clock, optimizer: Optimizer, scale: Tensor | None) -> bool:
        if self._gates is not None:
            self._gates.observe(layers, scale)
        if not self.threshold_weight_decay:
            return False
        for layer in layers.values():
            s = layer.threshold
            if s is not None and s.grad is not None:
                penalty = self.threshold_weight_decay * s
                s.grad += penalty if scale is None else penalty * scale
        return False

    @torch.no_grad()
    def after_step(self, layers: Layers, clock: Clock, optimizer: Optimizer) -> None:
        if self._gates is None:
            self.control(layers, clock)
        elif self.due(clock):
            self._gates.choose(layers, clock.step, self.wanted(clock))

    def state_dict(self) -> MethodState:
        return super().state_dict() | ({} if self._gates is None else self._gates.state_dict())

    def load_state_dict(self, state: Mapping[str, float | int | Tensor]) -> None:
        super().load_state_dict(state)
        if self._gates is not None:
            self._gates.load_state_dict(state)


@dataclass(kw_only=True)
class AutoTune:
    """Tune alpha over the first epochs against a dense run's losses (AutoSparse, Algorithm 1).

    After epoch e < len(reference_losses), with mean training loss L: alpha *= 1 + increase if
    L > (1 + tolerance) reference_losses[e], else alpha *= 1 - decrease. From then on alpha follows
    sigmoid-cosine over the epochs that remain, whatever `alpha_schedule` says.

    reference_losses: mean training loss of each of the first epochs of a dense run (the paper: 10 % of them).
    alpha_init: alpha_0 while tuning.
    tolerance, increase, decrease: eps_0, eps_1, eps_2.
    """

    reference_losses: list[float]
    alpha_init: float = 0.5
    tolerance: float = 0.01
    increase: float = 0.05
    decrease: float = 0.005

    def __post_init__(self) -> None:
        check_types(self, "autosparse", part="auto_tune.")
        self.reference_losses = [float(loss) for loss in self.reference_losses]
        if not self.reference_losses or not all(math.isfinite(loss) for loss in self.reference_losses):
            raise ValueError(
                f"autosparse: expected auto_tune.reference_losses as finite epoch losses of a dense run, got "
                f"{self.reference_losses}; record them with a run of method 'dense'"
            )
        if min(self.alpha_init, self.tolerance, self.increase, self.decrease) < 0.0 or self.decrease >= 1.0:
            raise ValueError(
                f"autosparse: expected auto_tune's numbers of at least 0 and decrease below 1, got {self}; correct them"
            )


@dataclass(kw_only=True)
class AutoSparse(STR):
    """STR with gradient annealing.

    threshold_init: initial logit of every layer (s_0): -5 on images, -7 on translation.
    alpha: alpha_0, the gradient's multiplier on pruned weights at the start, in [0, 1].
    alpha_schedule: a name of `tritonsparse.schedules.SCHEDULES`; "sigmoid_cosine" on images, "exponential" on
        translation.
    zero_alpha_epoch: alpha = 0 from this epoch on; None = never.
    backward_density: |B| / n, the share of the largest weights that dW is computed for; None = all.
    refresh_every: steps r between gradients of pruned weights, r alpha times theirs; in between dW is what is kept.
    auto_tune: tune alpha against a dense run; None = follow the schedule.
    """

    name: ClassVar[str] = "autosparse"
    threshold_init: float = -5.0
    alpha: float = 0.75
    alpha_schedule: str = "sigmoid_cosine"
    zero_alpha_epoch: int | None = None
    backward_density: float | None = None
    refresh_every: int = 1
    auto_tune: AutoTune | None = None
    _tuned: float = field(default=math.nan, init=False, repr=False, compare=False)
    _annealed: float = field(default=0.0, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.auto_tune, dict):
            self.auto_tune = AutoTune(**self.auto_tune)
        if not isinstance(self.auto_tune, AutoTune | None):
            raise ValueError(
                f"autosparse: expected auto_tune as an AutoTune or its fields, got {self.auto_tune!r}; correct it"
            )
        if self.zero_alpha_epoch is not None and self.zero_alpha_epoch < 0:
            raise ValueError(
                f"autosparse: expected zero_alpha_epoch of at least 0, got {self.zero_alpha_epoch}; None means never"
            )
        if self.alpha_schedule not in SCHEDULES:
            raise ValueError(
                f"autosparse: expected alpha_schedule among {', '.join(SCHEDULES)}, got {self.alpha_schedule!r}; "
                f"choose one of them"
            )
        if not 0.0 <= self.alpha <= 1.0:
            raise ValueError(f"autosparse: expected alpha in [0, 1], got {self.alpha}; 0 is STR, 1 straight-through")
        if self.backward_density is not None and not 0.0 < self.backward_density <= 1.0:
            raise ValueError(
                f"autosparse: expected backward_density in (0, 1], got {self.backward_density}; None means all"
            )
        if self.refresh_every < 1:
            raise ValueError(
                f"autosparse: expected refresh_every of at least 1, got {self.refresh_every}; 1 means every step"
            )
        if self.auto_tune is not None:
            self._tuned = self.auto_tune.alpha_init

    def setup(self, layers: Layers, clock: Clock, pattern: Pattern, seed: int) -> None:
        needs: list[str] = []
        if self.alpha_schedule != "constant" or self.auto_tune or self.zero_alpha_epoch is not None:
            needs.append("steps_per_epoch")
        if self.auto_tune or self.alpha_schedule not in ("constant", "exponential"):
            needs.append("total_steps")
        clock.require(self.name, *needs)
        super().setup(layers, clock, pattern, seed)
        self._write_view(layers, clock)

    def _begin_blocks(self, layers: Layers, pattern: Block) -> None:
        super()._begin_blocks(layers, pattern)
        for layer in layers.values():
            layer.alpha = layer.number(0.0)

    def current_alpha(self, clock: Clock) -> float:
        """alpha for the steps of epoch `clock.epoch`."""
        epoch = clock.epoch
        if self.zero_alpha_epoch is not None and epoch >= self.zero_alpha_epoch:
            return 0.0
        if self.auto_tune is None:
            return self.alpha * SCHEDULES[self.alpha_schedule](epoch, clock.total_epochs)
        tuning = len(self.auto_tune.reference_losses)
        if epoch <= tuning:
            return self._tuned
        return self._tuned * sigmoid_cosine(epoch - tuning, clock.total_epochs - tuning)

    def end_epoch(self, epoch: int, loss: float | None, clock: Clock) -> None:
        if self.auto_tune is None or epoch >= len(self.auto_tune.reference_losses):
            return
        if loss is None:
            raise RuntimeError(
                f"autosparse: expected training losses of epoch {epoch} for auto_tune, got none; call "
                f"sparsifier.observe(loss=loss) in the training loop"
            )
        tune = self.auto_tune
        worse = loss > tune.reference_losses[epoch] * (1.0 + tune.tolerance)
        self._tuned *= 1.0 + tune.increase if worse else 1.0 - tune.decrease

    def after_step(self, layers: Layers, clock: Clock, optimizer: Optimizer) -> None:
        super().after_step(layers, clock, optimizer)
        self._write_view(layers, clock)

    @torch.no_grad()
    def _write_view(self, layers: Layers, clock: Clock) -> None:
        self._annealed, alpha = self.current_alpha(clock), self._multiplier(clock)
        comes_or_goes = bool(alpha) != bool(self._multiplier(dataclasses.replace(clock, step=max(0, clock.step - 1))))
        for layer in layers.values():
            if layer.alpha is None:
                continue
            layer.alpha.fill_(alpha)
            # alpha = 0 makes B = A (eq. 8's remark): no set to choose.
            if self._gates is None and self.backward_density is not None:
                layer.grad_mask = None if alpha == 0.0 else self._superset(layer, self.backward_density)
            elif self._gates is not None and (comes_or_goes or self.due(clock)):
                # Said by a mask, so that blocks outside it can be skipped.
                self._gates.write_superset(layer, self.backward_density if alpha else 0.0)

    def _multiplier(self, clock: Clock) -> float:
        """alpha for the coming step: with `refresh_every` as much in the mean, in one step of r."""
        alpha = self.current_alpha(clock)
        if self.refresh_every > 1:
            return 0.0 if clock.step % self.refresh_every else alpha * self.refresh_every
        return alpha

    @staticmethod
    def _superset(layer: SparseLayer, density: float) -> Tensor:
        magnitude = layer.weight.detach().abs()
        return topk_mask(magnitude, kept_count(magnitude.numel(), round(1.0 - density, 12)))

    def resume(self, layers: Layers) -> None:
        super().resume(layers)
        alphas = [layer.alpha for layer in layers.values() if layer.alpha is not None]
        if self.refresh_every == 1 and alphas:
            self._annealed = float(alphas[0])

    def cost_state(self) -> Any:
        return self._annealed > 0.0

    def densities(self, layer: SparseLayer, kept: float) -> Densities:
        if layer.alpha is None or self._annealed == 0.0:
            return Densities(kept, kept, kept)
        reached = max(kept, 1.0 if self.backward_density is None else self.backward_density)
        return Densities(kept, kept, kept + (reached - kept) / self.refresh_every)

    def state_dict(self) -> MethodState:
        tuned = {} if self.auto_tune is None else {"tuned_alpha": self._tuned}
        return super().state_dict() | tuned | ({} if self.refresh_every == 1 else {"annealed_alpha": self._annealed})

    def load_state_dict(self, state: Mapping[str, float | int | Tensor]) -> None:
        super().load_state_dict(state)
        if self.auto_tune is not None:
            self._tuned = float(state["tuned_alpha"])
        if self.refresh_every > 1:
            self._annealed = float(state["annealed_alpha"])
