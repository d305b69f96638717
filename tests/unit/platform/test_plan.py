"""The plan's numbers against closed forms, and its bytes against the ledger's own count on a real model."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from transformers import AutoModelForCausalLM, Qwen2MoeConfig

from fedgraft.data.corpus import CLIENT_DOMAINS
from fedgraft.errors import ModelError
from fedgraft.moe.families import model_facts
from fedgraft.platform.fitting import Need, num_replicas
from fedgraft.platform.ledger import describe
from fedgraft.platform.loading import load_config
from fedgraft.platform.machine import measure_speed
from fedgraft.platform.memory import RankMemory
from fedgraft.platform.plan import MachineFacts, MethodPlan, Plan, flops_per_token, make_plan, settle
from fedgraft.registry import METHODS
from fedgraft.training.torch_engine import TorchEngine

# D = 16, L = 2 layers, E = 4 experts of F = 8, top 2, vocabulary 64; attention 16 x 16 four times.
HF = Qwen2MoeConfig(
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
    num_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=8,
    shared_expert_intermediate_size=8,
    intermediate_size=8,
    vocab_size=64,
    tie_word_embeddings=False,
)
MACHINE = MachineFacts(cores=4, memory_bytes=8 * 2**30, gpus=0, speed=1e9)
CLIENTS = ["data.path=/tmp", "data.partition.name=iid", "data.num_clients=5", "data.max_test_examples=10"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    HF.save_pretrained(tmp_path)
    assert [each.name for each in tmp_path.glob("*.json")]
    assert not list(tmp_path.glob("*.safetensors"))
    return tmp_path


def plan_of(folder: Path, *overrides: str, machine: MachineFacts = MACHINE) -> Plan:
    config = load_config(None, [f"model.path={folder}", *CLIENTS, *overrides])
    return make_plan(config, machine)


def method_of(folder: Path, method: str, *overrides: str, machine: MachineFacts = MACHINE) -> MethodPlan:
    (found,) = plan_of(folder, f"method={method}", *overrides, machine=machine).methods
    return found


def test_model_numbers_follow_from_its_shapes(folder: Path) -> None:
    model = plan_of(folder, "method.name=base").model
    attention = 4 * 16 * 16 + 3 * 16  # four projections, three biases
    outside = 3 * 16 * 8 + 16 + 4 * 16 + 2 * 16  # shared expert, its gate, router, two norms
    routed = 4 * 3 * 16 * 8
    assert model.num_parameters == 2 * (attention + outside + routed) + 2 * 64 * 16 + 16
    assert model.active_parameters == 2 * (attention + outside + routed // 2) + 64 * 16 + 16
    assert model.weight_bytes == 4 * model.num_parameters
    half = plan_of(folder, "method.name=base", "model.dtype=bfloat16").model
    assert half.weight_bytes == 2 * model.num_parameters


def test_fedavg_sends_its_lora_and_nothing_else(folder: Path) -> None:
    found = method_of(folder, "{name: fedavg, adapter: {rank: 3}}", "rate_search=null")
    values = 2 * 4 * 3 * (16 + 16)
    assert found.values("shared") == values
    assert found.values("private") == found.values("assigned") == 0
    assert found.sent_bytes == {"shared": 4 * values}
    assert found.bytes_per_round == 4 * values
    assert found.run_bytes == 6 * 5 * 2 * 4 * values
    assert found.local_steps == 6 * 5 * 8


def test_flex_keeps_grafts_and_gates(folder: Path) -> None:
    found = method_of(folder, "{name: flex, n_graft: 2, adapter: {rank: 1}}")
    assert found.values("private") == 2 * 2 * (3 * 16 * 8 + 16 + 1)
    assert found.values("shared") == 2 * 4 * (16 + 16)
    assert set(found.sent_bytes) == {"shared"}
    shared_gate = method_of(folder, "{name: flex, n_graft: 2, share_gate: true, adapter: {rank: 1}}")
    assert shared_gate.values("shared") - found.values("shared") == 2 * 2 * (16 + 1)


def test_local_training_sends_nothing_and_the_base_does_nothing(folder: Path) -> None:
    local = method_of(folder, "{name: local_only}")
    assert local.run_bytes == local.bytes_per_round == 0
    assert local.values("private") > 0
    base = method_of(folder, "{name: base}")
    assert (base.rounds, base.search_rounds, base.local_steps, base.run_bytes, base.slots) == (0, 0, 0, 0, ())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "method",
    [
        "{name: fedavg, lora: [attention, router, experts]}",
        "{name: fedavg, lora: [attention], full: [experts, router]}",
        "{name: flex, share_gate: true}",
        "{name: private_lora}",
    ],
)
def test_bytes_are_those_that_the_ledger_counts(folder: Path, method: str, dtype: str) -> None:
    config = load_config(None, [f"model.path={folder}", f"model.dtype={dtype}", *CLIENTS, f"method={method}"])
    (planned,) = make_plan(config, MACHINE).methods
    assert config.method is not None
    built = METHODS.build(config.method)
    model = AutoModelForCausalLM.from_config(HF, dtype=dtype)
    engine = TorchEngine(model, built.slots(model_facts(HF)), 0)
    groups = {ref.key: built.group(ref) for ref in engine.refs}
    sent = {key: value for key, value in engine.initial.items() if groups[key].is_sent}
    counted: dict[str, int] = {}
    for info in describe(sent, groups):
        counted[info.group] = counted.get(info.group, 0) + info.num_bytes
    assert planned.sent_bytes == counted


def test_rounds_seeds_cohorts_and_the_search_all_count(folder: Path) -> None:
    one = method_of(folder, "{name: fedavg}", "rate_search=null")
    many = method_of(folder, "{name: fedavg}", "seeds=[0, 1, 2]", "federation.cohort_size=2")
    assert one.run_bytes is not None
    assert many.run_bytes == one.run_bytes * 3 * 2 // 5
    assert many.search_rounds == 2 * 3 * 3, "every seed searches on its own split"
    assert many.local_steps == (6 * 3 + 2 * 3 * 3) * 2 * 8
    large = method_of(folder, "{name: fedavg}", "federation.cohort_size=50", "rate_search=null")
    assert large.run_bytes == one.run_bytes, "no more than all clients take part"


def test_calls_cost_time_where_products_are_small(folder: Path) -> None:
    options = ("{name: fedavg, adapter: {rank: 1}}", "rate_search=null", "evaluation.every=6")
    plain = method_of(folder, *options).seconds
    layers = len(plan_of(folder, "method.name=base").model.facts.layers)
    steps, judged = 6 * 5 * 8, 5 * 10 * 2
    training, judging = 6 * steps * (80 + 440 * layers), 6 * judged / 32 * 144 * layers
    slow = replace(MACHINE, op_seconds=1e-3)
    assert plain is not None
    assert method_of(folder, *options, machine=slow).seconds == pytest.approx(plain + (training + judging) * 1e-3 / 4)
    # Four clients in one pass make a quarter of the calls.
    four = method_of(folder, *options, "engine.clients_at_once=4", "executor.replicas=1", machine=slow)
    assert four.seconds == pytest.approx(plain * 4 + (training / 4 + judging) * 1e-3)


def test_time_follows_from_flops_and_speed(folder: Path) -> None:
    quick = "evaluation.every=6"
    one = method_of(folder, "{name: fedavg, adapter: {rank: 1}}", "rate_search=null", quick)
    model = plan_of(folder, "method.name=base").model
    trained = 2 * 4 * (16 + 16)
    steps = 6 * 5 * 8 * 8 * 256 * (4 * model.active_parameters + 6 * trained)
    judged = 5 * 10 * 2 * 256 * 2 * (model.active_parameters + trained)
    assert one.replicas == 4
    assert one.seconds == pytest.approx((steps + judged) / (1e9 * 0.3 * 4))
    double = method_of(
        folder, "{name: fedavg, adapter: {rank: 1}}", "rate_search=null", quick, machine=replace(MACHINE, speed=2e9)
    )
    assert double.seconds == pytest.approx(one.seconds / 2)


def test_where_the_data_decides_totals_are_left_open(folder: Path) -> None:
    plan = plan_of(folder, "method.name=flex", "data.partition.name=natural", "data.num_clients=null")
    (found,) = plan.methods
    assert plan.num_clients is plan.seconds is found.run_bytes is found.local_steps is found.seconds is None
    assert found.bytes_per_round > 0
    assert "as many as the data has labels" in text_of(plan)


def test_flops_of_a_token() -> None:
    assert flops_per_token(10, 1, is_training=True) == 46
    assert flops_per_token(10, 1, is_training=False) == 22
    # Trained in full: 6 of the model's own 10 values; each costs 6 in training, and no more than before in judging.
    assert flops_per_token(10, 6, own=6, is_training=True) == 4 * 4 + 6 * 6
    assert flops_per_token(10, 6, own=6, is_training=False) == 2 * 10


@pytest.mark.parametrize(
    ("overrides", "clients", "machine", "expected"),
    [
        ([], 8, MACHINE, 4),
        ([], 3, MACHINE, 3),
        ([], None, MACHINE, 4),
        (["federation.cohort_size=2"], 8, MACHINE, 2),
        (["executor.threads=2"], 8, MACHINE, 2),
        (["executor.threads=9"], 8, MACHINE, 1),
        ([], 8, replace(MACHINE, memory_bytes=2 * 2**30), 2),
        ([], 8, replace(MACHINE, memory_bytes=0), 1),
        (["executor.replicas=7"], 2, MACHINE, 7),
        (["executor={kind: in_process}"], 8, MACHINE, 1),
        (["executor.gpus_per_replica=0.5"], 8, replace(MACHINE, gpus=1), 2),
        (["executor.gpus_per_replica=1"], 8, MACHINE, 1),
    ],
)
def test_replicas_that_fit(overrides: list[str], clients: int | None, machine: MachineFacts, expected: int) -> None:
    rank = RankMemory(process=2**30, on_host=frozenset({"process"}))
    need = Need(rank=rank, ranks=1, host_limit=machine.memory_bytes, gpu_limit=None)
    assert num_replicas(load_config(None, overrides), clients, machine, need) == expected


def test_ranks_of_a_replica_share_its_time(folder: Path) -> None:
    one = method_of(folder, "{name: fedavg}", "rate_search=null", "executor.replicas=1")
    two = method_of(folder, "{name: fedavg}", "rate_search=null", "executor.replicas=1", "engine.world_size=2")
    assert one.seconds is not None
    assert two.seconds == pytest.approx(one.seconds / 2)


def test_speed_is_measured_and_threads_are_left_as_they_were() -> None:
    import torch

    before = torch.get_num_threads()
    assert measure_speed(64, 32, threads=1, seconds=0.02) > 1e6
    assert torch.get_num_threads() == before


def test_the_quickstart_is_planned_without_any_file() -> None:
    plan = make_plan(load_config(), MACHINE)
    assert plan.num_clients == len(CLIENT_DOMAINS) == 8
    assert plan.model.name == "bundled"
    values = {each.label: each for each in plan.methods}
    assert values["flex"].values("private") == values["flex-random"].values("private")
    ratio = values["private-lora"].values("private") / values["flex"].values("private")
    assert 0.7 < ratio < 1.4, "the control is matched in size"
    assert plan.seconds is not None
    assert 0 < plan.tokens_per_example <= 256


def text_of(plan: Plan) -> str:
    stream = io.StringIO()
    Console(file=stream, width=100).print(plan)
    return stream.getvalue()


def test_the_picture_holds_config_and_every_method() -> None:
    text = text_of(make_plan(load_config(), MACHINE))
    assert "rate_search:" in text
    for label in ("base", "local", "fedavg", "flex", "flex-random", "private-lora"):
        assert any(line.startswith(f"{label} ") for line in text.splitlines())
    assert "to within a factor of three" in text
    assert "6+6" in text


def test_a_model_that_is_no_moe_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(ModelError, match="gpt2"):
        plan_of(tmp_path, "method.name=base")


def test_this_machine_is_measured_where_none_is_given(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def measure(hidden: int, expert: int, threads: int) -> float:
        seen.update(hidden=hidden, expert=expert, threads=threads)
        return 5.0

    monkeypatch.setattr("fedgraft.platform.plan.measure_speed", measure)
    machine = make_plan(load_config(None, [f"model.path={folder}", "method.name=base", "executor.threads=2"])).machine
    assert seen == {"hidden": 16, "expert": 8, "threads": 2}
    assert machine.speed == 5.0
    assert machine.cores >= 1
    assert machine.memory_bytes > 0


def test_what_the_engine_cannot_do_is_refused_before_anything_is_made() -> None:
    bundled = "engine={name: deepspeed, world_size: 3, expert_parallel_size: 3}"
    with pytest.raises(ModelError, match="engine.expert_parallel_size 3 does not divide the 8 experts"):
        make_plan(load_config(None, [bundled]))
    row = ["engine={stage: 3}", "compare=null", "rate_search=null", "method={name: flex, mode: row}"]
    with pytest.raises(ModelError, match="a graft of mode row"):
        make_plan(load_config(None, row))


LONG = (
    "federation.cohort_size=5",
    "executor.kind=in_process",
    "data.max_length=512",
    "federation.batch_size=64",
    "evaluation.batch_size=1",
)


@pytest.mark.parametrize(
    ("overrides", "memory", "expected"),
    [
        (("federation.cohort_size=5", "executor.kind=in_process"), 8 * 2**30, 4),
        (("federation.cohort_size=5", "executor.replicas=2"), 8 * 2**30, 2),
        (("federation.cohort_size=3", "executor.replicas=4"), 8 * 2**30, 1),
        (("federation.cohort_size=9", "executor.kind=in_process"), 8 * 2**30, 4),  # there are five clients
        (LONG, 2**31, 2),
    ],
)
def test_auto_takes_as_many_clients_at_once_as_work_and_memory_allow(
    overrides: tuple[str, ...], memory: int, expected: int, folder: Path
) -> None:
    config = load_config(None, [f"model.path={folder}", *CLIENTS, "engine.clients_at_once=auto", *overrides])
    machine = replace(MACHINE, memory_bytes=memory)
    settled = settle(config, machine)
    assert settled.engine.clients_at_once == expected
    assert make_plan(config, machine).refusal is None
    fixed = load_config(None, [f"model.path={folder}", *CLIENTS, f"engine.clients_at_once={2 * expected}", *overrides])
    if memory == 2**31:
        assert make_plan(fixed, machine).refusal is not None
    assert settle(fixed, machine) is fixed


def test_a_pass_of_several_clients_takes_their_memory_together(folder: Path) -> None:
    one, four = (
        method_of(folder, "{name: flex}", "executor.kind=in_process", f"engine.clients_at_once={count}").need.rank
        for count in (1, 4)
    )
    assert four.training == 4 * one.training
    assert four.gradients == 4 * one.gradients
    assert four.optimizer == 4 * one.optimizer
    assert four.graft == 5 * one.graft
