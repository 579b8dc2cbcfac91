"""AutoSparse and STR on blocks: which block stays is learned from what its weights are worth to the loss.

A weight sees its threshold because weights differ by orders of magnitude. The RMS of a block of n weights does not:
over n independent weights it spreads by 1/sqrt(2n) of its mean, 2 % at 32x32, so a threshold on it is a wall that
loses no block or all of them. Here a block b has a gate, hard and constant on the block, and a score:

    W_hat_i = g_b W_i,   g_b = 1 kept, 0 pruned                              for every weight i of the block
    dW_i   = m_b dW_hat_i,   m_b = 1 kept, alpha pruned, 0 outside B         as eq. (8) of AutoSparse has it for weights
    z_b   <- beta z_b + (1 - beta) sum_{i in b} |dW_i W_i|                  before every step
    v_b    = z_b / mean of z over the layer
    kept   = the (1 - p_t) n_blocks largest v over all layers               every `control_every` steps
    p_t    = p (1 - (1 - t/t_1)^3)                                          target_sparsity.py

Were every weight given a gate of its own, W_hat_i = g_i W_i, then dL/dg_i = dW_hat_i W_i: what removing W_i does to the
loss, to first order (SNIP, arXiv:1810.02340). z sums these over the block, so it is in units of loss, and blocks of a
layer compare. Layers do not, until they are trained: queries and keys are worth nothing before there is something to
attend to, and what is gone by then does not come back. So z is taken relative to its layer's mean. One cut-off for all
layers then makes their densities differ by how each spreads what it is worth: a layer that rests on few keeps few.

z is read off the gradient that the step is taken with, so alpha anneals it as it anneals dW: while alpha > 0 a pruned
block that matters comes back; as alpha falls pruned blocks fall behind, and at 0 (STR) their z dies away. There is no
cliff: what is pruned follows the cubic to one block. No layer keeps less than `min_density`, half of the mean density
unless it is given; v has reached it in none of the runs that chose this score.

Other scores lost: the RMS, one gate a block, LAMP, z itself and z over other powers of the layer's mean. The numbers
are in docs/experiments/block-autosparse.md.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch
from torch import Tensor

from ..layers import SparseLayer
from ..masks.topk import kept_count, topk_masks
from ..masks.units import from_units, to_units
from ..pattern import Block
from .base import Layers, MethodState
from .masked import write_masks

__all__ = ["BlockGates", "across_layers", "block_scores"]

logger = logging.getLogger(__name__)

_MEMORY = 0.98  # beta: of fifty steps


def block_scores(gradient: Tensor, weight: Tensor, pattern: Block) -> Tensor:
    """sum |dW W| over each block of both [N, K]: [N/r, K/c], at least float32, not negative."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    return to_units((gradient.to(dtype) * weight.to(dtype)).abs(), pattern)


def across_layers(score: Tensor) -> Tensor:
    """v of one layer's scores: z / mean z, 0 where all are."""
    return score / score.mean().clamp_min(torch.finfo(score.dtype).tiny)


class BlockGates:
    """The gates' scores, and the masks they choose, for one method object.

    method: its name, for messages. pattern: the blocks. min_density: share of its blocks that every layer keeps.
    """

    def __init__(self, method: str, pattern: Block, min_density: float) -> None:
        self.method = method
        self.pattern = pattern
        self.min_density = min_density
        self.scores: dict[str, Tensor] = {}
        self._floored: set[str] = set()

    def begin(self, layers: Layers) -> None:
        """Every block is kept and none has a score."""
        shapes = {name: _shape(layer) for name, layer in layers.items()}
        write_masks(layers, {name: torch.ones(shape, dtype=torch.bool) for name, shape in shapes.items()})
        for name, (n, k) in shapes.items():
            size = (n // self.pattern.rows, k // self.pattern.columns)
            self.scores[name] = layers[name].number(0.0, *size)

    def observe(self, layers: Layers, scale: Tensor | None) -> None:
        """Average this step's worth in; a layer without a gradient keeps its scores."""
        for name, layer in layers.items():
            weight = layer.weight
            if weight.grad is None:
                continue
            worth = block_scores(layer.oriented(weight.grad), layer.oriented(weight.detach()), self.pattern)
            score = self.scores[name] = self.scores[name].to(weight.device)
            score.lerp_((worth if scale is None else worth / scale).to(score.dtype), 1.0 - _MEMORY)

    def choose(self, layers: Layers, step: int, sparsity: float) -> None:
        """Write the masks of `sparsity` over all layers' blocks, exact to one block."""
        ranks = {name: across_layers(score.to(layers[name].weight.device)) for name, score in self.scores.items()}
        total = sum(rank.numel() for rank in ranks.values())
        least = {name: self.least(rank.numel()) for name, rank in ranks.items()}
        kept = max(kept_count(total, sparsity), sum(least.values()))
        masks = topk_masks(list(ranks.values()), kept)
        counts = torch.stack([mask.sum() for mask in masks]).tolist()
        short = [name for name, count in zip(ranks, counts, strict=True) if count < least[name]]
        if short:
            # Whatever the others' scores, the floor's blocks go first.
            masks = topk_masks(
                [
                    torch.where(topk_masks([rank], least[name])[0], torch.finfo(rank.dtype).max, rank)
                    for name, rank in ranks.items()
                ],
                kept,
            )
        chosen = dict(zip(ranks, masks, strict=True))
        write_masks(layers, {name: from_units(chosen[name], self.pattern, _shape(layers[name])) for name in layers})
        for name in short:
            if name not in self._floored:
                self._floored.add(name)
                logger.warning(
                    "%s: step %d: layer %s would keep less than min_density = %g of its blocks; it is held there "
                    "(said once)",
                    *(self.method, step, name, self.min_density),
                )

    def least(self, blocks: int) -> int:
        """Blocks that a layer of so many keeps at least."""
        return kept_count(blocks, round(1.0 - self.min_density, 12)) if self.min_density else 0

    def write_superset(self, layer: SparseLayer, density: float | None) -> None:
        """Make B the layer's `grad_mask`: what is kept, joined by the pruned blocks of largest norm up to `density` of
        all blocks (0: nothing is joined); None = everything."""
        assert layer.mask is not None  # written in begin
        if density is None:
            layer.grad_mask = None
            return
        chosen = layer.mask
        if density:
            norms = to_units(layer.oriented(layer.weight.detach().float().square()), self.pattern)
            kept = to_units(layer.oriented(layer.mask).float(), self.pattern) > 0
            wanted = max(kept_count(norms.numel(), round(1.0 - density, 12)), int(kept.sum()))
            units = topk_masks([torch.where(kept, torch.finfo(norms.dtype).max, norms)], wanted)[0]
            chosen = layer.stored(from_units(units, self.pattern, _shape(layer)))
        if layer.grad_mask is None:
            layer.grad_mask = torch.empty_like(layer.weight, dtype=torch.bool)
        layer.grad_mask.copy_(chosen)

    def state_dict(self) -> MethodState:
        return {f"scores/{name}": score for name, score in self.scores.items()}

    def load_state_dict(self, state: Mapping[str, float | int | Tensor]) -> None:
        for name, score in self.scores.items():
            saved = state[f"scores/{name}"]
            assert isinstance(saved, Tensor)
            self.scores[name] = saved.to(score.device).clone()


def _shape(layer: SparseLayer) -> tuple[int, int]:
    n, k = layer.oriented(layer.weight).shape
    return n, k
