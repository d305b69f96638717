"""FLEX-MoE: what is assigned, sent, kept, weighed and learned from, on runs of three clients and in closed forms."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from fedgraft.aggregation.assignment import coefficient_of_variation
from fedgraft.aggregation.expert_map import ExpertMap
from fedgraft.aggregation.flex_moe import FlexMoE, FlexMoEConfig, next_deficit
from fedgraft.errors import ConfigError, MethodError, RunInterrupted
from fedgraft.platform.loading import load_config
from fedgraft.registry import METHODS
from fedgraft.types import (
    PRIVATE,
    SHARED,
    Budget,
    EvaluationTask,
    Federation,
    ModelFacts,
    ParamRef,
    Params,
    RoundPlan,
    ServerState,
    assigned,
)

Maker = Callable[..., Any]
THREE: dict[str, Any] = {"name": "flex_moe", "adapter": {"rank": 2, "alpha": 4.0}, "experts_per_client": 3}
"""Three of the tiny model's four experts a client; a token needs two."""

FACTS = ModelFacts(
    family="qwen2_moe",
    layers=(1, 3),
    num_experts=4,
    top_k=2,
    hidden_size=8,
    expert_size=8,
    norm_topk_prob=False,
    attention=(),
    num_layers=4,
)
PLAN = RoundPlan(round_idx=2, num_steps=1, learning_rate=0.1)


def method(*, clients: int = 3, budgets: tuple[Budget, ...] = (), **options: Any) -> FlexMoE:
    """A method with its server half ready, of a model that is sizes only."""
    made = METHODS.parse({"name": "flex_moe"} | options)
    assert isinstance(made, FlexMoE)
    made.federation = Federation(
        facts=FACTS, refs=(), groups={}, run_seed=7, rounds=3, num_examples=(8,) * clients, budgets=budgets
    )
    return made


def fitted(made: FlexMoE, clients: int, seed: int = 0) -> ServerState:
    """A state with random fitness and deficits."""
    state = made.init({}, clients)
    generator = torch.Generator().manual_seed(seed)
    drawn = {
        name: torch.rand(state.memory[name].shape, generator=generator, dtype=torch.float64) for name in ("fitness", "deficit")
    }
    return replace(state, memory={**state.memory, **drawn})


@pytest.fixture(scope="module")
def runs() -> dict[str, Any]:
    return {}


@pytest.fixture
def run(runs: dict[str, Any], make_job: Maker, run_job: Maker) -> Maker:
    """A run of these options, made once; two rounds unless told."""

    def make(*, rounds: int = 2, cohort_size: int | None = None, **options: Any) -> Any:
        key = json.dumps([options, rounds, cohort_size], sort_keys=True)
        if key not in runs:
            federation = {} if cohort_size is None else {"cohort_size": cohort_size}
            runs[key] = run_job(replace(make_job(THREE | options, federation=federation), rounds=rounds))
        return runs[key]

    return make


# ---- options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora": ["attention"]}, "put experts into lora or full"),
        ({"full": [], "router": "shared"}, "router has no effect where no router is trained"),
        ({"solver": "greedy", "load_slack": 0.2}, "load_slack has no effect with solver: greedy"),
        ({"solver": "greedy", "deficit_weight": 0.0}, "deficit_weight has no effect"),
        ({"solver": "random", "feedback": "usage"}, "feedback has no effect with solver: random"),
        ({"solver": "random", "fitness_rate": 0.5, "feedback_examples": 3}, "feedback_examples, fitness_rate has no effect"),
        ({"feedback": "usage", "feedback_examples": 3}, "feedback_examples has no effect"),
        ({"fitness_rate": 0.0}, "fitness_rate"),
        ({"load_slack": -0.1}, "load_slack"),
        ({"balance_weight": -1.0}, "balance_weight"),
    ],
)
def test_options_that_are_wrong_or_without_effect_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        FlexMoEConfig.model_validate({"name": "flex_moe", **options})


@pytest.mark.parametrize("count", [1, 5])
def test_fewer_experts_than_a_token_needs_or_more_than_there_are_are_refused(count: int) -> None:
    with pytest.raises(MethodError, match=f"experts_per_client is {count}, but a token of this model goes to 2 of 4") as caught:
        method(experts_per_client=count).slots(FACTS)
    assert caught.value.hint == "set experts_per_client to 2 to 4"


def test_a_budget_too_small_for_a_token_is_refused_at_the_start() -> None:
    budgets = (Budget(experts_per_layer=2), Budget(experts_per_layer=1), Budget())
    with pytest.raises(MethodError, match="the budget of client 1 is 1 experts a layer, but a token of this model needs 2"):
        method(budgets=budgets).init({}, 3)


def test_routers_are_private_or_shared_and_experts_assigned() -> None:
    row = ParamRef(key="gate", name="gate", part="router", shape=(4, 8), layer=1)
    lora = replace(row, key="gate.lora_A", adapter="shared")
    expert = ParamRef(key="up[2]", name="up", part="experts", shape=(1, 8, 8), layer=3, expert=2)
    attention = ParamRef(key="q", name="q", part="attention", shape=(8, 8), layer=1)
    for router, group in (("private", PRIVATE), ("shared", SHARED)):
        made = method(router=router)
        assert [made.group(ref) for ref in (row, lora, expert, attention)] == [group, group, assigned(3, 2), SHARED]
        assert made.is_personal({})


# ---- the assignment


def test_every_round_keeps_to_capacities_and_loads() -> None:
    made = method(clients=7, experts_per_client=2, load_slack=0.1, deficit_weight=0.5)
    for seed in range(5):
        found = made.assign(fitted(made, 7, seed), PLAN, (6, 1, 0, 4, 3))
        assert sorted(found) == [0, 1, 3, 4, 6]
        for layer in FACTS.layers:
            held = [found[client][layer] for client in found]
            assert all(len(experts) == 2 and list(experts) == sorted(set(experts)) for experts in held)
            # m = 5 * 2 / 4 = 2.5: from floor(2.25) to ceil(2.75).
            loads = [sum(expert in experts for experts in held) for expert in range(4)]
            assert all(2 <= load <= 3 for load in loads)
        # No client's place in the cohort matters, also where the order decides among equals.
        assert found == made.assign(fitted(made, 7, seed), PLAN, (0, 1, 3, 4, 6))
    start = made.init({}, 7)  # all pairs alike
    assert made.assign(start, PLAN, (3, 0, 6)) == made.assign(start, PLAN, (0, 3, 6))


def test_each_layer_is_solved_by_its_own_fitness() -> None:
    made = method(experts_per_client=2, load_slack=1e9, deficit_weight=0.0)
    state = made.init({}, 3)
    state.memory["fitness"][:, 0, 2:] = 0.0
    state.memory["fitness"][:, 1, :2] = 0.0
    assert made.assign(state, PLAN, (0, 1, 2)) == {client: {1: (0, 1), 3: (2, 3)} for client in range(3)}


def test_budgets_bound_what_each_client_holds() -> None:
    budgets = (Budget(experts_per_layer=2), Budget(experts_per_layer=3), Budget(experts_per_layer=9), Budget())
    found = method(clients=4, budgets=budgets).assign(fitted(method(clients=4), 4), PLAN, (0, 1, 2, 3))
    assert {client: len(held[1]) for client, held in found.items()} == {0: 2, 1: 3}  # the others hold all
    both = method(clients=4, budgets=budgets, experts_per_client=2)
    assert {len(held[3]) for held in both.assign(fitted(both, 4), PLAN, (0, 1, 2, 3)).values()} == {2}
    assert method(experts_per_client=4).assign(fitted(method(), 3), PLAN, (0, 2)) == {}


def test_a_slack_without_bounds_is_the_greedy_choice_exactly() -> None:
    for seed in range(5):
        free = method(clients=6, experts_per_client=2, load_slack=1e9, deficit_weight=0.0)
        greedy = method(clients=6, experts_per_client=2, solver="greedy")
        state, cohort = fitted(free, 6, seed), (0, 1, 2, 3, 5)
        assert free.assign(state, PLAN, cohort) == greedy.assign(state, PLAN, cohort)
        assert method(clients=6, experts_per_client=2).assign(state, PLAN, cohort) != greedy.assign(state, PLAN, cohort)


@pytest.mark.parametrize("options", [{"solver": "greedy"}, {"load_slack": 1e9}], ids=["greedy", "exact without bounds"])
def test_among_equal_fitness_every_client_starts_with_experts_of_its_own(options: dict[str, Any]) -> None:
    made = method(clients=60, experts_per_client=2, **options)
    state = made.init({}, 60)  # all fitness is 1, and no deficit
    found = made.assign(state, PLAN, tuple(range(60)))
    for layer in FACTS.layers:
        loads = [sum(expert in found[client][layer] for client in found) for expert in range(4)]
        # 30 in the mean, with a standard deviation of sqrt(60 / 4) = 3.9; the lowest numbers first would be 60, 60, 0, 0.
        assert sum(loads) == 120
        assert all(15 < load < 45 for load in loads)
    assert any(held[1] != held[3] for held in found.values())
    # It depends on the run's seed and the client alone, and does not change: what was not tried yet is next.
    assert made.assign(state, replace(PLAN, round_idx=9), (41, 7)) == {client: found[client] for client in (7, 41)}
    other = method(clients=60, experts_per_client=2, **options)
    other.federation = replace(other.federation, run_seed=8)
    assert other.assign(state, PLAN, tuple(range(60))) != found


@pytest.mark.parametrize(
    "option",
    [
        {"solver": "exact"},
        {"load_slack": 0.3},
        {"deficit_weight": 2.0},
        {"fitness_rate": 0.5},
        {"feedback": "usage"},
        {"feedback_examples": 3},
    ],
)
def test_without_any_limit_options_of_the_assignment_are_refused(option: dict[str, Any]) -> None:
    def config_of(method: dict[str, Any], **federation: Any) -> Any:
        return load_config({"method": {"name": "flex_moe"} | method, "federation": federation})

    message = f"{next(iter(option))} has no effect where every client holds all experts"
    with pytest.raises(ConfigError, match=message):
        config_of(option)
    for valid in (
        config_of({}),
        config_of(option | {"experts_per_client": 3}),
        config_of(option, budgets={"experts_per_layer": [8]}),
    ):
        assert valid.method is not None


def test_where_everybody_holds_everything_nothing_is_judged(run: Maker) -> None:
    for options, learns in (({"experts_per_client": None}, False), ({}, True)):
        ran = run(rounds=1, **options)
        assert all(("feedback" in update.statistics) == learns for _, update, _ in ran.pool.replies)
        assert bool((ran.state.memory["fitness"] == 1).all()) != learns


def test_deficits_draw_clients_to_an_expert_that_fitness_would_leave() -> None:
    for weight, expected in ((0.0, 0), (10.0, 3)):
        made = method(experts_per_client=2, load_slack=1e9, deficit_weight=weight)
        state = made.init({}, 3)
        state.memory["fitness"][:, :, 3] = 0.0
        state.memory["deficit"][:, 3] = 1.0
        found = made.assign(state, PLAN, (0, 1, 2))
        assert sum(3 in found[client][1] for client in found) == expected


def test_a_drawn_assignment_depends_on_round_client_and_layer_alone() -> None:
    made = method(clients=9, experts_per_client=2, solver="random")
    state = made.init({}, 9)
    all_of_them = made.assign(state, PLAN, tuple(range(9)))
    assert made.assign(state, PLAN, (8, 3)) == {client: all_of_them[client] for client in (3, 8)}
    assert made.assign(state, replace(PLAN, round_idx=3), tuple(range(9))) != all_of_them
    assert any(held[1] != held[3] for held in all_of_them.values())


def test_the_deficit_grows_with_what_an_expert_lacks_and_never_below_zero() -> None:
    found = next_deficit(torch.tensor([[0.0, 1.0, 0.5, 0.0]], dtype=torch.float64), torch.tensor([[3, 0, 2, 1]]))
    assert found.tolist() == [[0.0, 2.5, 0.0, 0.5]]  # m = 1.5


def test_a_personal_model_has_its_last_experts_or_those_that_fit_best() -> None:
    made = method(experts_per_client=2)
    state = made.init({}, 3)
    # Client 2 knows nothing of its own but that expert 0 is bad; the others' mean decides among equals.
    state.memory["fitness"][2, :, 0] = 0.5
    state.memory["fitness"][0, 0] = torch.tensor([0.9, 0.1, 0.8, 0.7])
    held = ExpertMap.from_json(state.notes["held"]).give({1: {1: (0, 3), 3: (1, 2)}})
    state = replace(state, notes=json.loads(json.dumps({**state.notes, "held": held.to_json()})))

    def judged(client: int | None, view: Any) -> Any:
        task = EvaluationTask(round_idx=1, view=view, tasks=("client",), keys=(), client_id=client)
        return made.evaluation(state, task).assignment

    assert judged(1, "personal") == {1: (0, 3), 3: (1, 2)}
    assert judged(2, "personal") == {1: (2, 3), 3: (1, 2)}
    assert judged(1, "global") is None
    assert judged(None, "global") is None
    made.config = FlexMoEConfig()
    assert judged(2, "personal") is None


# ---- runs


def keys_of(ran: Any, *parts: str) -> set[str]:
    return {ref.key for ref in ran.pool.worker.engine.refs if ref.part in parts}


def test_with_everything_everywhere_it_is_fedavg_bit_for_bit(make_job: Maker, run_job: Maker, assert_same_bits: Maker) -> None:
    parts: dict[str, Any] = {"adapter": THREE["adapter"], "lora": ["attention", "experts"], "full": ["router"]}
    same: dict[str, Any] = {"router": "shared", "usage_weighting": False, "balance_weight": 0.0}
    found = run_job(replace(make_job({"name": "flex_moe"} | parts | same), rounds=2))
    expected = run_job(replace(make_job({"name": "fedavg"} | parts), rounds=2))
    assert_same_bits(found.state.params, expected.state.params)
    losses = [[row["train_loss"] for row in ran.rows("metrics")] for ran in (found, expected)]
    assert losses[0] == losses[1]


def test_the_router_stays_and_only_backbone_and_held_experts_travel(run: Maker) -> None:
    ran = run()
    worker, routers = ran.pool.worker, keys_of(ran, "router")
    assert routers
    refs = {ref.key: ref for ref in worker.engine.refs}
    down: dict[tuple[int, int], int] = {}
    up: dict[tuple[int, int], int] = {}
    for task, update, tensors in ran.pool.replies:
        assert task.assignment is not None
        assert all(len(held) == 3 for held in task.assignment.values())
        held = {
            ref.key
            for ref in refs.values()
            if ref.part == "attention" or (ref.part == "experts" and ref.expert in task.assignment[ref.layer])
        }
        assert set(task.keys) == set(tensors) == held
        size = 4 * sum(refs[key].num_elements for key in held)
        place = (task.round_idx, task.client_id)
        down[place] = size
        up[place] = size + 2 * 4 * 2 * 3  # usage and feedback, float32, of three experts in two layers
        assert not routers & {info.key for info in update.payload}
    assert not routers & set(ran.state.params)
    for direction, expected in (("down", down), ("up", up)):
        found: dict[tuple[int, int], int] = {}
        for row in ran.rows("ledger"):
            if row["direction"] == direction:
                place = (row["round"], row["client_id"])
                found[place] = found.get(place, 0) + row["bytes"]
        assert found == expected


def test_means_are_weighed_by_examples_and_use_and_an_expert_without_holder_stays(run: Maker, assert_same_bits: Maker) -> None:
    ran = run(rounds=1, cohort_size=2, experts_per_client=2, deficit_weight=0.0, load_slack=1e9)
    worker, replies = ran.pool.worker, ran.pool.replies
    start: Params = worker.initial_params()
    assert len(replies) == 2
    kept = 0
    for ref in worker.engine.refs:
        if ref.part not in ("experts", "attention"):
            continue
        weighted: list[tuple[float, torch.Tensor]] = []
        for task, update, tensors in replies:
            if ref.key not in tensors:
                continue
            weight = float(update.num_examples)
            if ref.part == "experts":
                row, column = worker.engine.facts.layers.index(ref.layer), task.assignment[ref.layer].index(ref.expert)
                weight *= float(update.statistics["usage"][row, column])
            weighted.append((weight, tensors[ref.key].double()))
        if not weighted:
            assert_same_bits({ref.key: ran.state.params[ref.key]}, {ref.key: start[ref.key]})
            kept += 1
            continue
        mean = sum(weight * delta for weight, delta in weighted) / sum(weight for weight, _ in weighted)  # type: ignore[arg-type]
        torch.testing.assert_close(ran.state.params[ref.key], (start[ref.key].double() + mean).float(), rtol=1e-6, atol=1e-8)
    # What neither holds stays: of each expert two LoRAs of two tensors.
    nobodys = [4 - len({e for task, _, _ in replies for e in task.assignment[layer]}) for layer in worker.engine.facts.layers]
    assert kept == 2 * 2 * sum(nobodys)
    assert kept > 0


def test_the_server_learns_from_assigned_pairs_only_and_counts_loads(run: Maker) -> None:
    ran = run(rounds=1)
    fitness, layers = ran.state.memory["fitness"], ran.pool.worker.engine.facts.layers
    loads = torch.zeros(2, 4, dtype=torch.int64)
    for task, update, _ in ran.pool.replies:
        usage, feedback = update.statistics["usage"], update.statistics["feedback"]
        torch.testing.assert_close(usage.sum(dim=1), torch.ones(2), rtol=1e-6, atol=0)
        assert 0 <= float(feedback.min()) <= float(feedback.max()) <= 1
        for row, layer in enumerate(layers):
            expected = torch.ones(4, dtype=torch.float64)
            for column, expert in enumerate(task.assignment[layer]):
                expected[expert] = 0.7 + 0.3 * float(feedback[row, column])
                loads[row, expert] += 1
            torch.testing.assert_close(fitness[task.client_id, row], expected, rtol=1e-12, atol=0)
    assert torch.equal(ran.state.memory["load"], loads)
    torch.testing.assert_close(ran.state.memory["deficit"], (9 / 4 - loads.double()).clamp_min(0))
    held = ExpertMap.from_json(ran.state.notes["held"])
    assert {client: held.assignment(client) for client in held.clients} == {
        task.client_id: dict(task.assignment) for task, _, _ in ran.pool.replies
    }
    expected_cv = [[coefficient_of_variation(row) for row in loads]]
    assert ran.state.notes["load_cv"] == {"round": expected_cv, "cumulative": expected_cv}
    notes = [row for row in ran.rows("diagnostics") if row["kind"] == "held_experts"]
    assert {row["client_id"]: row["values"]["experts"] for row in notes} == {
        task.client_id: [list(task.assignment[layer]) for layer in layers] for task, _, _ in ran.pool.replies
    }


@pytest.mark.slow
def test_clients_without_all_experts_resume_to_the_same_bits(
    run: Maker, make_job: Maker, run_job: Maker, assert_same_bits: Maker
) -> None:
    straight, job = run(), replace(make_job(THREE), rounds=2)
    asked: list[int] = []
    with pytest.raises(RunInterrupted):
        run_job(job, is_stopping=lambda: len(asked) > 0 or asked.append(1) is not None)
    resumed = run_job(job)
    assert {task.round_idx for task, _, _ in resumed.pool.replies} == {2}
    for name in ("params", "memory"):
        assert_same_bits(getattr(resumed.state, name), getattr(straight.state, name))
    assert resumed.state.notes == straight.state.notes
    assert resumed.private_files() == straight.private_files()


def test_a_budget_of_its_own_for_each_client_runs(make_job: Maker, run_job: Maker) -> None:
    budgets = tuple(Budget(experts_per_layer=count) for count in (2, 3, 4))
    options = {key: value for key, value in THREE.items() if key != "experts_per_client"}
    ran = run_job(replace(make_job(options), rounds=1, budgets=budgets))
    shapes = {update.client_id: tuple(update.statistics["usage"].shape) for _, update, _ in ran.pool.replies}
    assert shapes == {0: (2, 2), 1: (2, 3), 2: (2, 4)}
    assert ran.state.memory["load"].sum(dim=1).tolist() == [9, 9]
    # m = 9 / 4: between floor(2.025) and ceil(2.475).
    assert 2 <= int(ran.state.memory["load"].min()) <= int(ran.state.memory["load"].max()) <= 3


def outcome(ran: Any) -> str:
    """What a client's model and the server's fitness became, in one text."""
    values = {**ran.state.params, **{name: value for name, value in ran.state.memory.items() if name == "fitness"}}
    return json.dumps({key: float(value.double().abs().sum()) for key, value in sorted(values.items())})


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"feedback": "loss_drop"},
        {"feedback": "usage"},
        {"fitness_rate": 0.9},
        {"usage_weighting": False},
        {"balance_weight": 0.0},
        {"router": "shared"},
        {"solver": "random"},
        {"experts_per_client": 2},
    ],
)
def test_each_switch_changes_something(run: Maker, options: dict[str, Any]) -> None:
    assert outcome(run(rounds=1, **options)) != outcome(run(rounds=1))


@pytest.mark.slow
def test_feedback_is_measured_on_as_many_examples_as_asked_for(run: Maker) -> None:
    few, many = ({"feedback": "loss_drop", "feedback_examples": count} for count in (1, 64))
    assert outcome(run(rounds=1, **few)) != outcome(run(rounds=1, **many))
