"""What selecting and aligning experts is worth before any training, for benchmarks/phenomena.py."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from fedgraft.aggregation.alignment import agreement, consistency_weights
from fedgraft.aggregation.cohort import ExpertAlignment, align_experts
from fedgraft.aggregation.hfedmoe import bottleneck_scores, choose_active, importance
from fedgraft.aggregation.prototypes import Prototypes
from fedgraft.moe.families import moe_layers
from fedgraft.moe.regions import ExpertProfile, profile_experts
from fedgraft.moe.surgery import permute_experts
from fedgraft.moe.trace import RouterWatch
from fedgraft.training.evaluate import score_batches
from fedgraft.training.step import response_loss
from fedgraft.types import Batch

__all__ = ["gradient_kept", "permuted_client"]

BUDGETS = (4, 8)
THETA = THETA_A = 0.3  # the defaults of FedAlign-MoE here


# ---- HFedMoE: how much of the gradient the chosen experts carry


def gradient_kept(model: torch.nn.Module, batches: Sequence[Batch], seed: int) -> dict[str, float]:
    """Share of the experts' squared gradient that lies in the experts which a budget keeps, mean over layers and batches.

    Experts are chosen by HFedMoE's bottleneck score (lambda 0.5, beta 0.1), by importance alone, at random among those that the
    batch touches, or, as an upper bound, by the gradient itself.
    """
    found: dict[str, list[float]] = {}
    generator = torch.Generator().manual_seed(seed)
    for batch in batches:
        for gate_TE, union_E, squares_E in _gradients(model, batch):
            scores = {
                "bottleneck": bottleneck_scores(gate_TE, 0.5, 0.1),
                "importance": importance(gate_TE, 0.5),
                "random": torch.rand(union_E.shape, generator=generator, dtype=torch.float64),
                "gradient": squares_E,
            }
            for name, scores_E in scores.items():
                for budget in BUDGETS:
                    kept_E = choose_active(scores_E, union_E, budget)
                    found.setdefault(f"{name} {budget}", []).append(float(squares_E[kept_E].sum() / squares_E.sum()))
    return {name: statistics.fmean(values) for name, values in found.items()}


def _gradients(model: torch.nn.Module, batch: Batch) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """By layer: each token's shares (T, E), the experts touched (E,), and their squared gradients (E,)."""
    layers = moe_layers(model)
    weights = [getattr(layer.experts, name).requires_grad_(True) for layer in layers for name in layer.family.expert_tensors]
    is_token = batch.attention_mask.reshape(-1).bool()
    with RouterWatch(model) as watch:
        loss, _ = response_loss(model, batch)
        gradients = iter(torch.autograd.grad(loss, weights))
        found = []
        for layer in layers:
            squares_E = sum(next(gradients).double().square().flatten(1).sum(dim=1) for _ in layer.family.expert_tensors)
            chosen = watch.chosen[layer.index][is_token].reshape(-1)
            union_E = torch.bincount(chosen, minlength=layer.num_experts) > 0
            found.append((watch.probabilities(layer.index)[is_token].detach(), union_E, squares_E))
    for weight in weights:
        weight.requires_grad_(False)
    return found


# ---- FedAlign-MoE: a client whose experts have other numbers


def permuted_client(
    model: torch.nn.Module, probes: Mapping[int, list[Batch]], tests: Mapping[int, list[Batch]], seed: int
) -> dict[str, float]:
    """Average the untouched base over clients of which one has its experts and router rows in another order.

    That client's model computes what the others' do, but expert e means something else in it. Similarity and exclusion as in
    FedAlign-MoE on the clients' own examples; NLL of the averaged model, mean over clients, where all experts and rows are
    averaged plainly, and where they are averaged by alignment and consistency.
    """
    odd = seed % len(probes)
    permuted = copy.deepcopy(model)
    permute_experts(permuted, {layer.index: _cycle(layer.num_experts, seed) for layer in moe_layers(model)})
    profiles = [profile_experts(permuted if client == odd else model, batches) for client, batches in probes.items()]
    aligned = align_experts(_prototypes(profiles), THETA, THETA_A)
    p_CLE = torch.stack([profile.marginals for profile in profiles])
    h_CLE = torch.stack([agreement(*profile.halves) for profile in profiles])
    omega_CLE = consistency_weights(p_CLE, h_CLE, 1.0)
    num_layers, num_experts = p_CLE.shape[1:]
    majority_LE = torch.stack(
        [torch.stack([aligned.majority(at, e)[odd] for e in range(num_experts)]) for at in range(num_layers)]
    )
    plain_LE = torch.full((num_layers, num_experts), 1 / len(probes), dtype=torch.float64)
    return _agreement_found(aligned, odd) | {
        "weight of the permuted client's rows": float(omega_CLE[odd].mean()),
        "NLL untouched": _nll(model, tests),
        "NLL averaged plainly": _nll(_mixed(model, permuted, plain_LE, plain_LE), tests),
        "NLL averaged by alignment": _nll(_mixed(model, permuted, majority_LE, omega_CLE[odd]), tests),
    }


def _cycle(size: int, seed: int) -> list[int]:
    """An order in which nothing keeps its place."""
    drawn = np.random.default_rng(seed).permutation(size)
    order = np.empty(size, dtype=int)
    order[drawn] = np.roll(drawn, 1)
    return [int(place) for place in order]


def _prototypes(profiles: Sequence[ExpertProfile]) -> Prototypes:
    return Prototypes(
        counts=torch.stack([profile.counts for profile in profiles]),
        inputs=torch.stack([profile.inputs for profile in profiles]),
        responses=torch.stack([profile.responses for profile in profiles]),
    )


def _agreement_found(aligned: ExpertAlignment, odd: int) -> dict[str, float]:
    """Similarity of pairs, and the share of a client's used experts in which it is out of the majority."""
    similar: dict[str, list[float]] = {"same": [], "permuted": []}
    out: dict[str, list[float]] = {"same": [], "permuted": []}
    num_clients, num_layers, num_experts = aligned.counts.shape
    for at in range(num_layers):
        for expert in range(num_experts):
            holders = [client for client in range(num_clients) if aligned.counts[client, at, expert] > 0]
            weights_C = aligned.majority(at, expert)
            for client in holders:
                out["permuted" if client == odd else "same"].append(float(weights_C[client] == 0))
                for other in (other for other in holders if other > client):
                    kind = "permuted" if odd in (client, other) else "same"
                    similar[kind].append(float(aligned.sigma[client, other, at, expert]))
    means = {f"similarity, {kind}": statistics.fmean(values) for kind, values in similar.items()}
    return means | {f"left out, {kind}": statistics.fmean(values) for kind, values in out.items()}


def _mixed(model: torch.nn.Module, other: torch.nn.Module, experts_LE: torch.Tensor, rows_LE: torch.Tensor) -> torch.nn.Module:
    """A model whose experts and router rows are the first's, but for the other's weights in them."""
    made = copy.deepcopy(model)
    for at, (layer, theirs) in enumerate(zip(moe_layers(made), moe_layers(other), strict=True)):
        parts = [(layer.experts, theirs.experts, name, experts_LE[at]) for name in layer.family.expert_tensors]
        parts += [(layer.router, theirs.router, name, rows_LE[at]) for name in layer.family.router_tensors]
        for module, from_module, name, weight_E in parts:
            own, their = getattr(module, name).detach(), getattr(from_module, name).detach()
            share = weight_E.to(own.dtype).reshape(-1, *[1] * (own.dim() - 1))
            getattr(module, name).data = own + share * (their - own)
    return made


def _nll(model: torch.nn.Module, tests: Mapping[int, list[Batch]]) -> float:
    return statistics.fmean(score_batches(model, batches)["nll"].mean for batches in tests.values())
