"""Slots under the server's names: addresses, requests, uploads, spread sums and assignments, held against plain tasks by hand."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal

import pytest
import torch

from fedgraft.actors.hosting import Finished, LostResult, PoolOptions
from fedgraft.actors.local import LocalPool
from fedgraft.aggregation.fedavg import FedAvg, PartsConfig
from fedgraft.data.batches import eval_batches
from fedgraft.data.prepared import PreparedData
from fedgraft.errors import GroupViolation, MethodError
from fedgraft.moe.base import open_base
from fedgraft.moe.families import moe_layers
from fedgraft.moe.surgery import mask_experts
from fedgraft.platform.rounds import RoundLoop
from fedgraft.platform.tracking import Tracker
from fedgraft.protocols import Weights
from fedgraft.registry import METHODS
from fedgraft.training.evaluate import score_batches
from fedgraft.types import Broadcast, ClientFailure, ClientUpdate, EvaluationTask, Params, ServerState

Maker = Callable[..., Any]
Use = Callable[..., type]
PROBE = {"name": "probe", "lora": [], "full": ["experts"]}
NUM_POOL = 6
STEM = "model.layers.{layer}.mlp.experts.{side}"
SIDES = ("gate_up_proj", "down_proj")


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


def slot(layer: int, expert: int, side: str) -> str:
    return f"{STEM.format(layer=layer, side=side)}[{expert}]"


def pooled(layer: int, number: int, side: str) -> str:
    return f"pool.{layer}.{number}.{side}"


def pool_of(params: Params) -> Params:
    """Six experts a layer under names of the server's own: the four of the base, and two changed copies."""
    found: Params = {}
    for layer in (0, 1):
        for number in range(NUM_POOL):
            for side in SIDES:
                value = params[slot(layer, number % 4, side)]
                found[pooled(layer, number, side)] = value.clone() if number < 4 else value.flip(-1)
    return found


def addresses_of(client: int) -> dict[str, str]:
    """Slot e of a client holds pool expert client + e: clients 0 to 2 share some, and nobody holds number 5 but client 2."""
    return {
        slot(layer, expert, side): pooled(layer, (client + expert) % NUM_POOL, side)
        for layer in (0, 1)
        for expert in range(4)
        for side in SIDES
    }


class Pool(Probe):
    """Clients hold different experts of a pool that is larger than a model."""

    def init(self, params: Params, num_clients: int) -> ServerState:
        return ServerState(params=pool_of(params))

    def task(self, state: ServerState, task: Any) -> Any:
        addresses = addresses_of(task.client_id)
        return replace(task, keys=tuple(addresses), addresses=addresses)

    def evaluation(self, state: ServerState, task: Any) -> Any:
        addresses = addresses_of(task.client_id or 0)
        return replace(task, keys=tuple(addresses), addresses=addresses)


def weighted_mean(ran: Any, name: str, names_of: Callable[[Any, ClientUpdate], dict[str, str]]) -> torch.Tensor | None:
    """The mean delta of one of the server's tensors by its definition; ``None`` where nobody sent it."""
    total, weight = torch.zeros(()), 0
    for task, update, tensors in ran.pool.replies:
        for key, value in tensors.items():
            if names_of(task, update).get(key, key) == name:
                total, weight = total + update.num_examples * value.double(), weight + update.num_examples
    return total / weight if weight else None


def masks_of(layer: Any) -> list[Any]:
    return list(layer.router.fedgraft_masks)


def check_sums(ran: Any, start: Params, names_of: Callable[[Any, ClientUpdate], dict[str, str]]) -> int:
    """Hold every tensor of the server's new state against its sum by hand; give how many nobody had sent."""
    num_kept = 0
    for name, value in ran.state.params.items():
        mean = weighted_mean(ran, name, names_of)
        if mean is None:
            num_kept += 1
            assert torch.equal(value, start[name]), name
        else:
            torch.testing.assert_close(value.double(), start[name].double() + mean, rtol=1e-6, atol=1e-8)
            assert not torch.equal(value, start[name]), name
    return num_kept


# ---- addresses


def test_a_slot_under_an_address_trains_as_if_its_tensor_had_its_own_name(
    make_bench: Maker, use: Use, assert_same_bits: Maker
) -> None:
    use()
    bench = make_bench(PROBE)
    pool = pool_of(bench.worker.initial_params())
    addresses = addresses_of(2)
    renamed = {key: pool[name] for key, name in addresses.items()}
    plain, expected = bench.train(0, 1, renamed)
    found, tensors = bench.train(0, 1, pool, keys=tuple(addresses), addresses=addresses)
    assert_same_bits(tensors, expected)
    assert found.payload == plain.payload
    unmoved, _ = bench.train(0, 1, bench.worker.initial_params())
    assert unmoved.metrics != plain.metrics, "the pool's experts are not the base's"


def test_sums_and_bytes_of_a_pool_are_by_the_servers_names(make_job: Maker, run_job: Maker, use: Use) -> None:
    use(Pool)
    ran = run_job(replace(make_job(PROBE), rounds=1))
    start = pool_of(ran.pool.worker.initial_params())
    assert check_sums(ran, start, lambda task, update: addresses_of(task.client_id)) == 0
    lonely = pooled(0, 5, "down_proj")  # client 2 alone holds it, in its slot 3
    (only,) = [tensors for task, _, tensors in ran.pool.replies if task.client_id == 2]
    torch.testing.assert_close(ran.state.params[lonely] - start[lonely], only[slot(0, 3, "down_proj")], rtol=1e-5, atol=1e-7)
    size = 4 * 2 * 4 * (3 * 32 * 24)  # bytes a value, layers, slots, values of an expert
    by_direction = Counter({(row["client_id"], row["direction"]): row["bytes"] for row in ran.rows("ledger")})
    assert by_direction == {(client, direction): size for client in range(3) for direction in ("up", "down")}
    assert {row["group"] for row in ran.rows("ledger")} == {"assigned"}


def test_a_pool_expert_that_nobody_holds_stays(make_job: Maker, run_job: Maker, use: Use) -> None:
    use(Pool)
    job = make_job(PROBE, federation={"cohort_size": 1})
    ran = run_job(replace(job, rounds=1))
    start = pool_of(ran.pool.worker.initial_params())
    held = len(addresses_of(0))
    assert check_sums(ran, start, lambda task, update: addresses_of(task.client_id)) == len(start) - held


def test_a_model_is_judged_with_its_addresses(make_bench: Maker, use: Use) -> None:
    use()
    bench = make_bench(PROBE)
    pool = pool_of(bench.worker.initial_params())
    addresses = addresses_of(2)
    renamed = {key: pool[name] for key, name in addresses.items()}

    def judge(params: Params, **fields: Any) -> Any:
        task = EvaluationTask(round_idx=1, view="global", tasks=("client",), keys=tuple(addresses), client_id=1, **fields)
        return bench.worker.evaluate(task, Broadcast(round_idx=1, params=params))[0].rows

    assert judge(pool, addresses=addresses) == judge(renamed)
    assert judge(renamed) != judge(bench.worker.initial_params())


# ---- requests

WANTED = {slot(0, 3, side): pooled(0, 4, side) for side in SIDES}


class Asking(Pool):
    """Clients are sent three slots a layer, and client 1 asks for a fourth and for another second."""

    def task(self, state: ServerState, task: Any) -> Any:
        addresses = {key: name for key, name in addresses_of(0).items() if not key.endswith("[3]")}
        return replace(task, keys=tuple(addresses), addresses=addresses)

    def request(self, session: Any) -> dict[str, str]:
        if session.task.client_id != 1:
            return {}
        assert slot(0, 0, "down_proj") in session.received
        again = {slot(1, 1, side): pooled(1, 5, side) for side in SIDES}
        return WANTED | again


def test_what_a_client_asks_for_is_as_if_it_had_been_sent(make_bench: Maker, use: Use, assert_same_bits: Maker) -> None:
    use(Asking)
    bench = make_bench(PROBE)
    pool = pool_of(bench.worker.initial_params())
    sent = {key: name for key, name in addresses_of(0).items() if not key.endswith("[3]")}
    asked, found = bench.train(1, 1, pool, keys=tuple(sent), addresses=sent)
    whole = sent | {slot(1, 1, side): pooled(1, 5, side) for side in SIDES} | WANTED
    use()
    bench = make_bench(PROBE)
    plain, expected = bench.train(1, 1, pool, keys=tuple(whole), addresses=whole)
    assert_same_bits(found, expected)
    assert sorted(asked.payload, key=str) == sorted(plain.payload, key=str)
    assert dict(asked.requested) == WANTED | {slot(1, 1, side): pooled(1, 5, side) for side in SIDES}
    assert plain.requested == {}


def test_what_is_asked_for_is_summed_and_charged(make_job: Maker, run_job: Maker, use: Use) -> None:
    use(Asking)
    ran = run_job(replace(make_job(PROBE), rounds=1))
    start = pool_of(ran.pool.worker.initial_params())
    # Nobody got 1 | 3 and 1 | 4, nor 0 | 3 and 0 | 5; pool expert 4 of layer 0 and 5 of layer 1 are client 1's alone.
    kept = check_sums(ran, start, lambda task, update: {**task.addresses, **update.requested})
    assert kept == len(SIDES) * 4
    expert = 4 * 3 * 32 * 24
    down = {row["client_id"]: row["bytes"] for row in ran.rows("ledger") if row["direction"] == "down"}
    assert down == {0: 6 * expert, 1: (6 + 2) * expert, 2: 6 * expert}
    up = {row["client_id"]: row["bytes"] for row in ran.rows("ledger") if row["direction"] == "up"}
    assert up == {0: 6 * expert, 1: 7 * expert, 2: 6 * expert}


@pytest.mark.parametrize(
    ("wanted", "error"),
    [
        ({slot(0, 3, "down_proj"): "pool.0.9.down_proj"}, "asked for pool.0.9.down_proj, which the server does not have"),
        (
            {slot(0, 3, "down_proj"): pooled(0, 4, "down_proj"), slot(1, 3, "down_proj"): pooled(0, 4, "down_proj")},
            "asked for pool.0.4.down_proj in two slots",
        ),
        ({slot(0, 3, "down_proj"): pooled(0, 1, "down_proj")}, "asked for pool.0.1.down_proj in two slots"),
        ({"nowhere": pooled(0, 4, "down_proj")}, "no slot is called 'nowhere'"),
        ({slot(0, 3, "down_proj"): pooled(0, 4, "gate_up_proj")}, "expected shape"),
    ],
)
def test_a_request_that_makes_no_sense_is_the_clients_failure(
    wanted: dict[str, str], error: str, make_bench: Maker, use: Use
) -> None:
    use(Asking, request=lambda self, session: wanted)
    bench = make_bench(PROBE)
    pool = pool_of(bench.worker.initial_params())
    sent = {key: name for key, name in addresses_of(0).items() if not key.endswith("[3]")}
    task = bench.task(1, 1, pool, keys=tuple(sent), addresses=sent)
    outcome, tensors = bench.worker.update(task, Broadcast(round_idx=1, params=pool))
    assert isinstance(outcome, ClientFailure)
    assert (outcome.stage, tensors) == ("setup", {})
    assert error in outcome.error


def test_a_model_is_judged_with_what_its_client_asks_for(make_bench: Maker, use: Use) -> None:
    use(Asking)
    bench = make_bench(PROBE)
    pool = pool_of(bench.worker.initial_params())
    sent = {key: name for key, name in addresses_of(0).items() if not key.endswith("[3]")}

    def judge(addresses: dict[str, str], client: int) -> Any:
        task = EvaluationTask(
            round_idx=1, view="global", tasks=("retention",), keys=tuple(addresses), addresses=addresses, client_id=client
        )
        return [row.value for row in bench.worker.evaluate(task, Broadcast(round_idx=1, params=pool))[0].rows]

    asked = judge(sent, 1)
    assert asked != judge(sent, 0)
    use()
    bench.worker.method = METHODS.parse(PROBE)
    assert asked == judge(sent | WANTED | {slot(1, 1, side): pooled(1, 5, side) for side in SIDES}, 1)


class LosingPool(LocalPool):
    """Loses the result of client 1 once."""

    lost = False

    def fetch(self, handle: Any) -> Any:
        if slot(0, 3, "down_proj") in handle and not self.lost:
            self.lost = True
            raise LostResult
        return handle


def test_a_second_try_charges_what_was_asked_for_again(make_job: Maker, use: Use) -> None:
    use(Asking)
    job = replace(make_job(PROBE), rounds=1)
    pool = LosingPool(PoolOptions(replicas=1))
    RoundLoop(job, pool, tracker=Tracker(None, "", None), emit=lambda event: None, is_stopping=lambda: False).run()
    assert pool.lost
    text = (job.folder / "ledger.jsonl").read_text()
    rows = [row for row in map(json.loads, text.splitlines()) if row["is_retry"]]
    assert [(row["client_id"], row["direction"], row["bytes"]) for row in rows] == [(1, "down", 8 * 4 * 3 * 32 * 24)]


class Renaming(LocalPool):
    """Claims that client 1 had asked for something that the server does not have."""

    def map(self, name: str, items: Sequence[Any], shared: Any, **how: Any) -> Iterator[Finished]:
        for finished in super().map(name, items, shared):
            if name == "update" and items[finished.index].client_id == 1:
                finished = replace(finished, value=replace(finished.value, requested={slot(0, 3, "down_proj"): "stray"}))
            yield finished


def test_a_reply_that_claims_an_unknown_request_is_a_failure(make_job: Maker, use: Use) -> None:
    use(Pool)
    events: list[Any] = []
    job = replace(make_job(PROBE, federation={"max_failures": 1}), rounds=1)
    pool = Renaming(PoolOptions(replicas=1))
    RoundLoop(job, pool, tracker=Tracker(None, "", None), emit=events.append, is_stopping=lambda: False).run()
    (failure,) = [event.data for event in events if event.kind == "failure"]
    assert (failure["client_id"], failure["stage"]) == (1, "reply")
    assert "not sent to this client: stray" in failure["error"]


# ---- uploads


def test_only_what_uploads_chooses_is_sent_charged_and_averaged(make_job: Maker, run_job: Maker, use: Use) -> None:
    def uploads(self: Any, session: Any, keys: Sequence[str]) -> Sequence[str]:
        assert sorted(keys) == sorted(session.received)
        # After training: the client knows what it moved.
        moved = {key: float((session.engine.read([key])[key] - session.received[key]).abs().sum()) for key in keys}
        best = max(moved, key=moved.__getitem__)
        return [best] if session.task.client_id else []

    use(uploads=uploads)
    ran = run_job(replace(make_job(PROBE), rounds=1))
    start = ran.pool.worker.initial_params()
    sent = {task.client_id: tuple(tensors) for task, _, tensors in ran.pool.replies}
    assert [len(sent[client]) for client in range(3)] == [0, 1, 1]
    assert check_sums(ran, start, lambda task, update: {}) == len(start) - len({*sent[1], *sent[2]})
    up = {row["client_id"]: row["bytes"] for row in ran.rows("ledger") if row["direction"] == "up"}
    assert up == {client: 4 * start[sent[client][0]].numel() for client in (1, 2)}
    for task, update, tensors in ran.pool.replies:
        assert tuple(info.key for info in update.payload) == tuple(tensors) == sent[task.client_id]


@pytest.mark.parametrize(
    ("chosen", "error"),
    [
        (lambda keys: ["lm_head.weight"], "probe sends lm_head.weight, which this client did not get to train"),
        (lambda keys: [*keys, keys[0]], "probe sends a tensor twice"),
    ],
)
def test_uploads_of_anything_else_end_the_run(
    chosen: Callable[[Sequence[str]], Sequence[str]], error: str, make_bench: Maker, use: Use
) -> None:
    use(uploads=lambda self, session, keys: chosen(keys))
    bench = make_bench(PROBE)
    with pytest.raises(GroupViolation, match=error):
        bench.train(0, 1, bench.worker.initial_params())


def test_a_key_that_this_client_was_not_sent_cannot_be_uploaded(make_bench: Maker, use: Use) -> None:
    use(uploads=lambda self, session, keys: [slot(1, 1, "down_proj")])
    bench = make_bench(PROBE)
    params = bench.worker.initial_params()
    with pytest.raises(GroupViolation, match="did not get to train"):
        bench.train(0, 1, params, keys=tuple(key for key in params if not key.endswith("[1]")))


# ---- weights and spread


class Clustered(Probe):
    """Each client's delta counts for two clusters, with weights of its own in each; the server keeps both sums."""

    shares = {"a": (1.0, 3.0, 0.0), "b": (0.0, 0.0, 2.0)}

    def init(self, params: Params, num_clients: int) -> ServerState:
        return ServerState(params=params, memory={f"{c}:{key}": torch.zeros_like(v) for key, v in params.items() for c in "ab"})

    def weigh(self, state: ServerState, updates: Sequence[ClientUpdate]) -> Weights:
        return Weights(
            default=(1.0,) * len(updates),
            by_key={f"{c}:{key}": share for key in state.params for c, share in self.shares.items()},
            spread={key: (f"a:{key}", f"b:{key}") for key in state.params},
        )

    def aggregate(self, state: ServerState, reduced: Any, updates: Any) -> ServerState:
        assert not set(reduced.delta) & set(state.params), "summed under the other names only"
        assert set(reduced.num_contributors.values()) == {1, 2}
        return replace(state, memory=dict(reduced.delta))


def test_a_tensor_that_is_spread_is_summed_under_each_name_with_its_own_weights(
    make_job: Maker, run_job: Maker, use: Use
) -> None:
    use(Clustered)
    ran = run_job(replace(make_job(PROBE), rounds=1))
    by_client = {task.client_id: tensors for task, _, tensors in ran.pool.replies}
    for key in ran.state.params:
        first = (by_client[0][key].double() + 3 * by_client[1][key].double()) / 4
        torch.testing.assert_close(ran.state.memory[f"a:{key}"], first, rtol=1e-12, atol=0)
        torch.testing.assert_close(ran.state.memory[f"b:{key}"], by_client[2][key].double(), rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("weights", "error"),
    [
        (Weights(default=(1.0, 1.0)), "2 weights for default, and 3 clients answered"),
        (Weights(default=(1.0,) * 3, by_key={"k": (1.0,) * 4}), "4 weights for k, and 3 clients answered"),
        (
            Weights(default=(1.0,) * 3, spread={slot(0, 0, "down_proj"): ("x",), slot(0, 1, "down_proj"): ("x",)}),
            "two tensors of client 0 would be summed as x",
        ),
    ],
)
def test_weights_that_do_not_fit_the_updates_are_refused(
    weights: Weights, error: str, make_job: Maker, run_job: Maker, use: Use
) -> None:
    use(weigh=lambda self, state, updates: weights)
    with pytest.raises(MethodError, match=error):
        run_job(replace(make_job(PROBE), rounds=1))


# ---- assignments

HELD: dict[int, dict[int, tuple[int, ...]]] = {0: {0: (0, 1)}, 1: {0: (1, 3), 1: (0, 2, 3)}}


def test_an_assignment_decides_what_is_sent_routed_to_and_averaged(make_job: Maker, run_job: Maker, use: Use) -> None:
    use(assign=lambda self, state, plan, cohort: HELD)
    ran = run_job(replace(make_job(PROBE), rounds=1))
    start = ran.pool.worker.initial_params()
    for task, update, tensors in ran.pool.replies:
        held = HELD.get(task.client_id, {})
        expected = {slot(layer, expert, side) for layer in (0, 1) for expert in held.get(layer, range(4)) for side in SIDES}
        assert set(task.keys) == set(tensors) == expected
        assert update.assignment == task.assignment == HELD.get(task.client_id)
        for layer, tokens in enumerate(update.expert_tokens.tolist()):
            is_used = [count > 0 for count in tokens]
            assert is_used == [expert in held.get(layer, range(4)) for expert in range(4)]
    assert check_sums(ran, start, lambda task, update: {}) == 0
    assert all(not found for layer in moe_layers(ran.pool.worker.engine.model) for found in masks_of(layer))


def test_a_model_is_judged_under_its_assignment(make_bench: Maker, make_base: Maker, data_folder: Any, use: Use) -> None:
    use()
    bench = make_bench(PROBE)
    params = bench.worker.initial_params()
    task = EvaluationTask(
        round_idx=1, view="global", tasks=("client",), keys=tuple(params), client_id=1, assignment={0: (0, 1), 1: (1, 2, 3)}
    )
    rows = bench.worker.evaluate(task, Broadcast(round_idx=1, params=params))[0].rows
    model: Any = open_base(make_base())
    batches = list(eval_batches(PreparedData.open(data_folder).split(1, "test"), 32, 0))
    with mask_experts(model, {0: (2, 3), 1: (0,)}):
        expected = score_batches(model, batches)
    assert {row.metric: row.value for row in rows} == {metric: expected[metric] for metric in ("nll", "token_accuracy")}
    assert score_batches(model, batches) != expected
    assert score_batches(bench.worker.engine.model, batches)["nll"].mean == score_batches(model, batches)["nll"].mean
