"""How many GPUs a replica gets where the configuration does not say: a fraction of one, one, or one for each of several ranks.

It follows from the memory plan of one rank (``fedgraft.platform.memory``) and from what nodes have. The answer is stated in the
configuration that is written down, so a run that is resumed has the same engine.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedgraft.errors import ConfigError, Problem
from fedgraft.platform.config import RunConfig
from fedgraft.platform.fitting import sharded, worst
from fedgraft.platform.machine import MachineFacts
from fedgraft.platform.model_sizes import ModelPlan, SlotSizes
from fedgraft.platform.progress import bytes_text

__all__ = ["MOST_PER_GPU", "Gpus", "is_to_work_out", "machine_gpus", "nodes_text", "with_gpus"]

MOST_PER_GPU = 4
"""Most replicas that share a GPU by themselves. An assumption: sharing fills the gaps between one replica's kernels, and no GPU
was at hand to measure where that ends. ``executor.gpus_per_replica`` may say less than a quarter."""

_STEP = 10_000  # Ray counts GPUs in ten-thousandths


@dataclass(frozen=True, kw_only=True, slots=True)
class Gpus:
    """What one node has: cores, GPUs, and bytes of its smallest GPU (``None``: not known)."""

    cores: float
    gpus: float
    gpu_bytes: int | None = None


def is_to_work_out(config: RunConfig) -> bool:
    """Whether the number is left open and matters."""
    executor = config.executor
    return executor.kind == "ray" and executor.gpus_per_replica is None and config.engine.device != "cpu"


def with_gpus(
    config: RunConfig, model: ModelPlan, slots: Mapping[str, SlotSizes], nodes: Sequence[Gpus], num_clients: int | None
) -> tuple[RunConfig, str]:
    """State the GPUs of a replica, and more ranks where a GPU is too small for a whole one.

    Replicas share a GPU as far as its memory allows it, but no more of them than there are clients in a round, cores beside
    each GPU, and ``MOST_PER_GPU``. Where the memory is not known each rank gets a GPU.

    Args:
        config: With the number left open, see ``is_to_work_out``.
        model: Its base.
        slots: Of every method, by label; the one that needs most decides.
        nodes: What there is.
        num_clients: Size of the population, where it is known.

    Returns:
        The configuration with the number in it, and what to tell the user: empty without GPUs.

    Raises:
        ConfigError: A GPU is asked for and there is none, or nothing makes a replica fit.
    """
    has = [node for node in nodes if node.gpus >= 1]
    if not has:
        if config.engine.device == "cuda":
            problem = Problem(path="engine.device", value="cuda", expected=f"auto or cpu; there is {nodes_text(nodes)}")
            raise ConfigError("GPUs", (problem,))
        return _stating(config, 0.0), ""
    known = [node.gpu_bytes for node in has if node.gpu_bytes is not None]
    stated = config.executor.gpu_gib
    size = int(stated * 2**30) if stated is not None else min(known, default=None)
    ranks = config.engine.world_size
    whole = _stating(config, float(ranks))
    if size is None or ranks > 1:
        why = "their memory is not known" if size is None else "each rank needs its own"
        return whole, f"a replica gets {ranks} GPU{'s' if ranks > 1 else ''}: {why}"
    total = sum(math.floor(node.gpus) for node in has)
    machine = MachineFacts(cores=1, memory_bytes=2**62, gpus=total, speed=1.0, gpu_bytes=size)
    label, need = worst(whole, model, slots, machine)
    if not need.fits_gpu:
        found = sharded(whole, model, slots, machine) if "world_size" not in config.engine.model_fields_set else None
        if found is None:
            raise _too_small(label, need.rank.device, size, nodes)
        return found[0], f"a replica of {label} needs {bytes_text(need.rank.device)}, a GPU has {bytes_text(size)}: {found[1]}"
    each = size // max(1, need.rank.device)
    cores = min(math.floor(node.cores / (config.executor.threads * math.floor(node.gpus))) for node in has)
    limits = [each, cores, MOST_PER_GPU]
    cohort = min((n for n in (config.federation.cohort_size, num_clients) if n is not None), default=None)
    if config.executor.replicas is not None or cohort is not None:
        limits.append(math.ceil((config.executor.replicas or cohort or 1) / total))
    sharing = max(1, min(limits))
    fraction = math.floor(_STEP / sharing) / _STEP
    many = f"{sharing} replicas share a GPU" if sharing > 1 else "a replica gets 1 GPU"
    return _stating(config, fraction), f"{many}: {label} needs {bytes_text(need.rank.device)} of {bytes_text(size)}"


def nodes_text(nodes: Sequence[Gpus]) -> str:
    """What there is, in words, alike nodes together: ``3 nodes with 8 cores and 2 GPUs``."""
    counted: dict[str, int] = {}
    for node in nodes:
        size = "" if node.gpu_bytes is None else f" of {bytes_text(node.gpu_bytes)}"
        text = f"{node.cores:g} cores and {node.gpus:g} GPUs{size}"
        counted[text] = counted.get(text, 0) + 1
    return ", ".join(f"{count} node{'s' if count > 1 else ''} with {text}" for text, count in counted.items()) or "no node"


def _too_small(label: str, needed: int, size: int, nodes: Sequence[Gpus]) -> ConfigError:
    problem = Problem(
        path="executor.gpus_per_replica",
        value=f"a replica of {label} that needs {bytes_text(needed)} of a GPU's {bytes_text(size)}",
        expected="GPUs that it fits, alone or sharded over ranks",
        hint=f"there is {nodes_text(nodes)}; lower federation.batch_size or data.max_length, or set engine.world_size and stage",
    )
    return ConfigError("GPUs", (problem,))


def _stating(config: RunConfig, gpus: float) -> RunConfig:
    fields: dict[str, Any] = {"gpus_per_replica": gpus}
    stated = {name: getattr(config.executor, name) for name in config.executor.model_fields_set}
    executor = type(config.executor).model_validate(stated | fields)
    tree = {name: getattr(config, name) for name in config.model_fields_set}
    return RunConfig.model_validate(tree | {"executor": executor})


def machine_gpus(machine: MachineFacts) -> Gpus:
    """One machine as a node."""
    return Gpus(cores=float(machine.cores), gpus=float(machine.gpus), gpu_bytes=machine.gpu_bytes)
