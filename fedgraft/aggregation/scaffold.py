"""SCAFFOLD: FedAvg whose local gradients are corrected for what sets a client apart.

Karimireddy, Kale, Mohri, Reddi, Stich, Suresh 2020, "SCAFFOLD: Stochastic Controlled Averaging for Federated Learning", arXiv
1910.06378, Algorithm 1 with option II. The server has a control variate c, client i its own c_i; both have the sign of a
gradient and start at zero. Each local step takes the gradient g + c - c_i; after K steps of rate eta

    c_i+ = c_i - c + (theta_t - theta_K) / (K eta),    c = c + (|S| / N) mean over S of (c_i+ - c_i),

with S the round's clients and N the population, and theta = theta + ``server_lr`` times the mean delta. c goes down and
each client's change of c_i up, as extras, so a round costs twice FedAvg's bytes; c_i itself stays with its client (though the
first change is all of it, since it was zero).

Under plain SGD, (theta_t - theta_K) / (K eta) is the mean of the corrected gradients, so c_i+ is the mean of the client's own
gradients over its K steps. ``control: mean_gradient`` (the default) takes that mean itself. Only so has c_i a gradient's
scale where the local optimiser is AdamW, where gradients are clipped or weights decay; ``control: option_ii`` is the formula
as printed, for plain SGD without clipping. In both, g + c - c_i is what the local optimiser gets, before clipping.

Ours: mean_gradient; the deltas' weights by examples (as in public federated LLM code; the paper averages plainly:
``weighting: clients``). c is always the plain mean of all c_i, so the optimum of the plain mean of the clients' losses is
where rounds settle.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from pydantic import Field

from fedgraft.aggregation.fedavg import FedAvg, PartsConfig
from fedgraft.aggregation.federated_optimizer import FederatedOptimizer, Optimized, OptimizerOptions
from fedgraft.aggregation.server_optimizers import Weighting, client_weights, server_step, sgd
from fedgraft.protocols import Reduced, Session, TrainSpec, Weights
from fedgraft.registry import METHODS
from fedgraft.types import ClientTask, ClientUpdate, Federation, ParamRef, Params, ServerState

__all__ = ["Scaffold", "ScaffoldConfig", "ScaffoldOptimizer", "ScaffoldOptions"]

_CONTROL = "scaffold/"
"""Extras: c goes down, and the change of c_i up, as ``scaffold/<slot>``."""
_OWN = "scaffold_client/"
"""Private state: c_i as ``scaffold_client/<slot>``; zero where there is none yet."""
_PROGRESS = "scaffold/progress"


@dataclass(kw_only=True, slots=True)
class _Progress:
    """One local training: c - c_i where it is not all zero, and what ``control`` needs: the sum of gradients, or the start."""

    correction: Params
    num_steps: int = 0
    gradients: Params = field(default_factory=dict)
    start: Params = field(default_factory=dict)


class ScaffoldOptions(OptimizerOptions):
    """Options of SCAFFOLD as an optimiser."""

    name: Literal["scaffold"] = "scaffold"
    server_lr: float = Field(1.0, gt=0, le=1000, description="The server adds this times the mean delta.")
    control: Literal["mean_gradient", "option_ii"] = Field(
        "mean_gradient",
        description="A client's control variate: the mean of its gradients, or the paper's option II from where it moved, "
        "which is the same under plain SGD and has no gradient's scale under AdamW or clipping.",
    )
    weighting: Weighting = Field("examples", description="Weigh the clients' deltas by training examples, or all alike.")

    def build(self) -> ScaffoldOptimizer:
        """Make the optimiser."""
        return ScaffoldOptimizer(self)


class ScaffoldOptimizer(FederatedOptimizer):
    """Corrects gradients by c - c_i.

    Args:
        options: As they are documented.
    """

    def __init__(self, options: ScaffoldOptions) -> None:
        self._options = options

    def check_training(self, spec: TrainSpec) -> None:
        """Option II reads gradients off from how far the weights moved, which plain SGD alone allows."""
        is_plain = spec.optimizer == "sgd" and spec.max_grad_norm is None and not spec.weight_decay
        if self._options.control == "option_ii" and not is_plain:
            raise ValueError(
                "control: option_ii needs training.optimizer: sgd, training.max_grad_norm: null and training.weight_decay: 0; "
                "set those, or control: mean_gradient"
            )

    def init(self, state: ServerState) -> ServerState:
        """c = 0, float32 or wider."""
        controls = {f"{_CONTROL}{key}": _zeros(value) for key, value in state.params.items()}
        return replace(state, extras=state.extras | controls)

    def task(self, state: ServerState, task: ClientTask) -> ClientTask:
        """Let the client tell how its control variate changed: in its first round that is the variate itself."""
        return replace(task, publishes=(*task.publishes, *(f"{_OWN}{key}" for key in task.keys)))

    def after_backward(self, session: Session, step: int) -> None:
        """Add c - c_i to the gradients of the slots whose c was received."""
        keys = _controlled(session)
        if not keys:
            return
        progress: _Progress = session.scratch.get(_PROGRESS) or self._begin(session, keys)
        progress.num_steps += 1
        is_mean = self._options.control == "mean_gradient"
        gradients = session.engine.read_gradients(keys if is_mean else progress.correction)
        if is_mean:
            for key, value in gradients.items():
                before = progress.gradients.get(key)
                progress.gradients[key] = value.double() if before is None else before + value.double()
        if progress.correction:
            session.engine.write_gradients({key: gradients[key] + value for key, value in progress.correction.items()})

    def _begin(self, session: Session, keys: list[str]) -> _Progress:
        differences = {key: session.received_extras[f"{_CONTROL}{key}"] - _own(session, key) for key in keys}
        # A zero written in the place of a missing gradient would start weight decay there: round 1 is FedAvg's, bit for bit.
        progress = _Progress(correction={key: value for key, value in differences.items() if bool(value.any())})
        if self._options.control == "option_ii":
            progress.start = session.engine.read(keys)  # no step was taken yet
        session.scratch[_PROGRESS] = progress
        return progress

    def reply(self, session: Session, lr_scale: Callable[[ParamRef], float]) -> Params:
        """Keep c_i+ and give c_i+ - c_i; nothing where no step was taken."""
        progress: _Progress | None = session.scratch.get(_PROGRESS)
        if progress is None:
            return {}
        changes: Params = {}
        for key, value in self._new_controls(session, progress, lr_scale).items():
            old = _own(session, key)
            new = value.to(old.dtype)
            session.private[f"{_OWN}{key}"] = new
            changes[f"{_CONTROL}{key}"] = new - old
        return changes

    def _new_controls(self, session: Session, progress: _Progress, lr_scale: Callable[[ParamRef], float]) -> Params:
        """c_i+ by slot, float64."""
        if self._options.control == "mean_gradient":
            return {key: value / progress.num_steps for key, value in progress.gradients.items()}
        assert isinstance(session.task, ClientTask)
        rate = session.task.plan.learning_rate
        scales = {ref.key: lr_scale(ref) for ref in session.engine.refs}
        found: Params = {}
        for key, trained in session.engine.read(progress.start).items():
            drift = (progress.start[key].double() - trained.double()) / (progress.num_steps * rate * scales[key])
            found[key] = _own(session, key).double() - session.received_extras[f"{_CONTROL}{key}"].double() + drift
        return found

    def weigh(self, state: ServerState, updates: Sequence[ClientUpdate]) -> Weights:
        """Deltas by examples or alike; changes of control variates always alike."""
        alike = client_weights("clients", updates)
        controls = [name for name in state.extras if name.startswith(_CONTROL)]
        return Weights(
            default=client_weights(self._options.weighting, updates),
            by_key={f"extras/{name}": alike for name in controls},  # extras are summed under this prefix
        )

    def aggregate(self, state: ServerState, reduced: Reduced, federation: Federation) -> ServerState:
        """Add the mean delta, and to c the changes over the whole population: those who were away changed nothing."""
        extras = dict(state.extras)
        for name, mean in reduced.extras.items():
            if name.startswith(_CONTROL):
                share = reduced.num_contributors[f"extras/{name}"] / federation.num_clients
                extras[name] = (extras[name].double() + share * mean).to(extras[name].dtype)
        return replace(server_step(state, reduced.delta, sgd(self._options.server_lr)), extras=extras)


def _zeros(value: torch.Tensor) -> torch.Tensor:
    return torch.zeros(value.shape, dtype=torch.promote_types(value.dtype, torch.float32))


def _controlled(session: Session) -> list[str]:
    """Received slots whose control variate came with them."""
    return [key for key in session.received if f"{_CONTROL}{key}" in session.received_extras]


def _own(session: Session, key: str) -> torch.Tensor:
    """c_i of a slot; zero before the client's first round."""
    found = session.private.get(f"{_OWN}{key}")
    return torch.zeros_like(session.received_extras[f"{_CONTROL}{key}"]) if found is None else found


class ScaffoldConfig(ScaffoldOptions, PartsConfig):
    """Options of SCAFFOLD."""

    name: Literal["scaffold"] = "scaffold"


@METHODS.add
class Scaffold(Optimized, FedAvg):
    """FedAvg with control variates."""

    name = "scaffold"
    title = "SCAFFOLD"
    paper = "Karimireddy et al. 2020, arXiv 1910.06378"
    summary = "FedAvg whose local gradients are corrected by control variates; twice the bytes"
    advice = (
        "For clients that differ, take many local steps with SGD and come back often: an old control variate misleads. "
        "Under AdamW the correction is a gradient's, not a step's, and theory no longer holds."
    )
    reconstructed = "control: mean_gradient (equal to option II under plain SGD), deltas weighted by examples"
    config_class = ScaffoldConfig
    config: ScaffoldConfig
    keeps_client_state = True

    @property
    def optimizer(self) -> FederatedOptimizer:
        """SCAFFOLD's."""
        return self.config.build()
