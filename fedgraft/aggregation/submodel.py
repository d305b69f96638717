"""Sub-models by activation: which experts a client holds, whom it resembles, and what it changes when it stops improving.

The mathematics of FedMoE (arXiv 2408.11304), on tensors and plain values alone. p is how a client's tokens fall on experts:
p[l, e] is expert e's share of the choices that router l made, so that a layer sums to 1 whatever top-k is.

Shape letters: C clients, L MoE layers, E experts of a layer.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Self, TypeAlias

import torch

from fedgraft.errors import MethodError
from fedgraft.types import Assignment, ModelFacts

__all__ = [
    "Held",
    "Trial",
    "adjust",
    "expected_activation",
    "held_by_layer",
    "judge",
    "most_similar",
    "partial_assignment",
    "randomised",
    "reach",
    "recommend",
    "similarity",
    "threshold_search",
    "water_fill",
    "with_estimates",
    "with_measured",
]

Held: TypeAlias = tuple[tuple[int, ...], ...]
"""Experts that a client holds, ascending, one entry a MoE layer in the model's order."""

_ROUNDING = 1e-7
"""How far shares may be off: they travel as float32, and seven of ten choices are a little less than 0.7 there."""

_TOO_MANY = 1 << 62
"""Stands for a prefix that does not exist: no budget holds so many experts."""


def held_by_layer(facts: ModelFacts, assignment: Assignment | None) -> Held:
    """List what an assignment holds, a layer that it does not name as a whole."""
    every = tuple(range(facts.num_experts))
    return tuple((assignment or {}).get(layer, every) for layer in facts.layers)


def partial_assignment(facts: ModelFacts, held: Held) -> Assignment:
    """What a sub-model lacks something of, by layer: a layer that is held as a whole needs no mask."""
    return {layer: experts for layer, experts in zip(facts.layers, held, strict=True) if len(experts) < facts.num_experts}


# ---- the first sub-model


def water_fill(p_LE: torch.Tensor, *, count: int, least: int) -> Held:
    """Find the sub-model with the largest coverage by adding, again and again, the next expert to the layer covered least.

    Exact, since all experts are of one size: no set of ``count`` experts has a larger theta. An expert without any choice is
    not added, so fewer than ``count`` may be held.

    Args:
        p_LE: Shares, >= 0.
        count: Most experts of all layers together, >= L * ``least``.
        least: Fewest experts of a layer (a token needs top-k), >= 1; the ones with the largest p.

    Raises:
        MethodError: ``count`` is too small.
    """
    order_LE, sums_LE = _ranked(p_LE, count=count, least=least)
    num_layers, num_experts = sums_LE.shape
    sizes = [least] * num_layers
    open_layers = [(float(sums_LE[layer, least - 1]), layer) for layer in range(num_layers)]
    heapq.heapify(open_layers)
    left = count - num_layers * least
    while left and open_layers:
        _, layer = heapq.heappop(open_layers)
        if sizes[layer] == num_experts or not float(p_LE[layer, order_LE[layer, sizes[layer]]]) > 0:
            continue  # more experts of this layer would cover no more
        sizes[layer] += 1
        left -= 1
        heapq.heappush(open_layers, (float(sums_LE[layer, sizes[layer] - 1]), layer))
    return _prefixes(order_LE, sizes)


def threshold_search(p_LE: torch.Tensor, *, count: int, least: int) -> Held:
    """Find the sub-model with the largest coverage by binary search on theta, as in the paper.

    For a theta each layer keeps its shortest prefix, by falling p, that reaches it; what fits raises theta. Only sums of prefixes
    matter as thetas, so the search runs over these and ends exactly. Theta is that of ``water_fill``; experts that do not raise
    it are left out.

    Args:
        p_LE: Shares, >= 0.
        count: Most experts of all layers together, >= L * ``least``.
        least: Fewest experts of a layer, >= 1.

    Raises:
        MethodError: ``count`` is too small.
    """
    order_LE, sums_LE = _ranked(p_LE, count=count, least=least)
    thetas = sorted(set(sums_LE[:, least - 1 :].reshape(-1).tolist()))
    low, high = 0, len(thetas)  # the smallest theta needs nothing beyond the least; high does not fit
    while high - low > 1:
        middle = (low + high) // 2
        sizes = [_shortest(sums_E, thetas[middle], least) for sums_E in sums_LE]
        low, high = (middle, high) if sum(sizes) <= count else (low, middle)
    return _prefixes(order_LE, [_shortest(sums_E, thetas[low], least) for sums_E in sums_LE])


def reach(p_LE: torch.Tensor, theta: float, *, least: int) -> Held:
    """Keep, in every layer, the shortest prefix by falling p that covers ``theta``, or all that the layer has.

    Args:
        p_LE: Shares, >= 0.
        theta: Coverage, in (0, 1]; reached up to what float32 shares are rounded by.
        least: Fewest experts of a layer, >= 1.
    """
    order_LE, sums_LE = _ranked(p_LE, count=p_LE.numel(), least=least)
    return _prefixes(order_LE, [_shortest(sums_E, min(theta - _ROUNDING, float(sums_E[-1])), least) for sums_E in sums_LE])


def randomised(held: Held, num_experts: int, seed: int) -> Held:
    """Replace every layer's experts by as many random ones."""
    generator = torch.Generator().manual_seed(seed)
    drawn = (torch.randperm(num_experts, generator=generator)[: len(experts)] for experts in held)
    return tuple(tuple(experts.sort().values.tolist()) for experts in drawn)


# ---- what is known of p


def with_measured(p_LE: torch.Tensor, held: Held, shares: torch.Tensor) -> torch.Tensor:
    """Take newly measured shares of the held experts, layer by layer in one vector, into a client's p; the others stay."""
    found_LE = p_LE.clone()
    parts = torch.split(shares.double(), [len(experts) for experts in held])
    for layer, (experts, values) in enumerate(zip(held, parts, strict=True)):
        found_LE[layer, list(experts)] = values
    return found_LE


def with_estimates(
    p_CLE: torch.Tensor, measured: Sequence[int], labels: Sequence[Mapping[str, int]], num_examples: Sequence[int]
) -> torch.Tensor:
    """Estimate p of the clients that could not measure it: the mean over those of the same task, weighted by examples.

    A client's task is its most frequent label, the first by name among equals. Where nobody of a task measured, or no labels are
    given, all who measured count.

    Args:
        p_CLE: Shares by client; of clients that are not in ``measured`` they are replaced.
        measured: Clients that did measure, at least one.
        labels: Each client's examples by label, or empty.
        num_examples: Each client's training examples.
    """
    tasks = [max(sorted(count), key=count.__getitem__, default=None) for count in labels] or [None] * len(p_CLE)
    found_CLE = p_CLE.clone()
    for client in set(range(len(p_CLE))) - set(measured):
        alike = [other for other in measured if tasks[other] == tasks[client]] or list(measured)
        weights_C = torch.tensor([num_examples[other] for other in alike], dtype=torch.float64)
        found_CLE[client] = torch.einsum("c,cle->le", weights_C / weights_C.sum(), p_CLE[alike].double())
    return found_CLE


# ---- recommendation


def similarity(a_LE: torch.Tensor, b_LE: torch.Tensor) -> float:
    """Cosine of two clients' flattened p: the same whoever comes first, exactly 1 for equal ones, 0 where one is zero."""
    a, b = a_LE.double().reshape(-1), b_LE.double().reshape(-1)
    scale = math.sqrt(float((a * a).sum()) * float((b * b).sum()))
    return float((a * b).sum()) / scale if scale else 0.0


def most_similar(p_CLE: torch.Tensor, client: int, among: Iterable[int], count: int) -> dict[int, float]:
    """Give the ``count`` clients of ``among`` (without ``client``) that resemble it most, with their similarity.

    Most similar first; of equals the one with the lower number.
    """
    found = {other: similarity(p_CLE[client], p_CLE[other]) for other in among if other != client}
    return {other: found[other] for other in sorted(found, key=lambda other: (-found[other], other))[:count]}


def expected_activation(p_CLE: torch.Tensor, similar: Mapping[int, float]) -> torch.Tensor | None:
    """Mean of similar clients' p, weighted by similarity, (L, E) float64; ``None`` where nobody is similar at all."""
    total = sum(similar.values())
    if not total > 0:
        return None
    weights_C = torch.tensor(list(similar.values()), dtype=torch.float64) / total
    return torch.einsum("c,cle->le", weights_C, p_CLE[list(similar)].double())


def adjust(held: Held, expected_LE: torch.Tensor, change: int, *, limit: int, least: int) -> Held:
    """Add the experts that similar clients use most, or remove those that they use least.

    Args:
        held: The sub-model now.
        expected_LE: What similar clients' p is, as ``expected_activation`` gives it.
        change: Experts to add (> 0) or to remove (< 0).
        limit: Most experts that the client may hold; what goes beyond is not added.
        least: Fewest experts of a layer; no more is removed there.
    """
    kept = [set(experts) for experts in held]
    size = sum(map(len, kept))
    num_experts = expected_LE.shape[1]
    if change > 0:
        outside = [(layer, e) for layer, experts in enumerate(kept) for e in range(num_experts) if e not in experts]
        outside.sort(key=lambda place: (-float(expected_LE[place]), place))
        for layer, expert in outside[: max(0, min(change, limit - size))]:
            kept[layer].add(expert)
    inside = sorted(
        ((layer, e) for layer, experts in enumerate(held) for e in experts), key=lambda place: (float(expected_LE[place]), place)
    )
    left = max(0, -change)
    for layer, expert in inside:
        if left and len(kept[layer]) > least:
            kept[layer].remove(expert)
            left -= 1
    return tuple(tuple(sorted(experts)) for experts in kept)


def recommend(
    client: int,
    held: Mapping[int, Held],
    p_CLE: torch.Tensor,
    among: Iterable[int],
    *,
    neighbours: int,
    limit: int,
    least: int,
) -> Held:
    """Give a client the sub-model that similar clients suggest: as many experts as they hold in the mean, rounded.

    Args:
        client: Whose sub-model it is.
        held: Every client's sub-model now.
        p_CLE: Every client's shares.
        among: Clients whose p is known.
        neighbours: How many of them count, the most similar ones.
        limit: Most experts that the client may hold.
        least: Fewest experts of a layer.

    Returns:
        The new sub-model; the old one where nothing changes.
    """
    similar = most_similar(p_CLE, client, among, neighbours)
    expected_LE = expected_activation(p_CLE, similar)
    if expected_LE is None:
        return held[client]
    mean = sum(sum(map(len, held[other])) for other in similar) / len(similar)
    change = round(mean - sum(map(len, held[client])))
    return adjust(held[client], expected_LE, change, limit=limit, least=least)


@dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    """How a client's sub-model fares: its ``best`` score so far (lower is better, ``None``: none yet), for how many of its
    rounds it has been ``stale``, the sub-model before the one that it tries out now (``previous``), and whether it may change.
    """

    best: float | None = None
    stale: int = 0
    previous: Held | None = None
    is_frozen: bool = False

    def to_json(self) -> dict[str, object]:
        """The trial as JSON values, for ``ServerState.notes``."""
        previous = None if self.previous is None else [list(experts) for experts in self.previous]
        return {"best": self.best, "stale": self.stale, "previous": previous, "is_frozen": self.is_frozen}

    @classmethod
    def from_json(cls, value: object) -> Self:
        """Read what ``to_json`` gave.

        Raises:
            MethodError: It is something else.
        """
        try:
            found = dict(value)  # type: ignore[call-overload]
            previous = found.pop("previous")
            return cls(**found, previous=None if previous is None else tuple(tuple(experts) for experts in previous))
        except (KeyError, TypeError, ValueError) as error:
            raise MethodError(f"this is no trial of a sub-model: {str(value)[:80]}", "give what to_json() gave") from error


def judge(trial: Trial, score: float, *, patience: int) -> tuple[Trial, Literal["keep", "change", "revert"]]:
    """Take in a client's score of a round and say what becomes of its sub-model.

    ``change``: ``patience`` rounds without a better score than the best so far, so another sub-model is to be tried. ``revert``:
    one that was tried out was no better either for as long; it goes back, and stays so for good. A better score accepts what is
    tried. A score that is not finite is no better one.

    Returns:
        The trial with the score in it (with ``revert`` it is frozen, but still names ``previous``), and the decision.
    """
    if math.isfinite(score) and (trial.best is None or score < trial.best):
        return replace(trial, best=score, stale=0, previous=None), "keep"
    trial = replace(trial, stale=trial.stale + 1)
    if trial.is_frozen or trial.stale < patience:
        return trial, "keep"
    return (trial, "change") if trial.previous is None else (replace(trial, is_frozen=True), "revert")


def _ranked(p_LE: torch.Tensor, *, count: int, least: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Experts of each layer by falling p, the lower index among equals, and the sums of these prefixes; (L, E) both."""
    num_layers, num_experts = p_LE.shape
    if not 1 <= least <= num_experts or count < num_layers * least:
        raise MethodError(
            f"a sub-model of {count} experts cannot have {least} in each of {num_layers} layers of {num_experts} experts",
            "give the client a larger budget",
        )
    values_LE, order_LE = p_LE.double().sort(dim=1, descending=True, stable=True)
    return order_LE, values_LE.cumsum(dim=1)


def _shortest(sums_E: torch.Tensor, theta: float, least: int) -> int:
    """Length of the shortest prefix that reaches theta, at least ``least``; out of all bounds where none does."""
    found = int((sums_E < theta).sum())
    return max(least, found + 1) if found < len(sums_E) else _TOO_MANY


def _prefixes(order_LE: torch.Tensor, sizes: Sequence[int]) -> Held:
    return tuple(tuple(sorted(order_E[:size].tolist())) for order_E, size in zip(order_LE, sizes, strict=True))
