"""A worker whose replica trains several clients in one pass (``engine.clients_at_once``); it also takes them one by one."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

from fedgraft.errors import BudgetViolation, GroupViolation, ReplicaError, StorageError
from fedgraft.moe.base import open_base
from fedgraft.moe.families import model_facts
from fedgraft.moe.surgery import mask_experts
from fedgraft.platform.session import ClientSession
from fedgraft.platform.worker import ClientWorker, client_failure, kept_moments
from fedgraft.protocols import Engine, TrainSpec
from fedgraft.training.cohort import CohortEngine, Training
from fedgraft.training.step import is_out_of_memory
from fedgraft.types import Broadcast, ClientFailure, ClientGroup, ClientTask, ClientUpdate, Params

__all__ = ["GroupWorker"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Hosted:
    """A client that waits at its place: what it was given, and the values that its deltas are taken from."""

    session: ClientSession
    start: Params
    training: Training


class GroupWorker(ClientWorker):
    """See ``ClientWorker``; ``engine`` is a cohort engine."""

    engine: CohortEngine

    def _build_engine(self) -> Engine:
        spec = self.spec
        assert isinstance(spec.engine.clients_at_once, int), "resolved before a worker is built"
        model = open_base(spec.base_folder, self.device)
        slots = self.method.slots(model_facts(model.config))
        return CohortEngine(model, slots, spec.run_seed, spec.engine.clients_at_once)

    def describe(self) -> dict[str, Any]:
        """As ``ClientWorker.describe``; the engine may have its own reason to take clients one by one."""
        facts = super().describe()
        return facts | {"one_by_one": facts["one_by_one"] or self.engine.why_not}

    def update_many(self, group: ClientGroup, broadcast: Broadcast) -> tuple[list[ClientUpdate | ClientFailure], list[Params]]:
        """Host some clients for one round, all training side by side.

        Returns:
            For each what ``update`` gives: the small halves, and the tensors.
        """
        started = time.perf_counter()
        outcomes: dict[int, ClientUpdate | ClientFailure] = {}
        tensors: dict[int, Params] = {}
        hosted: dict[int, _Hosted] = {}
        for at, task in enumerate(group.tasks):
            with self._failing(outcomes, at, task, "setup"):
                hosted[at] = self._take_in(task, broadcast, place=len(hosted))
        try:
            results = self.engine.train_many([each.training for each in hosted.values()])
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            results = [error] * len(hosted)
        for place, (at, each) in enumerate(hosted.items()):
            task, result = group.tasks[at], results[place]
            if isinstance(result, Exception):
                outcomes[at] = client_failure(task, "train", _text(result, len(group.tasks)))
                continue
            with self._failing(outcomes, at, task, "reply"), ExitStack() as stack:
                self.engine.restore(place)
                if task.assignment is not None:
                    stack.enter_context(mask_experts(self.engine.model, self._masked(task)))
                outcomes[at], tensors[at] = self._reply(each.session, task, result, each.start)
        seconds = (time.perf_counter() - started) / len(group.tasks)
        found = [outcomes[at] for at in range(len(group.tasks))]
        timed = [replace(each, seconds=seconds) if isinstance(each, ClientUpdate) else each for each in found]
        return timed, [tensors.get(at, {}) for at in range(len(group.tasks))]

    def _take_in(self, task: ClientTask, broadcast: Broadcast, *, place: int) -> _Hosted:
        """Load a client as ``update`` does, and put its values at a place of the engine."""
        with ExitStack() as stack:
            session, spec = self._host(task, task.client_id, broadcast, stack, wants_private=True)
        sent = self._sent_keys(session)
        start = self.engine.read(sent)
        self.engine.stash(place)
        return _Hosted(session=session, start=start, training=self._training(session, spec, [*sent, *self.private], place))

    def _training(self, session: ClientSession, spec: TrainSpec, keys: list[str], place: int) -> Training:
        seen = self.engine.place(place)

        def terms(batch: Any, output: Any) -> Mapping[str, Any]:
            with _seeing(session, seen):
                return self.method.terms(session, batch, output)

        hook = self._after_backward(session, keys)

        def after_backward(step: int) -> None:
            with _seeing(session, seen):
                hook(step)

        return Training(
            batches=tuple(session.train_batches()),
            spec=spec,
            keys=keys,
            terms=terms,
            after_backward=after_backward,
            optimizer_state=kept_moments(session),
            keep_optimizer_state=[key for key in self._persisted if key in set(keys)],
            masked=self._masked(session.task),
        )

    @contextmanager
    def _failing(
        self, outcomes: dict[int, ClientUpdate | ClientFailure], at: int, task: ClientTask, stage: str
    ) -> Iterator[None]:
        """What raises inside is this client's failure, as in ``update``."""
        try:
            yield
        except (BudgetViolation, GroupViolation, ReplicaError, StorageError):
            raise
        except Exception as error:
            _log.debug("client %d failed at %s in round %d", task.client_id, stage, task.round_idx, exc_info=True)
            outcomes[at] = client_failure(task, stage, f"{type(error).__name__}: {error}")


@contextmanager
def _seeing(session: ClientSession, engine: Any) -> Iterator[None]:
    """Let a client's hooks see its place for a while, in the place of the replica's engine."""
    before, session.engine = session.engine, engine
    try:
        yield
    finally:
        session.engine = before


def _text(error: Exception, num_clients: int) -> str:
    text = f"{type(error).__name__}: {error}"
    if is_out_of_memory(error):
        return f"{text} ({num_clients} clients trained at once: lower engine.clients_at_once)"
    return text
