"""What a replica hosts: one model with slots that takes on one client after another.

It knows neither Ray nor rounds: a task comes in, an update goes out. What one client leaves in the slots cannot reach the next,
because every task starts by loading all of them anew.
"""

from __future__ import annotations

import gc
import json
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PreTrainedTokenizerBase

import fedgraft.aggregation  # noqa: F401  (registers the methods)
from fedgraft.data.batches import eval_batches
from fedgraft.data.prepared import PreparedData, TokenizedSplit
from fedgraft.data.tokenise import load_tokenizer, pad_token_id
from fedgraft.errors import BudgetViolation, GroupViolation, ModelError, ReplicaError, StorageError, UpdateError
from fedgraft.moe.base import open_base
from fedgraft.moe.families import model_facts
from fedgraft.moe.hashing import hash_params
from fedgraft.moe.sharding import full_shape, gathered
from fedgraft.moe.surgery import mask_experts
from fedgraft.platform.ledger import describe, refuse_private
from fedgraft.platform.node_files import Origin, require_seen
from fedgraft.platform.remote import RemoteFolder
from fedgraft.platform.session import ClientSession
from fedgraft.platform.state_store import ClientStateStore
from fedgraft.platform.task_checks import check_step, is_held
from fedgraft.protocols import Engine, Method, TrainResult, TrainSpec
from fedgraft.registry import METHODS, load_entry_points, load_method_file
from fedgraft.training.config import EngineConfig, deepspeed_settings
from fedgraft.training.decode import decode_greedy, rouge_l
from fedgraft.training.deepspeed_engine import DeepSpeedEngine, SlotPolicy
from fedgraft.training.evaluate import ChoiceTokens, score_batches, score_choices
from fedgraft.training.ranks import close_ranks, open_ranks
from fedgraft.training.step import is_out_of_memory
from fedgraft.training.torch_engine import TorchEngine
from fedgraft.types import (
    FROZEN,
    PRIVATE,
    Batch,
    Broadcast,
    ClientFailure,
    ClientTask,
    ClientUpdate,
    EvaluationReply,
    EvaluationRow,
    EvaluationTask,
    ParamRef,
    Params,
    Weighted,
)

__all__ = ["ClientWorker", "WorkerSpec", "client_failure", "kept_moments"]

_log = logging.getLogger(__name__)
_TORCH = EngineConfig(name="torch", device="cpu")


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerSpec:
    """Everything a replica needs to build its worker; small, and the same for all replicas of a run.

    ``base_folder`` and ``data_folder`` are read through memory maps; ``state_folder`` holds the clients' private state.
    ``method`` are the method's options as JSON values, so that a user's own class need not travel between processes. ``train``
    carries the optimiser's numbers, its learning rate replaced by each round's. ``engine`` is resolved; ``dtype`` is the base's;
    ``timeout_s`` bounds one collective call between the ranks of a replica. ``origin`` says where other nodes than the driver's
    fetch base, data and method files from; without one they see the driver's paths.
    """

    base_folder: Path
    data_folder: Path
    state_folder: Path | RemoteFolder
    method: Mapping[str, Any]
    method_files: tuple[Path, ...]
    run_seed: int
    batch_size: int
    train: TrainSpec
    dtype: str = "float32"
    engine: EngineConfig = _TORCH
    timeout_s: float = 3600.0
    threads: int = 1
    evaluation_batch_size: int = 32
    max_new_tokens: int = 32
    max_generate: int | None = None
    origin: Origin | None = None

    def build(self) -> ClientWorker:
        """Make the worker in this process, with what its node has or fetches."""
        spec = self
        if self.origin is None:
            require_seen((self.base_folder, self.data_folder))
        else:
            base, data, files = self.origin.bring()
            spec = replace(self, base_folder=base, data_folder=data, method_files=files)
        if spec.engine.clients_at_once == 1:
            return ClientWorker(spec)
        from fedgraft.platform.group_worker import GroupWorker  # it is a worker, too

        return GroupWorker(spec)


class ClientWorker:
    """A method's model with slots, hosting clients one after another.

    Args:
        spec: What to build.
    """

    def __init__(self, spec: WorkerSpec) -> None:
        # The bits of a sum depend on the number of threads, so it belongs to the run, not to the machine.
        torch.set_num_threads(spec.threads)
        load_entry_points()
        for path in spec.method_files:
            load_method_file(path)
        self.spec = spec
        self.method: Method = METHODS.parse(spec.method)
        self.data = PreparedData.open(spec.data_folder)
        self.tokenizer: PreTrainedTokenizerBase = load_tokenizer(spec.base_folder)
        self.pad_token_id = pad_token_id(self.tokenizer)
        self.device = _device(spec.engine.device)
        self.engine = self._build_engine()
        model = self.engine.model
        self._refs: dict[str, ParamRef] = {ref.key: ref for ref in self.engine.refs}
        self.groups = {ref.key: self.method.group(ref) for ref in self.engine.refs}
        self.trained = tuple(key for key, group in self.groups.items() if group != FROZEN)
        self.sent = tuple(key for key in self.trained if self.groups[key].is_sent)
        self.private = tuple(key for key in self.trained if self.groups[key] == PRIVATE)
        self._lr_scale = {ref.key: scale for ref in self.engine.refs if (scale := self.method.lr_scale(ref)) != 1.0}
        self._persisted = tuple(key for key in self.private if self.method.persists_moments(self._refs[key]))
        self._frozen = {
            name: parameter for name, parameter in model.named_parameters() if name not in {ref.name for ref in self.engine.refs}
        }
        self._keeps_state = bool(self.private) or self.method.keeps_client_state
        self._store = ClientStateStore(spec.state_folder)

    def _build_engine(self) -> Engine:
        spec, method = self.spec, self.method
        # ZeRO 3 takes each rank's share to its device; the whole model may not fit there.
        is_sharded = spec.engine.name == "deepspeed" and spec.engine.zero_stage == 3
        model = open_base(spec.base_folder, "cpu" if is_sharded else self.device)
        slots = method.slots(model_facts(model.config))
        if spec.engine.name == "torch":
            return TorchEngine(model, slots, spec.run_seed)

        def policy(ref: ParamRef) -> SlotPolicy:
            group = method.group(ref)
            return SlotPolicy(
                is_trained=group != FROZEN,
                lr_scale=method.lr_scale(ref),
                persists_moments=group == PRIVATE and method.persists_moments(ref),
            )

        settings = deepspeed_settings(
            spec.engine, batch_size=spec.batch_size, dtype=spec.dtype, max_grad_norm=spec.train.max_grad_norm
        )
        ranks = open_ranks(self.device, spec.timeout_s, spec.engine.world_size)
        return DeepSpeedEngine(
            model, slots, spec.run_seed, settings=settings, spec=spec.train, ranks=ranks, device=self.device, policy=policy
        )

    def close(self) -> None:
        """Let go of the engine; the process may host another worker afterwards, with the same ranks."""
        self.engine.close()

    def end(self) -> None:
        """Let go of everything: the process hosts nothing any more.

        A process of one rank may be a user's own, where another run follows; it leaves its group of one when it ends.
        """
        self.close()
        if self.spec.engine.world_size > 1:
            close_ranks()

    def initial_params(self) -> Params:
        """Start values of the slots that may be sent; the same on every replica."""
        return {key: self.engine.initial[key] for key in self.sent}

    def describe(self) -> dict[str, Any]:
        """Facts for the run: ``refs`` of the slots, their ``groups`` by key, the model's ``facts``, the ``frozen_hash`` of all
        that is no slot, the ``device``, and ``one_by_one``: why clients cannot train in one pass, ``None`` where they can.
        """
        return {
            "groups": self.groups,
            "refs": self.engine.refs,
            "facts": self.engine.facts,
            "frozen_hash": self.engine.frozen_hash(),
            "device": self.device,
            "one_by_one": self.method.why_one_by_one(),
        }

    def update(self, task: ClientTask, broadcast: Broadcast) -> tuple[ClientUpdate | ClientFailure, Params]:
        """Host a client for one round.

        Returns:
            The small half of its reply, and the tensors it sends: deltas by key, and extras as ``extras/<name>``.
            An error in the client is a ``ClientFailure`` with the stage it happened in.
        """
        started = time.perf_counter()
        num_parts = task.num_parts or self.spec.engine.gradient_accumulation_steps
        while True:
            try:
                update, tensors = self._update(task, broadcast, num_parts)
            except _OutOfMemory as error:
                failure = client_failure(task, "train", error.what)
            else:
                break
            # Outside of the except block: the traceback there still holds the tensors of the step that did not fit.
            self._free_memory()
            if self.spec.engine.on_out_of_memory == "fail" or num_parts >= self.spec.batch_size:
                return failure, {}
            num_parts = min(2 * num_parts, self.spec.batch_size)
        if isinstance(update, ClientUpdate):
            update = replace(update, seconds=time.perf_counter() - started, num_parts=num_parts)
        return update, tensors if self.engine.is_leader else {}

    def _update(self, task: ClientTask, broadcast: Broadcast, num_parts: int) -> tuple[ClientUpdate | ClientFailure, Params]:
        """Host a client from its start, its batches cut into ``num_parts``."""
        stage = "setup"
        try:
            with ExitStack() as stack:
                session, spec = self._host(task, task.client_id, broadcast, stack, wants_private=True)
                spec = replace(spec, num_parts=num_parts)
                sent = self._sent_keys(session)
                # Read back rather than taken from the broadcast: a narrower model rounds what it is given.
                start = self.engine.read(sent)
                stage = "train"

                def train(*, keys: Sequence[str] | None = None, batches: Iterable[Batch] | None = None) -> TrainResult:
                    return self._train(session, spec, (*sent, *self.private) if keys is None else keys, batches)

                result = self.method.local(session, train)
                stage = "reply"
                return self._reply(session, task, result, start)
        except (BudgetViolation, GroupViolation, ReplicaError, StorageError):
            raise  # a broken promise or a full disk ends the run, a broken replica is replaced: none is a client's bad luck
        except Exception as error:
            if stage == "train" and is_out_of_memory(error):
                raise _OutOfMemory(f"{type(error).__name__}: {error}") from None
            # Whatever a hook raises is this client's failure, a value; who wants the traceback asks for debug logs.
            _log.debug("client %d failed at %s in round %d", task.client_id, stage, task.round_idx, exc_info=True)
            return client_failure(task, stage, f"{type(error).__name__}: {error}"), {}

    def _sent_keys(self, session: ClientSession) -> list[str]:
        """Slots that a client trains and may send."""
        return [key for key in dict.fromkeys((*session.task.keys, *session.requested)) if key in self.sent]

    def _free_memory(self) -> None:
        """Let go of what the failed step left, before the next try; on a CPU it went with the last reference to it."""
        if self.device == "cuda":
            gc.collect()
            torch.cuda.empty_cache()

    def evaluate(self, task: EvaluationTask, broadcast: Broadcast) -> tuple[EvaluationReply, None]:
        """Judge a global or a personal model on the tasks named."""
        client_id = 0 if task.client_id is None else task.client_id
        rows: list[EvaluationRow] = []
        with ExitStack() as stack:
            session, _ = self._host(task, client_id, broadcast, stack, wants_private=task.view == "personal")
            for name in task.tasks:
                for metric, value in self._judge(task, name, client_id).items():
                    rows.append(
                        EvaluationRow(
                            round_idx=task.round_idx,
                            view=task.view,
                            task=name,
                            client_id=task.client_id,
                            split=task.split if name == "client" else "test",
                            metric=metric,
                            value=value,
                        )
                    )
            seen: Mapping[str, object] = {}
            if task.view == "personal" and self.method.is_personal(self.groups):
                seen = self.method.observe(session)
        return EvaluationReply(rows=tuple(rows), diagnostics=seen), None

    def _host(
        self,
        task: ClientTask | EvaluationTask,
        client_id: int,
        broadcast: Broadcast,
        stack: ExitStack,
        *,
        wants_private: bool,
    ) -> tuple[ClientSession, TrainSpec]:
        """Load every slot: start values, then what the server sent, then the client's own, then what it asks for.

        What no tensor carries (masks, what the method builds) is put on ``stack``, and undone when it closes.
        """
        session = ClientSession(
            task,
            client_id,
            broadcast,
            engine=self.engine,
            groups=self.groups,
            data=self.data,
            pad_token_id=self.pad_token_id,
            run_seed=self.spec.run_seed,
            batch_size=self.spec.batch_size,
        )
        self.engine.load(self.engine.initial)
        if wants_private and self._keeps_state:
            if task.state_version is None:
                session.private = {key: self.engine.initial[key].clone() for key in self.private}
                self.method.setup(session)
            else:
                session.private = self._store.read(client_id, task.state_version)
        self.engine.load(session.received)
        self.engine.load({key: session.private[key] for key in self.private if key in session.private})
        session.add_requested(self.method.request(session))
        self.engine.load({key: session.received[key] for key in session.requested})
        if task.assignment is not None:
            stack.enter_context(mask_experts(self.engine.model, self._masked(task)))
        stack.enter_context(self.method.build(session))
        rate = task.plan.learning_rate if isinstance(task, ClientTask) else self.spec.train.learning_rate
        return session, replace(self.spec.train, learning_rate=rate, lr_scale=self._lr_scale)

    def _masked(self, task: ClientTask | EvaluationTask) -> dict[int, list[int]]:
        """Experts by layer that a client does not hold."""
        experts = range(self.engine.facts.num_experts)
        return {layer: [e for e in experts if e not in held] for layer, held in (task.assignment or {}).items()}

    def _train(
        self, session: ClientSession, spec: TrainSpec, keys: Sequence[str], batches: Iterable[Batch] | None
    ) -> TrainResult:
        return self.engine.train(
            session.train_batches() if batches is None else batches,
            spec,
            keys,
            seed=session.seed("dropout"),
            terms=lambda batch, output: self.method.terms(session, batch, output),
            objective=self.method.objective(session),
            after_backward=self._after_backward(session, keys),
            optimizer_state=kept_moments(session),
            keep_optimizer_state=[key for key in self._persisted if key in set(keys)],
        )

    def _after_backward(self, session: ClientSession, keys: Sequence[str]) -> Callable[[int], None]:
        """The method's hook, and the check that a step stays within the client's budget."""
        watched = self._watched_experts(session, keys)

        def hook(step: int) -> None:
            self.method.after_backward(session, step)
            if watched:
                check_step(session.task, session.engine.read_gradients(watched), watched, step)

        return hook

    def _watched_experts(self, session: ClientSession, keys: Sequence[str]) -> dict[str, tuple[int, int]]:
        """Layer and expert of each trained slot of a routed expert, where the client's budget bounds what a step changes."""
        budget = session.task.budget if isinstance(session.task, ClientTask) else None
        if self.method.budget_use != "trains" or budget is None or budget.experts_per_layer is None:
            return {}
        refs = [self._refs[key] for key in keys if self._refs[key].part == "experts"]
        return {ref.key: (ref.layer, ref.expert) for ref in refs if ref.layer is not None and ref.expert is not None}

    def _reply(self, session: ClientSession, task: ClientTask, result: TrainResult, start: Params) -> tuple[ClientUpdate, Params]:
        """Take the deltas of what is sent, store what is private, and describe the payload."""
        trained = self.engine.read(self._uploads(session, start))
        delta = {key: value - start[key] for key, value in trained.items()}
        self._check_held(task, [*delta, *session.requested])
        version: int | None = None
        state_hash: str | None = None
        state_digest: str | None = None
        if self.private:
            session.private.update(self.engine.read(self.private))
            session.private.update({f"optimizer/{key}": value for key, value in result.optimizer_state.items()})
        losses = result.losses
        update = ClientUpdate(
            client_id=task.client_id,
            round_idx=task.round_idx,
            num_examples=session.num_train_examples,
            num_steps=len(losses),
            expert_tokens=result.expert_tokens,
            metrics={
                "train_loss": Weighted(total=sum(losses), weight=float(len(losses))),
                "label_tokens": Weighted(total=float(result.num_label_tokens), weight=1.0),
            },
            payload=(),
            assignment=task.assignment,
            requested=session.requested,
        )
        update, extras = self.method.reply(session, update)
        _require_finite(delta | extras | dict(update.statistics), session.private)
        if session.private and not self._keeps_state:
            raise GroupViolation(
                f"{self.method.name} puts {min(session.private)} into session.private, which nobody would give back to it",
                "set keeps_client_state = True in the method",
            )
        if self._keeps_state:
            version = task.round_idx
            if self.engine.is_leader:
                # Hashed here, where the bytes are, and side by side: a checkpoint needs it of every client.
                state_digest = self._store.write(task.client_id, version, session.private)
                state_hash = hash_params(session.private)
        payload = (
            *describe(delta, self.groups),
            *describe(extras, {}, kind="extras"),
            *describe(update.statistics, {}, kind="statistics"),
        )
        secrets = {key: value for key, value in session.private.items() if key not in task.publishes}
        for tensors in (extras, update.statistics):
            self._refuse_secrets(tensors, secrets)
        diagnostics = dict(update.diagnostics) | session.diagnostics
        json.dumps(diagnostics)  # what is no JSON is this client's failure, not the end of the run when it is written down
        if task.hashes_frozen:
            diagnostics["frozen_hash"] = self.engine.frozen_hash()
        update = replace(
            update,
            payload=payload,
            state_version=version,
            state_hash=state_hash,
            state_digest=state_digest,
            diagnostics=diagnostics,
        )
        return update, delta | {f"extras/{key}": value for key, value in extras.items()}

    def _check_held(self, task: ClientTask, keys: Sequence[str]) -> None:
        """Refuse slots of experts that the client's assignment leaves out: it may have asked for some itself."""
        alien = [key for key in keys if not is_held(self._refs[key], task.assignment)]
        if alien:
            raise GroupViolation(
                f"client {task.client_id}, round {task.round_idx}: {alien[0]} belongs to an expert that it does not hold",
                "request() may fill only slots of the client's assignment",
            )

    def _uploads(self, session: ClientSession, start: Params) -> Sequence[str]:
        """The trained keys that the method sends back: some of those that the client received, each once."""
        keys = tuple(self.method.uploads(session, tuple(start)))
        if (unknown := [key for key in keys if key not in start]) or len(set(keys)) != len(keys):
            raise GroupViolation(
                f"{self.method.name} sends {', '.join(unknown[:3]) or 'a tensor twice'}, which this client did not get to train",
                "uploads() gives some of the keys it is called with, each once",
            )
        return keys

    def _refuse_secrets(self, tensors: Params, private: Params) -> None:
        """Refuse extras or statistics that carry private or frozen tensors; sharded ones are gathered where sizes match."""
        sizes = {tensor.numel() for tensor in tensors.values()}
        alike = {
            name: parameter
            for name, parameter in self._frozen.items()
            if name in tensors or full_shape(parameter).numel() in sizes
        }
        with gathered(alike.values()):
            refuse_private(tensors, private, {name: parameter.detach() for name, parameter in alike.items()})

    def _judge(self, task: EvaluationTask, name: str, client_id: int) -> dict[str, Weighted]:
        model, size = self.engine.model, self.spec.evaluation_batch_size
        if name == "choice":
            return self._choices(model, size)
        split = self.data.split(client_id, task.split) if name == "client" else self.data.retention
        if split is None:
            return {}
        batches = list(eval_batches(split, size, self.pad_token_id))
        found = self.engine.add_up(score_batches(model, self.engine.own_share(batches)))
        found = {metric: value for metric, value in found.items() if metric in task.metrics}
        if "rouge_l" in task.metrics and name == "client":
            found["rouge_l"] = self._rouge(split)
        return found

    def _rouge(self, split: TokenizedSplit) -> Weighted:
        count = len(split) if self.spec.max_generate is None else min(len(split), self.spec.max_generate)
        asked = self.engine.own_share(range(count))
        answers = decode_greedy(
            self.engine.model,
            [split.prompt_ids(i).tolist() for i in asked],
            max_new_tokens=self.spec.max_new_tokens,
            eos_token_id=int(self.tokenizer.eos_token_id),
            pad_token_id=self.pad_token_id,
            batch_size=self.spec.evaluation_batch_size,
        )
        texts = [str(self.tokenizer.decode(answer, skip_special_tokens=True)) for answer in answers]
        found = rouge_l(texts, [split.response_text(i) for i in asked])
        return self.engine.add_up({"rouge_l": found})["rouge_l"]

    def _choices(self, model: torch.nn.Module, batch_size: int) -> dict[str, Weighted]:
        asked = self.data.questions
        if asked is None:
            return {}
        questions = [
            ChoiceTokens(
                prompt=tuple(asked.prompt_ids(i).tolist()),
                choices=tuple(tuple(ids.tolist()) for ids in asked.choice_ids(i)),
                answer=int(asked.answers[i]),
            )
            for i in self.engine.own_share(range(len(asked)))
        ]
        found = {"choice_accuracy": score_choices(model, questions, pad_token_id=self.pad_token_id, batch_size=batch_size)}
        return self.engine.add_up(found)


class _OutOfMemory(Exception):
    """A local step did not fit. It carries text only: PyTorch's own error holds the step's tensors through its traceback."""

    def __init__(self, what: str) -> None:
        super().__init__(what)
        self.what = what


def kept_moments(session: ClientSession) -> Params:
    """The optimiser's moments that a client kept."""
    return {key.removeprefix("optimizer/"): value for key, value in session.private.items() if key.startswith("optimizer/")}


def client_failure(task: ClientTask, stage: str, error: str) -> ClientFailure:
    """A client's failure at a stage of its task."""
    return ClientFailure(client_id=task.client_id, round_idx=task.round_idx, stage=stage, error=error)


def _device(wanted: Literal["auto", "cpu", "cuda"]) -> Literal["cpu", "cuda"]:
    """Decide in the replica's own process, which sees what it was given."""
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ModelError("engine.device is cuda, and this replica sees no GPU", "set engine.device=auto or =cpu")
    return "cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu"


def _require_finite(sent: Params, private: Params) -> None:
    """Refuse what broke down in training, before any of it is stored or sent; minus infinity closes a graft gate."""
    for key, value in sent.items():
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise UpdateError(f"{key} has values that are not finite", "lower the learning rate")
    for key, value in private.items():
        if value.is_floating_point() and bool((torch.isnan(value) | torch.isposinf(value)).any()):
            raise UpdateError(f"the private {key} has values that are not finite", "lower the learning rate")
