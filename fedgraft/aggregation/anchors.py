"""Which clients anchor which expert: clients as unlike each other as can be, by their labels or by their prompts.

Two ways to choose ``count`` of S clients: by label counts, farthest first in total variation (the labels must be known), or by
k-means over one mean embedding a client (nothing but embeddings is known). Both are deterministic; ties go to the lower client.

Shape letters: S clients, L labels, D features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from fedgraft.errors import MethodError

__all__ = ["cluster_anchors", "draw_order", "farthest_first", "label_anchors", "split_cohort"]

_MOST_STEPS = 100
_EQUAL = 1e-9


def farthest_first(distance_SS: torch.Tensor, count: int, first: int, *, prefer_S: torch.Tensor | None = None) -> tuple[int, ...]:
    """Start with ``first``, and add ``count`` - 1 times who is farthest from the nearest of those chosen so far.

    Among equally far ones (up to 1e-9) the one with the largest ``prefer_S``, then the lowest.
    """
    if prefer_S is None:
        prefer_S = torch.zeros(len(distance_SS))
    chosen = [first]
    nearest_S = distance_SS[first].clone()
    while len(chosen) < count:
        nearest_S[chosen] = -1.0
        is_far_S = nearest_S >= nearest_S.max() - _EQUAL
        chosen.append(int(torch.argmax(prefer_S.masked_fill(~is_far_S, -torch.inf))))
        nearest_S = torch.minimum(nearest_S, distance_SS[chosen[-1]])
    return tuple(chosen)


def label_anchors(labels: Sequence[Mapping[str, int]], count: int) -> tuple[int, ...]:
    """Clients whose label shares differ most: the most concentrated one first, then farthest first in total variation.

    Among equally far ones the most concentrated is taken. This is greedy: a mixed client that is taken early may stand between
    clients with disjoint labels, so there is no guarantee that such are found wherever they exist.

    Args:
        labels: Examples by label, for each client.
        count: 1 to S.

    Raises:
        MethodError: There are fewer than two labels.
    """
    names = sorted({name for each in labels for name in each})
    if len(names) < 2:
        raise MethodError(
            "anchor clients are to be found by labels, and the data has fewer than two",
            "give data.fields.label, or set anchor_source: clustered or none",
        )
    counts_SL = torch.tensor([[float(each.get(name, 0)) for name in names] for each in labels], dtype=torch.float64)
    share_SL = counts_SL / counts_SL.sum(dim=1, keepdim=True).clamp_min(1)
    distance_SS = torch.cdist(share_SL, share_SL, p=1.0) / 2
    top_S = share_SL.max(dim=1).values
    return farthest_first(distance_SS, count, int(torch.argmax(top_S)), prefer_S=top_S)


def cluster_anchors(mean_SD: torch.Tensor, count: int) -> tuple[int, ...]:
    """The client nearest to each centre of k-means over the clients' mean embeddings (Lloyd's steps from farthest-first points).

    Args:
        mean_SD: One mean embedding a client, summed in float64.
        count: Clusters, 1 to S.

    Returns:
        Rows of ``mean_SD``, one a cluster, each once.
    """
    points_SD = mean_SD.double()
    first = int(torch.argmax((points_SD - points_SD.mean(dim=0)).norm(dim=1)))
    centres = points_SD[list(farthest_first(torch.cdist(points_SD, points_SD), count, first))].clone()
    belongs = torch.full((len(points_SD),), -1)
    for _ in range(_MOST_STEPS):
        before, belongs = belongs, torch.cdist(points_SD, centres).argmin(dim=1)
        if torch.equal(before, belongs):
            break
        for cluster in range(count):
            members = belongs == cluster
            if bool(members.any()):
                centres[cluster] = points_SD[members].mean(dim=0)
    distance = torch.cdist(centres, points_SD)
    chosen: list[int] = []
    for cluster in range(count):
        distance[cluster, chosen] = torch.inf
        chosen.append(int(torch.argmin(distance[cluster])))
    return tuple(chosen)


def draw_order(group: Sequence[int], seed: int) -> list[int]:
    """Some clients in a random order that depends on the seed alone, not on the order in which they are given."""
    ascending = sorted(group)
    order = torch.randperm(len(group), generator=torch.Generator().manual_seed(seed))
    return [ascending[place] for place in order.tolist()]


def split_cohort(size: int, num_anchors: int, num_clients: int, wanted: int) -> tuple[int, int]:
    """How many anchors and how many other clients make a cohort of ``size``: ``wanted`` anchors, as far as there are any.

    Args:
        size: 1 to ``num_clients``.
        num_anchors: Of all clients.
        num_clients: Of the population.
        wanted: Anchors that the cohort should have.
    """
    least = size - (num_clients - num_anchors)
    count = max(least, min(wanted, num_anchors, size))
    return count, size - count
