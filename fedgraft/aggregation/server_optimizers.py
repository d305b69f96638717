"""Server optimisers: what the server makes of the mean delta of a round.

Reddi, Charles, Zaheer, Garrett, Rush, Konecny, Kumar, McMahan 2021, "Adaptive Federated Optimization", arXiv 2003.00295: the
mean delta Delta is minus a pseudo-gradient, so that any optimiser may run on the server; plain SGD of rate 1 is FedAvg. A
rule works on one tensor in float64; parameters keep their dtype. Moments are in ``ServerState.memory`` as ``momentum/<key>``
and ``second_moment/<key>``, float64. A key that nobody sent keeps its value and its moments.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal, TypeAlias

import torch

from fedgraft.types import ClientUpdate, Params, ServerState

__all__ = ["Rule", "Weighting", "adaptive", "client_weights", "momentum", "server_step", "sgd"]

Rule: TypeAlias = Callable[[torch.Tensor, Params], tuple[torch.Tensor, Params]]
"""Mean delta of a key, and its moments by name (none before its first step) -> what is added to the parameter, new moments."""

Weighting: TypeAlias = Literal["examples", "clients"]
"""Weigh clients by their training examples, or all alike."""

_MOMENTS = ("momentum", "second_moment")


def server_step(state: ServerState, delta: Params, rule: Rule) -> ServerState:
    """Take one step of the server on every key of ``delta``.

    Args:
        state: Parameters, and the moments in ``memory``.
        delta: Mean deltas, trained - initial, float64; keys of ``state.params``.
        rule: What to do with one key.
    """
    params, memory = dict(state.params), dict(state.memory)
    for key, value in delta.items():
        moments = {name: memory[f"{name}/{key}"] for name in _MOMENTS if f"{name}/{key}" in memory}
        step, moments = rule(value.double(), moments)
        params[key] = (params[key].double() + step).to(params[key].dtype)
        memory.update({f"{name}/{key}": moment for name, moment in moments.items()})
    return replace(state, params=params, memory=memory)


def sgd(rate: float) -> Rule:
    """Add ``rate`` times the mean delta; with rate 1 this is FedAvg."""
    return lambda delta, moments: (rate * delta, {})


def momentum(rate: float, beta: float, *, form: Literal["sum", "average"]) -> Rule:
    """Add ``rate`` times a momentum m of the mean deltas; m = Delta in a key's first round.

    Args:
        rate: Server's learning rate, > 0.
        beta: Share of the old momentum, in [0, 1); 0 is plain SGD.
        form: ``sum``: m = beta m + Delta; ``average``: m = beta m + (1 - beta) Delta.
    """

    def rule(delta: torch.Tensor, moments: Params) -> tuple[torch.Tensor, Params]:
        m = delta
        if "momentum" in moments:
            m = beta * moments["momentum"] + (delta if form == "sum" else (1 - beta) * delta)
        return rate * m, {"momentum": m}

    return rule


def adaptive(
    kind: Literal["adagrad", "yogi", "adam"],
    *,
    rate: float,
    tau: float,
    beta1: float,
    beta2: float,
    second_moment: Literal["delta", "momentum"],
    momentum_start: Literal["zero", "delta"],
) -> Rule:
    """Add ``rate m / (sqrt(v) + tau)``, without bias correction.

    m = beta1 m + (1 - beta1) Delta, and with u = Delta (or m):
    adagrad v = v + u^2; yogi v = v - (1 - beta2) u^2 sign(v - u^2); adam v = beta2 v + (1 - beta2) u^2; v = tau^2 at first.

    Args:
        kind: Which v.
        rate: eta, the server's learning rate, > 0.
        tau: Degree of adaptivity, > 0.
        beta1: In [0, 1).
        beta2: In [0, 1); adagrad has none.
        second_moment: Whether u is Delta or m.
        momentum_start: m before a key's first round: zero, or that round's Delta.
    """

    def rule(delta: torch.Tensor, moments: Params) -> tuple[torch.Tensor, Params]:
        if "momentum" in moments or momentum_start == "zero":
            m = beta1 * moments.get("momentum", torch.zeros_like(delta)) + (1 - beta1) * delta
        else:
            m = delta
        square = (delta if second_moment == "delta" else m).square()
        v = moments.get("second_moment", torch.full_like(delta, tau**2))
        if kind == "adagrad":
            v = v + square
        elif kind == "yogi":
            v = v - (1 - beta2) * square * torch.sign(v - square)
        else:
            v = beta2 * v + (1 - beta2) * square
        return rate * m / (v.sqrt() + tau), {"momentum": m, "second_moment": v}

    return rule


def client_weights(weighting: Weighting, updates: Sequence[ClientUpdate]) -> tuple[float, ...]:
    """One weight a client, in cohort order."""
    return tuple(float(update.num_examples) if weighting == "examples" else 1.0 for update in updates)
