"""Experts that choose clients: scores from embeddings, the best choice within bounds, and how evenly tokens use experts.

The mathematics of FedAMoLE (arXiv 2411.19128), on tensors alone.

Shape letters: J experts of a pool, C clients, R rank, T tokens, S slots, K top-k, N vectors of X values.
"""

from __future__ import annotations

import math

import torch

from fedgraft.aggregation.assignment import CountBounds, choose_exactly

__all__ = ["add_noise", "balance_of", "choose_clients", "random_scores", "scores_of"]


def scores_of(phi_JR: torch.Tensor, psi_CR: torch.Tensor) -> torch.Tensor:
    """How much each expert wants each client: softmax over clients of phi . psi / sqrt(rank), (J, C) float64, rows sum to 1."""
    return torch.softmax(phi_JR.double() @ psi_CR.double().T / math.sqrt(phi_JR.shape[1]), dim=1)


def random_scores(num_experts: int, num_clients: int, seed: int) -> torch.Tensor:
    """Uniform scores in [0, 1), (J, C) float64."""
    return torch.rand(num_experts, num_clients, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def choose_clients(scores_JC: torch.Tensor, *, per_expert: int, low: int, high: int) -> torch.Tensor:
    """Let experts choose clients so that the sum of the scores is the largest there is.

    Args:
        scores_JC: Of experts for clients.
        per_expert: Clients of each expert.
        low: Fewest experts of a client.
        high: Most experts of a client.

    Returns:
        Who is chosen, (J, C), bool.

    Raises:
        MethodError: No choice fits the bounds.
    """
    num_experts, num_clients = scores_JC.shape
    return choose_exactly(
        scores_JC,
        rows=CountBounds.exactly([per_expert] * num_experts),
        columns=CountBounds.between(low, high, num_clients),
        sides=("expert", "client"),
    )


def balance_of(probs_TS: torch.Tensor, chosen_TK: torch.Tensor) -> torch.Tensor:
    """|J| sum_j P_j f_j over some tokens: 1 where all experts get the same, |J| where one gets all; its gradient is P's."""
    size = probs_TS.shape[1]
    share_S = torch.bincount(chosen_TK.reshape(-1), minlength=size).to(probs_TS.dtype) / max(chosen_TK.numel(), 1)
    return size * (probs_TS.sum(dim=0) / max(len(probs_TS), 1) * share_S).sum()


def add_noise(clean_NX: torch.Tensor, std: float, generator: torch.Generator) -> torch.Tensor:
    """Add Gaussian noise to some vectors, then cut each to the largest norm that one of them had without it."""
    if not std:
        return clean_NX
    noisy_NX = clean_NX + std * torch.randn(clean_NX.shape, generator=generator, dtype=clean_NX.dtype)
    factor_N1: torch.Tensor = clean_NX.norm(dim=1).max() / noisy_NX.norm(dim=1, keepdim=True)
    return noisy_NX * factor_N1.clamp(max=1.0)
