"""What a run will need, said before anything is loaded: sizes, memory, bytes a round, steps, and a rough time.

Sizes and bytes are exact for what a method sends as parameters: the model is built on PyTorch's meta device (shapes without
values), a method's slots are put into it, and the method says which group each slot is in. Extras and statistics, which some
methods send beside parameters, are known only when they run. Memory (``fedgraft.platform.memory``) and time are estimates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from rich.console import Group as RenderGroup
from rich.console import RenderableType
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from fedgraft.data.config import DataConfig
from fedgraft.data.corpus import CLIENT_DOMAINS
from fedgraft.errors import ConfigError
from fedgraft.platform.budget_sizes import BudgetUse, flops_per_token, run_budgets, tokens_per_example
from fedgraft.platform.budgets import distribution_text
from fedgraft.platform.config import RunConfig
from fedgraft.platform.fitting import Need, is_cluster, need_of, num_replicas, refusal_of
from fedgraft.platform.loading import dump_config
from fedgraft.platform.machine import MachineFacts, free_memory, gpu_memory, measure_op, measure_speed, usable_cores
from fedgraft.platform.memory import RankMemory
from fedgraft.platform.memory_view import memory_view
from fedgraft.platform.model_sizes import ModelPlan, SlotCount, SlotSizes, read_hf_config, size_model, size_slots
from fedgraft.platform.packing import Gpus, is_to_work_out, machine_gpus, with_gpus
from fedgraft.platform.progress import bytes_text
from fedgraft.protocols import Method
from fedgraft.registry import METHODS
from fedgraft.training.deepspeed_engine import refuse_slots
from fedgraft.training.expert_parallel import refuse_expert_parallel
from fedgraft.types import Budget, ModelFacts

__all__ = [
    "MachineFacts",
    "MethodPlan",
    "ModelPlan",
    "Plan",
    "SlotCount",
    "flops_per_token",
    "free_memory",
    "make_plan",
    "this_machine",
    "usable_cores",
]

_MOST_AT_ONCE = 16  # beyond it a pass on a CPU gains nothing more (benchmarks/cohort.py)
_EFFICIENCY = 0.3
"""Share of a plain product's speed that training reaches: attention, routing and optimiser are not products of this size."""

_OPS_A_STEP, _OPS_A_LAYER, _OPS_A_JUDGED_LAYER = 80, 440, 144
"""Operations of a local step, beside those of its layers, and of a layer, forward and backward, and forward only: counted for
Qwen2-MoE with LoRA on attention, 2 and 4 layers, 4 and 16 experts."""
_CALLS_AN_OP = 6
"""An operation inside a model costs so many small products, for Python and autograd around it: 20 us beside 3 us where seen."""

_SHOWN_GROUPS = ("shared", "assigned", "private")


@dataclass(frozen=True, kw_only=True, slots=True)
class MethodPlan:
    """What one method will need. Bytes and steps are those of all seeds; ``None`` where the number of clients is not known.

    ``need`` is the memory of one replica and what there is for it; ``search_rounds`` are rounds of the rate search, whose
    bytes no ledger of a run counts; ``seconds`` covers both. ``budgets`` are the clients' with the first seed, empty where there
    are none or the number of clients is not known; ``budget_use`` says what they bound.
    """

    label: str
    method: str
    slots: tuple[SlotCount, ...]
    sent_bytes: Mapping[str, int]
    need: Need
    replicas: int
    rounds: int
    search_rounds: int
    local_steps: int | None
    run_bytes: int | None
    seconds: float | None
    budget_use: BudgetUse = "none"
    budgets: tuple[Budget, ...] = ()

    def values(self, group: str) -> int:
        """Values of the slots of a group."""
        return sum(count.num_values for count in self.slots if count.group == group)

    @property
    def memory(self) -> RankMemory:
        """Memory of one rank."""
        return self.need.rank

    @property
    def bytes_per_round(self) -> int:
        """Bytes that go to one client in one round; as many come back."""
        return sum(self.sent_bytes.values())


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """The whole run; print it with rich.

    ``refusal`` says why it does not fit this machine and what to change; ``None`` where it does. ``settled`` is the configuration
    with the GPUs of a replica in it, ``gpus`` how they were worked out; empty where there was nothing to work out.
    """

    config: str
    settled: RunConfig
    model: ModelPlan
    machine: MachineFacts
    num_clients: int | None
    cohort_size: int | None
    tokens_per_example: int
    evaluated_examples: int | None
    methods: tuple[MethodPlan, ...]
    seeds: int
    refusal: ConfigError | None = None
    is_cluster: bool = False
    has_budgets: bool = False
    gpus: str = ""

    def require_fit(self) -> None:
        """Refuse a run that cannot fit.

        Raises:
            ConfigError: It does not; says by how much, and what was found to fit.
        """
        if self.refusal is not None:
            raise self.refusal

    @property
    def seconds(self) -> float | None:
        """Rough time of all methods and seeds together."""
        each = [method.seconds for method in self.methods]
        return sum(second for second in each if second is not None) if all(s is not None for s in each) else None

    def __rich__(self) -> RenderableType:
        """Draw it."""
        return RenderGroup(
            Rule("configuration"),
            Text(self.config.rstrip()),
            Rule("plan"),
            self._facts(),
            Text(),
            self._table(),
            self._notes(),
            Rule("memory of a rank, by formula"),
            memory_view([(each.label, each.need, each.replicas) for each in self.methods], is_cluster=self.is_cluster),
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
            ("machine", self._machine()),
            ("clients", f"{clients}; {'all' if self.cohort_size is None else self.cohort_size} in a round; {self.seeds} seed(s)"),
            ("time", f"about {_duration(self.seconds)}, to within a factor of three" if self.seconds else "not known"),
        ):
            grid.add_row(Text(name, style="bold"), Text(text))
        return grid

    def _machine(self) -> str:
        machine = self.machine
        size = "" if machine.gpu_bytes is None else f" of {bytes_text(machine.gpu_bytes)}"
        return f"{machine.cores} cores, {bytes_text(machine.memory_bytes)} free, {machine.gpus} GPUs{size}"

    def _table(self) -> Table:
        groups = [group for group in _SHOWN_GROUPS if group != "assigned" or any(each.values(group) for each in self.methods)]
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        table.add_column("method", no_wrap=True)
        titles = [f"{group}\nvalues" for group in groups]
        titles += ["down\na round", "whole\nrun", "repli-\ncas", "rounds"]
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
                str(each.replicas),
                rounds,
                "?" if each.local_steps is None else str(each.local_steps),
                "?" if each.seconds is None else _duration(each.seconds),
            )
        return table

    def _notes(self) -> Text:
        notes = [f"GPUs worked out: {self.gpus}."] if self.gpus else []
        notes += [
            "down a round: bytes to one client in one round; as many come up. whole run: both ways, all clients and seeds.",
            "Extras and statistics, which some methods send beside parameters, are not in it.",
            f"Time is for {self.tokens_per_example} tokens an example on this machine.",
        ]
        if any(each.search_rounds for each in self.methods):
            notes.append("rounds + rounds of the learning-rate search; steps and time cover both, bytes the run alone.")
        if self.evaluated_examples is None:
            notes.append("The size of the test splits is known only with the data: the time is that of training alone.")
        if self.has_budgets:
            notes += [_budget_note(each) for each in self.methods]
        return Text("\n".join(notes), style="dim")


def make_plan(config: RunConfig, machine: MachineFacts | None = None, gpus: Sequence[Gpus] | None = None) -> Plan:
    """Work out what a run will need, without loading weights or data.

    Args:
        config: A valid configuration.
        machine: What to plan for; ``None``: this machine, with a speed measured in about 0.2 s.
        gpus: The nodes of a cluster; ``None``: the machine is all there is, or nothing is known of the cluster.

    Raises:
        ModelError: The model's configuration cannot be read, it is of an unknown family, or the engine cannot do what is asked
            with it.
    """
    config = settle(config, machine)
    hf_config = read_hf_config(config.model)
    model = size_model(config.model, hf_config)
    num_clients = _num_clients(config.data)
    cohort = config.federation.cohort_size
    if num_clients is not None and cohort is not None:
        cohort = min(cohort, num_clients)
    tokens = tokens_per_example(config.data)
    evaluated = _evaluated_examples(config.data, num_clients)
    found = machine or _measured_machine(config, model.facts)
    built = {label: METHODS.build(method) for label, method in config.methods().items()}
    slots = {label: size_slots(method, hf_config, config.model.dtype, model.facts) for label, method in built.items()}
    told = ""
    if is_to_work_out(config) and (gpus is not None or not is_cluster(config)):
        config, told = with_gpus(config, model, slots, (machine_gpus(found),) if gpus is None else gpus, num_clients)
    for method in built.values():
        _refuse(config, method, hf_config, model.facts)
    plans = tuple(
        replace(
            _method_plan(config, label, method, slots[label], model, found, num_clients, tokens, evaluated),
            budget_use=method.budget_use,
            budgets=_budgets(config, label, (model, slots[label]), num_clients),
        )
        for label, method in built.items()
    )
    return Plan(
        config=dump_config(config),
        settled=config,
        gpus=told,
        model=model,
        machine=found,
        num_clients=num_clients,
        cohort_size=cohort,
        tokens_per_example=tokens,
        evaluated_examples=evaluated,
        methods=plans,
        seeds=len(config.seeds),
        refusal=refusal_of(config, model, slots, found),
        is_cluster=is_cluster(config),
        has_budgets=config.federation.budgets is not None,
    )


def settle(config: RunConfig, machine: MachineFacts | None = None) -> RunConfig:
    """Decide how many clients share a pass where ``engine.clients_at_once`` is ``auto``; what is decided belongs to the run.

    It is the largest power of two, at most 16, that leaves every replica work in a round and fits the machine by the memory plan;
    on a cluster that is joined, whose nodes are not known here, memory is not asked.

    Args:
        config: A valid configuration.
        machine: What to plan for; ``None``: this machine.
    """
    if config.engine.clients_at_once != "auto":
        return config
    machine = machine or this_machine()
    cohort = min(filter(None, (config.federation.cohort_size, _num_clients(config.data))), default=_MOST_AT_ONCE)
    size = 2 * _MOST_AT_ONCE
    while True:
        size //= 2
        engine = config.engine.model_copy(update={"clients_at_once": size})
        settled = config.model_copy(update={"engine": engine})
        if size == 1:
            return settled
        plan = make_plan(settled, machine)
        replicas = max(each.replicas for each in plan.methods)
        if size * replicas <= max(cohort, replicas) and (plan.is_cluster or plan.refusal is None):
            return settled


def this_machine(speed: float = 1.0, op_seconds: float = 0.0) -> MachineFacts:
    """What this machine offers; its speeds, in FLOPs a second and seconds a call, are taken as given: measuring takes a while."""
    return MachineFacts(
        cores=usable_cores(),
        memory_bytes=free_memory(),
        gpus=torch.cuda.device_count(),
        gpu_bytes=gpu_memory(),
        speed=speed,
        op_seconds=op_seconds,
    )


def _refuse(config: RunConfig, method: Method, hf_config: Any, facts: ModelFacts) -> None:
    """Refuse what the engine cannot do with this model and method, before anything is made."""
    engine = config.resolved_engine()
    if engine.name != "deepspeed":
        return
    slots = method.slots(facts)
    refuse_slots(slots, engine.zero_stage)
    if engine.expert_parallel_size is not None:
        refuse_expert_parallel(hf_config, slots, size=engine.expert_parallel_size, stage=engine.zero_stage)


def _measured_machine(config: RunConfig, facts: ModelFacts) -> MachineFacts:
    return this_machine(measure_speed(facts.hidden_size, facts.expert_size, config.executor.threads), measure_op())


def _method_plan(
    config: RunConfig,
    label: str,
    method: Method,
    slots: SlotSizes,
    model: ModelPlan,
    machine: MachineFacts,
    num_clients: int | None,
    tokens: int,
    evaluated: int | None,
) -> MethodPlan:
    federation = config.federation
    sent = {count.group: count.num_bytes for count in slots.groups if count.group in ("shared", "assigned")}
    need = need_of(config, model, slots, machine)
    rounds = method.num_rounds(federation.rounds)
    search = config.rate_search
    search_rounds = (
        0 if search is None or rounds == 0 else method.num_rounds(search.rounds) * len(search.rates) * len(config.seeds)
    )
    replicas = num_replicas(config, num_clients, machine, need)
    cohort = federation.cohort_size if num_clients is None else min(federation.cohort_size or num_clients, num_clients)
    steps = run_bytes = seconds = None
    if cohort is not None:
        all_rounds = rounds * len(config.seeds) + search_rounds
        steps = all_rounds * cohort * federation.local_steps
        run_bytes = rounds * len(config.seeds) * cohort * 2 * sum(sent.values())
        active = model.active_parameters
        judged = (evaluated or 0) * (1 + -(-rounds // config.evaluation.every)) * len(config.seeds)
        flops = (
            steps * federation.batch_size * tokens * flops_per_token(active, slots.active, own=slots.active_own, is_training=True)
        )
        flops += judged * tokens * flops_per_token(active, slots.active, own=slots.active_own, is_training=False)
        ranks = min(replicas * config.engine.world_size, max(1, machine.cores // config.executor.threads))
        products = flops / (machine.speed * _EFFICIENCY * ranks)
        at_once = config.engine.clients_at_once
        calls = steps / (at_once if isinstance(at_once, int) else 1) * (_OPS_A_STEP + _OPS_A_LAYER * len(model.facts.layers))
        calls += judged / config.evaluation.batch_size * _OPS_A_JUDGED_LAYER * len(model.facts.layers)
        calling = calls * _CALLS_AN_OP * machine.op_seconds / ranks
        # A GPU multiplies while the next calls are made.
        seconds = max(products, calling) if machine.gpus else products + calling
    return MethodPlan(
        label=label,
        method=method.name,
        slots=slots.groups,
        sent_bytes=sent,
        need=need,
        replicas=replicas,
        rounds=rounds,
        search_rounds=search_rounds,
        local_steps=steps,
        run_bytes=run_bytes,
        seconds=seconds,
    )


def _budgets(config: RunConfig, label: str, sizes: tuple[ModelPlan, SlotSizes], num_clients: int | None) -> tuple[Budget, ...]:
    """The clients' budgets with the first seed; those of the others are tried as well, so that none fails later."""
    if num_clients is None:
        return ()
    method = config.methods()[label]
    found = [
        run_budgets(config, method, seed=seed, num_clients=num_clients, label=label, source="<config>", sizes=sizes)
        for seed in config.seeds
    ]
    return found[0]


def _budget_note(plan: MethodPlan) -> str:
    if plan.budget_use == "none":
        return f"{plan.label} does not use budgets: every client holds and trains everything."
    if not plan.budgets:
        return f"{plan.label}: budgets are drawn once the number of clients is known."
    verb = "holds" if plan.budget_use == "holds" else "trains in a step"
    counts = distribution_text(budget.experts_per_layer for budget in plan.budgets)
    return f"budgets of {plan.label}, what a client {verb}: {counts} (first seed)."


def _num_clients(data: DataConfig) -> int | None:
    if data.partition.name == "natural" and data.is_bundled:
        return min(data.num_clients or len(CLIENT_DOMAINS), len(CLIENT_DOMAINS))
    return data.num_clients


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
