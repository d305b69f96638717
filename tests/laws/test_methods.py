"""What every registered method must hold, whoever wrote it: the laws run over the registry, not over a list."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from pydantic import ValidationError

import fedgraft.aggregation  # noqa: F401  (registers the methods)
from fedgraft.aggregation.reduce import TreeSum, leaf
from fedgraft.errors import RunInterrupted
from fedgraft.moe.base import open_base
from fedgraft.protocols import Method, Reduced
from fedgraft.registry import METHODS
from fedgraft.types import FROZEN, PRIVATE, ClientUpdate, Federation, Params

Maker = Callable[..., Any]
NAMES = METHODS.names()

VARIANTS: dict[str, dict[str, Any]] = {
    "fedavg of every part": {"name": "fedavg", "lora": ["attention", "experts"], "full": ["router"]},
    "flex with moments and shared gates": {"name": "flex", "persist_optimizer": True, "share_gate": True, "gate_bias": 0.0},
    "flex with dropout in rows": {"name": "flex", "mode": "row", "adapter": {"dropout": 0.3}, "n_graft": 2},
    "flex with scaffold": {"name": "flex", "server": {"name": "scaffold"}},
    "hfedmoe sending what it updated": {"name": "hfedmoe", "contrib": "updated", "backward": "drop"},
    "flex_moe with three experts": {"name": "flex_moe", "experts_per_client": 3},
    "fedalign_moe with own versions": {"name": "fedalign_moe", "theta": 0.9, "personal": True},
    "fedamole with server embeddings": {"name": "fedamole", "embeddings": "server", "weights": "examples", "judge": "pool"},
    "pm_moe with unlocked modules": {"name": "pm_moe", "lock_experts": False, "edm": "ce"},
    "fedjets with clustered anchors": {"name": "fedjets", "anchor_source": "clustered"},
}
"""Options that change what is sent or kept, beside every method's defaults."""

CASES = {name: {"name": name} for name in NAMES} | VARIANTS


def options_of(case: str) -> dict[str, Any]:
    """A case's options, with small adapters."""
    options = dict(CASES[case])
    if "adapter" in METHODS.get(options["name"]).config_class.model_fields:
        options["adapter"] = {"rank": 2, "alpha": 4.0} | options.get("adapter", {})
    return options


SLOW = {"fedadagrad", "fedyogi", *VARIANTS}
"""Beside the variants, the two that differ from ``fedadam`` in one line of the server's step only."""


@pytest.fixture(params=[pytest.param(case, marks=[pytest.mark.slow] * (case in SLOW)) for case in CASES])
def case(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def straight_runs() -> dict[str, Any]:
    return {}


@pytest.fixture
def straight(case: str, straight_runs: dict[str, Any], make_job: Maker, run_job: Maker) -> Any:
    """Two rounds of three clients, run once for all laws."""
    if case not in straight_runs:
        straight_runs[case] = run_job(replace(make_job(options_of(case)), rounds=2))
    return straight_runs[case]


def comparable(ran: Any) -> dict[str, Any]:
    """Everything a run records, but for clocks and paths."""
    found: dict[str, Any] = {"private": ran.private_files()}
    for record in ("metrics", "evaluations", "ledger", "diagnostics"):
        rows = ran.rows(record)
        for row in rows:
            for clock in ("seconds", "client_seconds"):
                row.pop(clock, None)
        found[record] = sorted(json.dumps(row, sort_keys=True) for row in rows)
    return found


# ---- options


def test_a_config_survives_the_way_to_a_replica(case: str) -> None:
    cls = METHODS.get(CASES[case]["name"]).config_class
    for config in (cls(), cls(name=CASES[case]["name"]), cls.model_validate(options_of(case))):
        assert METHODS.parse(json.loads(json.dumps(config.to_options()))).config == config
    # Methods at their defaults survive a whole dump, too.
    assert METHODS.parse(json.loads(json.dumps(cls().model_dump(mode="json")))).config == cls()


@pytest.mark.parametrize(
    "options",
    [
        {"name": "flex", "granularity": "neuron"},
        {"name": "flex", "graft_init": "random"},
        {"name": "flex", "gate_closed": True},
        {"name": "private_lora", "private_rank": 3},
        {"name": "fedavg", "lora": [], "full": ["experts"]},
    ],
)
def test_so_does_a_config_beside_whose_options_a_default_must_not_be_stated(options: dict[str, Any]) -> None:
    config = METHODS.get(options["name"]).config_class.model_validate(options)
    again = METHODS.parse(json.loads(json.dumps(config.to_options()))).config
    assert again == config
    assert again.model_dump() == config.model_dump()


@pytest.mark.parametrize("name", NAMES)
def test_an_unknown_option_is_refused(name: str) -> None:
    with pytest.raises(ValidationError, match="no_such_option"):
        METHODS.get(name).config_class.model_validate({"name": name, "no_such_option": 1})
    with pytest.raises(ValidationError, match="frozen"):
        METHODS.get(name).config_class(name=name).name = "other"


@pytest.mark.parametrize("name", NAMES)
def test_every_option_has_a_description(name: str) -> None:
    fields = METHODS.get(name).config_class.model_fields
    assert all(field.description for key, field in fields.items() if key != "name")


# ---- groups


def test_private_and_frozen_tensors_are_never_sent(straight: Any) -> None:
    groups = straight.pool.worker.groups
    kept = {key for key, group in groups.items() if group in (PRIVATE, FROZEN)}
    base = {name for name, _ in open_base(straight.job.worker.base_folder).named_parameters()}
    for task, update, tensors in straight.pool.replies:
        sent = {key.removeprefix("extras/") for key in tensors}
        assert not sent & kept
        assert not kept & set(task.keys)
        full = {key for key in sent if re.sub(r"\[\d+\]$", "", key.replace(".base_layer", "")) in base}
        assert all(groups[key].is_sent for key in full)
        assert {info.key for info in update.payload if info.group in ("shared", "assigned")} <= {*task.keys, *update.requested}
    assert not kept & set(straight.state.params)


def test_frozen_tensors_are_the_bases_own_bytes(straight: Any) -> None:
    worker = straight.pool.worker
    slots = {ref.name for ref in worker.engine.refs}
    found = {name: p for name, p in worker.engine.model.named_parameters() if name not in slots}
    base = dict(open_base(straight.job.worker.base_folder).named_parameters())
    for name, parameter in found.items():
        assert torch.equal(parameter, base[name.replace(".base_layer", "")]), name
    info = json.loads((straight.job.folder / "run.json").read_text())
    assert info["frozen_hash_start"] == info["frozen_hash_end"] == worker.engine.frozen_hash()


# ---- determinism


def test_the_same_seed_gives_the_same_bits_whoever_replies_first(
    case: str, straight: Any, make_job: Maker, run_job: Maker, assert_same_bits: Maker
) -> None:
    again = run_job(replace(make_job(options_of(case)), rounds=2), in_reverse=True)
    assert_same_bits(again.state.params, straight.state.params)
    assert_same_bits(again.state.extras, straight.state.extras)
    assert comparable(again) == comparable(straight)


def test_another_seed_gives_other_bits(case: str, straight: Any, make_job: Maker, run_job: Maker) -> None:
    if not straight.pool.replies:
        return  # nothing is trained, so nothing is drawn
    job = make_job(options_of(case))
    other = run_job(replace(job, rounds=1, worker=replace(job.worker, run_seed=8)))
    assert comparable(other)["metrics"][0] not in comparable(straight)["metrics"]


def test_what_another_client_left_on_a_worker_does_not_matter(case: str, make_bench: Maker, assert_same_bits: Maker) -> None:
    alone, crowded = make_bench(options_of(case)), make_bench(options_of(case))
    if not alone.worker.trained:
        return
    params = alone.worker.initial_params()
    generator = torch.Generator().manual_seed(3)
    later = {key: value + 0.1 * torch.randn(value.shape, generator=generator) for key, value in params.items()}
    for round_idx, sent in ((1, params), (2, later)):
        crowded.train(1, round_idx, sent)
        there, delta_there = crowded.train(0, round_idx, sent)
        crowded.train(2, round_idx, sent)
        here, delta_here = alone.train(0, round_idx, sent)
        assert_same_bits(delta_there, delta_here)
        assert replace(there, seconds=0, expert_tokens=here.expert_tokens, statistics={}) == replace(
            here, seconds=0, statistics={}
        )
        assert torch.equal(there.expert_tokens, here.expert_tokens)
        assert_same_bits(there.statistics, here.statistics)
        if alone.worker.private:
            assert_same_bits(crowded.private(0), alone.private(0))


def test_a_permuted_cohort_gives_the_same_clients_and_nearly_the_same_sum(case: str, make_job: Maker, run_job: Maker) -> None:
    def permute(order: tuple[int, ...]) -> Any:
        def before(loop: Any) -> None:
            loop._method.select = lambda state, plan, cohort: tuple(cohort[i] for i in order)

        job = make_job(options_of(case))
        return run_job(replace(job, rounds=1), before=before)

    plain, turned = permute((0, 1, 2)), permute((2, 0, 1))
    assert [task.client_id for task, _, _ in turned.pool.replies] in ([2, 0, 1], [])
    assert plain.private_files() == turned.private_files()
    by_client = {task.client_id: tensors for task, _, tensors in plain.pool.replies}
    for task, _, tensors in turned.pool.replies:
        assert all(torch.equal(value, by_client[task.client_id][key]) for key, value in tensors.items())
    for key, value in plain.state.params.items():
        # Only the tree's order differs: sums in float64, so at most the last bit of a float32.
        torch.testing.assert_close(turned.state.params[key], value, rtol=2e-7, atol=1e-9)


def test_stop_and_resume_equal_the_straight_run(
    case: str, straight: Any, make_job: Maker, run_job: Maker, assert_same_bits: Maker
) -> None:
    job = replace(make_job(options_of(case)), rounds=2)
    asked: Counter[str] = Counter()

    def is_stopping() -> bool:
        asked["times"] += 1
        return asked["times"] > 1

    if straight.pool.replies:
        with pytest.raises(RunInterrupted, match="stopped after round 1 of 2") as caught:
            run_job(job, is_stopping=is_stopping)
        assert "resumed" in caught.value.hint
    resumed = run_job(job)
    assert {task.round_idx for task, _, _ in resumed.pool.replies} == ({2} if straight.pool.replies else set())
    assert_same_bits(resumed.state.params, straight.state.params)
    assert_same_bits(resumed.state.extras, straight.state.extras)
    assert_same_bits(resumed.state.memory, straight.state.memory)
    assert comparable(resumed) == comparable(straight)


# ---- sums and bytes


def test_the_mean_of_equal_deltas_is_that_delta(case: str, make_bench: Maker) -> None:
    bench = make_bench(options_of(case))
    worker = bench.worker
    params = worker.initial_params()
    worker.method.federation = Federation(
        facts=worker.engine.facts,
        refs=worker.engine.refs,
        groups=worker.groups,
        run_seed=7,
        rounds=2,
        num_examples=(5, 1, 12),
    )
    state = worker.method.init(params, 3)
    # Multiples of 1/8 and whole weights: no rounding anywhere.
    generator = torch.Generator().manual_seed(1)
    delta = {key: torch.randint(-8, 9, value.shape, generator=generator) / 8 for key, value in params.items()}
    # Clients that measured the same, where a method weighs them by what they measure.
    statistics = bench.train(0, 1, params)[0].statistics if params else {}
    updates = [replace(fake_update(client, examples), statistics=statistics) for client, examples in enumerate((5, 1, 12))]
    weights = worker.method.weigh(state, updates)
    tree = TreeSum(3)
    for place in range(3):
        tree.add(place, leaf(delta, {key: weights.of(key)[place] for key in delta}))
    total = tree.result()
    reduced = Reduced(delta=total.mean(), extras={}, num_contributors=total.count)
    for key, value in reduced.delta.items():
        is_whole = all(weight.is_integer() for weight in weights.of(key))
        assert (
            torch.equal(value, delta[key].double())
            if is_whole
            else torch.allclose(value, delta[key].double(), rtol=1e-15, atol=0)
        )
    if METHODS.get(worker.method.name).aggregate is Method.aggregate:
        for key, value in worker.method.aggregate(state, reduced, updates).params.items():
            assert torch.equal(value, params[key] + delta[key])


def fake_update(client: int, examples: int) -> ClientUpdate:
    return ClientUpdate(
        client_id=client,
        round_idx=1,
        num_examples=examples,
        num_steps=1,
        expert_tokens=torch.full((2, 4), examples),
        metrics={},
        payload=(),
    )


def test_the_ledger_counts_the_payloads_own_bytes(straight: Any) -> None:
    expected: Counter[tuple[int, int, str]] = Counter()
    start: Params = straight.pool.worker.initial_params()
    for task, update, tensors in straight.pool.replies:
        up = [*tensors.values(), *update.statistics.values()]
        expected[task.round_idx, task.client_id, "up"] += sum(t.numel() * t.itemsize for t in up)
        held = (*task.keys, *update.requested)
        expected[task.round_idx, task.client_id, "down"] += sum(start[key].numel() * start[key].itemsize for key in held)
        assert not task.extras
        # What the server learns from the first replies it cannot have sent before them.
        assert not straight.state.extras or task.extra_keys or task.round_idx == 1
    found: Counter[tuple[int, int, str]] = Counter()
    for row in straight.rows("ledger"):
        found[row["round"], row["client_id"], row["direction"]] += row["bytes"]
        assert row["is_retry"] is False
    if not straight.state.extras:
        assert +found == +expected
    for row in straight.rows("metrics"):
        for direction in ("up", "down"):
            assert row[f"bytes_{direction}"] == sum(
                n for key, n in found.items() if (key[0], key[2]) == (row["round"], direction)
            )


def test_fedavg_costs_two_times_four_bytes_a_parameter(make_job: Maker, run_job: Maker) -> None:
    rank, hidden, key_value = 3, 32, 16
    ran = run_job(replace(make_job({"name": "fedavg", "adapter": {"rank": rank}}), rounds=2))
    lora = 2 * rank * (2 * (hidden + hidden) + 2 * (hidden + key_value))  # layers, q and o, k and v
    by_client: Counter[tuple[int, int]] = Counter()
    for row in ran.rows("ledger"):
        by_client[row["round"], row["client_id"]] += row["bytes"]
        assert row["group"] == "shared"
    assert by_client == {(r, c): 2 * 4 * lora for r in (1, 2) for c in range(3)}


def test_local_only_and_base_send_nothing(make_job: Maker, run_job: Maker) -> None:
    for name in ("local_only", "base"):
        ran = run_job(replace(make_job({"name": name}), rounds=2))
        assert ran.rows("ledger") == []
        assert ran.state.params == {}
        assert len(ran.pool.replies) == (6 if name == "local_only" else 0)


# ---- evaluation does not train


def test_judging_a_model_changes_nothing(
    case: str, straight: Any, make_job: Maker, run_job: Maker, assert_same_bits: Maker
) -> None:
    job = replace(make_job(options_of(case)), rounds=2)
    watched = replace(job, evaluation=job.evaluation.model_copy(update={"every": 1, "at_start": True, "generate": "end"}))
    busy = run_job(replace(watched, worker=replace(job.worker, max_new_tokens=2, max_generate=2)))
    assert_same_bits(busy.state.params, straight.state.params)
    assert busy.private_files() == straight.private_files()
    rows = [row for row in busy.rows("evaluations") if row["view"] == "personal" and row["metric"] == "nll"]
    clients = {row["client_id"] for row in rows if row["task"] == "client"}
    assert clients == {0, 1, 2}
    last = max(row["round"] for row in rows)
    final = [row for row in rows if row["round"] == last and row["task"] == "client"]
    expected = [
        row
        for row in straight.rows("evaluations")
        if row["view"] == "personal" and row["metric"] == "nll" and row["task"] == "client"
    ]
    assert final == expected
