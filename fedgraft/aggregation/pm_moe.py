"""PM-MoE: after personalised training every client's private module is an expert for all; a private gate mixes them.

Feng et al., arXiv 2502.00354 (WWW 2025), a second stage on any method that splits a model into shared and private parts. Stage 1
is that method: here an averaged LoRA on attention and a private one (the method ``private_lora``), whose private LoRA phi_i is
the expert. In the last round of stage 1 (``stage1_fraction``, ``stage1_rounds``) every client sends its phi_i once. In stage 2
each client gets all n modules once, keeps them, and learns a gate alone, which never leaves it: w = softmax(G(z)), an MLP
d -> 128 -> 256 -> 128 -> n (``gate_hidden``) with dropout 0.1 and an orthogonal start, y = sum of w_m phi_m over the top k of w
(``top_k``), not divided by their sum. Nothing is averaged any more; everything else stays frozen, unless the client's copies
of the modules may train with the gate (``lock_experts: false``). The gate has a rate of its own (``gate_lr_scale``).

EDM (``edm``) discards modules that are noise for a client, before its gate learns. ``free_energy``: F_m is the mean over its
label tokens of -T logsumexp(f_m / T), ``ce``: of the cross-entropy, with f_m the logits under module m alone; kept are its own
and those with F_m <= F_own + ``edm_margin``, or with ``edm_quantile`` the share of all that is lowest. The softmax is over the
kept.

Stated by the authors' code: stage 2 without EDM, gate, top-k without renormalising, what is locked. Only the abstract speaks of
EDM, so all of it is reconstructed. Ours as well: the expert is a LoRA on all attention maps, and mixing adds weighted LoRA
updates inside the model; the gate sees z, the mean over the prompt's tokens of the frozen base's last hidden state
(``embedding``), never a response, and gives an example's tokens the same weights (general text without prompts has a z of
zeros, and gets what the gate's biases say); stages are counted in rounds of the run, half and half (a run of one round has
stage 1 only); everybody publishes, and everybody learns a gate in every round of stage 2, unless ``stage2_cohort: drawn``. A
client that did not publish is no expert for others and still its own; one that was never drawn in stage 1 has an untrained
module, which does nothing. The source's own rate for the gate is 10 to 100 times the base's with plain SGD, but its code leaves
it at 1 for most base methods, and so does the default here. Only the last round's score counts: the authors' code reports the
best over evaluations on test data before and after fine-tuning, which cannot fall below stage 1's.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from torch.nn import functional as F

from fedgraft.aggregation.example_mixtures import attention_targets, embed_batches, label_pass, slot_keys
from fedgraft.errors import MethodError
from fedgraft.moe.example_gate import (
    PromptEmbedder,
    example_gate_of,
    one_hot_weights,
    prompts_of,
    top_k_weights,
    without_adapter,
)
from fedgraft.moe.mixture import active_slots, example_weights, linear_of, set_example_weights
from fedgraft.moe.prompts import watch_prompts
from fedgraft.protocols import AdapterConfig, LocalTrain, Method, MethodConfig, Reduced, Session, TrainResult
from fedgraft.registry import METHODS
from fedgraft.training.step import to_device
from fedgraft.types import (
    FROZEN,
    PRIVATE,
    SHARED,
    AdapterSpec,
    ClientTask,
    ClientUpdate,
    ExampleGateSpec,
    Group,
    MixtureSpec,
    ModelFacts,
    ParamRef,
    Params,
    RoundPlan,
    ServerState,
    Slots,
)

__all__ = ["PmMoe", "PmMoeConfig", "energies", "kept_experts"]

_GATE, _OWN, _MODULE = "example_gate", "personal", "module/"
_AVAILABLE, _KEPT, _SHARED = "pm_moe/available", "pm_moe/kept", "pm_moe/shared/"
_PUBLISH, _MIX = "publish", "mix"


class PmMoeConfig(MethodConfig):
    """Options of PM-MoE."""

    name: Literal["pm_moe"] = "pm_moe"
    adapter: AdapterConfig = Field(
        AdapterConfig(), description="The averaged LoRA on attention; its scale holds for modules too."
    )
    private_rank: int | None = Field(None, ge=1, le=4096, description="Rank of the private modules; null: the adapter's.")
    private_lr_scale: float = Field(
        1.0, gt=0, le=1000, description="The private modules' learning rate over the shared LoRA's, also that of unlocked copies."
    )
    num_experts: int = Field(
        16, ge=1, le=1000, description="Places for modules on a client, one for each client of the population at least."
    )
    top_k: int = Field(2, ge=1, le=1000, description="Modules that an example uses (k).")
    stage1_fraction: float = Field(0.5, gt=0, lt=1, description="Share of the rounds that stage 1 takes.")
    stage1_rounds: int | None = Field(
        None,
        ge=1,
        description="Rounds of stage 1, in the place of a share; a run or rate search that is not longer leaves one for stage 2.",
    )
    stage2_cohort: Literal["all", "drawn"] = Field(
        "all",
        description="Who publishes, and who learns a gate in a round of stage 2: every client, or the cohort that was drawn.",
    )
    gate_steps: int | None = Field(None, ge=1, description="Local steps of a round of stage 2; null: as in stage 1.")
    gate_lr_scale: float = Field(1.0, gt=0, le=10_000, description="The gate's learning rate over the shared LoRA's.")
    gate_hidden: tuple[int, ...] = Field((128, 256, 128), description="Neurons of the gate's hidden layers.")
    gate_activation: Literal["relu", "leaky_relu"] = Field("relu", description="What stands between the gate's layers.")
    gate_dropout: float = Field(0.1, ge=0, lt=1, description="Dropout on the gate's hidden layers.")
    embedding: Literal["hidden", "tokens"] = Field(
        "hidden", description="What a prompt's embedding is the mean of: the base's last hidden state, or its input embeddings."
    )
    lock_experts: bool = Field(True, description="Train the gate alone; false: also the client's own copies of all modules.")
    edm: Literal["off", "free_energy", "ce"] = Field("off", description="Discard modules that are noise for a client, by what.")
    edm_margin: float = Field(0.0, ge=0, description="A module is kept up to so much above the client's own, nats.")
    edm_quantile: float | None = Field(None, gt=0, le=1, description="Keep this share of all modules instead, lowest first.")
    edm_temperature: float = Field(1.0, gt=0, le=1000, description="T of the free energy.")
    edm_examples: int = Field(128, ge=1, le=65_536, description="Own training examples that EDM looks at.")

    @model_validator(mode="after")
    def _options_have_an_effect(self) -> Self:
        # What is stated at its default harms nobody: a whole dump of the defaults must be readable.
        stated = {name for name in self.model_fields_set if getattr(self, name) != type(self).model_fields[name].default}
        if self.stage1_rounds is not None and "stage1_fraction" in self.model_fields_set:
            raise ValueError("stage1_fraction has no effect beside stage1_rounds; remove one of the two")
        if self.top_k > self.num_experts:
            raise ValueError(f"top_k is {self.top_k}, and there are places for {self.num_experts} modules")
        options = {"edm_margin", "edm_quantile", "edm_temperature", "edm_examples"}
        if self.edm == "off" and (unused := stated & options):
            raise ValueError(f"{', '.join(sorted(unused))} has no effect with edm: off")
        if self.edm == "ce" and "edm_temperature" in self.model_fields_set:
            raise ValueError("edm_temperature has no effect with edm: ce")
        if self.edm_quantile is not None and "edm_margin" in self.model_fields_set:
            raise ValueError("edm_margin has no effect beside edm_quantile; remove one of the two")
        return self


def energies(
    logits_NV: torch.Tensor, labels_N: torch.Tensor, kind: Literal["free_energy", "ce"], temperature: float
) -> torch.Tensor:
    """Energy of each label token, (N,) float64: -T logsumexp(f / T), or the cross-entropy; low where a module fits."""
    if kind == "ce":
        return F.cross_entropy(logits_NV.float(), labels_N, reduction="none").double()
    return -temperature * torch.logsumexp(logits_NV.float() / temperature, dim=-1).double()


def kept_experts(energy: Mapping[int, float], own: int, margin: float, quantile: float | None) -> tuple[int, ...]:
    """The modules that EDM keeps, ascending: always one's own.

    Args:
        energy: Mean energy by module.
        own: Its own.
        margin: Others are kept up to so much above one's own.
        quantile: Others are kept if they are among this share of all, rounded up, lowest first; ``None``: by ``margin``.
    """
    if quantile is None:
        kept = {expert for expert, value in energy.items() if value <= energy[own] + margin}
    else:
        ranked = sorted(energy, key=lambda expert: (energy[expert], expert))
        kept = set(ranked[: math.ceil(quantile * len(ranked) - 1e-9)])
    return tuple(sorted(kept | {own}))


@METHODS.add
class PmMoe(Method):
    """Averaged and private LoRA first; then a private gate over everybody's private LoRA."""

    name = "pm_moe"
    title = "PM-MoE"
    paper = "Feng et al. 2025, arXiv 2502.00354"
    summary = "after personalised training all private modules are published once, and each client learns a gate that mixes them"
    advice = "Judge it by its last round, and compare it with private_lora over as many rounds."
    reconstructed = (
        "all of EDM (the authors' code has none); an expert is a private LoRA, mixed inside the model; the gate reads mean "
        "prompt embeddings of the frozen base; stages are counted in rounds"
    )
    needs_whole_model = True
    is_slots_only = False
    config_class = PmMoeConfig
    config: PmMoeConfig

    def slots(self, facts: ModelFacts) -> Slots:
        """The averaged LoRA, the private one of stage 1, and for stage 2 a mixture with a place for each client, and a gate."""
        config, shared = self.config, self.config.adapter
        rank = config.private_rank or shared.rank
        # The same scale for all: alpha / rank of the averaged LoRA, so that a larger rank is not a smaller step.
        alpha = shared.alpha * rank / shared.rank
        mixture = MixtureSpec(
            num_slots=config.num_experts,
            rank=rank,
            alpha=alpha,
            targets=attention_targets(facts, None),
            top_k=config.top_k,
            gate="example",
            dropout=shared.dropout,
        )
        gate = ExampleGateSpec(
            num_outputs=config.num_experts,
            hidden=config.gate_hidden,
            activation=config.gate_activation,
            start="orthogonal",
            dropout=config.gate_dropout,
        )
        private = AdapterSpec(name=_OWN, rank=rank, alpha=alpha, dropout=shared.dropout)
        return Slots(adapters=(shared.spec("shared", "attention"), private), mixture=mixture, example_gate=gate)

    def group(self, ref: ParamRef) -> Group:
        """Only the averaged LoRA is shared; places for modules are frozen where modules are locked."""
        if ref.part == "mixture":
            return FROZEN if self.config.lock_experts else PRIVATE
        return PRIVATE if ref.part == _GATE or ref.adapter == _OWN else SHARED

    def lr_scale(self, ref: ParamRef) -> float:
        """Gate and modules, one's own and the copies, may have rates of their own."""
        if ref.part == _GATE:
            return self.config.gate_lr_scale
        return self.config.private_lr_scale if ref.adapter == _OWN or ref.part == "mixture" else 1.0

    # ---- the server

    def init(self, params: Params, num_clients: int) -> ServerState:
        """The averaged LoRA.

        Raises:
            MethodError: There are more clients than places.
        """
        if num_clients > self.config.num_experts:
            raise MethodError(
                f"pm_moe has places for {self.config.num_experts} modules, and there are {num_clients} clients",
                f"set num_experts to {num_clients} or more",
            )
        return ServerState(params=params, notes={"holders": []})

    def plan(self, state: ServerState, default: RoundPlan) -> RoundPlan:
        """Stage 1, whose last round publishes, then stage 2."""
        rounds = self.federation.rounds
        wanted = self.config.stage1_rounds or round(self.config.stage1_fraction * rounds)
        last = max(1, min(wanted, rounds - 1))
        if default.round_idx > last:
            return replace(default, phase=_MIX, num_steps=self.config.gate_steps or default.num_steps)
        return replace(default, phase=_PUBLISH) if default.round_idx == last and rounds > 1 else default

    def select(self, state: ServerState, plan: RoundPlan, cohort: tuple[int, ...]) -> tuple[int, ...]:
        """Everybody publishes and learns a gate, unless only who is drawn."""
        is_stage2 = plan.phase in (_PUBLISH, _MIX) and self.config.stage2_cohort == "all"
        return tuple(range(self.federation.num_clients)) if is_stage2 else cohort

    def task(self, state: ServerState, task: ClientTask) -> ClientTask:
        """Modules go down once, with the averaged LoRA as it is then; who has them needs nothing more."""
        if task.plan.phase == _PUBLISH:
            return replace(task, publishes=tuple(ref.key for ref in self.federation.refs if ref.adapter == _OWN))
        if task.plan.phase == _MIX and task.client_id in state.notes["holders"]:  # type: ignore[operator]
            return replace(task, keys=(), extra_keys=())
        return task

    def aggregate(self, state: ServerState, reduced: Reduced, updates: Sequence[ClientUpdate]) -> ServerState:
        """Average the shared LoRA; keep the modules that were published; note who got them."""
        following = super().aggregate(state, reduced, updates)
        if reduced.extras:
            following = replace(following, extras={key: value.float() for key, value in reduced.extras.items()})
        if state.extras:
            holders = sorted({*state.notes["holders"], *(update.client_id for update in updates)})  # type: ignore[misc]
            following = replace(following, notes=dict(state.notes) | {"holders": holders})
        return following

    # ---- the client

    def build(self, session: Session) -> AbstractContextManager[object]:
        """In stage 2: modules instead of the private LoRA, weighed by the gate before every pass."""
        if _phase(session) == _MIX and _AVAILABLE not in session.private:
            self._take_modules(session)
        return self._mixing(session) if _AVAILABLE in session.private else nullcontext()

    def _take_modules(self, session: Session) -> None:
        """Keep what the server sent, and put the own module into its place."""
        sent = {key.removeprefix(_MODULE): value for key, value in session.received_extras.items() if key.startswith(_MODULE)}
        modules = {key: value.clone() for key, value in sent.items()} | _own_module(session, _client_of(session))
        session.private.update({self._name(key): value for key, value in modules.items()})
        available = torch.zeros(self.config.num_experts, dtype=torch.bool)
        available[[ref.expert for ref in session.engine.refs if ref.key in modules]] = True
        session.private.update({_AVAILABLE: available, _KEPT: available.clone()})
        session.private.update({f"{_SHARED}{key}": value.clone() for key, value in session.received.items()})
        session.scratch["is_first"] = True

    def _name(self, key: str) -> str:
        """Where a module's tensor lies in a client's state: as its slot, if that is private, else under a name of its own."""
        return f"{_MODULE}{key}" if self.config.lock_experts else key

    @contextmanager
    def _mixing(self, session: Session) -> Iterator[None]:
        model, private = session.engine.model, session.private
        available = private[_AVAILABLE].nonzero().flatten().tolist()
        keys = [key for expert in available for key in slot_keys(session.engine.refs, expert)]
        session.engine.load({key: private[self._name(key)] for key in keys})
        session.engine.load({key.removeprefix(_SHARED): value for key, value in private.items() if key.startswith(_SHARED)})
        session.scratch["embedder"] = PromptEmbedder(model, self.config.embedding)
        with ExitStack() as stack:
            stack.enter_context(without_adapter(model, _OWN))
            stack.enter_context(active_slots(model, available[-1] + 1))
            stack.enter_context(example_weights(model, None))
            stack.enter_context(watch_prompts(model, lambda ids, is_prompt: self._weigh(session, ids, is_prompt)))
            yield

    def _weigh(self, session: Session, input_ids: torch.Tensor, is_prompt: torch.Tensor) -> None:
        embedder: PromptEmbedder = session.scratch["embedder"]
        model = session.engine.model
        logits_BN = example_gate_of(model)(embedder.embed(input_ids, is_prompt))
        set_example_weights(model, top_k_weights(logits_BN, session.private[_KEPT].to(logits_BN.device), self.config.top_k))

    def local(self, session: Session, train: LocalTrain) -> TrainResult:
        """Stage 1 trains both LoRAs; stage 2 the gate, and the modules where they are not locked."""
        refs = session.engine.refs
        if _phase(session) != _MIX:
            return train(keys=[ref.key for ref in refs if ref.adapter is not None])
        if self.config.edm != "off" and "is_first" in session.scratch:
            self._discard(session)
        batches = list(session.train_batches())
        embed_batches(session.scratch["embedder"], batches)
        kept = set(session.private[_KEPT].nonzero().flatten().tolist()) if not self.config.lock_experts else set()
        keys = [ref.key for ref in refs if ref.part == _GATE or (ref.part == "mixture" and ref.expert in kept)]
        return train(keys=keys, batches=batches)

    def _discard(self, session: Session) -> None:
        """EDM, once, before the gate learns."""
        config = self.config
        own, model = _client_of(session), session.engine.model
        batches = [to_device(batch, session.engine.device) for batch in session.calibration_batches(config.edm_examples)]
        energy: dict[int, float] = {}
        kind: Literal["free_energy", "ce"] = "ce" if config.edm == "ce" else "free_energy"
        for expert in session.private[_AVAILABLE].nonzero().flatten().tolist():
            total, count = 0.0, 0
            for batch in batches:
                weights = one_hot_weights(
                    expert, rows=batch.num_examples, slots=config.num_experts, device=batch.input_ids.device
                )
                with torch.no_grad(), example_weights(model, weights):
                    output = label_pass(model, batch)
                found_N = energies(output.logits, output.labels, kind, config.edm_temperature)
                total, count = total + float(found_N.sum()), count + found_N.numel()
            energy[expert] = total / max(1, count)
        kept = kept_experts(energy, own, config.edm_margin, config.edm_quantile)
        mask = torch.zeros_like(session.private[_KEPT])
        mask[list(kept)] = True
        session.private[_KEPT] = mask
        session.diagnostics["edm"] = {"experts": list(energy), "energy": list(energy.values()), "kept": list(kept)}

    def uploads(self, session: Session, keys: Sequence[str]) -> Sequence[str]:
        """Nothing in stage 2."""
        return () if _phase(session) == _MIX else keys

    def reply(self, session: Session, update: ClientUpdate) -> tuple[ClientUpdate, Params]:
        """In the round that publishes: the private module, under the names of the place it takes in every client."""
        if _phase(session) != _PUBLISH:
            return update, {}
        return update, {f"{_MODULE}{key}": value for key, value in _own_module(session, _client_of(session)).items()}

    def observe(self, session: Session) -> Mapping[str, object]:
        """Mean weight of each module over the client's own examples, in stage 2."""
        if _AVAILABLE not in session.private:
            return {}
        embedder: PromptEmbedder = session.scratch["embedder"]
        weights = []
        for batch in session.calibration_batches(128):
            with torch.no_grad():
                logits_BN = example_gate_of(session.engine.model)(embedder.embed(batch.input_ids, prompts_of(batch)))
            weights.append(top_k_weights(logits_BN, session.private[_KEPT].to(logits_BN.device), self.config.top_k))
        mean_N = torch.cat(weights).double().mean(dim=0)
        return {"pm_moe_gate": {"mean_weight": mean_N.tolist(), "kept": session.private[_KEPT].nonzero().flatten().tolist()}}


def _phase(session: Session) -> str:
    return session.task.plan.phase if isinstance(session.task, ClientTask) else ""


def _client_of(session: Session) -> int:
    return 0 if session.task.client_id is None else session.task.client_id


def _own_module(session: Session, place: int) -> Params:
    """The client's private LoRA as it lies in one place of the mixtures, by slot key."""
    refs = session.engine.refs
    own = {(ref.key.partition(".lora_")[0], ref.key.split(".")[-3]): ref.key for ref in refs if ref.adapter == _OWN}
    return {
        ref.key: session.private[own[linear_of(ref.key), ref.name.rpartition(".")[2]]].unsqueeze(0).clone()
        for ref in refs
        if ref.part == "mixture" and ref.expert == place
    }
