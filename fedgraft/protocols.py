"""The seams: what a method, an engine and a client's session promise each other.

There is one plug-in interface, ``Method``: both halves of a published method in one class, server hooks and client hooks.
Every hook has a default, so a method writes only what it changes; with no hook changed it is FedAvg.
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, Protocol, TypeAlias

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import nn

from fedgraft.types import (
    PRIVATE,
    SHARED,
    AdapterSpec,
    Assignment,
    Batch,
    ClientTask,
    ClientUpdate,
    EvaluationTask,
    Federation,
    Group,
    ModelFacts,
    ParamRef,
    Params,
    RoundPlan,
    ServerState,
    Slots,
    Weighted,
    assigned,
)

__all__ = [
    "AdapterConfig",
    "Engine",
    "LocalTrain",
    "Method",
    "MethodConfig",
    "Objective",
    "Reduced",
    "Session",
    "TrainResult",
    "TrainSpec",
    "Weights",
]


class AdapterConfig(BaseModel):
    """LoRA of a method: rank >= 1, scaled by alpha / rank, dropout in [0, 1) on its input."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    rank: int = Field(8, ge=1, le=4096, description="Rank.")
    alpha: float = Field(16.0, gt=0, le=65_536, description="The update is scaled by alpha / rank.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout on the LoRA's input while training.")

    def spec(self, name: str, *targets: str) -> AdapterSpec:
        """Give the slot of this LoRA under ``name`` over the parts ``targets``."""
        return AdapterSpec(name=name, rank=self.rank, alpha=self.alpha, dropout=self.dropout, targets=targets)


class MethodConfig(BaseModel):
    """Options of a method; each method has its own subclass beside it. ``name`` picks the method."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: str

    def to_options(self) -> dict[str, Any]:
        """Give JSON values that ``METHODS.parse`` reads as this config.

        Only what was stated: a config refuses a stated option that has no effect, even at its default.
        """
        return {"name": self.name} | self.model_dump(mode="json", exclude_unset=True)


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainSpec:
    """Plain numbers of one local training.

    ``lr_scale`` multiplies the learning rate by key (missing: 1); ``max_grad_norm`` clips the norm over all trained
    tensors (``None``: no clipping). ``num_parts`` >= 1 cuts each batch (each rank's share of it) into parts that run one
    after the other, their gradients added up.
    """

    learning_rate: float
    optimizer: Literal["adamw", "sgd"] = "adamw"
    weight_decay: float = 0.0
    max_grad_norm: float | None = 1.0
    lr_scale: Mapping[str, float] = field(default_factory=dict)
    num_parts: int = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainResult:
    """What a local training did.

    ``losses`` are the mean loss of each step, nats a label token; ``expert_tokens`` (L, E) int64 the tokens routed to each
    expert; ``optimizer_state`` the moments of the keys that were asked for.
    """

    losses: tuple[float, ...]
    num_examples: int
    num_label_tokens: int
    expert_tokens: torch.Tensor
    optimizer_state: Params = field(default_factory=dict)


Terms: TypeAlias = Callable[[Batch, Any], Mapping[str, torch.Tensor]]

Objective: TypeAlias = Callable[[nn.Module, Batch, int | None], tuple[torch.Tensor, Any]]
"""Model, part of a batch on its device, label tokens of the whole batch (``None``: the part is the whole) -> loss and output.

The loss is a mean over label tokens, nats; of a part, the sum over its label tokens divided by the whole's. The output is what
``terms`` gets, as ``fedgraft.training.step.response_loss`` gives it.
"""


class LocalTrain(Protocol):
    """Runs the standard local loop; what is not given is as the task says."""

    def __call__(self, *, keys: Sequence[str] | None = None, batches: Iterable[Batch] | None = None) -> TrainResult:
        """Train the slots of ``keys`` on ``batches``, from fresh moments (or those kept from the last round)."""


class Engine(Protocol):
    """A model with slots on some device: tensors are loaded into it, trained, and read back.

    ``refs`` lists every slot; ``initial`` its start values, which depend on the run's seed only. ``model`` is the HF model
    for forward passes; ``facts`` its sizes. Where a replica has several ranks all of them call the same things in the same
    order, and ``is_leader`` is true in one of them.
    """

    model: nn.Module
    facts: ModelFacts
    refs: tuple[ParamRef, ...]
    initial: Params
    device: torch.device
    is_leader: bool

    def load(self, params: Params) -> None:
        """Copy tensors into the slots of these keys.

        Raises:
            UpdateError: A key is unknown, or a shape differs.
        """

    def read(self, keys: Iterable[str]) -> Params:
        """Copy the tensors of these keys out, float32 or wider, on the CPU."""

    def train(
        self,
        batches: Iterable[Batch],
        spec: TrainSpec,
        keys: Sequence[str],
        *,
        seed: int,
        terms: Terms | None = None,
        objective: Objective | None = None,
        after_backward: Callable[[int], None] | None = None,
        optimizer_state: Params | None = None,
        keep_optimizer_state: Sequence[str] = (),
    ) -> TrainResult:
        """Train the slots of ``keys`` (all others stay as they are), one step a batch, from fresh optimiser moments.

        Args:
            batches: One batch a step.
            spec: Optimiser and its numbers.
            keys: Slots to train.
            seed: For dropout.
            terms: Gives extra loss terms by name from the batch and the model's output.
            objective: Computes the loss in the place of the response-only cross-entropy.
            after_backward: Called with the step, from 0, between backward and clipping; may change gradients.
            optimizer_state: Moments to start from, as ``keep_optimizer_state`` gave them.
            keep_optimizer_state: Keys whose moments the result carries.

        Raises:
            UpdateError: The loss of a step is not finite.
        """

    def read_gradients(self, keys: Iterable[str]) -> Params:
        """Copy the gradients of these slots out, on the CPU; only between backward and the step (``after_backward``)."""

    def write_gradients(self, gradients: Params) -> None:
        """Replace the gradients of these slots; only between backward and the step (``after_backward``)."""

    def own_share(self, items: Sequence[Any]) -> Sequence[Any]:
        """This rank's share of items that are judged one by one; all of them where every rank must run the same passes."""

    def add_up(self, values: Mapping[str, Weighted]) -> dict[str, Weighted]:
        """Add up over the ranks what was judged in shares; the same keys in every rank."""

    def close(self) -> None:
        """Let go of what the engine holds beside its model; it is not used again."""

    def frozen_hash(self) -> str:
        """SHA-256 over name, shape and bytes of every tensor of the model that is no slot."""


class Session(Protocol):
    """One client on one replica for one task: what the client's hooks work on.

    ``private`` is its private state by key: the slots of group private, and whatever else the method keeps there; hooks may
    change it, the platform stores it. ``diagnostics`` takes JSON values for the report, by kind. ``received`` and
    ``received_extras`` are what the server sent for this task, by slot and by extra. ``scratch`` is for what hooks of one task
    tell each other; it is gone when the task ends.
    """

    engine: Engine
    task: ClientTask | EvaluationTask
    private: Params
    diagnostics: dict[str, Any]
    received: Params
    received_extras: Params
    groups: Mapping[str, Group]
    scratch: dict[str, Any]

    @property
    def num_train_examples(self) -> int:
        """Examples in this client's training split."""

    def seed(self, purpose: str) -> int:
        """A seed for this purpose, client and round."""

    def setup_seed(self, purpose: str) -> int:
        """A seed for this purpose and client; a client set up late is set up as it would have been early."""

    def train_batches(self) -> Iterable[Batch]:
        """The batches of this round's local steps, as many as the plan says, in the order that the seed gives."""

    def calibration_batches(self, num_examples: int) -> list[Batch]:
        """At most ``num_examples`` of the client's training examples, the same ones in every round."""

    def validation_batches(self, num_examples: int | None = None) -> list[Batch]:
        """The client's validation examples, or the first ``num_examples`` of them; no method trains on them."""

    def retention_batches(self, num_examples: int) -> list[Batch]:
        """At most ``num_examples`` of the held-out general set; empty where there is none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Weights:
    """Weight of each client's tensors in the sum, in cohort order.

    ``default`` holds one weight a client, >= 0; ``by_key`` replaces it for single keys. A key's mean is over the clients
    that sent it with a weight above 0; where there are none the server keeps its value. Keys are the server's names.
    ``spread`` sums a tensor under other names than its own, e.g. once for each cluster, each with weights of its own.
    """

    default: tuple[float, ...]
    by_key: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    spread: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def of(self, key: str) -> tuple[float, ...]:
        """The weights of one key, in cohort order."""
        return self.by_key.get(key, self.default)


@dataclass(frozen=True, kw_only=True, slots=True)
class Reduced:
    """What the tree gives: weighted means by key, in float64, of the keys that somebody contributed to."""

    delta: Params
    extras: Params
    num_contributors: Mapping[str, int]


class Method(ABC):
    """A federated method: what each tensor is, what a round is, what a client does, how replies become a new state.

    Class attributes describe it for ``fedgraft methods``: ``name``, ``title``, ``paper`` (authors, year, identifier),
    ``summary`` (one line), ``advice`` (when to use it, sentences), ``reconstructed`` (what is ours where the source is silent;
    empty if nothing is).
    ``uses_batch_statistics`` says that a loss term is no mean over tokens, so that a batch must not be cut into parts.
    ``is_centralised`` says that its slots are trained on all clients' pooled examples before anything is judged.
    ``keeps_client_state`` says that clients keep something beside private slots. ``budget_use``: what a client's budget bounds,
    ``holds`` (the experts of its assignment) or ``trains`` (the experts that have a gradient in one local step; the momentum of
    the local optimiser may still move others), or ``none``.
    ``needs_whole_model`` says that hooks look into MoE blocks while they run, which sharded weights and experts do not allow.
    ``batched_hooks`` names hooks that may run while several clients train in one pass: they know the client's engine only by
    ``read``, ``read_gradients``, ``write_gradients`` and ``model.named_parameters()``. ``why_one_by_one`` tells what forbids it.
    ``is_slots_only`` says that a client's model is the base and its slots' values, so that it can be exported; not where masks,
    gates or counts of ``build`` belong to it.

    ``federation`` is there in all hooks of the server's half but ``num_rounds``, and in no hook of the client's; ``slots``,
    ``group`` and ``is_personal`` run on both sides.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    paper: ClassVar[str]
    summary: ClassVar[str]
    advice: ClassVar[str] = ""
    reconstructed: ClassVar[str] = ""
    uses_batch_statistics: bool = False
    is_centralised: ClassVar[bool] = False
    keeps_client_state: bool = False
    budget_use: ClassVar[Literal["none", "holds", "trains"]] = "none"
    needs_whole_model: bool = False
    is_slots_only: bool = True
    batched_hooks: ClassVar[frozenset[str]] = frozenset()
    config_class: ClassVar[type[MethodConfig]]
    federation: Federation

    def __init__(self, config: MethodConfig) -> None:
        self.config = config

    # What the model is built with, and what each of its slots is.

    def slots(self, facts: ModelFacts) -> Slots:
        """Say what a replica's model is built with."""
        return Slots()

    def group(self, ref: ParamRef) -> Group:
        """Say which group a slot belongs to: by default its expert's, if it has one, else shared."""
        if ref.expert is not None and ref.layer is not None:
            return assigned(ref.layer, ref.expert)
        return SHARED

    def lr_scale(self, ref: ParamRef) -> float:
        """Multiply the learning rate for a slot, > 0."""
        return 1.0

    def persists_moments(self, ref: ParamRef) -> bool:
        """Whether the local optimiser's moments of a private slot are kept from round to round; by default none are."""
        return False

    def is_personal(self, groups: Mapping[str, Group]) -> bool:
        """Whether clients end with models of their own; by default where some slot is private."""
        return any(group == PRIVATE for group in groups.values())

    @property
    def bounds_experts(self) -> bool:
        """Whether the options by themselves bound the experts that clients hold or train, without any budget."""
        return False

    def why_one_by_one(self) -> str | None:
        """Say which hook of the client's half keeps clients from training in one pass; ``None``: none does."""
        for name in ("build", "objective", "local", "terms", "after_backward"):
            owner = next(each for each in type(self).__mro__ if name in vars(each))
            # Whoever writes a hook says so in the same class: a subclass may do something else in it.
            if owner is not Method and name not in vars(owner).get("batched_hooks", ()):
                return f"{self.name} has its own {name}"
        return None

    def own_values(self, private: Params) -> Params:
        """Give the values of slots, by slot key, that a client keeps in its private state under other names than the slots'.

        They are a part of its model as ``build`` loads it; what is exported has them, too.
        """
        return {}

    def check_training(self, spec: TrainSpec) -> None:
        """Refuse local optimisers that the options go wrong with, or have no effect with.

        Raises:
            ValueError: What does not go together, and what to set.
        """

    def check_run(self, *, rounds: int, has_budgets: bool) -> None:
        """Refuse options that go wrong with, or have no effect in, a run of so many rounds, with or without budgets.

        Asked of a configuration. The tries of a rate search may have fewer rounds.

        Raises:
            ValueError: What does not go together, and what to set.
        """

    # The server's half.

    def num_rounds(self, configured: int) -> int:
        """How many rounds this method runs; fewer than configured only where rounds mean nothing to it."""
        return configured

    def init(self, params: Params, num_clients: int) -> ServerState:
        """Make the state before round 1 from the start values of all slots that may be sent."""
        return ServerState(params=params)

    def plan(self, state: ServerState, default: RoundPlan) -> RoundPlan:
        """Change the round's phase, steps or learning rate."""
        return default

    def select(self, state: ServerState, plan: RoundPlan, cohort: tuple[int, ...]) -> tuple[int, ...]:
        """Change the cohort that the configured sampler drew."""
        return cohort

    def assign(self, state: ServerState, plan: RoundPlan, cohort: tuple[int, ...]) -> Mapping[int, Assignment]:
        """Decide together which experts each client of the cohort holds; a client that is not named holds all.

        What a client does not hold is not sent to it, and is masked in its model.
        """
        return {}

    def task(self, state: ServerState, task: ClientTask) -> ClientTask:
        """Change what one client is sent and asked: keys, addresses, extras. By default it gets what its assignment holds."""
        return task

    def evaluation(self, state: ServerState, task: EvaluationTask) -> EvaluationTask:
        """Change what a model is judged with: keys, addresses, assignment, extras. By default every parameter."""
        return task

    def weigh(self, state: ServerState, updates: Sequence[ClientUpdate]) -> Weights:
        """Turn the clients' small statistics into weights; by default the number of training examples."""
        return Weights(default=tuple(float(update.num_examples) for update in updates))

    def aggregate(self, state: ServerState, reduced: Reduced, updates: Sequence[ClientUpdate]) -> ServerState:
        """Make the next state; by default the server adds the mean delta."""
        return replace(state, params=add_delta(state.params, reduced.delta))

    def observe_state(self, state: ServerState) -> Mapping[str, object]:
        """JSON values about the server's state, by kind, taken after every round (e.g. how evenly experts are loaded)."""
        return {}

    # The client's half.

    def setup(self, session: Session) -> None:
        """Give a client its private state, once, before its first round; ``session.private`` holds the start values.

        The engine then holds the untouched base model.
        """

    def request(self, session: Session) -> Mapping[str, str]:
        """Let the client ask for more of the broadcast: slots, with the server's names of what it wants there.

        Called in training and in evaluation once everything else is loaded.
        """
        return {}

    def build(self, session: Session) -> AbstractContextManager[object]:
        """Set up what no tensor carries (masks, gates, counts) for this client; undone when its task ends.

        Called in training and in evaluation after all slots are loaded; may load others with ``session.engine.load``.
        """
        return nullcontext()

    def objective(self, session: Session) -> Objective | None:
        """Compute the loss of local training in another way than the response-only cross-entropy of one forward pass."""
        return None

    def terms(self, session: Session, batch: Batch, output: Any) -> Mapping[str, torch.Tensor]:
        """Extra loss terms by name; added to the response-only cross-entropy."""
        return {}

    def after_backward(self, session: Session, step: int) -> None:
        """Change gradients between backward and clipping, with ``session.engine.read_gradients`` and ``write_gradients``.

        They are those of the whole batch, whatever parts or ranks it was cut into; ``.grad`` itself is empty in some engines.
        """

    def local(self, session: Session, train: LocalTrain) -> TrainResult:
        """Train locally; ``train()`` runs the standard loop."""
        return train()

    def uploads(self, session: Session, keys: Sequence[str]) -> Sequence[str]:
        """Choose which of the trained keys are sent back, after local training; by default all of them."""
        return keys

    def reply(self, session: Session, update: ClientUpdate) -> tuple[ClientUpdate, Params]:
        """Add statistics and diagnostics to the small half of the reply, and give the extras to send beside the delta."""
        return update, {}

    def observe(self, session: Session) -> Mapping[str, object]:
        """JSON values about a personal model, taken when it is evaluated (e.g. how far the graft gate opens)."""
        return {}


def add_delta(params: Params, delta: Params) -> Params:
    """Add a mean delta to parameters: summed in float64, returned in each parameter's dtype; keys without delta stay."""
    return {
        key: (value.double() + delta[key].double()).to(value.dtype) if key in delta else value for key, value in params.items()
    }


def merge_metrics(updates: Sequence[ClientUpdate]) -> dict[str, Weighted]:
    """Sum the clients' metrics by name."""
    merged: dict[str, Weighted] = {}
    for update in updates:
        for name, value in update.metrics.items():
            merged[name] = merged[name] + value if name in merged else value
    return merged
