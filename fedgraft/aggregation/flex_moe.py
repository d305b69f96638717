"""FLEX-MoE: which client holds which experts, decided by the server so that no expert is starved.

arXiv 2512.23070 (B. Zhang et al., December 2025). A client c can hold k_c of the N experts of a layer (``experts_per_client``,
or its budget). If every client takes its best ones, clients with skewed data all want the same few, and the others are never
trained. Each round the server therefore solves, for the cohort S and each MoE layer on its own,

    max sum_{c,e} (Q_ce + kappa D_e) x_ce,   sum_e x_ce = k_c,   l <= sum_c x_ce <= u,   x_ce in {0, 1},

with Q the fitness of client and expert, D the deficit of an expert that was held too rarely before (kappa is
``deficit_weight``), m = sum_c k_c / N the even load, l = floor((1 - delta) m) and u = ceil((1 + delta) m) (delta is
``load_slack``). The vertices of this linear program are whole, so it is solved exactly (``solver: exact``); bounds around m can
always be met. ``greedy`` gives each client the experts of its largest Q, whatever their load; ``random`` draws them.

A client gets the backbone and its experts, routes among these only (the others' logits are minus infinity), trains with the
usual loss and ``balance_weight`` times a balance loss over its experts, and keeps its router. It returns, beside the deltas, two
numbers an expert it holds: its usage u_ce, the gate-weighted share of its training tokens, and the feedback r_ce. The server
averages an expert over its holders with weights n_c u_ce (``usage_weighting``; an expert that nobody holds stays as it is) and
everything else with n_c; then, for pairs that were assigned, Q_ce <- (1 - gamma) Q_ce + gamma r_ce (gamma is ``fitness_rate``),
and for all experts D_e <- max(0, D_e + m - sum_c x_ce). Q starts at 1, the largest r there is, so that every pair is tried;
among equal Q each client has an order of its own, drawn once from the run's seed. A
personal model is the client's own router over the experts it was last given; a client that was never in a cohort gets those of
its largest Q, among equals those of the largest mean Q.

Stated by sources that read the paper: the linear program of fitness under capacities and load bounds, the term of historical
deficits, usage-weighted means over the holders, routers that stay with their clients, fitness from training feedback.
Reconstructed here: the forms of Q, D and r, the bounds, the balance loss, the start and the choice among equals, LoRA as a way
to train the parts, and all constants. The feedback is, over the tokens that predict a label of the client's validation examples
after training, divided by the largest of its experts in the layer,

    correctness   sum_x G_e(x) [right(x)] / sum_x G_e(x), times e's share of sum_x G(x)
    loss_drop     sum_x G_e(x) (loss before - loss after) / sum_x G_e(x), 0 where negative
    usage         u_ce itself

with G_e(x) the part of token x that goes to e. With all experts everywhere, ``router: shared``, ``usage_weighting: false`` and
``balance_weight: 0`` this is FedAvg bit for bit.

The server's notes have ``held`` (an ``ExpertMap``), and ``load_cv``: the coefficient of variation of the experts' loads by round
and layer, of the round and cumulative.

Shape letters: C clients, L MoE layers, E experts, H experts that a client holds in a layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal, Self

import torch
from pydantic import Field, model_validator

from fedgraft.aggregation.assignment import (
    CountBounds,
    choose_at_random,
    choose_best,
    choose_exactly,
    coefficient_of_variation,
    draw_orders,
    load_bounds,
)
from fedgraft.aggregation.expert_feedback import balance_loss, gate_shares, judge_experts, normalised, token_losses
from fedgraft.aggregation.expert_map import ExpertMap
from fedgraft.aggregation.fedavg import FedAvg, Part, PartsConfig
from fedgraft.errors import MethodError
from fedgraft.moe.trace import RouterWatch
from fedgraft.protocols import LocalTrain, Reduced, Session, TrainResult, Weights, add_delta
from fedgraft.registry import METHODS
from fedgraft.seeding import derive_seed
from fedgraft.types import (
    PRIVATE,
    Assignment,
    Batch,
    ClientTask,
    ClientUpdate,
    EvaluationTask,
    Group,
    ModelFacts,
    ParamRef,
    Params,
    RoundPlan,
    ServerState,
    Slots,
)

__all__ = ["FlexMoE", "FlexMoEConfig", "next_deficit"]

_WATCHED = "flex_moe"
_OF_ASSIGNMENT = {"solver", "load_slack", "deficit_weight", "fitness_rate", "feedback", "feedback_examples"}


class FlexMoEConfig(PartsConfig):
    """Options of FLEX-MoE."""

    name: Literal["flex_moe"] = "flex_moe"
    lora: tuple[Part, ...] = Field(("attention", "experts"), description="Parts trained as LoRA.")
    full: tuple[Part, ...] = Field(("router",), description="Parts whose own weights are trained.")
    router: Literal["private", "shared"] = Field(
        "private", description="Whether clients keep their trained router to themselves."
    )
    experts_per_client: int | None = Field(
        None, ge=1, description="Experts that a client holds in each layer, k; null: all. A smaller budget goes first."
    )
    solver: Literal["exact", "greedy", "random"] = Field(
        "exact", description="The linear program; or, without load bounds, each client's fittest experts, or experts drawn."
    )
    load_slack: float = Field(
        0.1, ge=0, le=1e9, description="Delta: share of the mean load that an expert's may be off; a large one bounds nothing."
    )
    deficit_weight: float = Field(
        1.0, ge=0, le=1e6, description="Kappa: weight of historical deficits beside a fitness of 0 to 1."
    )
    fitness_rate: float = Field(
        0.3, gt=0, le=1, description="Gamma: share of the new feedback in the fitness of an assigned pair."
    )
    feedback: Literal["correctness", "loss_drop", "usage"] = Field("correctness", description="What fitness is made from.")
    feedback_examples: int = Field(64, ge=1, le=65_536, description="Own validation examples that feedback is measured on.")
    usage_weighting: bool = Field(True, description="Weigh an expert's holders by use, too; false: by training examples only.")
    balance_weight: float = Field(0.001, ge=0, le=1000, description="Weight of the balance loss over the client's experts.")

    @model_validator(mode="after")
    def _options_have_an_effect(self) -> Self:
        given = self.model_fields_set
        if "experts" not in {*self.lora, *self.full}:
            raise ValueError("flex_moe assigns trained experts: put experts into lora or full")
        if "router" in given and "router" not in {*self.lora, *self.full}:
            raise ValueError("router has no effect where no router is trained; put router into lora or full")
        idle = {
            "exact": set(),
            "greedy": {"load_slack", "deficit_weight"},
            "random": {"load_slack", "deficit_weight", "fitness_rate", "feedback", "feedback_examples"},
        }[self.solver]
        if self.feedback == "usage":
            idle.add("feedback_examples")
        if stated := sorted(idle & given):
            raise ValueError(
                f"{', '.join(stated)} has no effect with solver: {self.solver}, feedback: {self.feedback}; remove it"
            )
        return self


@METHODS.add
class FlexMoE(FedAvg):
    """Experts are assigned to clients by fitness, capacity and load; routers stay with them."""

    name = "flex_moe"
    title = "FLEX-MoE"
    paper = "Zhang et al. 2025, arXiv 2512.23070"
    summary = "the server assigns each client the experts that fit it, with even loads; means weighted by use; private routers"
    advice = "For clients that cannot hold all experts and whose data differ, so that all would choose the same few."
    reconstructed = (
        "forms of fitness, feedback and deficit, the load bounds, the balance loss, optimistic start, choice among equals, "
        "LoRA as a way to train the parts, all constants (known from a reader of the paper, no code)"
    )
    config_class = FlexMoEConfig
    config: FlexMoEConfig
    uses_batch_statistics = True
    budget_use = "holds"
    needs_whole_model = True
    is_slots_only = False

    def slots(self, facts: ModelFacts) -> Slots:
        """One LoRA over the parts in ``lora``; the parts in ``full`` themselves.

        Raises:
            MethodError: Clients are to hold fewer experts than a token needs, or more than there are.
        """
        wanted = self.config.experts_per_client
        if wanted is not None and not facts.top_k <= wanted <= facts.num_experts:
            raise MethodError(
                f"experts_per_client is {wanted}, but a token of this model goes to {facts.top_k} of {facts.num_experts} experts",
                f"set experts_per_client to {facts.top_k} to {facts.num_experts}",
            )
        return super().slots(facts)

    def group(self, ref: ParamRef) -> Group:
        """Routers are private unless they are to be shared; experts are assigned, all else is shared."""
        if ref.part == "router" and self.config.router == "private":
            return PRIVATE
        return super().group(ref)

    def is_personal(self, groups: Mapping[str, Group]) -> bool:
        """Clients end with experts of their own, also where routers are shared."""
        return True

    @property
    def bounds_experts(self) -> bool:
        """Where experts_per_client does."""
        return self.config.experts_per_client is not None

    def check_run(self, *, rounds: int, has_budgets: bool) -> None:
        """Options of the assignment need clients that cannot hold all experts."""
        super().check_run(rounds=rounds, has_budgets=has_budgets)
        if not has_budgets and not self.bounds_experts and (idle := sorted(_OF_ASSIGNMENT & self.config.model_fields_set)):
            raise ValueError(
                f"{', '.join(idle)} has no effect where every client holds all experts; remove it, or set experts_per_client or "
                "federation.budgets"
            )

    # The server's half.

    def init(self, params: Params, num_clients: int) -> ServerState:
        """Fitness 1 for every pair, no deficit, no load, and nobody holds anything yet.

        Raises:
            MethodError: A client's budget is too small for one token.
        """
        facts = self.federation.facts
        for client_id in range(num_clients):
            if (count := self._num_experts(client_id)) < facts.top_k:
                raise MethodError(
                    f"the budget of client {client_id} is {count} experts a layer, but a token of this model needs {facts.top_k}",
                    f"give each client at least {facts.top_k} experts a layer",
                )
        shape = (len(facts.layers), facts.num_experts)
        memory = {
            "fitness": torch.ones(num_clients, *shape, dtype=torch.float64),
            "deficit": torch.zeros(shape, dtype=torch.float64),
            "load": torch.zeros(shape, dtype=torch.int64),
        }
        held = ExpertMap(layers=facts.layers, num_experts=facts.num_experts)
        notes: dict[str, object] = {"held": held.to_json(), "load_cv": {"round": [], "cumulative": []}}
        return ServerState(params=params, memory=memory, notes=notes)

    def assign(self, state: ServerState, plan: RoundPlan, cohort: tuple[int, ...]) -> Mapping[int, Assignment]:
        """Solve each layer for the whole cohort; clients that hold all experts take part, and are not named."""
        facts = self.federation.facts
        clients = sorted(cohort)  # among equals the order decides, and must not depend on the cohort's
        counts = [self._num_experts(client_id) for client_id in clients]
        if min(counts) == facts.num_experts:
            return {}
        found: dict[int, dict[int, tuple[int, ...]]] = {client_id: {} for client_id in clients}
        for position, layer in enumerate(facts.layers):
            chosen_CE = self._choose(state, plan.round_idx, clients, counts, position)
            for row, client_id in enumerate(clients):
                found[client_id][layer] = tuple(chosen_CE[row].nonzero().flatten().tolist())
        return {
            client_id: found[client_id] for client_id, count in zip(clients, counts, strict=True) if count < facts.num_experts
        }

    def evaluation(self, state: ServerState, task: EvaluationTask) -> EvaluationTask:
        """A personal model has the experts its client was last given, or would be given by fitness alone."""
        client_id = task.client_id
        if task.view == "global" or client_id is None:
            return task
        held = ExpertMap.from_json(state.notes["held"], only=(client_id,))
        if client_id in held.clients:
            return replace(task, assignment=held.assignment(client_id))
        facts, count = self.federation.facts, self._num_experts(client_id)
        if count == facts.num_experts:
            return task
        fitness_CLE = state.memory["fitness"]
        best_LE = choose_best(fitness_CLE[client_id], [count] * len(facts.layers), among_equals=fitness_CLE.mean(dim=0))
        best = {layer: tuple(best_LE[row].nonzero().flatten().tolist()) for row, layer in enumerate(facts.layers)}
        return replace(task, assignment=best)

    def weigh(self, state: ServerState, updates: Sequence[ClientUpdate]) -> Weights:
        """Numbers of examples; for an expert's tensors times the share of the client's tokens that went there."""
        examples = [float(update.num_examples) for update in updates]
        if not self.config.usage_weighting:
            return Weights(default=tuple(examples))
        positions = {layer: position for position, layer in enumerate(self.federation.facts.layers)}
        held = self._map(updates)
        usage_CLE = torch.stack([_spread_out(update.statistics["usage"], held.mask(update.client_id)) for update in updates])
        weight_CLE = torch.tensor(examples, dtype=torch.float64).reshape(-1, 1, 1) * usage_CLE
        by_key = {
            ref.key: tuple(weight_CLE[:, positions[ref.layer], ref.expert].tolist())
            for ref in self.federation.refs
            if ref.part == "experts" and ref.layer is not None and ref.expert is not None
        }
        return Weights(default=tuple(examples), by_key=by_key)

    def aggregate(self, state: ServerState, reduced: Reduced, updates: Sequence[ClientUpdate]) -> ServerState:
        """Add the mean deltas; then learn from who held what, and how it went.

        A client that failed holds nothing this round: its experts fall short by it, and it keeps what it had for its own model.
        """
        config, facts = self.config, self.federation.facts
        held = self._map(updates)
        load_LE = torch.stack([held.load(layer) for layer in facts.layers])
        memory = dict(state.memory)
        if self._learns_fitness(facts, has_budgets=bool(self.federation.budgets)):
            memory["fitness"] = fitness_CLE = memory["fitness"].clone()
            for update in updates:
                is_held_LE, old_LE = held.mask(update.client_id), fitness_CLE[update.client_id]
                feedback_LE = _spread_out(update.statistics["feedback"], is_held_LE)
                new_LE = (1 - config.fitness_rate) * old_LE + config.fitness_rate * feedback_LE
                fitness_CLE[update.client_id] = torch.where(is_held_LE, new_LE, old_LE)
        memory["deficit"] = next_deficit(memory["deficit"], load_LE)
        memory["load"] = memory["load"] + load_LE
        before: Any = state.notes["load_cv"]
        cv = {
            "round": [*before["round"], [coefficient_of_variation(row) for row in load_LE]],
            "cumulative": [*before["cumulative"], [coefficient_of_variation(row) for row in memory["load"]]],
        }
        known = ExpertMap.from_json(state.notes["held"]).give(held.slots_of)
        notes = {**state.notes, "held": known.to_json(), "load_cv": cv}
        return replace(state, params=add_delta(state.params, reduced.delta), memory=memory, notes=notes)

    def observe_state(self, state: ServerState) -> Mapping[str, object]:
        """How unevenly experts were loaded in the last round, and over all rounds, by layer."""
        cv: Any = state.notes["load_cv"]
        return {"expert_load": {"layers": list(self.federation.facts.layers)} | {name: found[-1] for name, found in cv.items()}}

    def _learns_fitness(self, facts: ModelFacts, *, has_budgets: bool) -> bool:
        """Whether anything is chosen by fitness: not by chance, nor where every client holds all experts."""
        is_bounded = has_budgets or self.config.experts_per_client not in (None, facts.num_experts)
        return is_bounded and self.config.solver != "random"

    def _num_experts(self, client_id: int) -> int:
        """How many experts a client holds in each layer: what the option or its budget allows."""
        budget = self.federation.budget(client_id)
        limits = (self.config.experts_per_client, budget.experts_per_layer if budget is not None else None)
        return min([self.federation.facts.num_experts, *(limit for limit in limits if limit is not None)])

    def _choose(
        self, state: ServerState, round_idx: int, clients: Sequence[int], counts: Sequence[int], position: int
    ) -> torch.Tensor:
        """Who holds which experts of one layer, (C, E) bool, in the order of ``clients``."""
        config, num_experts, run_seed = self.config, self.federation.facts.num_experts, self.federation.run_seed
        if config.solver == "random":
            purpose = f"flex_moe/assignment/{position}"
            seeds = [derive_seed(run_seed, purpose, round_idx=round_idx, client_id=client_id) for client_id in clients]
            return choose_at_random(num_experts, counts, seeds)
        fitness_CE = state.memory["fitness"][list(clients), position]
        # All Q are equal at first: without an order of its own every client would begin with the same experts.
        orders = [derive_seed(run_seed, f"flex_moe/order/{position}", client_id=client_id) for client_id in clients]
        order_CE = draw_orders(num_experts, orders)
        if config.solver == "greedy":
            return choose_best(fitness_CE, counts, among_equals=order_CE)
        score_CE = fitness_CE + config.deficit_weight * state.memory["deficit"][position]
        columns = load_bounds(counts, num_experts, config.load_slack)
        sides = ("client", "expert")
        return choose_exactly(score_CE, rows=CountBounds.exactly(counts), columns=columns, sides=sides, among_equals=order_CE)

    def _map(self, updates: Sequence[ClientUpdate]) -> ExpertMap:
        """What each client that answered held in this round."""
        facts = self.federation.facts
        empty = ExpertMap(layers=facts.layers, num_experts=facts.num_experts)
        return empty.give({update.client_id: update.assignment for update in updates})

    # The client's half.

    def _gives_feedback(self, session: Session) -> bool:
        has_budgets = isinstance(session.task, ClientTask) and session.task.budget is not None
        return self._learns_fitness(session.engine.facts, has_budgets=has_budgets)

    @contextmanager
    def build(self, session: Session) -> Iterator[None]:
        """Watch the routers, which show what every step did."""
        with RouterWatch(session.engine.model) as watch:
            facts = session.engine.facts
            usage_LE = torch.zeros(len(facts.layers), facts.num_experts, dtype=torch.float64)
            session.scratch[_WATCHED] = _Watched(watch=watch, usage_LE=usage_LE)
            yield

    def terms(self, session: Session, batch: Batch, output: Any) -> Mapping[str, torch.Tensor]:
        """Count where the step's tokens went; give the balance loss over the client's experts, the mean over layers."""
        watched: _Watched = session.scratch[_WATCHED]
        is_token_T = batch.attention_mask.reshape(-1).bool()
        losses = []
        for position, layer in enumerate(session.engine.facts.layers):
            probabilities_TE = watched.watch.probabilities(layer)[is_token_T]
            chosen_TK = watched.watch.chosen[layer][is_token_T]
            watched.usage_LE[position] += gate_shares(probabilities_TE.detach(), chosen_TK).double().sum(dim=0).cpu()
            losses.append(balance_loss(probabilities_TE, chosen_TK, num_held=len(_held(session, layer))))
        if self.config.balance_weight == 0:
            return {}
        return {"balance": self.config.balance_weight * torch.stack(losses).mean()}

    def local(self, session: Session, train: LocalTrain) -> TrainResult:
        """Train, and judge the experts on the client's validation examples: afterwards, and before where that is asked for."""
        config, engine = self.config, session.engine
        if config.feedback == "usage" or not self._gives_feedback(session):
            return train()
        watched: _Watched = session.scratch[_WATCHED]
        batches = session.validation_batches(config.feedback_examples)
        is_drop = config.feedback == "loss_drop"
        before = token_losses(engine.model, batches, engine.device) if is_drop else None
        result = train()
        found = judge_experts(engine.model, batches, engine.device, watch=watched.watch, losses_before=before)
        watched.feedback_LE = found.mean if is_drop else found.mean * found.share
        return result

    def reply(self, session: Session, update: ClientUpdate) -> tuple[ClientUpdate, Params]:
        """Add usage and feedback of the experts that the client holds, (L, H) float32 each, as far as the server reads them."""
        watched: _Watched = session.scratch[_WATCHED]
        usage_LE = watched.usage_LE / watched.usage_LE.sum(dim=1, keepdim=True).clamp_min(1e-300)
        layers = session.engine.facts.layers
        held = [_held(session, layer) for layer in layers]
        statistics: Params = {}
        if self.config.usage_weighting:
            statistics["usage"] = _of_held(usage_LE, held)
        if self._gives_feedback(session):
            feedback_LE = usage_LE if watched.feedback_LE is None else watched.feedback_LE
            statistics["feedback"] = _of_held(normalised(feedback_LE), held)
        session.diagnostics["held_experts"] = {
            "layers": list(layers),
            "experts": [list(each) for each in held],
            "usage": [usage_LE[row, list(each)].tolist() for row, each in enumerate(held)],
            "feedback": statistics["feedback"].tolist() if "feedback" in statistics else None,
        }
        return replace(update, statistics=statistics), {}


@dataclass(kw_only=True, slots=True)
class _Watched:
    """What one task saw: gate shares summed over its training tokens, and feedback before it is normalised; (L, E) float64."""

    watch: RouterWatch
    usage_LE: torch.Tensor
    feedback_LE: torch.Tensor | None = None


def next_deficit(deficit_LE: torch.Tensor, load_LE: torch.Tensor) -> torch.Tensor:
    """D <- max(0, D + m - load), with m the mean load of the layer's experts; (L, E) float64."""
    mean_L1 = load_LE.double().mean(dim=1, keepdim=True)
    return (deficit_LE + mean_L1 - load_LE).clamp_min(0)


def _held(session: Session, layer: int) -> tuple[int, ...]:
    assignment = session.task.assignment or {}
    return assignment.get(layer, tuple(range(session.engine.facts.num_experts)))


def _of_held(value_LE: torch.Tensor, held: Sequence[Sequence[int]]) -> torch.Tensor:
    """The entries of the experts held, (L, H) float32: a client holds as many in every layer."""
    return torch.stack([value_LE[row, list(each)] for row, each in enumerate(held)]).float()


def _spread_out(value_LH: torch.Tensor, is_held_LE: torch.Tensor) -> torch.Tensor:
    """The way back from ``_of_held``: (L, E) float64, 0 for the experts that are not held."""
    value_LE = torch.zeros(is_held_LE.shape, dtype=torch.float64)
    value_LE[is_held_LE] = value_LH.double().reshape(-1)  # both run through layers, then experts ascending
    return value_LE
