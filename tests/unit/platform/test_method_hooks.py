"""What the platform promises a method's hooks: their order, what they see, what they may keep, send and change."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, Literal

import pytest
import torch

from fedgraft.aggregation.fedavg import FedAvg, PartsConfig
from fedgraft.aggregation.private_lora import PrivateLora, PrivateLoraConfig
from fedgraft.data.prepared import PreparedData
from fedgraft.errors import GroupViolation, MethodError, RunInterrupted
from fedgraft.platform.task_checks import check_evaluation, check_task
from fedgraft.protocols import Method
from fedgraft.registry import METHODS
from fedgraft.training.step import response_loss
from fedgraft.types import (
    PRIVATE,
    Broadcast,
    Budget,
    ClientFailure,
    ClientTask,
    EvaluationTask,
    Federation,
    RoundPlan,
    ServerState,
    assigned,
)

Maker = Callable[..., Any]
Use = Callable[..., type]
PROBE = {"name": "probe", "adapter": {"rank": 2, "alpha": 4.0}}


class ProbeConfig(PartsConfig):
    name: Literal["probe"] = "probe"


class Probe(FedAvg):
    name = "probe"
    config_class = ProbeConfig


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Use:
    """Register a small method with these hooks for one test."""

    def make(base: type = Probe, **hooks: Any) -> type:
        made = type("Changed", (base,), hooks)
        monkeypatch.setitem(METHODS._classes, "probe", made)
        return made

    return make


# ---- build


def test_a_client_is_set_up_asked_built_trained_and_taken_down_in_this_order(make_bench: Maker, use: Use) -> None:
    seen: list[str] = []

    def note(name: str, then: Callable[..., Any]) -> Callable[..., Any]:
        def hook(self: Any, *args: Any) -> Any:
            seen.append(name)
            return then(self, *args)

        return hook

    @contextmanager
    def built(self: Any, session: Any) -> Iterator[None]:
        seen.append("build")
        assert all(torch.equal(session.engine.read([key])[key], value) for key, value in session.received.items())
        yield
        seen.append("take down")

    use(
        setup=note("setup", Method.setup),
        request=note("request", Method.request),
        build=built,
        local=note("local", Method.local),
        objective=note("objective", Method.objective),
        uploads=note("uploads", Method.uploads),
        reply=note("reply", Method.reply),
        observe=note("observe", Method.observe),
        keeps_client_state=True,
        is_personal=lambda self, groups: True,
    )
    bench = make_bench(PROBE)
    params = {key: value + 0.01 for key, value in bench.worker.initial_params().items()}
    bench.train(0, 1, params)
    assert seen == ["setup", "request", "build", "local", "objective", "uploads", "reply", "take down"]
    seen.clear()
    bench.train(0, 2, params)
    assert seen == ["request", "build", "local", "objective", "uploads", "reply", "take down"]
    seen.clear()
    task = EvaluationTask(round_idx=2, view="personal", tasks=("client",), keys=tuple(params), client_id=0, state_version=2)
    bench.worker.evaluate(task, Broadcast(round_idx=2, params=params))
    assert seen == ["request", "build", "observe", "take down"]


def test_what_build_sets_up_is_undone_when_training_fails(make_bench: Maker, use: Use) -> None:
    alive: list[bool] = []

    @contextmanager
    def built(self: Any, session: Any) -> Iterator[None]:
        alive.append(True)
        try:
            yield
        finally:
            alive.pop()

    def fail(self: Any, session: Any, train: Any) -> Any:
        assert alive
        raise ValueError("boom")

    use(build=built, local=fail)
    bench = make_bench(PROBE)
    params = bench.worker.initial_params()
    task = bench.task(0, 1, params, assignment={0: (0, 1)})
    outcome, _ = bench.worker.update(task, Broadcast(round_idx=1, params=params))
    assert isinstance(outcome, ClientFailure)
    assert (outcome.stage, outcome.error, alive) == ("train", "ValueError: boom", [])
    assert bench.worker.engine.model.model.layers[0].mlp.gate.fedgraft_masks == [], "the mask is gone, too"


def test_what_build_loads_is_where_the_delta_starts(make_bench: Maker, use: Use, assert_same_bits: Maker) -> None:
    def moved(session: Any) -> dict[str, torch.Tensor]:
        return {key: value + 0.5 for key, value in session.received.items()}

    @contextmanager
    def built(self: Any, session: Any) -> Iterator[None]:
        session.engine.load(moved(session))
        yield

    use(build=built)
    bench = make_bench(PROBE)
    params = bench.worker.initial_params()
    _, found = bench.train(0, 1, params)
    use()
    bench = make_bench(PROBE)
    _, expected = bench.train(0, 1, {key: value + 0.5 for key, value in params.items()})
    assert_same_bits(found, expected)


# ---- objective


@pytest.mark.parametrize("num_parts", [1, 2])
def test_an_own_objective_takes_the_place_of_the_loss(num_parts: int, make_bench: Maker, use: Use) -> None:
    outputs: list[Any] = []

    def objective(self: Any, session: Any) -> Any:
        def twice(model: Any, part: Any, count: int | None) -> Any:
            assert (count is None) == (num_parts == 1)
            loss, output = response_loss(model, part, count)
            return 2 * loss, SimpleNamespace(labels=output.labels, is_own=True)

        return twice

    def terms(self: Any, session: Any, batch: Any, output: Any) -> dict[str, torch.Tensor]:
        outputs.append(output)
        return {}

    def train(**hooks: Any) -> Any:
        use(**hooks)
        bench = make_bench(PROBE, num_steps=1)
        spec = replace(bench.worker.spec.train, optimizer="sgd", max_grad_norm=None)
        bench = make_bench(PROBE, num_steps=1, train=spec)
        return bench.train(0, 1, bench.worker.initial_params(), num_parts=num_parts)

    plain, expected = train()
    found, tensors = train(objective=objective, terms=terms)
    assert found.metrics["train_loss"].total == 2 * plain.metrics["train_loss"].total
    moved = 0
    for key, value in tensors.items():
        # B starts at zero, so nothing is rounded away: twice the gradient is twice the step, bit for bit.
        assert torch.equal(value, 2 * expected[key]), key
        moved += int(value.any())
    assert moved > 0
    assert [output.is_own for output in outputs] == [True] * num_parts


# ---- what clients keep and publish


class Counting(Probe):
    """Each client counts its rounds beside its slots, none of which is private."""

    keeps_client_state = True

    def setup(self, session: Any) -> None:
        session.private["times"] = torch.zeros(1)

    def local(self, session: Any, train: Any) -> Any:
        session.private["times"] += 1
        session.diagnostics["times"] = session.private["times"].tolist()
        return train()


def times(ran: Any) -> list[tuple[int, int, list[float]]]:
    return [(row["round"], row["client_id"], row["values"]) for row in ran.rows("diagnostics") if row["kind"] == "times"]


def test_clients_keep_state_of_their_own_from_round_to_round(make_job: Maker, run_job: Maker, use: Use) -> None:
    use(Counting)
    job = make_job(PROBE)
    asked = iter([False, False, True])
    with pytest.raises(RunInterrupted):
        run_job(job, is_stopping=lambda: next(asked))
    ran = run_job(job)
    assert times(ran) == [(r, client, [float(r)]) for r in (1, 2, 3) for client in range(3)]
    assert [task.state_version for task, _, _ in ran.pool.replies] == [2] * 3


def test_a_client_that_keeps_nothing_yet_is_still_set_up_only_once(make_job: Maker, run_job: Maker, use: Use) -> None:
    calls: list[tuple[int, int]] = []
    use(
        keeps_client_state=True,
        setup=lambda self, session: calls.append((session.task.round_idx, session.task.client_id)),
    )
    run_job(replace(make_job(PROBE), rounds=2))
    assert calls == [(1, 0), (1, 1), (1, 2)]


def test_state_that_would_be_lost_is_refused(make_bench: Maker, use: Use) -> None:
    use(Counting, keeps_client_state=False, setup=Method.setup, local=lambda self, session, train: keep(session, train))

    def keep(session: Any, train: Any) -> Any:
        session.private["times"] = torch.zeros(1)
        return train()

    bench = make_bench(PROBE)
    with pytest.raises(GroupViolation, match=r"puts times into session.private.*\n.*keeps_client_state = True"):
        bench.train(0, 1, bench.worker.initial_params())


def test_only_what_the_task_publishes_leaves_a_client(make_bench: Maker, use: Use) -> None:
    def reply(self: Any, session: Any, update: Any) -> Any:
        return update, {"sample": session.private[keys[0]].clone(), "own": session.private["own"].clone()}

    def setup(self: Any, session: Any) -> None:
        session.private["own"] = torch.arange(5.0)

    keys: list[str] = []

    class Config(PrivateLoraConfig):
        name: Literal["probe"] = "probe"  # type: ignore[assignment]

    use(PrivateLora, name="probe", config_class=Config, reply=reply, setup=setup)
    bench = make_bench({"name": "probe"})
    key = next(key for key, group in bench.worker.groups.items() if group == PRIVATE)
    keys.append(key)
    params = bench.worker.initial_params()
    for allowed, refused in (((), "sample"), ((key,), "own"), (("own",), "sample")):
        with pytest.raises(GroupViolation, match=f"{refused}' carries the private"):
            bench.train(0, 1, params, publishes=allowed)
    update, tensors = bench.train(0, 1, params, publishes=(key, "own"))
    assert torch.equal(tensors["extras/sample"], bench.private(0)[key])
    assert [info.num_bytes for info in update.payload if info.key == "own"] == [20]
    with pytest.raises(GroupViolation, match="was about to be sent"):
        bench.train(0, 2, params)  # what one round allowed, the next does not


# ---- the federation, cohorts


def test_the_servers_half_knows_the_federation_and_the_clients_half_does_not(
    make_job: Maker, run_job: Maker, use: Use, data_folder: Any
) -> None:
    seen: list[Federation] = []
    on_client: list[bool] = []

    def plan(self: Any, state: Any, default: RoundPlan) -> RoundPlan:
        seen.append(self.federation)
        return default

    def init(self: Any, params: Any, num_clients: int) -> ServerState:
        seen.append(self.federation)
        return ServerState(params=params)

    def local(self: Any, session: Any, train: Any) -> Any:
        on_client.append(hasattr(self, "federation"))
        return train()

    use(plan=plan, init=init, local=local)
    budgets = tuple(Budget(experts_per_layer=count) for count in (2, 3, 4))
    ran = run_job(replace(make_job(PROBE), rounds=2, budgets=budgets))
    assert len(seen) == 3
    assert all(found is seen[0] for found in seen)
    found = seen[0]
    data = PreparedData.open(data_folder)
    assert found.num_examples == tuple(len(data.split(client, "train")) for client in range(3))
    assert [list(labels.values()) for labels in found.labels] == [[count] for count in found.num_examples]
    assert [next(iter(labels)) for labels in found.labels] == list(data.client_names)
    assert (found.num_clients, found.run_seed, found.rounds) == (3, 7, 2)
    assert [found.budget(client) for client in range(3)] == list(budgets)
    assert (found.refs, found.groups) == (ran.pool.worker.engine.refs, ran.pool.worker.groups)
    assert found.facts == ran.pool.worker.engine.facts
    assert on_client == [False] * 6
    assert [task.budget for task, _, _ in ran.pool.replies] == list(budgets) * 2
    assert replace(found, budgets=()).budget(0) is None


@pytest.mark.parametrize(
    ("cohort", "error"),
    [((), "selected no client"), ((0, 3), r"clients \[3\] that do not exist"), ((1, 0, 1), r"clients \[1\] twice")],
)
def test_a_cohort_that_makes_no_sense_is_refused(
    cohort: tuple[int, ...], error: str, make_job: Maker, run_job: Maker, use: Use
) -> None:
    use(select=lambda self, state, plan, drawn: cohort)
    with pytest.raises(MethodError, match=error):
        run_job(make_job(PROBE))


# ---- checks before anything is sent


@pytest.fixture
def served(make_bench: Maker, use: Use) -> tuple[Federation, ServerState, ClientTask]:
    """A federation over full experts, a state, and a task that is fine."""
    use()
    worker = make_bench({"name": "probe", "lora": [], "full": ["experts"]}).worker
    params = worker.initial_params()
    state = ServerState(params=params | {"pool": torch.zeros(1, 32, 24)}, extras={"c": torch.zeros(2)})
    federation = Federation(
        facts=worker.engine.facts,
        refs=worker.engine.refs,
        groups=worker.groups,
        run_seed=0,
        rounds=1,
        num_examples=(1,),
    )
    plan = RoundPlan(round_idx=1, num_steps=1, learning_rate=0.1)
    task = ClientTask(client_id=4, plan=plan, keys=tuple(params), extra_keys=("c",))
    return federation, state, task


DOWN = "model.layers.0.mlp.experts.down_proj[{}]"
WRONG: list[tuple[dict[str, Any], str]] = [
    ({"keys": ("stray",)}, "has keys stray, which are no slots"),
    ({"keys": ("pool",)}, "has keys pool, which are no slots"),
    ({"addresses": {DOWN.format(1): "nowhere"}}, "names nowhere, which the server does not have"),
    (
        {"addresses": {DOWN.format(1): "model.layers.0.mlp.experts.gate_up_proj[0]"}},
        r"gate_up_proj\[0\] of shape \(1, 48, 32\) into .*down_proj\[1\] of shape \(1, 32, 24\)",
    ),
    ({"extra_keys": ("c", "d")}, "names the extras d, which the server does not have"),
    ({"assignment": {5: (0, 1)}}, "experts of layer 5, which has none\n.*MoE layers are 0, 1"),
    ({"assignment": {0: (0, 4)}}, r"assigns experts \[0, 4\] of layer 0\n.*0 to 3 ascending"),
    ({"assignment": {0: (1, 0)}}, r"assigns experts \[1, 0\] of layer 0"),
    ({"assignment": {0: (1, 1)}}, r"assigns experts \[1, 1\] of layer 0"),
    ({"assignment": {1: (2,)}}, "assigns 1 experts of layer 1, and a token needs 2"),
]


@pytest.mark.parametrize(("change", "error"), WRONG)
def test_a_task_that_does_not_fit_together_is_refused(change: dict[str, Any], error: str, served: Any) -> None:
    federation, state, task = served
    check_task(task, federation, state)
    with pytest.raises(MethodError, match=f"(?s)the task of client 4 .*{error}"):
        check_task(replace(task, **change), federation, state)
    judged = EvaluationTask(round_idx=1, view="personal", tasks=(), keys=task.keys, client_id=4)
    check_evaluation(judged, federation, state)
    with pytest.raises(MethodError, match=f"(?s)the evaluation of the personal model of client 4 .*{error}"):
        check_evaluation(replace(judged, **change), federation, state)


def test_a_tensor_goes_into_one_slot_in_training_and_into_several_in_evaluation(served: Any) -> None:
    federation, state, task = served
    twice = {DOWN.format(0): "pool", DOWN.format(2): "pool"}
    with pytest.raises(MethodError, match="puts pool into two slots"):
        check_task(replace(task, addresses=twice), federation, state)
    with pytest.raises(MethodError, match=r"puts .*down_proj\[0\] into two slots"):
        check_task(replace(task, addresses={DOWN.format(2): DOWN.format(0)}), federation, state)
    judged = EvaluationTask(round_idx=1, view="global", tasks=(), keys=task.keys, addresses=twice)
    check_evaluation(judged, federation, state)


def test_an_experts_tensors_do_not_go_to_a_client_that_does_not_hold_it(served: Any) -> None:
    federation, state, task = served
    with pytest.raises(MethodError, match="belongs to an expert that its assignment leaves out"):
        check_task(replace(task, assignment={0: (0, 1, 3)}), federation, state)
    held = tuple(key for key in task.keys if federation.groups[key] != assigned(0, 2))
    check_task(replace(task, keys=held, assignment={0: (0, 1, 3)}), federation, state)


def test_where_routers_choose_by_groups_everybody_holds_all(served: Any) -> None:
    federation, state, task = served
    grouped = replace(federation, facts=replace(federation.facts, num_groups=2))
    held = tuple(key for key in task.keys if federation.groups[key] != assigned(0, 2))
    lacking = replace(task, keys=held, assignment={0: (0, 1, 3)})
    judged = EvaluationTask(round_idx=1, view="personal", tasks=(), keys=held, client_id=4, assignment=lacking.assignment)
    check_task(lacking, federation, state)
    check_evaluation(judged, federation, state)
    with pytest.raises(MethodError, match="(?s)client 4 assigns 3 of 4 experts of layer 0, .* 2 groups .*without groups"):
        check_task(lacking, grouped, state)
    with pytest.raises(MethodError, match="assigns 3 of 4 experts of layer 0"):
        check_evaluation(judged, grouped, state)
    check_task(task, grouped, state)
    check_task(replace(task, assignment={0: (0, 1, 2, 3)}), grouped, state)


def test_the_loop_checks_tasks_and_evaluations(make_job: Maker, run_job: Maker, use: Use) -> None:
    use(task=lambda self, state, task: replace(task, extra_keys=("x",)))
    with pytest.raises(MethodError, match="the task of client 0 names the extras x"):
        run_job(make_job(PROBE))
    use(evaluation=lambda self, state, task: replace(task, addresses={task.keys[0]: "x"}))
    with pytest.raises(MethodError, match="the evaluation of the global model of client 0 names x"):
        run_job(make_job(PROBE))


def test_personal_models_need_no_private_slot(make_job: Maker, run_job: Maker, use: Use) -> None:
    use(is_personal=lambda self, groups: True, observe=lambda self, session: {"who": {"client": session.task.client_id}})
    ran = run_job(replace(make_job(PROBE), rounds=1))
    rows = {(row["view"], row["client_id"], row["task"]) for row in ran.rows("evaluations")}
    assert {(view, client, "client") for view in ("personal", "global") for client in range(3)} <= rows
    found = [row["values"] for row in ran.rows("diagnostics") if row["kind"] == "who"]
    assert found == [{"client": client} for client in range(3)]
    assert ran.folder.read_info()["has_private"] is True


def test_a_statistic_that_is_not_finite_is_its_clients_failure(make_bench: Callable[..., Any]) -> None:
    bench = make_bench({"name": "fedavg"})

    def reply(session: Any, update: Any) -> Any:
        update.statistics["loss"] = torch.tensor([float("nan")])
        return update, {}

    bench.worker.method.reply = reply
    params = bench.worker.initial_params()
    failure, _ = bench.worker.update(bench.task(0, 1, params), Broadcast(round_idx=1, params=params))
    assert isinstance(failure, ClientFailure)
    assert failure.stage == "reply"
    assert "loss has values that are not finite" in failure.error
