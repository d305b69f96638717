"""How well clients' experts and gates agree, as pure functions of what the clients measured: the maths of FedAlign-MoE.

All sums are float64. Results do not depend on how many clients are compared at once, but ties go to the client that comes
first, so callers list clients by their number.

Shape letters: C clients, L MoE layers, E experts, R regions, D model, N points.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch.nn import functional as F

from fedgraft.aggregation.prototypes import Prototypes
from fedgraft.moe.routing import RoutingRule, expert_probabilities

__all__ = [
    "agreement",
    "alignment_weights",
    "anchors",
    "consistency_weights",
    "distil_gates",
    "divergence",
    "fit_gate",
    "reference_routing",
    "routing_loss",
    "semantic_similarity",
]

_TINY = 1e-12


# ---- gates


def agreement(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """How stable an expert's routing share is between two measurements: 1 - JS((p, 1 - p), (q, 1 - q)), elementwise.

    JS is the Jensen-Shannon divergence in bits, so the result is in [0, 1]; 1 where p = q.
    """
    p, q = first.double(), second.double()

    def entropy(share: torch.Tensor) -> torch.Tensor:
        return -(torch.xlogy(share, share) + torch.xlogy(1 - share, 1 - share)) / math.log(2)

    return (1 - (entropy((p + q) / 2) - (entropy(p) + entropy(q)) / 2)).clamp(0, 1)


def consistency_weights(marginals_CLE: torch.Tensor, stability_CLE: torch.Tensor, temperature: float) -> torch.Tensor:
    """omega_i(e) = s_i(e) / sum_j s_j(e) with s_i(e) = exp(-E |p_i(e) - median_j p_j(e)| / T) h_i(e).

    Args:
        marginals_CLE: p, routing shares.
        stability_CLE: h in [0, 1].
        temperature: T > 0, in units of the uniform share 1 / E, so that it means the same for 8 experts and for 60.

    Returns:
        omega (C, L, E), sums over clients are 1; uniform where every score is 0. The median of an even number of clients is
        the mean of the two in the middle.
    """
    p, h = marginals_CLE.double(), stability_CLE.double()
    far = (p - p.quantile(0.5, dim=0)).abs() * p.shape[-1]
    scores = h.log() - far / temperature  # in logarithms: a small T must not give 0 / 0
    return torch.softmax(torch.where((h > 0).any(dim=0), scores, 0.0), dim=0)


def reference_routing(omega_CLE: torch.Tensor, marginals_CLE: torch.Tensor) -> torch.Tensor:
    """The combined routing distribution P(e), proportional to sum_i omega_i(e) p_i(e); (L, E), rows sum to 1."""
    mixed_LE = (omega_CLE.double() * marginals_CLE.double()).sum(dim=0)
    return mixed_LE / mixed_LE.sum(dim=-1, keepdim=True)


def divergence(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """KL(p || q) over the last dimension, nats; 0 where p = q, >= 0 where both sum to 1. Differentiable in p."""
    return (p * (p.clamp_min(_TINY).log() - q.clamp_min(_TINY).log())).sum(dim=-1)


def routing_loss(
    rule: RoutingRule, logits_NE: torch.Tensor, reference_E: torch.Tensor, kept_E: torch.Tensor | None = None
) -> torch.Tensor:
    """KL(p || P) of a batch's mean routing p to the reference P, nats.

    Args:
        rule: How the family makes probabilities of logits.
        logits_NE: Raw scores of the batch's tokens.
        reference_E: P, sums to 1.
        kept_E: Bool, experts that are pulled: p and P are then distributions over these alone, token by token, so that the rows
            of the others get no gradient. With fewer than two there is nothing to pull, and the loss is 0.
    """
    if kept_E is not None:
        if int(kept_E.sum()) < 2:
            return logits_NE.sum() * 0.0
        logits_NE, reference_E = logits_NE[:, kept_E], reference_E[kept_E] / reference_E[kept_E].sum()
    return divergence(expert_probabilities(rule, logits_NE).mean(dim=0), reference_E)


def fit_gate(
    points_ND: torch.Tensor,
    weights_N: torch.Tensor,
    targets_NE: torch.Tensor,
    start: tuple[torch.Tensor, torch.Tensor | None],
    *,
    rule: RoutingRule,
    num_steps: int,
    ridge: float,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Fit a router to distributions: minimise mean_x KL(target(x) || gate(x)) + ridge / 2 ||W - W_0||^2 by L-BFGS.

    Args:
        points_ND: Inputs.
        weights_N: Their weights, > 0.
        targets_NE: Distributions over experts, rows sum to 1.
        start: W_0 (E, D), and the bias (E,) or ``None``.
        rule: How the family makes probabilities of logits.
        num_steps: Steps at most.
        ridge: > 0; there may be fewer points than dimensions.

    Returns:
        W and the bias, float64.
    """
    origin, origin_bias = start[0].detach().double(), None if start[1] is None else start[1].detach().double()
    weight = origin.clone().requires_grad_(True)
    bias = None if origin_bias is None else origin_bias.clone().requires_grad_(True)
    x, share, targets = points_ND.double(), weights_N.double() / weights_N.double().sum(), targets_NE.double()
    trained = [weight] if bias is None else [weight, bias]
    optimizer = torch.optim.LBFGS(trained, max_iter=num_steps, line_search_fn="strong_wolfe", tolerance_grad=1e-10)

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        logits = F.linear(x, weight, bias)
        total = (share * divergence(targets, _probabilities(rule, logits))).sum() + ridge / 2 * (weight - origin).square().sum()
        if bias is not None and origin_bias is not None:
            total = total + ridge / 2 * (bias - origin_bias).square().sum()
        total.backward()  # type: ignore[no-untyped-call]
        return total

    with torch.enable_grad():
        optimizer.step(loss)  # type: ignore[no-untyped-call]
    return weight.detach(), None if bias is None else bias.detach()


def distil_gates(
    points_ND: torch.Tensor,
    weights_N: torch.Tensor,
    gates: Sequence[tuple[torch.Tensor, torch.Tensor | None]],
    omega_CE: torch.Tensor,
    *,
    rule: RoutingRule,
    num_steps: int,
    ridge: float,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Fit one gate to sum_i omega_i(e) gate_i(x)_e, normalised over e, starting from the average by rows; see ``fit_gate``.

    Args:
        points_ND: Inputs of all clients.
        weights_N: Their weights, > 0.
        gates: Each client's weight (E, D), and bias (E,) or ``None``.
        omega_CE: Sums over clients are 1.
        rule: How the family makes probabilities of logits.
        num_steps: Steps at most.
        ridge: > 0.
    """
    omega, x = omega_CE.double(), points_ND.double()
    weights_CED = torch.stack([weight.double() for weight, _ in gates])
    given = [bias.double() for _, bias in gates if bias is not None]
    biases_CE = torch.stack(given) if given else None
    start = (
        (omega[:, :, None] * weights_CED).sum(dim=0),
        None if biases_CE is None else (omega * biases_CE).sum(dim=0),
    )
    logits_CNE = torch.einsum("nd,ced->cne", x, weights_CED)
    if biases_CE is not None:
        logits_CNE = logits_CNE + biases_CE[:, None]
    mixed_NE = (omega[:, None] * _probabilities(rule, logits_CNE)).sum(dim=0)
    targets_NE = mixed_NE / mixed_NE.sum(dim=-1, keepdim=True)
    return fit_gate(x, weights_N, targets_NE, start, rule=rule, num_steps=num_steps, ridge=ridge)


def _probabilities(rule: RoutingRule, logits: torch.Tensor) -> torch.Tensor:
    """As ``expert_probabilities``, in float64: float32 is too coarse for a line search."""
    if rule == "sigmoid":
        return logits.sigmoid() / logits.sigmoid().sum(dim=-1, keepdim=True)
    return torch.softmax(logits, dim=-1)


# ---- experts


def semantic_similarity(found: Prototypes, theta_a: float) -> torch.Tensor:
    """sigma_ij(e) = sum_r min(share_i(r), share_j(r)) cos(b_i(r), b_j(r)) [cos(a_i(r), a_j(r)) > theta_a].

    ``share(r)`` is the part of a client's tokens on e that lies in region r, a the mean input, b the mean response.

    Returns:
        (C, C, L, E) in [-1, 1], symmetric; 1 from a client that has tokens on e to itself, 0 from and to one that has none.
    """
    assert found.responses is not None
    counts = found.counts.double()
    share_CLER = counts / counts.sum(dim=-1, keepdim=True).clamp_min(1)
    total = torch.zeros(len(counts), len(counts), *counts.shape[1:3], dtype=torch.float64)
    for region in range(counts.shape[-1]):
        common = torch.minimum(share_CLER[:, None, ..., region], share_CLER[None, ..., region])
        same_place = _cosines(found.inputs[..., region, :]) > theta_a
        total += common * _cosines(found.responses[..., region, :]) * same_place
    total = (total + total.transpose(0, 1)) / 2  # a product of matrices need not be symmetric to the last bit
    diagonal = torch.arange(len(counts))
    total[diagonal, diagonal] = (counts.sum(dim=-1) > 0).double()
    return total


def _cosines(vectors_CLED: torch.Tensor) -> torch.Tensor:
    """Cosines between clients' vectors, (C, C, L, E); 0 where one of them is 0."""
    unit = F.normalize(vectors_CLED.double(), dim=-1, eps=1e-300)
    return torch.einsum("iled,jled->ijle", unit, unit)


def alignment_weights(sigma_CCLE: torch.Tensor, counts_CLE: torch.Tensor, theta_L: torch.Tensor) -> torch.Tensor:
    """gamma_ij(e) = n_j(e) sigma_ij(e) [sigma_ij(e) >= theta] / (the same, summed over j).

    Args:
        sigma_CCLE: From ``semantic_similarity``; sigma_ii is 1, so that i itself is always kept.
        counts_CLE: n, tokens on each expert, >= 0, of all of a client's examples: they say how much a client weighs.
        theta_L: Threshold by layer, in [0, 1].

    Returns:
        (C, C, L, E), rows over j sum to 1; all 0 in rows of clients that have no token on e.
    """
    kept = torch.where(sigma_CCLE >= theta_L[:, None], sigma_CCLE, 0.0) * counts_CLE.double()[None]
    return kept / kept.sum(dim=1, keepdim=True).clamp_min(1e-300)


def anchors(sigma_CCLE: torch.Tensor, counts_CLE: torch.Tensor) -> torch.Tensor:
    """The client in the middle of each expert's majority: argmax_j sum_i sigma_ij(e), (L, E) int64; -1 without any token.

    Among equals (to 1e-9, which rounding may not decide) the one with most tokens, then the first.
    """
    mass_CLE = sigma_CCLE.sum(dim=0).masked_fill(counts_CLE == 0, -math.inf)
    is_best = mass_CLE >= mass_CLE.max(dim=0, keepdim=True).values - 1e-9
    size_CLE = torch.where(is_best, counts_CLE.double(), -1.0)
    return torch.where(counts_CLE.sum(dim=0) > 0, size_CLE.argmax(dim=0), -1)
