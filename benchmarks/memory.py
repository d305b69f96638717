"""One base per node: private memory (USS) of each replica process before a base is loaded, after, and after training.

    python benchmarks/memory.py                              torch, and DeepSpeed at ZeRO 0 to 3 with one and two ranks
    python benchmarks/memory.py --rows torch zero2x1 --gib 2

A random Qwen2-MoE base of at least 1 GB (float32) is written once into a temporary folder in the layout that replicas map.
Then, one setting after another, two processes are started as the platform does it, in a Ray pool: two replicas, or one replica
of two ranks. Each tells its USS (memory that no other process shares)

    before    with everything imported and, for DeepSpeed, its process group open, but no base;
    loaded    with the engine built over the base, before the first step;
    read      after reading every weight once, so that all of the base's pages are in memory: a page that only one process maps
              counts as its own, so this is where sharing shows;
    trained   after some local steps.

Growth is over ``before``, in percent of the base. For torch and ZeRO 0 to 2 at most 5 % is allowed up to ``read``; if more is
found, or the base is below 1 GB (then nothing is judged), the record says so; the exit code is 1 where a limit is broken. ZeRO 3
copies each rank's share of the base: what it costs is printed on stderr and is in its row. One JSON line on stdout.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import platform
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import ray
import torch
from tokenizers import Tokenizer, models
from torch import distributed as dist
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen2MoeConfig

import fedgraft.aggregation  # noqa: F401  (registers the methods)
from fedgraft.actors.hosting import PoolOptions
from fedgraft.actors.pool import RayPool
from fedgraft.moe.base import cache_base, open_base
from fedgraft.moe.families import model_facts
from fedgraft.protocols import Engine, Method, TrainSpec
from fedgraft.registry import METHODS
from fedgraft.training.config import EngineConfig, deepspeed_settings
from fedgraft.training.torch_engine import TorchEngine
from fedgraft.types import FROZEN, IGNORE_INDEX, Batch

LIMIT_PERCENT = 5.0
SMALLEST_JUDGED = 10**9
PROCESSES = 2  # one alone would share its pages with nobody, and all it reads would count as its own
HIDDEN, EXPERT_HIDDEN, LAYERS, VOCABULARY = 512, 1024, 4, 64
STAGES = ("before", "loaded", "read", "trained")


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One setting of the engine; ``stage`` is ZeRO's, ``None`` for plain torch."""

    stage: int | None = None
    world_size: int = 1

    @property
    def label(self) -> str:
        return "torch" if self.stage is None else f"zero{self.stage}x{self.world_size}"

    @property
    def is_limited(self) -> bool:
        """Whether the base must stay shared; ZeRO 3 shards it into private memory."""
        return self.stage != 3

    @property
    def pool(self) -> PoolOptions:
        """Two processes: as many replicas of ``world_size`` ranks."""
        replicas = PROCESSES // self.world_size
        return PoolOptions(replicas=replicas) if self.world_size == 1 else PoolOptions(replicas=replicas, ranks=self.world_size)


ROWS = {row.label: row for row in (Row(), *(Row(stage=stage, world_size=world) for world in (1, 2) for stage in range(4)))}


@dataclass(frozen=True, kw_only=True, slots=True)
class Spec:
    """What a replica builds and does; ``method`` are a method's options."""

    row: Row
    base: Path
    method: Mapping[str, Any]
    steps: int
    train: TrainSpec
    batch_size: int = 2
    length: int = 64

    def __call__(self) -> Measured:
        """Make the hosted object, in the replica's process."""
        return Measured(self)


class Measured:
    """What a replica hosts here: it builds an engine step by step and tells its memory in between."""

    def __init__(self, spec: Spec) -> None:
        torch.set_num_threads(1)
        import peft  # noqa: F401  (the engine imports it late; it must not count as the base's)
        from transformers.models.qwen2_moe import modeling_qwen2_moe  # noqa: F401  (as above)

        self._spec = spec
        self._method = METHODS.parse(spec.method)
        self._engine: Engine | None = None
        if spec.row.stage is not None:
            from fedgraft.training.ranks import open_ranks

            self._ranks = open_ranks("cpu", 120.0, spec.row.world_size)

    def memory(self) -> list[dict[str, int]]:
        """Private and proportional memory of this process, or of all ranks of this replica, bytes."""
        gc.collect()
        found = psutil.Process().memory_full_info()
        mine = {"pid": os.getpid(), "uss": int(found.uss), "pss": int(found.pss)}
        if self._spec.row.world_size == 1:
            return [mine]
        everyone: list[Any] = [None] * self._spec.row.world_size
        dist.all_gather_object(everyone, mine)
        return everyone

    def load(self) -> int:
        """Build the engine over the mapped base, with the method's slots at their start; gives the slots' bytes."""
        model = open_base(self._spec.base)
        slots = self._method.slots(model_facts(model.config))
        self._engine = _engine(self._spec, model, slots, self._method, getattr(self, "_ranks", None))
        self._engine.load(self._engine.initial)
        return sum(4 * ref.num_elements for ref in self._engine.refs)

    def read(self) -> str:
        """Read every weight of the base once."""
        assert self._engine is not None
        return self._engine.frozen_hash()

    def train(self) -> float:
        """Run local steps on random tokens; gives the last loss."""
        assert self._engine is not None
        spec = self._spec
        generator = torch.Generator().manual_seed(1)
        batches = []
        for _ in range(spec.steps):
            ids = torch.randint(VOCABULARY, (spec.batch_size, spec.length), generator=generator)
            labels = ids.clone()
            labels[:, : spec.length // 2] = IGNORE_INDEX
            batches.append(Batch(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels))
        keys = tuple(ref.key for ref in self._engine.refs if self._method.group(ref) != FROZEN)
        return self._engine.train(batches, spec.train, keys, seed=0).losses[-1]

    def close(self) -> None:
        """Let go of the engine and its process group."""
        if self._spec.row.stage is not None:
            from fedgraft.training.ranks import close_ranks

            if self._engine is not None:
                self._engine.close()
            close_ranks()


def _engine(spec: Spec, model: Any, slots: Any, method: Method, ranks: Any) -> Engine:
    if spec.row.stage is None:
        return TorchEngine(model, slots, 0)
    from fedgraft.training.deepspeed_engine import DeepSpeedEngine, SlotPolicy

    config = EngineConfig(name="deepspeed", stage=spec.row.stage, world_size=spec.row.world_size)
    settings = deepspeed_settings(config, batch_size=spec.batch_size, dtype="float32", max_grad_norm=spec.train.max_grad_norm)
    return DeepSpeedEngine(
        model,
        slots,
        0,
        settings=settings,
        spec=spec.train,
        ranks=ranks,
        device="cpu",
        policy=lambda ref: SlotPolicy(is_trained=method.group(ref) != FROZEN, lr_scale=method.lr_scale(ref)),
    )


def make_base(folder: Path, gib: float) -> tuple[Path, int]:
    """Write a random base of at least ``gib`` GiB as replicas map it; gives its folder and the bytes of its weights."""
    per_expert = 4 * LAYERS * 3 * HIDDEN * EXPERT_HIDDEN
    config = Qwen2MoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=8,
        num_key_value_heads=8,
        num_experts=max(4, math.ceil(gib * 2**30 / per_expert)),
        num_experts_per_tok=4,
        moe_intermediate_size=EXPERT_HIDDEN,
        shared_expert_intermediate_size=EXPERT_HIDDEN,
        intermediate_size=EXPERT_HIDDEN,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    with tempfile.TemporaryDirectory(dir=folder) as checkpoint:
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(checkpoint)
        PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w1").save_pretrained(checkpoint)
        base = cache_base(checkpoint, "float32", folder / "cache")
    return base, sum(path.stat().st_size for path in base.glob("*.safetensors"))


def measure(spec: Spec, base_bytes: int) -> dict[str, Any]:
    """Start two processes of a setting, go through the stages, and say what each grew by."""
    started = time.perf_counter()
    pool = RayPool(spec.row.pool)
    try:
        pool.host(spec)
        memory = {"before": _flat(pool.call("memory"))}
        slot_bytes = pool.call("load")[0]
        memory["loaded"] = _flat(pool.call("memory"))
        hashes = set(pool.call("read"))
        memory["read"] = _flat(pool.call("memory"))
        losses = pool.call("train")
        memory["trained"] = _flat(pool.call("memory"))
        pool.call("close")
    finally:
        pool.close()
    return {
        **row_of(spec.row, memory, base_bytes),
        "slot_bytes": slot_bytes,
        "same_base": len(hashes) == 1,
        "last_loss": losses[0],
        "seconds": round(time.perf_counter() - started, 1),
    }


def row_of(row: Row, memory: dict[str, list[dict[str, int]]], base_bytes: int) -> dict[str, Any]:
    """Turn what each process told at each stage into growth in percent of the base; ``holds`` is ``None`` where not judged."""
    uss = {stage: [each["uss"] for each in memory[stage]] for stage in STAGES}
    growth = {
        stage: [round(100 * (now - before) / base_bytes, 2) for now, before in zip(uss[stage], uss["before"], strict=True)]
        for stage in STAGES[1:]
    }
    worst = max(max(growth["loaded"]), max(growth["read"]))
    is_judged = row.is_limited and base_bytes >= SMALLEST_JUDGED
    return {
        "row": row.label,
        **asdict(row),
        "pids": [each["pid"] for each in memory["before"]],
        "uss_bytes": uss,
        "pss_bytes": {stage: [each["pss"] for each in memory[stage]] for stage in STAGES},
        "growth_percent": growth,
        "limit_percent": LIMIT_PERCENT if is_judged else None,
        "holds": worst <= LIMIT_PERCENT if is_judged else None,
    }


def _flat(replies: list[list[dict[str, int]]]) -> list[dict[str, int]]:
    return [each for reply in replies for each in reply]


def run(labels: Sequence[str], *, gib: float, method: str, steps: int) -> dict[str, Any]:
    """Measure the settings one after another on a Ray of its own, over one base."""
    rows = []
    with tempfile.TemporaryDirectory(prefix="fedgraft-memory-") as folder:
        base, base_bytes = make_base(Path(folder), gib)
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        has_ray = ray.is_initialized()
        if not has_ray:
            ray.init(num_cpus=2 * PROCESSES, include_dashboard=False, log_to_driver=False)
        try:
            for label in labels:
                row = measure(
                    Spec(row=ROWS[label], base=base, method={"name": method}, steps=steps, train=TrainSpec(learning_rate=1e-3)),
                    base_bytes,
                )
                rows.append(row)
                print(line_of(row, base_bytes), file=sys.stderr)
        finally:
            if not has_ray:
                ray.shutdown()
    return {
        "benchmark": "memory",
        "machine": f"{psutil.cpu_count()} cores, {psutil.virtual_memory().total / 2**30:.0f} GiB, {platform.machine()}",
        "versions": {name: metadata.version(name) for name in ("torch", "transformers", "ray", "deepspeed", "safetensors")},
        "base_bytes": base_bytes,
        "method": method,
        "steps": steps,
        "rows": rows,
    }


def line_of(row: dict[str, Any], base_bytes: int) -> str:
    """One line for whoever watches; for ZeRO 3 it is the statement of what that costs."""
    growth = "; ".join(f"{stage} {max(row['growth_percent'][stage]):+.1f} %" for stage in STAGES[1:])
    verdict = {True: "limit holds", False: f"MORE THAN {LIMIT_PERCENT:g} %", None: "not judged"}[row["holds"]]
    if row["stage"] == 3:
        cost = max(row["growth_percent"]["loaded"]) * base_bytes / 100
        verdict = (
            f"ZeRO 3 takes {cost / 1e6:.0f} MB of private memory in each process to load a base of {base_bytes / 1e6:.0f} MB"
        )
    return f"{row['row']}: private memory over the base: {growth}; {verdict}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS), metavar="ROW", help=", ".join(ROWS))
    parser.add_argument("--gib", type=float, default=1.0, help="least size of the base, GiB of float32")
    parser.add_argument("--method", choices=("fedavg", "flex"), default="fedavg", help="its slots are private memory, too")
    parser.add_argument("--steps", type=int, default=3, help="local steps of each process")
    parser.add_argument("--out", type=Path, help="also write the record to this file")
    given = parser.parse_args(arguments)
    if not 0 < given.gib <= 64 or given.steps < 1:
        parser.error(f"--gib {given.gib:g} --steps {given.steps}: expected 0 < gib <= 64, steps >= 1")
    if given.out is not None and not given.out.parent.is_dir():
        parser.error(f"--out {given.out}: the folder {given.out.parent} does not exist; make it first")
    record = run(given.rows, gib=given.gib, method=given.method, steps=given.steps)
    print(json.dumps(record))
    if given.out is not None:
        given.out.write_text(json.dumps(record, indent=1) + "\n")
    return 1 if any(row["holds"] is False for row in record["rows"]) else 0


if __name__ == "__main__":
    raise SystemExit(main())
