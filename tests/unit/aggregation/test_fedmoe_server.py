"""FedMoE's server alone: who explores, which first sub-models are found, what changes and what stays."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from fedgraft.aggregation.fedmoe import FedMoE, FedMoEConfig
from fedgraft.aggregation.submodel import Trial, held_by_layer, reach, water_fill
from fedgraft.errors import MethodError
from fedgraft.protocols import Reduced
from fedgraft.types import (
    Budget,
    ClientUpdate,
    EvaluationTask,
    Federation,
    ModelFacts,
    RoundPlan,
    ServerState,
)

FACTS = ModelFacts(
    family="qwen2_moe",
    layers=(1, 3),
    num_experts=4,
    top_k=1,
    hidden_size=8,
    expert_size=8,
    norm_topk_prob=True,
    attention=(),
    num_layers=4,
)


def server(options: Mapping[str, Any] = {}, *, experts: Sequence[int | None] = (), **fields: Any) -> FedMoE:
    """A method's server half with four clients; ``experts`` a layer are their budgets."""
    method = FedMoE(FedMoEConfig.model_validate({"name": "fedmoe", **options}))
    known = {"num_examples": (10, 20, 30, 40), "rounds": 9, "run_seed": 3, "refs": (), "groups": {}} | fields
    method.federation = Federation(facts=FACTS, budgets=tuple(Budget(experts_per_layer=n) for n in experts), **known)
    return method


def measured(client: int, round_idx: int, p_LE: torch.Tensor, score: float, assignment: Any = None) -> ClientUpdate:
    """A client's reply that says p of what it holds."""
    held = held_by_layer(FACTS, assignment)
    shares = torch.cat([p_E[list(experts)] for p_E, experts in zip(p_LE, held, strict=True)])
    return ClientUpdate(
        client_id=client,
        round_idx=round_idx,
        num_examples=10,
        num_steps=1,
        expert_tokens=torch.zeros(2, 4),
        metrics={},
        payload=(),
        statistics={"activation": shares, "score": torch.tensor([score])},
        assignment=assignment,
    )


def through_json(state: ServerState) -> ServerState:
    return replace(state, notes=json.loads(json.dumps(state.notes)))


def plan_of(method: FedMoE, state: ServerState, round_idx: int) -> RoundPlan:
    return method.plan(state, RoundPlan(round_idx=round_idx, num_steps=1, learning_rate=0.1))


NOTHING = Reduced(delta={}, extras={}, num_contributors={})
P = torch.tensor([[0.5, 0.25, 0.125, 0.125], [0.0625, 0.0625, 0.125, 0.75]])


def explored(method: FedMoE, rows: Mapping[int, torch.Tensor]) -> ServerState:
    """The state after a warm-up in which these clients measured."""
    state = method.init({}, 4)
    return through_json(method.aggregate(state, NOTHING, [measured(c, 1, p_LE, 5.0) for c, p_LE in rows.items()]))


def test_the_first_rounds_explore_with_whole_models() -> None:
    method = server({"warmup_rounds": 2})
    state = method.init({}, 4)
    assert [plan_of(method, state, r).phase for r in (1, 2, 3)] == ["explore", "explore", "train"]
    assert method.assign(state, plan_of(method, state, 1), (0, 1)) == {}
    state = method.aggregate(state, NOTHING, [measured(0, 1, P, 5.0)])
    assert method.assign(state, plan_of(method, state, 2), (0, 1)) == {}, "one more round of stage 1"
    later = torch.tensor([[0.0, 0.0, 0.0, 1.0]] * 2)
    state = method.aggregate(state, NOTHING, [measured(0, 2, later, 5.0)])
    assert method.assign(state, plan_of(method, state, 3), (0,)) == {0: {1: (3,), 3: (3,)}}, "the last round's p counts"


@pytest.mark.parametrize(
    ("options", "experts", "cohort", "expected"),
    [
        ({}, (), (1, 3), (0, 1, 2, 3)),
        ({}, (4, 2, 5, None), (1, 3), (0, 2, 3)),
        ({"warmup_cohort": "sampled"}, (4, 2, 4, None), (1, 3), (3,)),
        ({"warmup_cohort": "sampled"}, (4, 2, 4, 3), (1, 3), (0, 2)),
    ],
)
def test_stage_1_is_for_clients_that_can_hold_the_whole_model(
    options: dict[str, Any], experts: tuple[int | None, ...], cohort: tuple[int, ...], expected: tuple[int, ...]
) -> None:
    method = server(options, experts=experts)
    state = method.init({}, 4)
    assert method.select(state, plan_of(method, state, 1), cohort) == expected
    assert method.select(state, plan_of(method, state, 2), cohort) == cohort


def test_the_first_sub_models_fit_alpha_of_each_budget() -> None:
    labels = ({"a": 1}, {"a": 1}, {"b": 1}, {"b": 1})
    method = server(experts=(4, 3, None, 1), labels=labels)
    other = P.flip(1)
    state = explored(method, {0: P, 2: other})
    p_CLE = state.memory["p"]
    assert torch.equal(p_CLE, torch.stack([P, P, other, other]).double()), "estimates by label"
    found = method.assign(state, plan_of(method, state, 2), (0, 1, 2, 3))
    # 0.8 of 8, 6 and 2 experts, in whole ones, but one a layer at least; without a budget what covers 0.7.
    counts = {0: 6, 1: 4, 3: 2}
    for client, count in counts.items():
        expected = water_fill(p_CLE[client], count=count, least=1)
        assert held_by_layer(FACTS, found.get(client)) == expected
        assert sum(map(len, expected)) == count
    assert held_by_layer(FACTS, found[2]) == reach(other, 0.7, least=1) == ((2, 3), (0,))
    everything = server({"coverage": None}, experts=(4, 3, None, 1), labels=labels)
    assert 2 not in everything.assign(explored(everything, {0: P, 2: other}), plan_of(method, state, 2), (0, 1, 2, 3))
    every = server({"same_task": "all", "memory_fraction": 1.0}, experts=(4, 3, None, 1), labels=labels)
    state = explored(every, {0: P, 2: other})
    assert torch.equal(state.memory["p"][1], (10 * P.double() + 30 * other.double()) / 40)
    assert every.assign(state, plan_of(every, state, 2), (0,)) == {}, "all of its budget is all experts"


def test_the_search_is_a_choice_and_random_experts_are_as_many() -> None:
    rows = torch.tensor([[0.5, 0.375, 0.125, 0.0]] * 2)
    held = {}
    for name, options in {"waterfill": {}, "binary": {"search": "binary"}, "random": {"experts": "random"}}.items():
        method = server({"memory_fraction": 0.625, "same_task": "all", **options}, experts=(4, 4, 4, 4))
        state = explored(method, {0: rows})
        found = method.assign(state, plan_of(method, state, 2), (0, 1, 2, 3))
        held[name] = [held_by_layer(FACTS, found[client]) for client in range(4)]
    # Five experts: theta is 0.875 with four of them, and 1 would need six.
    assert held["binary"] == [((0, 1), (0, 1))] * 4
    assert held["waterfill"] == [((0, 1, 2), (0, 1))] * 4
    assert {tuple(map(len, each)) for each in held["random"]} == {(3, 2)}
    assert len(set(held["random"])) > 1, "each client draws its own"


def test_what_cannot_work_is_refused_before_anything_is_sent() -> None:
    with pytest.raises(MethodError, match="no client's budget holds all 8 experts"):
        server(experts=(3, 2, 3, 3)).init({}, 4)
    server({"warmup_rounds": 0}, experts=(3, 2, 3, 3)).init({}, 4)
    method = server(experts=(1, 4, 4, 4))
    method.federation = replace(method.federation, facts=replace(FACTS, top_k=2))
    with pytest.raises(MethodError, match="the budget of client 0 holds 2 experts, and 2 layers need 2 each"):
        method.init({}, 4)


@pytest.mark.parametrize(("rounds", "explored_rounds"), [(1, 1), (2, 1), (3, 2), (4, 3), (9, 3)])
def test_a_run_that_is_too_short_keeps_its_last_round_for_stage_2(rounds: int, explored_rounds: int) -> None:
    method = server({"warmup_rounds": 3}, rounds=rounds)
    state = method.init({}, 4)
    for round_idx in range(1, explored_rounds + 1):
        assert method.assign(state, plan_of(method, state, round_idx), (0,)) == {}
        state = method.aggregate(state, NOTHING, [measured(0, round_idx, P, 5.0)])
    phases = [plan_of(method, state, round_idx).phase for round_idx in range(1, rounds + 1)]
    assert phases == ["explore"] * explored_rounds + ["train"] * (rounds - explored_rounds)
    assert method.assign(state, plan_of(method, state, rounds), (0,)) == {0: {1: (0, 1), 3: (3,)}}, "found after stage 1"


def test_who_may_hold_all_holds_experts_that_no_choice_fell_on_too() -> None:
    focused = torch.tensor([[1.0, 0.0, 0.0, 0.0]] * 2)
    for search in ("waterfill", "binary"):
        method = server({"coverage": None, "memory_fraction": 1.0, "search": search}, experts=(4, 4, None, 9))
        assert not method.is_personal({})
        state = explored(method, dict.fromkeys(range(4), focused))
        assert method.assign(state, plan_of(method, state, 2), (0, 1, 2, 3)) == {}


def test_sub_models_need_routers_without_groups() -> None:
    for options, experts, is_refused in (
        ({}, (), True),
        ({"warmup_rounds": 0}, (), True),
        ({"coverage": None}, (4, 4, 4, 4), True),  # 0.8 of a budget
        ({"coverage": None, "memory_fraction": 1.0}, (4, 4, 4, 4), False),
        ({"coverage": None}, (), False),
    ):
        method = server(options, experts=experts)
        method.init({}, 4)
        method.federation = replace(method.federation, facts=replace(FACTS, num_groups=2))
        if is_refused:
            with pytest.raises(MethodError, match="choose among 2 groups of experts first"):
                method.init({}, 4)
        else:
            method.init({}, 4)


def test_batches_stay_whole_only_where_they_are_balanced() -> None:
    assert not server().uses_batch_statistics
    assert server({"balance": 0.1}).uses_batch_statistics


def test_who_has_a_model_of_its_own() -> None:
    assert server().is_personal({})
    assert not server({"coverage": None}).is_personal({})
    assert server({"coverage": None}, experts=(4, None, None, None)).is_personal({}), "0.8 of 8 experts are 6"
    assert not server({"coverage": None, "memory_fraction": 1.0}, experts=(4, 9, None, None)).is_personal({})
    assert server({"coverage": None, "memory_fraction": 1.0}, experts=(4, 3, None, None)).is_personal({})
    assert FedMoE(FedMoEConfig()).is_personal({}), "a replica cannot know"


def test_models_are_judged_with_what_their_client_holds() -> None:
    method = server()
    state = explored(method, dict.fromkeys(range(4), P))
    judged = EvaluationTask(round_idx=2, view="personal", tasks=("client",), keys=(), client_id=1)
    assert method.evaluation(state, judged).assignment == {1: (0, 1), 3: (3,)}
    whole = replace(judged, view="global")
    assert method.evaluation(state, whole) == whole
    assert method.evaluation(method.init({}, 4), judged) == judged, "before stage 1 ends every model is whole"


# ---- recommendation


def after_rounds(method: FedMoE, state: ServerState, scores: Sequence[float], start: int = 2) -> tuple[ServerState, list[Any]]:
    """Client 0 trains alone with these scores; gives what it holds after each round."""
    seen = []
    for round_idx, score in enumerate(scores, start):
        holds = method.assign(state, plan_of(method, state, round_idx), (0,)).get(0)
        state = through_json(method.aggregate(state, NOTHING, [measured(0, round_idx, P, score, holds)]))
        seen.append(held_by_layer(FACTS, method.assign(state, plan_of(method, state, round_idx), (0,)).get(0)))
    return state, seen


FIRST = ((0, 1), (3,))
TRIED = ((0, 1, 2), (0, 2, 3))


def recommending(options: Mapping[str, Any] = {}, **fields: Any) -> tuple[FedMoE, ServerState]:
    """Client 0 holds 3 experts; the others resemble one another and hold 6 each."""
    method = server({"patience": 2, "neighbours": 3, **options}, **fields)
    flat = torch.tensor([[0.3, 0.28, 0.27, 0.15], [0.27, 0.15, 0.28, 0.3]])
    state = explored(method, {0: P, 1: flat, 2: flat, 3: flat})
    assert held_by_layer(FACTS, method.assign(state, plan_of(method, state, 2), (0,))[0]) == FIRST
    return method, state


def test_a_client_that_stands_still_gets_what_similar_ones_hold() -> None:
    method, state = recommending()
    _, seen = after_rounds(method, state, [3.0, 2.0, 2.0, 2.5])
    assert seen == [FIRST, FIRST, FIRST, TRIED]
    _, seen = after_rounds(method, state, [3.0, 2.0, 2.0, 1.9, 1.95, 1.8])
    assert seen == [FIRST] * 6, "it improved in time"


def test_what_does_not_help_is_undone_and_never_changed_again() -> None:
    method, state = recommending()
    state, seen = after_rounds(method, state, [2.0] * 5)
    assert seen == [FIRST, FIRST, TRIED, TRIED, FIRST]
    trial = Trial.from_json(state.notes["trials"]["0"])  # type: ignore[index]
    assert (trial.is_frozen, trial.previous) == (True, None)
    _, seen = after_rounds(method, state, [9.0] * 12 + [1.0] + [9.0] * 6, start=7)
    assert seen == [FIRST] * 19


def test_what_helps_stays() -> None:
    method, state = recommending()
    state, seen = after_rounds(method, state, [2.0, 2.0, 2.0, 1.0, 1.5, 1.5, 1.5])
    assert seen == [FIRST, FIRST, TRIED, TRIED, TRIED, TRIED, TRIED]
    assert state.notes["trials"]["0"]["is_frozen"] is False  # type: ignore[index]


def test_recommendations_respect_the_budget() -> None:
    method = server({"patience": 1, "neighbours": 3}, experts=(2, 4, 4, 4), labels=({"a": 1},) * 4)
    flat = torch.tensor([[0.3, 0.28, 0.27, 0.15], [0.27, 0.15, 0.28, 0.3]])
    state = explored(method, {1: flat, 2: flat, 3: flat})
    first = held_by_layer(FACTS, method.assign(state, plan_of(method, state, 2), (0,))[0])
    assert sum(map(len, first)) == 3, "0.8 of 4"
    _, seen = after_rounds(method, state, [2.0, 2.0])
    assert sum(map(len, seen[-1])) == 4, "similar clients hold 6, its budget 4"


def test_experts_that_similar_clients_do_without_are_given_up() -> None:
    method = server({"patience": 1, "coverage": 0.99, "neighbours": 2})
    focused = torch.tensor([[0.0, 1.0, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0]])
    mixed = torch.tensor([[0.4, 0.6, 0.0, 0.0], [0.4, 0.0, 0.0, 0.6]])
    state = explored(method, {0: mixed, 1: focused, 2: focused, 3: torch.tensor([[0.0, 0.0, 1.0, 0.0]] * 2)})
    holds = method.assign(state, plan_of(method, state, 2), (0,))[0]
    assert holds == {1: (0, 1), 3: (0, 3)}
    for round_idx in (2, 3):
        state = method.aggregate(state, NOTHING, [measured(0, round_idx, mixed, 2.0, holds)])
    assert method.assign(state, plan_of(method, state, 4), (0,)) == {0: {1: (1,), 3: (3,)}}


def test_p_of_what_a_client_lost_is_what_it_last_measured() -> None:
    method, state = recommending()
    state, _ = after_rounds(method, state, [2.0])
    assert torch.equal(state.memory["p"][0], P.double())
    holds = {1: (0, 1), 3: (3,)}
    newer = torch.tensor([[0.75, 0.25, 7.0, 7.0], [7.0, 7.0, 7.0, 1.0]])
    state = method.aggregate(state, NOTHING, [measured(0, 3, newer, 2.0, holds)])
    expected = [[0.75, 0.25, 0.125, 0.125], [0.0625, 0.0625, 0.125, 1.0]]
    assert state.memory["p"][0].tolist() == expected


def test_only_clients_that_measured_are_similar_to_anybody() -> None:
    method = server({"warmup_rounds": 0, "patience": 1}, experts=(2, 4, 4, 4))
    state, seen = after_rounds(method, method.init({}, 4), [2.0] * 4)
    assert [sum(map(len, held)) for held in seen] == [3] * 4, "the others hold 6, but nobody knows their p"
    holds = method.assign(state, plan_of(method, state, 6), (1,))[1]
    state = method.aggregate(state, NOTHING, [measured(1, 6, P, 2.0, holds)])
    _, seen = after_rounds(method, state, [2.0], start=7)
    assert sum(map(len, seen[0])) == 4


def test_the_order_of_a_cohort_does_not_change_who_gets_what() -> None:
    method, state = recommending({"patience": 1})
    generator = torch.Generator().manual_seed(2)
    rows = [torch.rand(2, 4, generator=generator) for _ in range(4)]

    def play(order: Sequence[int]) -> ServerState:
        found = state
        for round_idx in (2, 3):
            holds = method.assign(found, plan_of(method, found, round_idx), (0, 1, 2, 3))
            updates = [measured(c, round_idx, rows[c], 2.0, holds.get(c)) for c in order]
            found = method.aggregate(found, NOTHING, updates)
        return found

    one, other = play((0, 1, 2, 3)), play((3, 1, 0, 2))
    assert through_json(one).notes == through_json(other).notes
    assert one.notes["map"] != state.notes["map"]
    assert torch.equal(one.memory["p"], other.memory["p"])
