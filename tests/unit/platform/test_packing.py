"""GPUs of a replica from its memory plan, by hand: shared, whole, or one for each of several ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import Qwen2MoeConfig

from fedgraft.errors import ConfigError
from fedgraft.platform.config import RunConfig
from fedgraft.platform.fitting import worst
from fedgraft.platform.loading import load_config
from fedgraft.platform.machine import MachineFacts
from fedgraft.platform.model_sizes import ModelPlan, SlotSizes, read_hf_config, size_model, size_slots
from fedgraft.platform.packing import MOST_PER_GPU, Gpus, is_to_work_out, nodes_text, with_gpus
from fedgraft.platform.plan import make_plan
from fedgraft.registry import METHODS

GIB = 2**30
Sizes = tuple[ModelPlan, dict[str, SlotSizes]]
# 0.4 G parameters in 4 layers: 1.7 GB in float32, which shards well.
HF = Qwen2MoeConfig(
    hidden_size=1024,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=8,
    num_experts=32,
    num_experts_per_tok=2,
    moe_intermediate_size=1024,
    shared_expert_intermediate_size=1024,
    vocab_size=1000,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("model")
    HF.save_pretrained(made)
    return made


def config_of(folder: Path, *overrides: str) -> RunConfig:
    common = [f"model.path={folder}", "data.path=/tmp", "data.partition.name=iid", "method={name: flex}", "data.max_length=32"]
    return load_config(None, [*common, "federation.batch_size=2", "evaluation.batch_size=2", *overrides])


@pytest.fixture(scope="module")
def sizes(folder: Path) -> Sizes:
    config = config_of(folder)
    hf = read_hf_config(config.model)
    model = size_model(config.model, hf)
    (method,) = config.methods().values()
    return model, {"flex": size_slots(METHODS.build(method), hf, "float32", model.facts)}


@pytest.fixture(scope="module")
def needed(folder: Path, sizes: Sizes) -> int:
    """Bytes that one replica takes of a GPU."""
    machine = MachineFacts(cores=1, memory_bytes=2**60, gpus=1, speed=1.0)
    return worst(config_of(folder, "executor.gpus_per_replica=1"), *sizes, machine)[1].rank.device


def settled(folder: Path, sizes: Sizes, nodes: list[Gpus], clients: int | None, *overrides: str) -> tuple[Any, str]:
    config, told = with_gpus(config_of(folder, *overrides), *sizes, nodes, clients)
    return config, told


def test_what_is_stated_or_has_no_effect_is_left(folder: Path) -> None:
    assert is_to_work_out(config_of(folder))
    for given in (
        "executor.gpus_per_replica=0",
        "executor.gpus_per_replica=0.5",
        "engine.device=cpu",
        "executor.kind=in_process",
    ):
        assert not is_to_work_out(config_of(folder, given))


@pytest.mark.parametrize(
    ("share", "cores", "clients", "overrides", "expected"),
    [
        (1.0, 32, 100, [], 1.0),
        (1.9, 32, 100, [], 1.0),
        (2.0, 32, 100, [], 0.5),
        (3.5, 32, 100, [], 0.3333),  # never more than a third: Ray counts in ten-thousandths
        (50.0, 32, 100, [], 1 / MOST_PER_GPU),
        (50.0, 4, 100, [], 0.5),  # two cores beside each of two GPUs
        (50.0, 32, 3, [], 0.5),  # three clients on two GPUs: no more than two share one
        (50.0, 32, 2, [], 1.0),
        (50.0, 32, None, [], 1 / MOST_PER_GPU),
        (50.0, 32, 100, ["federation.cohort_size=4"], 0.5),
        (50.0, 32, 100, ["executor.replicas=2"], 1.0),
        (50.0, 32, 100, ["executor.threads=8"], 0.5),
    ],
)
def test_replicas_share_a_gpu_as_memory_cores_and_clients_allow(
    folder: Path, sizes: Sizes, needed: int, share: float, cores: int, clients: int | None, overrides: list[str], expected: float
) -> None:
    nodes = [Gpus(cores=cores, gpus=2, gpu_bytes=int(share * needed)), Gpus(cores=64, gpus=0)]
    config, told = settled(folder, sizes, nodes, clients, *overrides)
    assert config.executor.gpus_per_replica == pytest.approx(expected, abs=1e-9)
    assert config.resolved_engine().device == "cuda"
    assert told


def test_the_smallest_gpu_decides_and_a_stated_size_wins(folder: Path, sizes: Sizes, needed: int) -> None:
    nodes = [Gpus(cores=32, gpus=1, gpu_bytes=4 * needed), Gpus(cores=32, gpus=1, gpu_bytes=2 * needed)]
    assert settled(folder, sizes, nodes, 100)[0].executor.gpus_per_replica == 0.5
    gib = f"executor.gpu_gib={1.5 * needed / GIB}"
    assert settled(folder, sizes, nodes, 100, gib)[0].executor.gpus_per_replica == 1.0


def test_where_one_gpu_is_too_small_a_replica_is_sharded_over_the_fewest(folder: Path, sizes: Sizes, needed: int) -> None:
    nodes = [Gpus(cores=32, gpus=8, gpu_bytes=int(0.8 * needed))]
    config, told = settled(folder, sizes, nodes, 100)
    assert (config.engine.world_size, config.engine.stage, config.executor.gpus_per_replica) == (2, 3, 2.0)
    assert "engine.world_size=2 engine.stage=3" in told
    machine = MachineFacts(cores=1, memory_bytes=2**60, gpus=8, speed=1.0, gpu_bytes=int(0.8 * needed))
    assert worst(config, *sizes, machine)[1].fits_gpu
    with pytest.raises(ConfigError, match="a replica of flex that needs .* expected GPUs that it fits"):
        settled(folder, sizes, [Gpus(cores=32, gpus=1, gpu_bytes=int(0.8 * needed))], 100)
    with pytest.raises(ConfigError, match="1 node with 32 cores and 8 GPUs of"):  # one rank was asked for
        settled(folder, sizes, nodes, 100, "engine.world_size=1")


def test_several_ranks_and_unknown_memory_get_whole_gpus(folder: Path, sizes: Sizes, needed: int) -> None:
    assert settled(folder, sizes, [Gpus(cores=32, gpus=2)], 100)[0].executor.gpus_per_replica == 1.0
    nodes = [Gpus(cores=32, gpus=2, gpu_bytes=50 * needed)]
    assert settled(folder, sizes, nodes, 100, "engine.world_size=2")[0].executor.gpus_per_replica == 2.0


def test_without_gpus_it_is_none_and_said_where_one_is_asked_for(folder: Path, sizes: Sizes) -> None:
    nodes = [Gpus(cores=8, gpus=0), Gpus(cores=8, gpus=0), Gpus(cores=2, gpus=0)]
    config, told = settled(folder, sizes, nodes, 100)
    assert (config.executor.gpus_per_replica, told) == (0.0, "")
    with pytest.raises(ConfigError, match="there is 2 nodes with 8 cores and 0 GPUs, 1 node with 2 cores and 0 GPUs"):
        settled(folder, sizes, nodes, 100, "engine.device=cuda")
    assert nodes_text([]) == "no node"


def test_a_plan_has_it_in_its_configuration(folder: Path, needed: int) -> None:
    machine = MachineFacts(cores=16, memory_bytes=2**60, gpus=2, speed=1e12, gpu_bytes=2 * needed)
    plan = make_plan(config_of(folder, "data.num_clients=50"), machine)
    assert plan.settled.executor.gpus_per_replica == 0.5
    assert "gpus_per_replica: 0.5" in plan.config
    assert plan.methods[0].replicas == 4
    assert plan.gpus.startswith("2 replicas share a GPU: flex needs")
