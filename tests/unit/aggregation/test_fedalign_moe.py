"""FedAlign-MoE in whole runs: what is sent, what becomes of experts, rows and versions, and when it is FedAvg."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from scipy.stats import entropy

from fedgraft.aggregation.alignment import agreement, consistency_weights, reference_routing
from fedgraft.aggregation.cohort import align_experts
from fedgraft.aggregation.fedalign_moe import FedAlignMoe, FedAlignMoeConfig
from fedgraft.aggregation.prototypes import Prototypes
from fedgraft.errors import MethodError, UpdateError
from fedgraft.moe.families import model_facts, moe_layers
from fedgraft.moe.trace import RouterWatch
from fedgraft.protocols import Reduced
from fedgraft.training.step import response_loss
from fedgraft.training.torch_engine import TorchEngine
from fedgraft.types import Batch, ClientTask, ClientUpdate, Federation, ModelFacts, RoundPlan, ServerState

Maker = Callable[..., Any]
SMALL = {"rank": 2, "alpha": 4.0}
LAYERS, EXPERTS, HIDDEN = 2, 4, 32


def options(**given: Any) -> dict[str, Any]:
    return {"name": "fedalign_moe", "adapter": SMALL, "probe_examples": 4} | given


@pytest.fixture(scope="module")
def runs() -> dict[str, Any]:
    return {}


@pytest.fixture
def run(runs: dict[str, Any], make_job: Maker, run_job: Maker) -> Maker:
    """Two rounds of three clients; run once for the same options."""

    def make(rounds: int = 2, **given: Any) -> Any:
        key = repr((rounds, sorted(given.items())))
        if key not in runs:
            runs[key] = run_job(replace(make_job(options(**given)), rounds=rounds))
        return runs[key]

    return make


def prototypes_of(updates: list[ClientUpdate]) -> Prototypes:
    counts, inputs, responses = (
        torch.stack([update.statistics[name] for update in updates]) for name in ("counts", "inputs", "responses")
    )
    return Prototypes(counts=counts, inputs=inputs, responses=responses)


def replies_of(ran: Any, round_idx: int) -> list[Any]:
    return [reply for reply in ran.pool.replies if reply[1].round_idx == round_idx]


# ---- when it is FedAvg


def test_without_threshold_and_pull_it_is_fedavg_to_the_bit_and_the_byte(
    run: Maker, make_job: Maker, run_job: Maker, assert_same_bits: Maker
) -> None:
    parts = {"lora": ["attention", "experts"], "full": ["router"]}
    plain = run_job(replace(make_job({"name": "fedavg", "adapter": SMALL} | parts), rounds=2))
    mine = run_job(replace(make_job({"name": "fedalign_moe", "adapter": SMALL, "theta": None, "mu": 0.0}), rounds=2))
    assert_same_bits(mine.state.params, plain.state.params)
    assert mine.rows("ledger") == plain.rows("ledger")
    assert mine.state.extras == mine.state.memory == {}


def test_equal_clients_get_the_plain_mean(make_bench: Maker) -> None:
    """Statistics of one client three times over: weights of one third, or by tokens where these differ."""
    method, state, update = server(make_bench)
    updates = [replace(update, client_id=client) for client in range(3)]
    weights = method.weigh(state, updates)
    counts = update.statistics["counts"].sum(dim=-1)
    for ref in method.federation.refs:
        found = weights.of(ref.key)
        if ref.part == "attention":
            assert found == (update.num_examples,) * 3
        elif ref.part == "router" or counts[ref.layer, ref.expert] > 0:
            assert found == pytest.approx((1 / 3, 1 / 3, 1 / 3), rel=1e-12)
        else:
            assert found == (0, 0, 0)
    doubled = update.statistics | {"counts": 2 * update.statistics["counts"]}
    by_tokens = method.weigh(state, [*updates[:2], replace(updates[2], statistics=doubled)])
    key = next(ref.key for ref in method.federation.refs if ref.part == "experts" and counts[ref.layer, ref.expert] > 0)
    assert by_tokens.of(key) == pytest.approx((0.25, 0.25, 0.5), rel=1e-12)


def test_clients_that_measured_part_of_their_examples_weigh_as_in_fedavg(make_bench: Maker) -> None:
    """Clients that route alike: an expert's weights are numbers of examples, whether all (2) or four (9, 400) were measured."""
    method, state, update = server(make_bench)
    few = update.statistics | {"counts": update.statistics["counts"] / 2}
    updates = [replace(update, client_id=client, num_examples=size) for client, size in enumerate((9, 400, 2))]
    updates[2] = replace(updates[2], statistics=few)
    weights = method.weigh(state, updates)
    sums = update.statistics["counts"].sum(dim=-1)
    keys = [ref.key for ref in method.federation.refs if ref.part == "experts" and sums[ref.layer, ref.expert] > 0]
    assert keys
    for key in keys:
        assert weights.of(key) == pytest.approx((9 / 411, 400 / 411, 2 / 411), rel=1e-12)


# ---- weights


def server(make_bench: Maker, **given: Any) -> tuple[FedAlignMoe, ServerState, ClientUpdate]:
    """The server's half over a real client's statistics."""
    bench = make_bench(options(**given))
    params = bench.worker.initial_params()
    update, _ = bench.train(0, 1, params)
    method: FedAlignMoe = bench.worker.method
    method.federation = Federation(
        facts=bench.worker.engine.facts,
        refs=bench.worker.engine.refs,
        groups=bench.worker.groups,
        run_seed=7,
        rounds=2,
        num_examples=(8, 11, 14, 9),
    )
    return method, method.init(params, 4), update


def changed(update: ClientUpdate, client: int, layer: int, expert: int, **values: float) -> ClientUpdate:
    """Another client that measured the same but for one expert: its statistics there are multiplied."""
    statistics = {name: value.clone() for name, value in update.statistics.items()}
    for name, factor in values.items():
        statistics[name][layer, expert] *= factor
    return replace(update, client_id=client, statistics=statistics)


def used_expert(update: ClientUpdate) -> tuple[int, int]:
    """A layer and an expert that have tokens."""
    return tuple((update.statistics["counts"].sum(dim=-1) > 2).nonzero()[0].tolist())


def keys_of(method: FedAlignMoe, part: str, layer: int, expert: int) -> list[str]:
    return [ref.key for ref in method.federation.refs if (ref.part, ref.layer, ref.expert) == (part, layer, expert)]


def test_a_client_that_answers_otherwise_is_left_out_of_that_expert_only(make_bench: Maker) -> None:
    method, state, update = server(make_bench)
    layer, expert = used_expert(update)
    updates = [update, changed(update, 1, layer, expert), changed(update, 2, layer, expert, responses=-1.0)]
    weights = method.weigh(state, updates)
    keys = keys_of(method, "experts", layer, expert)
    assert len(keys) == 4  # A and B of both projections
    for key in keys:
        assert weights.of(key) == pytest.approx((0.5, 0.5, 0.0))
    others = [ref.key for ref in method.federation.refs if ref.part == "experts" and ref.key not in keys]
    for key in others:
        assert weights.of(key) == pytest.approx((weights.of(key)[0],) * 3, rel=1e-12)
    # The same whoever is first, bit for bit.
    turned = method.weigh(state, [updates[2], updates[0], updates[1]])
    assert all(turned.of(key) == tuple(weights.of(key)[i] for i in (2, 0, 1)) for key in weights.by_key)


def test_a_client_that_serves_another_region_is_left_out(make_bench: Maker) -> None:
    method, state, update = server(make_bench)
    layer, expert = used_expert(update)
    updates = [update, changed(update, 1, layer, expert), changed(update, 2, layer, expert, inputs=-1.0)]
    key = keys_of(method, "experts", layer, expert)[0]
    assert method.weigh(state, updates).of(key) == pytest.approx((0.5, 0.5, 0.0))
    loose, state, _ = server(make_bench, theta_a=-1.0)
    # -1 is not above -1: exactly opposite inputs are never compared; a little less than that is enough.
    updates[2].statistics["inputs"][layer, expert] += 0.01
    assert loose.weigh(state, updates).of(key) == pytest.approx((1 / 3, 1 / 3, 1 / 3))


def test_a_client_without_tokens_does_not_move_an_expert(make_bench: Maker) -> None:
    method, state, update = server(make_bench)
    layer, expert = used_expert(update)
    two = [update, changed(update, 1, layer, expert)]
    three = [*two, changed(update, 2, layer, expert, counts=0.0, inputs=0.0, responses=0.0)]
    for key in keys_of(method, "experts", layer, expert):
        assert method.weigh(state, three).of(key) == (*method.weigh(state, two).of(key), 0.0)


def test_an_outlier_among_the_routers_counts_less_in_its_rows(make_bench: Maker) -> None:
    method, state, update = server(make_bench)
    layer, expert = used_expert(update)
    updates = [update, changed(update, 1, layer, expert), changed(update, 2, layer, expert, marginals=0.5)]
    found = method.weigh(state, updates).of(keys_of(method, "router", layer, expert)[0])
    p, h = (torch.stack([each.statistics[name] for each in updates]) for name in ("marginals", "stability"))
    assert found == pytest.approx(tuple(consistency_weights(p, h, 1.0)[:, layer, expert].tolist()))
    assert found[0] == found[1] > found[2]
    assert sum(found) == pytest.approx(1)


def test_statistics_that_are_missing_are_named(make_bench: Maker) -> None:
    method, state, update = server(make_bench)
    with pytest.raises(UpdateError, match=r"client 0 sent no statistic 'marginals'"):
        method.weigh(state, [replace(update, statistics={})])


# ---- what is sent


def test_statistics_and_the_reference_are_charged(run: Maker) -> None:
    ran = run()
    found = {
        (row["round"], row["direction"]): row["bytes"]
        for row in ran.rows("ledger")
        if row["group"] in ("statistics", "extras") and row["client_id"] == 1
    }
    up = 4 * LAYERS * EXPERTS * (2 + 1 + 2 * HIDDEN)  # shares, stability, tokens, mean inputs and responses
    down = 4 * LAYERS * EXPERTS  # P, once there is one
    assert found == {(1, "up"): up, (2, "up"): up, (2, "down"): down}


def test_only_experts_with_tokens_are_sent(make_bench: Maker) -> None:
    bench = make_bench(options(probe_examples=1))
    params, refs = bench.worker.initial_params(), bench.worker.engine.refs
    idle = 0
    for client in range(3):
        update, tensors = bench.train(client, 1, params)
        counts = update.statistics["counts"].sum(dim=-1)
        for ref in refs:
            is_idle = ref.part == "experts" and counts[ref.layer, ref.expert] == 0
            assert (ref.key in tensors) != is_idle
            idle += int(is_idle)
    assert idle > 0


def test_the_reference_is_the_cohorts_mixture(run: Maker) -> None:
    ran = run()
    replies = [update for _, update, _ in replies_of(ran, 2)]
    p, h = (torch.stack([each.statistics[name] for each in replies]) for name in ("marginals", "stability"))
    expected = reference_routing(consistency_weights(p, h, 1.0), p)
    assert torch.equal(ran.state.extras["reference"], expected.float())
    torch.testing.assert_close(ran.state.extras["reference"].sum(dim=-1), torch.ones(LAYERS))
    noted = [row for row in ran.rows("diagnostics") if row["kind"] == "routing_divergence"]
    assert {(row["round"], row["client_id"]) for row in noted} == {(2, 0), (2, 1), (2, 2)}
    assert set(ran.state.notes["alignment"]) == {"0", "1"}


def test_the_pull_counts_no_token_twice(make_bench: Maker) -> None:
    bench = make_bench(options())
    params = bench.worker.initial_params()
    plain, _ = bench.train(0, 1, params)
    pulled, _ = bench.train(0, 1, params, extras={"reference": torch.full((LAYERS, EXPERTS), 1 / EXPERTS)})
    assert pulled.expert_tokens.sum() == plain.expert_tokens.sum() > 0
    assert not torch.equal(pulled.statistics["marginals"], plain.statistics["marginals"])


# ---- the loss term


@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek_v3", "gpt_oss"])
def test_the_pull_is_a_divergence_that_reaches_only_the_router(
    family: str, tiny_model: Maker, random_batch: Callable[..., Batch]
) -> None:
    method = FedAlignMoe(FedAlignMoeConfig.model_validate(options(mu=0.5)))
    model = tiny_model(family)
    engine = TorchEngine(model, method.slots(facts_of(model)), 0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad and not parameter.any():
                parameter.add_(0.05)  # B of a LoRA, so that its A would have a gradient as well
    batch = random_batch()
    is_token = batch.attention_mask.reshape(-1).bool()
    reference = torch.softmax(torch.randn(LAYERS, EXPERTS, generator=torch.Generator().manual_seed(1)), dim=-1)
    session = session_of(engine, reference)
    with method.build(session), RouterWatch(model) as watch:
        _, output = response_loss(model, batch)
        p = [watch.probabilities(layer.index)[is_token].mean(dim=0).detach() for layer in moe_layers(model)]
        term = method.terms(session, batch, output)["routing"]
        term.backward()
        expected = 0.5 * sum(entropy(share.double(), row.double()) for share, row in zip(p, reference, strict=True)) / LAYERS
        assert float(term.detach()) == pytest.approx(float(expected), rel=1e-4)
        moved = {name for name, parameter in model.named_parameters() if parameter.grad is not None and parameter.grad.any()}
        routers = {ref.name for ref in engine.refs if ref.part == "router"}
        assert moved == routers
        # Where the batch routes as the reference says there is no pull.
        at_home = method.terms(session_of(engine, torch.stack(p), session.scratch), batch, output)["routing"]
        assert float(at_home.detach()) == pytest.approx(0, abs=1e-7)
    assert method.terms(SimpleNamespace(received_extras={}), batch, output) == {}  # type: ignore[arg-type]


def facts_of(model: Any) -> ModelFacts:
    return model_facts(model.config)


def session_of(engine: TorchEngine, reference: torch.Tensor, scratch: dict[str, Any] | None = None, **extras: Any) -> Any:
    plan = RoundPlan(round_idx=2, num_steps=1, learning_rate=0.1)
    return SimpleNamespace(
        engine=engine,
        task=ClientTask(client_id=0, plan=plan, keys=()),
        received_extras={"reference": reference} | extras,
        scratch={} if scratch is None else scratch,
    )


def test_rows_of_experts_on_which_a_client_is_an_outlier_are_not_pulled(
    tiny_model: Maker, random_batch: Callable[..., Batch]
) -> None:
    method = FedAlignMoe(FedAlignMoeConfig.model_validate(options(omega_mask=0.5)))
    model = tiny_model("qwen2_moe")
    engine = TorchEngine(model, method.slots(facts_of(model)), 0)
    kept = torch.tensor([[True, False, True, True], [True, True, True, True]])
    session = session_of(engine, torch.full((LAYERS, EXPERTS), 0.25), kept=kept)
    batch = random_batch()
    with method.build(session):
        _, output = response_loss(model, batch)
        method.terms(session, batch, output)["routing"].backward()
    found = torch.stack([layer.router.weight.grad.abs().sum(dim=1) > 0 for layer in moe_layers(model)])
    assert torch.equal(found, kept)


def test_the_mask_follows_from_the_last_omega(make_bench: Maker) -> None:
    method, state, update = server(make_bench, omega_mask=0.5, temperature=0.08)
    layer, expert = used_expert(update)
    updates = [update, changed(update, 2, layer, expert), changed(update, 3, layer, expert, marginals=0.01)]
    state = method.aggregate(state, Reduced(delta={}, extras={}, num_contributors={}), updates)
    p, h = (torch.stack([each.statistics[name] for each in updates]) for name in ("marginals", "stability"))
    relative = 3 * consistency_weights(p, h, 0.08)
    torch.testing.assert_close(state.memory["omega"][[0, 2, 3]], relative.float())
    task = session_of(SimpleNamespace(), torch.empty(0)).task  # type: ignore[arg-type]
    for client, row in ((0, relative[0]), (3, relative[2])):
        extras = method.task(state, replace(task, client_id=client)).extras
        assert torch.equal(extras["kept"], row.float() >= 0.5)
    assert bool(method.task(state, replace(task, client_id=1)).extras["kept"].all())  # never seen: nothing is held back
    assert not method.task(state, replace(task, client_id=3)).extras["kept"].all()


# ---- gates


def test_a_fitted_gate_comes_from_the_clients_gates_one_by_one(run: Maker) -> None:
    ran = run(rounds=1, router="distill", distill_ridge=1e-5)
    rows = run(rounds=1)
    replies = replies_of(ran, 1)
    updates = [update for _, update, _ in replies]
    start = ran.pool.worker.initial_params()
    p, h = (torch.stack([each.statistics[name] for each in updates]) for name in ("marginals", "stability"))
    omega = consistency_weights(p, h, 1.0)
    assert sorted(ran.state.params) == sorted(start)
    for at in range(LAYERS):
        keys = [f"model.layers.{at}.mlp.gate.weight[{e}]" for e in range(EXPERTS)]
        gates = [torch.cat([start[key] + tensors[key] for key in keys]).double() for _, _, tensors in replies]
        counts = torch.cat([update.statistics["counts"][at].flatten() for update in updates]).double()
        points = torch.cat([update.statistics["inputs"][at].flatten(0, 1) for update in updates]).double()
        mixed = sum(omega[i, at] * torch.softmax(points @ gate.T, dim=-1) for i, gate in enumerate(gates))
        assert isinstance(mixed, torch.Tensor)
        target = mixed / mixed.sum(dim=-1, keepdim=True)

        def far(params: Any, points: Any = points, target: Any = target, counts: Any = counts, keys: Any = keys) -> float:
            gate = torch.cat([params[key] for key in keys]).double()
            each = entropy(target, torch.softmax(points @ gate.T, dim=-1), axis=1)
            return float((counts * torch.from_numpy(each)).sum() / counts.sum())

        assert far(ran.state.params) < 0.2 * far(rows.state.params)


def test_router_rows_are_the_mean_by_omega(run: Maker) -> None:
    ran = run(rounds=1)
    start = ran.pool.worker.initial_params()
    replies = replies_of(ran, 1)
    p, h = (torch.stack([update.statistics[name] for _, update, _ in replies]) for name in ("marginals", "stability"))
    omega = consistency_weights(p, h, 1.0)
    for at in range(LAYERS):
        for e in range(EXPERTS):
            key = f"model.layers.{at}.mlp.gate.weight[{e}]"
            mean = sum(omega[i, at, e] * (start[key] + tensors[key]) for i, (_, _, tensors) in enumerate(replies))
            torch.testing.assert_close(ran.state.params[key], mean.float(), rtol=1e-6, atol=1e-7)


def test_a_local_router_never_leaves_its_client(run: Maker) -> None:
    ran = run(rounds=1, router="local")
    assert not any("gate.weight" in key for key in ran.state.params)
    assert all("gate.weight" not in key for _, _, tensors in ran.pool.replies for key in tensors)
    assert len(ran.private_files()) == 3
    assert "reference" in ran.state.extras
    rows = [row for row in ran.rows("evaluations") if row["view"] == "personal" and row["metric"] == "nll"]
    assert {row["client_id"] for row in rows if row["task"] == "client"} == {0, 1, 2}


def test_stability_between_rounds_needs_no_bytes(run: Maker) -> None:
    ran = run(stability="rounds")
    first, second = ([update.statistics["marginals"] for _, update, _ in replies_of(ran, r)] for r in (1, 2))
    assert all("stability" not in update.statistics for _, update, _ in ran.pool.replies)
    assert torch.equal(ran.state.memory["marginals"], torch.stack(second))
    h = torch.stack([agreement(now, before) for now, before in zip(second, first, strict=True)])
    p = torch.stack(second)
    assert torch.equal(ran.state.extras["reference"], reference_routing(consistency_weights(p, h, 1.0), p).float())


# ---- own versions


def expected_versions(ran: Any, theta: float, rounds: int, probed: int) -> dict[str, torch.Tensor]:
    """Every expert's tensors by the card's formulas over whole trained experts, not deltas: E <- sum_j gamma_ij E_j."""
    refs = [ref for ref in ran.pool.worker.engine.refs if ref.part == "experts"]
    held = {key: value.double() for key, value in ran.pool.worker.initial_params().items()}
    for round_idx in range(1, rounds + 1):
        replies = replies_of(ran, round_idx)
        clients = [update.client_id for _, update, _ in replies]
        scale = torch.tensor([update.num_examples / min(probed, update.num_examples) for _, update, _ in replies])
        found = align_experts(prototypes_of([update for _, update, _ in replies]), theta, 0.3, scale.double())
        made = dict(held)
        for ref in refs:
            at = ref.layer, ref.expert
            trained = [
                held.get(f"own/{c}/{ref.key}", held[ref.key]) + tensors.get(ref.key, torch.zeros(ref.shape))
                for c, (_, _, tensors) in zip(clients, replies, strict=True)
            ]

            def mean(weights: torch.Tensor, trained: list[torch.Tensor] = trained) -> torch.Tensor:
                return torch.stack([w * value for w, value in zip(weights, trained, strict=True)]).sum(dim=0)

            anchor = int(found.anchor[at])
            if anchor < 0:
                continue
            made[ref.key] = mean(found.gamma[(anchor, slice(None), *at)])
            for i, c in enumerate(clients):
                if float(found.counts[(i, *at)]) == 0:
                    continue
                made.pop(f"own/{c}/{ref.key}", None)
                if float(found.gamma[(anchor, i, *at)]) == 0:
                    made[f"own/{c}/{ref.key}"] = mean(found.gamma[(i, slice(None), *at)])
        held = made
    return {key: value for key, value in held.items() if any(key.endswith(ref.key) for ref in refs)}


@pytest.mark.parametrize("theta", [0.9, pytest.param(1.0, marks=pytest.mark.slow)])
def test_clients_outside_a_majority_keep_corrected_versions(theta: float, run: Maker) -> None:
    ran = run(theta=theta, personal=True, probe_examples=2)
    expected = expected_versions(ran, theta, 2, probed=2)
    found = {key: value for key, value in ran.state.params.items() if key in expected or key.startswith("own/")}
    own = {key for key in expected if key.startswith("own/")}
    assert len(own) > 4
    assert sorted(found) == sorted(expected)
    for key, value in expected.items():
        torch.testing.assert_close(found[key].double(), value, rtol=1e-5, atol=1e-7)
    # Whoever has a version of its own is sent that one.
    sent = {f"own/{task.client_id}/{key}": name for task, _, _ in replies_of(ran, 2) for key, name in task.addresses.items()}
    assert sent
    assert all(asked == name for asked, name in sent.items())
    counted = {row["client_id"]: row["values"] for row in ran.rows("diagnostics") if row["kind"] == "own_experts"}
    for client, by_layer in counted.items():
        refs = [ref for ref in ran.pool.worker.engine.refs if f"own/{client}/{ref.key}" in own]
        assert by_layer == {str(layer): len({ref.expert for ref in refs if ref.layer == layer}) for layer in range(LAYERS)}


def test_an_own_version_is_what_its_client_is_judged_with(run: Maker) -> None:
    ran = run(theta=0.9, personal=True, probe_examples=2)
    nll = {
        (row["view"], row["client_id"]): row["total"] / row["weight"]
        for row in ran.rows("evaluations")
        if row["task"] == "client" and row["metric"] == "nll"
    }
    assert set(nll) == {(view, client) for view in ("personal", "global") for client in range(3)}
    assert any(nll["personal", client] != nll["global", client] for client in range(3))


# ---- regions


def test_regions_are_made_once_and_sent_from_then_on(run: Maker) -> None:
    ran = run(regions=2)
    assert ran.state.extras["centroids"].shape == (LAYERS, EXPERTS, 2, HIDDEN)
    tasks = {task.round_idx: set(task.extra_keys) for task, _, _ in ran.pool.replies}
    assert tasks == {1: set(), 2: {"reference", "centroids"}}
    counts = torch.stack([update.statistics["counts"] for _, update, _ in replies_of(ran, 2)])
    inputs = torch.stack([update.statistics["inputs"] for _, update, _ in replies_of(ran, 2)])
    size = counts.sum(dim=0)[..., None]
    mean = (counts[..., None] * inputs).sum(dim=0) / size.clamp_min(1)  # Lloyd's step over the whole federation
    is_used = (size > 0).expand_as(mean)
    torch.testing.assert_close(ran.state.extras["centroids"][is_used], mean[is_used], rtol=1e-4, atol=1e-5)


# ---- options


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"theta": -0.1}, "theta"),
        ({"theta": 1.5}, "theta"),
        ({"theta": [0.3, 2.0]}, "theta"),
        ({"theta_a": 1.0}, "theta_a"),
        ({"mu": -1}, "mu"),
        ({"temperature": 0}, "temperature"),
        ({"router": "mode"}, "router"),
        ({"lora": ["attention"]}, "theta has no effect where experts are not trained"),
        ({"full": []}, "mu has no effect where the router is not trained"),
        ({"full": [], "mu": 0, "router": "rows"}, "router has no effect where the router is not trained"),
        ({"lora": ["router", "experts"], "full": []}, "needs a router in full"),
        ({"lora": ["router", "experts"], "full": [], "router": "distill"}, "needs a router in full"),
        ({"theta": None, "theta_a": 0.5}, "theta_a has no effect"),
        ({"theta": None, "personal": True}, "personal has no effect"),
        ({"theta": None, "regions": 2}, "regions has no effect"),
        ({"mu": 0, "omega_mask": 0.5}, "omega_mask has no effect"),
        ({"mu": 0, "router": "mean", "temperature": 0.5}, "temperature has no effect"),
        ({"mu": 0, "router": "local", "stability": "off"}, "stability has no effect"),
        ({"distill_steps": 9}, "distill_steps has no effect"),
        ({"distill_ridge": 9}, "distill_ridge has no effect"),
        ({"theta": None, "mu": 0, "probe_examples": 3}, "probe_examples has no effect"),
    ],
)
def test_options_that_cannot_be_or_do_nothing_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        FedAlignMoeConfig.model_validate({"name": "fedalign_moe"} | given)


def test_a_list_of_thresholds_needs_one_a_layer(tiny_model: Maker) -> None:
    facts = facts_of(tiny_model("qwen2_moe"))
    config = FedAlignMoeConfig.model_validate({"theta": [0.3, 0.4, 0.5]})
    with pytest.raises(MethodError, match="theta lists 3 values, and this model has 2 MoE layers"):
        FedAlignMoe(config).slots(facts)
    assert FedAlignMoe(FedAlignMoeConfig.model_validate({"theta": [0.3, 0.4]})).slots(facts).splits_router


def test_it_says_that_its_scores_are_reconstructed() -> None:
    assert "scores" in FedAlignMoe.reconstructed
    assert "no reproduction" in FedAlignMoe.reconstructed


@pytest.mark.slow
@pytest.mark.parametrize(
    "given",
    [
        {"theta": 0.95},
        {"theta": [0.3, 1.0]},
        {"theta": None},
        {"theta_a": 0.97},
        {"regions": 2},
        {"temperature": 0.02},
        {"stability": "off"},
        {"mu": 2.0},
        {"omega_mask": 1.0},
        {"router": "distill"},
        {"router": "mean"},
        {"probe_examples": 2},
        {"lora": ["attention"], "full": ["experts", "router"]},
    ],
)
def test_every_option_changes_something(given: dict[str, Any], run: Maker) -> None:
    default, other = run(), run(**given)
    same = all(
        key in other.state.params and torch.equal(value, other.state.params[key]) for key, value in default.state.params.items()
    )
    assert not same


@pytest.mark.slow
@pytest.mark.parametrize(
    "given",
    [
        {"theta": 0.9, "personal": True, "stability": "rounds", "omega_mask": 0.9, "regions": 2},
        {"router": "distill", "theta": None},
        {"router": "local", "theta": [0.9, 0.3], "personal": True},
    ],
)
def test_a_resumed_run_and_a_permuted_cohort_do_as_a_straight_one(
    given: dict[str, Any], run: Maker, make_job: Maker, run_job: Maker, assert_same_bits: Maker
) -> None:
    straight, job = run(**given), replace(make_job(options(**given)), rounds=2)
    run_job(replace(job, rounds=1))
    resumed = run_job(job)
    assert {task.round_idx for task, _, _ in resumed.pool.replies} == {2}
    for part in ("params", "extras", "memory"):
        assert_same_bits(getattr(resumed.state, part), getattr(straight.state, part))
    assert resumed.state.notes == straight.state.notes

    def turn(loop: Any) -> None:
        loop._method.select = lambda state, plan, cohort: (2, 0, 1)

    turned = run_job(replace(make_job(options(**given)), rounds=1), before=turn)
    first = run(rounds=1, **given)
    assert sorted(turned.state.params) == sorted(first.state.params)
    for key, value in first.state.params.items():
        torch.testing.assert_close(turned.state.params[key], value, rtol=2e-7, atol=1e-9)
    assert_same_bits(turned.state.extras, first.state.extras)
