"""FedMoE on tiny models: its options, modular aggregation, the warm-up, what is measured, the loss, a resume."""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch.nn import functional as F

from fedgraft.aggregation.fedmoe import FedMoEConfig
from fedgraft.aggregation.submodel import held_by_layer, reach
from fedgraft.errors import RunInterrupted
from fedgraft.moe.surgery import mask_experts
from fedgraft.moe.trace import RouterWatch, visit_blocks
from fedgraft.types import (
    Broadcast,
    Budget,
    ClientTask,
    EvaluationTask,
    RoundPlan,
    assigned,
)

Maker = Callable[..., Any]
SMALL = {"rank": 2, "alpha": 4.0}
RANDOM = {"name": "fedmoe", "adapter": SMALL, "warmup_rounds": 0, "recommend": False, "coverage": 0.5}


# ---- options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora": ["router"], "full": []}, "put router into full"),
        ({"warmup_rounds": 0, "warmup": "average"}, "warmup has no effect with warmup_rounds: 0"),
        ({"warmup_rounds": 0, "warmup_cohort": "all", "same_task": "all"}, "same_task, warmup_cohort has no effect"),
        ({"warmup_rounds": 0, "experts": "best"}, "nothing was measured"),
        ({"recommend": False, "patience": 3, "neighbours": 2}, "neighbours, patience has no effect with recommend: false"),
        ({"warmup_rounds": 0, "recommend": False, "validation_examples": 3}, "validation_examples has no effect"),
        ({"memory_fraction": 0.0}, "memory_fraction"),
        ({"coverage": 1.1}, "coverage"),
        ({"label_smoothing": 1.0}, "label_smoothing"),
    ],
)
def test_options_that_are_wrong_or_without_effect_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        FedMoEConfig.model_validate({"name": "fedmoe", **options})


def test_random_experts_without_a_warm_up_may_be_stated() -> None:
    assert FedMoEConfig.model_validate({"warmup_rounds": 0, "experts": "random"}).experts == "random"


# ---- rounds of tiny models


def key_parts(key: str) -> tuple[str, int, int] | None:
    """Part, layer and expert of an expert's tensor or a router row."""
    found = re.search(r"layers\.(\d+)\.mlp\.(gate|experts)\..*\[(\d+)\]$", key)
    return None if found is None else (found[2], int(found[1]), int(found[3]))


@pytest.fixture(scope="module")
def ran_once() -> dict[str, Any]:
    return {}


@pytest.fixture
def random_round(ran_once: dict[str, Any], make_job: Maker, run_job: Maker) -> Any:
    """One round in which each client holds two random experts of each layer."""
    if not ran_once:
        ran_once["round"] = run_job(replace(make_job(RANDOM), rounds=1))
    return ran_once["round"]


def test_experts_and_router_rows_are_kept_replaced_or_averaged_by_who_has_them(random_round: Any) -> None:
    start = random_round.pool.worker.initial_params()
    contributors: dict[str, list[tuple[int, torch.Tensor]]] = defaultdict(list)
    for _, update, tensors in random_round.pool.replies:
        for key, delta in tensors.items():
            contributors[key].append((update.num_examples, delta))
    cases: Counter[tuple[str, int]] = Counter()
    for key, value in random_round.state.params.items():
        given = contributors[key]
        part = key_parts(key)
        cases[part[0] if part else "dense", min(len(given), 2)] += 1
        if not given:
            assert torch.equal(value, start[key])
        elif len(given) == 1:
            torch.testing.assert_close(value, start[key] + given[0][1], rtol=1e-6, atol=1e-8)
        else:
            trained = [(n, start[key].double() + delta.double()) for n, delta in given]
            mean = sum(n * each for n, each in trained) / sum(n for n, _ in trained)  # type: ignore[operator]
            torch.testing.assert_close(value, mean.float(), rtol=1e-6, atol=1e-8)
    assert {(part, n) for part in ("gate", "experts") for n in (0, 1, 2)} | {("dense", 2)} == set(cases)


def test_what_a_client_does_not_hold_neither_goes_down_nor_comes_up(random_round: Any) -> None:
    every = set(random_round.state.params)
    charged: Counter[tuple[int, str, str]] = Counter()
    for row in random_round.rows("ledger"):
        charged[row["client_id"], row["direction"], row["group"]] += row["bytes"]
    for task, update, tensors in random_round.pool.replies:
        assert task.assignment is not None
        assert {layer: len(experts) for layer, experts in task.assignment.items()} == {0: 2, 1: 2}
        lacking = {key for key in every if (at := key_parts(key)) and at[2] not in task.assignment[at[1]]}
        places = {at[:2] for at in map(key_parts, lacking) if at is not None}
        assert places == {(part, layer) for part in ("gate", "experts") for layer in (0, 1)}
        assert set(task.keys) == set(tensors) == every - lacking
        assert update.statistics == {}
        # Hidden 32, neurons 24, rank 2: LoRA over gate and up (48 rows) and down, and a row of the router.
        assert charged[task.client_id, "down", "assigned"] == 4 * 4 * (2 * (32 + 48) + 2 * (24 + 32) + 32)
        assert charged[task.client_id, "up", "assigned"] == charged[task.client_id, "down", "assigned"]


@pytest.mark.parametrize(
    "options", [{}, pytest.param({"full": ["router", "experts"], "lora": ["attention"]}, marks=pytest.mark.slow)]
)
def test_with_full_sub_models_and_no_warm_up_it_is_fedavg(
    options: dict[str, Any], make_job: Maker, run_job: Maker, assert_same_bits: Maker
) -> None:
    parts = {"adapter": SMALL, "lora": ["attention", "experts"], "full": ["router"]} | options
    ours = {"name": "fedmoe", "warmup_rounds": 0, "coverage": None, "patience": 1}
    mine, plain = (run_job(replace(make_job(each | parts), rounds=2)) for each in (ours, {"name": "fedavg"}))
    whole: dict[str, torch.Tensor] = {}
    for key, value in mine.state.params.items():
        if ".mlp.gate." in key:
            name = key[: key.index("[")]
            whole[name] = torch.cat([whole[name], value]) if name in whole else value
        else:
            whole[key] = value
    assert len(whole) < len(mine.state.params)
    assert_same_bits(whole, plain.state.params)
    assert mine.rows("evaluations") == plain.rows("evaluations")


def test_the_warm_up_can_measure_only(make_job: Maker, run_job: Maker, assert_same_bits: Maker) -> None:
    job = replace(make_job({"name": "fedmoe", "adapter": SMALL, "warmup": "measure_only"}), rounds=1)
    ran = run_job(job)
    assert_same_bits(ran.state.params, ran.pool.worker.initial_params())
    assert all(not tensors for _, _, tensors in ran.pool.replies)
    # p of 2 x 4 experts and a score, float32.
    assert [row["bytes"] for row in ran.rows("ledger") if row["direction"] == "up"] == [4 * 9] * 3
    assert all(update.metrics["train_loss"].weight == 2 for _, update, _ in ran.pool.replies), "it trains nevertheless"
    trained = {update.client_id: update.statistics["activation"] for _, update, _ in ran.pool.replies}
    found = ran.state.memory["p"]
    assert all(torch.equal(found[client].reshape(-1), p.double()) for client, p in trained.items())
    held = {row["client_id"]: row["values"]["experts"] for row in ran.rows("diagnostics") if row["kind"] == "held_experts"}
    for client in range(3):
        expected = reach(found[client], 0.7, least=2)
        assert held[client] == [list(experts) for experts in expected]
        assert min(float(p_E[list(e)].sum()) for p_E, e in zip(found[client], expected, strict=True)) >= 0.7


def test_clients_with_small_budgets_sit_out_the_warm_up(make_job: Maker, run_job: Maker) -> None:
    job = make_job({"name": "fedmoe", "adapter": SMALL, "memory_fraction": 1.0})
    ran = run_job(replace(job, rounds=2, budgets=tuple(Budget(experts_per_layer=n) for n in (4, 2, 3))))
    assert [(task.round_idx, task.client_id) for task, _, _ in ran.pool.replies] == [(1, 0), (2, 0), (2, 1), (2, 2)]
    sizes = [sum(map(len, held_by_layer(ran.pool.worker.engine.facts, task.assignment))) for task, _, _ in ran.pool.replies]
    assert sizes[0] == 8
    assert sizes[2:] == [4, 6]


def test_p_and_score_are_those_of_the_clients_own_model_after_training(make_bench: Maker) -> None:
    options = {"name": "fedmoe", "adapter": SMALL, "lora": ["attention"]}
    bench = make_bench(options)
    params = bench.worker.initial_params()
    lacking = assigned(0, 1)
    sent = {
        "assignment": {0: (0, 2, 3)},
        "keys": tuple(key for key in params if bench.worker.groups[key] != lacking),
    }
    update, _ = bench.train(2, 1, params, **sent)
    model, split = bench.worker.engine.model, bench.worker.data.split(2, "validation")
    batch = split.batch([0, 1], bench.worker.pad_token_id)
    assert len(split) == 2
    counts = torch.zeros(2, 4)

    def count(layer: Any, x_TD: torch.Tensor, z_TD: torch.Tensor) -> None:
        logits_TE = layer.router_logits(x_TD)
        if layer.index == 0:
            logits_TE[:, 1] = -torch.inf
        for chosen in logits_TE.topk(2, dim=-1).indices.reshape(-1).tolist():
            counts[layer.index, chosen] += 1

    with mask_experts(model, {0: [1]}):
        model.eval()
        visit_blocks(model, [batch], count)
        with torch.no_grad():
            logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    nll = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch.labels[:, 1:].flatten())
    p_LE = (counts.double() / counts.double().sum(dim=1, keepdim=True)).float()
    assert torch.equal(update.statistics["activation"], torch.cat([p_LE[0, [0, 2, 3]], p_LE[1]]))
    assert float(update.statistics["score"]) == pytest.approx(float(nll), rel=1e-5)
    assert update.diagnostics["sub_model"]["num_experts"] == [3, 4]
    fewer, _ = make_bench(options | {"validation_examples": 1}).train(2, 1, params, **sent)
    assert not torch.equal(fewer.statistics["score"], update.statistics["score"])


def test_label_smoothing_is_the_mean_with_a_uniform_target(make_bench: Maker) -> None:
    options = {"name": "fedmoe", "adapter": SMALL}
    batch_losses = []
    for smoothing in (0.0, 0.25):
        bench = make_bench(options | ({"label_smoothing": smoothing} if smoothing else {}), num_steps=1)
        update, _ = bench.train(0, 1, bench.worker.initial_params())
        batch_losses.append(update.metrics["train_loss"].total)
    worker = make_bench(options | {"label_smoothing": 0.25}).worker
    batch = worker.data.split(0, "train").batch([0, 1, 2], worker.pad_token_id)
    objective = worker.method.objective(None)
    with torch.no_grad():
        loss, output = objective(worker.engine.model, batch, None)
        part, _ = objective(worker.engine.model, batch, 50)
    logs_NV = torch.log_softmax(output.logits.double(), dim=-1)
    own = -logs_NV.gather(1, output.labels[:, None]).mean()
    assert float(loss) == pytest.approx(float(0.75 * own - 0.25 * logs_NV.mean()), rel=1e-6)
    assert float(part) == pytest.approx(float(loss) * len(output.labels) / 50, rel=1e-6)
    assert batch_losses[0] != batch_losses[1]
    assert make_bench(options).worker.method.objective(None) is None


def test_the_load_balancing_loss_counts_held_experts_and_no_padding(make_bench: Maker, random_batch: Maker) -> None:
    worker = make_bench({"name": "fedmoe", "adapter": SMALL, "balance": 0.5}).worker
    model, batch = worker.engine.model, random_batch()
    task = ClientTask(client_id=0, plan=RoundPlan(round_idx=1, num_steps=1, learning_rate=0.1), keys=())

    class Session:
        engine = worker.engine
        scratch: dict[str, Any] = {}

    Session.task = task  # type: ignore[attr-defined]
    session: Any = Session()
    with mask_experts(model, {0: [2]}), worker.method.build(session) as watch, torch.no_grad():
        assert isinstance(watch, RouterWatch)
        model.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
        found = float(worker.method.terms(session, batch, None)["balance"])
        real = batch.attention_mask.reshape(-1).nonzero()[:, 0].tolist()
        total = 0.0
        for layer, held in ((0, 3), (1, 4)):
            probs = torch.softmax(watch.logits[layer].double(), dim=-1)
            picks = Counter(e for token in real for e in watch.chosen[layer][token].tolist())
            total += held * sum(
                picks[e] / (2 * len(real)) * sum(float(probs[token, e]) for token in real) / len(real) for e in range(4)
            )
    assert found == pytest.approx(0.5 * total / 2, rel=1e-5)
    session.task = EvaluationTask(round_idx=1, view="global", tasks=(), keys=())
    session.scratch = {}
    with worker.method.build(session):
        assert worker.method.terms(session, batch, None) == {}


def test_a_load_balancing_loss_changes_the_router_that_is_trained(make_bench: Maker) -> None:
    rows = []
    for balance in (0.0, 5.0):
        bench = make_bench({"name": "fedmoe", "adapter": SMALL, "balance": balance})
        _, tensors = bench.train(0, 1, bench.worker.initial_params())
        rows.append(tensors["model.layers.0.mlp.gate.weight[0]"])
    assert not torch.equal(*rows)


@pytest.mark.slow
def test_sub_models_that_change_survive_a_resume(make_job: Maker, run_job: Maker, assert_same_bits: Maker) -> None:
    options = {"name": "fedmoe", "adapter": SMALL, "patience": 1, "neighbours": 1, "coverage": 0.6}
    job = replace(make_job(options), rounds=5, learning_rate=0.5)
    straight = run_job(job)
    other = replace(make_job(options), rounds=5, learning_rate=0.5)
    asked = iter([False, False, False, True])
    with pytest.raises(RunInterrupted):
        run_job(other, is_stopping=lambda: next(asked))
    resumed = run_job(other)
    held = {task.round_idx: {} for task, _, _ in straight.pool.replies}  # type: ignore[var-annotated]
    for task, _, _ in straight.pool.replies:
        held[task.round_idx][task.client_id] = task.assignment
    assert len({json.dumps(held[r]) for r in (2, 3, 4, 5)}) > 1, "some sub-model changed"
    again = {(task.round_idx, task.client_id): task.assignment for task, _, _ in resumed.pool.replies}
    assert again == {(r, c): held[r][c] for r in (4, 5) for c in range(3)}
    assert_same_bits(resumed.state.params, straight.state.params)
    assert_same_bits(resumed.state.memory, straight.state.memory)
    assert resumed.state.notes == straight.state.notes


def test_a_personal_model_needs_nothing_that_its_client_does_not_hold(make_bench: Maker) -> None:
    bench = make_bench({"name": "fedmoe", "adapter": SMALL})
    params = {key: value + 0.05 for key, value in bench.worker.initial_params().items()}
    broadcast = Broadcast(round_idx=1, params=params)
    task = EvaluationTask(round_idx=1, view="personal", tasks=("client",), keys=tuple(params), client_id=0)
    whole, _ = bench.worker.evaluate(task, broadcast)
    partial, _ = bench.worker.evaluate(replace(task, assignment={0: (0, 1), 1: (1, 3)}), broadcast)
    assert partial.diagnostics == {"held_experts": {"layers": [0, 1], "experts": [[0, 1], [1, 3]]}}
    held = {key for key in params if (at := key_parts(key)) is None or at[2] in {0: (0, 1), 1: (1, 3)}[at[1]]}
    less, _ = bench.worker.evaluate(replace(task, keys=tuple(held), assignment={0: (0, 1), 1: (1, 3)}), broadcast)
    assert less.rows == partial.rows
    assert whole.rows != partial.rows
