"""Scores of a layer's experts on a client's own tokens, from one observer pass of the untouched model.

The reconstruction loss is FLEx's (arXiv 2506.00965; its body was not available to us): with X_l the hidden states entering
MoE block l and Z_l = M_l(X_l) the block's output, keeping only the experts S gives M_l^S(x) = sum over TopK(S) of the
renormalised router weights times E_e(x), plus the always-on shared expert, and

    loss_l(S) = sum over batches || Z_l - M_l^S(X_l) ||_F            accumulated in float64.

For |S| = 1 the renormalised weight is exactly 1. A family that scales its routed experts by a constant (DeepSeek) scales E_e
here as well; DeepSeek-V3's weights are sigmoids and its choice has a bias, as in its own router, but no groups. The other
criteria are derived from the same pass.

Shape letters: T tokens, D model, F expert hidden, E experts, K top-k, L MoE layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import nn

from fedgraft.moe.families import MoELayer, moe_layers, unwrap
from fedgraft.moe.routing import choose_among
from fedgraft.moe.trace import visit_blocks
from fedgraft.types import Batch

__all__ = [
    "CRITERIA",
    "Criterion",
    "ExpertScores",
    "LayerScores",
    "accumulate",
    "neuron_contributions",
    "observe_experts",
    "pruned_output",
]

Criterion = Literal["recon", "router_weighted_recon", "mean_weight_recon", "scale_free", "usage"]

CRITERIA: dict[Criterion, str] = {
    "recon": "sum over batches of ||Z - shared - E_e||_F: the card's form, weight 1",
    "router_weighted_recon": "||Z - shared - p_e(x) E_e||_F with the router's probability of e on each token",
    "mean_weight_recon": "||Z - shared - mean(p_e) E_e||_F with the router's mean probability of e",
    "scale_free": "1 - <F, f>^2 / (||F||^2 ||f||^2): the best constant multiple of E_e; 0 is perfect, 1 is useless",
    "usage": "minus the number of tokens routed to e",
}
"""Every criterion is a loss: the expert with the lowest value is chosen, the lowest index among equals."""


@dataclass
class LayerScores:
    """Additive statistics of one layer over a calibration set; each field has shape (E,), float64.

    With F the routed part of the block's output (Z minus the shared expert), f_e expert e's output, p_e its router
    probability: ``loss`` is the reconstruction loss, ``square_error`` sum ||F - f_e||^2, ``inner`` sum <F, f_e>,
    ``square_norm`` sum ||f_e||^2, ``probability`` sum p_e, ``weighted_inner`` sum p_e <F, f_e>, ``weighted_norm``
    sum p_e^2 ||f_e||^2, ``tokens`` tokens routed to e. ``zero_loss`` is the loss of putting out nothing,
    sum over batches ||F||_F; ``square_routed`` sum ||F||^2; ``num_tokens`` all tokens.
    """

    loss: torch.Tensor
    square_error: torch.Tensor
    inner: torch.Tensor
    square_norm: torch.Tensor
    probability: torch.Tensor
    weighted_inner: torch.Tensor
    weighted_norm: torch.Tensor
    tokens: torch.Tensor
    zero_loss: float = 0.0
    square_routed: float = 0.0
    num_tokens: int = 0

    @classmethod
    def empty(cls, num_experts: int) -> LayerScores:
        """All zero."""
        zeros = [torch.zeros(num_experts, dtype=torch.float64) for _ in range(8)]
        return cls(zeros[0], zeros[1], zeros[2], zeros[3], zeros[4], zeros[5], zeros[6], zeros[7])

    def criterion(self, name: Criterion) -> torch.Tensor:
        """Losses (E,) by one of ``CRITERIA``; the lowest is best."""
        if name == "recon":
            return self.loss
        if name == "usage":
            return -self.tokens
        if name == "router_weighted_recon":
            return (self.square_routed - 2 * self.weighted_inner + self.weighted_norm).clamp_min(0).sqrt()
        if name == "mean_weight_recon":
            weight = self.probability / max(self.num_tokens, 1)
            return (self.square_routed - 2 * weight * self.inner + weight**2 * self.square_norm).clamp_min(0).sqrt()
        norm = self.square_routed * self.square_norm
        return 1 - torch.where(norm > 0, self.inner**2 / norm.clamp_min(1e-300), torch.zeros_like(norm))


@dataclass
class ExpertScores:
    """Scores of all MoE layers, by layer index."""

    layers: dict[int, LayerScores] = field(default_factory=dict)


def pruned_output(layer: MoELayer, x_TD: torch.Tensor, kept: tuple[int, ...], top_k: int) -> torch.Tensor:
    """The routed part of a block that has only the experts ``kept``: scores of them, top-k, renormalised; (T, D)."""
    logits = layer.router_logits(x_TD)[:, list(kept)].float()
    weights, chosen = choose_among(unwrap(layer.router), layer.family.rule, logits, kept, min(top_k, len(kept)))
    weights = (weights / weights.sum(dim=-1, keepdim=True)).to(x_TD.dtype)
    dense = torch.zeros(x_TD.shape[0], len(kept), dtype=x_TD.dtype, device=x_TD.device).scatter_(1, chosen, weights)
    total = torch.zeros_like(x_TD)
    for position, expert in enumerate(kept):
        total += dense[:, position : position + 1] * _scaled_output(layer, expert, x_TD)
    return total


def observe_experts(
    model: nn.Module, batches: Iterable[Batch], *, kept: dict[int, tuple[int, ...]] | None = None
) -> ExpertScores:
    """Run the untouched model over a calibration set and score every expert of every MoE layer, on all tokens but padding.

    Args:
        model: An HF causal LM in eval mode; grafts are switched off meanwhile.
        batches: The client's own examples.
        kept: Experts already chosen, by layer, for the greedy search of more than one: ``loss[e]`` is then the loss of
            keeping them and e, and of keeping them alone where e is among them.

    Returns:
        The scores. Memory is that of one batch, not of the set.
    """
    layers = moe_layers(model)
    scores = ExpertScores(layers={layer.index: LayerScores.empty(layer.num_experts) for layer in layers})

    def visit(layer: MoELayer, x_TD: torch.Tensor, z_TD: torch.Tensor) -> None:
        accumulate(scores.layers[layer.index], layer, x_TD, z_TD, (kept or {}).get(layer.index, ()))

    visit_blocks(model, batches, visit)
    return scores


def neuron_contributions(model: nn.Module, batches: Iterable[Batch]) -> dict[int, torch.Tensor]:
    """Mean size of what each neuron of each expert adds to the residual stream on a client's tokens.

    Returns:
        By layer index (E, F) float64: E_x |a_n(x)| * ||down_proj[:, n]||, over all tokens but padding.
    """
    sums: dict[int, torch.Tensor] = {}
    counts: dict[int, int] = {}

    def visit(layer: MoELayer, x_TD: torch.Tensor, z_TD: torch.Tensor) -> None:
        size = torch.stack(
            [
                layer.expert_hidden(e, x_TD).abs().double().sum(dim=0) * layer.expert_weights(e)[1].double().norm(dim=0)
                for e in range(layer.num_experts)
            ]
        ).cpu()
        sums[layer.index] = sums[layer.index] + size if layer.index in sums else size
        counts[layer.index] = counts.get(layer.index, 0) + x_TD.shape[0]

    visit_blocks(model, batches, visit)
    return {index: total / max(counts[index], 1) for index, total in sums.items()}


def accumulate(
    scores: LayerScores,
    layer: MoELayer,
    x_TD: torch.Tensor,
    z_TD: torch.Tensor,
    kept: tuple[int, ...] = (),
    *,
    see: Callable[[int, torch.Tensor], None] | None = None,
) -> None:
    """Add one batch to a layer's scores. Norms are taken in float64: the loss is a difference of large numbers.

    Args:
        scores: Changed in place.
        layer: The layer.
        x_TD: What goes into the block, without padding.
        z_TD: The block's own output.
        kept: As in ``observe_experts``.
        see: Shown each expert's scaled output on all tokens (T, D), float64, which are computed only once.
    """
    shared = layer.shared_output(x_TD)
    routed = (z_TD if shared is None else z_TD - shared).double()
    top_k = layer.top_k
    probability = layer.probabilities(x_TD).double()
    chosen = layer.choose(layer.router_logits(x_TD))[1]
    scores.tokens += torch.bincount(chosen.reshape(-1), minlength=probability.shape[1]).cpu().double()
    scores.probability += probability.sum(dim=0).cpu()
    scores.zero_loss += float(routed.norm())
    scores.square_routed += float(routed.square().sum())
    scores.num_tokens += x_TD.shape[0]
    base_loss = float((routed - pruned_output(layer, x_TD, kept, top_k).double()).norm()) if kept else 0.0
    for expert in range(probability.shape[1]):
        output = _scaled_output(layer, expert, x_TD).double()
        if see is not None:
            see(expert, output)
        error = float((routed - output).square().sum())
        inner = (routed * output).sum(dim=-1)
        norm = output.square().sum(dim=-1)
        weight = probability[:, expert]
        scores.square_error[expert] += error
        scores.inner[expert] += float(inner.sum())
        scores.square_norm[expert] += float(norm.sum())
        scores.weighted_inner[expert] += float((weight * inner).sum())
        scores.weighted_norm[expert] += float((weight.square() * norm).sum())
        if not kept:
            scores.loss[expert] += error**0.5
        elif expert in kept:
            scores.loss[expert] += base_loss
        else:
            both = pruned_output(layer, x_TD, (*kept, expert), top_k).double()
            scores.loss[expert] += float((routed - both).norm())


def _scaled_output(layer: MoELayer, expert: int, x_TD: torch.Tensor) -> torch.Tensor:
    output = layer.expert_output(expert, x_TD)
    return output if layer.scale == 1 else output * layer.scale
