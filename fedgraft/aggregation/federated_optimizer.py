"""A federated optimiser as a part that a method has: FedAvg's neighbours, apart from what is trained and what is private.

FedProx, SCAFFOLD, FedAvgM and the adaptive ones change how shared tensors are optimised over the clients, and nothing else.
Each is a ``FederatedOptimizer`` with hooks of both halves; ``Optimized`` lets a method have one. So the same code stands
behind the method ``fedprox`` (on FedAvg's slots) and FLEx with ``server: {name: fedprox}``, where it never touches grafts and
gates that are private.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, model_validator

from fedgraft.aggregation.server_optimizers import client_weights, server_step, sgd
from fedgraft.protocols import Method, Reduced, Session, TrainSpec, Weights
from fedgraft.types import Batch, ClientTask, ClientUpdate, Federation, ParamRef, Params, ServerState

__all__ = ["FedAvgOptions", "FederatedOptimizer", "Optimized", "OptimizerOptions"]


class FederatedOptimizer:
    """How shared tensors are optimised: here as in FedAvg. Stateless; what lasts is in the server's state and the client's.

    Hooks see the slots that the client received (``session.received``), which are shared or assigned, never private ones.
    """

    def check_training(self, spec: TrainSpec) -> None:
        """Refuse a local optimiser that the options do not work with; raises ``ValueError``."""

    def init(self, state: ServerState) -> ServerState:
        """Add to the state before round 1."""
        return state

    def task(self, state: ServerState, task: ClientTask) -> ClientTask:
        """Change what one client is sent and may send."""
        return task

    def terms(self, session: Session) -> Mapping[str, torch.Tensor]:
        """Extra loss terms by name."""
        return {}

    def after_backward(self, session: Session, step: int) -> None:
        """Change the gradients of shared slots."""

    def reply(self, session: Session, lr_scale: Callable[[ParamRef], float]) -> Params:
        """Update the client's state after training, and give extras to send; ``lr_scale`` is the method's."""
        return {}

    def weigh(self, state: ServerState, updates: Sequence[ClientUpdate]) -> Weights:
        """Weigh the clients."""
        return Weights(default=client_weights("examples", updates))

    def aggregate(self, state: ServerState, reduced: Reduced, federation: Federation) -> ServerState:
        """Make the next state."""
        return server_step(state, reduced.delta, sgd(1.0))


class OptimizerOptions(BaseModel, ABC):
    """Options of a federated optimiser; ``name`` picks it."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: str

    @model_validator(mode="after")
    def _name_is_stated(self) -> Self:
        # Only what was stated is written down; without the name nobody could tell whose options these are.
        self.model_fields_set.add("name")
        return self

    @abstractmethod
    def build(self) -> FederatedOptimizer:
        """Make the optimiser."""


class FedAvgOptions(OptimizerOptions):
    """FedAvg as the optimiser: no options."""

    name: Literal["fedavg"] = "fedavg"

    def build(self) -> FederatedOptimizer:
        """Make the optimiser."""
        return FederatedOptimizer()


class Optimized(Method):
    """A method whose shared slots are optimised by ``optimizer``; to be named before the class that says what is trained."""

    batched_hooks = frozenset({"terms", "after_backward"})

    @property
    @abstractmethod
    def optimizer(self) -> FederatedOptimizer:
        """The optimiser that the options name."""

    def check_training(self, spec: TrainSpec) -> None:
        """Refuse what the optimiser refuses."""
        super().check_training(spec)
        self.optimizer.check_training(spec)

    def init(self, params: Params, num_clients: int) -> ServerState:
        """Let the optimiser add what it keeps."""
        return self.optimizer.init(super().init(params, num_clients))

    def task(self, state: ServerState, task: ClientTask) -> ClientTask:
        """Let the optimiser add what it sends."""
        return self.optimizer.task(state, super().task(state, task))

    def weigh(self, state: ServerState, updates: Sequence[ClientUpdate]) -> Weights:
        """Weigh as the optimiser does."""
        return self.optimizer.weigh(state, updates)

    def aggregate(self, state: ServerState, reduced: Reduced, updates: Sequence[ClientUpdate]) -> ServerState:
        """Step as the optimiser does."""
        return self.optimizer.aggregate(state, reduced, self.federation)

    def terms(self, session: Session, batch: Batch, output: Any) -> Mapping[str, torch.Tensor]:
        """Add the optimiser's terms."""
        return {**super().terms(session, batch, output), **self.optimizer.terms(session)}

    def after_backward(self, session: Session, step: int) -> None:
        """Let the optimiser change gradients, after the method."""
        super().after_backward(session, step)
        self.optimizer.after_backward(session, step)

    def reply(self, session: Session, update: ClientUpdate) -> tuple[ClientUpdate, Params]:
        """Add the optimiser's extras."""
        update, extras = super().reply(session, update)
        return update, extras | self.optimizer.reply(session, self.lr_scale)
