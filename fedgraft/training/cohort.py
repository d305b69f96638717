"""The cohort engine: K clients trained in one forward and backward pass over one resident frozen base.

Each client gets the update that it would get alone, but for rounding: sums are taken in another order, so a token whose k-th and
next expert score almost alike may be sent elsewhere. Loss, gradient norm, clipping, optimiser state and learning rate are each
client's own. Slots lie stacked, with a leading axis of clients (``moe.stacking``); hosting and reading a client go through the
plain engine's slots, one client at a time.

Shape letters: K clients, R rows of all clients, S sequence, N label tokens, D model, V vocabulary, L MoE layers, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from fedgraft.errors import BudgetViolation, GroupViolation, ReplicaError, StorageError, UpdateError
from fedgraft.moe.families import moe_layers
from fedgraft.moe.stacking import Stacking, why_not_stacked
from fedgraft.protocols import Terms, TrainResult, TrainSpec
from fedgraft.training.step import StepOutput, require_labels, to_device
from fedgraft.training.torch_engine import TorchEngine
from fedgraft.types import IGNORE_INDEX, Batch, ParamRef, Params, Slots

__all__ = ["CohortEngine", "Place", "Training"]

_BETAS = (0.9, 0.999)
_EPSILON = 1e-8


@dataclass(frozen=True, kw_only=True, slots=True)
class Training:
    """One client's local training; arguments as in ``Engine.train``. ``masked`` are experts by layer that it must not use."""

    batches: Sequence[Batch]
    spec: TrainSpec
    keys: Sequence[str]
    terms: Terms | None = None
    after_backward: Callable[[int], None] | None = None
    optimizer_state: Params = field(default_factory=dict)
    keep_optimizer_state: Sequence[str] = ()
    masked: Mapping[int, Sequence[int]] = field(default_factory=dict)


class CohortEngine(TorchEngine):
    """A ``TorchEngine`` that can train up to ``size`` clients at once.

    Args:
        model, slots, run_seed: As for ``TorchEngine``.
        size: Places for clients, >= 1.

    Attributes:
        why_not: Why clients with these slots cannot be batched; ``None`` where they can.
    """

    def __init__(self, model: nn.Module, slots: Slots, run_seed: int, size: int) -> None:
        super().__init__(model, slots, run_seed)
        self.size = size
        self.why_not = why_not_stacked(model, slots)
        self._layers = moe_layers(model)
        self._stacking = Stacking(model) if self.why_not is None else None
        names = dict.fromkeys(ref.name for ref in self.refs)
        self._slot_names = tuple(name for name in self._parameters if name in names)
        self._stacked: dict[str, torch.Tensor] = {}

    def place(self, number: int) -> Place:
        """Give the view of one client's place, from 0, for its hooks."""
        return Place(self, number)

    def stash(self, number: int) -> None:
        """Take what the slots hold now as the values of a place."""
        if not self._stacked:
            parameters = {name: self._parameters[name].data for name in self._slot_names}
            self._stacked = {name: value.new_empty(self.size, *value.shape) for name, value in parameters.items()}
        for name in self._slot_names:
            self._stacked[name].data[number].copy_(self._parameters[name].data)

    def restore(self, number: int) -> None:
        """Load the values of a place into the slots."""
        for name in self._slot_names:
            self._parameters[name].data.copy_(self._stacked[name].data[number])

    def train_many(self, trainings: Sequence[Training]) -> list[TrainResult | Exception]:
        """Train the clients at places 0, 1, ..., whose values were stashed, side by side.

        A client with fewer batches ends early; one whose loss is not finite, or whose hook raises, ends there, and the others go
        on. The frozen base stays byte for byte as it is.

        Returns:
            One result a client, or what ended it.
        """
        assert self._stacking is not None, self.why_not
        steps = _Steps(self, trainings)
        self.model.train()
        try:
            with self._stacking.patched(), steps.counting():
                for step in range(max((len(each.batches) for each in trainings), default=0)):
                    self._step(steps, step)
        finally:
            self.model.eval()
            for value in self._stacked.values():
                value.grad = None
                value.requires_grad_(False)
        return steps.results()

    def _step(self, steps: _Steps, step: int) -> None:
        assert self._stacking is not None
        active = steps.active(step)
        if not active:
            return
        joined = _join([to_device(steps.trainings[k].batches[step], self.device) for k in active])
        values = steps.values(active)
        rows = joined.rows
        self._stacking.attend(values, joined.batch.attention_mask, rows, steps.masks(active))
        steps.zero_grad()
        steps.counted = active
        losses, outputs = _losses(self.model, joined)
        total: torch.Tensor | None = None
        for at, k in enumerate(active):
            with steps.catching(k):
                loss = losses[at]
                terms = steps.trainings[k].terms
                own = loss
                if terms is not None:
                    for term in terms(joined.parts[at], outputs(at)).values():
                        own = own + term
                if not bool(torch.isfinite(own.detach())):
                    raise UpdateError(f"the loss of local step {step + 1} is {float(own.detach())}", "lower the learning rate")
                steps.note(k, joined.parts[at], float(loss.detach()))
                total = own if total is None else total + own
        if total is None:
            return
        if total.requires_grad:
            total.backward()  # type: ignore[no-untyped-call]
        for k in active:
            with steps.catching(k):
                hook = steps.trainings[k].after_backward
                if hook is not None:
                    hook(step)
        steps.update([k for k in active if steps.is_alive(k)])


class Place:
    """One client's place in a cohort engine, as its hooks see it while all train; see ``fedgraft.protocols.Engine``.

    ``model`` names this client's values among its parameters; it cannot be run alone.
    """

    def __init__(self, engine: CohortEngine, number: int) -> None:
        self._engine = engine
        self._number = number
        self.model = _PlaceModel(engine, number)
        self.facts, self.refs, self.initial = engine.facts, engine.refs, engine.initial
        self.device, self.is_leader = engine.device, engine.is_leader

    def _value(self, key: str) -> torch.Tensor:
        ref = self._engine._by_key[key]
        return ref.view(self._engine._stacked[ref.name].data[self._number])

    def load(self, params: Params) -> None:
        """Copy tensors into the slots of these keys."""
        for key, value in params.items():
            self._value(key).copy_(value)

    def read(self, keys: Iterable[str]) -> Params:
        """Copy the tensors of these keys out, on the CPU, as float32 where the model is narrower."""
        return {key: _wide(self._value(key)) for key in keys}

    def read_gradients(self, keys: Iterable[str]) -> Params:
        """Copy the gradients of these slots out, on the CPU; zeros where there is none."""
        found: Params = {}
        for key in keys:
            ref = self._engine._by_key[key]
            gradient = self._engine._stacked[ref.name].grad
            own = None if gradient is None else ref.view(gradient[self._number])
            found[key] = torch.zeros(ref.shape) if own is None else own.detach().to("cpu", copy=True)
        return found

    def write_gradients(self, gradients: Params) -> None:
        """Replace the gradients of these slots."""
        for key, value in gradients.items():
            ref = self._engine._by_key[key]
            stacked = self._engine._stacked[ref.name]
            if stacked.grad is None:
                stacked.grad = torch.zeros_like(stacked)
            ref.view(stacked.grad[self._number]).copy_(value)


class _PlaceModel:
    """The model's parameters, slots as those of one place."""

    def __init__(self, engine: CohortEngine, number: int) -> None:
        self._engine = engine
        self._number = number

    def named_parameters(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Name and value of each, slots without the axis of clients."""
        for name, parameter in self._engine._parameters.items():
            stacked = self._engine._stacked.get(name)
            yield name, parameter if stacked is None else stacked[self._number]


class _Steps:
    """The state of one ``train_many``: who is still training, moments, counts, and the optimiser's step."""

    def __init__(self, engine: CohortEngine, trainings: Sequence[Training]) -> None:
        self.trainings = trainings
        self.counted: Sequence[int] = ()
        self._engine = engine
        self._errors: dict[int, Exception] = {}
        self._losses: list[list[float]] = [[] for _ in trainings]
        self._examples = [0] * len(trainings)
        self._label_tokens = [0] * len(trainings)
        facts = engine.facts
        self._tokens = torch.zeros(len(trainings), len(engine._layers), facts.num_experts, dtype=torch.int64)
        by_key = engine._by_key
        trained = {by_key[key].name for training in trainings for key in training.keys}
        self._names = [name for name in engine._slot_names if name in trained]
        for name in engine._slot_names:
            engine._stacked[name].requires_grad_(name in trained)
        self._untouched = [(k, ref) for k, training in enumerate(trainings) for ref in self._others(k, training)]
        self._saved = [ref.view(engine._stacked[ref.name].data[k]).clone() for k, ref in self._untouched]
        self._masks = self._all_masks()
        self._step_K = {name: torch.zeros(engine.size, dtype=torch.float64) for name in self._names}
        self._moments: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        if trainings and trainings[0].spec.optimizer == "adamw":
            for name in self._names:
                value = engine._stacked[name].data
                self._moments[name] = (torch.zeros_like(value), torch.zeros_like(value))
            for k, training in enumerate(trainings):
                self._load_moments(k, training.optimizer_state)
        self._rate_K = {name: self._rates(name) for name in self._names}

    def _others(self, k: int, training: Training) -> Iterator[ParamRef]:
        """Slices of trained parameters that this client does not train: those without its key, and grafts that are shut."""
        engine = self._engine
        own = set(training.keys)
        shut = {
            ref.layer
            for ref in engine.refs
            if ref.key.endswith(".graft.gate_bias") and bool(torch.isneginf(engine._stacked[ref.name].data[k]).all())
        }
        for ref in engine.refs:
            is_shut = ref.part in ("graft", "graft_gate") and ref.layer in shut
            if ref.name in self._names and (ref.key not in own or is_shut):
                yield ref

    def _all_masks(self) -> dict[int, torch.Tensor]:
        engine = self._engine
        indices = {index for training in self.trainings for index, experts in training.masked.items() if experts}
        masks = {
            index: torch.zeros(len(self.trainings), engine.facts.num_experts, dtype=torch.bool, device=engine.device)
            for index in indices
        }
        for k, training in enumerate(self.trainings):
            for index, experts in training.masked.items():
                if experts:
                    masks[index][k, list(experts)] = True
        return masks

    def _rates(self, name: str) -> torch.Tensor:
        """Each client's learning rate for a parameter; the slices of one parameter have one rate."""
        engine = self._engine
        scale_key = next(ref.key for ref in engine.refs if ref.name == name)
        rates = [training.spec.learning_rate * training.spec.lr_scale.get(scale_key, 1.0) for training in self.trainings]
        return torch.tensor(rates, dtype=torch.float64)

    def _load_moments(self, k: int, state: Params) -> None:
        for entry, value in state.items():
            key, _, moment = entry.partition("|")
            name = self._engine._by_key[key].name
            if moment == "step":
                self._step_K[name][k] = float(value)
            else:
                self._moments[name][moment == "exp_avg_sq"][k].copy_(value)

    def active(self, step: int) -> list[int]:
        """Clients that have a batch for this step and have not failed."""
        found = []
        for k, training in enumerate(self.trainings):
            if step < len(training.batches) and self.is_alive(k):
                with self.catching(k):
                    require_labels(training.batches[step], step)
                    found.append(k)
        return found

    def is_alive(self, k: int) -> bool:
        """Whether nothing has ended this client."""
        return k not in self._errors

    def catching(self, k: int) -> _Catching:
        """What raises inside ends client ``k`` alone, but for broken promises, which end the run."""
        return _Catching(self._errors, k)

    def values(self, active: Sequence[int]) -> dict[str, torch.Tensor]:
        """Stacked values of the active clients, by parameter."""
        stacked = self._engine._stacked
        if len(active) == self._engine.size:
            return stacked
        if list(active) == list(range(len(active))):
            return {name: value[: len(active)] for name, value in stacked.items()}
        index = torch.tensor(active, device=self._engine.device)
        return {name: value.index_select(0, index) for name, value in stacked.items()}

    def masks(self, active: Sequence[int]) -> dict[int, torch.Tensor]:
        """Masked experts of the active clients, by layer."""
        return {index: mask_KE[list(active)] for index, mask_KE in self._masks.items()}

    def zero_grad(self) -> None:
        """Let go of the last step's gradients."""
        for name in self._names:
            self._engine._stacked[name].grad = None

    def note(self, k: int, batch: Batch, loss: float) -> None:
        """Count a step of a client."""
        self._losses[k].append(loss)
        self._examples[k] += batch.num_examples
        self._label_tokens[k] += batch.num_label_tokens

    def counting(self) -> _Counting:
        """Count tokens by client, layer and expert while it is entered."""
        return _Counting(self, self._tokens)

    def update(self, alive: Sequence[int]) -> None:
        """Clip and step the clients named; nobody else's values move."""
        engine = self._engine
        if not alive:
            return
        found = {name: grad for name in self._names if (grad := engine._stacked[name].grad) is not None}
        if not found:
            return
        for k, ref in self._untouched:
            if ref.name in found:
                ref.view(found[ref.name][k]).zero_()
        spec = self.trainings[0].spec
        if spec.max_grad_norm is not None:
            norms = [torch.linalg.vector_norm(grad.flatten(1), dim=1) for grad in found.values()]
            total_K = torch.linalg.vector_norm(torch.stack([norm.float() for norm in norms]), dim=0)
            factor_K = (spec.max_grad_norm / (total_K + 1e-6)).clamp(max=1.0)
            for grad in found.values():
                grad.mul_(_column(factor_K.to(grad.dtype), grad))
        # A prefix of the places is a view; any other selection is a copy, and is put back.
        is_prefix = list(alive) == list(range(len(alive)))
        where = None if is_prefix else torch.tensor(alive, device=engine.device)
        with torch.no_grad():
            for name, grad in found.items():
                tensors = [engine._stacked[name].data, grad, *self._moments.get(name, ())]
                taken = [each[: len(alive)] if where is None else each.index_select(0, where) for each in tensors]
                self._step_one(name, alive, *taken)
                if where is not None:
                    for each, new in zip(tensors, taken, strict=True):
                        each.index_copy_(0, where, new)
        for (k, ref), value in zip(self._untouched, self._saved, strict=True):
            ref.view(engine._stacked[ref.name].data[k]).copy_(value)  # weight decay moves them even without a gradient

    def _step_one(self, name: str, alive: Sequence[int], value: torch.Tensor, grad: torch.Tensor, *moments: torch.Tensor) -> None:
        """PyTorch's AdamW or SGD on one stacked parameter, in place, each client at its own rate and count of steps."""
        spec = self.trainings[0].spec
        rate = self._rate_K[name][list(alive)]

        def column(numbers: torch.Tensor) -> torch.Tensor:
            return _column(numbers.to(value.device, value.dtype), value)

        if spec.optimizer == "sgd":
            if spec.weight_decay:
                grad = grad.add(value, alpha=spec.weight_decay)
            value.sub_(column(rate) * grad)
            return
        mean, square = moments
        steps = self._step_K[name]
        steps[list(alive)] += 1
        taken = steps[list(alive)]
        if spec.weight_decay:
            value.mul_(column(1 - rate * spec.weight_decay))
        mean.lerp_(grad, 1 - _BETAS[0])
        square.mul_(_BETAS[1]).addcmul_(grad, grad, value=1 - _BETAS[1])
        size = column(rate / (1 - _BETAS[0] ** taken))
        root = column((1 - _BETAS[1] ** taken).sqrt())
        value.sub_(size * mean / (square.sqrt().div_(root).add_(_EPSILON)))

    def results(self) -> list[TrainResult | Exception]:
        """What each client's training did, or what ended it."""
        return [self._errors.get(k) or self._result(k, training) for k, training in enumerate(self.trainings)]

    def _result(self, k: int, training: Training) -> TrainResult:
        kept: Params = {}
        for key in training.keep_optimizer_state:
            name = self._engine._by_key[key].name
            if name in self._moments and self._step_K[name][k]:
                mean, square = self._moments[name]
                kept[f"{key}|step"] = self._step_K[name][k].float()
                kept[f"{key}|exp_avg"] = mean[k].detach().cpu().clone()
                kept[f"{key}|exp_avg_sq"] = square[k].detach().cpu().clone()
        return TrainResult(
            losses=tuple(self._losses[k]),
            num_examples=self._examples[k],
            num_label_tokens=self._label_tokens[k],
            expert_tokens=self._tokens[k].clone(),
            optimizer_state=kept,
        )


class _Catching:
    def __init__(self, errors: dict[int, Exception], k: int) -> None:
        self._errors = errors
        self._k = k

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        if error is None or isinstance(error, (BudgetViolation, GroupViolation, ReplicaError, StorageError)):
            return False
        if isinstance(error, torch.OutOfMemoryError) or not isinstance(error, Exception):
            return False
        self._errors[self._k] = error
        return True


class _Counting:
    """Hooks on routers, as long as it is entered."""

    def __init__(self, steps: _Steps, tokens_KLE: torch.Tensor) -> None:
        self._steps = steps
        self._tokens = tokens_KLE
        self._handles: list[Any] = []

    def __enter__(self) -> None:
        engine = self._steps._engine
        stacking = engine._stacking
        assert stacking is not None
        num_experts = engine.facts.num_experts
        for position, layer in enumerate(engine._layers):

            def count(chosen_TK: torch.Tensor, weights_TK: torch.Tensor, position: int = position) -> None:
                active = self._steps.counted
                at = (stacking.client_T.unsqueeze(1) * num_experts + chosen_TK).reshape(-1)
                counts = torch.bincount(at, minlength=len(active) * num_experts).reshape(len(active), -1)
                self._tokens[list(active), position] += counts.cpu()

            self._handles.append(layer.watch_routing(count))

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()


@dataclass(frozen=True, slots=True)
class _Joined:
    """The clients' batches as one: ``rows`` of it are each client's, ``parts`` their own batches."""

    batch: Batch
    rows: tuple[int, ...]
    parts: tuple[Batch, ...]


def _join(parts: Sequence[Batch]) -> _Joined:
    """Put batches one below the other, all padded on the right to the longest; what fills does not matter."""
    width = max(part.input_ids.shape[1] for part in parts)

    def joined(name: str, fill: int) -> torch.Tensor:
        return torch.cat(
            [F.pad(value, (0, width - value.shape[1]), value=fill) for part in parts for value in [getattr(part, name)]]
        )

    batch = Batch(
        input_ids=joined("input_ids", 0), attention_mask=joined("attention_mask", 0), labels=joined("labels", IGNORE_INDEX)
    )
    return _Joined(batch, tuple(part.num_examples for part in parts), tuple(parts))


def _losses(model: nn.Module, joined: _Joined) -> tuple[list[torch.Tensor], Callable[[int], StepOutput]]:
    """Each client's mean cross-entropy over its response tokens, nats, and a function that gives one's part of the output."""
    batch = joined.batch
    hidden_RSD = model.model(  # type: ignore[operator]
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False
    ).last_hidden_state
    labels = batch.labels[:, 1:]
    is_counted = labels != IGNORE_INDEX
    logits_NV = model.lm_head(hidden_RSD[:, :-1][is_counted])  # type: ignore[operator]
    labels_N = labels[is_counted]
    each_N = F.cross_entropy(logits_NV.float(), labels_N, reduction="none")
    counts = [int(part.sum()) for part in torch.split(is_counted, list(joined.rows))]
    losses = [each.mean() for each in torch.split(each_N, counts)]

    def output(at: int) -> StepOutput:
        width = joined.parts[at].input_ids.shape[1]
        return StepOutput(
            hidden=torch.split(hidden_RSD, list(joined.rows))[at][:, :width],
            logits=torch.split(logits_NV, counts)[at],
            labels=torch.split(labels_N, counts)[at],
        )

    return losses, output


def _column(value_K: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return value_K.reshape(-1, *[1] * (like.dim() - 1))


def _wide(value: torch.Tensor) -> torch.Tensor:
    wide = value.dtype if value.dtype in (torch.float32, torch.float64) else torch.float32
    return value.detach().to(device="cpu", dtype=wide, copy=True)
