"""What each expert of a client serves and answers: routing shares, and mean inputs and responses by region of its inputs.

Everything goes through the model's own modules, so that adapters, trained rows and masks act: a response E_e(x) is what the
experts module gives for the token x sent to e alone with weight 1.

Shape letters: T tokens, N points, D model, L MoE layers, E experts, K top-k, R regions of an expert's inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import nn

from fedgraft.moe.families import MoELayer, moe_layers
from fedgraft.moe.routing import expert_probabilities
from fedgraft.moe.trace import trace_routing, visit_blocks
from fedgraft.types import Batch

__all__ = ["ExpertProfile", "RouterInputs", "k_means", "nearest", "profile_experts"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertProfile:
    """What a client's experts do on its tokens, padding left out; all float32, on the CPU, layers in the model's order.

    ``marginals`` (L, E): mean router probability of each expert, rows sum to 1. ``halves`` (2, L, E): the same over every
    other example; the second half is the first where there is one example only. ``counts`` (L, E, R): tokens sent to the
    expert, by region. ``inputs``, ``responses`` (L, E, R, D): mean input and mean response of those tokens; 0 where there
    are none.
    """

    marginals: torch.Tensor
    halves: torch.Tensor
    counts: torch.Tensor
    inputs: torch.Tensor
    responses: torch.Tensor


def profile_experts(
    model: nn.Module, batches: Sequence[Batch], *, num_regions: int = 1, centroids: torch.Tensor | None = None
) -> ExpertProfile:
    """Run a model over batches and measure every expert of every MoE layer.

    Args:
        model: An HF causal LM in eval mode, with whatever adapters and masks act on it.
        batches: At least one token.
        num_regions: R >= 1.
        centroids: Middles of the regions, (L, E, R, D); ``None`` with R > 1: each expert's inputs are cut into regions by
            k-means here, so that regions of two clients do not correspond.
    """
    layers = moe_layers(model)
    if centroids is None and num_regions > 1:
        centroids = _own_centroids(model, layers, batches, num_regions)
    sums = [_Sums.empty(layer, num_regions) for layer in layers]
    place = {layer.index: at for at, layer in enumerate(layers)}
    is_second = torch.empty(0, dtype=torch.bool)

    def visit(layer: MoELayer, x_TD: torch.Tensor, z_TD: torch.Tensor) -> None:
        at = place[layer.index]
        sums[at].add(layer, x_TD, is_second.to(x_TD.device), None if centroids is None else centroids[at].to(x_TD))

    seen = 0
    for batch in batches:
        rows = (torch.arange(seen, seen + batch.num_examples) % 2).bool()
        is_second = rows[:, None].expand(batch.attention_mask.shape)[batch.attention_mask.bool()]
        visit_blocks(model, [batch], visit, with_grafts=True)
        seen += batch.num_examples
    return ExpertProfile(
        marginals=torch.stack([(each.shares.sum(0) / each.tokens.sum()).float() for each in sums]),
        halves=torch.stack([each.halves().float() for each in sums], dim=1),
        counts=torch.stack([each.counts.float() for each in sums]),
        inputs=torch.stack([each.mean(each.inputs).float() for each in sums]),
        responses=torch.stack([each.mean(each.responses).float() for each in sums]),
    )


@dataclass(kw_only=True, slots=True)
class _Sums:
    """Sums over the tokens of one layer, float64 on the CPU: ``shares`` (2, E) and ``tokens`` (2) by half of the examples,
    ``counts`` (E, R), ``inputs`` and ``responses`` (E, R, D).
    """

    shares: torch.Tensor
    tokens: torch.Tensor
    counts: torch.Tensor
    inputs: torch.Tensor
    responses: torch.Tensor

    @classmethod
    def empty(cls, layer: MoELayer, num_regions: int) -> _Sums:
        experts, hidden = layer.num_experts, int(layer.router_rows.shape[1])

        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.float64)

        means = (zeros(experts, num_regions, hidden), zeros(experts, num_regions, hidden))
        return cls(
            shares=zeros(2, experts),
            tokens=zeros(2),
            counts=zeros(experts, num_regions),
            inputs=means[0],
            responses=means[1],
        )

    def add(self, layer: MoELayer, x_TD: torch.Tensor, is_second_T: torch.Tensor, centroids_ERD: torch.Tensor | None) -> None:
        routed = layer.router(x_TD)
        chosen_TK = routed[-1]
        probability_TE = expert_probabilities(layer.family.rule, routed[0]).double()
        for half, tokens in enumerate((~is_second_T, is_second_T)):
            self.shares[half] += probability_TE[tokens].sum(dim=0).cpu()
            self.tokens[half] += int(tokens.sum())
        expert_N = chosen_TK.reshape(-1)
        x_ND = x_TD.repeat_interleave(chosen_TK.shape[1], dim=0)
        experts = layer.block.get_submodule(layer.family.experts)
        response_ND = experts(x_ND, expert_N[:, None], torch.ones_like(expert_N[:, None], dtype=x_TD.dtype))
        num_experts, num_regions = self.counts.shape
        region_N = torch.zeros_like(expert_N)
        if centroids_ERD is not None:
            for expert in range(num_experts):
                is_own = expert_N == expert
                region_N[is_own] = nearest(x_ND[is_own], centroids_ERD[expert])
        index_N = (expert_N * num_regions + region_N).cpu()
        self.counts += torch.bincount(index_N, minlength=num_experts * num_regions).view(num_experts, num_regions)
        for total, values_ND in ((self.inputs, x_ND), (self.responses, response_ND)):
            total.view(num_experts * num_regions, -1).index_add_(0, index_N, values_ND.double().cpu())

    def halves(self) -> torch.Tensor:
        """Shares in each half of the examples, (2, E)."""
        if not self.tokens[1]:
            return (self.shares[:1] / self.tokens[0]).expand(2, -1)
        return self.shares / self.tokens[:, None]

    def mean(self, total_ERD: torch.Tensor) -> torch.Tensor:
        return total_ERD / self.counts.clamp_min(1)[:, :, None]


class RouterInputs:
    """Keeps what every router of a model read in its last forward pass; a context manager.

    ``inputs`` (T, D) by layer index, cut off from the graph, T all tokens of the batch row by row, padding among them.
    """

    def __init__(self, model: nn.Module) -> None:
        self._layers = moe_layers(model)
        self._handles: list[Any] = []
        self.inputs: dict[int, torch.Tensor] = {}

    def __enter__(self) -> Self:
        for layer in self._layers:

            def note(router: nn.Module, args: tuple[torch.Tensor, ...], index: int = layer.index) -> None:
                self.inputs[index] = args[0].detach().reshape(-1, args[0].shape[-1])

            self._handles.append(layer.router.register_forward_pre_hook(note))
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()
        self.inputs.clear()


def _own_centroids(model: nn.Module, layers: tuple[MoELayer, ...], batches: Sequence[Batch], num_regions: int) -> torch.Tensor:
    """Cut each expert's inputs on these batches into regions; (L, E, R, D) float32. Holds all inputs of all layers."""
    chosen = trace_routing(model, batches)
    inputs: dict[int, list[torch.Tensor]] = {layer.index: [] for layer in layers}
    visit_blocks(model, batches, lambda layer, x_TD, z_TD: inputs[layer.index].append(x_TD.float().cpu()), with_grafts=True)
    found = []
    for layer in layers:
        x_TD, chosen_TK = torch.cat(inputs[layer.index]), chosen[layer.index].chosen
        served = [x_TD[(chosen_TK == expert).any(dim=1)] for expert in range(layer.num_experts)]
        found.append(torch.stack([k_means(points, torch.ones(len(points)), num_regions) for points in served]))
    return torch.stack(found)


def nearest(points_ND: torch.Tensor, centres_RD: torch.Tensor) -> torch.Tensor:
    """Index (N,) of the nearest centre by Euclidean distance, the lowest among equals."""
    squares_NR = centres_RD.double().square().sum(dim=1) - 2 * points_ND.double() @ centres_RD.double().T
    return squares_NR.argmin(dim=1)


def k_means(points_ND: torch.Tensor, weights_N: torch.Tensor, num_centres: int, num_steps: int = 10) -> torch.Tensor:
    """Cut weighted points into clusters by Lloyd's steps from a farthest-first start; nothing is drawn.

    Args:
        points_ND: N points.
        weights_N: Weights, >= 0.
        num_centres: R >= 1.
        num_steps: Lloyd's steps at most.

    Returns:
        Centres (R, D), float32. With fewer than R different points the last ones repeat another, and no point is nearest to
        them; without points all are 0.
    """
    points, weights = points_ND.double()[weights_N > 0], weights_N.double()[weights_N > 0]
    if not len(points):
        return torch.zeros(num_centres, points_ND.shape[1])
    mean = (weights[:, None] * points).sum(dim=0, keepdim=True) / weights.sum()
    centres = points[(points - mean).square().sum(dim=1).argmin()][None]
    while len(centres) < num_centres:
        distance_N = torch.cdist(points, centres).min(dim=1).values
        centres = torch.cat([centres, points[distance_N.argmax()][None]])
    for _ in range(num_steps):
        own_NR = nn.functional.one_hot(nearest(points, centres), num_centres).double() * weights[:, None]
        size_R = own_NR.sum(dim=0)
        moved = torch.where(size_R[:, None] > 0, own_NR.T @ points / size_R.clamp_min(1e-300)[:, None], centres)
        if torch.equal(moved, centres):
            break
        centres = moved
    return centres.float()
