"""The mathematics of FedMoE's sub-models, against brute force, closed forms and the paper's own bytes."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from fractions import Fraction

import pytest
import torch
from torch.nn import functional as F

from fedgraft.aggregation.submodel import (
    Held,
    Trial,
    adjust,
    expected_activation,
    held_by_layer,
    judge,
    most_similar,
    randomised,
    reach,
    recommend,
    similarity,
    threshold_search,
    water_fill,
    with_estimates,
    with_measured,
)
from fedgraft.errors import MethodError
from fedgraft.platform.ledger import describe, entries
from fedgraft.types import SHARED, ModelFacts, assigned

Search = Callable[..., Held]
SEARCHES = [water_fill, threshold_search]


def shares(num_layers: int, num_experts: int, seed: int, *, skew: float = 3.0) -> torch.Tensor:
    """Random p whose layers sum to 1, multiples of 2^-12: sums are exact in any order."""
    generator = torch.Generator().manual_seed(seed)
    raw = torch.rand(num_layers, num_experts, generator=generator, dtype=torch.float64) ** skew
    p_LE = (raw / raw.sum(dim=1, keepdim=True) * 4096).floor() / 4096
    p_LE[:, 0] += 1 - p_LE.sum(dim=1)
    return p_LE


def coverage_of(p_LE: torch.Tensor, held: Held) -> float:
    """Least share of a layer's choices that the held experts cover: the theta that a sub-model reaches."""
    return min(float(p_E[list(experts)].sum()) for p_E, experts in zip(p_LE, held, strict=True))


def size(held: Held) -> int:
    return sum(map(len, held))


# ---- the search


@pytest.mark.parametrize(("count", "least"), [(3, 1), (5, 1), (7, 1), (6, 2), (8, 2), (12, 1)])
def test_theta_is_the_best_of_all_sub_models(count: int, least: int) -> None:
    for seed in range(3):
        p_LE = shares(3, 4, seed)
        covered = [
            [(n, sum(p_E[e] for e in sub)) for n in range(least, 5) for sub in itertools.combinations(range(4), n)]
            for p_E in p_LE.tolist()
        ]
        every = itertools.product(*covered)
        best = max(min(theta for _, theta in layers) for layers in every if sum(n for n, _ in layers) <= count)
        for search in SEARCHES:
            found = search(p_LE, count=count, least=least)
            assert coverage_of(p_LE, found) == best
            assert size(found) <= count
            assert all(len(experts) >= least and list(experts) == sorted(set(experts)) for experts in found)


def test_both_searches_find_the_same_theta_at_the_papers_size() -> None:
    thetas = []
    for count in (12, 30, 52, 65, 78, 104, 200, 384):
        p_LE = shares(12, 32, count)
        filled, searched = water_fill(p_LE, count=count, least=1), threshold_search(p_LE, count=count, least=1)
        assert coverage_of(p_LE, filled) == coverage_of(p_LE, searched)
        assert size(searched) <= size(filled) <= count
        assert all(set(few) <= set(many) for few, many in zip(searched, filled, strict=True))
        thetas.append(coverage_of(p_LE, filled))
    assert thetas[0] < thetas[4] < thetas[-1] == 1.0
    assert size(water_fill(shares(12, 32, 78), count=78, least=1)) == 78, "no budget is left unused"


def test_an_expert_without_any_choice_is_not_added() -> None:
    p_LE = torch.tensor([[0.5, 0.0, 0.5, 0.0], [0.25, 0.25, 0.25, 0.25]])
    for search in SEARCHES:
        assert search(p_LE, count=8, least=1) == ((0, 2), (0, 1, 2, 3))
    assert water_fill(p_LE, count=8, least=3) == ((0, 1, 2), (0, 1, 2, 3))


@pytest.mark.parametrize("search", SEARCHES)
def test_too_small_a_budget_is_refused(search: Search) -> None:
    with pytest.raises(MethodError, match="5 experts cannot have 2 in each of 3 layers of 4"):
        search(shares(3, 4, 0), count=5, least=2)


@pytest.mark.parametrize("theta", [0.1, 0.5, 0.7, 0.99, 1.0])
def test_every_layer_reaches_theta_and_with_one_expert_less_it_would_not(theta: float) -> None:
    p_LE = shares(6, 16, 1)
    held = reach(p_LE, theta, least=1)
    for p_E, experts in zip(p_LE, held, strict=True):
        assert float(p_E[list(experts)].sum()) >= theta
        least_used = min(experts, key=lambda e: float(p_E[e]))
        assert float(p_E[list(experts)].sum() - p_E[least_used]) < theta
        assert min(float(p_E[e]) for e in experts) >= max((float(p_E[e]) for e in range(16) if e not in experts), default=0)
    assert all(len(experts) >= 4 for experts in reach(p_LE, theta, least=4))


@pytest.mark.parametrize(("numbers", "theta"), [([8, 2], 0.8), ([1] * 10, 0.8), ([7, 2, 1], 0.7)])
def test_rounding_adds_no_expert_to_a_theta_that_is_reached(numbers: list[int], theta: float) -> None:
    exact = [Fraction(number, 10) for number in numbers]
    least = next(n for n in range(1, 11) if sum(exact[:n]) >= Fraction(str(theta)))
    for dtype in (torch.float32, torch.float64):
        held = reach(torch.tensor([[number / 10 for number in numbers]], dtype=dtype), theta, least=1)
        assert held == (tuple(range(least)),), dtype


def test_a_theta_that_rounding_keeps_out_of_reach_takes_what_there_is() -> None:
    p_LE = torch.tensor([[0.6, 0.4 - 1e-7, 0.0]], dtype=torch.float64)
    assert reach(p_LE, 1.0, least=1) == ((0, 1),)


def test_random_sub_models_have_the_same_sizes() -> None:
    held = ((0, 1, 2), (3,), (0, 1, 2, 3, 4, 5, 6, 7))
    drawn = {randomised(held, 8, seed) for seed in range(20)}
    assert all(tuple(map(len, found)) == (3, 1, 8) for found in drawn)
    assert all(list(experts) == sorted(set(experts)) for found in drawn for experts in found)
    assert len(drawn) > 10
    assert randomised(held, 8, 3) == randomised(held, 8, 3)


# ---- p


def test_what_is_measured_replaces_only_what_is_held() -> None:
    p_LE = torch.full((2, 4), 0.25, dtype=torch.float64)
    found = with_measured(p_LE, ((0, 2, 3), (1,)), torch.tensor([0.5, 0.375, 0.125, 1.0]))
    assert found.tolist() == [[0.5, 0.25, 0.375, 0.125], [0.25, 1.0, 0.25, 0.25]]
    assert p_LE.unique().tolist() == [0.25], "the old state is left alone"


def test_who_did_not_measure_gets_the_mean_of_its_task_by_examples() -> None:
    p_CLE = torch.tensor([[[0.0, 1.0]], [[1.0, 0.0]], [[0.5, 0.5]], [[9.0, 9.0]], [[9.0, 9.0]]], dtype=torch.float64)
    labels: list[dict[str, int]] = [{"a": 3, "b": 1}, {"a": 1}, {"b": 2, "a": 2}, {"a": 5, "c": 2}, {"c": 1}]
    found = with_estimates(p_CLE, [0, 1, 2], labels, [30, 10, 8, 4, 4])
    # a: clients 0, 1 and, first of equals by name, 2; nobody of c measured, so all count.
    expected = [(30 * 0 + 10 * 1 + 8 * 0.5) / 48, (30 * 1 + 10 * 0 + 8 * 0.5) / 48]
    assert found[3, 0].tolist() == pytest.approx(expected, abs=1e-15)
    assert found[4, 0].tolist() == pytest.approx(expected, abs=1e-15)
    assert torch.equal(found[:3], p_CLE[:3])
    apart = with_estimates(p_CLE, [0, 1, 2], [{"b": 1}, {"a": 1}, {"b": 1}, {"a": 1}, {"b": 2}], [30, 10, 8, 4, 4])
    assert apart[3, 0].tolist() == [1.0, 0.0]
    assert apart[4, 0].tolist() == pytest.approx([(8 * 0.5) / 38, (30 + 8 * 0.5) / 38], abs=1e-15)
    unlabelled = with_estimates(p_CLE, [1], [], [30, 10, 8, 4, 4])
    assert unlabelled[:, 0].tolist() == [[1.0, 0.0]] * 5


def test_similarity_is_a_symmetric_cosine_and_1_for_equal_p() -> None:
    for seed in range(20):
        a, b = shares(3, 5, seed), shares(3, 5, seed + 100)
        assert similarity(a, b) == similarity(b, a)
        assert similarity(a, a.clone()) == 1.0
        expected = float(F.cosine_similarity(a.reshape(-1), b.reshape(-1), dim=0))
        assert similarity(a, b) == pytest.approx(expected, abs=1e-14)
    assert similarity(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])) == 0.0
    assert similarity(torch.zeros(1, 2), torch.tensor([[0.0, 1.0]])) == 0.0


def test_the_most_similar_clients_come_first_and_never_the_client_itself() -> None:
    p_CLE = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]], [[3.0, 4.0]], [[4.0, 3.0]], [[4.0, 3.0]]])
    assert most_similar(p_CLE, 0, range(5), 3) == {3: 0.8, 4: 0.8, 2: 0.6}
    assert list(most_similar(p_CLE, 0, range(5), 9)) == [3, 4, 2, 1]
    assert list(most_similar(p_CLE, 0, (0, 1, 2), 2)) == [2, 1]


def test_expected_activation_is_the_mean_by_similarity() -> None:
    p_CLE = torch.tensor([[[8.0, 0.0]], [[0.0, 4.0]], [[1.0, 1.0]]])
    found = expected_activation(p_CLE, {0: 0.375, 1: 0.125})
    assert found is not None
    assert found.tolist() == [[6.0, 1.0]]
    assert expected_activation(p_CLE, {0: 0.0, 1: 0.0}) is None
    assert expected_activation(p_CLE, {}) is None


# ---- changes


EXPECTED = torch.tensor([[0.1, 0.4, 0.3, 0.2], [0.25, 0.05, 0.3, 0.4]])


@pytest.mark.parametrize(
    ("change", "limit", "expected"),
    [
        (0, 8, ((0, 1), (0, 1))),
        (1, 8, ((0, 1), (0, 1, 3))),
        (2, 8, ((0, 1, 2), (0, 1, 3))),  # layer 1's expert 2 has the same p, and comes later
        (3, 8, ((0, 1, 2), (0, 1, 2, 3))),
        (9, 8, ((0, 1, 2, 3), (0, 1, 2, 3))),
        (3, 5, ((0, 1), (0, 1, 3))),
        (3, 3, ((0, 1), (0, 1))),  # more than the limit is held already: nothing is added, nothing is lost
        (-1, 8, ((0, 1), (0,))),
        (-2, 8, ((1,), (0,))),
        (-9, 8, ((1,), (0,))),
    ],
)
def test_the_most_expected_are_added_and_the_least_expected_removed(change: int, limit: int, expected: Held) -> None:
    assert adjust(((0, 1), (0, 1)), EXPECTED, change, limit=limit, least=1) == expected


def test_no_layer_loses_what_a_token_needs() -> None:
    assert adjust(((0, 1, 2), (1, 3)), EXPECTED, -3, limit=8, least=2) == ((1, 2), (1, 3))


def test_a_client_gets_as_many_experts_as_similar_ones_hold_in_the_mean() -> None:
    p_CLE = torch.stack([EXPECTED, EXPECTED + 0.1, EXPECTED * 2, 1 - EXPECTED])
    held = {0: ((1,), (3,)), 1: ((0, 1, 2), (0, 3)), 2: ((1, 2), (2, 3)), 3: ((0,), (0,))}
    options = {"limit": 8, "least": 1}
    # The two most similar hold 5 and 4 experts, 4.5 in the mean; 2.5 more round to the even 2.
    assert recommend(0, held, p_CLE, range(4), neighbours=2, **options) == ((1, 2), (2, 3))
    assert recommend(0, held, p_CLE, (0, 3), neighbours=2, **options) == held[0]
    assert recommend(0, held, p_CLE, (0,), neighbours=2, **options) == held[0]
    shrunk = recommend(1, held, p_CLE, (0, 1), neighbours=2, **options)
    assert size(shrunk) == 2
    assert shrunk == ((1,), (3,))


# ---- trials


def play(scores: list[float], *, patience: int = 2, changes: bool = True) -> tuple[list[str], Trial]:
    """Decisions of a client that gets another sub-model whenever it is due, through JSON like a resumed run."""
    trial, seen = Trial(), []
    for score in scores:
        trial, decision = judge(Trial.from_json(json.loads(json.dumps(trial.to_json()))), score, patience=patience)
        seen.append(decision)
        if decision == "change" and changes:
            trial = Trial(best=trial.best, stale=0, previous=((0, 1), (2,)), is_frozen=trial.is_frozen)
    return seen, trial


def test_a_sub_model_changes_when_the_score_stands_still() -> None:
    assert play([3, 2, 1])[0] == ["keep"] * 3
    assert play([3, 3, 3])[0] == ["keep", "keep", "change"]
    assert play([3, 4, 2.9, 2.9, 2.9])[0] == ["keep", "keep", "keep", "keep", "change"]
    assert play([3, 3], patience=1)[0] == ["keep", "change"]


def test_what_is_tried_is_accepted_when_it_improves_and_undone_for_good_when_it_does_not() -> None:
    decisions, trial = play([3, 3, 3, 2])
    assert (decisions[-1], trial.previous, trial.is_frozen) == ("keep", None, False)
    decisions, trial = play([3, 3, 3, 3, 3])
    assert decisions == ["keep", "keep", "change", "keep", "revert"]
    assert trial.previous == ((0, 1), (2,))
    assert trial.is_frozen
    assert play([3, 3, 3, 3, 3] + [9.0] * 20)[0][5:] == ["keep"] * 20
    # Accepted, and due for another one later.
    assert play([3, 3, 3, 2, 2, 2])[0] == ["keep", "keep", "change", "keep", "keep", "change"]


def test_a_client_to_which_nothing_better_is_known_asks_again() -> None:
    assert play([3, 3, 3, 3], changes=False)[0] == ["keep", "keep", "change", "change"]


def test_a_score_that_is_no_number_is_no_better_one() -> None:
    decisions, trial = play([float("nan"), float("nan"), 5.0])
    assert decisions == ["keep", "change", "keep"]
    assert trial.best == 5.0


def test_a_broken_trial_is_refused() -> None:
    with pytest.raises(MethodError, match="this is no trial of a sub-model"):
        Trial.from_json({"best": 1.0})


# ---- bytes


def test_the_papers_bytes_follow_from_our_ledger() -> None:
    """Table 1: 8 of 32 experts in 12 layers are 2.30 GiB; then 65 experts, the ablation's mean, are its 1.76 GiB."""
    facts = ModelFacts(
        family="switch",
        layers=tuple(range(12)),
        num_experts=32,
        top_k=1,
        hidden_size=768,
        expert_size=3072,
        norm_topk_prob=False,
        attention=(),
        num_layers=12,
    )
    expert = 2 * 768 * 3072  # Switch's experts have no gate projection
    names = {f"{layer}.{e}": assigned(layer, e) for layer in facts.layers for e in range(32)}

    def gib(held: Held, dense: int) -> float:
        with torch.device("meta"):  # sizes without values
            tensors = {"dense": torch.empty(dense)}
            tensors |= {
                f"{layer}.{e}": torch.empty(expert) for layer, experts in zip(facts.layers, held, strict=True) for e in experts
            }
        rows = entries(1, 0, "down", describe(tensors, names | {"dense": SHARED}))
        return sum(row.bytes for row in rows) / 2**30

    eight = held_by_layer(facts, {layer: tuple(range(8)) for layer in facts.layers})
    dense = 619_000_000 - 96 * expert  # the whole of a baseline's model, by the paper
    assert dense == pytest.approx(166e6, rel=2e-3)
    assert size(eight) == 96
    assert gib(eight, dense) == pytest.approx(2.306, abs=5e-4)
    sub_model = water_fill(shares(12, 32, 5), count=65, least=1)
    assert size(sub_model) == 65
    assert round(gib(sub_model, dense), 2) == 1.76
    assert size(held_by_layer(facts, None)) == 384
