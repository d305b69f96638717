"""Prototypes of experts: what each client's experts read and answer on average, by region, and the regions they share.

Shape letters: C clients, L MoE layers, E experts, R regions, D model.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from fedgraft.moe.regions import k_means, nearest

__all__ = ["Prototypes", "in_common_regions", "match_regions", "region_middles"]


class Prototypes(NamedTuple):
    """Counts (C, L, E, R), mean inputs (C, L, E, R, D), and mean responses of the same shape or ``None`` where not asked for."""

    counts: torch.Tensor
    inputs: torch.Tensor
    responses: torch.Tensor | None


def in_common_regions(found: Prototypes, before_LERD: torch.Tensor | None) -> tuple[Prototypes, torch.Tensor]:
    """Prototypes in regions that mean the same at all clients, and the regions' middles for the coming round.

    Args:
        found: As clients measured them.
        before_LERD: The middles they were given; ``None``: each made regions of its own.
    """
    middles_LERD = region_middles(found, before_LERD)
    return found if before_LERD is not None else match_regions(found, middles_LERD), middles_LERD


def region_middles(found: Prototypes, before_LERD: torch.Tensor | None) -> torch.Tensor:
    """Centroids of the coming round, (L, E, R, D) float32: k-means over all clients' means, then one Lloyd's step a round.

    Centroids of which some repeat another are no R regions yet (no client had tokens on the expert, or too few different
    ones), and Lloyd's steps would not part them: k-means is run again on the means of the clients that have tokens now, and
    taken if it gives no fewer different centroids than there were.

    Args:
        found: The clients' prototypes; regions correspond to ``before_LERD``, or to nothing where there is none yet.
        before_LERD: The centroids that the clients used.
    """
    _, num_layers, num_experts, num_regions, _ = found.inputs.shape
    if before_LERD is None:
        rows = [torch.stack([_cut(found, at, expert) for expert in range(num_experts)]) for at in range(num_layers)]
        return torch.stack(rows)
    size = found.counts.double().sum(dim=0)[..., None]
    mean = (found.counts.double()[..., None] * found.inputs.double()).sum(dim=0) / size.clamp_min(1)
    middles = torch.where(size > 0, mean, before_LERD.double()).float()
    for at, expert in (size > 0).any(dim=2)[..., 0].nonzero().tolist():
        num_known = _num_different(before_LERD[at, expert])
        if num_known < num_regions and _num_different(again := _cut(found, at, expert)) >= num_known:
            middles[at, expert] = again
    return middles


def _cut(found: Prototypes, layer: int, expert: int) -> torch.Tensor:
    """Centroids of all clients' means on one expert, (R, D) float32."""
    inputs_CRD, counts_CR = found.inputs[:, layer, expert], found.counts[:, layer, expert]
    return k_means(inputs_CRD.flatten(0, 1), counts_CR.flatten(), counts_CR.shape[1])


def _num_different(centroids_RD: torch.Tensor) -> int:
    repeats_R = (centroids_RD[:, None] == centroids_RD[None]).all(dim=-1).tril(-1).any(dim=1)  # equal to an earlier one
    return int((~repeats_R).sum())


def match_regions(found: Prototypes, centroids_LERD: torch.Tensor) -> Prototypes:
    """Put regions that clients made on their own into common ones: each into the nearest, means weighted by tokens."""
    counts, inputs = torch.zeros_like(found.counts).double(), torch.zeros_like(found.inputs).double()
    responses = None if found.responses is None else torch.zeros_like(found.responses).double()
    for client, layer, expert in torch.cartesian_prod(*(torch.arange(size) for size in found.counts.shape[:3])).tolist():
        place = (client, layer, expert)
        n = found.counts[place].double()
        region_R = nearest(found.inputs[place], centroids_LERD[layer, expert])
        counts[place].index_add_(0, region_R, n)
        inputs[place].index_add_(0, region_R, n[:, None] * found.inputs[place].double())
        if responses is not None and found.responses is not None:
            responses[place].index_add_(0, region_R, n[:, None] * found.responses[place].double())
    size = counts.clamp_min(1)[..., None]
    return Prototypes(counts=counts, inputs=inputs / size, responses=None if responses is None else responses / size)
