"""HFedMoE against closed forms and identities: scores, active sets, contributors, alpha, bytes, and FedAvg as a special case."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from fedgraft.aggregation.hfedmoe import (
    IMPORTANCE,
    UPDATED,
    USAGE,
    HFedMoEConfig,
    bottleneck_scores,
    choose_active,
    contributing,
    gate_weights,
    importance,
    information,
)
from fedgraft.errors import ConfigError, GroupViolation, UpdateError
from fedgraft.platform.loading import load_config
from fedgraft.platform.session import ClientSession
from fedgraft.registry import METHODS
from fedgraft.types import Budget, ClientUpdate, Params, ServerState

Maker = Callable[..., Any]
SMALL = {"rank": 2, "alpha": 4.0}
FULL = {"lora": ["attention"], "full": ["experts", "router"], "adapter": SMALL}
OURS = {"name": "hfedmoe", "adapter": SMALL}
PARTS = [pytest.param({}, id="lora"), pytest.param(FULL, id="full", marks=pytest.mark.slow)]
LAYERS, EXPERTS = (0, 1), 4


# ---- the equations


def test_importance_is_the_mean_gate_the_largest_or_between() -> None:
    gate = torch.tensor([[0.5, 0.25, 0.25], [0.125, 0.75, 0.125], [0.125, 0.5, 0.375], [0.25, 0.5, 0.25]])
    mean, largest = [0.25, 0.5, 0.25], [0.5, 0.75, 0.375]
    assert importance(gate, 1.0).tolist() == mean
    assert importance(gate, 0.0).tolist() == largest
    assert importance(gate, 0.25).tolist() == [0.25 * m + 0.75 * x for m, x in zip(mean, largest, strict=True)]
    # beta = 0, lam = 1 ranks by the mean gate.
    assert bottleneck_scores(gate, 1.0, 0.0).tolist() == mean


def test_the_information_of_two_values_has_a_closed_form() -> None:
    # Half the tokens a, half b: mean m = (a + b) / 2, and (a log(a / m) + b log(b / m)) / 2.
    a, b = 0.7, 0.1
    gate = torch.tensor([[a, 1 - a], [b, 1 - b]], dtype=torch.float64).repeat(5, 1)
    pairs = [(a, b), (1 - a, 1 - b)]
    expected = [(x * math.log(2 * x / (x + y)) + y * math.log(2 * y / (x + y))) / 2 for x, y in pairs]
    assert information(gate).tolist() == pytest.approx(expected, rel=1e-12)
    # An expert that is on for one token of T and off for the others: log(T) / T.
    one = torch.zeros(8, 2, dtype=torch.float64)
    one[3, 0] = 1
    assert information(one).tolist() == pytest.approx([math.log(8) / 8, 0.0], rel=1e-12)
    scores = bottleneck_scores(gate, 0.5, 0.1) - importance(gate, 0.5)
    assert scores.tolist() == pytest.approx([-0.1 * each for each in expected], rel=1e-9)


def test_a_constant_gate_carries_no_information_and_no_other_less() -> None:
    gate = torch.softmax(torch.randn(50, 6, generator=torch.Generator().manual_seed(0)), dim=1)
    assert information(torch.cat([gate, torch.full((50, 1), 0.25)], dim=1))[-1] == 0
    assert (information(gate) > 0).all()


def test_the_active_set_is_the_best_of_all_subsets_within_the_budget() -> None:
    generator = torch.Generator().manual_seed(1)
    for budget, drops in itertools.product((0, 1, 2, 3, 5), (False, True)):
        scores = torch.randn(5, generator=generator, dtype=torch.float64)
        union = torch.tensor([True, False, True, True, True])
        members = union.nonzero().squeeze(1).tolist()
        sizes = range(budget + 1) if drops else [min(budget, len(members))]
        subsets = [set(each) for size in sizes for each in itertools.combinations(members, size)]
        best = max(subsets, key=lambda chosen: sum(float(scores[e]) for e in chosen))
        found = choose_active(scores, union, budget, drop_negative=drops)
        assert set(found.nonzero().squeeze(1).tolist()) == best
        assert int(found.sum()) <= budget
    assert torch.equal(choose_active(scores, union, None), union)
    # Among equals the lower index.
    assert choose_active(torch.ones(4), torch.ones(4, dtype=torch.bool), 2).tolist() == [True, True, False, False]


def test_who_contributes() -> None:
    usage = torch.tensor([[0.25, 0.5, 0.125, 0.125]])
    updated = torch.tensor([[0, 1, 1, 0]], dtype=torch.uint8)
    assert contributing(usage, updated, None, "usage").tolist() == [[True, True, False, False]]
    assert contributing(usage, updated, 0.3, "usage").tolist() == [[False, True, False, False]]
    assert contributing(usage, updated, 0.0, "usage").all()
    assert contributing(usage, updated, None, "updated").tolist() == [[False, True, True, False]]
    assert contributing(usage, updated, None, "both").tolist() == [[False, True, False, False]]


def test_alpha_by_hand() -> None:
    # Layer 0: client 0 contributes to experts 0 and 1, client 1 to expert 1 only; the union has two. Layer 1: nobody.
    usage = torch.tensor([[[0.5, 0.25, 0.25], [1.0, 0.0, 0.0]], [[0.25, 0.75, 0.0], [0.0, 1.0, 0.0]]])
    scores = torch.tensor([[[0.5, 1.0, 1.0], [1.0, 1.0, 1.0]], [[1.0, 0.5, 1.0], [1.0, 1.0, 1.0]]])
    contributes = torch.zeros(2, 2, 3, dtype=torch.bool)
    contributes[0, 0, :2] = True
    contributes[1, 0, 1] = True
    alpha = gate_weights(usage, scores, contributes)
    assert alpha.tolist() == [[(0.25 + 0.25) / 2, 0.0], [0.375 / 2, 0.0]]


# ---- options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora": ["attention"]}, "experts are in neither lora nor full"),
        ({"rank_by": "s", "beta": 0.2}, "beta has no effect with rank_by: s"),
        ({"rank_by": "random", "drop_negative": True}, "drop_negative has no effect with rank_by: random"),
        ({"contrib": "updated", "tau": 0.1}, "tau has no effect with contrib: updated"),
        ({"full": [], "gates": "plain"}, "gates has no effect where no router is trained"),
        ({"full": [], "normalise": False}, "normalise has no effect where no router is trained"),
        ({"gates": "plain", "normalise": False}, "normalise has no effect with gates: plain"),
        ({"lora": ["experts", "router"], "full": [], "normalise": False}, "move router from lora to full"),
        ({"rank_by": "random", "gates": "plain", "lam": 0.2}, "lam has no effect with rank_by: random"),
        ({"contrib": "updated", "gates": "plain", "ema": 0.5}, "ema has no effect with contrib: updated"),
        ({"lam": 1.5}, "lam"),
        ({"tau": 2.0}, "tau"),
        ({"ema": 1.0}, "ema"),
    ],
)
def test_options_that_are_wrong_or_without_effect_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        HFedMoEConfig.model_validate({"name": "hfedmoe", **options})


def config_of(method: dict[str, Any], training: dict[str, Any] | None = None, **federation: Any) -> Any:
    return load_config({"method": {"name": "hfedmoe"} | method, "training": training or {}, "federation": federation})


@pytest.mark.parametrize(
    "options", [{"rank_by": "random"}, {"rank_by": "ib"}, {"beta": 0.2}, {"backward": "drop"}, {"gates": "plain", "lam": 0.2}]
)
def test_without_budgets_options_that_choose_experts_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"{list(options)[-1]} has no effect without federation.budgets"):
        config_of(options)
    assert config_of(options, budgets={"experts_per_layer": [8]}).method is not None


def test_experts_of_negative_score_are_left_out_without_budgets_too(make_bench: Maker) -> None:
    options = {"drop_negative": True, "beta": 100.0}
    assert config_of(options).method is not None
    assert config_of({"lam": 0.2}).method is not None  # alpha has importance in it
    replies = []
    for option in ({"beta": 100.0}, options):
        bench = make_bench(OURS | option)
        replies.append(bench.train(0, 1, bench.worker.initial_params()))
    active = [len(pairs(update.diagnostics["hfedmoe"]["updated"])) for update, _ in replies]
    assert active[1] < active[0]


def test_weight_decay_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"training.weight_decay is 0.01, which moves experts that are not active"):
        config_of({}, training={"weight_decay": 0.01})


def test_a_reply_without_counts_is_refused() -> None:
    method = METHODS.parse({"name": "hfedmoe"})
    update = ClientUpdate(
        client_id=4,
        round_idx=1,
        num_examples=8,
        num_steps=1,
        expert_tokens=torch.zeros(2, 4),
        metrics={},
        payload=(),
        statistics={IMPORTANCE: torch.ones(2, 4)},
    )
    with pytest.raises(UpdateError, match=f"client 4 sent no statistic '{USAGE}'"):
        method.weigh(ServerState(params={}), [update])


# ---- clients


def sent_experts(worker: Any, tensors: Params) -> set[tuple[int, int]]:
    return {(ref.layer, ref.expert) for ref in worker.engine.refs if ref.part == "experts" and ref.key in tensors}


def pairs(listed: list[list[int]]) -> set[tuple[int, int]]:
    return {(layer, expert) for layer, experts in zip(LAYERS, listed, strict=True) for expert in experts}


@pytest.mark.parametrize("parts", PARTS)
def test_a_budget_holds_in_every_batch_and_no_other_expert_learns(parts: dict[str, Any], make_bench: Maker) -> None:
    options = OURS | parts | {"tau": 0.0}
    bench = make_bench(options, num_steps=3)
    steps: list[dict[str, torch.Tensor]] = []
    method = bench.worker.method
    expert_keys = [ref.key for ref in bench.worker.engine.refs if ref.part == "experts"]
    method.after_backward = lambda session, step: steps.append(session.engine.read_gradients(expert_keys))
    params = bench.worker.initial_params()
    update, tensors = bench.train(0, 1, params, budget=Budget(experts_per_layer=1))
    notes = update.diagnostics["hfedmoe"]
    assert notes["most_active"] == [1, 1]
    assert all(touched > 1 for touched in notes["mean_touched"])
    by_key = {ref.key: (ref.layer, ref.expert) for ref in bench.worker.engine.refs}
    learned: set[tuple[int, int]] = set()
    for gradients in steps:
        now = {by_key[key] for key, gradient in gradients.items() if gradient.any()}
        assert Counter(layer for layer, _ in now) == {0: 1, 1: 1}
        learned |= now
    assert len(steps) == 3
    assert pairs(notes["updated"]) == learned
    assert sent_experts(bench.worker, tensors) == pairs(notes["sent"]) == set(itertools.product(LAYERS, range(EXPERTS)))
    for key in expert_keys:  # no weight decay here, so that what never was active is as it came
        assert bool(tensors[key].any()) <= (by_key[key] in learned)


def test_a_budget_that_covers_the_union_changes_no_bit(make_bench: Maker, assert_same_bits: Maker) -> None:
    replies = []
    for budget in (None, Budget(experts_per_layer=EXPERTS), Budget()):
        bench = make_bench(OURS)
        replies.append(bench.train(0, 1, bench.worker.initial_params(), budget=budget))
    for update, tensors in replies[1:]:
        assert_same_bits(tensors, replies[0][1])
        assert_same_bits(update.statistics, replies[0][0].statistics)
    tight, tight_tensors = make_bench(OURS).train(0, 1, bench.worker.initial_params(), budget=Budget(experts_per_layer=1))
    assert not all(torch.equal(tight_tensors[key], replies[0][1][key]) for key in tight_tensors)
    active = [len(pairs(update.diagnostics["hfedmoe"]["updated"])) for update in (tight, replies[0][0])]
    assert active[0] < active[1]


def test_usage_and_importance_are_those_of_the_batches_seen(
    make_bench: Maker, random_batch: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = make_bench(OURS | {"lam": 0.25}, num_steps=2, learning_rate=1e-12)
    engine = bench.worker.engine
    seen = [random_batch((9, 4)), random_batch((6, 5, 2), seed=1)]
    monkeypatch.setattr(ClientSession, "train_batches", lambda session: iter(seen))
    update, _ = bench.train(1, 1, bench.worker.initial_params())
    engine.load(engine.initial)
    sums, mixed, count = torch.zeros(2, EXPERTS), torch.zeros(2, EXPERTS), 0
    for batch in seen:
        logits = engine.model(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, output_router_logits=True
        ).router_logits
        gates = torch.stack([torch.softmax(each.detach(), dim=-1)[batch.attention_mask.reshape(-1).bool()] for each in logits])
        sums += gates.sum(dim=1)
        mixed += (0.25 * gates.mean(dim=1) + 0.75 * gates.amax(dim=1)) / len(seen)
        count += gates.shape[1]
    # The learning rate is 1e-12, so that the second batch sees the same model.
    torch.testing.assert_close(update.statistics[USAGE], sums / count, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(update.statistics[IMPORTANCE], mixed, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(update.statistics[USAGE].sum(dim=1), torch.ones(2))


def test_a_client_may_mix_its_counts_with_those_of_former_rounds(make_bench: Maker) -> None:
    plain, mixing = make_bench(OURS), make_bench(OURS | {"ema": 0.75})
    params = plain.worker.initial_params()
    publishes = (USAGE, IMPORTANCE)
    one, _ = plain.train(0, 1, params)
    two, _ = plain.train(0, 2, params)
    mixing.train(0, 1, params, publishes=publishes)
    mixed, _ = mixing.train(0, 2, params, publishes=publishes)
    for key in publishes:
        wanted = 0.75 * one.statistics[key] + 0.25 * two.statistics[key]
        torch.testing.assert_close(mixed.statistics[key], wanted, rtol=1e-6, atol=0)
        assert torch.equal(mixing.private(0)[key], mixed.statistics[key])
    assert plain.versions == {}
    with pytest.raises(GroupViolation, match="hfedmoe/"):  # what is kept is sent only where the task says so
        mixing.train(1, 1, params)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"rank_by": "s"},
        {"rank_by": "random"},
        {"beta": 50.0},
        {"lam": 0.0},
        {"beta": 50.0, "drop_negative": True},
        {"backward": "drop"},
        {"tau": 0.9},
        {"contrib": "updated"},
        {"contrib": "both"},
        {"adapter": {"rank": 3, "alpha": 4.0}},
    ],
    ids=str,
)
def test_every_option_of_a_client_changes_something(options: dict[str, Any], make_bench: Maker) -> None:
    replies = []
    base = {"beta": 50.0} if {"drop_negative", "rank_by"} & set(options) else {}
    for extra in (base, options):
        bench = make_bench(OURS | extra, num_steps=3)
        update, tensors = bench.train(0, 1, bench.worker.initial_params(), budget=Budget(experts_per_layer=1))
        replies.append(tensors | update.statistics)
    first, second = replies
    same_keys = sorted(first) == sorted(second)
    assert not (
        same_keys and all(first[key].shape == second[key].shape and torch.equal(first[key], second[key]) for key in first)
    )


# ---- rounds


def with_budgets(job: Any, *experts: int) -> Any:
    return replace(job, budgets=tuple(Budget(experts_per_layer=count) for count in experts))


@pytest.mark.parametrize("parts", PARTS)
def test_without_threshold_budget_and_alpha_it_is_fedavg(
    parts: dict[str, Any], make_job: Maker, run_job: Maker, assert_same_bits: Maker
) -> None:
    parts = parts or {"lora": ["attention", "experts"], "full": ["router"], "adapter": SMALL}
    ours = run_job(replace(make_job({"name": "hfedmoe", "tau": 0.0, "gates": "plain"} | parts), rounds=2))
    fedavg = run_job(replace(make_job({"name": "fedavg"} | parts), rounds=2))
    assert_same_bits(ours.state.params, fedavg.state.params)
    weighted = run_job(replace(make_job({"name": "hfedmoe", "tau": 0.0} | parts), rounds=1))
    routers = {ref.key for ref in weighted.pool.worker.engine.refs if ref.part == "router"}
    plain = run_job(replace(make_job({"name": "fedavg"} | parts), rounds=1))
    for key, value in plain.state.params.items():  # alpha weighs routers, and nothing else
        assert torch.equal(weighted.state.params[key], value) == (key not in routers)


def test_experts_and_routers_are_averaged_by_coverage(make_job: Maker, run_job: Maker) -> None:
    ran = run_job(with_budgets(replace(make_job(OURS | {"tau": 0.22}), rounds=1), 1, 2, 4))
    start, refs = ran.pool.worker.initial_params(), ran.pool.worker.engine.refs
    replies = {task.client_id: (update, tensors) for task, update, tensors in ran.pool.replies}
    kept = shared = 0
    for ref in refs:
        deltas = {client: tensors[ref.key].double() for client, (_, tensors) in replies.items() if ref.key in tensors}
        found, began = ran.state.params[ref.key], start[ref.key]
        if ref.part == "experts":
            place = LAYERS.index(ref.layer)
            qualified = {c for c, (update, _) in replies.items() if float(update.statistics[USAGE][place, ref.expert]) >= 0.22}
            assert set(deltas) == qualified
            kept += not qualified
            shared += 0 < len(qualified) < 3
            if not qualified:
                assert torch.equal(found, began)
                continue
            weights = {client: float(replies[client][0].num_examples) for client in qualified}
        elif ref.part == "router":
            place = LAYERS.index(ref.layer)
            weights = {}
            for client, (update, _) in replies.items():
                usage, score = update.statistics[USAGE][place].tolist(), update.statistics[IMPORTANCE][place].tolist()
                weights[client] = sum(u * s for u, s in zip(usage, score, strict=True) if u >= 0.22)
        else:
            assert len(deltas) == 3
            weights = {client: float(update.num_examples) for client, (update, _) in replies.items()}
        mean = sum(weights[client] * deltas[client] for client in weights) / sum(weights.values())
        torch.testing.assert_close(found.double(), began.double() + mean, rtol=1e-6, atol=1e-8)
    assert kept > 0
    assert shared > 0


def test_weights_of_routers_sum_to_one_or_are_alpha_as_printed(make_job: Maker, run_job: Maker) -> None:
    updates = [update for _, update, _ in run_job(replace(make_job(OURS), rounds=1)).pool.replies]
    found = {}
    for normalise in (True, False):
        watched: list[Any] = []

        def watch(loop: Any, watched: list[Any] = watched) -> None:
            weigh = loop._method.weigh

            def note(state: Any, updates: Any) -> Any:
                watched.append(weigh(state, updates))
                return watched[-1]

            loop._method.weigh = note

        ran = run_job(replace(make_job(OURS | {"normalise": normalise}), rounds=1), before=watch)
        found[normalise] = (ran, watched[0])
    routers = [ref for ref in found[True][0].pool.worker.engine.refs if ref.part == "router"]
    assert routers
    for ref in routers:
        assert sum(found[True][1].of(ref.key)) == pytest.approx(1, abs=1e-12)
        place = LAYERS.index(ref.layer)
        usage = torch.stack([update.statistics[USAGE][place].double() for update in updates])
        score = torch.stack([update.statistics[IMPORTANCE][place].double() for update in updates])
        qualified = usage >= 1 / EXPERTS
        alpha = (usage * score * qualified).sum(dim=1) / int(qualified.any(dim=0).sum())
        assert found[False][1].of(ref.key) == pytest.approx(alpha.tolist(), rel=1e-9)
        # As printed the router itself is the sum, so it is the normalised one times the sum of alpha.
        whole = found[True][0].state.params[ref.key]
        torch.testing.assert_close(found[False][0].state.params[ref.key], (alpha.sum() * whole).float(), rtol=1e-5, atol=1e-7)
        assert abs(float(alpha.sum()) - 1) > 0.05


def test_where_nobody_contributes_everything_of_a_layer_stays(make_job: Maker, run_job: Maker) -> None:
    for normalise in (True, False):
        ran = run_job(replace(make_job(OURS | {"tau": 1.0, "normalise": normalise}), rounds=1))
        start = ran.pool.worker.initial_params()
        for ref in ran.pool.worker.engine.refs:
            stayed = torch.equal(ran.state.params[ref.key], start[ref.key])
            assert stayed == (ref.part in ("experts", "router")), ref.key


@pytest.mark.parametrize(
    ("parts", "contrib"),
    [({}, "usage"), ({}, "updated"), pytest.param(FULL, "usage", marks=pytest.mark.slow)],
    ids=["lora", "lora updated", "full"],
)
def test_bytes_up_are_those_of_contributed_experts_gates_dense_parts_and_counts(
    parts: dict[str, Any], contrib: str, make_job: Maker, run_job: Maker
) -> None:
    ran = run_job(with_budgets(replace(make_job(OURS | parts | {"contrib": contrib}), rounds=2), 1, 2, 3))
    hidden, neurons, key_value, rank = 32, 24, 16, 2
    # LoRA: A and B of gate-up and down; in full: the two matrices.
    lora_of_expert = rank * ((hidden + 2 * neurons) + (neurons + hidden))
    expert = 3 * hidden * neurons if "full" in parts else lora_of_expert
    gates = 2 * EXPERTS * hidden
    dense = 2 * rank * (2 * (hidden + hidden) + 2 * (hidden + key_value))  # attention LoRA: q and o, k and v
    # u and s in float32, and who was active in a byte where that decides what is sent
    counts = 2 * 4 * len(LAYERS) * EXPERTS + (contrib == "updated") * len(LAYERS) * EXPERTS
    up: Counter[tuple[int, int]] = Counter()
    for row in ran.rows("ledger"):
        if row["direction"] == "up":
            up[row["round"], row["client_id"]] += row["bytes"]
    sent = []
    for task, update, _ in ran.pool.replies:
        chosen = update.statistics[USAGE] >= 1 / EXPERTS if contrib == "usage" else update.statistics[UPDATED]
        sent.append(int(chosen.sum()))
        assert up[task.round_idx, task.client_id] == 4 * (sent[-1] * expert + gates + dense) + counts
    assert len(sent) == 6
    assert all(0 < count <= len(LAYERS) * EXPERTS for count in sent)
    assert any(count < len(LAYERS) * EXPERTS for count in sent)


@pytest.mark.slow
def test_former_counts_survive_a_run(make_job: Maker, run_job: Maker) -> None:
    ran = run_job(replace(make_job(OURS | {"ema": 0.5}), rounds=2))
    assert len(ran.pool.replies) == 6
    assert sorted(ran.private_files()) == ["000000", "000001", "000002"]
