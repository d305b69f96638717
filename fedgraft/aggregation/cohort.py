"""A cohort compared: how its clients' gates and experts agree, and what follows for single experts.

Shape letters: C clients, L MoE layers, E experts, R regions, D model.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from fedgraft.aggregation.alignment import (
    agreement,
    alignment_weights,
    anchors,
    consistency_weights,
    reference_routing,
    semantic_similarity,
)
from fedgraft.aggregation.prototypes import Prototypes
from fedgraft.errors import UpdateError
from fedgraft.types import ClientUpdate, Federation, ParamRef, ServerState

__all__ = [
    "Cohort",
    "ExpertAlignment",
    "align_experts",
    "align_gates",
    "examples_per_probe",
    "expert_refs",
    "own_versions",
    "remember",
    "router_rows",
    "since_last",
    "stack_statistic",
    "version_name",
]


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertAlignment:
    """Which clients mean the same by an expert: ``counts`` (C, L, E), float64, the tokens that weigh a client; similarities
    ``sigma`` and weights ``gamma`` (C, C, L, E); and ``anchor`` (L, E), the client in the middle of each expert's majority, -1
    where nobody has a token.
    """

    counts: torch.Tensor
    sigma: torch.Tensor
    gamma: torch.Tensor
    anchor: torch.Tensor

    def majority(self, layer: int, expert: int) -> torch.Tensor:
        """Weights (C,) of the clients in the global expert; all 0 where nobody has a token."""
        at = int(self.anchor[layer, expert])
        return self.gamma[at, :, layer, expert] if at >= 0 else torch.zeros(len(self.counts), dtype=torch.float64)

    def outsiders(self, layer: int, expert: int) -> dict[int, torch.Tensor]:
        """Weights (C,) of each client's own version of an expert, by place in the cohort: of those who have tokens on it and
        no part in the majority.
        """
        inside = self.majority(layer, expert) > 0
        has_tokens = self.counts[:, layer, expert] > 0
        return {at: self.gamma[at, :, layer, expert] for at in range(len(inside)) if has_tokens[at] and not inside[at]}

    def summary(self, layers: Sequence[int]) -> dict[str, dict[str, float | None]]:
        """By layer: mean ``similarity`` of two clients that both have tokens on an expert, and the share ``aligned`` of clients
        with tokens that are in the majority; ``None`` where nothing can be compared. What to set a threshold by.
        """
        has_tokens = self.counts > 0
        is_pair = has_tokens[:, None] & has_tokens[None]
        is_pair &= ~torch.eye(len(has_tokens), dtype=torch.bool)[:, :, None, None]
        found: dict[str, dict[str, float | None]] = {}
        for at, layer in enumerate(layers):
            pairs = self.sigma[:, :, at][is_pair[:, :, at]]
            inside = sum(int((self.majority(at, expert) > 0).sum()) for expert in range(self.counts.shape[2]))
            size = int(has_tokens[:, at].sum())
            found[str(layer)] = {
                "similarity": float(pairs.mean()) if len(pairs) else None,
                "aligned": inside / size if size else None,
            }
        return found


@dataclass(frozen=True, kw_only=True, slots=True)
class Cohort:
    """What a server makes of a cohort's statistics, clients by their number; ``None`` where its options do not ask for it.

    ``clients`` (C), ``marginals`` and ``omega`` (C, L, E), ``reference`` (L, E), ``prototypes`` in common regions whose middles
    are ``centroids`` (L, E, R, D), and the alignment of ``experts``.
    """

    clients: tuple[int, ...]
    marginals: torch.Tensor | None = None
    omega: torch.Tensor | None = None
    reference: torch.Tensor | None = None
    prototypes: Prototypes | None = None
    centroids: torch.Tensor | None = None
    experts: ExpertAlignment | None = None

    def versions(self, key: str, layer: int, expert: int, *, with_own: bool) -> dict[str, torch.Tensor]:
        """Weights (C,) of one expert's tensor by the server's names: the global one and, if asked for, outsiders' own."""
        assert self.experts is not None
        made = {key: self.experts.majority(layer, expert)}
        if with_own:
            outsiders = self.experts.outsiders(layer, expert)
            made |= {version_name(key, self.clients[at]): gamma for at, gamma in outsiders.items()}
        return made


def align_experts(
    found: Prototypes, theta: float | Sequence[float], theta_a: float, scale_C: torch.Tensor | None = None
) -> ExpertAlignment:
    """Compare the clients on every expert.

    Args:
        found: Their prototypes, with responses.
        theta: Least similarity, in [0, 1]; one value, or one a layer.
        theta_a: Cosine of mean inputs above which two clients serve the same region.
        scale_C: What each client's token counts are multiplied by where they weigh clients, > 0, from
            ``examples_per_probe``; ``None``: they were counted on all examples.
    """
    counts_CLE = found.counts.double().sum(dim=-1)
    if scale_C is not None:
        counts_CLE = counts_CLE * scale_C.double()[:, None, None]
    sigma = semantic_similarity(found, theta_a)
    theta_L = torch.tensor(theta, dtype=torch.float64).expand(counts_CLE.shape[1])
    return ExpertAlignment(
        counts=counts_CLE,
        sigma=sigma,
        gamma=alignment_weights(sigma, counts_CLE, theta_L),
        anchor=anchors(sigma, counts_CLE),
    )


def align_gates(
    updates: Sequence[ClientUpdate], known: torch.Tensor | None, temperature: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weigh the clients of a cohort by how consistently they route.

    Args:
        updates: With the statistic ``marginals``, and ``stability`` where clients measure it themselves.
        known: Shares of the whole population when they were last seen, where the server keeps them instead.
        temperature: T of ``consistency_weights``.

    Returns:
        Shares (C, L, E), omega (C, L, E), and the reference (L, E).
    """
    p_CLE = stack_statistic(updates, "marginals")
    is_sent = any("stability" in update.statistics for update in updates)
    h_CLE = stack_statistic(updates, "stability") if is_sent else since_last(known, [u.client_id for u in updates], p_CLE)
    omega = consistency_weights(p_CLE, h_CLE, temperature)
    return p_CLE, omega, reference_routing(omega, p_CLE)


def examples_per_probe(updates: Sequence[ClientUpdate], probe_examples: int) -> torch.Tensor:
    """How many of its training examples one probed example stands for at each client: n / min(probe_examples, n), (C,), >= 1."""
    sizes = [(update.num_examples, min(probe_examples, update.num_examples)) for update in updates]
    return torch.tensor([num_all / num_probed for num_all, num_probed in sizes], dtype=torch.float64)


def expert_refs(federation: Federation) -> Iterator[tuple[ParamRef, int, int]]:
    """Slots of single experts and of router rows, with the place of their layer among MoE layers, and their expert."""
    place: Mapping[int, int] = {layer: at for at, layer in enumerate(federation.facts.layers)}
    for ref in federation.refs:
        if ref.layer is not None and ref.expert is not None and ref.part in ("experts", "router"):
            yield ref, place[ref.layer], ref.expert


def router_rows(federation: Federation) -> dict[int, dict[str, list[ParamRef]]]:
    """Slots of router rows in the experts' order, by place of their layer and by tensor (``weight``, ``bias``)."""
    rows: dict[int, dict[str, list[ParamRef]]] = {}
    for ref, layer, _ in expert_refs(federation):
        if ref.part == "router":
            rows.setdefault(layer, {}).setdefault(ref.name.rpartition(".")[2], []).append(ref)
    return rows


def stack_statistic(updates: Sequence[ClientUpdate], name: str) -> torch.Tensor:
    """One statistic of all clients, clients first.

    Raises:
        UpdateError: A client sent none of this name.
    """
    missing = [update.client_id for update in updates if name not in update.statistics]
    if missing:
        raise UpdateError(
            f"client {missing[0]} sent no statistic {name!r}, by which clients are compared", "its reply() must send it"
        )
    return torch.stack([update.statistics[name] for update in updates])


def remember(known: torch.Tensor | None, clients: Sequence[int], values: torch.Tensor, num_clients: int) -> torch.Tensor:
    """A row for each client of the population, those of this cohort replaced; float32. NaN where a client was never seen."""
    rows = torch.full((num_clients, *values.shape[1:]), math.nan) if known is None else known.clone()
    rows[list(clients)] = values.float()
    return rows


def since_last(known: torch.Tensor | None, clients: Sequence[int], marginals_CLE: torch.Tensor) -> torch.Tensor:
    """How stable routing shares are since a client was last seen, (C, L, E) in [0, 1]; 1 where it never was.

    Args:
        known: Shares of the whole population, from ``remember``.
        clients: Of the cohort.
        marginals_CLE: Their shares now.
    """
    if known is None:
        return torch.ones_like(marginals_CLE)
    return agreement(marginals_CLE, known[list(clients)]).nan_to_num(nan=1.0)


def version_name(key: str, client: int | None) -> str:
    """The server's name of a slot's tensor: the slot's own, or that of one client's version."""
    return key if client is None else f"own/{client}/{key}"


def own_versions(state: ServerState, client: int, keys: Sequence[str]) -> dict[str, str]:
    """Addresses of the slots of which the server keeps a version for this client."""
    return {key: name for key in keys if (name := version_name(key, client)) in state.params}
