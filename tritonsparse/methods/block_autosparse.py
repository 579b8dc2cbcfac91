"""AutoSparse and STR on blocks: which block stays is learned from what its gate is worth, not from its norm.

A weight sees its threshold because weights differ by orders of magnitude. The RMS of a block of n weights does not:
over n independent weights it spreads by 1/sqrt(2n) of its mean, 2 % at 32x32, so a threshold on it is a wall that
loses no block or all of them. Here a block b has a gate, hard and constant on the block:

    What_b  = g_b W_b,   g_b = 1 kept, 0 pruned
    dL/dg_b = <dWhat_b, W_b>                        the loss that closing or opening the gate is worth, to first order
    dW_b    = m_b dWhat_b,   m_b = 1 kept, alpha pruned, 0 outside B         as eq. (8) of AutoSparse has it for weights
    z_b    <- beta z_b + (1 - beta) m_b |dL/dg_b| = beta z_b + (1 - beta) |<dW_b, W_b>|        before every step

z is an average of |first-order Taylor terms|, read off the gradient that the step is taken with, so alpha anneals
it as it anneals dW: while alpha > 0 a pruned block whose gate matters comes back; as alpha falls, pruned blocks fall
behind, and at 0 (STR) none returns.

Layers are compared by what a block adds to those of its layer that rank above it (LAMP, arXiv:2010.07611, eq. 4):

    v_b     = z_b / sum_{c in the layer of b: z_c >= z_b} z_c       1 for the layer's best, falling down the ranks
    kept    = the (1 - p_t) n_blocks largest v over all layers
    p_t     = p (1 - (1 - t/t_1)^3)                                 target_sparsity.py; every `control_every` steps
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch
from torch import Tensor

from ..layers import SparseLayer
from ..mask import kept_count, topk_masks
from ..pattern import Block
from ..units import from_units, to_units
from .base import Layers, MethodState
from .masked import write_masks

__all__ = ["BlockGates", "gate_gradients", "shares"]

logger = logging.getLogger(__name__)

_MEMORY = 0.98  # beta: of fifty steps


def gate_gradients(gradient: Tensor, weight: Tensor, pattern: Block) -> Tensor:
    """dL/dg of one gate a block, [N/r, K/c], at least float32: the inner product of each block of both [N, K]."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    return to_units(gradient.to(dtype) * weight.to(dtype), pattern)


def shares(scores: Tensor) -> Tensor:
    """v: each score over the sum of those that are not below it, ties counting from the lowest index on.

    Args:
        scores: any shape, not negative.

    Returns:
        float32, shape of `scores`, in [0, 1]; 0 where the score is 0.
    """
    flat = scores.flatten().double()
    # A stable order, so that ties fall as they do in the top-k: the lowest index ranks first.
    ranked, order = flat.sort(descending=True, stable=True)
    found = ranked / ranked.cumsum(0).clamp_min(torch.finfo(torch.float64).tiny)
    return torch.empty_like(flat).scatter_(0, order, found).reshape(scores.shape).float()


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
            self.scores[name] = torch.zeros(size, device=layers[name].weight.device)

    def observe(self, layers: Layers, scale: Tensor | None) -> None:
        """Average the gates' gradients of this step in; a layer without a gradient keeps its scores."""
        for name, layer in layers.items():
            weight = layer.weight
            if weight.grad is None:
                continue
            worth = gate_gradients(layer.oriented(weight.grad), layer.oriented(weight.detach()), self.pattern).abs()
            score = self.scores[name] = self.scores[name].to(weight.device)
            score.lerp_(worth if scale is None else worth / scale, 1.0 - _MEMORY)

    def choose(self, layers: Layers, step: int, sparsity: float) -> None:
        """Write the masks of `sparsity` over all layers' blocks, exact to one block."""
        ranks = {name: shares(score) for name, score in self.scores.items()}
        total = sum(rank.numel() for rank in ranks.values())
        least = {name: self.least(rank.numel()) for name, rank in ranks.items()}
        kept = max(kept_count(total, sparsity), sum(least.values()))
        masks = topk_masks(list(ranks.values()), kept)
        counts = torch.stack([mask.sum() for mask in masks]).tolist()
        short = [name for name, count in zip(ranks, counts, strict=True) if count < least[name]]
        if short:
            # v is at most 1, so 2 is kept before anything else.
            raised = [torch.where(topk_masks([rank], least[name])[0], 2.0, rank) for name, rank in ranks.items()]
            masks = topk_masks(raised, kept)
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

    def superset(self, layer: SparseLayer, density: float) -> Tensor:
        """B of one layer: what is kept, joined by the pruned blocks of largest norm up to `density` of all; bool, the
        weight's shape."""
        assert layer.mask is not None  # written in begin
        norms = to_units(layer.oriented(layer.weight.detach().float().square()), self.pattern)
        kept = to_units(layer.oriented(layer.mask).float(), self.pattern) > 0
        wanted = max(kept_count(norms.numel(), round(1.0 - density, 12)), int(kept.sum()))
        chosen = topk_masks([torch.where(kept, torch.finfo(norms.dtype).max, norms)], wanted)[0]
        return layer.stored(from_units(chosen, self.pattern, _shape(layer)))

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
