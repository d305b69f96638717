"""The reference engine: one process, plain PyTorch, no batching over clients.

Shape letters: B batch, S sequence, T tokens, N label tokens, D model, V vocabulary, L MoE layers, E experts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from fedgraft.errors import UpdateError
from fedgraft.moe.families import model_facts, moe_layers
from fedgraft.moe.slots import add_slots, frozen_names, initial_params
from fedgraft.protocols import Terms, TrainResult, TrainSpec
from fedgraft.types import IGNORE_INDEX, Batch, ParamRef, Params, Slots

__all__ = ["StepOutput", "TorchEngine", "response_loss"]


@dataclass(frozen=True, kw_only=True, slots=True)
class StepOutput:
    """What a step computed, for a method's extra terms.

    ``hidden`` (B, S, D) is the last layer's output; ``logits`` (N, V) and ``labels`` (N) are those of the positions that
    the loss counts, in batch order.
    """

    hidden: torch.Tensor
    logits: torch.Tensor
    labels: torch.Tensor


def response_loss(model: nn.Module, batch: Batch) -> tuple[torch.Tensor, StepOutput]:
    """Mean cross-entropy over the response tokens of a batch, nats.

    The language-model head is applied only where a label counts: prompts and padding are most of a batch.
    """
    hidden_BSD = model.model(  # type: ignore[operator]
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False
    ).last_hidden_state
    labels = batch.labels[:, 1:]
    counted = labels != IGNORE_INDEX
    logits_NV = model.lm_head(hidden_BSD[:, :-1][counted])  # type: ignore[operator]
    labels_N = labels[counted]
    return F.cross_entropy(logits_NV.float(), labels_N), StepOutput(hidden=hidden_BSD, logits=logits_NV, labels=labels_N)


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
        self.device = next(iter(self._parameters.values())).device

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
            with torch.random.fork_rng(devices=[]), _RoutingCounter(self.model) as counter:
                torch.manual_seed(seed)  # dropout inside HF and PEFT modules draws from torch's global generator
                for step, cpu_batch in enumerate(batches):
                    batch = _to_device(cpu_batch, self.device)
                    counter.attend(batch)
                    optimizer.zero_grad(set_to_none=True)
                    loss, output = response_loss(self.model, batch)
                    total = loss
                    for term in (terms(batch, output) if terms is not None else {}).values():
                        total = total + term
                    if not torch.isfinite(total):
                        raise UpdateError(
                            f"the loss of local step {step + 1} is {float(total.detach())}", "lower the learning rate"
                        )
                    if total.requires_grad:
                        total.backward()  # type: ignore[no-untyped-call]
                    if after_backward is not None:
                        after_backward(step)
                    self._clear_gradients(untouched)
                    if spec.max_grad_norm is not None and parameters:
                        torch.nn.utils.clip_grad_norm_(parameters, spec.max_grad_norm)
                    optimizer.step()
                    self.load(untouched)  # weight decay moves them even without a gradient
                    losses.append(float(loss.detach()))
                    num_examples += batch.num_examples
                    num_label_tokens += int(output.labels.numel())
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

    def frozen_hash(self) -> str:
        """SHA-256 over name, shape and bytes of every tensor of the model that is no slot."""
        digest = hashlib.sha256()
        for name in frozen_names(self.model, self.refs):
            tensor = self._parameters[name].detach()
            digest.update(f"{name}|{tuple(tensor.shape)}|{tensor.dtype}".encode())
            digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()

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


class _RoutingCounter:
    """Counts the tokens that each router sends to each expert, padding left out."""

    def __init__(self, model: nn.Module) -> None:
        facts = model_facts(model.config)
        self._layers = moe_layers(model)
        self._counts = torch.zeros(len(self._layers), facts.num_experts, dtype=torch.int64)
        self._mask: torch.Tensor | None = None
        self._handles: list[Any] = []

    def __enter__(self) -> _RoutingCounter:
        for position, layer in enumerate(self._layers):

            def hook(module: nn.Module, args: Any, output: tuple[torch.Tensor, ...], position: int = position) -> None:
                chosen = output[-1].detach()[self._mask]
                counts = torch.bincount(chosen.reshape(-1), minlength=self._counts.shape[1])
                self._counts[position] += counts.cpu()

            self._handles.append(layer.router.register_forward_hook(hook))
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()

    def attend(self, batch: Batch) -> None:
        """Say which tokens of the coming forward pass count."""
        self._mask = batch.attention_mask.reshape(-1).bool()

    def counts(self) -> torch.Tensor:
        """Tokens by layer and expert, (L, E) int64."""
        return self._counts


def _to_device(batch: Batch, device: torch.device) -> Batch:
    if batch.input_ids.device == device:
        return batch
    return Batch(
        input_ids=batch.input_ids.to(device),
        attention_mask=batch.attention_mask.to(device),
        labels=batch.labels.to(device),
    )
