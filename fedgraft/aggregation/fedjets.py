"""FedJETs, renamed DDOME: a pool of experts on the server, and a gate that picks them for a client from unlabelled examples.

Dun, Hipolito Garcia et al., arXiv 2306.08586 (v3, June 2025). A frozen *common expert* embeds an example x as x'; the gate
g(x'; W_r), a 2-layer MLP with a softmax over the M experts (``num_experts``, ``gate_hidden``), is trained together with them. A
client with data D_s holds e_s = TopK_K(sum over x in D_s of g(x'; W_r)) (``top_k``): it gets W_r first, scores its own
examples, and asks for these K experts. It trains W_r and them on -log p(y|x) with p(y|x) = sum over i in e_s of g_i(x') softmax
f(x; W_i), g renormalised over e_s (``mix``). An *anchor* client is tied to one expert q, gets W_r and W_q alone, and trains two
losses that share nothing: CE(f(x; W_q), y) for the expert, CE(g(x'; W_r), q) for the gate (clipping alone sees the gradients of
both together). Anchors have labels as unlike each other as can be and run far more often (``anchor_source``,
``anchors_per_round``): by default they are half of a cohort. The server takes the plain mean of W_r over all, and of an expert
over those that trained it; one that nobody trained stays. A client is judged without labels: the K experts as above, and for
each example the best-scored of the K alone (``judge``). A round costs N (2 P_r + 2 K P_e) values, for anchors with K = 1,
whatever M.

Stated by the paper: all of the above, M = 5 or 10, K = 2, the rates 0.01 and 0.001 of experts and gate (``gate_lr_scale``).
Ours: the common expert is the frozen base, which every client has, so that its one-off cost is not charged; an *expert* is a
LoRA on attention maps, the whole model's worth of adapters; x' is the mean over the prompt's tokens of the base's last hidden
state (``embedding``), so that responses are never seen; general text without prompts has an x' of zeros, and the gate's biases
alone weigh it. The mixture of probabilities is inferred from prose. A token's loss uses its example's gate, and the anchors'
gate loss is a mean over label tokens likewise. At most half of the clients are anchors. ``anchor_source: oracle`` reads label
counts; ``clustered`` does not: in a first round all clients train and send their mean embedding, and k-means finds one anchor a
cluster. ``gate: random`` is a control that the paper lacks, and ``schedule: experts_first`` its theory's counter-example.
Experts start as the base (B = 0) unless ``expert_noise`` sets them apart. A client's model uses its training prompts to choose
experts; the global view, which knows no client, is the common expert alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch.nn import functional as F

from fedgraft.aggregation.anchors import cluster_anchors, draw_order, label_anchors, split_cohort
from fedgraft.aggregation.example_mixtures import (
    attention_targets,
    embed_batches,
    label_rows,
    mixture_loss,
    slot_keys,
)
from fedgraft.moe.example_gate import PromptEmbedder, example_gate_of, prompts_of
from fedgraft.moe.mixture import active_slots, example_weights, set_example_weights
from fedgraft.moe.prompts import watch_prompts
from fedgraft.protocols import (
    AdapterConfig,
    LocalTrain,
    Method,
    MethodConfig,
    Objective,
    Reduced,
    Session,
    TrainResult,
    Weights,
)
from fedgraft.registry import METHODS
from fedgraft.seeding import derive_seed
from fedgraft.types import (
    FROZEN,
    SHARED,
    Batch,
    ClientTask,
    ClientUpdate,
    EvaluationTask,
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

__all__ = ["FedJETs", "FedJETsConfig", "pool_name", "top_experts"]

_GATE = "example_gate"
_CLUSTER, _EXPERTS, _GATE_ONLY = "cluster", "experts", "gate"


class FedJETsConfig(MethodConfig):
    """Options of FedJETs."""

    name: Literal["fedjets"] = "fedjets"
    adapter: AdapterConfig = Field(AdapterConfig(), description="Rank, scale and dropout of every expert, a LoRA on attention.")
    targets: tuple[str, ...] | None = Field(
        None, min_length=1, description="Attention maps of an expert, by last name; null: all of them."
    )
    num_experts: int = Field(5, ge=1, le=1000, description="Experts of the server's pool (M).")
    top_k: int = Field(2, ge=1, le=1000, description="Experts that a client asks for (K).")
    gate: Literal["learned", "random"] = Field("learned", description="random: the control, a gate that stays as it was drawn.")
    gate_hidden: int = Field(64, ge=1, le=65_536, description="Neurons of the gate's hidden layer.")
    gate_lr_scale: float = Field(
        0.1,
        gt=0,
        le=1000,
        description="The gate's learning rate over the experts'; the source's ratio, for SGD over many rounds: raise it for few.",
    )
    embedding: Literal["hidden", "tokens"] = Field(
        "hidden", description="What a prompt's embedding is the mean of: the base's last hidden state, or its input embeddings."
    )
    scoring_examples: int | None = Field(
        None, ge=1, le=1_000_000, description="Own training prompts by which a client picks experts; null: all."
    )
    mix: Literal["probabilities", "logits"] = Field("probabilities", description="What of the K experts the training loss mixes.")
    judge: Literal["best", "average"] = Field(
        "best", description="An example's answer: by the best-scored of the K experts, or by the mean of their updates."
    )
    anchor_source: Literal["oracle", "clustered", "none"] = Field(
        "oracle", description="How anchors are found: by label counts; by k-means of mean embeddings; or there are none."
    )
    anchors_per_round: int | None = Field(
        None,
        ge=0,
        description="Anchors of a cohort, as far as there are any, any others being ordinary in that round; null: half of the "
        "cohort, a half client in every other round.",
    )
    schedule: Literal["joint", "experts_first"] = Field(
        "joint", description="experts_first: half of the rounds train experts under the gate as drawn, the rest the gate alone."
    )
    expert_noise: float = Field(0.0, ge=0, le=10, description="Standard deviation of the experts' B at their start.")

    @model_validator(mode="after")
    def _options_have_an_effect(self) -> Self:
        stated = self.model_fields_set
        if self.top_k > self.num_experts:
            raise ValueError(f"top_k is {self.top_k}, and there are {self.num_experts} experts")
        if self.gate == "random" and (unused := stated & {"gate_lr_scale", "schedule"}):
            raise ValueError(f"{', '.join(sorted(unused))} has no effect with gate: random, which is never trained")
        if self.top_k == 1 and (unused := stated & {"mix", "judge"}):
            raise ValueError(f"{', '.join(sorted(unused))} has no effect with top_k: 1, where there is nothing to mix")
        if self.anchor_source == "none" and "anchors_per_round" in stated:
            raise ValueError("anchors_per_round has no effect with anchor_source: none")
        return self


def pool_name(expert: int, key: str) -> str:
    """The server's name of one tensor of one expert: that of the slot it lies in on a client, without the slot."""
    return f"pool/{expert}/{key.rpartition('[')[0]}"


def top_experts(logits_BM: torch.Tensor, top_k: int) -> tuple[int, ...]:
    """The K experts with the largest sum of gate probabilities over examples, ascending; the lower one among equals."""
    total_M = torch.softmax(logits_BM.double(), dim=-1).sum(dim=0)
    return tuple(sorted(torch.argsort(total_M, descending=True, stable=True)[:top_k].tolist()))


@METHODS.add
class FedJETs(Method):
    """Clients ask for the experts that the gate gives most weight on their own prompts."""

    name = "fedjets"
    title = "FedJETs (DDOME)"
    paper = "Dun et al. 2025, arXiv 2306.08586"
    summary = "a pool of experts; a gate on prompts of a frozen base picks K for each client; anchor clients keep experts apart"
    advice = (
        "For clients that come later, without labels: a gate picks experts from prompts alone. It needs many rounds and clients "
        "whose labels differ; with few of either compare with ``gate: random`` and ``anchor_source: none``."
    )
    reconstructed = (
        "an expert is a LoRA on attention maps, the common expert the frozen base; mean prompt embeddings; the mixture's form; "
        "how oracle and clustered anchors are found, at most half of the clients; token weights of both losses; random gate"
    )
    needs_whole_model = True
    is_slots_only = False
    config_class = FedJETsConfig
    config: FedJETsConfig

    def slots(self, facts: ModelFacts) -> Slots:
        """A mixture of K slots, and the gate over M experts."""
        config = self.config
        mixture = MixtureSpec(
            num_slots=config.top_k,
            rank=config.adapter.rank,
            alpha=config.adapter.alpha,
            targets=attention_targets(facts, config.targets),
            top_k=config.top_k,
            gate="example",
            dropout=config.adapter.dropout,
        )
        gate = ExampleGateSpec(num_outputs=config.num_experts, hidden=(config.gate_hidden,))
        return Slots(mixture=mixture, example_gate=gate)

    def group(self, ref: ParamRef) -> Group:
        """The gate is shared, or frozen as drawn; a slot is its expert's."""
        if ref.part == _GATE:
            return FROZEN if self.config.gate == "random" else SHARED
        return super().group(ref)

    def lr_scale(self, ref: ParamRef) -> float:
        """The gate has a rate of its own."""
        return self.config.gate_lr_scale if ref.part == _GATE else 1.0

    def is_personal(self, groups: Mapping[str, Group]) -> bool:
        """Clients choose experts of their own, though they keep nothing."""
        return True

    # ---- the server

    def init(self, params: Params, num_clients: int) -> ServerState:
        """The gate as it starts, a pool whose experts are drawn one by one, and anchors where labels choose them.

        Raises:
            MethodError: Labels are to choose anchors, and there are fewer than two.
        """
        config = self.config
        kept = {key: value for key, value in params.items() if not key.endswith("]")}
        for expert in range(config.num_experts):
            for key, value in params.items():
                if not key.endswith("[0]"):
                    continue
                name = pool_name(expert, key)
                generator = torch.Generator().manual_seed(derive_seed(self.federation.run_seed, f"initial/{name}"))
                if name.endswith("lora_A"):
                    kept[name] = ((torch.rand(value.shape, generator=generator) * 2 - 1) / value.shape[-1] ** 0.5).to(value.dtype)
                else:
                    noise = torch.randn(value.shape, generator=generator) * config.expert_noise
                    kept[name] = noise.to(value.dtype) if config.expert_noise else torch.zeros_like(value)
        state = ServerState(params=kept)
        # Where no labels are known the first round is refused, not this.
        is_known = config.anchor_source == "oracle" and any(self.federation.labels)
        return replace(state, notes={"anchors": list(self._anchors(state))}) if is_known else state

    def plan(self, state: ServerState, default: RoundPlan) -> RoundPlan:
        """A first round that finds anchors where they are clustered; experts and gate apart where they do not train jointly."""
        if self.config.anchor_source == "clustered" and "anchors" not in state.notes:
            return replace(default, phase=_CLUSTER)
        if self.config.schedule == "joint":
            return default
        half = max(1, self.federation.rounds // 2)
        return replace(default, phase=_EXPERTS if default.round_idx <= half else _GATE_ONLY)

    def select(self, state: ServerState, plan: RoundPlan, cohort: tuple[int, ...]) -> tuple[int, ...]:
        """Everybody while anchors are looked for; then anchors and others in a fixed number."""
        num_clients = self.federation.num_clients
        if plan.phase == _CLUSTER:
            return tuple(range(num_clients))
        anchors = self._anchors(state)
        if not anchors:
            return cohort
        wanted = self.config.anchors_per_round
        # A cohort of one would never have an anchor, or nothing else, were halves always rounded the same way.
        half = (len(cohort) + plan.round_idx % 2) // 2
        sizes = split_cohort(len(cohort), len(anchors), num_clients, half if wanted is None else wanted)
        others = [client for client in range(num_clients) if client not in anchors]
        drawn = self._drawn("anchors", anchors, plan)[: sizes[0]] + self._drawn("others", others, plan)[: sizes[1]]
        return tuple(sorted(drawn))

    def _drawn(self, purpose: str, group: Sequence[int], plan: RoundPlan) -> list[int]:
        """Some clients in the order in which a round draws them."""
        return draw_order(group, derive_seed(self.federation.run_seed, f"fedjets/{purpose}", round_idx=plan.round_idx))

    def task(self, state: ServerState, task: ClientTask) -> ClientTask:
        """An anchor gets its expert with the gate; others, and anchors beyond the wanted number, ask for experts later."""
        anchors = self._anchors(state) if task.plan.phase != _CLUSTER else ()
        if task.client_id not in self._drawn("anchors", anchors, task.plan)[: self.config.anchors_per_round]:
            return task
        expert = anchors.index(task.client_id)
        addresses = {key: pool_name(expert, key) for key in slot_keys(self.federation.refs, 0)}
        return replace(task, keys=(*task.keys, *addresses), addresses=addresses)

    def weigh(self, state: ServerState, updates: Sequence[ClientUpdate]) -> Weights:
        """Plain means over whoever sent a tensor."""
        return Weights(default=(1.0,) * len(updates))

    def aggregate(self, state: ServerState, reduced: Reduced, updates: Sequence[ClientUpdate]) -> ServerState:
        """Add the means; after the round that looks for them, name the anchors."""
        following = super().aggregate(state, reduced, updates)
        if self.config.anchor_source != "clustered" or "anchors" in state.notes:
            return following
        clients = [update.client_id for update in updates]
        means = torch.stack([update.statistics["embedding"] for update in updates])
        found = cluster_anchors(means, min(self._num_anchors, len(clients))) if self._num_anchors else ()
        return replace(following, notes=dict(state.notes) | {"anchors": [clients[place] for place in found]})

    @property
    def _num_anchors(self) -> int:
        return min(self.config.num_experts, self.federation.num_clients // 2)

    def _anchors(self, state: ServerState) -> tuple[int, ...]:
        """The anchor client of each expert, as far as there are any.

        Raises:
            MethodError: Labels are to decide, and there are none.
        """
        if self.config.anchor_source == "none" or not self._num_anchors:
            return ()
        if self.config.anchor_source == "clustered" or "anchors" in state.notes:
            return tuple(state.notes.get("anchors", ()))  # type: ignore[arg-type]
        return label_anchors(self.federation.labels, self._num_anchors)

    # ---- the client

    def request(self, session: Session) -> Mapping[str, str]:
        """Score the own training prompts with the gate, and ask for the K best experts; nobody else's choice matters."""
        if isinstance(session.task, EvaluationTask) and session.task.view == "global":
            return {}
        held = [key for key in session.received if ".mixture." in key]
        embedder = PromptEmbedder(session.engine.model, self.config.embedding)
        session.scratch["embedder"] = embedder
        if held:
            # An anchor's one expert by its address; without addresses slot j holds expert j.
            names = [session.task.addresses.get(key, f"pool/{key.rpartition('[')[2][:-1]}/") for key in held]
            session.scratch["experts"] = tuple(dict.fromkeys(int(name.split("/")[1]) for name in names))
            return {}
        count = self.config.scoring_examples or session.num_train_examples
        embedding_BD = embed_batches(embedder, session.calibration_batches(count))
        with torch.no_grad():
            experts = top_experts(example_gate_of(session.engine.model)(embedding_BD), self.config.top_k)
        session.scratch["experts"] = experts
        return {
            key: pool_name(expert, key) for slot, expert in enumerate(experts) for key in slot_keys(session.engine.refs, slot)
        }

    def build(self, session: Session) -> AbstractContextManager[object]:
        """Use the slots that hold experts; when the model is judged, let the gate weigh each example."""
        return self._built(session) if "experts" in session.scratch else nullcontext()

    @contextmanager
    def _built(self, session: Session) -> Iterator[None]:
        model, experts = session.engine.model, session.scratch["experts"]
        session.diagnostics["fedjets_experts"] = {"experts": list(experts), "is_anchor": _anchor_of(session) is not None}
        with ExitStack() as stack:
            stack.enter_context(active_slots(model, len(experts)))
            stack.enter_context(example_weights(model, None))
            if isinstance(session.task, EvaluationTask):
                stack.enter_context(watch_prompts(model, lambda ids, is_prompt: self._weigh_examples(session, ids, is_prompt)))
            yield

    def _weigh_examples(self, session: Session, input_ids: torch.Tensor, is_prompt: torch.Tensor) -> None:
        model, experts = session.engine.model, session.scratch["experts"]
        if self.config.judge == "average":
            weight_BK = torch.full((len(input_ids), len(experts)), 1 / len(experts), device=session.engine.device)
        else:
            embedder: PromptEmbedder = session.scratch["embedder"]
            with torch.no_grad():
                scores_BK = example_gate_of(model)(embedder.embed(input_ids, is_prompt))[:, list(experts)]
            weight_BK = F.one_hot(scores_BK.argmax(dim=-1), len(experts)).float()
        set_example_weights(model, weight_BK)

    def objective(self, session: Session) -> Objective | None:
        """The negative log-likelihood under the gated mixture of the client's experts; one pass an expert."""
        return partial(
            mixture_loss, embedder=session.scratch["embedder"], experts=session.scratch["experts"], mix=self.config.mix
        )

    def terms(self, session: Session, batch: Batch, output: Any) -> Mapping[str, torch.Tensor]:
        """An anchor's second loss: the gate is to name its expert. A mean over label tokens, as the first."""
        expert = _anchor_of(session)
        if expert is None or self.config.gate == "random" or _phase(session) == _EXPERTS:
            return {}
        embedder: PromptEmbedder = session.scratch["embedder"]
        scores_BM = example_gate_of(session.engine.model)(embedder.embed(batch.input_ids, prompts_of(batch)))
        loss_B = -torch.log_softmax(scores_BM.float(), dim=-1)[:, expert]
        return {"anchor_gate": loss_B[label_rows(batch)].mean()}

    def local(self, session: Session, train: LocalTrain) -> TrainResult:
        """Embed the round's prompts first, once each, then train what the phase trains."""
        batches = list(session.train_batches())
        embed_batches(session.scratch["embedder"], batches)
        return train(keys=self._trained(session), batches=batches)

    def uploads(self, session: Session, keys: Sequence[str]) -> Sequence[str]:
        """What was trained."""
        trained = set(self._trained(session))
        return tuple(key for key in keys if key in trained)

    def reply(self, session: Session, update: ClientUpdate) -> tuple[ClientUpdate, Params]:
        """While anchors are looked for: the mean embedding of the own training prompts."""
        if _phase(session) != _CLUSTER:
            return update, {}
        batches = session.calibration_batches(session.num_train_examples)
        mean_D = embed_batches(session.scratch["embedder"], batches).double().mean(dim=0).float().cpu()
        return replace(update, statistics=dict(update.statistics) | {"embedding": mean_D}), {}

    def observe(self, session: Session) -> Mapping[str, object]:
        """Which experts the client holds, and how its own training prompts spread over all."""
        batches = session.calibration_batches(session.num_train_examples)
        with torch.no_grad():
            scores = example_gate_of(session.engine.model)(embed_batches(session.scratch["embedder"], batches))
        share = torch.softmax(scores.float(), dim=-1).mean(dim=0)
        return {"fedjets_gate": {"experts": list(session.scratch["experts"]), "mean_weight": share.tolist()}}

    def _trained(self, session: Session) -> list[str]:
        """Keys that this phase trains, in the model's order."""
        phase = _phase(session)
        has_gate = phase != _EXPERTS and not (phase == _CLUSTER and self.config.schedule == "experts_first")
        has_experts = phase != _GATE_ONLY
        return [
            ref.key
            for ref in session.engine.refs
            if ref.key in session.received and (has_gate if ref.part == _GATE else has_experts)
        ]


def _phase(session: Session) -> str:
    return session.task.plan.phase if isinstance(session.task, ClientTask) else ""


def _anchor_of(session: Session) -> int | None:
    """The expert that this client anchors; ``None`` for all others."""
    is_anchor = isinstance(session.task, ClientTask) and bool(session.task.addresses)
    return int(session.scratch["experts"][0]) if is_anchor else None
