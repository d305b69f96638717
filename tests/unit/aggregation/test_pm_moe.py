"""PM-MoE: stage 1 is the base method, modules travel once and stay as they are, and a gate that picks oneself changes nothing."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file

from fedgraft.aggregation.pm_moe import PmMoe, PmMoeConfig, energies, kept_experts
from fedgraft.data.batches import eval_batches
from fedgraft.errors import MethodError
from fedgraft.moe.base import open_base
from fedgraft.training.evaluate import score_batches
from fedgraft.types import Broadcast, EvaluationTask, Federation, ParamRef, Params, RoundPlan

Maker = Callable[..., Any]
RANK, PLACES = 2, 4
MODULE_VALUES = 2 * RANK * (2 * (32 + 32) + 2 * (32 + 16))  # two layers; q and o, k and v
OPTIONS: dict[str, Any] = {
    "name": "pm_moe",
    "adapter": {"rank": RANK, "alpha": 4.0},
    "num_experts": PLACES,
    "gate_hidden": [6],
    "private_lr_scale": 3.0,
}
AVAILABLE, KEPT = "pm_moe/available", "pm_moe/kept"


@pytest.fixture(scope="module")
def runs() -> dict[str, Any]:
    return {}


@pytest.fixture
def run(runs: dict[str, Any], make_job: Maker, run_job: Maker) -> Maker:
    """A run of two rounds, judged after each, with some options; run once for the same ones."""

    def make(rounds: int = 2, cohort_size: int | None = None, **options: Any) -> Any:
        key = json.dumps([rounds, cohort_size, options], sort_keys=True)
        if key not in runs:
            federation = {} if cohort_size is None else {"cohort_size": cohort_size}
            job = make_job(OPTIONS | options, federation=federation)
            runs[key] = run_job(replace(job, rounds=rounds, evaluation=job.evaluation.model_copy(update={"every": 1})))
        return runs[key]

    return make


def private_of(ran: Any, client: int, round_idx: int) -> Params:
    found: Params = load_file(ran.job.worker.state_folder / f"{client:06d}" / f"round-{round_idx:06d}.safetensors")
    return found


def own_module(private: Params, place: int) -> Params:
    """A private LoRA by the names of its slots in one place, written down by hand."""
    found = {}
    for key, value in private.items():
        if ".personal." in key and not key.startswith("optimizer/"):
            path, _, side = key.removesuffix(".personal.weight").rpartition(".")
            found[f"{path}.base_layer.mixture.{side}[{place}]"] = value[None]
    assert sum(value.numel() for value in found.values()) == MODULE_VALUES
    return found


def nll_of(ran: Any, client: int, private: Params, round_idx: int = 2) -> float:
    """The client's test NLL with this private state."""
    worker, state = ran.pool.worker, ran.state
    worker._store.write(client, 99, private)
    keys = tuple(key for key in state.params if key in worker.groups)
    task = EvaluationTask(round_idx=round_idx, view="personal", tasks=("client",), keys=keys, client_id=client, state_version=99)
    reply, _ = worker.evaluate(task, Broadcast(round_idx=round_idx, params=state.params, extras=state.extras))
    return next(float(row.value.mean) for row in reply.rows if row.metric == "nll")


def measured(ran: Any, round_idx: int) -> dict[int, float]:
    wanted = (round_idx, "personal", "client", "nll")
    return {
        row["client_id"]: row["total"] / row["weight"]
        for row in ran.rows("evaluations")
        if (row["round"], row["view"], row["task"], row["metric"]) == wanted
    }


# ---- EDM


def test_energies_are_the_formulas() -> None:
    logits, labels = torch.tensor([[1.0, 2.0, 0.5], [0.0, 0.0, 0.0]]), torch.tensor([1, 2])
    ce = energies(logits, labels, "ce", 1.0)
    torch.testing.assert_close(ce, -torch.log_softmax(logits.double(), dim=-1)[[0, 1], labels], atol=1e-6, rtol=1e-6)
    free = energies(logits, labels, "free_energy", 2.0)
    torch.testing.assert_close(free, -2 * torch.log(torch.exp(logits.double() / 2).sum(dim=-1)), atol=1e-6, rtol=1e-6)


def test_edm_always_keeps_oneself() -> None:
    energy = {0: 2.0, 1: 5.0, 3: 4.0, 4: 2.5}
    assert kept_experts(energy, 1, 0.0, None) == (0, 1, 3, 4)
    assert kept_experts(energy, 0, 0.0, None) == (0,)
    assert kept_experts(energy, 0, 0.5, None) == (0, 4)
    assert kept_experts(energy, 1, 0.0, 0.25) == (0, 1)
    assert kept_experts(energy, 1, 0.0, 0.5) == (0, 1, 4)
    assert kept_experts(energy, 0, 0.0, 1.0) == (0, 1, 3, 4)
    assert kept_experts({0: 1.0, 2: 1.0}, 2, 0.0, None) == (0, 2)  # a duplicate of oneself is as good


@pytest.mark.parametrize("edm", ["ce", "free_energy"])
def test_a_random_module_is_dropped_and_a_duplicate_kept(edm: str, make_bench: Maker) -> None:
    bench = make_bench(OPTIONS | {"edm": edm}, learning_rate=0.01)
    params = bench.worker.initial_params()
    bench.train(1, 1, params)
    own = own_module(bench.private(1), 1)
    generator = torch.Generator().manual_seed(0)
    noise = {key.replace("[1]", "[3]"): 3 * torch.randn(value.shape, generator=generator) for key, value in own.items()}
    twin = {key.replace("[1]", "[0]"): value for key, value in own.items()}
    extras = {f"module/{key}": value for key, value in (noise | twin).items()}
    task = bench.task(1, 2, params)
    update, _ = bench.train(1, 2, params, extras=extras, plan=replace(task.plan, phase="mix"))
    found = update.diagnostics["edm"]
    assert found["experts"] == [0, 1, 3]
    assert found["energy"][0] == pytest.approx(found["energy"][1], rel=1e-6)
    if edm == "ce":
        assert found["energy"][2] > found["energy"][1] + 0.1
        assert set(found["kept"]) <= {0, 1}
    assert 1 in found["kept"]
    assert bench.private(1)[KEPT].nonzero().flatten().tolist() == found["kept"]
    assert bench.private(1)[AVAILABLE].tolist() == [True, True, False, True]
    engine = bench.worker.engine  # as the task left it: nothing but the gate was trained
    for key, value in (params | noise | twin | own).items():
        assert torch.equal(engine.read([key])[key], value)


# ---- stages


def test_stage_one_is_fedavg_with_a_private_lora(make_job: Maker, run_job: Maker, run: Maker, assert_same_bits: Maker) -> None:
    plain = {"name": "private_lora", "adapter": OPTIONS["adapter"], "private_rank": RANK, "private_lr_scale": 3.0}
    base = run_job(replace(make_job(plain), rounds=1))
    assert_same_bits(run().state.params, base.state.params)  # round 2 averages nothing
    for client in range(3):
        found, expected = private_of(run(), client, 1), private_of(base, client, 1)
        assert_same_bits({key: value for key, value in found.items() if ".personal." in key}, expected)


def test_modules_travel_once_and_stay_as_they_were_published(run: Maker, assert_same_bits: Maker) -> None:
    ran = run()
    published: Params = {}
    for client in range(3):
        published |= own_module(private_of(ran, client, 1), client)
    assert_same_bits({key.removeprefix("module/"): value for key, value in ran.state.extras.items()}, published)
    for client in range(3):
        before, after = private_of(ran, client, 1), private_of(ran, client, 2)
        assert_same_bits({key.removeprefix("module/"): v for key, v in after.items() if key.startswith("module/")}, published)
        gate = [key for key in before if "example_gate" in key]
        assert any(not torch.equal(before[key], after[key]) for key in gate)
        assert_same_bits(
            {key: v for key, v in after.items() if ".personal." in key},
            {key: v for key, v in before.items() if ".personal." in key},
        )
        shared = {key.removeprefix("pm_moe/shared/"): v for key, v in after.items() if key.startswith("pm_moe/shared/")}
        assert_same_bits(shared, ran.state.params)


def test_bytes_are_one_module_up_and_all_of_them_down_once(run: Maker) -> None:
    ran = run(rounds=3, stage1_rounds=1)
    found: Counter[tuple[int, int, str, str]] = Counter()
    for row in ran.rows("ledger"):
        found[row["round"], row["client_id"], row["direction"], row["group"]] += row["bytes"]
    shared = MODULE_VALUES  # the averaged LoRA has the rank of a module
    expected: dict[tuple[int, int, str, str], int] = {}
    for client in range(3):
        expected |= {
            (1, client, "down", "shared"): 4 * shared,
            (1, client, "up", "shared"): 4 * shared,
            (1, client, "up", "extras"): 4 * MODULE_VALUES,
            (2, client, "down", "shared"): 4 * shared,
            (2, client, "down", "extras"): 4 * 3 * MODULE_VALUES,
        }
    assert found == expected  # nothing at all in round 3, nothing up in round 2
    assert len(ran.pool.replies) == 9
    assert measured(ran, 3) != measured(ran, 2)  # gates go on learning


def test_a_gate_that_picks_oneself_gives_the_client_of_stage_one(run: Maker) -> None:
    ran = run()
    before = measured(ran, 1)
    for client in range(3):
        private = private_of(ran, client, 2)
        assert nll_of(ran, client, private) == pytest.approx(measured(ran, 2)[client], rel=1e-12)
        alone = torch.arange(PLACES) == client
        found = nll_of(ran, client, private | {KEPT: alone})
        # A mixture multiplies in another order than the LoRA of stage 1.
        assert found == pytest.approx(before[client], rel=1e-6)
        others = nll_of(ran, client, private | {KEPT: torch.arange(PLACES) == (client + 1) % 3})
        assert abs(others - before[client]) > 1e-4


@pytest.mark.parametrize("top_k", [3, 2])
def test_a_uniform_gate_over_all_is_the_mean_of_the_updates(top_k: int, run: Maker) -> None:
    ran = run(top_k=top_k)
    private = private_of(ran, 0, 2)
    flat = {key: torch.zeros_like(value) for key, value in private.items() if "example_gate" in key}
    found = nll_of(ran, 0, private | flat)
    base: Any = open_base(ran.job.worker.base_folder)
    scale = 4.0 / RANK
    with torch.no_grad():
        for name, weight in base.named_parameters():
            path = name.removesuffix(".weight")
            lora = f"{path}.lora_A.shared.weight"
            if lora in ran.state.params:
                delta = ran.state.params[lora.replace("lora_A", "lora_B")] @ ran.state.params[lora]
                for client in range(top_k):  # equal weights: the first ones are the top
                    key = f"module/{path}.base_layer.mixture.lora_A[{client}]"
                    delta = delta + (private[key.replace("lora_A", "lora_B")][0] @ private[key][0]) / 3
                weight.data = weight.data + scale * delta
    assert found == pytest.approx(nll_of_model(ran, base, 0), rel=1e-5)


def nll_of_model(ran: Any, model: Any, client: int) -> float:
    batches = eval_batches(ran.pool.worker.data.split(client, "test"), 4, 0)
    return float(score_batches(model, batches)["nll"].mean)


def test_a_client_that_was_never_drawn_takes_part(run: Maker) -> None:
    ran = run(cohort_size=1)
    assert [len([t for t, _, _ in ran.pool.replies if t.round_idx == r]) for r in (1, 2)] == [3, 3]
    ran = run(rounds=4, cohort_size=1, stage1_rounds=1, stage2_cohort="drawn")
    (publisher,) = [task.client_id for task, _, _ in ran.pool.replies if task.plan.phase == "publish"]
    learners = {task.client_id: task.round_idx for task, _, _ in ran.pool.replies if task.plan.phase == "mix"}
    assert set(learners) - {publisher}
    for client, round_idx in learners.items():
        private = private_of(ran, client, round_idx)
        assert private[AVAILABLE].nonzero().flatten().tolist() == sorted({publisher, client})
        if client != publisher:  # its own module is untrained: B is zero
            own = [value for key, value in private.items() if key.startswith("module/") and key.endswith(f"lora_B[{client}]")]
            assert own
            assert not any(value.any() for value in own)
    assert set(measured(ran, 4)) == {0, 1, 2}


@pytest.mark.slow
def test_unlocked_copies_are_trained_and_nobody_elses_change(run: Maker) -> None:
    ran = run(rounds=3, stage1_rounds=1, lock_experts=False, top_k=3)
    published = {key.removeprefix("module/"): value for key, value in ran.state.extras.items()}
    copies = [private_of(ran, client, 3) for client in range(3)]
    for key, value in published.items():
        if key.endswith(("lora_B[0]", "lora_B[1]", "lora_B[2]")):
            assert all(not torch.equal(copy[key], value) for copy in copies)
            assert not torch.equal(copies[0][key], copies[1][key])
    # They go on from their own copies: round 3 starts from round 2's.
    assert all(not torch.equal(private_of(ran, 0, 2)[key], copies[0][key]) for key in published if "lora_B" in key)
    assert not any(key.startswith("module/") for key in copies[0])


def test_one_round_is_stage_one_alone(run: Maker) -> None:
    ran = run(rounds=1)
    assert [task.plan.phase for task, _, _ in ran.pool.replies] == ["train"] * 3
    assert not ran.state.extras


def test_stages_share_the_rounds() -> None:
    for rounds, options, last in (
        (10, {}, 5),
        (10, {"stage1_fraction": 0.8}, 8),
        (2, {"stage1_fraction": 0.99}, 1),
        (7, {"stage1_rounds": 6}, 6),
        (6, {"stage1_rounds": 6}, 5),  # too short a run, or a rate search: the last round is left for stage 2
        (3, {"stage1_rounds": 6}, 2),
    ):
        method = PmMoe(PmMoeConfig.model_validate({"gate_steps": 5} | options))
        method.federation = federation(rounds)
        state = method.init({}, 3)
        plans = [method.plan(state, make_plan(round_idx)) for round_idx in range(1, rounds + 1)]
        assert [plan.phase for plan in plans] == ["train"] * (last - 1) + ["publish"] + ["mix"] * (rounds - last)
        assert [plan.num_steps for plan in plans] == [2] * last + [5] * (rounds - last)


def make_plan(round_idx: int) -> RoundPlan:
    return RoundPlan(round_idx=round_idx, num_steps=2, learning_rate=0.1)


def federation(rounds: int) -> Federation:
    return Federation(facts=None, refs=(), groups={}, run_seed=3, rounds=rounds, num_examples=(4,) * 3)  # type: ignore[arg-type]


def test_what_cannot_work_is_refused_at_the_start() -> None:
    method = PmMoe(PmMoeConfig(num_experts=2))
    method.federation = federation(4)
    with pytest.raises(MethodError, match="places for 2 modules, and there are 3 clients") as caught:
        method.init({}, 3)
    assert "num_experts to 3" in caught.value.hint


def test_unlocked_copies_train_at_the_private_modules_rate() -> None:
    method = PmMoe(PmMoeConfig(private_lr_scale=3.0, gate_lr_scale=7.0, lock_experts=False))
    parts = {"mixture": None, "example_gate": None, "attention": "personal", "other": "shared"}
    refs = [ParamRef(key=part, name=part, part=part, shape=(1,), adapter=adapter) for part, adapter in parts.items()]
    assert [method.lr_scale(ref) for ref in refs] == [3.0, 7.0, 3.0, 1.0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 17}, "top_k is 17, and there are places for 16"),
        ({"stage1_rounds": 3, "stage1_fraction": 0.5}, "stage1_fraction has no effect"),
        ({"edm_margin": 0.1}, "edm_margin has no effect with edm: off"),
        ({"edm_examples": 3}, "edm_examples has no effect with edm: off"),
        ({"edm": "ce", "edm_temperature": 2.0}, "edm_temperature has no effect"),
        ({"edm": "ce", "edm_quantile": 0.5, "edm_margin": 0.1}, "edm_margin has no effect beside edm_quantile"),
    ],
)
def test_options_without_effect_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        PmMoeConfig.model_validate(options)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"private_rank": 3},
        {"top_k": 1},
        {"gate_steps": 4},
        {"gate_lr_scale": 5.0},
        {"gate_hidden": [6, 6]},
        {"gate_activation": "leaky_relu"},
        {"gate_dropout": 0.5},
        {"embedding": "tokens"},
        {"lock_experts": False},
        {"edm": "ce"},
        {"edm": "free_energy", "edm_quantile": 0.3},
    ],
    ids=str,
)
def test_each_switch_changes_the_outcome(options: dict[str, Any], run: Maker) -> None:
    assert measured(run(), 2) != measured(run(**options), 2)
