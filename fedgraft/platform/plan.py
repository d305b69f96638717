"""What a run will need, said before anything is loaded: sizes, memory, bytes a round, steps, and a rough time.

Sizes and bytes are exact for what a method sends as parameters: the model is built on PyTorch's meta device (shapes without
values), a method's slots are put into it, and the method says which group each slot is in. Extras and statistics, which some
methods send beside parameters, are known only when they run. Memory and time are estimates with the formulas given here.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.console import Group as RenderGroup
from rich.console import RenderableType
from rich.rule import Rule
from rich.table import Table
from rich.text import Text
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from fedgraft.data.config import DataConfig
from fedgraft.data.corpus import CLIENT_DOMAINS, generate
from fedgraft.errors import ModelError
from fedgraft.moe.base import facts_of
from fedgraft.moe.families import family_of, model_facts
from fedgraft.moe.slots import add_slots
from fedgraft.platform.bundled_model import bundled_hf_config
from fedgraft.platform.config import ModelConfig, RunConfig
from fedgraft.platform.loading import dump_config
from fedgraft.platform.progress import bytes_text
from fedgraft.protocols import Method
from fedgraft.registry import METHODS
from fedgraft.types import FROZEN, ModelFacts, ParamRef

__all__ = [
    "REPLICA_BYTES",
    "MachineFacts",
    "MethodPlan",
    "ModelPlan",
    "Plan",
    "SlotCount",
    "activation_bytes",
    "flops_per_token",
    "free_memory",
    "make_plan",
    "measure_speed",
    "num_replicas",
    "usable_cores",
]

REPLICA_BYTES = 500 * 2**20
"""What a replica process takes beside the model: PyTorch, Transformers and Ray."""

_EFFICIENCY = 0.3
"""Share of a plain product's speed that training reaches: attention, routing and optimiser are not products of this size."""

_SHOWN_GROUPS = ("shared", "assigned", "private")


@dataclass(frozen=True, kw_only=True, slots=True)
class SlotCount:
    """Values and bytes of a method's slots of one group (``shared``, ``assigned``, ``private``, ``frozen``)."""

    group: str
    num_values: int
    num_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelPlan:
    """The base model from its configuration alone.

    ``active_parameters`` are those that one token passes through as products: routed experts count top-k of E, a table of
    input embeddings that is no output layer does not count. ``weight_bytes`` lie once per node on a CPU.
    """

    name: str
    facts: ModelFacts
    num_parameters: int
    active_parameters: int
    weight_bytes: int
    vocabulary: int


@dataclass(frozen=True, kw_only=True, slots=True)
class MachineFacts:
    """What this machine offers: cores and free memory of the container, GPUs, and a measured speed in FLOPs a second."""

    cores: int
    memory_bytes: int
    gpus: int
    speed: float


@dataclass(frozen=True, kw_only=True, slots=True)
class MethodPlan:
    """What one method will need. Bytes and steps are those of all seeds; ``None`` where the number of clients is not known.

    ``replica_bytes`` is the memory of a replica beside the weights that all replicas map; ``search_rounds`` are rounds of
    the rate search, whose bytes no ledger of a run counts; ``seconds`` covers both.
    """

    label: str
    method: str
    slots: tuple[SlotCount, ...]
    sent_bytes: Mapping[str, int]
    replica_bytes: int
    replicas: int
    rounds: int
    search_rounds: int
    local_steps: int | None
    run_bytes: int | None
    seconds: float | None

    def values(self, group: str) -> int:
        """Values of the slots of a group."""
        return sum(count.num_values for count in self.slots if count.group == group)

    @property
    def bytes_per_round(self) -> int:
        """Bytes that go to one client in one round; as many come back."""
        return sum(self.sent_bytes.values())


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """The whole run; print it with rich."""

    config: str
    model: ModelPlan
    machine: MachineFacts
    num_clients: int | None
    cohort_size: int | None
    tokens_per_example: int
    evaluated_examples: int | None
    methods: tuple[MethodPlan, ...]
    seeds: int

    @property
    def seconds(self) -> float | None:
        """Rough time of all methods and seeds together."""
        each = [method.seconds for method in self.methods]
        return sum(second for second in each if second is not None) if all(s is not None for s in each) else None

    def __rich__(self) -> RenderableType:
        """Draw it."""
        return RenderGroup(
            Rule("configuration"), Text(self.config.rstrip()), Rule("plan"), self._facts(), Text(), self._table(), self._notes()
        )

    def _facts(self) -> Table:
        model, facts = self.model, self.model.facts
        clients = "as many as the data has labels" if self.num_clients is None else str(self.num_clients)
        grid = Table.grid(padding=(0, 2))
        for name, text in (
            (
                "model",
                f"{model.name} ({facts.family}): {_count(model.num_parameters)} parameters, {_count(model.active_parameters)} "
                f"active; {len(facts.layers)} MoE layers of {facts.num_experts} experts, top {facts.top_k}",
            ),
            ("weights", f"{bytes_text(model.weight_bytes)}, once per node on a CPU, once per replica on a GPU"),
            ("machine", f"{self.machine.cores} cores, {bytes_text(self.machine.memory_bytes)} free, {self.machine.gpus} GPUs"),
            ("clients", f"{clients}; {'all' if self.cohort_size is None else self.cohort_size} in a round; {self.seeds} seed(s)"),
            ("time", f"about {_duration(self.seconds)}, to within a factor of three" if self.seconds else "not known"),
        ):
            grid.add_row(Text(name, style="bold"), Text(text))
        return grid

    def _table(self) -> Table:
        groups = [group for group in _SHOWN_GROUPS if group != "assigned" or any(each.values(group) for each in self.methods)]
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        table.add_column("method", no_wrap=True)
        titles = [f"{group}\nvalues" for group in groups]
        titles += ["down\na round", "whole\nrun", "replica\nmemory", "repli-\ncas", "rounds"]
        for title in (*titles, "local\nsteps", "rough\ntime"):
            table.add_column(title, justify="right", no_wrap=True)
        for each in self.methods:
            rounds = f"{each.rounds}+{each.search_rounds}" if each.search_rounds else str(each.rounds)
            by_group = [f"{group} {bytes_text(size)}" for group, size in each.sent_bytes.items()]
            table.add_row(
                Text(each.label),
                *(_count(each.values(group)) for group in groups),
                "\n".join(by_group) if len(by_group) > 1 else bytes_text(each.bytes_per_round),
                "?" if each.run_bytes is None else bytes_text(each.run_bytes),
                bytes_text(each.replica_bytes),
                str(each.replicas),
                rounds,
                "?" if each.local_steps is None else str(each.local_steps),
                "?" if each.seconds is None else _duration(each.seconds),
            )
        return table

    def _notes(self) -> Text:
        notes = [
            "down a round: bytes to one client in one round; as many come up. whole run: both ways, all clients and seeds.",
            "Extras and statistics, which some methods send beside parameters, are not in it. Memory is beside the weights.",
            f"Time is for {self.tokens_per_example} tokens an example on this machine.",
        ]
        if any(each.search_rounds for each in self.methods):
            notes.append("rounds + rounds of the learning-rate search; steps and time cover both, bytes the run alone.")
        if self.evaluated_examples is None:
            notes.append("The size of the test splits is known only with the data: the time is that of training alone.")
        return Text("\n".join(notes), style="dim")


def make_plan(config: RunConfig, machine: MachineFacts | None = None) -> Plan:
    """Work out what a run will need, without loading weights or data.

    Args:
        config: A valid configuration.
        machine: What to plan for; ``None``: this machine, with a speed measured in about 0.2 s.

    Raises:
        ModelError: The model's configuration cannot be read, or it is of an unknown family.
    """
    hf_config = _hf_config(config.model)
    model = _model_plan(config.model, hf_config)
    num_clients = _num_clients(config.data)
    cohort = config.federation.cohort_size
    if num_clients is not None and cohort is not None:
        cohort = min(cohort, num_clients)
    tokens = _tokens_per_example(config.data)
    evaluated = _evaluated_examples(config.data, num_clients)
    found = machine or _this_machine(config, model.facts)
    plans = tuple(
        _method_plan(config, label, METHODS.build(method), hf_config, model, found, num_clients, tokens, evaluated)
        for label, method in config.methods().items()
    )
    return Plan(
        config=dump_config(config),
        model=model,
        machine=found,
        num_clients=num_clients,
        cohort_size=cohort,
        tokens_per_example=tokens,
        evaluated_examples=evaluated,
        methods=plans,
        seeds=len(config.seeds),
    )


def num_replicas(config: RunConfig, num_clients: int | None, machine: MachineFacts, bytes_each: int) -> int:
    """How many replicas fit: as many as configured, else as cores, memory and clients of a round allow; at least 1.

    Args:
        config: Gives ``executor.replicas``, threads, GPUs a replica, and the cohort.
        num_clients: Size of the population, ``None`` where it is not known.
        machine: What there is.
        bytes_each: Memory of one replica, without the weights that all map.
    """
    executor = config.executor
    if executor.kind == "in_process":
        return 1
    if executor.replicas is not None:
        return executor.replicas
    limits = [machine.cores // (executor.threads * config.engine.world_size), machine.memory_bytes // max(1, bytes_each)]
    limits += [size for size in (config.federation.cohort_size, num_clients) if size is not None]
    if executor.gpus_per_replica > 0:
        limits.append(int(machine.gpus / executor.gpus_per_replica))
    return max(1, min(limits))


def activation_bytes(model: ModelPlan, tokens: int) -> int:
    """Estimate what a training step keeps for its backward pass.

    Per token and layer 12 D (two norms, queries, keys, values, attention's output and its projection, two residuals) and in an
    MoE layer K (4 F + 2 D) (gate, up, their product, its activation; input and output of each of K experts); per token
    2 V at the output layer (logits and their gradient); 4 bytes each. D model, F expert hidden, K top-k, V vocabulary.
    """
    facts = model.facts
    layers = facts.num_layers * 12 * facts.hidden_size
    experts = len(facts.layers) * facts.top_k * (4 * facts.expert_size + 2 * facts.hidden_size)
    return 4 * tokens * (layers + experts + 2 * model.vocabulary)


def flops_per_token(active: int, trained: int, *, is_training: bool) -> int:
    """Count a token's FLOPs: 2 active forward; training adds 2 active for activations' gradients and 6 trained for slots.

    A frozen weight costs 2 forward and 2 backward (it passes the gradient on, but needs none itself); a trained value costs
    2 forward, 2 backward and 2 for its own gradient. ``trained`` counts the values that a token passes through.
    """
    return 4 * active + 6 * trained if is_training else 2 * (active + trained)


def measure_speed(hidden: int, expert: int, threads: int, seconds: float = 0.2) -> float:
    """Measure how fast this machine multiplies matrices of the model's size, in FLOPs a second, on ``threads`` threads."""
    before = torch.get_num_threads()
    rows = 512
    left, right = torch.ones(rows, hidden), torch.ones(hidden, 2 * expert)
    torch.set_num_threads(threads)
    try:
        torch.mm(left, right)
        count, started = 0, time.perf_counter()
        while time.perf_counter() - started < seconds:
            torch.mm(left, right)
            count += 1
        took = time.perf_counter() - started
    finally:
        torch.set_num_threads(before)
    return max(1, count) * 2.0 * rows * hidden * 2 * expert / took


def usable_cores() -> int:
    """Cores that this process may use: its affinity, and a container's quota where there is one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _read_words(Path("/sys/fs/cgroup/cpu.max"))
    if len(quota) == 2 and quota[0].isdigit() and int(quota[1]) > 0:
        cores = min(cores, max(1, int(quota[0]) // int(quota[1])))
    return cores


def free_memory() -> int:
    """Bytes of memory that are free, or that a container may still take where that is less."""
    free = int(psutil.virtual_memory().available)
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        most, taken = _read_words(Path(limit)), _read_words(Path(used))
        if most and taken and most[0].isdigit() and taken[0].isdigit():
            free = min(free, max(0, int(most[0]) - int(taken[0])))
    return free


def _read_words(path: Path) -> list[str]:
    try:
        return path.read_text().split()
    except OSError:
        return []


def _this_machine(config: RunConfig, facts: ModelFacts) -> MachineFacts:
    return MachineFacts(
        cores=usable_cores(),
        memory_bytes=free_memory(),
        gpus=torch.cuda.device_count(),
        speed=measure_speed(facts.hidden_size, facts.expert_size, config.executor.threads),
    )


def _hf_config(model: ModelConfig) -> Any:
    if model.is_bundled:
        return bundled_hf_config()
    facts_of(model.source, trusts_remote_code=model.trust_remote_code)  # with our message where it cannot be read
    return AutoConfig.from_pretrained(model.source, trust_remote_code=model.trust_remote_code)


def _on_meta(hf_config: Any, dtype: str) -> nn.Module:
    try:
        with torch.device("meta"):
            model: nn.Module = AutoModelForCausalLM.from_config(hf_config, dtype=getattr(torch, dtype))
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"the model cannot be built from its config.json: {error}", "check the file") from error
    model.tie_weights()  # type: ignore[operator]
    return model


def _model_plan(model: ModelConfig, hf_config: Any) -> ModelPlan:
    family_of(hf_config)
    facts = model_facts(hf_config)
    parameters = list(_on_meta(hf_config, model.dtype).parameters())
    total = sum(parameter.numel() for parameter in parameters)
    routed = len(facts.layers) * facts.num_experts * 3 * facts.hidden_size * facts.expert_size
    vocabulary = int(hf_config.vocab_size)
    looked_up = 0 if hf_config.tie_word_embeddings else vocabulary * facts.hidden_size
    return ModelPlan(
        name="bundled" if model.is_bundled else model.source,
        facts=facts,
        num_parameters=total,
        active_parameters=total - looked_up - routed + routed * facts.top_k // facts.num_experts,
        weight_bytes=sum(parameter.numel() * parameter.element_size() for parameter in parameters),
        vocabulary=vocabulary,
    )


def _method_plan(
    config: RunConfig,
    label: str,
    method: Method,
    hf_config: Any,
    model: ModelPlan,
    machine: MachineFacts,
    num_clients: int | None,
    tokens: int,
    evaluated: int | None,
) -> MethodPlan:
    federation = config.federation
    slots, active_trained = _count_slots(method, hf_config, config.model.dtype, model.facts)
    trained = sum(count.num_bytes for count in slots if count.group != str(FROZEN))
    moments = 2 if config.training.optimizer == "adamw" else 0
    # A slot has its value and its start value; a trained one also a gradient and moments; a sent one what came and its delta.
    sent = {count.group: count.num_bytes for count in slots if count.group in ("shared", "assigned")}
    memory = REPLICA_BYTES + sum(count.num_bytes for count in slots) * 2 + trained * (1 + moments) + 2 * sum(sent.values())
    memory += activation_bytes(model, federation.batch_size * config.data.max_length)
    rounds = method.num_rounds(federation.rounds)
    search = config.rate_search
    search_rounds = (
        0 if search is None or rounds == 0 else method.num_rounds(search.rounds) * len(search.rates) * len(config.seeds)
    )
    replicas = num_replicas(config, num_clients, machine, memory)
    cohort = federation.cohort_size if num_clients is None else min(federation.cohort_size or num_clients, num_clients)
    steps = run_bytes = seconds = None
    if cohort is not None:
        all_rounds = rounds * len(config.seeds) + search_rounds
        steps = all_rounds * cohort * federation.local_steps
        run_bytes = rounds * len(config.seeds) * cohort * 2 * sum(sent.values())
        active = model.active_parameters
        judged = (evaluated or 0) * (1 + -(-rounds // config.evaluation.every)) * len(config.seeds)
        flops = steps * federation.batch_size * tokens * flops_per_token(active, active_trained, is_training=True)
        flops += judged * tokens * flops_per_token(active, active_trained, is_training=False)
        seconds = flops / (machine.speed * _EFFICIENCY * min(replicas, max(1, machine.cores // config.executor.threads)))
    return MethodPlan(
        label=label,
        method=method.name,
        slots=slots,
        sent_bytes=sent,
        replica_bytes=memory,
        replicas=replicas,
        rounds=rounds,
        search_rounds=search_rounds,
        local_steps=steps,
        run_bytes=run_bytes,
        seconds=seconds,
    )


def _count_slots(method: Method, hf_config: Any, dtype: str, facts: ModelFacts) -> tuple[tuple[SlotCount, ...], int]:
    """Count a method's slots by group, and the values of them that one token passes through."""
    model = _on_meta(hf_config, dtype)
    with torch.device("meta"):
        refs: tuple[ParamRef, ...] = add_slots(model, method.slots(facts))
    values: dict[str, int] = {}
    active = 0.0
    for ref in refs:
        group = str(method.group(ref).kind)
        values[group] = values.get(group, 0) + ref.num_elements
        active += ref.num_elements * (facts.top_k / facts.num_experts if ref.part == "experts" else 1.0)
    size = torch.float32.itemsize  # what is trained is sent as float32, whatever the base is
    counts = (SlotCount(group=group, num_values=values[group], num_bytes=values[group] * size) for group in sorted(values))
    return tuple(counts), round(active)


def _num_clients(data: DataConfig) -> int | None:
    if data.partition.name == "natural" and data.is_bundled:
        return min(data.num_clients or len(CLIENT_DOMAINS), len(CLIENT_DOMAINS))
    return data.num_clients


def _tokens_per_example(data: DataConfig) -> int:
    """Tokens of an example: of the bundled corpus from a sample, four characters a token and 8 for the chat template; else
    the longest allowed.
    """
    if not data.is_bundled:
        return data.max_length
    texts = [len(each.prompt) + len(each.response) for name in CLIENT_DOMAINS for each in generate(name, "test", 16, 0)]
    return min(data.max_length, 8 + round(sum(texts) / len(texts) / 4))


def _evaluated_examples(data: DataConfig, num_clients: int | None) -> int | None:
    """Examples that one evaluation of all clients reads: each client's test split and the retention set."""
    if num_clients is None:
        return None
    own = data.max_test_examples
    if data.is_bundled:
        own = min(own or data.bundled.test_per_domain, data.bundled.test_per_domain)
    return None if own is None else num_clients * (own + (data.bundled.num_retention if data.is_bundled else 0))


def _count(value: float) -> str:
    for unit in ("", " k", " M"):
        if value < 999.5:
            return f"{value:.3g}{unit}"
        value /= 1000
    return f"{value:.3g} G"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "?"
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
