"""The reference engine: one process, plain PyTorch, no batching over clients.

Shape letters: B batch, S sequence, T tokens, N label tokens, D model, V vocabulary, L MoE layers, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from fedgraft.errors import UpdateError
from fedgraft.moe.families import model_facts
from fedgraft.moe.hashing import hash_tensors
from fedgraft.moe.slots import add_slots, frozen_names, initial_params
from fedgraft.protocols import Objective, Terms, TrainResult, TrainSpec
from fedgraft.training.step import RoutingCounter, part_loss, part_of_batch, require_labels, to_device
from fedgraft.types import Batch, ParamRef, Params, Slots, Weighted

__all__ = ["TorchEngine"]


class TorchEngine:
    """A model with slots in this process; see ``fedgraft.protocols.Engine`` for what it promises.

    Args:
        model: A frozen HF causal LM, e.g. from ``open_base``; it gains the slots.
        slots: What the method needs.
        run_seed: Start values of the slots depend on it, and on nothing else.
    """

    def __init__(self, model: nn.Module, slots: Slots, run_seed: int) -> None:
        self.model = model
        self.facts = model_facts(model.config)
        self.refs: tuple[ParamRef, ...] = add_slots(model, slots)
        self.initial: Params = initial_params(model, self.refs, run_seed)
        self._by_key = {ref.key: ref for ref in self.refs}
        self._parameters = dict(model.named_parameters())
        # Taken once: PEFT takes fused experts out and puts them back in a forward pass, which changes their order.
        self._frozen = frozen_names(model, self.refs)
        self.device = next(iter(self._parameters.values())).device
        self.is_leader = True

    def load(self, params: Params) -> None:
        """Copy tensors into the slots of these keys."""
        with torch.no_grad():
            for key, value in params.items():
                ref = self._by_key.get(key)
                if ref is None:
                    raise UpdateError(f"no slot is called {key!r}", "the model was built for another method")
                if tuple(value.shape) != ref.shape:
                    raise UpdateError(f"{key}: expected shape {ref.shape}, got {tuple(value.shape)}")
                ref.view(self._parameters[ref.name].data).copy_(value)

    def read(self, keys: Iterable[str]) -> Params:
        """Copy the tensors of these keys out, on the CPU, as float32 where the model is narrower."""
        found: Params = {}
        for key in keys:
            ref = self._by_key[key]
            value = ref.view(self._parameters[ref.name].data).detach()
            wide = value.dtype if value.dtype in (torch.float32, torch.float64) else torch.float32
            found[key] = value.to(device="cpu", dtype=wide, copy=True)
        return found

    def train(
        self,
        batches: Iterable[Batch],
        spec: TrainSpec,
        keys: Sequence[str],
        *,
        seed: int,
        terms: Terms | None = None,
        objective: Objective | None = None,
        after_backward: Callable[[int], None] | None = None,
        optimizer_state: Params | None = None,
        keep_optimizer_state: Sequence[str] = (),
    ) -> TrainResult:
        """Train the slots of ``keys``; everything else stays byte for byte as it is."""
        trained = {self._by_key[key].name for key in keys}
        untouched = self._untouched_slices(trained, set(keys))
        for ref in self.refs:
            self._parameters[ref.name].requires_grad_(ref.name in trained)
        optimizer = self._optimizer(spec, keys)
        self._load_moments(optimizer, optimizer_state or {})
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        losses: list[float] = []
        num_examples = num_label_tokens = 0
        self.model.train()
        try:
            with torch.random.fork_rng(devices=[]), RoutingCounter(self.model) as counter:
                torch.manual_seed(seed)  # dropout inside HF and PEFT modules draws from torch's global generator
                for step, cpu_batch in enumerate(batches):
                    optimizer.zero_grad(set_to_none=True)
                    loss = self._backward(cpu_batch, spec.num_parts, counter, (terms, objective), step)
                    if after_backward is not None:
                        after_backward(step)
                    self._clear_gradients(untouched)
                    if spec.max_grad_norm is not None and parameters:
                        torch.nn.utils.clip_grad_norm_(parameters, spec.max_grad_norm)
                    optimizer.step()
                    self.load(untouched)  # weight decay moves them even without a gradient
                    losses.append(loss)
                    num_examples += cpu_batch.num_examples
                    num_label_tokens += cpu_batch.num_label_tokens
        finally:
            # Also after a failed step: the next client on this model must find it as it was.
            self.model.eval()
            optimizer.zero_grad(set_to_none=True)
        kept = self._read_moments(optimizer, keep_optimizer_state)
        return TrainResult(
            losses=tuple(losses),
            num_examples=num_examples,
            num_label_tokens=num_label_tokens,
            expert_tokens=counter.counts(),
            optimizer_state=kept,
        )

    def read_gradients(self, keys: Iterable[str]) -> Params:
        """Copy the gradients of these slots out, on the CPU; zeros where there is none."""
        found: Params = {}
        for key in keys:
            ref = self._by_key[key]
            gradient = self._parameters[ref.name].grad
            found[key] = torch.zeros(ref.shape) if gradient is None else ref.view(gradient).detach().to("cpu", copy=True)
        return found

    def write_gradients(self, gradients: Params) -> None:
        """Replace the gradients of these slots."""
        for key, value in gradients.items():
            ref = self._by_key[key]
            parameter = self._parameters[ref.name]
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            ref.view(parameter.grad).copy_(value)

    def own_share(self, items: Sequence[Any]) -> Sequence[Any]:
        """All of them: there is one rank."""
        return items

    def add_up(self, values: Mapping[str, Weighted]) -> dict[str, Weighted]:
        """The values themselves."""
        return dict(values)

    def close(self) -> None:
        """Nothing to let go of."""

    def frozen_hash(self) -> str:
        """SHA-256 over name, shape and bytes of every tensor of the model that is no slot."""
        return hash_tensors((name, self._parameters[name]) for name in self._frozen)

    def _backward(
        self, cpu_batch: Batch, num_parts: int, counter: RoutingCounter, hooks: tuple[Terms | None, Objective | None], step: int
    ) -> float:
        """Run forward and backward over the parts of a batch, adding up their gradients; give the batch's mean loss."""
        parts = [cpu_batch] if num_parts == 1 else [part_of_batch(cpu_batch, index, num_parts) for index in range(num_parts)]
        num_label_tokens = require_labels(cpu_batch, step)
        count = None if num_parts == 1 else num_label_tokens
        mean = 0.0
        for cpu_part in parts:
            if cpu_part is None:
                continue
            part = to_device(cpu_part, self.device)
            counter.attend(part)
            loss, total = part_loss(self.model, part, count, *hooks)
            if not torch.isfinite(total):
                raise UpdateError(f"the loss of local step {step + 1} is {float(total.detach())}", "lower the learning rate")
            if total.requires_grad:
                total.backward()  # type: ignore[no-untyped-call]
            mean += float(loss.detach())
        return mean

    def _untouched_slices(self, trained: set[str], keys: set[str]) -> Params:
        """Copies of the slices that share a parameter with a trained one: an optimiser steps whole parameters."""
        return self.read(ref.key for ref in self.refs if ref.name in trained and ref.key not in keys)

    def _clear_gradients(self, slices: Params) -> None:
        """Zero the gradients of slices that are not trained, so that they count neither for a step nor for the clip."""
        for key in slices:
            ref = self._by_key[key]
            gradient = self._parameters[ref.name].grad
            if gradient is not None:
                ref.view(gradient).zero_()

    def _optimizer(self, spec: TrainSpec, keys: Sequence[str]) -> torch.optim.Optimizer:
        """One parameter group a learning rate, parameters in the model's order."""
        wanted = set(keys)
        by_rate: dict[float, dict[str, nn.Parameter]] = {}
        for ref in self.refs:
            if ref.key in wanted:
                rate = spec.learning_rate * spec.lr_scale.get(ref.key, 1.0)
                by_rate.setdefault(rate, {})[ref.name] = self._parameters[ref.name]
        groups: list[dict[str, Any]] = [{"params": list(found.values()), "lr": rate} for rate, found in by_rate.items()]
        if not groups:
            groups = [{"params": [nn.Parameter(torch.zeros(()))], "lr": spec.learning_rate}]
        if spec.optimizer == "sgd":
            return torch.optim.SGD(groups, lr=spec.learning_rate, weight_decay=spec.weight_decay)
        return torch.optim.AdamW(groups, lr=spec.learning_rate, weight_decay=spec.weight_decay)

    def _load_moments(self, optimizer: torch.optim.Optimizer, state: Params) -> None:
        for name, value in state.items():
            key, _, moment = name.partition("|")
            parameter = self._parameters[self._by_key[key].name]
            # AdamW counts its steps on the CPU; moments live beside their parameter.
            optimizer.state[parameter][moment] = value.clone() if moment == "step" else value.to(parameter.device, copy=True)

    def _read_moments(self, optimizer: torch.optim.Optimizer, keys: Sequence[str]) -> Params:
        """Moments as ``key|moment``; only whole parameters can keep theirs."""
        found: Params = {}
        for key in keys:
            state = optimizer.state.get(self._parameters[self._by_key[key].name], {})
            found.update({f"{key}|{moment}": value.detach().cpu().clone() for moment, value in state.items()})
        return found
