"""FedAMoLE: clients hold different numbers of LoRA experts out of the server's pool, chosen by how experts and data agree.

Zhang et al., arXiv 2411.19128 (v4, October 2025). At each attention map named in ``targets`` the frozen W gains one LoRA that
everybody has (A_s, B_s), a client's own set J_c of domain experts (A_j, B_j), and a token projection T that everybody has:
h = W x + (alpha / r) B_s A_s x + sum over the top-k of J_c of p_j (alpha / r) B_j A_j x, with p the softmax over J_c of
(A_j x) . (T x) / sqrt(r), divided by the sum of the k chosen (``top_k``; the service is ``fedgraft.moe.mixture``). Local training
adds ``balance`` times |J_c| sum_j P_j f_j for each map, P_j the mean probability and f_j the share of choices: 1 at perfect
balance, |J_c| where one expert takes all.

The server keeps a pool of M experts a map (``num_experts``). Each client of a round sends, beside what it trained, the mean over
some tokens of its own of T x (psi_c) and of each of its experts' A_j x (phi_cj), measured in eval mode after training
(``embedding_fraction``, ``embedding_examples``). T and the shared LoRA become the mean over clients, an expert the mean over its
holders, Phi_j the mean of the holders' phi_cj. Then the experts choose clients (RSEA): with S_j the softmax over clients of
Phi_j . psi_c / sqrt(r), the binary X that maximises sum S X where each expert has exactly b clients (``clients_per_expert``) and
each client between ``min_experts`` and ``max_experts``. These are the constraints of a transportation problem, so every vertex of
its linear relaxation is integral and the simplex method gives the optimum. The first round's scores are random.

Stated by the paper or its code: all of the above, the defaults, the ablations in ``arch``, and that a client is judged with what
it trained, before the server averages it (``judge: trained``). Ours: the pool's size where ``num_experts`` is left out; a client
that was absent keeps its last psi (never seen: zero, so that it competes with a neutral score), an expert without a holder its
last Phi; ``embeddings: server`` (clients send mean inputs x, and the server multiplies them by its new T and A_j: the maps are
linear); ``noise`` follows the code's private mode as far as it is known to us, without a privacy bound; the global view is the
model with the shared LoRA alone; the domain experts of a map read one dropout mask.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from typing import Any, Literal, Self, TypeVar

import torch
from pydantic import Field, model_validator

from fedgraft.aggregation.expert_choice import add_noise, balance_of, choose_clients, random_scores, scores_of
from fedgraft.errors import MethodError
from fedgraft.moe.mixture import MIXTURE, MixtureWatch, active_slots, linear_of, mean_inputs, mixtures_of
from fedgraft.protocols import AdapterConfig, Method, MethodConfig, Reduced, Session, Weights, add_delta
from fedgraft.registry import METHODS
from fedgraft.seeding import derive_seed
from fedgraft.types import (
    Batch,
    ClientTask,
    ClientUpdate,
    EvaluationTask,
    Group,
    MixtureSpec,
    ModelFacts,
    Params,
    RoundPlan,
    ServerState,
    Slots,
)

__all__ = ["FedAMoLE", "FedAMoLEConfig", "pool_name"]

_MEAN_HELD = 6
"""Domain experts a client and map in the mean: the source's 30 experts, two clients each, over 10 clients."""

_KEPT = "trained/"
_SIDES = ("lora_A", "lora_B")
_Held = dict[str, list[list[int]]]
_Task = TypeVar("_Task", ClientTask, EvaluationTask)


class PoolAdapterConfig(AdapterConfig):
    """LoRA of FedAMoLE: its dropout is the source's, also where only a rank is given."""

    dropout: float = Field(0.05, ge=0, lt=1, description="Dropout on the LoRA's input while training.")


class FedAMoLEConfig(MethodConfig):
    """Options of FedAMoLE."""

    name: Literal["fedamole"] = "fedamole"
    adapter: PoolAdapterConfig = Field(PoolAdapterConfig(), description="Rank, scale and dropout of every LoRA expert.")
    targets: tuple[str, ...] = Field(
        ("q_proj", "v_proj"), min_length=1, description="Attention maps with a mixture, by last name."
    )
    num_experts: int | None = Field(
        None,
        ge=0,
        le=10_000,
        description="Domain experts of the pool at each map; null: clients hold 6 each in the mean; 0: none.",
    )
    clients_per_expert: int = Field(2, ge=1, le=1000, description="Clients that each domain expert chooses (b).")
    min_experts: int = Field(2, ge=1, le=1000, description="Fewest domain experts of a client at a map.")
    max_experts: int = Field(8, ge=1, le=1000, description="Most domain experts of a client at a map.")
    top_k: int = Field(2, ge=1, le=1000, description="Domain experts a token.")
    balance: float = Field(1e-3, ge=0, le=100, description="Weight of the load-balancing loss, summed over maps.")
    lr_decay: float = Field(0.99, gt=0, le=1, description="Each round's learning rate over the last round's.")
    arch: Literal["rsea", "static", "random", "homogeneous"] = Field(
        "rsea",
        description="Who holds which expert: as experts choose; as drawn before the first round; drawn anew each round; as "
        "experts choose, but the same number for each client.",
    )
    embedding_fraction: float = Field(0.05, gt=0, le=1, description="Share of a client's training examples that embeddings use.")
    embedding_examples: int = Field(200, ge=1, le=65_536, description="At most so many of them.")
    embeddings: Literal["clients", "server"] = Field(
        "clients", description="Who multiplies mean inputs by T and A_j; server: by the averaged ones."
    )
    noise: float = Field(0.0, ge=0, le=1e6, description="Standard deviation of Gaussian noise on what embeddings are sent.")
    weights: Literal["uniform", "examples"] = Field("uniform", description="A client's weight in every mean.")
    judge: Literal["trained", "pool"] = Field(
        "trained", description="A client's model: what it last trained, before averaging; or what the server would send it now."
    )

    @model_validator(mode="after")
    def _options_have_an_effect(self) -> Self:
        stated = self.model_fields_set
        if self.min_experts > self.max_experts:
            raise ValueError(f"min_experts {self.min_experts} is above max_experts {self.max_experts}")
        measured = {"embedding_fraction", "embedding_examples", "embeddings", "noise"}
        pooled = {"clients_per_expert", "min_experts", "max_experts", "top_k", "balance", "arch"}
        if self.num_experts == 0 and (unused := stated & (measured | pooled)):
            raise ValueError(f"{', '.join(sorted(unused))} has no effect without domain experts (num_experts: 0)")
        if self.arch in ("static", "random") and (unused := stated & measured):
            raise ValueError(f"{', '.join(sorted(unused))} has no effect with arch: {self.arch}, which looks at no embedding")
        return self


def pool_name(path: str, expert: int, side: str) -> str:
    """The server's name of one tensor (``lora_A`` or ``lora_B``) of one expert at one map."""
    return f"pool/{path}/{expert}/{side}"


@METHODS.add
class FedAMoLE(Method):
    """A pool of LoRA experts on the server; experts choose the clients that train them."""

    name = "fedamole"
    title = "FedAMoLE"
    paper = "Zhang et al. 2025, arXiv 2411.19128"
    summary = "clients hold different sets of LoRA experts from a pool; each expert chooses the clients whose data it fits"
    advice = (
        "For clients that can hold different numbers of LoRA experts: who gets which follows from their data. Results with "
        "``judge: pool`` compare with methods that are judged after averaging; the default judges before it, as the authors do."
    )
    reconstructed = (
        "pool size for other than 10 clients (6 experts a client in the mean); scores of clients not seen yet; embeddings on the "
        "server's side; the noise option; the global view (shared LoRA alone)"
    )
    uses_batch_statistics = True
    keeps_client_state = True
    is_slots_only = False
    config_class = FedAMoLEConfig
    config: FedAMoLEConfig

    def __init__(self, config: FedAMoLEConfig) -> None:
        super().__init__(config)
        # The balance term takes shares of a batch's choices; without domain experts nothing is chosen.
        self.uses_batch_statistics = config.balance > 0 and config.num_experts != 0

    def slots(self, facts: ModelFacts) -> Slots:
        """A mixture at every target, with as many slots as a client may hold experts."""
        config = self.config
        most = config.max_experts if config.num_experts is None else min(config.max_experts, config.num_experts)
        mixture = MixtureSpec(
            num_slots=most,
            rank=config.adapter.rank,
            alpha=config.adapter.alpha,
            targets=config.targets,
            top_k=config.top_k,
            has_shared=True,
            dropout=config.adapter.dropout,
        )
        return Slots(mixture=mixture)

    def is_personal(self, groups: Mapping[str, Group]) -> bool:
        """Clients hold sets of their own, or keep what they trained."""
        return self.config.num_experts != 0 or self.config.judge == "trained"

    # ---- the server

    def init(self, params: Params, num_clients: int) -> ServerState:
        """T and shared LoRA as they start; a pool whose experts are drawn one by one; a first assignment by random scores."""
        kept = {key: value for key, value in params.items() if not key.endswith("]")}
        like = {linear_of(key): value for key, value in params.items() if key.endswith(".lora_A[0]")}
        if not like:
            return ServerState(params=kept)
        num_experts = self._pool_size(num_clients)
        memory: Params = {}
        held: _Held = {}
        for path, example in like.items():
            bound = 1 / math.sqrt(example.shape[-1])
            for expert in range(num_experts):
                names = [pool_name(path, expert, side) for side in _SIDES]
                generator = torch.Generator().manual_seed(derive_seed(self.federation.run_seed, f"initial/{names[0]}"))
                kept[names[0]] = (torch.rand(example.shape, generator=generator) * 2 - 1).mul_(bound).to(example.dtype)
                kept[names[1]] = torch.zeros_like(params[f"{path}.{MIXTURE}.lora_B[0]"])
            rank, width = example.shape[1:]
            if self._uses_embeddings:
                memory[f"phi/{path}"] = torch.zeros(num_experts, rank)
                memory[f"psi/{path}"] = torch.zeros(num_clients, rank)
                if self.config.embeddings == "server":
                    memory[f"inputs/{path}"] = torch.zeros(num_clients, width)
            held[path] = self._choose(self._random_scores(path, 0, num_experts, num_clients))
        notes = {"held": held, "num_experts": num_experts, "seen": []}
        return ServerState(params=kept, memory=memory, notes=notes)

    def plan(self, state: ServerState, default: RoundPlan) -> RoundPlan:
        """The learning rate falls by a constant factor a round."""
        return replace(default, learning_rate=default.learning_rate * self.config.lr_decay ** (default.round_idx - 1))

    def task(self, state: ServerState, task: ClientTask) -> ClientTask:
        """Send T, the shared LoRA, and this client's experts out of the pool."""
        return _with_experts(state, task, task.client_id)

    def evaluation(self, state: ServerState, task: EvaluationTask) -> EvaluationTask:
        """A personal model has its client's experts; the global one has none."""
        if task.view == "global" or task.client_id is None:
            return task
        return _with_experts(state, task, task.client_id)

    def weigh(self, state: ServerState, updates: Sequence[ClientUpdate]) -> Weights:
        """Plain means, unless examples are to count."""
        if self.config.weights == "examples":
            return super().weigh(state, updates)
        return Weights(default=(1.0,) * len(updates))

    def aggregate(self, state: ServerState, reduced: Reduced, updates: Sequence[ClientUpdate]) -> ServerState:
        """Average the pool, then let the experts choose anew."""
        params = add_delta(state.params, reduced.delta)
        held: _Held = state.notes.get("held", {})  # type: ignore[assignment]
        if not held or self.config.arch == "static":
            return replace(state, params=params)
        num_experts, num_clients = int(str(state.notes["num_experts"])), self.federation.num_clients
        memory, following = dict(state.memory), dict(held)
        seen: list[int] = sorted({*state.notes["seen"], *(update.client_id for update in updates)})  # type: ignore[misc]
        for path in held:
            if self._uses_embeddings:
                self._note_embeddings(path, params, memory, held[path], updates, seen)
                scores_JC = scores_of(memory[f"phi/{path}"], memory[f"psi/{path}"])
            else:
                scores_JC = self._random_scores(path, updates[0].round_idx, num_experts, num_clients)
            following[path] = self._choose(scores_JC)
        return replace(state, params=params, memory=memory, notes=dict(state.notes) | {"held": following, "seen": seen})

    @property
    def _uses_embeddings(self) -> bool:
        return self.config.num_experts != 0 and self.config.arch in ("rsea", "homogeneous")

    def _note_embeddings(
        self,
        path: str,
        params: Params,
        memory: Params,
        held: list[list[int]],
        updates: Sequence[ClientUpdate],
        seen: Sequence[int],
    ) -> None:
        """Bring Phi and psi of one map up to date; who and what was not seen in this round keeps its last."""
        phi, psi = memory[f"phi/{path}"].clone(), memory[f"psi/{path}"].clone()
        num_experts = len(phi)
        if self.config.embeddings == "server":
            inputs = memory[f"inputs/{path}"].clone()
            for update in updates:
                inputs[update.client_id] = update.statistics[f"{path}/inputs"]
            memory[f"inputs/{path}"] = inputs
            psi[list(seen)] = inputs[list(seen)] @ params[f"{path}.{MIXTURE}.token_projection"].T
            for expert in range(num_experts):
                if holders := [client for client in seen if expert in held[client]]:
                    phi[expert] = params[pool_name(path, expert, "lora_A")][0] @ inputs[holders].mean(dim=0)
        else:
            found: dict[int, list[torch.Tensor]] = {}
            for update in updates:
                psi[update.client_id] = update.statistics[f"{path}/psi"]
                for slot, expert in enumerate(held[update.client_id]):
                    found.setdefault(expert, []).append(update.statistics[f"{path}/phi"][slot])
            for expert, values in found.items():
                phi[expert] = torch.stack(values).mean(dim=0)
        memory |= {f"phi/{path}": phi, f"psi/{path}": psi}

    def _pool_size(self, num_clients: int) -> int:
        """M, checked against how many experts clients may hold.

        Raises:
            MethodError: No assignment has every expert at b clients and every client within its bounds.
        """
        config = self.config
        each, low, high = config.clients_per_expert, config.min_experts, config.max_experts
        mean = min(max(_MEAN_HELD, low), high)
        # Rounded up, the places may be more than clients take.
        fitting = min(math.ceil(mean * num_clients / each), high * num_clients // each)
        count = fitting if config.num_experts is None else config.num_experts
        if each > num_clients:
            raise MethodError(
                f"fedamole: each expert is to choose {each} clients, and there are {num_clients}", "lower clients_per_expert"
            )
        if not low * num_clients <= count * each <= high * num_clients:
            least, most = math.ceil(low * num_clients / each), high * num_clients // each
            raise MethodError(
                f"fedamole: {count} experts at {each} clients each make {count * each} places, which {num_clients} clients with "
                f"{low} to {high} experts each cannot fill",
                f"set num_experts to {least} at least and {most} at most, or change clients_per_expert or the bounds",
            )
        return count

    def _random_scores(self, path: str, round_idx: int, num_experts: int, num_clients: int) -> torch.Tensor:
        seed = derive_seed(self.federation.run_seed, f"fedamole/{path}", round_idx=round_idx)
        return random_scores(num_experts, num_clients, seed)

    def _choose(self, scores_JC: torch.Tensor) -> list[list[int]]:
        """The experts of each client at one map, ascending."""
        config = self.config
        low, high = config.min_experts, config.max_experts
        if config.arch == "homogeneous":
            places = scores_JC.shape[0] * config.clients_per_expert
            low, high = places // scores_JC.shape[1], math.ceil(places / scores_JC.shape[1])
        chosen_JC = choose_clients(scores_JC, per_expert=config.clients_per_expert, low=low, high=high)
        return [chosen_JC[:, client].nonzero().flatten().tolist() for client in range(chosen_JC.shape[1])]

    # ---- the client

    def build(self, session: Session) -> AbstractContextManager[object]:
        """Use as many slots of each map as the client holds experts there; a personal model may be what it last trained."""
        kept = {key.removeprefix(_KEPT): value for key, value in session.private.items() if key.startswith(_KEPT)}
        keys: Sequence[str] = session.task.keys
        if isinstance(session.task, EvaluationTask) and kept:
            session.engine.load(kept)
            keys = tuple(kept)
        return self._built(session, keys)

    @contextmanager
    def _built(self, session: Session, keys: Sequence[str]) -> Iterator[None]:
        model = session.engine.model
        counts = dict.fromkeys(mixtures_of(model), 0)
        for key in keys:
            counts[linear_of(key)] += ".lora_A[" in key
        with ExitStack() as stack:
            stack.enter_context(active_slots(model, counts))
            if isinstance(session.task, ClientTask) and any(counts.values()):
                session.scratch["watch"] = stack.enter_context(MixtureWatch(model))
            yield

    def terms(self, session: Session, batch: Batch, output: Any) -> Mapping[str, torch.Tensor]:
        """The load-balancing loss, summed over maps, padding left out."""
        watch: MixtureWatch | None = session.scratch.get("watch")
        if watch is None or not watch.probabilities:
            return {}
        counted = batch.attention_mask.reshape(-1).bool()
        found = {path: balance_of(probs[counted], watch.chosen[path][counted]) for path, probs in watch.probabilities.items()}
        session.scratch.setdefault("balance", []).append({path: value.detach() for path, value in found.items()})
        return {"balance": self.config.balance * torch.stack(list(found.values())).sum()} if self.config.balance else {}

    def reply(self, session: Session, update: ClientUpdate) -> tuple[ClientUpdate, Params]:
        """Measure embeddings with the trained model, and keep it if it is to be judged."""
        trained = session.engine.read(session.task.keys)
        session.private.clear()
        if self.config.judge == "trained":
            session.private.update({f"{_KEPT}{key}": value for key, value in trained.items()})
        self._note_balance(session)
        if not self._uses_embeddings:
            return update, {}
        wanted = math.ceil(self.config.embedding_fraction * session.num_train_examples)
        batches = session.calibration_batches(min(wanted, self.config.embedding_examples))
        generator = torch.Generator().manual_seed(session.seed("fedamole/noise"))
        statistics = dict(update.statistics)
        for path, mean_I in mean_inputs(session.engine.model, batches).items():
            prefix = f"{path}.{MIXTURE}"
            count = sum(key.startswith(f"{prefix}.lora_A[") for key in session.task.keys)
            if self.config.embeddings == "server":
                statistics[f"{path}/inputs"] = add_noise(mean_I[None], self.config.noise, generator)[0].float()
                continue
            maps = [trained[f"{prefix}.lora_A[{slot}]"][0] for slot in range(count)] + [trained[f"{prefix}.token_projection"]]
            clean = torch.stack([each.double() @ mean_I for each in maps])
            sent = add_noise(clean, self.config.noise, generator).float()
            statistics |= {f"{path}/phi": sent[:-1], f"{path}/psi": sent[-1]}
        return replace(update, statistics=statistics), {}

    def _note_balance(self, session: Session) -> None:
        seen: list[dict[str, torch.Tensor]] = session.scratch.get("balance", [])
        if seen and isinstance(session.task, ClientTask):
            paths = list(seen[0])
            addresses = session.task.addresses
            held = {path: [int(name.split("/")[2]) for name in addresses.values() if _is_first_map(name, path)] for path in paths}
            session.diagnostics["expert_pool"] = {
                "maps": paths,
                "held": [held[path] for path in paths],
                "balance": [float(torch.stack([step[path] for step in seen]).mean()) for path in paths],
            }


def _is_first_map(name: str, path: str) -> bool:
    return name.startswith(f"pool/{path}/") and name.endswith("/lora_A")


def _with_experts(state: ServerState, task: _Task, client_id: int) -> _Task:
    """Add a client's experts to what it is sent: slot j gets the j-th of them, in ascending order."""
    held: _Held = state.notes.get("held", {})  # type: ignore[assignment]
    addresses: dict[str, str] = {
        f"{path}.{MIXTURE}.{side}[{slot}]": pool_name(path, expert, side)
        for path, by_client in held.items()
        for slot, expert in enumerate(by_client[client_id])
        for side in _SIDES
    }
    return replace(task, keys=(*task.keys, *addresses), addresses=addresses)
