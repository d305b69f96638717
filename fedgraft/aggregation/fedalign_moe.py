"""FedAlign-MoE: gates are aligned in function space, experts are averaged among clients on which they mean the same.

arXiv 2603.21276 (March 2026). Averaging routers that adapted to different data gives a router that suits nobody, and expert e
need not mean the same on two clients. After local training each client measures on its own examples, in every MoE layer: the
routing share p_i(e) = E_x[G_e(x)]; its stability h_i(e); tokens n_i(e, r), mean input a_i(e, r) and mean response b_i(e, r) of
the tokens sent to e, by region r of e's inputs. The server computes

    s_i(e) = exp(-E |p_i(e) - median_j p_j(e)| / T) h_i(e),   omega_i(e) = s_i(e) / sum_j s_j(e)
    P(e) ~ sum_i omega_i(e) p_i(e),                         w_e <- sum_i omega_i(e) w_{i,e}   (the router's row e)
    sigma_ij(e) = sum_r min(share_i(r), share_j(r)) cos(b_i(e,r), b_j(e,r)) [cos(a_i(e,r), a_j(e,r)) > theta_a]
    gamma_ij(e) = n_j(e) sigma_ij(e) [sigma_ij(e) >= theta] / (the same, summed over j)
    i* = argmax_j sum_i sigma_ij(e),                        E_e <- sum_j gamma_{i*j}(e) E_{j,e}

and clients train on L = L_task + mu KL(p_batch || P), averaged over layers, whose gradient reaches the router only. n_j(e) in
gamma is sum_r n_j(e, r) times the client's examples over those it measured (``probe_examples`` at most), so that clients which
route alike weigh as in FedAvg. T is ``temperature``, in units of the uniform share 1 / E of E experts; ``stability`` chooses h;
``router`` what becomes of the gates; ``personal`` gives a client whose expert is not in the anchor's majority an own version,
E_{i,e} <- sum_j gamma_ij(e) E_{j,e}. What nobody has a token for stays as it is.

Stated by the abstract: gates are aligned through routing distributions with a weak regulariser, experts through a semantic
consistency measure and selective aggregation. Two independent digests add the form omega = s / sum s and weights gamma_ij(e) that
are conditioned on regions and gated. Reconstructed here: every score (s, h, sigma, gamma), the anchor, and all numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import Field, model_validator

from fedgraft.aggregation.alignment import agreement, distil_gates, divergence, routing_loss
from fedgraft.aggregation.cohort import (
    Cohort,
    ExpertAlignment,
    align_experts,
    align_gates,
    examples_per_probe,
    expert_refs,
    own_versions,
    remember,
    router_rows,
    stack_statistic,
    version_name,
)
from fedgraft.aggregation.fedavg import Part, PartsConfig
from fedgraft.aggregation.prototypes import Prototypes, in_common_regions
from fedgraft.errors import MethodError
from fedgraft.moe.families import FAMILIES, moe_layers
from fedgraft.moe.regions import RouterInputs, profile_experts
from fedgraft.protocols import Method, Reduced, Session, Weights, add_delta
from fedgraft.registry import METHODS
from fedgraft.types import (
    PRIVATE,
    Batch,
    ClientTask,
    ClientUpdate,
    EvaluationTask,
    Group,
    ModelFacts,
    ParamRef,
    Params,
    ServerState,
    Slots,
)

__all__ = ["FedAlignMoe", "FedAlignMoeConfig"]

_Unit = Annotated[float, Field(ge=0, le=1)]
_RouterMode = Literal["rows", "distill", "local", "mean"]


class FedAlignMoeConfig(PartsConfig):
    """Options of FedAlign-MoE."""

    name: Literal["fedalign_moe"] = "fedalign_moe"
    lora: tuple[Part, ...] = Field(("attention", "experts"), description="Parts trained and averaged as LoRA.")
    full: tuple[Part, ...] = Field(("router",), description="Parts whose own weights are trained and averaged.")
    theta: _Unit | tuple[_Unit, ...] | None = Field(
        0.3,
        description="Least similarity at which clients share an expert; a list has one value a MoE layer. null: minus infinity, "
        "experts are averaged over all clients by their examples.",
    )
    theta_a: float = Field(0.3, ge=-1, lt=1, description="Cosine of mean inputs above which two clients serve the same region.")
    regions: int = Field(1, ge=1, le=64, description="Regions of each expert's inputs in which responses are compared.")
    personal: bool = Field(False, description="A client outside an expert's majority keeps a corrected version of its own.")
    router: _RouterMode | None = Field(
        None,
        description="rows: each router row averaged by consistency; distill: a gate fitted to the mixture of the clients' gates "
        "on their mean inputs; local: gates stay with their clients; mean: averaged by examples. null: rows, but mean where "
        "theta is null and mu is 0, so that this is FedAvg.",
    )
    temperature: float = Field(1.0, gt=0, description="T: how far a share may be from the median, in units of 1 / experts.")
    stability: Literal["halves", "rounds", "off"] = Field(
        "halves", description="What h compares a routing share with: the other half of the examples, the last round, nothing."
    )
    mu: float = Field(0.05, ge=0, description="Weight of KL(p_batch || P), mean over layers, on the router's loss.")
    omega_mask: float | None = Field(
        None,
        gt=0,
        le=1,
        description="Experts whose omega at this client is below this share of the uniform 1 / clients are not pulled to P; "
        "null: all are.",
    )
    distill_steps: int = Field(50, ge=1, le=10_000, description="L-BFGS steps of router: distill.")
    distill_ridge: float = Field(1e-3, gt=0, description="How strongly router: distill holds the gate at the average by rows.")
    probe_examples: int = Field(
        64, ge=1, description="Examples on which a client measures its experts after training; n is scaled up to all it has."
    )

    @property
    def router_mode(self) -> _RouterMode:
        """What becomes of the gates."""
        return self.router or ("mean" if (self.theta is None and self.mu == 0) or not self.trains("router") else "rows")

    @property
    def is_consistency_used(self) -> bool:
        """Whether omega matters: for the router's rows, or for P."""
        return self.router_mode in ("rows", "distill") or self.mu > 0

    @property
    def has_prototypes(self) -> bool:
        """Whether clients send counts and mean inputs."""
        return self.theta is not None or self.router_mode == "distill"

    def trains(self, part: Part) -> bool:
        """Whether a part is trained, one way or the other."""
        return part in self.lora or part in self.full

    @model_validator(mode="after")
    def _options_have_an_effect(self) -> Self:
        if not self.trains("experts") and self.theta is not None:
            raise ValueError("theta has no effect where experts are not trained: add experts to lora or full, or set theta: null")
        if not self.trains("router") and (self.mu > 0 or self.router is not None):
            what = "mu" if self.mu > 0 else "router"
            raise ValueError(f"{what} has no effect where the router is not trained: add router to full, or set mu: 0")
        if self.router_mode in ("rows", "distill") and "router" in self.lora:
            raise ValueError(f"router: {self.router_mode} needs a router in full: put it there, or set router to mean or local")
        needed: dict[str, bool] = {
            "theta_a": self.theta is not None,
            "personal": self.theta is not None,
            "regions": self.has_prototypes,
            "temperature": self.is_consistency_used,
            "stability": self.is_consistency_used,
            "omega_mask": self.mu > 0,
            "distill_steps": self.router_mode == "distill",
            "distill_ridge": self.router_mode == "distill",
            "probe_examples": self.has_prototypes or self.is_consistency_used,
        }
        defaults = {name: field.default for name, field in type(self).model_fields.items()}
        idle = [name for name, has_effect in needed.items() if not has_effect and getattr(self, name) != defaults[name]]
        if idle:
            raise ValueError(
                f"{', '.join(idle)} has no effect with theta {self.theta}, mu {self.mu:g}, router {self.router_mode}"
            )
        return self


@METHODS.add
class FedAlignMoe(Method):
    """Router rows are averaged by routing consistency, experts among clients whose responses agree, the rest as in FedAvg."""

    name = "fedalign_moe"
    title = "FedAlign-MoE"
    paper = "Fang et al. 2026, arXiv 2603.21276"
    summary = "average each expert only among clients on which it means the same, and routers by how consistently they route"
    advice = "Where clients' data differ so much that the same expert index comes to mean different things."
    reconstructed = (
        "all scores: routing consistency and stability, semantic similarity and its regions, the thresholds, the anchor that "
        "picks the majority, how gates are combined, every number. The paper's goals, the form omega = s / sum s and weights "
        "gamma_ij(e) are known, its formulas were not available to us: results of this method are no reproduction of the paper's"
    )
    uses_batch_statistics = True
    needs_whole_model = True
    config_class = FedAlignMoeConfig
    config: FedAlignMoeConfig

    def __init__(self, config: FedAlignMoeConfig) -> None:
        super().__init__(config)
        self.is_slots_only = not config.personal  # own versions lie under names of their own on the server

    def slots(self, facts: ModelFacts) -> Slots:
        """One LoRA over the parts in ``lora``, the parts in ``full`` themselves, the router row by row where rows are weighed."""
        config = self.config
        if isinstance(config.theta, tuple) and len(config.theta) != len(facts.layers):
            raise MethodError(
                f"theta lists {len(config.theta)} values, and this model has {len(facts.layers)} MoE layers",
                "give one value for all layers, or one for each",
            )
        adapters = (config.adapter.spec("shared", *config.lora),) if config.lora else ()
        return Slots(adapters=adapters, full=config.full, splits_router=config.router_mode in ("rows", "distill"))

    def group(self, ref: ParamRef) -> Group:
        """A local router stays with its client."""
        return PRIVATE if ref.part == "router" and self.config.router_mode == "local" else super().group(ref)

    def is_personal(self, groups: Mapping[str, Group]) -> bool:
        """With routers or expert versions of their own."""
        return self.config.personal or super().is_personal(groups)

    # ---- server

    def task(self, state: ServerState, task: ClientTask) -> ClientTask:
        """A client gets its own versions of experts, and the experts on which it is an outlier."""
        extras = dict(task.extras)
        if "omega" in state.memory and self.config.omega_mask is not None:
            extras["kept"] = state.memory["omega"][task.client_id].nan_to_num(nan=1.0) >= self.config.omega_mask
        return replace(task, addresses=own_versions(state, task.client_id, task.keys), extras=extras)

    def evaluation(self, state: ServerState, task: EvaluationTask) -> EvaluationTask:
        """A personal model has the client's own versions of experts."""
        if task.view == "global" or task.client_id is None:
            return task
        return replace(task, addresses=own_versions(state, task.client_id, task.keys))

    def weigh(self, state: ServerState, updates: Sequence[ClientUpdate]) -> Weights:
        """gamma of the anchor for experts, omega for router rows, numbers of examples for the rest."""
        cohort = self._compare(state, updates)
        order = [cohort.clients.index(update.client_id) for update in updates]
        by_key: dict[str, tuple[float, ...]] = {}
        spread: dict[str, tuple[str, ...]] = {}
        for ref, layer, expert in expert_refs(self.federation):
            if ref.part == "experts" and cohort.experts is not None:
                versions = cohort.versions(ref.key, layer, expert, with_own=self.config.personal)
                by_key |= {name: tuple(weights[order].tolist()) for name, weights in versions.items()}
                names = tuple(versions)
                held = (version_name(ref.key, client) for client in (None, *cohort.clients))
                spread |= {name: names for name in held if name in state.params and names != (name,)}
            elif ref.part == "router" and cohort.omega is not None and self.config.router_mode == "rows":
                by_key[ref.key] = tuple(cohort.omega[order, layer, expert].tolist())
            elif ref.part == "router" and self.config.router_mode == "distill":
                # Each client's gate is summed under a name of its own, so that the server has them one by one.
                spread[ref.key] = tuple(version_name(ref.key, client) for client in cohort.clients)
                for client in cohort.clients:
                    by_key[version_name(ref.key, client)] = tuple(float(update.client_id == client) for update in updates)
        default = tuple(float(update.num_examples) for update in updates)
        return Weights(default=default, by_key=by_key, spread=spread)

    def aggregate(self, state: ServerState, reduced: Reduced, updates: Sequence[ClientUpdate]) -> ServerState:
        """The next parameters, what clients are told of the routing, and what is known of them for the coming round."""
        config, federation, cohort = self.config, self.federation, self._compare(state, updates)
        params = add_delta(state.params, reduced.delta)
        extras, memory, notes = dict(state.extras), dict(state.memory), dict(state.notes)
        if cohort.experts is not None:
            notes["alignment"] = cohort.experts.summary(federation.facts.layers)
            if config.personal:
                self._make_versions(state, reduced, cohort, cohort.experts, params)
        if config.router_mode == "distill":
            self._distil(state, reduced, cohort, params)
        if cohort.centroids is not None:
            extras["centroids"] = cohort.centroids
        if cohort.omega is not None and cohort.marginals is not None and cohort.reference is not None:
            if config.mu > 0:
                extras["reference"] = cohort.reference.float()
            kept = {"omega": cohort.omega * len(updates)} if config.omega_mask is not None else {}
            kept |= {"marginals": cohort.marginals} if config.stability == "rounds" else {}
            for name, values in kept.items():
                memory[name] = remember(memory.get(name), cohort.clients, values, federation.num_clients)
        return replace(state, params=params, extras=extras, memory=memory, notes=notes)

    def observe_state(self, state: ServerState) -> Mapping[str, object]:
        """How alike clients' experts are, and for how many pairs that was enough."""
        return {"alignment": state.notes["alignment"]} if "alignment" in state.notes else {}

    def _compare(self, state: ServerState, updates: Sequence[ClientUpdate]) -> Cohort:
        """Compare the clients of a cohort, in an order that does not depend on the cohort's."""
        config, ordered = self.config, sorted(updates, key=lambda update: update.client_id)
        cohort = Cohort(clients=tuple(update.client_id for update in ordered))
        if config.is_consistency_used:
            p_CLE, omega, reference = align_gates(ordered, state.memory.get("marginals"), config.temperature)
            cohort = replace(cohort, marginals=p_CLE, omega=omega, reference=reference)
        if config.has_prototypes:
            responses = None if config.theta is None else stack_statistic(ordered, "responses")
            counts, inputs = (stack_statistic(ordered, name) for name in ("counts", "inputs"))
            found, middles = Prototypes(counts=counts, inputs=inputs, responses=responses), None
            if config.regions > 1:
                found, middles = in_common_regions(found, state.extras.get("centroids"))
            cohort = replace(cohort, prototypes=found, centroids=middles)
            if config.theta is not None:
                scale_C = examples_per_probe(ordered, config.probe_examples)
                cohort = replace(cohort, experts=align_experts(found, config.theta, config.theta_a, scale_C))
        return cohort

    def _make_versions(
        self, state: ServerState, reduced: Reduced, cohort: Cohort, experts: ExpertAlignment, params: Params
    ) -> None:
        """Make each version of an expert: the weighted mean of what clients received, plus that of what they changed."""
        for ref, layer, expert in expert_refs(self.federation):
            if ref.part != "experts":
                continue
            common = state.params[ref.key].double()
            own = {at: name for at, c in enumerate(cohort.clients) if (name := version_name(ref.key, c)) in state.params}
            for at, name in own.items():
                if experts.counts[at, layer, expert] > 0:
                    del params[name]  # made anew below, or the client is in the majority now
            for name, weights in cohort.versions(ref.key, layer, expert, with_own=True).items():
                if name in reduced.delta:
                    # From the common tensor on: where everybody received that, nothing is added and nothing rounded.
                    start = common + sum(weights[at] * (state.params[held].double() - common) for at, held in own.items())
                    params[name] = (start + reduced.delta[name]).to(state.params[ref.key].dtype)

    def _distil(self, state: ServerState, reduced: Reduced, cohort: Cohort, params: Params) -> None:
        """Fit each layer's gate to the mixture of the clients' gates on all their mean inputs."""
        assert cohort.prototypes is not None
        assert cohort.omega is not None

        def gate(client: int, refs: Sequence[ParamRef]) -> torch.Tensor:
            return torch.cat([state.params[ref.key].double() + reduced.delta[version_name(ref.key, client)] for ref in refs])

        for layer, tensors in router_rows(self.federation).items():
            counts_N = cohort.prototypes.counts[:, layer].reshape(-1)
            points_ND = cohort.prototypes.inputs[:, layer].reshape(len(counts_N), -1)
            weight, bias = distil_gates(
                points_ND[counts_N > 0],
                counts_N[counts_N > 0],
                [(gate(c, tensors["weight"]), gate(c, tensors["bias"]) if "bias" in tensors else None) for c in cohort.clients],
                cohort.omega[:, layer],
                rule=FAMILIES[self.federation.facts.family].rule,
                num_steps=self.config.distill_steps,
                ridge=self.config.distill_ridge,
            )
            for values, name in ((weight, "weight"), (bias, "bias")):
                for row, ref in enumerate(tensors.get(name, []) if values is not None else []):
                    params[ref.key] = values[row].reshape(ref.shape).to(state.params[ref.key].dtype)  # type: ignore[index]

    # ---- client

    def build(self, session: Session) -> AbstractContextManager[object]:
        """While a client trains, note what its routers read: the term of the loss runs them once more."""
        if not isinstance(session.task, ClientTask) or "reference" not in session.received_extras:
            return nullcontext()
        watch = session.scratch["watch"] = RouterInputs(session.engine.model)
        return watch

    def terms(self, session: Session, batch: Batch, output: Any) -> Mapping[str, torch.Tensor]:
        """mu KL(p_batch || P), mean over layers. What routers read is cut off from the graph: only they are pulled."""
        extras = session.received_extras
        if "reference" not in extras:
            return {}
        is_token = batch.attention_mask.reshape(-1).bool()
        losses = []
        for at, layer in enumerate(moe_layers(session.engine.model)):
            x_TD = session.scratch["watch"].inputs[layer.index]
            # forward, not a call: hooks count tokens, and these have been counted.
            logits_TE = layer.router.forward(x_TD)[0][is_token]
            kept_E = extras["kept"][at].to(x_TD.device) if "kept" in extras else None
            losses.append(routing_loss(layer.family.rule, logits_TE, extras["reference"][at].to(x_TD.device), kept_E))
        return {"routing": self.config.mu * torch.stack(losses).mean()}

    def uploads(self, session: Session, keys: Sequence[str]) -> Sequence[str]:
        """Measure the trained experts; those that have no token here are not sent."""
        config = self.config
        if not (config.is_consistency_used or config.has_prototypes):
            return keys
        profile = session.scratch["profile"] = profile_experts(
            session.engine.model,
            session.calibration_batches(config.probe_examples),
            num_regions=config.regions if config.has_prototypes else 1,
            centroids=session.received_extras.get("centroids"),
        )
        if config.theta is None:
            return keys
        layers = session.engine.facts.layers
        idle = {(layers[at], expert) for at, expert in (profile.counts.sum(dim=-1) == 0).nonzero().tolist()}
        kept_back = {ref.key for ref in session.engine.refs if ref.part == "experts" and (ref.layer, ref.expert) in idle}
        return [key for key in keys if key not in kept_back]

    def reply(self, session: Session, update: ClientUpdate) -> tuple[ClientUpdate, Params]:
        """Send what the server compares clients by."""
        config, profile = self.config, session.scratch.get("profile")
        if profile is None:
            return update, {}
        statistics: Params = {}
        if config.is_consistency_used:
            statistics["marginals"] = profile.marginals
            if config.stability == "halves":
                statistics["stability"] = agreement(*profile.halves).float()
        if config.has_prototypes:
            statistics |= {"counts": profile.counts, "inputs": profile.inputs}
        if config.theta is not None:
            statistics["responses"] = profile.responses
        if "reference" in session.received_extras:
            far = divergence(profile.marginals.double(), session.received_extras["reference"].double())
            session.diagnostics["routing_divergence"] = dict(
                zip(map(str, session.engine.facts.layers), far.tolist(), strict=True)
            )
        return replace(update, statistics=statistics), {}

    def observe(self, session: Session) -> Mapping[str, object]:
        """How many experts of each layer are the client's own versions."""
        if not self.config.personal:
            return {}
        own = {(ref.layer, ref.expert) for ref in session.engine.refs if ref.key in session.task.addresses}
        layers = session.engine.facts.layers
        return {"own_experts": {str(layer): sum(at == layer for at, _ in own) for layer in layers}}
