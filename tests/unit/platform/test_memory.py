"""The memory plan: each component against a sum made by hand, laws between configurations, and suggestions that really fit."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from transformers import Qwen2MoeConfig

from fedgraft.errors import ConfigError
from fedgraft.platform.config import ModelConfig
from fedgraft.platform.loading import load_config
from fedgraft.platform.machine import MachineFacts
from fedgraft.platform.memory import CONTEXT_BYTES, DEEPSPEED_BYTES, REPLICA_BYTES, RankMemory
from fedgraft.platform.model_sizes import ModelPlan, SlotSizes, size_model, size_slots
from fedgraft.platform.plan import Plan, make_plan, this_machine
from fedgraft.protocols import Method
from fedgraft.types import ModelFacts

# D = 16, A = 16, L = 2 layers, E = 4 experts of F = 8, top 2, shared expert of 8, vocabulary 64.
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
# Qwen1.5-MoE-A2.7B, as its config.json on the hub has it: 14.3 G parameters.
LARGE = {
    "architectures": ["Qwen2MoeForCausalLM"],
    "model_type": "qwen2_moe",
    "decoder_sparse_step": 1,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "moe_intermediate_size": 1408,
    "num_attention_heads": 16,
    "num_experts": 60,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 24,
    "num_key_value_heads": 16,
    "shared_expert_intermediate_size": 5632,
    "tie_word_embeddings": False,
    "vocab_size": 151936,
}
GIB = 2**30
MACHINE = MachineFacts(cores=4, memory_bytes=64 * GIB, gpus=0, speed=1e9)
NODE = MachineFacts(cores=32, memory_bytes=256 * GIB, gpus=8, speed=1e12, gpu_bytes=80 * GIB)
CLIENTS = ["data.path=/tmp", "data.partition.name=iid", "data.num_clients=5", "data.max_test_examples=10"]
LORA = 2 * 4 * 3 * (16 + 16)  # two layers, four projections, rank 3
GRAFT = 2 * (3 * 16 * 8 + 16 + 1)  # two layers: an expert and its gate
FLEX = "method={name: flex, adapter: {rank: 3}}"
FEDAVG = "method={name: fedavg, adapter: {rank: 3}}"
GPU = "executor.gpus_per_replica"


@pytest.fixture(scope="module", autouse=True)
def _sized_once() -> Iterator[None]:
    """A model and a method's slots are built on the meta device once for all tests here; that takes most of the time."""
    models: dict[Any, ModelPlan] = {}
    slots: dict[Any, SlotSizes] = {}

    def model_of(model: ModelConfig, hf_config: Any) -> ModelPlan:
        key = (hf_config.hidden_size, model.dtype)
        if key not in models:
            models[key] = size_model(model, hf_config)
        return models[key]

    def slots_of(method: Method, hf_config: Any, dtype: str, facts: ModelFacts) -> SlotSizes:
        key = (hf_config.hidden_size, dtype, method.config.model_dump_json())
        if key not in slots:
            slots[key] = size_slots(method, hf_config, dtype, facts)
        return slots[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fedgraft.platform.plan.size_model", model_of)
        patch.setattr("fedgraft.platform.plan.size_slots", slots_of)
        yield


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    HF.save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture
def large(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(LARGE))
    return tmp_path


def plan_of(folder: Path, *overrides: str, machine: MachineFacts = MACHINE) -> Plan:
    return make_plan(load_config(None, [f"model.path={folder}", *CLIENTS, *overrides]), machine)


def rank_of(folder: Path, *overrides: str, machine: MachineFacts = MACHINE) -> RankMemory:
    (method,) = plan_of(folder, *overrides, machine=machine).methods
    return method.memory


def weight_values() -> int:
    """By hand: attention with three biases, shared expert and its gate, router, two norms, experts; tables; last norm."""
    layer = (4 * 16 * 16 + 3 * 16) + (3 * 16 * 8 + 16 + 4 * 16 + 2 * 16) + 4 * 3 * 16 * 8
    return 2 * layer + 2 * 64 * 16 + 16


def test_a_plain_rank_by_hand(folder: Path) -> None:
    found = rank_of(folder, FLEX, "federation.batch_size=5", "data.max_length=10", "evaluation.batch_size=1")
    assert found.shared == 4 * weight_values()
    assert found.weights == 4 * LORA
    assert found.graft == 4 * GRAFT
    assert found.gradients == 4 * (LORA + GRAFT)
    assert found.optimizer == 2 * 4 * (LORA + GRAFT)
    # start values of all, the received and the first read LoRA, the client's own graft
    assert found.copies == 4 * ((LORA + GRAFT) + 2 * LORA + GRAFT)
    attention = 4 * (4 * 16 + 4 * 16 + 10)
    moe = 4 * 2 * (16 + 3 * 8) + 3 * 4 * 8 + 4 * (4 * 8 + 3 * 16)
    assert found.activations == found.training == 5 * 10 * (3 * (attention + moe))  # one layer is more than 2 x 64 logits
    assert found.heap == found.activations
    assert found.process == REPLICA_BYTES
    assert found.buffers == found.context == found.device == 0
    assert found.host == found.private
    assert found.private == sum(
        (found.weights, found.graft, found.gradients, found.optimizer, 2 * found.activations, found.copies, found.process)
    )


def test_without_moments_or_training_there_is_nothing_to_keep(folder: Path) -> None:
    assert rank_of(folder, FLEX, "training.optimizer=sgd").optimizer == 0
    base = rank_of(folder, "method={name: base}")
    assert (base.weights, base.graft, base.gradients, base.optimizer, base.copies) == (0, 0, 0, 0, 0)
    assert base.shared == 4 * weight_values()


def test_kept_moments_of_private_slots_are_stored_too(folder: Path) -> None:
    kept = "method={name: flex, persist_optimizer: true, adapter: {rank: 3}}"
    assert rank_of(folder, kept).copies - rank_of(folder, FLEX).copies == 2 * 4 * GRAFT


def test_parts_trained_in_full_keep_the_models_format(folder: Path) -> None:
    full = 2 * 4 * 3 * 16 * 8
    method = "method={name: fedavg, lora: [attention], full: [experts], adapter: {rank: 3}}"
    found = rank_of(folder, method, "model.dtype=bfloat16")
    assert found.weights == 4 * LORA + 2 * full
    assert found.gradients == found.weights
    on_gpu = rank_of(folder, method, "model.dtype=bfloat16", "engine={name: torch}", f"{GPU}=1", machine=NODE)
    assert on_gpu.weights == 2 * weight_values() + 4 * LORA, "they replace the base's there"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_zero_by_hand(folder: Path, dtype: str, ranks: int) -> None:
    s = 4 if dtype == "float32" else 2
    trained = LORA + GRAFT
    for stage in (1, 2, 3):
        found = rank_of(folder, FLEX, f"model.dtype={dtype}", f"engine={{stage: {stage}, world_size: {ranks}}}")
        assert found.optimizer == -(-16 * trained // ranks), "masters, gradients of the step, two moments, in float32"
        assert found.gradients == (s * trained if stage == 1 else -(-s * trained // ranks))
        assert found.copies == 4 * (2 * trained + 2 * LORA + GRAFT)
        assert found.process == REPLICA_BYTES + DEEPSPEED_BYTES
        if stage < 3:
            assert (found.shared, found.weights, found.graft) == (s * weight_values(), s * LORA, s * GRAFT)
            assert found.buffers == (4 if stage == 1 else s) * trained, "of a bucket only what is written"
        else:
            assert found.shared == 0
            assert found.weights == -(-s * (weight_values() + LORA) // ranks)
            whole = 0 if ranks == 1 else s * weight_values()  # the model is smaller than what is fetched ahead
            assert found.buffers == s * trained + whole


def test_on_a_gpu_the_base_is_a_replicas_own(folder: Path) -> None:
    found = rank_of(folder, FLEX, f"{GPU}=1", machine=NODE)
    assert found.shared == found.heap == 0
    assert found.weights == 4 * (weight_values() + LORA)
    assert found.host == found.copies + found.process
    assert found.buffers == 4 * 20_000_000, "the whole bucket, stage 1"
    small = rank_of(folder, FLEX, f"{GPU}=1", "engine.deepspeed={zero_optimization: {reduce_bucket_size: 1000}}", machine=NODE)
    assert small.buffers == 4 * 1000
    parts = ("weights", "graft", "gradients", "optimizer", "activations", "buffers")
    assert found.device == CONTEXT_BYTES + sum(getattr(found, name) for name in parts)


def test_a_base_larger_than_a_gpu_is_sharded_on_its_way_there(large: Path) -> None:
    options = (FLEX, "model.dtype=bfloat16", "federation.batch_size=8", "data.max_length=16", "evaluation.batch_size=1")
    found = rank_of(large, *options, "engine={stage: 3, world_size: 8}", f"{GPU}=8", machine=NODE)
    whole = 2 * 14_315_784_192
    assert whole / 8 < found.device < whole


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_a_higher_stage_never_takes_more_per_rank(folder: Path, ranks: int) -> None:
    def taken(stage: int) -> int:
        found = rank_of(folder, FLEX, f"engine={{name: deepspeed, stage: {stage}, world_size: {ranks}}}")
        return found.optimizer + found.gradients

    stages = range(0 if ranks > 1 else 1, 4)  # with one rank masters come on top, and nothing is divided
    sizes = [taken(stage) for stage in stages]
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) > 1 or ranks == 1


def test_offload_moves_bytes_to_the_host(folder: Path) -> None:
    options = (FLEX, f"{GPU}=1")
    plain = rank_of(folder, *options, "engine={stage: 3}", machine=NODE)
    first = rank_of(folder, *options, "engine={stage: 3, offload_optimizer: true}", machine=NODE)
    both = rank_of(folder, *options, "engine={stage: 3, offload_optimizer: true, offload_param: true}", machine=NODE)
    assert first.private == plain.private
    assert first.host - plain.host == plain.device - first.device == plain.optimizer
    assert both.host - first.host == plain.weights + plain.graft
    assert both.buffers > first.buffers, "what is in use comes back"


@pytest.mark.parametrize("ranks", [1, 2])
def test_more_parts_never_take_more_activations(folder: Path, ranks: int) -> None:
    sizes = [
        rank_of(
            folder, FEDAVG, "federation.batch_size=7", f"engine={{world_size: {ranks}, gradient_accumulation_steps: {parts}}}"
        ).training
        for parts in (1, 2, 3, 4, 7, 20)
    ]
    assert sizes == sorted(sizes, reverse=True)
    rows = [-(-7 // (ranks * parts)) for parts in (1, 2, 3, 4, 7, 20)]
    assert [size / sizes[-1] for size in sizes] == rows


def test_a_lora_over_fused_experts_keeps_whole_weights(folder: Path) -> None:
    experts = 2 * 4 * 3 * 16 * 8
    plain, fused = (rank_of(folder, f"method={{name: fedavg, lora: [{part}]}}") for part in ("attention", "experts"))
    assert fused.training - plain.training == 4 * experts * (2 + 2) // 2, "two layers, and one's product and gradient"


def test_a_model_of_14_g_is_planned_from_its_config_alone(large: Path) -> None:
    assert [path.name for path in large.iterdir()] == ["config.json"]
    plan = plan_of(large, "model.dtype=bfloat16", FLEX, f"{GPU}=1", machine=NODE)
    assert plan.model.num_parameters == 14_315_784_192
    (method,) = plan.methods
    assert method.memory.graft == 2 * 24 * (3 * 2048 * 1408 + 2048 + 1)
    assert plan.refusal is None
    assert method.replicas == 5


CASES = [
    # GPU memory in GiB, what the suggestion must name
    (40, ["engine.gradient_accumulation_steps=2"]),
    (31, ["engine.offload_optimizer=true"]),
    (28, ["engine.offload_param=true"]),
]


@pytest.mark.parametrize(("gib", "names"), CASES)
def test_a_suggestion_fits_when_it_is_followed(large: Path, gib: int, names: list[str]) -> None:
    machine = replace(NODE, gpu_bytes=gib * GIB)
    # All of a GPU's pages in use by weights alone would be no plan at all, so rows are long enough to matter.
    options = ("model.dtype=bfloat16", FLEX, f"{GPU}=1", "data.max_length=256")
    refusal = plan_of(large, *options, machine=machine).refusal
    assert isinstance(refusal, ConfigError)
    assert refusal.exit_code == 2
    hint = refusal.problems[0].hint
    found = re.match(r"set (.*?): then", hint)
    assert found, hint
    changes = found[1].split()
    assert set(names) <= set(changes)
    followed = plan_of(large, *options, *changes, machine=machine)
    assert followed.refusal is None
    assert followed.methods[0].memory.device <= machine.gpu_bytes  # type: ignore[operator]
    if names[0].startswith("engine.gradient"):
        return
    parts = f"engine.gradient_accumulation_steps={load_config(None).federation.batch_size}"
    milder = plan_of(large, *options, parts, "evaluation.batch_size=1", machine=machine)
    assert milder.refusal is not None, "parts alone did not do"


def test_where_nothing_fits_the_smallest_is_named(large: Path) -> None:
    refusal = plan_of(large, "model.dtype=bfloat16", FLEX, machine=replace(MACHINE, memory_bytes=8 * GIB)).refusal
    assert refusal is not None
    text = str(refusal)
    assert "no number of parts, ZeRO stage, offload or number of ranks makes it fit; the least is" in text
    assert "of the machine's 8.0 GiB free" in text
    assert "model: got one replica of flex needs" in text
    assert "model.dtype=bfloat16" not in text, "it is already"


def test_more_replicas_than_fit_are_refused_with_how_many_do(folder: Path) -> None:
    one = rank_of(folder, FEDAVG)
    room = replace(MACHINE, memory_bytes=one.shared + 3 * one.private + 5)
    refusal = plan_of(folder, FEDAVG, "executor.replicas=4", machine=room).refusal
    assert refusal is not None
    assert refusal.problems[0].path == "executor.replicas"
    assert "at most 3" in str(refusal)
    assert plan_of(folder, FEDAVG, "executor.replicas=3", machine=room).refusal is None
    assert plan_of(folder, FEDAVG, machine=replace(room, cores=64)).methods[0].replicas == 3
    less = replace(room, memory_bytes=one.shared + one.private - 1)
    assert plan_of(folder, FEDAVG, machine=less).refusal is not None


def test_on_a_joined_cluster_nothing_is_refused(large: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = replace(MACHINE, memory_bytes=GIB)
    assert plan_of(large, FLEX, machine=small).refusal is not None
    plan = plan_of(large, FLEX, "executor.address=10.0.0.1:6379", machine=small)
    assert plan.refusal is None
    assert "other nodes are not known" in text_of(plan)
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert plan_of(large, FLEX, machine=small).refusal is None


def test_half_a_gpu_is_half_of_its_memory(large: Path) -> None:
    options = ("model.dtype=bfloat16", FLEX, "data.max_length=32")
    needed = rank_of(large, *options, f"{GPU}=1", machine=NODE).device
    exact = replace(NODE, gpu_bytes=needed)
    assert plan_of(large, *options, f"{GPU}=1", machine=exact).refusal is None
    assert plan_of(large, *options, f"{GPU}=0.5", machine=exact).refusal is not None
    assert plan_of(large, *options, f"{GPU}=0.5", machine=replace(NODE, gpu_bytes=2 * needed)).refusal is None


def test_a_run_is_refused_where_it_does_not_fit_the_free_memory(large: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(None, [f"model.path={large}", FLEX, *CLIENTS])
    monkeypatch.setattr("fedgraft.platform.plan.free_memory", lambda: GIB)
    with pytest.raises(ConfigError, match="memory plan"):
        make_plan(config, this_machine()).require_fit()
    monkeypatch.setattr("fedgraft.platform.plan.free_memory", lambda: 1000 * GIB)
    make_plan(config, this_machine()).require_fit()


def text_of(plan: Plan) -> str:
    stream = io.StringIO()
    Console(file=stream, width=100).print(plan)
    return stream.getvalue()


def test_the_picture_has_every_part_and_stays_narrow(large: Path) -> None:
    label = "a-method-with-quite-a-long-label"
    options = ("model.dtype=bfloat16", f"compare={{methods: {{{label}: {{name: flex}}}}}}")
    gpu = ("engine={world_size: 2, stage: 3, offload_optimizer: true}", f"{GPU}=2")
    text = text_of(plan_of(large, *options, *gpu, machine=NODE)).partition("memory of a rank")[2]
    rows = [line for line in text.splitlines() if re.match(r"a-method-\.\.\., (GPU|host)", line)]
    assert len(rows) == 2
    assert all(row.rstrip().endswith("iB") for row in rows), "no column was cut"
    for word in ("weights", "graft", "gradi-", "opti-", "activa-", "buffers", "copies", "process", "private"):
        assert word in text
    assert "x 2 ranks x" in text
    on_cpu = text_of(plan_of(large, *options, machine=MACHINE)).partition("memory of a rank")[2]
    assert "heap" in on_cpu
    assert "26.7 GiB shared + 1 replica x" in on_cpu
    assert "not known" in text_of(plan_of(large, *options, f"{GPU}=1", machine=MACHINE))


def test_experts_that_ranks_share_are_copies_of_their_own(folder: Path) -> None:
    alone = rank_of(folder, FLEX, "engine={stage: 0, world_size: 2, device: cpu}", machine=NODE)
    engine = "engine={stage: 0, world_size: 2, expert_parallel_size: 2, device: cpu}"
    shared = rank_of(folder, FLEX, engine, machine=NODE)
    config = json.loads((folder / "config.json").read_text())
    experts = config["num_hidden_layers"] * config["num_experts"] * 3 * config["hidden_size"] * config["moe_intermediate_size"]
    assert shared.weights - alone.weights == 4 * experts // 2
