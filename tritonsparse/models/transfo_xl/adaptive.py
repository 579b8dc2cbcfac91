"""Adaptive input and adaptive softmax: rare types get narrow embeddings and share one slot of the first softmax.

Cluster 0 holds the ids below the first cutoff, cluster i those from cutoff i-1 to cutoff i. With h [T, d] and
tail clusters 1..C (Grave et al., arXiv:1609.04309):

    p(w)  = head(w)                    w in cluster 0
    p(w)  = head(cluster i) tail_i(w)  w in cluster i
    head  = softmax(h P_0 [W_0; V]^T + [b_0; c])         tail_i = softmax(h P_i W_i^T + b_i)

With `div_val` 1 the clusters are slices of one matrix W; the projections P_i exist where widths differ.
"""
# T: tokens, V: types, d: d_model

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .configuration import TransfoXLConfig

__all__ = ["AdaptiveEmbedding", "AdaptiveLogSoftmax", "adaptive_nll", "adaptive_nll_reference"]


class AdaptiveEmbedding(nn.Module):
    """ids [...] -> embeddings [..., d_model], times sqrt(d_model)."""

    def __init__(self, config: TransfoXLConfig) -> None:
        super().__init__()
        self.edges = [0, *config.cutoffs, config.vocab_size]
        self.d_model, self.div_val = config.d_model, config.div_val
        self.emb_layers = nn.ModuleList()
        self.emb_projs = nn.ParameterList()
        if config.div_val == 1:
            self.emb_layers.append(nn.Embedding(config.vocab_size, config.d_embed))
            if config.d_embed != config.d_model:
                self.emb_projs.append(nn.Parameter(torch.empty(config.d_model, config.d_embed)))
            return
        for cluster, (low, high) in enumerate(zip(self.edges[:-1], self.edges[1:], strict=True)):
            width = config.d_embed // config.div_val**cluster
            self.emb_layers.append(nn.Embedding(high - low, width))
            self.emb_projs.append(nn.Parameter(torch.empty(config.d_model, width)))

    def forward(self, ids: Tensor) -> Tensor:
        if self.div_val == 1:
            embedded = self.emb_layers[0](ids)
            if len(self.emb_projs):
                embedded = F.linear(embedded, self.emb_projs[0])
            return embedded * self.d_model**0.5
        result: Tensor | None = None
        # Every token is looked up in every cluster and the right one is taken: shapes stay static, so nothing is
        # read back from the device, and the projections are below 1 % of a model's work.
        for low, high, layer, projection in zip(
            self.edges[:-1], self.edges[1:], self.emb_layers, self.emb_projs, strict=True
        ):
            assert isinstance(layer, nn.Embedding)
            here = F.linear(layer((ids - low).clamp(0, high - low - 1)), projection)
            result = here if result is None else torch.where((ids >= low)[..., None], here, result)
        assert result is not None  # there is at least one cluster
        return result * self.d_model**0.5


class AdaptiveLogSoftmax(nn.Module):
    """hidden [..., d_model] -> log-probabilities of all types, or the loss of given targets."""

    def __init__(self, config: TransfoXLConfig) -> None:
        super().__init__()
        self.edges = [0, *config.cutoffs, config.vocab_size]
        self.div_val = config.div_val
        clusters = len(config.cutoffs)
        if clusters:
            self.cluster_weight = nn.Parameter(torch.empty(clusters, config.d_embed))
            self.cluster_bias = nn.Parameter(torch.empty(clusters))
        self.out_layers = nn.ModuleList()
        self.out_projs = nn.ParameterList()
        if config.div_val == 1:
            self.out_layers.append(nn.Linear(config.d_embed, config.vocab_size))
            if config.d_embed != config.d_model:
                for _ in range(clusters + 1):
                    self.out_projs.append(nn.Parameter(torch.empty(config.d_model, config.d_embed)))
            return
        for cluster, (low, high) in enumerate(zip(self.edges[:-1], self.edges[1:], strict=True)):
            width = config.d_embed // config.div_val**cluster
            self.out_layers.append(nn.Linear(width, high - low))
            self.out_projs.append(nn.Parameter(torch.empty(config.d_model, width)))

    def parts(self) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Weights, biases and projections (none where widths agree) of the clusters; the head's with its extra rows."""
        if self.div_val == 1:
            (layer,) = self.out_layers
            assert isinstance(layer, nn.Linear)
            sizes = [high - low for low, high in zip(self.edges[:-1], self.edges[1:], strict=True)]
            weights, biases = list(layer.weight.split(sizes)), list(layer.bias.split(sizes))
        else:
            weights = [layer.weight for layer in self.out_layers]
            biases = [layer.bias for layer in self.out_layers]
        if len(self.edges) > 2:
            weights[0] = torch.cat([weights[0], self.cluster_weight])
            biases[0] = torch.cat([biases[0], self.cluster_bias])
        return weights, biases, list(self.out_projs)

    def forward(self, hidden: Tensor) -> Tensor:
        """log p of every type, float32 `[..., V]`."""
        weights, biases, projections = self.parts()
        clusters = len(weights) - 1
        head = _log_probabilities(hidden, weights, biases, projections, 0)
        first = self.edges[1]
        out = [head[..., :first]]
        for i in range(1, clusters + 1):
            tail = _log_probabilities(hidden, weights, biases, projections, i)
            out.append(head[..., first + i - 1, None] + tail)
        return torch.cat(out, dim=-1)

    def nll(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """-log p of `targets` [...], float32 [...]; 0 where a target is negative (ignored)."""
        weights, biases, projections = self.parts()
        device = hidden.device.type
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
            hidden = hidden.to(dtype)
            weights, biases, projections = ([t.to(dtype) for t in part] for part in (weights, biases, projections))
        flat = hidden.reshape(-1, hidden.shape[-1])
        losses = adaptive_nll(flat, targets.reshape(-1), weights, biases, projections, self.edges)
        return losses.reshape(targets.shape)


def _log_probabilities(
    hidden: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], projections: Sequence[Tensor], cluster: int
) -> Tensor:
    if projections:
        hidden = F.linear(hidden, projections[cluster].t())
    logits = F.linear(hidden, weights[cluster], biases[cluster])
    return F.log_softmax(logits.float() if logits.dtype != torch.float64 else logits, dim=-1)


def _head_column(targets: Tensor, edges: Sequence[int]) -> Tensor:
    """Where each target, or its cluster, stands in the head."""
    column = targets.clamp(0, edges[1] - 1)
    for i in range(1, len(edges) - 1):
        column = torch.where(targets >= edges[i], edges[1] + i - 1, column)
    return column


def adaptive_nll_reference(
    hidden: Tensor,
    targets: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    projections: Sequence[Tensor],
    edges: Sequence[int],
) -> Tensor:
    """The definition of `adaptive_nll`: ordinary differentiable PyTorch."""
    head = _log_probabilities(hidden, weights, biases, projections, 0)
    clusters = len(weights) - 1
    column = _head_column(targets, edges)
    found = head.gather(-1, column[:, None]).squeeze(-1)
    found = torch.where(targets >= 0, found, torch.zeros_like(found))
    for i in range(1, clusters + 1):
        rows = ((targets >= edges[i]) & (targets < edges[i + 1])).nonzero().flatten()
        tail = _log_probabilities(hidden[rows], weights, biases, projections, i)
        found = found.index_add(0, rows, tail.gather(-1, (targets[rows] - edges[i])[:, None]).squeeze(-1))
    return -found


@torch.library.custom_op("tritonsparse::adaptive_nll", mutates_args=())
def _nll_op(
    hidden: Tensor,
    targets: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    projections: list[Tensor],
    edges: list[int],
) -> Tensor:
    with torch.autocast(hidden.device.type, enabled=False):
        return adaptive_nll_reference(hidden, targets, weights, biases, projections, edges)


@_nll_op.register_fake
def _(
    hidden: Tensor,
    targets: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    projections: list[Tensor],
    edges: list[int],
) -> Tensor:
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    return hidden.new_empty(targets.shape, dtype=dtype)


@torch.library.custom_op("tritonsparse::adaptive_nll_backward", mutates_args=())
def _nll_backward_op(
    grad: Tensor,
    hidden: Tensor,
    targets: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    projections: list[Tensor],
    edges: list[int],
) -> list[Tensor]:
    grads = [torch.zeros_like(tensor) for tensor in (hidden, *weights, *biases, *projections)]
    n = len(weights)
    for i in range(n):
        # Tail i concerns the tokens of cluster i, the head all that count.
        within = (targets >= edges[i]) & (targets < edges[i + 1]) if i else targets >= 0
        rows = within.nonzero().flatten()
        h, column = hidden[rows], targets[rows] - edges[i]
        if not i:
            column = _head_column(targets[rows], edges)
        with torch.autocast(hidden.device.type, enabled=False):
            inner = F.linear(h, projections[i].t()) if projections else h
            p = _log_probabilities(h, weights, biases, projections, i).exp()
            # d(-log p_c) / d(logit_j) = p_j - [j = c]
            p[torch.arange(len(rows), device=p.device), column] -= 1.0
            d_logits = (p * grad[rows, None]).to(hidden.dtype)
            grads[1 + i].copy_(d_logits.t() @ inner)
            grads[1 + n + i].copy_(d_logits.sum(0))
            d_inner = d_logits @ weights[i]
            if projections:
                grads[1 + 2 * n + i].copy_(h.t() @ d_inner)
                d_inner = d_inner @ projections[i].t()
            grads[0].index_add_(0, rows, d_inner)
    return grads


@_nll_backward_op.register_fake
def _(
    grad: Tensor,
    hidden: Tensor,
    targets: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    projections: list[Tensor],
    edges: list[int],
) -> list[Tensor]:
    return [torch.empty_like(tensor) for tensor in (hidden, *weights, *biases, *projections)]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    hidden, targets, weights, biases, projections, edges = inputs
    ctx.save_for_backward(hidden, targets, *weights, *biases, *projections)
    ctx.counts, ctx.edges = (len(weights), len(projections)), edges


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    hidden, targets, *rest = ctx.saved_tensors
    n, _ = ctx.counts
    grads = torch.ops.tritonsparse.adaptive_nll_backward(
        grad, hidden, targets, rest[:n], rest[n : 2 * n], rest[2 * n :], ctx.edges
    )
    return grads[0], None, grads[1 : n + 1], grads[n + 1 : 2 * n + 1], grads[2 * n + 1 :], None


_nll_op.register_autograd(_backward, setup_context=_setup_context)


def adaptive_nll(
    hidden: Tensor,
    targets: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    projections: Sequence[Tensor],
    edges: Sequence[int],
) -> Tensor:
    """-log p(target) under the adaptive softmax, in the order of the targets.

    How many tokens fall into a cluster is known on the device only; an op of its own keeps that out of the
    graphs of torch.compile. Its backward computes the logits anew instead of keeping T x V of them.

    Args:
        hidden: `[T, d]`, any floating dtype; the products are in it, the softmax in float32 (float64 for float64).
        targets: `[T]`, int64 ids; negative ones are ignored.
        weights, biases: per cluster `[size, d_i]` and `[size]`; the head's hold the cluster columns last.
        projections: per cluster `[d, d_i]`, or none at all.
        edges: `[0, *cutoffs, V]`.

    Returns:
        `[T]`, float32 (float64 for float64), 0 where ignored.

    Raises:
        ValueError: hidden and targets differ in length.
    """
    if hidden.dim() != 2 or targets.shape != hidden.shape[:1]:
        raise ValueError(
            f"adaptive_nll: expected hidden [T, d] with targets [T], got {list(hidden.shape)} with "
            f"{list(targets.shape)}; flatten both alike"
        )
    return _nll_op(hidden, targets, list(weights), list(biases), list(projections), list(edges))
