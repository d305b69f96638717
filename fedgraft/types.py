"""The messages and the small data types that all of fedgraft speaks in.

Sign rule, stated once: ``delta = trained - initial``; the server adds it. Control variates have the sign of a gradient.
Deltas travel in the dtype of the trained tensor (float32 or wider); sums over clients run in float64.
Rounds count from 1; round 0 is the state before training. Clients count from 0.

Shape letters: B batch, S sequence length, T tokens (= B * S), L MoE layers, E experts of a layer, K top-k.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Literal, TypeAlias

import torch

__all__ = [
    "FROZEN",
    "IGNORE_INDEX",
    "PRIVATE",
    "SHARED",
    "AdapterSpec",
    "Assignment",
    "Batch",
    "Broadcast",
    "Budget",
    "ClientFailure",
    "ClientOutcome",
    "ClientTask",
    "ClientUpdate",
    "EvaluationReply",
    "EvaluationRow",
    "EvaluationTask",
    "ExampleGateSpec",
    "Federation",
    "GraftSpec",
    "Group",
    "GroupKind",
    "MixtureSpec",
    "ModelFacts",
    "ParamRef",
    "Params",
    "Projection",
    "RoundPlan",
    "ServerState",
    "Slots",
    "TensorInfo",
    "Weighted",
    "assigned",
]

Params: TypeAlias = dict[str, torch.Tensor]
"""Tensors by key. A key names a whole parameter of the model, or one expert's slice of a fused one, or an extra."""

Assignment: TypeAlias = Mapping[int, tuple[int, ...]]
"""Experts that a client holds, ascending, by the model's layer index; a layer that is not named keeps all of its experts."""

IGNORE_INDEX = -100
"""Label of a position that the loss does not count (prompt and padding), as in PyTorch's cross-entropy."""


class GroupKind(StrEnum):
    """Where a tensor may be: frozen and private ones are never sent; the platform enforces it, not the method."""

    FROZEN = "frozen"
    SHARED = "shared"
    ASSIGNED = "assigned"
    PRIVATE = "private"


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """The parameter group of a tensor; ``assigned`` ones belong to one expert of one layer."""

    kind: GroupKind
    layer: int | None = None
    expert: int | None = None

    @property
    def is_sent(self) -> bool:
        """Whether tensors of this group may leave the server or a client."""
        return self.kind in (GroupKind.SHARED, GroupKind.ASSIGNED)

    def __str__(self) -> str:
        return f"assigned({self.layer}, {self.expert})" if self.kind is GroupKind.ASSIGNED else str(self.kind)


FROZEN = Group(kind=GroupKind.FROZEN)
SHARED = Group(kind=GroupKind.SHARED)
PRIVATE = Group(kind=GroupKind.PRIVATE)


def assigned(layer: int, expert: int) -> Group:
    """Give the group of one expert: ``layer`` is the model's layer index, ``expert`` counts from 0."""
    return Group(kind=GroupKind.ASSIGNED, layer=layer, expert=expert)


@dataclass(frozen=True, kw_only=True, slots=True)
class ParamRef:
    """One exchangeable tensor of a model: a whole parameter, or a strided slice of a fused one.

    Transformers keeps the experts of a layer in one tensor, so expert e is a slice. ``key`` is what travels;
    ``name`` is the parameter in ``model.named_parameters()``. ``part`` says what it is: ``attention``, ``router``,
    ``experts``, ``shared_expert``, ``graft``, ``graft_gate``, ``mixture``, ``mixture_gate``, ``example_gate`` or ``other``;
    ``adapter`` names its LoRA, if it is of one. ``expert`` of a mixture's tensor is its slot, ``layer`` then the decoder layer.
    """

    key: str
    name: str
    part: str
    shape: tuple[int, ...]
    adapter: str | None = None
    layer: int | None = None
    expert: int | None = None
    dim: int | None = None
    start: int = 0
    stop: int = 0
    step: int = 1

    def view(self, parameter: torch.Tensor) -> torch.Tensor:
        """Give the part of ``parameter`` that this reference stands for, as a view that can be written to."""
        if self.dim is None:
            return parameter
        index = [slice(None)] * parameter.ndim
        index[self.dim] = slice(self.start, self.stop, self.step)
        return parameter[tuple(index)]

    @property
    def num_elements(self) -> int:
        """Number of values."""
        count = 1
        for size in self.shape:
            count *= size
        return count


@dataclass(frozen=True, kw_only=True, slots=True)
class Projection:
    """One linear map of an attention block: its module's name below the decoder layer, and its sizes."""

    name: str
    in_features: int
    out_features: int
    has_bias: bool = False

    @property
    def num_elements(self) -> int:
        """Values of its weight and bias."""
        return self.out_features * (self.in_features + self.has_bias)


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelFacts:
    """What a method may ask of a model before it is loaded: sizes only.

    ``layers`` are the model's own indices of its MoE layers, ascending; ``num_layers`` counts dense ones as well.
    ``attention`` lists the projections of one decoder layer (all layers have the same). ``norm_topk_prob`` says whether the
    weights of a token's chosen experts are divided by their sum.
    """

    family: str
    layers: tuple[int, ...]
    num_experts: int
    top_k: int
    hidden_size: int
    expert_size: int
    norm_topk_prob: bool
    attention: tuple[Projection, ...]
    num_layers: int
    num_shared_experts: int = 0
    has_expert_bias: bool = False
    has_router_bias: bool = False

    @property
    def expert_elements(self) -> int:
        """Values of one expert: gate, up and down projection, with biases where the family has them."""
        biases = 2 * self.expert_size + self.hidden_size if self.has_expert_bias else 0
        return 3 * self.hidden_size * self.expert_size + biases

    @property
    def num_routed_values(self) -> int:
        """Values of all routed experts of the model."""
        return len(self.layers) * self.num_experts * self.expert_elements


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterSpec:
    """One LoRA over parts of the model: ``targets`` among ``attention``, ``router``, ``experts``.

    Rank >= 1; the update is scaled by ``alpha / rank``; ``dropout`` in [0, 1) acts on the LoRA input.
    """

    name: str
    rank: int
    alpha: float
    dropout: float = 0.0
    targets: tuple[str, ...] = ("attention",)


@dataclass(frozen=True, kw_only=True, slots=True)
class GraftSpec:
    """Grafted experts beside each MoE layer of ``layers``.

    ``mode``: ``additive`` y = M(x) + sum_j g_j(x) P_j(x); ``convex`` y = (1 - sum_j g_j) M(x) + sum_j g_j P_j(x) with
    g_j scaled by 1 / num_grafts; ``row`` one new router row a graft, softmax over N + num_grafts with the grafts always kept.
    ``num_neurons`` is how many of an expert's neurons a graft has; ``gate_bias`` the initial bias b of
    g(x) = sigmoid(w.x + b); ``is_gate_closed`` fixes g at exactly 0.
    """

    num_grafts: int
    layers: tuple[int, ...]
    num_neurons: int
    mode: Literal["additive", "convex", "row"] = "additive"
    gate_bias: float = -4.0
    is_gate_closed: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class MixtureSpec:
    """A mixture of LoRA experts beside linear maps of the attention: ``num_slots`` of them at each map in ``targets``.

    ``targets`` are last names of attention projections (``q_proj``). ``gate`` ``token``: each module scores its slots for every
    token by a projection of its own (FedAMoLE), and uses ``top_k`` of them; ``example``: whoever runs the model gives one weight
    an example and slot, the same in all modules, 0 where a slot is not used. ``has_shared`` adds one LoRA that is always on;
    then ``num_slots`` may be 0. Rank >= 1; updates are scaled by ``alpha / rank``; ``dropout`` in [0, 1) acts on the LoRA inputs.
    """

    num_slots: int
    rank: int
    alpha: float
    targets: tuple[str, ...]
    top_k: int
    gate: Literal["token", "example"] = "token"
    has_shared: bool = False
    dropout: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class ExampleGateSpec:
    """A gate that weighs ``num_outputs`` things for a whole example: an MLP with layers of ``hidden`` neurons in between.

    ``start`` is how its weights begin, ``activation`` what stands between layers; ``dropout`` in [0, 1) acts on hidden layers.
    """

    num_outputs: int
    hidden: tuple[int, ...]
    activation: Literal["relu", "leaky_relu"] = "relu"
    start: Literal["orthogonal", "uniform"] = "uniform"
    dropout: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Slots:
    """What a replica's model is built with, once, for a method: adapters, grafts, a mixture, a gate, parts trained in full.

    ``full`` names parts (``experts``, ``router``, ``attention``) whose own weights are copied out of the shared base
    and trained. ``splits_router`` lists a router that is trained in full once per expert, row by row, instead of whole.
    """

    adapters: tuple[AdapterSpec, ...] = ()
    graft: GraftSpec | None = None
    mixture: MixtureSpec | None = None
    example_gate: ExampleGateSpec | None = None
    full: tuple[str, ...] = ()
    splits_router: bool = False


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
    names of its private state, that the method lets this client send in this round, as extras.
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
    private state this update wrote, ``None`` if the client has none. ``diagnostics`` are JSON values for the report.
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
