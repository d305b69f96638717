"""The exact checks of FedAMoLE's card, on rounds that are really run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import save_file

from fedgraft.aggregation.expert_choice import balance_of, choose_clients, scores_of
from fedgraft.aggregation.fedamole import FedAMoLE, FedAMoLEConfig, pool_name
from fedgraft.data.batches import eval_batches
from fedgraft.data.prepared import PreparedData
from fedgraft.errors import MethodError
from fedgraft.moe.families import model_facts
from fedgraft.moe.mixture import MixtureWatch, active_slots, attach_mixtures, mixtures_of
from fedgraft.moe.slots import count_slot_elements
from fedgraft.platform.model_sizes import size_slots
from fedgraft.training.evaluate import score_batches
from fedgraft.types import Federation, Params, RoundPlan, ServerState, Slots

Maker = Callable[..., Any]
MAPS = [f"model.layers.{layer}.self_attn.{name}" for layer in range(2) for name in ("q_proj", "v_proj")]
SIZES = {"q_proj": 32 + 32, "v_proj": 32 + 16}


def options(**more: Any) -> dict[str, Any]:
    return {"name": "fedamole", "adapter": {"rank": 2, "alpha": 4.0, "dropout": 0.0}} | more


def held_by(ran: Any, round_idx: int) -> dict[str, list[list[int]]]:
    """Experts by map and client in a round, from the tasks themselves."""
    found: dict[str, list[list[int]]] = {path: [[] for _ in range(3)] for path in MAPS}
    for task, _, _ in ran.pool.replies:
        if task.round_idx == round_idx:
            for name in task.addresses.values():
                _, path, expert, side = name.split("/")
                if side == "lora_A":
                    found[path][task.client_id].append(int(expert))
    return found


@pytest.fixture(scope="module")
def played() -> dict[str, Any]:
    return {}


@pytest.fixture
def play(played: dict[str, Any], make_job: Maker, run_job: Maker) -> Maker:
    """Run some rounds of three clients, each setting once for all tests."""

    def run(*, rounds: int = 1, federation: dict[str, Any] | None = None, **more: Any) -> Any:
        key = repr((rounds, federation, sorted(more.items())))
        if key not in played:
            played[key] = run_job(replace(make_job(options(**more), federation=federation), rounds=rounds))
        return played[key]

    return run


def first_state(ran: Any) -> ServerState:
    """The state before round 1, made anew."""
    method: FedAMoLE = ran.pool.worker.method
    method.federation = _federation(ran)
    return method.init(ran.pool.worker.initial_params(), 3)


def _federation(ran: Any) -> Any:
    worker = ran.pool.worker
    return Federation(
        facts=worker.engine.facts, refs=worker.engine.refs, groups=worker.groups, run_seed=7, rounds=2, num_examples=(8, 11, 14)
    )


def sent_to(task: Any, params: Params) -> Params:
    return {key: params[task.addresses.get(key, key)] for key in task.keys}


# ---- who holds what


def test_clients_hold_what_experts_chose_within_the_bounds(play: Maker) -> None:
    ran = play(num_experts=7, min_experts=2, max_experts=6)
    for held in (held_by(ran, 1), ran.state.notes["held"]):
        assert list(held) == MAPS
        for by_client in held.values():
            assert Counter(expert for own in by_client for expert in own) == dict.fromkeys(range(7), 2)
            assert all(2 <= len(own) <= 6 for own in by_client)
    sizes = {tuple(len(own) for own in by_client) for by_client in held_by(ran, 1).values()}
    assert len(sizes) > 1  # maps differ in how many a client holds


def test_the_next_choice_is_the_best_for_what_clients_sent(play: Maker) -> None:
    ran = play()
    held, replies = held_by(ran, 1), ran.pool.replies
    for path in MAPS:
        psi = torch.stack([update.statistics[f"{path}/psi"] for _, update, _ in replies])
        phi = torch.zeros(9, 2)
        for expert in range(9):
            rows = [
                update.statistics[f"{path}/phi"][held[path][task.client_id].index(expert)]
                for task, update, _ in replies
                if expert in held[path][task.client_id]
            ]
            phi[expert] = torch.stack(rows).mean(dim=0)
        torch.testing.assert_close(ran.state.memory[f"phi/{path}"], phi)
        torch.testing.assert_close(ran.state.memory[f"psi/{path}"], psi)
        chosen = choose_clients(scores_of(phi, psi), per_expert=2, low=2, high=8)
        assert ran.state.notes["held"][path] == [chosen[:, client].nonzero().flatten().tolist() for client in range(3)]


@pytest.mark.slow
def test_embeddings_are_means_over_the_tokens_of_the_trained_model(play: Maker, data_folder: Path) -> None:
    ran = play(embedding_fraction=1.0, targets=["v_proj"])
    task, update, delta = ran.pool.replies[-1]
    engine = ran.pool.worker.engine
    start = first_state(ran).params
    trained = {key: value + delta[key] for key, value in sent_to(task, start).items()}
    engine.load(trained)
    path = "model.layers.1.self_attn.v_proj"
    split = PreparedData.open(data_folder).split(task.client_id, "train")
    inputs: list[torch.Tensor] = []
    linear = engine.model.get_submodule(path)
    handle = linear.register_forward_pre_hook(lambda module, args: inputs.append(args[0][0]))
    counts = {p: sum(key.startswith(f"{p}.mixture.lora_A[") for key in task.keys) for p in mixtures_of(engine.model)}
    with torch.no_grad(), active_slots(engine.model, counts):
        for i in range(len(split)):
            batch = split.batch([i], 0)
            engine.model(input_ids=batch.input_ids)
    handle.remove()
    tokens = torch.cat(inputs)
    psi = (tokens @ trained[f"{path}.mixture.token_projection"].T).mean(dim=0)
    torch.testing.assert_close(update.statistics[f"{path}/psi"], psi, atol=1e-5, rtol=1e-4)
    for slot in range(counts[path]):
        phi = (tokens @ trained[f"{path}.mixture.lora_A[{slot}]"][0].T).mean(dim=0)
        torch.testing.assert_close(update.statistics[f"{path}/phi"][slot], phi, atol=1e-5, rtol=1e-4)


@pytest.mark.slow
def test_the_server_may_multiply_mean_inputs_itself(play: Maker) -> None:
    ran = play(embeddings="server")
    held, path = held_by(ran, 1), MAPS[1]
    inputs = torch.stack([update.statistics[f"{path}/inputs"] for _, update, _ in ran.pool.replies])
    params, memory = ran.state.params, ran.state.memory
    assert set(ran.pool.replies[0][1].statistics) == {f"{each}/inputs" for each in MAPS}
    torch.testing.assert_close(memory[f"psi/{path}"], inputs @ params[f"{path}.mixture.token_projection"].T)
    for expert in range(9):
        holders = [client for client in range(3) if expert in held[path][client]]
        expected = params[pool_name(path, expert, "lora_A")][0] @ inputs[holders].mean(dim=0)
        torch.testing.assert_close(memory[f"phi/{path}"][expert], expected)


@pytest.mark.slow
def test_who_holds_what_under_each_ablation(play: Maker) -> None:
    ran = {arch: play(arch=arch) if arch != "rsea" else play() for arch in ("rsea", "static", "random", "homogeneous")}
    first = {arch: held_by(each, 1) for arch, each in ran.items()}
    then = {arch: each.state.notes["held"] for arch, each in ran.items()}
    assert first["static"] == first["rsea"] == first["random"] == then["static"]
    assert then["random"] != first["random"]
    assert then["rsea"] not in (first["rsea"], then["random"])
    for held in (first["homogeneous"], then["homogeneous"]):
        assert all(len(own) == 6 for by_client in held.values() for own in by_client)
    assert first["homogeneous"] != then["homogeneous"]
    assert not ran["static"].state.memory
    assert not ran["random"].pool.replies[0][1].statistics


# ---- what is averaged, sent and kept


def test_experts_are_the_mean_over_their_holders_and_the_rest_over_all(play: Maker) -> None:
    ran = play(num_experts=7, min_experts=2, max_experts=6)
    start = first_state(ran).params
    deltas: dict[str, list[torch.Tensor]] = {}
    for task, _, delta in ran.pool.replies:
        assert set(delta) == set(task.keys)
        for key, value in delta.items():
            deltas.setdefault(task.addresses.get(key, key), []).append(value.double())
    assert set(deltas) == set(ran.state.params) == set(start)
    for name, values in deltas.items():
        assert len(values) == (2 if name.startswith("pool/") else 3)
        expected = (start[name].double() + sum(values) / len(values)).float()
        torch.testing.assert_close(ran.state.params[name], expected, rtol=2e-7, atol=1e-9)
    assert any(not torch.equal(ran.state.params[name], start[name]) for name in start if name.startswith("pool/"))


def test_an_expert_of_one_client_passes_through_and_one_of_nobody_stays(play: Maker, assert_same_bits: Maker) -> None:
    ran = play(num_experts=9, clients_per_expert=1, federation={"cohort_size": 2})
    start = first_state(ran).params
    touched: set[str] = set()
    for task, _, delta in ran.pool.replies:
        for key, name in task.addresses.items():
            assert name not in touched
            touched.add(name)
            assert torch.equal(ran.state.params[name], (start[name].double() + delta[key].double()).float())
    left = {name for name in start if name.startswith("pool/")} - touched
    assert left
    assert_same_bits({name: ran.state.params[name] for name in left}, {name: start[name] for name in left})
    (absent,) = {0, 1, 2} - {task.client_id for task, _, _ in ran.pool.replies}
    assert ran.state.notes["seen"] == sorted({0, 1, 2} - {absent})
    for path in MAPS:
        assert not ran.state.memory[f"psi/{path}"][absent].any()
        assert all(ran.state.memory[f"psi/{path}"][client].any() for client in ran.state.notes["seen"])


@pytest.mark.slow
def test_an_absent_client_keeps_its_last_embedding(make_job: Maker, run_job: Maker) -> None:
    def only(clients: dict[int, tuple[int, ...]]) -> Callable[[Any], None]:
        def before(loop: Any) -> None:
            loop._method.select = lambda state, plan, cohort: clients[plan.round_idx]

        return before

    job = replace(make_job(options()), rounds=2)
    ran = run_job(job, before=only({1: (0, 1, 2), 2: (0,)}))
    by_task = {(task.round_idx, task.client_id): update for task, update, _ in ran.pool.replies}
    for path in MAPS:
        psi = ran.state.memory[f"psi/{path}"]
        assert torch.equal(psi[0], by_task[2, 0].statistics[f"{path}/psi"])
        assert torch.equal(psi[2], by_task[1, 2].statistics[f"{path}/psi"])


def test_a_client_pays_for_its_own_experts_t_and_the_shared_lora(play: Maker) -> None:
    ran = play(num_experts=7, min_experts=2, max_experts=6)
    held, rank = held_by(ran, 1), 2
    found: Counter[tuple[int, str, str]] = Counter()
    for row in ran.rows("ledger"):
        found[row["client_id"], row["direction"], row["group"]] += row["bytes"]
    for client in range(3):
        num_held = {path: len(held[path][client]) for path in MAPS}
        experts = 4 * rank * sum(num_held[path] * SIZES[path.rpartition(".")[2]] for path in MAPS)
        common = 4 * rank * sum(SIZES[path.rpartition(".")[2]] + 32 for path in MAPS)
        for direction in ("down", "up"):
            assert found[client, direction, "assigned"] == experts
            assert found[client, direction, "shared"] == common
        assert found[client, "up", "statistics"] == 4 * rank * sum(num_held[path] + 1 for path in MAPS)
    counted = count_slot_elements(ran.pool.worker.engine.facts, Slots(mixture=ran.pool.worker.method.slots(None).mixture))
    assert 4 * counted["mixture_gate"] == 4 * rank * 32 * len(MAPS)


def test_without_domain_experts_it_is_fedavg_of_a_lora(
    make_job: Maker, run_job: Maker, tmp_path: Path, assert_same_bits: Maker
) -> None:
    adapter = {"rank": 2, "alpha": 4.0, "dropout": 0.2}
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    plain = make_job({"name": "fedavg", "adapter": adapter})
    ours = make_job(
        {"name": "fedamole", "adapter": adapter, "targets": targets, "num_experts": 0, "weights": "examples", "judge": "pool",
         "lr_decay": 1.0}
    )  # fmt: skip

    def rename(key: str) -> str:
        return key.replace("lora_A.shared.weight", "mixture.shared_A").replace("lora_B.shared.weight", "mixture.shared_B")

    first = run_job(replace(plain, rounds=1, folder=tmp_path / "first")).pool.worker.initial_params()
    jobs = []
    for job, name in ((plain, lambda key: key), (ours, rename)):
        save_file({name(key): value for key, value in first.items()}, tmp_path / f"{job.label}.safetensors")
        jobs.append(run_job(replace(job, rounds=2, start=tmp_path / f"{job.label}.safetensors")))
    fedavg, fedamole = jobs
    assert_same_bits(fedamole.state.params, {rename(key): value for key, value in fedavg.state.params.items()})
    assert fedamole.rows("evaluations") == fedavg.rows("evaluations")
    assert [row["bytes"] for row in fedamole.rows("ledger")] == [row["bytes"] for row in fedavg.rows("ledger")]


# ---- what is judged


def test_a_client_is_judged_with_what_it_trained(play: Maker, data_folder: Path) -> None:
    ran = play()
    start = first_state(ran).params
    rows = {row["client_id"]: row["total"] for row in _personal(ran)}
    engine, data = ran.pool.worker.engine, PreparedData.open(data_folder)
    for task, _, delta in ran.pool.replies:
        engine.load(engine.initial)
        engine.load({key: value + delta[key] for key, value in sent_to(task, start).items()})
        expected = _nll(engine, data, task.client_id, held_by(ran, 1))
        assert rows[task.client_id] == pytest.approx(expected, rel=1e-5)


def test_or_with_what_the_server_would_send_it(play: Maker, data_folder: Path) -> None:
    ran = play(judge="pool")
    rows = {row["client_id"]: row["total"] for row in _personal(ran)}
    engine, data, held = ran.pool.worker.engine, PreparedData.open(data_folder), ran.state.notes["held"]
    params = ran.state.params
    common = {key: value for key, value in params.items() if not key.startswith("pool/")}
    for client in range(3):
        engine.load(engine.initial)
        engine.load(common)
        for path in MAPS:
            for slot, expert in enumerate(held[path][client]):
                for side in ("lora_A", "lora_B"):
                    engine.load({f"{path}.mixture.{side}[{slot}]": params[pool_name(path, expert, side)]})
        assert rows[client] == pytest.approx(_nll(engine, data, client, held), rel=1e-5)
    assert all(b"mixture" not in kept for kept in ran.private_files().values())


def test_the_global_model_has_no_domain_expert(play: Maker, data_folder: Path) -> None:
    ran = play()
    rows = [row for row in ran.rows("evaluations") if (row["view"], row["task"], row["metric"]) == ("global", "client", "nll")]
    engine = ran.pool.worker.engine
    engine.load({key: value for key, value in ran.state.params.items() if not key.startswith("pool/")})
    nobody: dict[str, list[list[int]]] = {path: [[], [], []] for path in MAPS}
    for row in rows:
        expected = _nll(engine, PreparedData.open(data_folder), row["client_id"], nobody)
        assert row["total"] == pytest.approx(expected, rel=1e-5)
    assert len(rows) == 3


def _personal(ran: Any) -> list[dict[str, Any]]:
    return [row for row in ran.rows("evaluations") if (row["view"], row["task"], row["metric"]) == ("personal", "client", "nll")]


def _nll(engine: Any, data: PreparedData, client: int, held: dict[str, Any]) -> float:
    counts = {path: len(by_client[client]) for path, by_client in held.items()}
    with active_slots(engine.model, counts):
        return score_batches(engine.model, eval_batches(data.split(client, "test"), 32, 0))["nll"].total


# ---- options


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "beside"),
    [
        ({"top_k": 1}, {}),
        ({"balance": 5.0}, {}),
        ({"noise": 3.0}, {}),
        ({"embedding_fraction": 1.0}, {}),
        ({"embedding_examples": 1}, {"embedding_fraction": 1.0}),
        ({"weights": "examples"}, {}),
        ({"clients_per_expert": 1}, {"num_experts": 9}),
        ({"num_experts": 8}, {"num_experts": 9}),
        ({"min_experts": 5}, {"max_experts": 7}),
        ({"max_experts": 7}, {"min_experts": 5}),
        ({"targets": ["q_proj", "o_proj"]}, {}),
    ],
    ids=str,
)
def test_every_switch_changes_something(changes: dict[str, Any], beside: dict[str, Any], play: Maker) -> None:
    def seen(**more: Any) -> dict[str, Any]:
        state = play(**more).state
        return {key: value.tolist() for key, value in (state.params | state.memory).items()}

    assert seen(**(beside | changes)) != seen(**beside)


def test_the_learning_rate_falls_from_round_to_round() -> None:
    method, state = FedAMoLE(FedAMoLEConfig(lr_decay=0.5)), ServerState(params={})
    plans = [method.plan(state, RoundPlan(round_idx=r, num_steps=1, learning_rate=0.8)) for r in (1, 2, 4)]
    assert [plan.learning_rate for plan in plans] == [0.8, 0.4, 0.1]


def test_the_balance_term_leaves_padding_out_and_sums_over_maps(tiny_model: Maker, random_batch: Maker) -> None:
    method = FedAMoLE(FedAMoLEConfig.model_validate(options(balance=0.25, max_experts=3)))
    model: Any = tiny_model("qwen2_moe")
    mixture_spec = method.slots(model_facts(model.config)).mixture
    assert mixture_spec is not None
    attach_mixtures(model, mixture_spec)
    generator = torch.Generator().manual_seed(1)
    for mixture in mixtures_of(model).values():
        for parameter in mixture.parameters():
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.4)
    batch = random_batch((9, 5))
    session: Any = SimpleNamespace(scratch={})
    assert method.terms(session, batch, None) == {}
    with MixtureWatch(model) as watch:
        rows = []
        for row, length in ((0, 9), (1, 5)):
            model(input_ids=batch.input_ids[row : row + 1, :length])
            rows.append((dict(watch.probabilities), dict(watch.chosen)))
        session.scratch["watch"] = watch
        model(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
        found = method.terms(session, batch, None)["balance"]
    expected = sum(
        balance_of(torch.cat([probs[path] for probs, _ in rows]), torch.cat([chosen[path] for _, chosen in rows]))
        for path in MAPS
    )
    torch.testing.assert_close(found, 0.25 * expected)
    assert found.requires_grad


def test_every_expert_of_the_pool_is_drawn_on_its_own_and_adds_nothing_yet(play: Maker) -> None:
    start = first_state(play()).params
    drawn = [start[pool_name(path, expert, "lora_A")] for path in MAPS for expert in range(9)]
    assert all(0 < value.abs().max() <= 32**-0.5 for value in drawn)
    assert not any(torch.equal(value, other) for i, value in enumerate(drawn) for other in drawn[:i])
    assert not any(start[pool_name(path, expert, "lora_B")].any() for path in MAPS for expert in range(9))


def test_balance_is_noted_between_even_and_collapse(play: Maker) -> None:
    ran = play()
    held = held_by(ran, 1)
    notes = [row for row in ran.rows("diagnostics") if row["kind"] == "expert_pool"]
    assert [row["client_id"] for row in notes] == [0, 1, 2]
    for row in notes:
        values = row["values"]
        assert values["maps"] == MAPS
        assert values["held"] == [held[path][row["client_id"]] for path in MAPS]
        assert all(0.5 < value < len(own) for value, own in zip(values["balance"], values["held"], strict=True))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"num_experts": 2}, "2 experts at 2 clients each make 4 places"),
        ({"num_experts": 13}, "13 experts at 2 clients each make 26 places"),
        ({"num_experts": 3, "clients_per_expert": 3, "min_experts": 4}, "3 experts at 3 clients"),
        ({"clients_per_expert": 4}, "choose 4 clients, and there are 3"),
    ],
)
def test_a_pool_that_clients_cannot_hold_is_refused(more: dict[str, Any], message: str, play: Maker) -> None:
    with pytest.raises(MethodError, match=message) as caught:
        play(**more)
    if more.get("num_experts") in (2, 13):
        assert "num_experts to 3 at least and 12 at most" in caught.value.hint


@pytest.mark.slow
@pytest.mark.parametrize("num_experts", [3, 12])
def test_the_bounds_of_the_pool_themselves_work(num_experts: int, play: Maker) -> None:
    ran = play(num_experts=num_experts)
    assert all(len(own) == 2 * num_experts / 3 for by_client in ran.state.notes["held"].values() for own in by_client)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"num_experts": 0, "arch": "rsea", "balance": 0.1}, "arch, balance has no effect without domain experts"),
        ({"arch": "static", "noise": 1.0}, "noise has no effect with arch: static"),
        ({"arch": "random", "embedding_examples": 3}, "embedding_examples has no effect with arch: random"),
        ({"min_experts": 5, "max_experts": 4}, "min_experts 5 is above max_experts 4"),
        ({"targets": []}, "targets"),
    ],
)
def test_options_without_an_effect_are_refused(more: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        FedAMoLEConfig.model_validate(options(**more))


def test_a_pool_of_the_default_size_fits_who_is_to_hold_it() -> None:
    for more, num_clients, expected in (
        ({"clients_per_expert": 4, "max_experts": 6}, 5, 7),  # 8 experts would be 32 places, and 5 clients take 30
        ({"clients_per_expert": 2}, 10, 30),
        ({"clients_per_expert": 4}, 5, 8),
    ):
        method = FedAMoLE(FedAMoLEConfig.model_validate(options(**more)))
        assert method._pool_size(num_clients) == expected


def test_dropout_is_the_sources_where_only_a_rank_is_given() -> None:
    config = FedAMoLEConfig.model_validate({"adapter": {"rank": 4}})
    assert (config.adapter.rank, config.adapter.dropout) == (4, FedAMoLEConfig().adapter.dropout) == (4, 0.05)
    again = FedAMoLEConfig.model_validate(config.to_options())
    assert again == config
    assert FedAMoLEConfig.model_validate({"adapter": {"dropout": 0.0}}).adapter.dropout == 0


def test_batches_stay_whole_only_where_choices_are_balanced() -> None:
    for more, expected in (({}, True), ({"balance": 0.0}, False), ({"num_experts": 0}, False)):
        assert FedAMoLE(FedAMoLEConfig.model_validate(options(**more))).uses_batch_statistics is expected


def test_a_dry_run_counts_its_slots_as_lora(tiny_config: Maker) -> None:
    method = FedAMoLE(FedAMoLEConfig.model_validate(options(max_experts=5)))
    config = tiny_config("qwen2_moe")
    sizes = size_slots(method, config, "float32", model_facts(config))
    maps = 2 * 2 * (64 + 48)  # rank 2, two layers: q and v
    assert (sizes.lora, sizes.full, sizes.graft) == (6 * maps + 2 * 4 * 32, 0, 0)
    assert sizes.trained_wide == sizes.sent == sizes.lora
