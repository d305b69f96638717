"""FedAvg with fine-tuning: at the end every client trains the global model on its own data, and keeps the result.

The plainest personalisation. Wang, Mathews, Kiddon, Eichner, Beaufays, Ramage 2019, "Federated Evaluation of On-device
Personalization", arXiv 1910.10252, judge it; Collins, Hassani, Mokhtari, Shakkottai 2022, "FedAvg with Fine Tuning: Local
Updates Lead to Representation Learning", arXiv 2205.13692, explain why it works.

The last ``finetune_rounds`` of the configured rounds are local: a client gets the global model in its first of them, trains,
sends nothing, and goes on from its own result in the next. So it takes as many local steps as under any other method (with
``finetune_cohort: all`` more, where it was not drawn). Its result is its private state ``personal/<slot>``, and what it is
judged with; a client that was never drawn in these rounds has the global model. A run needs more rounds than these; where a try
of a rate search has no more, its first round is averaged all the same, and the rest is local.

Ours: that fine-tuning is counted in rounds, with their local steps and learning rate, and the default of one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import ClassVar, Literal

from pydantic import Field

from fedgraft.aggregation.fedavg import FedAvg, PartsConfig
from fedgraft.protocols import LocalTrain, MethodConfig, Reduced, Session, TrainResult
from fedgraft.registry import METHODS
from fedgraft.types import ClientTask, ClientUpdate, Group, Params, RoundPlan, ServerState

__all__ = ["FedAvgFinetune", "FedAvgFinetuneConfig"]

_PERSONAL = "personal/"
_PHASE = "finetune"
_NOTE = "finetuned"


class FedAvgFinetuneConfig(PartsConfig):
    """Options of FedAvg with fine-tuning."""

    name: Literal["fedavg_finetune"] = "fedavg_finetune"
    finetune_rounds: int = Field(
        1,
        ge=1,
        le=1_000_000,
        description="Last rounds in which clients train for themselves, fewer than federation.rounds; a try of a rate search "
        "that is as short averages in its first round, and one of a single round does nothing else.",
    )
    finetune_cohort: Literal["drawn", "all"] = Field(
        "drawn",
        description="Who fine-tunes in such a round: the cohort that was drawn, or all clients, which costs those outside the "
        "cohort more local steps than other methods do.",
    )


@METHODS.add
class FedAvgFinetune(FedAvg):
    """FedAvg, then local rounds whose results stay with their clients."""

    name = "fedavg_finetune"
    title = "FedAvg + fine-tuning"
    paper = "Collins et al. 2022, arXiv 2205.13692; Wang et al. 2019, arXiv 1910.10252"
    summary = "FedAvg whose last rounds are local: each client fine-tunes the global model and keeps the result"
    advice = "The baseline that a personalised method has to beat: it costs nothing more than FedAvg."
    reconstructed = "fine-tuning in rounds of the run, with their steps and learning rate"
    config_class: ClassVar[type[MethodConfig]] = FedAvgFinetuneConfig
    config: FedAvgFinetuneConfig
    keeps_client_state = True

    def is_personal(self, groups: Mapping[str, Group]) -> bool:
        """Every client ends with a model of its own."""
        return True

    def own_values(self, private: Params) -> Params:
        """The result of the client's last local round; nothing before it."""
        return {key.removeprefix(_PERSONAL): value for key, value in private.items() if key.startswith(_PERSONAL)}

    def check_run(self, *, rounds: int, has_budgets: bool) -> None:
        """Something must be averaged before clients fine-tune it."""
        super().check_run(rounds=rounds, has_budgets=has_budgets)
        if self.config.finetune_rounds >= rounds:
            raise ValueError(
                f"finetune_rounds is {self.config.finetune_rounds} and federation.rounds is {rounds}, so that no round is left "
                "for averaging; set finetune_rounds lower, or federation.rounds higher"
            )

    # The server's half.

    def plan(self, state: ServerState, default: RoundPlan) -> RoundPlan:
        """Averaging first, the last rounds local."""
        return replace(default, phase=_PHASE) if self._is_local(default.round_idx) else default

    def select(self, state: ServerState, plan: RoundPlan, cohort: tuple[int, ...]) -> tuple[int, ...]:
        """All clients in local rounds, if asked to."""
        if plan.phase == _PHASE and self.config.finetune_cohort == "all":
            return tuple(range(self.federation.num_clients))
        return cohort

    def task(self, state: ServerState, task: ClientTask) -> ClientTask:
        """A client that has a model of its own needs no other."""
        return replace(task, keys=()) if task.client_id in _finetuned(state) else task

    def aggregate(self, state: ServerState, reduced: Reduced, updates: Sequence[ClientUpdate]) -> ServerState:
        """Average; in local rounds nothing comes, and it is noted who has a model of its own now."""
        state = super().aggregate(state, reduced, updates)
        tuned = {update.client_id for update in updates if self._is_local(update.round_idx)}
        return replace(state, notes={**state.notes, _NOTE: sorted(tuned | _finetuned(state))}) if tuned else state

    def _is_local(self, round_idx: int) -> bool:
        return round_idx > max(1, self.federation.rounds - self.config.finetune_rounds)

    # The client's half.

    def build(self, session: Session) -> AbstractContextManager[object]:
        """Put the client's own model in the place of the global one."""
        session.engine.load(self.own_values(session.private))
        return nullcontext()

    def local(self, session: Session, train: LocalTrain) -> TrainResult:
        """Train what FedAvg trains, received or not."""
        return train(keys=_slots(session))

    def uploads(self, session: Session, keys: Sequence[str]) -> Sequence[str]:
        """Nothing in local rounds."""
        return () if _is_local(session) else keys

    def reply(self, session: Session, update: ClientUpdate) -> tuple[ClientUpdate, Params]:
        """Keep the result of a local round."""
        if _is_local(session):
            values = session.engine.read(_slots(session))
            session.private.update({f"{_PERSONAL}{key}": value for key, value in values.items()})
        return update, {}


def _finetuned(state: ServerState) -> set[int]:
    """Clients that have a model of their own."""
    noted = state.notes.get(_NOTE, [])
    assert isinstance(noted, list)
    return set(noted)


def _is_local(session: Session) -> bool:
    return isinstance(session.task, ClientTask) and session.task.plan.phase == _PHASE


def _slots(session: Session) -> tuple[str, ...]:
    return tuple(ref.key for ref in session.engine.refs if session.groups[ref.key].is_sent)
