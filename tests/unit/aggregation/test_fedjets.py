"""FedJETs: who downloads and trains which expert, what gate and anchors learn, and how a client is judged."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from fedgraft.aggregation.fedjets import FedJETs, FedJETsConfig, pool_name, top_experts
from fedgraft.data.batches import eval_batches
from fedgraft.errors import MethodError
from fedgraft.moe.mixture import active_slots, example_weights
from fedgraft.training.step import response_loss
from fedgraft.types import IGNORE_INDEX, ClientTask, Federation, ParamRef, Params, RoundPlan, ServerState

Maker = Callable[..., Any]
RANK, HIDDEN, EXPERTS, TOP_K = 2, 6, 4, 2
GATE_VALUES = 33 * HIDDEN + (HIDDEN + 1) * EXPERTS
EXPERT_VALUES = 2 * RANK * (2 * (32 + 32) + 2 * (32 + 16))  # two layers; q and o, k and v
OPTIONS: dict[str, Any] = {
    "name": "fedjets",
    "adapter": {"rank": RANK, "alpha": 4.0},
    "num_experts": EXPERTS,
    "top_k": TOP_K,
    "gate_hidden": HIDDEN,
    "expert_noise": 0.1,
}


@pytest.fixture(scope="module")
def runs() -> dict[str, Any]:
    return {}


@pytest.fixture
def run(runs: dict[str, Any], make_job: Maker, run_job: Maker) -> Maker:
    """A run with some options, run once for the same ones."""

    def make(rounds: int = 1, **options: Any) -> Any:
        key = json.dumps([rounds, options], sort_keys=True)
        if key not in runs:
            runs[key] = run_job(replace(make_job(OPTIONS | options), rounds=rounds))
        return runs[key]

    return make


def start_of(ran: Any) -> Params:
    """The server's tensors before round 1, made anew."""
    method = FedJETs(ran.pool.worker.method.config)
    method.federation = replace(federation(({},) * 3), run_seed=ran.job.worker.run_seed)
    return method.init(ran.pool.worker.initial_params(), 3).params


def held(task: ClientTask, update: Any) -> set[int]:
    return {int(name.split("/")[1]) for name in {*task.addresses.values(), *update.requested.values()}}


def federation(labels: tuple[dict[str, int], ...], rounds: int = 4) -> Federation:
    return Federation(
        facts=None,  # type: ignore[arg-type]
        refs=(),
        groups={},
        run_seed=3,
        rounds=rounds,
        num_examples=(4,) * len(labels),
        labels=labels,
    )


def test_experts_with_most_weight_over_all_examples_are_chosen() -> None:
    # One example is sure of expert 2; two lean to 0 and 1: sums of probabilities decide, not votes or raw scores.
    share = torch.tensor([[0.05, 0.05, 0.85, 0.05], [0.50, 0.30, 0.10, 0.10], [0.40, 0.45, 0.05, 0.10]])
    assert top_experts(share.log() + torch.tensor([[5.0], [-3.0], [0.0]]), 2) == (0, 2)
    assert top_experts(share.log(), 3) == (0, 1, 2)
    assert top_experts(torch.zeros(2, 4), 2) == (0, 1)


def test_a_client_downloads_k_experts_and_an_anchor_one(run: Maker) -> None:
    ran = run()
    found: Counter[tuple[int, str]] = Counter()
    for row in ran.rows("ledger"):
        found[row["client_id"], row["direction"]] += row["bytes"]
    anchors = 0
    for task, update, _ in ran.pool.replies:
        count = 1 if task.addresses else TOP_K
        anchors += count == 1
        assert len(held(task, update)) == count
        assert set(held(task, update)) <= set(range(EXPERTS))
        for direction in ("up", "down"):
            assert found[task.client_id, direction] == 4 * (GATE_VALUES + count * EXPERT_VALUES)
    assert anchors == 1  # of three clients


def test_gate_and_experts_are_plain_means_over_those_who_trained_them(run: Maker) -> None:
    ran = run()
    start, delta = start_of(ran), dict[str, list[torch.Tensor]]()
    for task, update, tensors in ran.pool.replies:
        for key, value in tensors.items():
            delta.setdefault(update.requested.get(key) or task.addresses.get(key, key), []).append(value.double())
    untrained = {name for name in start if name not in delta}
    assert untrained
    for name, value in start.items():
        if name in untrained:
            assert name.startswith("pool/")
            assert torch.equal(ran.state.params[name], value)  # nobody asked for it: byte for byte as it was
        else:
            mean = torch.stack(delta[name]).mean(dim=0)
            assert mean.any() or name.endswith("bias")
            torch.testing.assert_close(ran.state.params[name], (value.double() + mean).float(), rtol=0, atol=1e-7)
            assert name.startswith("pool/") or len(delta[name]) == 3
    starts = [start[pool_name(expert, "model.layers.0.self_attn.q_proj.mixture.lora_A[0]")] for expert in range(EXPERTS)]
    assert all(not torch.equal(one, other) for one, other in itertools.combinations(starts, 2))


@pytest.mark.slow
def test_with_all_experts_and_no_anchors_everybody_trains_everything(run: Maker) -> None:
    ran = run(top_k=EXPERTS, anchor_source="none", mix="logits")
    assert all(held(task, update) == set(range(EXPERTS)) for task, update, _ in ran.pool.replies)
    assert not any(task.addresses for task, _, _ in ran.pool.replies)
    assert all(not torch.equal(ran.state.params[name], value) for name, value in start_of(ran).items() if name.endswith("lora_B"))


def test_an_anchors_gate_learns_the_same_whatever_its_expert_does(make_bench: Maker) -> None:
    gradients: list[Params] = []
    for scale in (1.0, 3.0):
        bench = make_bench(OPTIONS, num_steps=1)
        worker = bench.worker
        worker.method.after_backward = lambda session, step: gradients.append(
            session.engine.read_gradients([ref.key for ref in session.engine.refs if ref.expert != 1])
        )
        params = {key: value * scale if "mixture" in key else value for key, value in worker.initial_params().items()}
        named = {(pool_name(2, key) if "mixture" in key else key): value for key, value in params.items() if "[1]" not in key}
        keys = [key for key in params if "[1]" not in key]
        addresses = {key: pool_name(2, key) for key in keys if "mixture" in key}
        update, _ = bench.train(0, 1, named, keys=tuple(keys), addresses=addresses)
        assert update.diagnostics["fedjets_experts"] == {"experts": [2], "is_anchor": True}
    one, other = gradients
    gate = [key for key in one if "example_gate" in key]
    assert gate
    for key in gate:
        assert torch.equal(one[key], other[key])
        assert one[key].any()
    assert any(not torch.equal(one[key], other[key]) for key in one if key not in gate)
    # Its gradient is that of naming expert 2: softmax minus the target, so it pulls at output 2 alone.
    bias = one["model.example_gate.layers.1.bias"]
    assert bias[2] < 0
    assert bool((bias[[0, 1, 3]] > 0).all())
    torch.testing.assert_close(bias.sum(), torch.tensor(0.0), atol=1e-6, rtol=0)


@pytest.mark.parametrize("judge", ["best", pytest.param("average", marks=pytest.mark.slow)])
def test_a_client_is_judged_by_one_expert_an_example(judge: str, run: Maker) -> None:
    ran = run(judge=judge, anchor_source="none")
    engine, params = ran.pool.worker.engine, ran.state.params
    slots = {ref.key: ref.expert for ref in engine.refs if ref.part == "mixture"}
    weights, biases = ([params[f"model.example_gate.layers.{i}.{name}"] for i in (0, 1)] for name in ("weight", "bias"))
    engine.load({key: value for key, value in params.items() if "example_gate" in key})
    chosen = set()
    for client, (measured, experts) in measured_by_client(ran).items():
        engine.load({key: params[pool_name(experts[slot], key)] for key, slot in slots.items()})
        total = count = 0.0
        with torch.no_grad(), active_slots(engine.model, TOP_K):
            for batch in eval_batches(ran.pool.worker.data.split(client, "test"), 1, 0):
                prompt = batch.input_ids[:, : int((batch.labels != IGNORE_INDEX).int().argmax())]
                hidden = engine.model.model(input_ids=prompt).last_hidden_state[0].mean(dim=0)
                scores = weights[1] @ torch.relu(weights[0] @ hidden + biases[0]) + biases[1]
                best = int(scores[experts].argmax())
                chosen.add(best)
                share = torch.eye(TOP_K)[best][None] if judge == "best" else torch.full((1, TOP_K), 1 / TOP_K)
                with example_weights(engine.model, share):
                    loss, output = response_loss(engine.model, batch)
                total, count = total + float(loss) * len(output.labels), count + len(output.labels)
        assert measured == pytest.approx(total / count, rel=1e-5)
    assert chosen == set(range(TOP_K))


def measured_by_client(ran: Any) -> dict[int, tuple[float, list[int]]]:
    """Each client's NLL as the run measured it, and the experts that it held then."""
    held = {row["client_id"]: row["values"]["experts"] for row in ran.rows("diagnostics") if row["kind"] == "fedjets_gate"}
    return {
        row["client_id"]: (row["total"] / row["weight"], held[row["client_id"]])
        for row in ran.rows("evaluations")
        if (row["view"], row["task"], row["metric"]) == ("personal", "client", "nll")
    }


def test_the_global_view_is_the_common_expert(run: Maker, make_job: Maker, run_job: Maker) -> None:
    job = make_job({"name": "base"})
    base = run_job(job)
    expected = {
        row["client_id"]: row["total"] for row in base.rows("evaluations") if row["metric"] == "nll" and row["task"] == "client"
    }
    rows = [row for row in run().rows("evaluations") if (row["view"], row["task"], row["metric"]) == ("global", "client", "nll")]
    assert {row["client_id"]: row["total"] for row in rows} == expected
    personal = [
        row for row in run().rows("evaluations") if (row["view"], row["task"], row["metric"]) == ("personal", "client", "nll")
    ]
    assert all(row["total"] != expected[row["client_id"]] for row in personal)


def test_a_random_gate_is_neither_trained_nor_sent(run: Maker) -> None:
    ran = run(gate="random")
    assert not any("example_gate" in key for key in ran.state.params)
    assert {row["group"] for row in ran.rows("ledger")} == {"assigned"}
    for task, update, _ in ran.pool.replies:
        assert sum(info.num_bytes for info in update.payload) == 4 * len(held(task, update)) * EXPERT_VALUES


def test_clustered_anchors_come_from_mean_embeddings_of_a_first_round(run: Maker) -> None:
    ran = run(rounds=2, anchor_source="clustered")
    rounds: dict[int, list[Any]] = {}
    for task, update, _ in ran.pool.replies:
        rounds.setdefault(task.round_idx, []).append((task, update))
    assert all(set(update.statistics) == {"embedding"} and not task.addresses for task, update in rounds[1])
    assert {tuple(update.statistics["embedding"].shape) for _, update in rounds[1]} == {(32,)}
    means = torch.stack([update.statistics["embedding"] for _, update in rounds[1]]).double()
    nearest = (means - means.mean(dim=0)).norm(dim=1).argmin()  # one cluster: its middle
    assert ran.state.notes["anchors"] == [int(nearest)]
    anchored = {task.client_id: held(task, update) for task, update in rounds[2] if task.addresses}
    assert anchored == {int(nearest): {0}}
    assert not any(update.statistics for _, update in rounds[2])
    statistics = sum(row["bytes"] for row in ran.rows("ledger") if row["group"] == "statistics")
    assert statistics == 3 * 32 * 4


@pytest.mark.slow
def test_experts_first_then_the_gate_alone(run: Maker) -> None:
    ran = run(rounds=2, schedule="experts_first")
    for task, _, tensors in ran.pool.replies:
        is_gate = {"example_gate" in key for key in tensors}
        assert is_gate == {task.round_idx == 2}
    assert [task.plan.phase for task, _, _ in ran.pool.replies] == ["experts"] * 3 + ["gate"] * 3


def test_a_cohort_has_anchors_and_others_in_a_fixed_number() -> None:
    labels = tuple({"abcdefgh"[client % 8]: 5, "abcdefgh"[(client + client // 8) % 8]: 2} for client in range(20))
    seen: Counter[int] = Counter()
    for wanted, expected in ((None, 3), (1, 1), (0, 0), (9, 4)):
        method = FedJETs(FedJETsConfig(num_experts=4, anchors_per_round=wanted))
        method.federation = federation(labels)
        anchors = set(method._anchors(ServerState(params={})))
        assert len(anchors) == 4
        for round_idx in range(1, 8):
            plan = RoundPlan(round_idx=round_idx, num_steps=1, learning_rate=0.1)
            cohort = method.select(ServerState(params={}), plan, (0, 1, 2, 3, 4, 5))
            assert len(cohort) == len(set(cohort)) == 6
            assert len(anchors & set(cohort)) == expected
            assert list(cohort) == sorted(cohort)
            seen.update(cohort)
    assert len(seen) > 12  # the draw changes from round to round


def test_with_everybody_in_a_round_the_wanted_number_of_anchors_acts() -> None:
    labels = tuple({"abcd"[client % 4]: 5} for client in range(8))
    for wanted, expected in ((None, 4), (3, 3), (1, 1), (0, 0)):
        method = FedJETs(FedJETsConfig(num_experts=4, anchors_per_round=wanted))
        method.federation = replace(federation(labels), refs=(SLOT,))
        state = method.init({SLOT.key: torch.zeros(1, 2, 3)}, 8)
        acting = Counter[int]()
        for round_idx in range(1, 20):
            plan = RoundPlan(round_idx=round_idx, num_steps=1, learning_rate=0.1)
            cohort = method.select(state, plan, tuple(range(8)))
            assert cohort == tuple(range(8))
            experts = [expert_of(method.task(state, ClientTask(client_id=client, plan=plan, keys=()))) for client in cohort]
            found = {client: expert for client, expert in enumerate(experts) if expert is not None}
            assert len(found) == expected
            assert all(state.notes["anchors"][expert] == client for client, expert in found.items())  # type: ignore[index]
            acting.update(found)
        assert len(acting) == (4 if expected else 0)  # they take turns


SLOT = ParamRef(key="q_proj.mixture.lora_A[0]", name="lora_A", part="mixture", shape=(1, 2, 3), expert=0)


def expert_of(task: ClientTask) -> int | None:
    """The expert that a task ties its client to."""
    experts = {int(name.split("/")[1]) for name in task.addresses.values()}
    return experts.pop() if experts else None


def test_odd_cohorts_have_half_an_anchor_more_and_less_in_turns() -> None:
    labels = tuple({"abcdefgh"[client % 8]: 5} for client in range(20))
    method = FedJETs(FedJETsConfig(num_experts=8))
    method.federation = federation(labels)
    state = method.init({}, 20)
    anchors = set(state.notes["anchors"])  # type: ignore[call-overload]
    assert len(anchors) == 8
    for size in (1, 3, 4, 5):
        counts = []
        for round_idx in range(1, 9):
            plan = RoundPlan(round_idx=round_idx, num_steps=1, learning_rate=0.1)
            counts.append(len(anchors & set(method.select(state, plan, tuple(range(size))))))
        assert sum(counts) == 8 * size / 2
        assert max(counts) - min(counts) == size % 2


def test_anchors_by_labels_are_found_once(monkeypatch: pytest.MonkeyPatch) -> None:
    method = FedJETs(FedJETsConfig(num_experts=2))
    method.federation = federation(({"a": 4}, {"b": 4}, {"a": 2, "b": 2}, {"b": 1}))
    state = method.init({}, 4)
    assert json.loads(json.dumps(state.notes)) == {"anchors": [0, 1]}
    monkeypatch.setattr("fedgraft.aggregation.fedjets.label_anchors", lambda *_: pytest.fail("looked again"))
    plan = RoundPlan(round_idx=1, num_steps=1, learning_rate=0.1)
    assert set(method.select(state, plan, (2, 3))) & {0, 1}


def test_anchors_by_labels_need_labels() -> None:
    method = FedJETs(FedJETsConfig())
    method.federation = federation(({"all": 4},) * 6)
    with pytest.raises(MethodError, match="by labels"):
        method.init({}, 6)
    plan = RoundPlan(round_idx=1, num_steps=1, learning_rate=0.1)
    with pytest.raises(MethodError, match="by labels") as caught:
        method.select(ServerState(params={}), plan, (0, 1))
    assert "clustered" in caught.value.hint


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 6}, "top_k is 6, and there are 5 experts"),
        ({"gate": "random", "schedule": "experts_first"}, "schedule has no effect"),
        ({"gate": "random", "gate_lr_scale": 2.0}, "gate_lr_scale has no effect"),
        ({"top_k": 1, "mix": "logits"}, "mix has no effect"),
        ({"top_k": 1, "judge": "average"}, "judge has no effect"),
        ({"anchor_source": "none", "anchors_per_round": 2}, "anchors_per_round has no effect"),
    ],
)
def test_options_without_effect_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        FedJETsConfig.model_validate(options)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"mix": "logits"},
        {"judge": "average"},
        {"embedding": "tokens"},
        {"gate_lr_scale": 5.0},
        {"gate_hidden": 9},
        {"expert_noise": 0.3},
        {"scoring_examples": 1, "gate_lr_scale": 30.0},
        {"targets": ["q_proj"]},
        {"adapter": {"rank": RANK, "alpha": 4.0, "dropout": 0.5}},
    ],
    ids=str,
)
def test_each_switch_changes_the_outcome(options: dict[str, Any], run: Maker) -> None:
    plain, other = run(rounds=2), run(rounds=2, **options)
    assert [row["total"] for row in plain.rows("evaluations")] != [row["total"] for row in other.rows("evaluations")]
