"""FedMoE: every client works with a part of the experts, found from what its data activates and refined while it trains.

Mei, Cai, Zhou, Wang, Xu 2024, "FedMoE: Personalized Federated Learning via Heterogeneous Mixture of Experts", arXiv 2408.11304.

Stage 1 (``warmup_rounds``, phase ``explore``): clients whose budget holds the whole model tune it for some rounds, then measure
on validation data p_ij, expert j's share of the choices of router i. Others get the mean p of clients of the same task,
weighted by examples (``same_task``). The server then searches each client's sub-model: the largest theta that sum_j x_ij p_ij
reaches in every layer i with at most alpha M experts, M what its budget holds, alpha ``memory_fraction``. With experts of one
size both searches (``search``) find the same theta: the paper's binary search keeps each layer's shortest prefix by falling p,
water-filling adds the next expert to the layer covered least.

Stage 2 (phase ``train``), each round: a client gets its experts, their router rows, and all else that is trained; it trains,
validates, and sends back what it trained, p of its experts and its validation score (mean NLL, lower is better). Modular
aggregation: an expert or router row without contributor stays as it is, with one it becomes that client's, with more it becomes
their mean by examples; what everybody trains is averaged as in FedAvg. A client whose score was no better for ``patience`` of
its rounds gets another sub-model (``recommend``): S are the K clients (``neighbours``) with the largest sim(k, a), the cosine
of the flattened p, p'_ij = sum_a sim(k, a) p_ij^a / sum_a sim(k, a), and n the mean number of experts in S minus its own. With
n > 0 it gets the n experts outside with the largest p', within M; with n < 0 it gives up the |n| inside with the smallest. If
that is no better either, the client goes back to what it had, for good.

Stated by the paper: all of the above. Not given there: K, patience, alpha, learning rates, label smoothing's and the load
balance's coefficients. Ours: the defaults; p counts choices, so that layers sum to 1 for any top-k (the paper's model has
top-1); a layer keeps top-k experts at least (there: 1); what stage 1 trains is averaged, unless ``warmup: measure_only`` drops
it; all clients that can take part in stage 1, whatever the cohort's size (``warmup_cohort``); a client's task is its most
frequent label; a client without a budget holds what covers ``coverage``; n is rounded; the search adds no expert that no choice
fell on, but who may hold all holds all; S has only clients that measured p; what is tried has ``patience`` rounds as well; p of
experts that a client lost is what it was when it had them. The paper tunes LoRA in stage 1 and all weights in stage 2; here one
form serves both: LoRA by default, all weights with ``lora: []`` and ``full: [attention, router, experts]``.

Controls: randomMoE is ``warmup_rounds: 0`` and ``recommend: false``; with a warm-up, ``experts: random`` draws as many experts
in each layer as the search would keep. With ``coverage: null``, no budgets and no warm-up this is FedAvg. Sub-models need
routers that choose among all experts of a layer; on routers that choose groups first (DeepSeek) only whole models work.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import nn
from torch.nn import functional as F

from fedgraft.aggregation.expert_choice import balance_of
from fedgraft.aggregation.expert_map import ExpertMap
from fedgraft.aggregation.fedavg import FedAvg, Part, PartsConfig
from fedgraft.aggregation.submodel import (
    Trial,
    held_by_layer,
    judge,
    partial_assignment,
    randomised,
    reach,
    recommend,
    threshold_search,
    water_fill,
    with_estimates,
    with_measured,
)
from fedgraft.errors import MethodError
from fedgraft.moe.trace import RouterWatch, trace_routing
from fedgraft.protocols import Objective, Reduced, Session, add_delta
from fedgraft.registry import METHODS
from fedgraft.seeding import derive_seed
from fedgraft.training.evaluate import score_batches
from fedgraft.training.step import response_loss
from fedgraft.types import (
    Assignment,
    Batch,
    ClientTask,
    ClientUpdate,
    EvaluationTask,
    Group,
    ModelFacts,
    Params,
    RoundPlan,
    ServerState,
    Slots,
)

__all__ = ["FedMoE", "FedMoEConfig"]

_WATCH = "fedmoe/watch"
_ACTIVATION = "activation"
_SCORE = "score"


class FedMoEConfig(PartsConfig):
    """Options of FedMoE."""

    name: Literal["fedmoe"] = "fedmoe"
    lora: tuple[Part, ...] = Field(("attention", "experts"), description="Parts trained and averaged as LoRA; not the router.")
    full: tuple[Part, ...] = Field(("router",), description="Parts whose own weights are trained and averaged.")
    warmup_rounds: int = Field(
        1,
        ge=0,
        le=1000,
        description="Rounds of stage 1, which finds p on whole models, all but one of a run or rate search that "
        "is no longer; 0: sub-models start with random experts.",
    )
    warmup: Literal["average", "measure_only"] = Field(
        "average", description="Whether what stage 1 trains is averaged, or only measured on and dropped."
    )
    warmup_cohort: Literal["all", "sampled"] = Field(
        "all", description="Who of those whose budget holds the whole model is in stage 1: all, or the round's cohort."
    )
    same_task: Literal["labels", "all"] = Field(
        "labels", description="Whose p is taken for a client that did not measure: those with its most frequent label, or all."
    )
    search: Literal["waterfill", "binary"] = Field("waterfill", description="How the first sub-model is found within a budget.")
    memory_fraction: float = Field(
        0.8, gt=0, le=1, description="Share of a budget that the first sub-model fills (alpha); the rest is for stage 2."
    )
    coverage: float | None = Field(
        0.7, gt=0, le=1, description="Theta that clients without a budget reach in every layer; null: they hold all experts."
    )
    experts: Literal["best", "random"] = Field("best", description="random: as many in each layer, drawn at random (control).")
    recommend: bool = Field(True, description="Stage 2 changes the sub-models of clients that stop improving.")
    patience: int = Field(3, ge=1, le=10_000, description="Rounds of a client without a better score before a change.")
    neighbours: int = Field(5, ge=1, le=10_000, description="Similar clients that a recommendation is made from (K).")
    balance: float = Field(
        0.0, ge=0, le=100, description="Weight of the load-balancing loss of each forward pass, which is 1 at perfect balance."
    )
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="Label smoothing of the local loss.")
    validation_examples: int | None = Field(
        None, ge=1, description="Most validation examples that p and score are measured on; null: all."
    )

    @model_validator(mode="after")
    def _options_have_an_effect(self) -> Self:
        stated = self.model_fields_set
        if "router" in self.lora:
            raise ValueError("a LoRA on the router has no rows that only an expert's holders train: put router into full")
        if self.warmup_rounds == 0 and (unused := stated & {"warmup", "warmup_cohort", "same_task"}):
            raise ValueError(f"{', '.join(sorted(unused))} has no effect with warmup_rounds: 0")
        if self.warmup_rounds == 0 and "experts" in stated and self.experts == "best":
            raise ValueError("experts: best has no effect with warmup_rounds: 0, where nothing was measured")
        if not self.recommend and (unused := stated & {"patience", "neighbours"}):
            raise ValueError(f"{', '.join(sorted(unused))} has no effect with recommend: false")
        if not (self.recommend or self.warmup_rounds) and "validation_examples" in stated:
            raise ValueError("validation_examples has no effect with warmup_rounds: 0 and recommend: false")
        return self


@METHODS.add
class FedMoE(FedAvg):
    """Sub-models by activation, modular aggregation, recommendation."""

    name = "fedmoe"
    title = "FedMoE"
    paper = "Mei et al. 2024, arXiv 2408.11304"
    summary = "each client holds the experts that its data activates; experts are averaged one by one, who holds what is refined"
    advice = "For clients of different tasks with little memory: what a client holds and sends shrinks with its sub-model."
    reconstructed = (
        "K, patience, alpha and the other numbers; p by choices for top-k above 1; what stage 1's training becomes; clients "
        "without a budget (coverage); tasks by most frequent label; LoRA in both stages by default"
    )
    budget_use = "holds"
    is_slots_only = False
    config_class = FedMoEConfig
    config: FedMoEConfig

    def __init__(self, config: FedMoEConfig) -> None:
        super().__init__(config)
        self.uses_batch_statistics = config.balance > 0

    @property
    def bounds_experts(self) -> bool:
        """Where coverage makes sub-models of clients without a budget."""
        return self.config.coverage is not None

    def slots(self, facts: ModelFacts) -> Slots:
        """The parts of FedAvg, a fully trained router row by row."""
        return replace(super().slots(facts), splits_router=True)

    def is_personal(self, groups: Mapping[str, Group]) -> bool:
        """Clients have own models where some first sub-model may lack an expert; a replica cannot know, and says yes."""
        if not hasattr(self, "federation"):
            return True
        every = self._num_slots
        return any(
            self.config.coverage is not None if count is None else count < every
            for count in map(self._first_count, range(self.federation.num_clients))
        )

    # ---- the server: rounds

    def init(self, params: Params, num_clients: int) -> ServerState:
        """Nobody's p is known; without a warm-up the sub-models are drawn at once.

        Raises:
            MethodError: Routers choose by groups, nobody can take part in the warm-up, or a budget holds too little.
        """
        facts, warmup = self.federation.facts, self._warmup
        if facts.num_groups > 1 and self.is_personal({}):
            raise MethodError(
                f"fedmoe: routers here choose among {facts.num_groups} groups of experts first, and sub-models could lack some",
                "take a model without groups, or set coverage: null and no budgets, so that everybody holds all",
            )
        for client in range(num_clients):
            if self._limit(client) < len(facts.layers) * facts.top_k:
                raise MethodError(
                    f"fedmoe: the budget of client {client} holds {self._limit(client)} experts, and {len(facts.layers)} layers "
                    f"need {facts.top_k} each",
                    "raise the client's budget",
                )
        if warmup and not any(map(self._is_able, range(num_clients))):
            raise MethodError(
                f"fedmoe: no client's budget holds all {self._num_slots} experts, so nobody can measure p in the warm-up",
                "give some client a larger budget, or set warmup_rounds: 0",
            )
        # Without any knowledge every expert is as likely as another.
        p_CLE = torch.full((num_clients, len(facts.layers), facts.num_experts), 1 / facts.num_experts, dtype=torch.float64)
        first = ExpertMap(layers=facts.layers, num_experts=facts.num_experts)
        if warmup == 0:
            first = self._first_map(p_CLE)
        return ServerState(params=params, memory={"p": p_CLE}, notes={"map": first.to_json(), "trials": {}, "measured": []})

    def plan(self, state: ServerState, default: RoundPlan) -> RoundPlan:
        """The first rounds explore."""
        return replace(default, phase="explore") if default.round_idx <= self._warmup else default

    def select(self, state: ServerState, plan: RoundPlan, cohort: tuple[int, ...]) -> tuple[int, ...]:
        """Stage 1 is for clients that can hold the whole model; if the cohort has none, for all of these."""
        if plan.phase != "explore":
            return cohort
        able = tuple(client for client in range(self.federation.num_clients) if self._is_able(client))
        drawn = tuple(client for client in cohort if client in able)
        return drawn if self.config.warmup_cohort == "sampled" and drawn else able

    def assign(self, state: ServerState, plan: RoundPlan, cohort: tuple[int, ...]) -> Mapping[int, Assignment]:
        """Each client's sub-model; in stage 1 everybody holds all."""
        held = ExpertMap.from_json(state.notes["map"], only=cohort)
        found = {client: held.assignment(client) for client in cohort}
        return {client: experts for client, experts in found.items() if experts is not None}

    def evaluation(self, state: ServerState, task: EvaluationTask) -> EvaluationTask:
        """A personal model is the client's sub-model; the global one has all experts."""
        if task.view == "global" or task.client_id is None:
            return task
        held = ExpertMap.from_json(state.notes["map"], only=(task.client_id,))
        return replace(task, assignment=held.assignment(task.client_id))

    def aggregate(self, state: ServerState, reduced: Reduced, updates: Sequence[ClientUpdate]) -> ServerState:
        """Average by contributors; note p; search the first sub-models when stage 1 ends, recommend others in stage 2."""
        state = replace(state, params=add_delta(state.params, reduced.delta))
        round_idx = updates[0].round_idx
        is_exploring = round_idx <= self._warmup
        if not (is_exploring or self.config.recommend):
            return state
        p_CLE = state.memory["p"].clone()
        for update in updates:
            held = held_by_layer(self.federation.facts, update.assignment)
            p_CLE[update.client_id] = with_measured(p_CLE[update.client_id], held, update.statistics[_ACTIVATION])
        measured: set[int] = {*state.notes["measured"], *(update.client_id for update in updates)}  # type: ignore[misc]
        notes = dict(state.notes) | {"measured": sorted(measured)}
        if round_idx == self._warmup:
            federation = self.federation
            labels = federation.labels if self.config.same_task == "labels" else ()
            p_CLE = with_estimates(p_CLE, sorted(measured), labels, federation.num_examples)
            notes["map"] = self._first_map(p_CLE).to_json()
        elif not is_exploring:
            notes |= self._recommend(state, p_CLE, sorted(measured), updates)
        return replace(state, memory=dict(state.memory) | {"p": p_CLE}, notes=notes)

    # ---- the server: sub-models

    @property
    def _warmup(self) -> int:
        """Rounds of stage 1; a run that is too short keeps its last round for stage 2, if it has two at all."""
        return min(self.config.warmup_rounds, max(1, self.federation.rounds - 1))

    @property
    def _num_slots(self) -> int:
        return len(self.federation.facts.layers) * self.federation.facts.num_experts

    def _per_layer(self, client: int) -> int | None:
        budget = self.federation.budget(client)
        return None if budget is None else budget.experts_per_layer

    def _limit(self, client: int) -> int:
        """Most experts that a client may ever hold, all layers together."""
        each = self._per_layer(client)
        return self._num_slots if each is None else min(self._num_slots, each * len(self.federation.facts.layers))

    def _is_able(self, client: int) -> bool:
        return self._limit(client) == self._num_slots

    def _first_count(self, client: int) -> int | None:
        """Most experts of the first sub-model: alpha of the budget, but top-k in every layer; ``None`` without a budget."""
        facts, each = self.federation.facts, self._per_layer(client)
        if each is None:
            return None
        layers = len(facts.layers)
        wanted = math.floor(self.config.memory_fraction * each * layers + 1e-9)  # 0.7 * 10 is a little less than 7
        return max(layers * facts.top_k, min(self._num_slots, wanted))

    def _first_map(self, p_CLE: torch.Tensor) -> ExpertMap:
        """Search every client's first sub-model."""
        facts = self.federation.facts
        found: dict[int, Assignment] = {}
        for client, p_LE in enumerate(p_CLE):
            count = self._first_count(client)
            if count is not None and count < self._num_slots:
                search = water_fill if self.config.search == "waterfill" else threshold_search
                held = search(p_LE, count=count, least=facts.top_k)
            elif count is None and self.config.coverage is not None:
                held = reach(p_LE, self.config.coverage, least=facts.top_k)
            else:
                held = held_by_layer(facts, None)
            if self.config.experts == "random" or self.config.warmup_rounds == 0:
                seed = derive_seed(self.federation.run_seed, "fedmoe/experts", client_id=client)
                held = randomised(held, facts.num_experts, seed)
            found[client] = partial_assignment(facts, held)
        return ExpertMap(layers=facts.layers, num_experts=facts.num_experts).give(found)

    def _recommend(
        self, state: ServerState, p_CLE: torch.Tensor, measured: Sequence[int], updates: Sequence[ClientUpdate]
    ) -> dict[str, object]:
        """Take in the scores, and change the sub-models of clients that do not improve; gives the notes that change.

        All of a round's changes look at the same p and sizes, so that the order of the cohort does not matter.
        """
        facts, config = self.federation.facts, self.config
        known = ExpertMap.from_json(state.notes["map"])
        held = {client: held_by_layer(facts, known.assignment(client)) for client in range(len(p_CLE))}
        trials: dict[str, object] = dict(state.notes["trials"])  # type: ignore[call-overload]
        changed: dict[int, Assignment] = {}
        for update in updates:
            client = update.client_id
            before = Trial.from_json(trials[str(client)]) if str(client) in trials else Trial()
            trial, decision = judge(before, float(update.statistics[_SCORE]), patience=config.patience)
            if decision == "revert" and trial.previous is not None:
                changed[client] = partial_assignment(facts, trial.previous)
                trial = replace(trial, previous=None)
            elif decision == "change":
                limits = {"limit": self._limit(client), "least": facts.top_k}
                tried = recommend(client, held, p_CLE, measured, neighbours=config.neighbours, **limits)
                if tried != held[client]:
                    changed[client] = partial_assignment(facts, tried)
                    trial = replace(trial, previous=held[client], stale=0)
            trials[str(client)] = trial.to_json()
        return {"map": known.give(changed).to_json(), "trials": trials}

    # ---- the client

    def build(self, session: Session) -> AbstractContextManager[object]:
        """Watch the routers while training, where a load-balancing loss is wanted."""
        if not self.config.balance or not isinstance(session.task, ClientTask):
            return nullcontext()
        watch = session.scratch[_WATCH] = RouterWatch(session.engine.model)
        return watch

    def objective(self, session: Session) -> Objective | None:
        """Cross-entropy with label smoothing, where asked for."""
        smoothing = self.config.label_smoothing
        if not smoothing:
            return None

        def smoothed(model: nn.Module, batch: Batch, num_label_tokens: int | None) -> tuple[torch.Tensor, Any]:
            _, output = response_loss(model, batch, num_label_tokens)
            reduction = "mean" if num_label_tokens is None else "sum"
            loss = F.cross_entropy(output.logits.float(), output.labels, reduction=reduction, label_smoothing=smoothing)
            return loss / (num_label_tokens or 1), output

        return smoothed

    def terms(self, session: Session, batch: Batch, output: Any) -> Mapping[str, torch.Tensor]:
        """``balance`` times m sum_e f_e P_e over the m held experts of a layer, the mean over layers: 1 at perfect balance."""
        if _WATCH not in session.scratch:
            return {}
        watch: RouterWatch = session.scratch[_WATCH]
        is_token = batch.attention_mask.reshape(-1).bool()
        losses = []
        for layer, logits_TE in watch.logits.items():
            share_held = float(torch.isfinite(logits_TE[0]).double().mean())
            losses.append(share_held * balance_of(watch.probabilities(layer)[is_token], watch.chosen[layer][is_token]))
        return {"balance": self.config.balance * torch.stack(losses).mean()}

    def uploads(self, session: Session, keys: Sequence[str]) -> Sequence[str]:
        """All that was trained; nothing where stage 1 only measures."""
        assert isinstance(session.task, ClientTask)
        return () if session.task.plan.phase == "explore" and self.config.warmup == "measure_only" else keys

    def reply(self, session: Session, update: ClientUpdate) -> tuple[ClientUpdate, Params]:
        """Send p of the held experts and the validation score, float32, of the client's own model after training."""
        assert isinstance(session.task, ClientTask)
        if not (session.task.plan.phase == "explore" or self.config.recommend):
            return update, {}
        model, facts = session.engine.model, session.engine.facts
        batches = session.validation_batches(self.config.validation_examples)
        traces = trace_routing(model, batches)
        score = score_batches(model, batches)["nll"].mean
        held = held_by_layer(facts, update.assignment)
        counts = [traces[layer].counts.double() for layer in facts.layers]
        shares = [(all_E / all_E.sum().clamp_min(1))[list(experts)] for all_E, experts in zip(counts, held, strict=True)]
        session.diagnostics["sub_model"] = {
            "layers": list(facts.layers),
            "num_experts": [len(experts) for experts in held],
            "nll": score if math.isfinite(score) else None,
        }
        return replace(update, statistics={_ACTIVATION: torch.cat(shares).float(), _SCORE: torch.tensor([score])}), {}

    def observe(self, session: Session) -> Mapping[str, object]:
        """Which experts the client's model holds."""
        held = held_by_layer(session.engine.facts, session.task.assignment)
        return {"held_experts": {"layers": list(session.engine.facts.layers), "experts": [list(each) for each in held]}}
