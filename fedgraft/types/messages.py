"""What travels between server and clients, and what is said about it.

Shape letters: B batch, S sequence, L MoE layers, E experts of a layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import torch

from fedgraft.types.model import IGNORE_INDEX, Assignment, Group, ModelFacts, ParamRef, Params

__all__ = [
    "Batch",
    "Broadcast",
    "Budget",
    "ClientFailure",
    "ClientGroup",
    "ClientOutcome",
    "ClientTask",
    "ClientUpdate",
    "EvaluationReply",
    "EvaluationRow",
    "EvaluationTask",
    "Federation",
    "RoundPlan",
    "ServerState",
    "TensorInfo",
    "Weighted",
]


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """Tokens of some examples, padded on the right.

    ``input_ids`` (B, S) int64; ``attention_mask`` (B, S) int64 of 0 and 1; ``labels`` (B, S) int64 where everything but
    the response is ``IGNORE_INDEX``. Labels are not shifted.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    labels: torch.Tensor

    @property
    def num_examples(self) -> int:
        """Rows of the batch."""
        return int(self.input_ids.shape[0])

    @property
    def num_label_tokens(self) -> int:
        """Positions that the loss counts, after the shift by one."""
        return int((self.labels[:, 1:] != IGNORE_INDEX).sum())


@dataclass(frozen=True, kw_only=True, slots=True)
class Weighted:
    """A sum with its weight, so that sums over batches, clients and replicas are always right."""

    total: float
    weight: float

    def __add__(self, other: Weighted) -> Weighted:
        return Weighted(total=self.total + other.total, weight=self.weight + other.weight)

    @property
    def mean(self) -> float:
        """``total / weight``; NaN where nothing was counted."""
        return self.total / self.weight if self.weight else float("nan")


@dataclass(frozen=True, kw_only=True, slots=True)
class Budget:
    """What one client may hold and spend; ``None`` is no limit.

    ``experts_per_layer`` is the mean over MoE layers: a client holds at most that times L routed experts. ``memory_bytes``
    counts what it holds (weights, gradients, moments), ``flops`` what a round of local training costs it.
    """

    experts_per_layer: int | None = None
    memory_bytes: int | None = None
    flops: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Federation:
    """What a method's server half may know of the federation, the same in every round.

    ``refs`` and ``groups`` are the model's slots and their groups by key. ``num_examples`` counts each client's training
    examples; ``labels`` counts them by label (categories of the data): what a method that claims not to know labels must not
    read. ``budgets`` has one entry a client, or none at all.
    """

    facts: ModelFacts
    refs: tuple[ParamRef, ...]
    groups: Mapping[str, Group]
    run_seed: int
    rounds: int
    num_examples: tuple[int, ...]
    labels: tuple[Mapping[str, int], ...] = ()
    budgets: tuple[Budget, ...] = ()

    @property
    def num_clients(self) -> int:
        """Clients of the population."""
        return len(self.num_examples)

    def budget(self, client_id: int) -> Budget | None:
        """A client's budget; ``None`` where the run sets none."""
        return self.budgets[client_id] if self.budgets else None


@dataclass(frozen=True, kw_only=True, slots=True)
class Broadcast:
    """What the server offers in a round, put once for all clients: parameters and extras by key."""

    round_idx: int
    params: Params
    extras: Params = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class RoundPlan:
    """What a method wants of a round.

    ``phase`` names it (``train`` unless the method has phases); ``num_steps`` are local steps a client; ``learning_rate``
    is the plain number that schedules resolved to.
    """

    round_idx: int
    num_steps: int
    learning_rate: float
    phase: str = "train"


@dataclass(frozen=True, kw_only=True, slots=True)
class ClientTask:
    """One client's work in one round.

    ``keys`` are the slots it receives, trains and sends; ``extra_keys`` the extras of the broadcast that go to it; both are
    charged to its ledger. ``addresses`` says under which name the server keeps a slot's tensor, where it is not the slot's key
    (the seventh expert of a pool in a client's second slot). ``extras`` are tensors for this client alone. ``assignment`` gives
    the experts it holds, by layer (``None``: all); others are masked in its model. ``publishes`` are private slots, or other
    names of its private state, that the method lets this client send in this round, as extras or statistics.
    ``state_version`` is the round whose private state it starts from (``None``: it has none yet, and is set up first).
    ``hashes_frozen`` asks for the hash of the frozen tensors after training. ``num_parts`` is how many parts a batch is cut
    into, where the client ran out of memory before (``None``: as configured).
    """

    client_id: int
    plan: RoundPlan
    keys: tuple[str, ...]
    extra_keys: tuple[str, ...] = ()
    extras: Params = field(default_factory=dict)
    addresses: Mapping[str, str] = field(default_factory=dict)
    assignment: Assignment | None = None
    budget: Budget | None = None
    publishes: tuple[str, ...] = ()
    state_version: int | None = None
    hashes_frozen: bool = False
    num_parts: int | None = None

    @property
    def round_idx(self) -> int:
        """The round of the plan."""
        return self.plan.round_idx


@dataclass(frozen=True, kw_only=True, slots=True)
class ClientGroup:
    """Clients of one round that a replica trains in one pass, in cohort order."""

    tasks: tuple[ClientTask, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorInfo:
    """Key, shape, dtype and bytes of a tensor that is sent.

    ``group`` is the ledger's column: ``shared``, ``assigned``, ``extras`` or ``statistics``.
    """

    key: str
    shape: tuple[int, ...]
    dtype: str
    num_bytes: int
    group: str


@dataclass(frozen=True, kw_only=True, slots=True)
class ClientUpdate:
    """The small half of a client's reply; its tensors (delta and extras) stay where they are until they are summed.

    ``payload`` lists what is sent and charged. Metrics, ``expert_tokens`` and ``diagnostics`` are the simulation's view of the
    client and cost nothing; a method whose server needs such counts puts them into ``statistics``, which are charged.

    ``expert_tokens`` (L, E) int64 counts the tokens that local training routed to each expert. ``statistics`` are the
    small tensors a method weighs updates by. ``metrics`` are sums with weights. ``state_version`` is the round whose
    private state this update wrote, ``None`` if the client has none; ``state_hash`` is that state's ``hash_params``,
    ``state_digest`` the SHA-256 of the file that it was written to.
    ``diagnostics`` are JSON values for the report.
    ``num_parts`` is how many parts its batches were cut into. ``assignment`` is the task's. ``requested`` are slots that the
    client asked for itself, with the server's names of what it put there; they are charged to its ledger as well.
    """

    client_id: int
    round_idx: int
    num_examples: int
    num_steps: int
    expert_tokens: torch.Tensor
    metrics: Mapping[str, Weighted]
    payload: tuple[TensorInfo, ...]
    statistics: Params = field(default_factory=dict)
    state_version: int | None = None
    state_hash: str | None = None
    state_digest: str | None = None
    diagnostics: Mapping[str, object] = field(default_factory=dict)
    seconds: float = 0.0
    num_parts: int = 1
    assignment: Assignment | None = None
    requested: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class ClientFailure:
    """A client that gave no update: the stage it failed at (``setup``, ``train``, ``reply``, ``replica``) and why."""

    client_id: int
    round_idx: int
    stage: str
    error: str


ClientOutcome: TypeAlias = ClientUpdate | ClientFailure


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationTask:
    """Judge one model on one client's examples, or on the retention set.

    ``view``: ``global`` (the server's parameters, private slots at their start) or ``personal`` (with the client's private
    state). ``tasks`` among ``client``, ``retention``, ``choice``; ``client_id`` ``None`` stands for no client (global only).
    ``split`` is ``validation`` or ``test`` of the client's examples.
    """

    round_idx: int
    view: Literal["global", "personal"]
    tasks: tuple[str, ...]
    keys: tuple[str, ...]
    client_id: int | None = None
    split: Literal["validation", "test"] = "test"
    metrics: tuple[str, ...] = ("nll", "token_accuracy")
    extra_keys: tuple[str, ...] = ()
    extras: Params = field(default_factory=dict)
    addresses: Mapping[str, str] = field(default_factory=dict)
    assignment: Assignment | None = None
    state_version: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationRow:
    """One metric of one model on one task: ``value.mean`` over ``value.weight`` tokens, examples or questions."""

    round_idx: int
    view: str
    task: str
    client_id: int | None
    split: str
    metric: str
    value: Weighted


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationReply:
    """What an ``EvaluationTask`` gave: its rows and what the method noted (e.g. how far the graft gate opens)."""

    rows: tuple[EvaluationRow, ...]
    diagnostics: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerState:
    """Everything of the server that a resume needs. What is not in here is lost.

    ``params``: the global tensors that clients may receive. ``extras``: tensors beside them (control variates,
    prototypes) that may be broadcast. ``memory``: tensors that stay on the server (optimiser moments, scores).
    ``notes``: JSON values (maps, flags, counters).
    """

    params: Params
    extras: Params = field(default_factory=dict)
    memory: Params = field(default_factory=dict)
    notes: Mapping[str, object] = field(default_factory=dict)
