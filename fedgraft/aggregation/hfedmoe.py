"""HFedMoE: clients update only the experts that matter to a batch and fit their budget; the server averages by coverage.

Fang, Lin, Hu, Ma, Tao, Deng, Chen, Fang 2026, "HFedMoE: Resource-aware Heterogeneous Federated Learning with
Mixture-of-Experts", arXiv 2601.00583. Top-k is a token's, so a batch touches more experts than a weak client can train. In every
MoE layer and batch of T tokens, with G_e(x) expert e's softmax share of token x:

    s(e) = lam * mean_x G_e(x) + (1 - lam) * max_x G_e(x)                              importance, eq. 3-5
    I(e) = s(e) - beta * mean_x G_e(x) log(G_e(x) / mean_x' G_e(x'))                    information bottleneck, eq. 6-14
    active = the C largest I among the experts that some token was sent to              eq. 15; C is the client's budget

Only active experts take part in the backward pass; the forward pass routes as ever. After local training a client has the usage
u(e), the mean of G_e over all tokens of the round, and s(e), its mean over batches. It qualifies for the experts
S = {e: u(e) >= tau}; it sends those, its gates (routers), everything dense, u, s, and which were active. The server takes

    E_e = sum_c |D_c| [e in S_c] E_e^c / sum_c |D_c| [e in S_c]                         eq. 17; nobody: E_e stays
    gate = sum_c alpha_c gate_c,  alpha_c = sum_{e in S_c} u_c(e) s_c(e) / |union_c S_c|  eq. 18-21, in every layer

``lam``, ``beta`` and ``tau`` are the paper's. The information of a constant G is 0: an expert that treats all tokens alike costs
nothing.

Stated by the source (public notes of the equations): all of the above. Reconstructed here: tokens for the paper's samples, since
a language model's router sees tokens (padding left out); non-active experts lend their output without gradient, so that the
router learns from all (``backward: detach``; ``drop`` leaves them out); alpha is divided by its sum (as printed it is not, and
gates shrink or grow: ``normalise: false``); experts or gates that nobody qualifies for stay; dense parts are averaged by
examples; the default values of ``lam``, ``beta`` and ``tau``; s as the mean over batches; ``ema``. The paper ranks by I, and by
s in one place: ``rank_by``. That u(e) >= tau does not say that e was ever active, so that what is sent may be what was received:
``contrib`` chooses, and the diagnostics list both sets.

A budget bounds the experts that have a gradient in a step, not those that move: with momentum in the local optimiser (AdamW) an
expert that was active in an earlier step still moves by it in later ones, so that moments of all experts are counted as held.
Weight decay would move all of them in every step, and is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Literal, Self

import torch
from pydantic import Field, model_validator

from fedgraft.aggregation.cohort import stack_statistic
from fedgraft.aggregation.fedavg import FedAvg, Part, PartsConfig
from fedgraft.moe.active import ActiveExperts
from fedgraft.protocols import LocalTrain, Reduced, Session, TrainResult, TrainSpec, Weights
from fedgraft.registry import METHODS
from fedgraft.types import ClientTask, ClientUpdate, ParamRef, Params, ServerState

__all__ = [
    "HFedMoE",
    "HFedMoEConfig",
    "bottleneck_scores",
    "choose_active",
    "contributing",
    "gate_weights",
    "importance",
    "information",
]

USAGE, IMPORTANCE, UPDATED = "hfedmoe/usage", "hfedmoe/importance", "hfedmoe/updated"
_TALLY = "hfedmoe/tally"


class HFedMoEConfig(PartsConfig):
    """Options of HFedMoE. The experts must be trained, as LoRA or in full."""

    name: Literal["hfedmoe"] = "hfedmoe"
    lora: tuple[Part, ...] = Field(("attention", "experts"), description="Parts trained and averaged as LoRA.")
    full: tuple[Part, ...] = Field(("router",), description="Parts whose own weights are trained and averaged.")
    rank_by: Literal["ib", "s", "random"] = Field(
        "ib", description="What ranks experts for a budget: information bottleneck I, importance s, or chance (a control)."
    )
    lam: float = Field(0.5, ge=0, le=1, description="lambda: share of the mean gate in importance; the rest is its maximum's.")
    beta: float = Field(0.1, ge=0, le=100, description="Price of the information that an expert's gate carries about a token.")
    drop_negative: bool = Field(False, description="Leave experts of negative I out, even where the budget has room.")
    backward: Literal["detach", "drop"] = Field(
        "detach", description="Experts that are not active lend their output without gradient, or are left out of the sum."
    )
    tau: float | None = Field(
        None, ge=0, le=1, description="Usage from which on a client contributes to an expert; null: 1 / experts of a layer."
    )
    contrib: Literal["usage", "updated", "both"] = Field(
        "usage", description="Experts that a client sends: of enough usage, active at least once, or both."
    )
    gates: Literal["alpha", "plain"] = Field("alpha", description="Routers weighted by alpha, or by examples as in FedAvg.")
    normalise: bool = Field(True, description="Divide alpha by its sum; false: as printed, so that routers change their norm.")
    ema: float = Field(0.0, ge=0, lt=1, description="Share of a client's former usage and importance in those of a round.")

    @model_validator(mode="after")
    def _options_have_an_effect(self) -> Self:
        given = self.model_fields_set
        if "experts" not in (*self.lora, *self.full):
            raise ValueError("experts are in neither lora nor full, and HFedMoE trains experts: add them to one of the two")
        if self.rank_by != "ib":
            idle = sorted({"beta", "drop_negative"} & given)
            if idle:
                raise ValueError(f"{', '.join(idle)} has no effect with rank_by: {self.rank_by}; remove it")
        if self.contrib == "updated" and "tau" in given:
            raise ValueError("tau has no effect with contrib: updated, which does not look at usage; remove it")
        if not self.trains_router and (idle := sorted({"gates", "normalise"} & given)):
            raise ValueError(f"{', '.join(idle)} has no effect where no router is trained; add router to lora or full")
        if self.gates == "plain" and "normalise" in given:
            raise ValueError("normalise has no effect with gates: plain; remove it")
        if not self.normalise and "router" not in self.full:
            raise ValueError("normalise: false scales whole routers, not the factors of a LoRA: move router from lora to full")
        if "lam" in given and self.rank_by == "random" and not self.weighs_gates:
            raise ValueError("lam has no effect with rank_by: random where no router is weighted by alpha; remove it")
        if "ema" in given and not self.weighs_gates and self.contrib == "updated":
            raise ValueError("ema has no effect with contrib: updated where no router is weighted by alpha; remove it")
        return self

    @property
    def trains_router(self) -> bool:
        """Whether routers are among the parts that are trained."""
        return "router" in (*self.lora, *self.full)

    @property
    def weighs_gates(self) -> bool:
        """Whether routers are weighted by alpha."""
        return self.trains_router and self.gates == "alpha"


# ---- the equations


def importance(gate_TE: torch.Tensor, lam: float) -> torch.Tensor:
    """s (E,), float64: ``lam`` times the mean share over the T >= 1 tokens, plus 1 - ``lam`` times the largest (eq. 3-5)."""
    wide_TE = gate_TE.double()
    return lam * wide_TE.mean(dim=0) + (1 - lam) * wide_TE.amax(dim=0)


def information(gate_TE: torch.Tensor) -> torch.Tensor:
    """Mean over tokens of G log(G / mean G), (E,), nats, float64, >= 0; 0 where G does not depend on the token (eq. 9-13)."""
    wide_TE = gate_TE.double()
    mean_E = wide_TE.mean(dim=0)
    ratio_TE = wide_TE / torch.where(mean_E > 0, mean_E, 1)
    found_E: torch.Tensor = torch.special.xlogy(wide_TE, ratio_TE).mean(dim=0).clamp_min(0)
    return found_E


def bottleneck_scores(gate_TE: torch.Tensor, lam: float, beta: float) -> torch.Tensor:
    """I (E,), float64: importance minus ``beta`` times information (eq. 14)."""
    return importance(gate_TE, lam) - beta * information(gate_TE)


def choose_active(
    scores_E: torch.Tensor, union_E: torch.Tensor, budget: int | None, *, drop_negative: bool = False
) -> torch.Tensor:
    """Choose at most ``budget`` experts of the largest sum of scores out of a union (eq. 15).

    Args:
        scores_E: Score of each expert, finite.
        union_E: Bool, the experts that may be chosen.
        budget: ``None`` is no limit.
        drop_negative: Whether experts of negative score are left out; else the budget is used up.

    Returns:
        (E,) bool; among equals the lower index.
    """
    candidates_E = union_E & (scores_E >= 0) if drop_negative else union_E
    order_E = torch.argsort(scores_E.masked_fill(~candidates_E, float("-inf")), descending=True, stable=True)
    active_E = torch.zeros_like(union_E)
    active_E[order_E[:budget]] = True
    return active_E & candidates_E


def contributing(usage: torch.Tensor, updated: torch.Tensor | None, tau: float | None, contrib: str) -> torch.Tensor:
    """The experts that a client sends, bool, of the shape (..., E) of ``usage``; ``tau`` ``None`` is 1 / E.

    ``updated`` may be ``None`` with ``contrib`` ``usage``, which does not look at it.
    """
    qualified = usage >= (1 / usage.shape[-1] if tau is None else tau)
    if contrib == "usage":
        return qualified
    assert updated is not None
    return updated.bool() & qualified if contrib == "both" else updated.bool()


def gate_weights(usage_CLE: torch.Tensor, importance_CLE: torch.Tensor, contributing_CLE: torch.Tensor) -> torch.Tensor:
    """alpha (C, L) of each client in each layer, float64, as printed: not normalised (eq. 18-21).

    0 for all clients in a layer where nobody contributes.
    """
    products_CLE = usage_CLE.double() * importance_CLE.double()
    covered_L = contributing_CLE.any(dim=0).sum(dim=-1)
    return torch.where(contributing_CLE, products_CLE, 0).sum(dim=-1) / covered_L.clamp_min(1)


# ---- the client's counts


class _Tally:
    """What one client's batches of one round say about its experts; chooses the active ones meanwhile."""

    def __init__(self, config: HFedMoEConfig, layers: Sequence[int], num_experts: int, budget: int | None, seed: int) -> None:
        shape = (len(layers), num_experts)
        self._config = config
        self._places = {index: place for place, index in enumerate(layers)}
        self._budget = budget
        self._generator = torch.Generator().manual_seed(seed)
        self._gates_LE = torch.zeros(shape, dtype=torch.float64)
        self._importance_LE = torch.zeros(shape, dtype=torch.float64)
        self._tokens_L, self._batches_L = torch.zeros(len(layers)), torch.zeros(len(layers))
        self._touched_L = torch.zeros(len(layers))
        self.updated_LE = torch.zeros(shape, dtype=torch.bool)
        self.most_active_L = torch.zeros(len(layers), dtype=torch.int64)

    def choose(self, index: int, gate_TE: torch.Tensor, union_E: torch.Tensor) -> torch.Tensor:
        """Count one batch in one layer, and give the experts that take part in its backward pass."""
        config, place = self._config, self._places[index]
        important_E = importance(gate_TE, config.lam)
        if config.rank_by == "random":
            scores_E = torch.rand(union_E.shape, generator=self._generator, dtype=torch.float64).to(union_E.device)
        else:
            scores_E = important_E if config.rank_by == "s" else bottleneck_scores(gate_TE, config.lam, config.beta)
        active_E = choose_active(scores_E, union_E, self._budget, drop_negative=config.drop_negative)
        self._gates_LE[place] += gate_TE.double().sum(dim=0).cpu()
        self._importance_LE[place] += important_E.cpu()
        self._tokens_L[place] += len(gate_TE)
        self._batches_L[place] += 1
        self._touched_L[place] += int(union_E.sum())
        self.updated_LE[place] |= active_E.cpu()
        self.most_active_L[place] = max(int(self.most_active_L[place]), int(active_E.sum()))
        return active_E

    def usage(self) -> torch.Tensor:
        """u (L, E), float32: the mean share of a token over the round (eq. 16)."""
        return (self._gates_LE / self._tokens_L.clamp_min(1).unsqueeze(1)).float()

    def importance(self) -> torch.Tensor:
        """s (L, E), float32: the mean over the round's batches."""
        return (self._importance_LE / self._batches_L.clamp_min(1).unsqueeze(1)).float()

    def touched(self) -> list[float]:
        """Experts that a batch's tokens are sent to, by layer, the mean over batches."""
        return (self._touched_L / self._batches_L.clamp_min(1)).tolist()


@METHODS.add
class HFedMoE(FedAvg):
    """Budgeted backward passes on the clients, means over qualified contributors on the server."""

    name = "hfedmoe"
    title = "HFedMoE"
    paper = "Fang et al. 2026, arXiv 2601.00583"
    summary = "each step trains only the experts that matter most to its batch and fit the budget; experts averaged by coverage"
    advice = (
        "For clients of unequal budgets: each trains, and sends, the experts that its own data use most. "
        "The forward pass still holds all experts; the budget saves gradients and what autograd keeps."
    )
    reconstructed = (
        "tokens in the place of samples, what a non-active expert does in the forward pass, normalised gate weights, what nobody "
        "qualifies for, dense parts, importance as a mean over batches, ema, defaults of lam, beta and tau"
    )
    config_class = HFedMoEConfig
    config: HFedMoEConfig
    budget_use = "trains"
    needs_whole_model = True
    uses_batch_statistics = True

    def __init__(self, config: HFedMoEConfig) -> None:
        super().__init__(config)
        # Only then do clients keep anything: a state for nothing would be a file a client and round.
        self.keeps_client_state = config.ema > 0

    @property
    def bounds_experts(self) -> bool:
        """Where drop_negative leaves experts out, whatever the budget."""
        return self.config.drop_negative

    def check_training(self, spec: TrainSpec) -> None:
        """An expert that is not active has no gradient, and is not to move all the same."""
        super().check_training(spec)
        if spec.weight_decay > 0:
            raise ValueError(
                f"training.weight_decay is {spec.weight_decay:g}, which moves experts that are not active, too; set it to 0"
            )

    def check_run(self, *, rounds: int, has_budgets: bool) -> None:
        """How experts are ranked, and what the others do, needs something that leaves experts out."""
        super().check_run(rounds=rounds, has_budgets=has_budgets)
        if has_budgets or self.bounds_experts:
            return
        idle = {"rank_by", "beta", "backward"} | (set() if self.config.weighs_gates else {"lam"})
        if stated := sorted(idle & self.config.model_fields_set):
            raise ValueError(
                f"{', '.join(stated)} has no effect without federation.budgets, where every expert of a batch is active; remove "
                "it, or set budgets"
            )

    # The server's half.

    def task(self, state: ServerState, task: ClientTask) -> ClientTask:
        """A client that keeps its usage and importance may send them all the same: they are what the server weighs by."""
        return replace(task, publishes=(USAGE, IMPORTANCE)) if self.config.ema else task

    def weigh(self, state: ServerState, updates: Sequence[ClientUpdate]) -> Weights:
        """Weigh an expert by the examples of those who contribute to it, a router by alpha, everything else by examples.

        Raises:
            UpdateError: A reply lacks its counts.
        """
        weights = super().weigh(state, updates)
        for name in self._sent_counts:
            stack_statistic(updates, name)
        contributes_CLE = torch.stack([self._contributes(update.statistics) for update in updates])
        alphas_CL = self._alphas(updates)
        if self.config.normalise:
            sums_L = alphas_CL.sum(dim=0)
            alphas_CL = alphas_CL / torch.where(sums_L > 0, sums_L, 1)
        by_key: dict[str, tuple[float, ...]] = {}
        for ref in self.federation.refs:
            place = self._place(ref)
            if ref.part == "experts":
                given = zip(contributes_CLE[:, place, ref.expert].tolist(), weights.default, strict=True)
                by_key[ref.key] = tuple(examples if is_in else 0.0 for is_in, examples in given)
            elif ref.part == "router" and self.config.gates == "alpha":
                by_key[ref.key] = tuple(alphas_CL[:, place].tolist())
        return replace(weights, by_key=by_key)

    def aggregate(self, state: ServerState, reduced: Reduced, updates: Sequence[ClientUpdate]) -> ServerState:
        """Add the mean deltas. With alpha as printed a router is sum alpha_c gate_c, which is sum alpha times their mean."""
        new = super().aggregate(state, reduced, updates)
        if self.config.normalise:
            return new
        sums_L = self._alphas(updates).sum(dim=0)
        params = dict(new.params)
        for ref in self.federation.refs:
            if ref.part == "router" and ref.key in reduced.delta:
                mean = state.params[ref.key].double() + reduced.delta[ref.key].double()
                params[ref.key] = (sums_L[self._place(ref)] * mean).to(params[ref.key].dtype)
        return replace(new, params=params)

    @property
    def _sent_counts(self) -> tuple[str, ...]:
        """Statistics of a reply: who was active only where that decides what is sent."""
        return (USAGE, IMPORTANCE) if self.config.contrib == "usage" else (USAGE, IMPORTANCE, UPDATED)

    def _contributes(self, statistics: Params) -> torch.Tensor:
        """(L, E) bool, on either side of the wire: both see the same float32 values."""
        return contributing(statistics[USAGE], statistics.get(UPDATED), self.config.tau, self.config.contrib)

    def _alphas(self, updates: Sequence[ClientUpdate]) -> torch.Tensor:
        """alpha (C, L), as printed."""
        statistics = [update.statistics for update in updates]
        return gate_weights(
            torch.stack([each[USAGE] for each in statistics]),
            torch.stack([each[IMPORTANCE] for each in statistics]),
            torch.stack([self._contributes(each) for each in statistics]),
        )

    def _place(self, ref: ParamRef) -> int:
        """Which of the MoE layers a slot belongs to; -1 for a dense one's."""
        layers = self.federation.facts.layers
        return layers.index(ref.layer) if ref.layer in layers else -1

    # The client's half.

    def build(self, session: Session) -> AbstractContextManager[object]:
        """In training, watch every batch's routing and hold its backward pass to the active experts."""
        task = session.task
        if not isinstance(task, ClientTask):
            return nullcontext()
        facts = session.engine.facts
        budget = None if task.budget is None else task.budget.experts_per_layer
        tally = _Tally(self.config, facts.layers, facts.num_experts, budget, session.seed("hfedmoe/random"))
        session.scratch[_TALLY] = tally
        return ActiveExperts(session.engine.model, tally.choose, mode=self.config.backward)

    def local(self, session: Session, train: LocalTrain) -> TrainResult:
        """Train, then take stock of usage and importance, mixed with those of the client's former rounds if asked to."""
        result = train()
        tally: _Tally = session.scratch[_TALLY]
        found = {USAGE: tally.usage(), IMPORTANCE: tally.importance()}
        if share := self.config.ema:
            found = {
                key: share * session.private[key] + (1 - share) * value if key in session.private else value
                for key, value in found.items()
            }
            session.private.update(found)
        session.scratch |= found | {UPDATED: tally.updated_LE.to(torch.uint8)}
        return result

    def uploads(self, session: Session, keys: Sequence[str]) -> Sequence[str]:
        """Everything but the experts that this client does not contribute to."""
        contributes_LE = self._contributes(session.scratch)
        layers = session.engine.facts.layers
        left_out = {
            ref.key
            for ref in session.engine.refs
            if ref.part == "experts" and ref.layer is not None and not contributes_LE[layers.index(ref.layer), ref.expert]
        }
        return [key for key in keys if key not in left_out]

    def reply(self, session: Session, update: ClientUpdate) -> tuple[ClientUpdate, Params]:
        """Send usage, importance and, if it decides, who was active; note both sets, and the norm of the router that came."""
        statistics: Params = {key: session.scratch[key] for key in self._sent_counts}
        tally: _Tally = session.scratch[_TALLY]
        tau, layers = self.config.tau, session.engine.facts.layers
        notes = {
            "layers": list(layers),
            "qualified": _listed(contributing(statistics[USAGE], None, tau, "usage")),
            "updated": _listed(tally.updated_LE),
            "sent": _listed(self._contributes(statistics)),
            "most_active": tally.most_active_L.tolist(),
            "mean_touched": tally.touched(),
            "router_norm": _router_norms(session) if "router" in self.config.full else [],
        }
        session.diagnostics["hfedmoe"] = notes
        return replace(update, statistics=dict(update.statistics) | statistics), {}


def _listed(is_in_LE: torch.Tensor) -> list[list[int]]:
    """Experts by layer, ascending."""
    return [row.nonzero().squeeze(1).tolist() for row in is_in_LE]


def _router_norms(session: Session) -> list[float]:
    """Euclidean norm of what was received of each layer's router."""
    layers = session.engine.facts.layers
    squares = dict.fromkeys(layers, 0.0)
    for ref in session.engine.refs:
        if ref.part == "router" and ref.layer is not None and ref.key in session.received:
            squares[ref.layer] += float(session.received[ref.key].double().square().sum())
    return [squares[layer] ** 0.5 for layer in layers]
