"""Scratch."""

from __future__ import annotations
from collections.abc import Callable, Iterator
from typing import Any
import os
import pytest, torch, json
from transformers import PreTrainedModel
from fedgraft.protocols import TrainSpec
from fedgraft.training.config import EngineConfig, deepspeed_settings
from fedgraft.training.deepspeed_engine import DeepSpeedEngine, SlotPolicy
from fedgraft.training.ranks import open_ranks
from fedgraft.types import AdapterSpec, Batch, GraftSpec, Slots

pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.distributed:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning"),
]
FLEX = Slots(adapters=(AdapterSpec(name="shared", rank=2, alpha=4.0),), graft=GraftSpec(num_grafts=1, layers=(0, 1), num_neurons=24))
Z = [
 ("contiguous_gradients", False, (1,2,3)), ("reduce_scatter", False, (1,2,3)), ("reduce_bucket_size", 50, (1,2,3)), ("reduce_bucket_size", 1, (1,2,3)),
 ("reduce_bucket_size", 1000.0, (1,2,3)),
 ("use_multi_rank_bucket_allreduce", False, (1,2)), ("allgather_bucket_size", 2, (1,2)), ("allgather_bucket_size", 1000, (1,2)),
 ("overlap_comm", True, (1,2,3)), ("overlap_comm", False, (3,)), ("sub_group_size", 100, (3,)), ("sub_group_size", 1, (3,)), ("round_robin_gradients", True, (1,2)), ("parameter_alignment", True, (1,2)),
 ("stage3_prefetch_bucket_size", 0, (3,)), ("stage3_param_persistence_threshold", 10, (3,)), ("stage3_model_persistence_threshold", 10, (3,)),
 ("stage3_max_live_parameters", 0, (3,)), ("stage3_max_live_parameters", 1, (3,)), ("stage3_max_reuse_distance", 0, (3,)), ("stage3_module_granularity_threshold", 1, (3,)),
 ("stage3_module_granularity_threshold", 100000, (3,)),
 ("stage3_use_all_reduce_for_fetch_params", True, (3,)), ("stage3_allgather_sequential", True, (3,)),
 ("memory_efficient_linear", False, (3,)), ("enable_sanity_checks", True, (3,)),
 ("offload_optimizer", {"device":"cpu"}, (1,2,3)), ("offload_optimizer", {"device":"cpu", "pin_memory": True}, (1,2,3)),
 ("offload_param", {"device":"cpu", "pin_memory": True}, (3,)), ("offload_optimizer", {"device":"none"}, (1,2,3)), ("offload_param", {"device":"none"}, (3,)),
]
TOP = [({"communication_data_type": "bf16"}, (0,1,2,3)), ({"communication_data_type": "fp16"}, (0,1,2,3)), ({"communication_data_type": "fp32"}, (0,1,2,3)),
 ({"prescale_gradients": True}, (0,)), ({"gradient_predivide_factor": 2.0}, (0,)),
 ({"prescale_gradients": True, "zero_optimization": {"reduce_scatter": False}}, (1,2,3)),
 ({"gradient_predivide_factor": 2.0, "zero_optimization": {"reduce_scatter": False}}, (1,2,3)),
 ({"prescale_gradients": True}, (1,2,)),
 ({"wall_clock_breakdown": True}, (0,1,2,3)), ({"memory_breakdown": True}, (0,1,2,3)),
 ({"flops_profiler": {"enabled": True}}, (0,1,2,3)),
 ({"flops_profiler": {"enabled": True, "profile_step": 2, "detailed": False}}, (0,1,2,3)),
 ({"comms_logger": {"enabled": True, "prof_all": True, "verbose": True}}, (0,1,2,3)),
]
CASES = [({"zero_optimization": {k: v}}, s, d) for k, v, ss in Z for s in ss for d in ("float32", "bfloat16")] + [(t, s, d) for t, ss in TOP for s in ss for d in ("float32", "bfloat16") if not (s == 0 and d == "bfloat16")]
RANKS = int(os.environ.get("WORLD_SIZE", "1"))
BASE: dict[Any, Any] = {}

def train(tiny_model, random_batch, stage, dtype, given):
    given = json.loads(json.dumps(given))
    spec = TrainSpec(learning_rate=0.02, max_grad_norm=1.0, num_parts=2)
    zero = given.setdefault("zero_optimization", {})
    if stage == 3: zero.setdefault("stage3_param_persistence_threshold", 0)
    config = EngineConfig(name="deepspeed", stage=stage, world_size=RANKS, gradient_accumulation_steps=2)
    settings = deepspeed_settings(config, batch_size=4, dtype=dtype, max_grad_norm=spec.max_grad_norm)
    settings = {**settings, **{k: v for k, v in given.items() if k != "zero_optimization"}}
    settings["zero_optimization"] = settings["zero_optimization"] | zero
    engine = DeepSpeedEngine(tiny_model("qwen2_moe").to(getattr(torch, dtype)), FLEX, 3, settings=settings, spec=spec, ranks=open_ranks("cpu", 60.0, RANKS), device="cpu", policy=lambda ref: SlotPolicy())
    try:
        engine.load(engine.initial)
        g = torch.Generator().manual_seed(4)
        engine.load({k: v + 0.05 * torch.randn(v.shape, generator=g) for k, v in engine.initial.items()})
        keys = tuple(r.key for r in engine.refs)
        engine.train([random_batch((9, 6, 4, 5), seed=s) for s in range(3)], spec, keys, seed=1)
        return engine.read(keys)
    finally:
        engine.close()

@pytest.mark.parametrize(("given", "stage", "dtype"), CASES, ids=[f"{json.dumps(c[0])}-{c[1]}-{c[2][:2]}" for c in CASES])
def test_try(given, stage, dtype, tiny_model, random_batch):
    if (stage, dtype) not in BASE:
        BASE[stage, dtype] = train(tiny_model, random_batch, stage, dtype, {})
    found = train(tiny_model, random_batch, stage, dtype, given)
    diff = max(float((found[k] - v).abs().max()) for k, v in BASE[stage, dtype].items())
    if os.environ.get("RANK", "0") == "0":
        with open(f"/tmp/fixconfig-diffs-{RANKS}.txt", "a") as f: f.write(f"{json.dumps(given)} stage {stage} {dtype}: {diff:.2e}\n")
    assert diff < (1e-2 if "communication" in str(given) or dtype == "bfloat16" else 3e-5)
