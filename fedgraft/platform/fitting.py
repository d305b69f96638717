"""Whether a run fits its machine, how many replicas do, and what to change where one does not.

A suggestion is only made after the plan was worked out with it and fits.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from fedgraft.errors import ConfigError, ModelError, Problem
from fedgraft.platform.config import RunConfig
from fedgraft.platform.machine import MachineFacts
from fedgraft.platform.memory import PARTS, RankMemory, is_on_gpu, rank_memory
from fedgraft.platform.model_sizes import ModelPlan, SlotSizes
from fedgraft.platform.progress import bytes_text
from fedgraft.training.deepspeed_engine import refuse_slots

__all__ = ["Need", "is_cluster", "need_of", "num_replicas", "refusal_of", "sharded", "worst"]

_RANKS = (2, 4, 8)


@dataclass(frozen=True, kw_only=True, slots=True)
class Need:
    """What replicas of ``ranks`` ranks need, and what there is, bytes.

    ``gpu_limit`` is the part of a GPU that one rank may take; ``None`` without a GPU, or where its size is not known.
    """

    rank: RankMemory
    ranks: int
    host_limit: int
    gpu_limit: int | None

    def host(self, replicas: int) -> int:
        """Bytes of the node's memory."""
        return self.rank.shared + replicas * self.ranks * self.rank.host

    @property
    def most_replicas(self) -> int:
        """How many replicas the node's memory holds; 0 where a rank does not fit its GPU."""
        if not self.fits_gpu:
            return 0
        return max(0, self.host_limit - self.rank.shared) // max(1, self.ranks * self.rank.host)

    @property
    def fits_gpu(self) -> bool:
        """Whether a rank fits its part of a GPU, or nothing is known of it."""
        return self.gpu_limit is None or self.rank.device <= self.gpu_limit

    @property
    def fits(self) -> bool:
        """Whether one replica fits."""
        return self.most_replicas >= 1

    @property
    def excess(self) -> int:
        """Bytes that one replica needs beyond what there is, on host and GPU together."""
        on_gpu = 0 if self.gpu_limit is None else max(0, self.rank.device - self.gpu_limit)
        return on_gpu * self.ranks + max(0, self.host(1) - self.host_limit)

    def text(self) -> str:
        """Both sides in words, for one replica."""
        parts = [f"{bytes_text(self.host(1))} of the machine's {bytes_text(self.host_limit)} free"]
        if self.rank.device:
            of = "?" if self.gpu_limit is None else bytes_text(self.gpu_limit)
            parts.append(f"{bytes_text(self.rank.device)} of {of} on the GPU of each rank")
        return " and ".join(parts)


def is_cluster(config: RunConfig) -> bool:
    """Whether replicas may be on other nodes than this one, whose memory is not known here."""
    return config.executor.kind == "ray" and (config.executor.address or os.environ.get("RAY_ADDRESS")) is not None


def need_of(config: RunConfig, model: ModelPlan, slots: SlotSizes, machine: MachineFacts) -> Need:
    """Work out what a replica of a method needs, and what this machine gives it."""
    on_gpu = is_on_gpu(config, machine.gpus)
    ranks = config.engine.world_size
    limit = None
    stated = config.executor.gpu_gib
    gpu_bytes = machine.gpu_bytes if stated is None else int(stated * 2**30)
    if on_gpu and gpu_bytes is not None:
        limit = int(gpu_bytes * min(1.0, (config.executor.gpus or ranks) / ranks))
    rank = rank_memory(config, model, slots, on_gpu=on_gpu)
    return Need(rank=rank, ranks=ranks, host_limit=machine.memory_bytes, gpu_limit=limit)


def num_replicas(config: RunConfig, num_clients: int | None, machine: MachineFacts, need: Need) -> int:
    """How many replicas fit: as many as configured, else as cores, memory and clients of a round allow; at least 1.

    Args:
        config: Gives ``executor.replicas``, threads, GPUs a replica, and the cohort.
        num_clients: Size of the population, ``None`` where it is not known.
        machine: What there is.
        need: Of one replica.
    """
    executor = config.executor
    if executor.kind == "in_process":
        return 1
    if executor.replicas is not None:
        return executor.replicas
    limits = [machine.cores // (executor.threads * config.engine.world_size), need.most_replicas]
    limits += [size for size in (config.federation.cohort_size, num_clients) if size is not None]
    if executor.gpus > 0:
        limits.append(int(machine.gpus / executor.gpus))
    return max(1, min(limits))


def refusal_of(config: RunConfig, model: ModelPlan, slots: Mapping[str, SlotSizes], machine: MachineFacts) -> ConfigError | None:
    """Say why a run cannot fit this machine, with a change that was checked to fit; ``None`` where it can.

    On a cluster that is joined nothing is refused: its nodes are not known here.

    Args:
        config: The run.
        model: Its base.
        slots: The slots of every method, by label; the one that needs most decides.
        machine: What there is.
    """
    if is_cluster(config):
        return None
    label, need = worst(config, model, slots, machine)
    if not need.fits:
        problem = Problem(
            path=_path_of(config, label, need),
            value=f"one replica of {label} needs {need.text()}",
            expected=f"a replica that fits; {_largest_parts(need)}",
            hint=_suggest(config, model, slots, machine),
        )
        return ConfigError("memory plan", (problem,))
    wanted, most = config.executor.replicas, need.most_replicas
    if wanted is not None and wanted > most:
        per = f"{bytes_text(need.rank.host * need.ranks)} each for {label}"
        problem = Problem(
            path="executor.replicas",
            value=f"{wanted}, which need {bytes_text(need.host(wanted))} ({bytes_text(need.rank.shared)} shared, {per})",
            expected=f"at most {most}: {bytes_text(need.host_limit)} are free",
            hint=f"set executor.replicas={most}, or leave it out",
        )
        return ConfigError("memory plan", (problem,))
    return None


def sharded(
    config: RunConfig, model: ModelPlan, slots: Mapping[str, SlotSizes], machine: MachineFacts
) -> tuple[RunConfig, str] | None:
    """Find the fewest ranks, each with a GPU of its own, whose shares fit their GPUs, and say what was changed.

    Returns:
        ``None`` where no number of ranks that the machine's GPUs allow makes it fit.
    """
    for changes in _places(config, 0, machine):
        if "engine.world_size" not in changes:
            continue
        changed = _apply(config, changes)
        if changed is None or not _can_shard(changed, slots):
            continue
        if worst(changed, model, slots, machine)[1].fits_gpu:
            return changed, " ".join(f"{path}={_value(value)}" for path, value in changes.items())
    return None


def worst(config: RunConfig, model: ModelPlan, slots: Mapping[str, SlotSizes], machine: MachineFacts) -> tuple[str, Need]:
    """The method whose replica needs most, and what it needs."""
    needs = {label: need_of(config, model, each, machine) for label, each in slots.items()}
    label = max(needs, key=lambda name: (needs[name].excess, needs[name].rank.private))
    return label, needs[label]


def _largest_parts(need: Need) -> str:
    sizes = {name: getattr(need.rank, name) for name in PARTS} | {"shared weights": need.rank.shared}
    first = sorted(sizes, key=lambda name: sizes[name], reverse=True)[:3]
    listed = ", ".join(f"{name} {bytes_text(sizes[name])}" for name in first if sizes[name])
    return f"most is {listed}{' in each rank' if need.ranks > 1 else ''}"


def _path_of(config: RunConfig, label: str, need: Need) -> str:
    """The key that the largest part hangs on."""
    rank = need.rank
    by_key = {
        "federation.batch_size": rank.training if rank.training >= rank.evaluation else 0,
        "evaluation.batch_size": rank.evaluation if rank.evaluation > rank.training else 0,
        "model": max(rank.shared, rank.weights),
        "method" if config.compare is None else f"compare.methods.{label}": rank.optimizer + rank.gradients + rank.graft,
    }
    return max(by_key, key=lambda key: by_key[key])


def _suggest(config: RunConfig, model: ModelPlan, slots: Mapping[str, SlotSizes], machine: MachineFacts) -> str:
    """The first change that makes one replica fit, or the one that comes closest."""
    best: tuple[int, str] | None = None
    for changes in _changes(config, machine):
        changed = _apply(config, changes)
        if changed is None or not _can_shard(changed, slots):
            continue
        _, need = worst(changed, model, slots, machine)
        words = " ".join(f"{path}={_value(value)}" for path, value in changes.items())
        if need.fits:
            return f"set {words}: then it needs {need.text()}"
        if best is None or need.excess < best[0]:
            best = (need.excess, f"the least is {need.text()}, with {words}")
    narrow = "" if config.model.dtype == "bfloat16" else "model.dtype=bfloat16, "
    advice = f"take a smaller model, {narrow}a lower data.max_length, or a machine with more memory"
    if best is None:
        return advice
    return f"no number of parts, ZeRO stage, offload or number of ranks makes it fit; {best[1]}; {advice}"


def _changes(config: RunConfig, machine: MachineFacts) -> Iterator[dict[str, Any]]:
    """Changes to try, the mildest first: parts, then a higher stage, offload, more ranks, each also with more parts.

    Each of them is also tried with smaller evaluation batches, which cost nothing but time.
    """
    engine = config.engine
    stage = engine.zero_stage if engine.resolved(has_gpu=is_on_gpu(config, machine.gpus)).name == "deepspeed" else 0
    for places in _places(config, stage, machine):
        ranks = places.get("engine.world_size", engine.world_size)
        for parts in _doubled(engine.gradient_accumulation_steps, -(-config.federation.batch_size // ranks)):
            for rows in _halved(config.evaluation.batch_size):
                found = dict(places)
                if parts != engine.gradient_accumulation_steps:
                    found["engine.gradient_accumulation_steps"] = parts
                if rows != config.evaluation.batch_size:
                    found["evaluation.batch_size"] = rows
                if found:
                    yield found


def _places(config: RunConfig, stage: int, machine: MachineFacts) -> Iterator[dict[str, Any]]:
    """Where things lie: as it is, stages, offload, ranks."""
    yield {}
    for higher in range(stage + 1, 4):
        yield {"engine.stage": higher}
    offload: list[dict[str, Any]] = []
    for at in range(max(1, stage), 4):
        offload.append({"engine.stage": at, "engine.offload_optimizer": True})
    offload.append({"engine.stage": 3, "engine.offload_optimizer": True, "engine.offload_param": True})
    yield from offload
    for ranks in _RANKS:
        if ranks <= config.engine.world_size:
            continue
        on_gpu: dict[str, Any] = {}
        if config.executor.gpus > 0:
            if machine.gpus < ranks:
                continue
            on_gpu = {"executor.gpus_per_replica": float(ranks)}
        for place in ({"engine.stage": 2}, {"engine.stage": 3}, *offload):
            if place["engine.stage"] >= max(2, stage):
                yield {"engine.world_size": ranks, **place, **on_gpu}


def _apply(config: RunConfig, changes: Mapping[str, Any]) -> RunConfig | None:
    """The configuration with changes in it; ``None`` where it would be refused, e.g. several ranks in one process."""
    sections: dict[str, dict[str, Any]] = {}
    for path, value in changes.items():
        section, _, name = path.partition(".")
        sections.setdefault(section, {})[name] = value
    try:
        changed = {
            name: type(getattr(config, name)).model_validate(_stated(getattr(config, name)) | values)
            for name, values in sections.items()
        }
        return RunConfig.model_validate(_stated(config) | changed)
    except ValueError:  # pydantic's own error is one
        return None


def _stated(part: BaseModel) -> dict[str, Any]:
    return {name: getattr(part, name) for name in part.model_fields_set}


def _can_shard(config: RunConfig, slots: Mapping[str, SlotSizes]) -> bool:
    try:
        for each in slots.values():
            refuse_slots(each.slots, config.engine.zero_stage)
    except ModelError:
        return False
    return True


def _doubled(start: int, most: int) -> Iterator[int]:
    yield start
    while start < most:
        start = min(2 * start, most)
        yield start


def _halved(start: int) -> Iterator[int]:
    yield start
    while start > 1:
        start //= 2
        yield start


def _value(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)
