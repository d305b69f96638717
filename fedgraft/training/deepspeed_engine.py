"""The engine for models that one device or one process cannot train: DeepSpeed's ZeRO over the ranks of a replica.

All ranks do the same things in the same order, each on its own rows of every batch; gradients are averaged over them, so a step
is the step of the whole batch. ZeRO shards optimiser state (stage 1), gradients too (2), parameters too (3). Below stage 3 the
frozen base stays where it is mapped, shared by all processes of a node; stage 3 copies each rank's share into private memory.

Values travel between slots and DeepSpeed through a float32 copy of the slots on the CPU: DeepSpeed keeps float32 master weights
of its own, and a weight that is written without its master comes back as it was at the next step.
"""

from __future__ import annotations

import hashlib
import logging
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import distributed as dist
from torch import nn

from fedgraft.errors import ModelError, ReplicaError, UpdateError
from fedgraft.moe.families import model_facts
from fedgraft.moe.sharding import gathered
from fedgraft.moe.slots import add_slots, frozen_names, initial_params
from fedgraft.protocols import Terms, TrainResult, TrainSpec
from fedgraft.training.expert_parallel import finish_settings, refuse_expert_parallel, spread_experts, spread_tensors
from fedgraft.training.ranks import Ranks
from fedgraft.training.step import RoutingCounter, part_loss, part_of_batch, to_device
from fedgraft.types import IGNORE_INDEX, Batch, ParamRef, Params, Slots

__all__ = ["DeepSpeedEngine", "SlotPolicy", "refuse_slots"]

_log = logging.getLogger(__name__)
_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True, slots=True)
class SlotPolicy:
    """What becomes of a slot in local training: whether it ever trains, its rate's factor, whether its moments are kept."""

    is_trained: bool = True
    lr_scale: float = 1.0
    persists_moments: bool = False


def refuse_slots(slots: Slots, stage: int) -> None:
    """Refuse what sharded parameters cannot do, before a model is loaded.

    Raises:
        ModelError: A graft of mode ``row`` in ZeRO stage 3.
    """
    if stage == 3 and slots.graft is not None and slots.graft.mode == "row":
        raise ModelError(
            "a graft of mode row reads the router's weights outside of the router, which ZeRO stage 3 cannot shard",
            "set engine.stage to 0, 1 or 2, or method.graft_mode to additive or convex",
        )


class _Root(nn.Module):
    """DeepSpeed's view of the model: it runs whatever is asked, so that its hooks see one forward pass a call."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.inner = model

    def forward(self, compute: Callable[[], Any]) -> Any:
        """Run ``compute``."""
        return compute()


class DeepSpeedEngine:
    """A model with slots, sharded over this replica's ranks; see ``fedgraft.protocols.Engine`` for what it promises.

    Args:
        model: A frozen HF causal LM on this rank's device; it gains the slots. The same in every rank.
        slots: What the method needs.
        run_seed: Start values of the slots depend on it, and on nothing else.
        settings: DeepSpeed's, as ``fedgraft.training.config.deepspeed_settings`` gives them.
        spec: The optimiser; its learning rate is replaced by that of each training.
        ranks: This process's place; its process group is open.
        policy: What becomes of each slot; decides DeepSpeed's parameter groups.
    """

    def __init__(
        self,
        model: nn.Module,
        slots: Slots,
        run_seed: int,
        *,
        settings: dict[str, Any],
        spec: TrainSpec,
        ranks: Ranks,
        policy: Callable[[ParamRef], SlotPolicy],
    ) -> None:
        stage = int(settings["zero_optimization"]["stage"])
        refuse_slots(slots, stage)
        if (section := settings.get("expert_parallel")) is not None:
            refuse_expert_parallel(model.config, slots, size=section["autoep_size"], stage=stage)
        self.model = model
        self.facts = model_facts(model.config)
        self.device = next(model.parameters()).device
        self.is_leader = ranks.is_leader
        self.refs: tuple[ParamRef, ...] = add_slots(model, slots)
        self.initial: Params = initial_params(model, self.refs, run_seed)
        self._ranks = ranks
        self._settings = settings
        self._spec = spec
        self._by_key = {ref.key: ref for ref in self.refs}
        self._parameters = dict(model.named_parameters())
        self._frozen = frozen_names(model, self.refs)
        self._stage = stage
        self._groups = self._parameter_groups(policy)
        # In a fixed order: every rank must make the same collective calls one after another.
        self._trained = tuple(name for group in self._groups for name in group.names)
        for name, parameter in self._parameters.items():
            parameter.requires_grad_(name in self._trained)
            if name not in self._trained:
                # Every rank maps the same file; DeepSpeed's broadcast at the start would make private copies of its pages.
                parameter.ds_optim_param = True  # type: ignore[attr-defined]
        self._values: Params = {
            ref.name: self._parameters[ref.name].detach().to("cpu", torch.float32, copy=True) for ref in self.refs
        }
        if self._stage == 3:
            size = sum(parameter.numel() * parameter.element_size() for parameter in self._parameters.values())
            self._let_inputs_require_gradients()
            _log.warning(
                "ZeRO stage 3: each rank copies its share of the model (%.0f MB of %.0f MB) into private memory; replicas of a "
                "node no longer share the base. Stages 0 to 2 do.",
                size / ranks.world_size / 1e6,
                size / 1e6,
            )
        self._engine: Any = None
        self._has_gradients = False
        if section is not None:
            spread_experts(model)
        if self._trained:
            self._initialise()

    # ---- values

    def load(self, params: Params) -> None:
        """Copy tensors into the slots of these keys, and into DeepSpeed's master weights."""
        changed: dict[str, None] = {}
        for key, value in params.items():
            ref = self._by_key.get(key)
            if ref is None:
                raise UpdateError(f"no slot is called {key!r}", "the model was built for another method")
            if tuple(value.shape) != ref.shape:
                raise UpdateError(f"{key}: expected shape {ref.shape}, got {tuple(value.shape)}")
            ref.view(self._values[ref.name]).copy_(value)
            changed[ref.name] = None
        self._push(list(changed))

    def read(self, keys: Iterable[str]) -> Params:
        """Copy the tensors of these keys out, float32, from the master weights."""
        return {key: self._by_key[key].view(self._values[self._by_key[key].name]).clone() for key in keys}

    def frozen_hash(self) -> str:
        """SHA-256 over name, shape and bytes of every tensor of the model that is no slot."""
        digest = hashlib.sha256()
        spread = spread_tensors(self.model)
        for name in self._frozen:
            if name in spread:
                spread[name].add_to(digest, name)
                continue
            parameter = self._parameters[name]
            with gathered([parameter]):
                tensor = parameter.detach()
                digest.update(f"{name}|{tuple(tensor.shape)}|{tensor.dtype}".encode())
                digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def _push(self, names: Sequence[str]) -> None:
        """Write values into live weights first, then into masters: each alone is undone or stale (see the module's text)."""
        if not names:
            return
        from deepspeed.runtime.zero import GatheredParameters

        parameters = [self._parameters[name] for name in names]
        with torch.no_grad(), GatheredParameters(parameters, modifier_rank=0, enabled=self._stage == 3):
            for name, parameter in zip(names, parameters, strict=True):
                if self._stage < 3 or self.is_leader:
                    parameter.data.copy_(self._values[name])
        optimizer = self._zero_optimizer
        if optimizer is None:
            return
        optimizer.refresh_fp32_params()
        if self._is_narrow:
            # The refresh rounds what it copies from bfloat16 weights; the masters take the full values.
            from deepspeed.utils import safe_set_full_fp32_param

            for name in self._trained:
                parameter = self._parameters[name]
                safe_set_full_fp32_param(parameter, self._values[name].to(parameter.device))

    def _pull(self, names: Iterable[str]) -> None:
        """Read trained values back from the masters."""
        from deepspeed.utils import safe_get_full_fp32_param

        for name in names:
            parameter = self._parameters[name]
            full = parameter.detach() if self._zero_optimizer is None else safe_get_full_fp32_param(parameter)
            self._values[name].copy_(full.reshape(self._values[name].shape))

    # ---- training

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
        """Train the slots of ``keys`` on this rank's rows of every batch; everything else stays as it is."""
        wanted = set(keys)
        untouched = self.read(ref.key for ref in self.refs if ref.name in self._trained and ref.key not in wanted)
        losses: list[float] = []
        num_examples = num_label_tokens = 0
        self._begin(spec, optimizer_state or {})
        self.model.train()
        self._has_gradients = False
        try:
            with torch.random.fork_rng(devices=self._cuda_devices()), RoutingCounter(self.model) as counter:
                torch.manual_seed(seed + self._ranks.rank)  # dropout of different rows must differ between ranks
                for step, batch in enumerate(batches):
                    losses.append(self._backward(batch, spec.num_parts, counter, terms, step))
                    if after_backward is not None:
                        after_backward(step)
                    if self._engine is not None:
                        if untouched:
                            self.write_gradients({key: torch.zeros_like(value) for key, value in untouched.items()})
                        self._engine.step()
                    self._has_gradients = False
                    if untouched and spec.weight_decay:
                        self._pull(self._trained)
                        self.load(untouched)  # weight decay moves them even without a gradient
                    num_examples += batch.num_examples
                    num_label_tokens += batch.num_label_tokens
        finally:
            self.model.eval()
            if self._has_gradients:
                self._start_afresh()
        self._pull(self._trained)
        if untouched:
            self.load(untouched)
        return TrainResult(
            losses=tuple(losses),
            num_examples=num_examples,
            num_label_tokens=num_label_tokens,
            expert_tokens=self._sum_over_ranks(counter.counts()),
            optimizer_state=self._read_moments(keep_optimizer_state),
        )

    def _backward(self, batch: Batch, num_parts: int, counter: RoutingCounter, terms: Terms | None, step: int) -> float:
        """Run this rank's parts of a batch; give the whole batch's mean loss, the same in every rank."""
        world, count = self._ranks.world_size, max(1, batch.num_label_tokens)
        mean = torch.zeros((), dtype=torch.float64)
        for index in range(num_parts):
            rows = part_of_batch(batch, self._ranks.rank * num_parts + index, world * num_parts)
            # Every rank runs as many passes: under ZeRO 3 weights come together only when all ask for them.
            part = to_device(rows if rows is not None else _unlabelled(batch), self.device)
            counter.attend(part, counts=rows is not None)

            def compute(part: Batch = part) -> tuple[torch.Tensor, torch.Tensor]:
                return part_loss(self.model, part, count if world * num_parts > 1 else None, terms)

            loss, total = self._engine(compute) if self._engine is not None else compute()
            found = torch.stack([loss.detach(), total.detach()]).double().cpu()
            found = self._sum_over_ranks(found)
            if not torch.isfinite(found).all():
                raise UpdateError(f"the loss of local step {step + 1} is {float(found[1])}", "lower the learning rate")
            if self._engine is not None:
                # DeepSpeed averages over ranks, while parts and ranks add up to the batch's mean.
                self._has_gradients = True
                self._engine.set_gradient_accumulation_boundary(index == num_parts - 1)
                self._engine.backward(total * world, scale_wrt_gas=False)
            mean += found[0]
        return float(mean)

    def read_gradients(self, keys: Iterable[str]) -> Params:
        """Copy the whole batch's gradients of these slots out, on the CPU."""
        from deepspeed.utils import safe_get_full_grad

        full: dict[str, torch.Tensor] = {}
        found: Params = {}
        for key in keys:
            ref = self._by_key[key]
            if ref.name not in full:
                gradient = safe_get_full_grad(self._parameters[ref.name])
                shape = self._values[ref.name].shape
                full[ref.name] = torch.zeros(shape) if gradient is None else gradient.detach().float().cpu().reshape(shape)
            found[key] = ref.view(full[ref.name]).clone()
        return found

    def write_gradients(self, gradients: Params) -> None:
        """Replace the gradients of these slots."""
        from deepspeed.utils import safe_set_full_grad

        names = list(dict.fromkeys(self._by_key[key].name for key in gradients))
        siblings = [ref.key for ref in self.refs if ref.name in set(names)]
        full: Params = {}
        for key, value in (self.read_gradients(siblings) | gradients).items():
            ref = self._by_key[key]
            whole = full.setdefault(ref.name, torch.zeros(self._values[ref.name].shape))
            ref.view(whole).copy_(value)
        for name in names:
            parameter = self._parameters[name]
            if self._stage == 0 and parameter.grad is None and not hasattr(parameter, "_hp_mapping"):
                parameter.grad = torch.zeros_like(parameter)
            safe_set_full_grad(parameter, full[name].to(parameter.device))

    def close(self) -> None:
        """Let go of DeepSpeed's engine; its hooks leave the model."""
        if self._engine is not None:
            self._engine.destroy()
            self._engine = None

    # ---- DeepSpeed

    @property
    def _zero_optimizer(self) -> Any:
        """DeepSpeed's wrapper with master weights; ``None`` where weights are stepped directly (stage 0 in float32)."""
        optimizer = self._engine.optimizer if self._engine is not None else None
        return optimizer if hasattr(optimizer, "refresh_fp32_params") else None

    @property
    def _is_narrow(self) -> bool:
        return bool(self._settings["bf16"]["enabled"])

    def _initialise(self) -> None:
        import deepspeed

        rate, decay = self._spec.learning_rate, self._spec.weight_decay
        groups = [
            {"params": [self._parameters[name] for name in group.names], "lr": rate * group.lr_scale} for group in self._groups
        ]
        kind = torch.optim.SGD if self._spec.optimizer == "sgd" else torch.optim.AdamW
        optimizer = kind(groups, lr=rate, weight_decay=decay)
        with warnings.catch_warnings():
            # It imports PyTorch's compiler, which warns of its own deprecations.
            warnings.simplefilter("ignore", DeprecationWarning)
            self._engine, *_ = deepspeed.initialize(
                model=_Root(self.model),
                model_parameters=[parameter for group in groups for parameter in group["params"]],  # type: ignore[attr-defined]
                optimizer=optimizer,
                config=finish_settings(self._settings, self.model),
                dist_init_required=False,
            )
        for name in spread_tensors(self.model):
            self._parameters.pop(name, None)  # the whole experts; this rank's part took their place
        if self._spec.optimizer == "adamw":
            self._create_states()

    def _let_inputs_require_gradients(self) -> None:
        """Give every module an input that asks for a gradient.

        ZeRO 3 lets go of a module's weights when its inputs have theirs; of a first layer whose input asks for none it lets go
        before the weights' own gradients are there.
        """

        def ask(module: nn.Module, args: Any, output: torch.Tensor) -> None:
            if torch.is_grad_enabled():
                output.requires_grad_(True)

        embeddings: nn.Module = self.model.get_input_embeddings()  # type: ignore[operator]
        embeddings.register_forward_hook(ask)

    def _start_afresh(self) -> None:
        """Build DeepSpeed's engine anew after a step that broke off: its gradient buffers may hold half of one."""
        if self._engine is None:
            return
        if self._stage == 3:
            raise ReplicaError("a local step broke off, and sharded weights (ZeRO stage 3) cannot be set up again in one process")
        self._engine.destroy()
        for parameter in self._parameters.values():
            parameter.grad = None
        self._initialise()
        self._push(self._trained)

    def _parameter_groups(self, policy: Callable[[ParamRef], SlotPolicy]) -> list[_Group]:
        """Slots with the same rate and the same fate of their moments go together; ZeRO keeps one step count a group."""
        by_fate: dict[tuple[float, bool], dict[str, None]] = {}
        for ref in self.refs:
            found = policy(ref)
            if found.is_trained:
                by_fate.setdefault((found.lr_scale, found.persists_moments), {})[ref.name] = None
        return [_Group(names=tuple(names), lr_scale=fate[0]) for fate, names in by_fate.items()]

    def _begin(self, spec: TrainSpec, moments: Params) -> None:
        """Set the rates, forget the last client's moments, and take over this one's."""
        if self._engine is None:
            return
        for group, ours in zip(self._engine.optimizer.param_groups, self._groups, strict=True):
            group["lr"] = spec.learning_rate * ours.lr_scale
        inner = self._inner_optimizer
        for state in inner.state.values():
            for value in state.values():
                if isinstance(value, torch.Tensor):
                    value.zero_()
        if not moments:
            return
        from deepspeed.utils import safe_set_full_optimizer_state

        for name, value in moments.items():
            key, _, moment = name.partition("|")
            parameter = self._parameters[self._by_key[key].name]
            if moment == "step":
                self._step_count(parameter).fill_(float(value))
            elif self._zero_optimizer is None:
                inner.state[parameter][moment].copy_(value)
            else:
                safe_set_full_optimizer_state(parameter, value.to(parameter.device), moment)

    @property
    def _inner_optimizer(self) -> torch.optim.Optimizer:
        optimizer = self._engine.optimizer
        return optimizer if self._zero_optimizer is None else optimizer.optimizer  # type: ignore[no-any-return]

    def _create_states(self) -> None:
        """Make the moments that AdamW else makes at its first step.

        Kept ones need a place before it; and ZeRO looks for those of all groups once, after the first group's step.
        """
        states = self._inner_optimizer.state
        for parameter in self._flat_parameters():
            zeros = {moment: torch.zeros_like(parameter) for moment in _MOMENTS}
            states[parameter].update({"step": torch.zeros(()), **zeros})
        link = getattr(self._zero_optimizer, "_lazy_init_hp_params_optimizer_state", None)
        if link is not None:
            link()

    def _flat_parameters(self) -> list[torch.Tensor]:
        """What the inner optimiser steps: the weights themselves, or ZeRO's flat master partitions, group by group."""
        optimizer = self._zero_optimizer
        if optimizer is None:
            return [parameter for group in self._engine.optimizer.param_groups for parameter in group["params"]]
        if self._stage == 3:
            return list(optimizer.fp32_partitioned_groups_flat)
        flat = getattr(optimizer, "single_partition_of_fp32_groups", None)
        return list(flat if flat is not None else optimizer.fp32_groups_flat_partition)

    def _step_count(self, parameter: nn.Parameter) -> torch.Tensor:
        """AdamW's count of steps for a slot: its own, or that of the flat partition it lies in."""
        states = self._inner_optimizer.state
        if self._zero_optimizer is None:
            return states[parameter]["step"]  # type: ignore[no-any-return]
        name = next(name for name, found in self._parameters.items() if found is parameter)
        place = next(index for index, group in enumerate(self._groups) if name in group.names)
        flat = self._flat_parameters()
        if self._stage == 3:
            place = next(
                index
                for index, subgroup in enumerate(self._zero_optimizer.fp16_groups)
                if any(found is parameter for found in subgroup)
            )
        return states[flat[place]]["step"]  # type: ignore[no-any-return]

    def _read_moments(self, keys: Sequence[str]) -> Params:
        """Moments as ``key|moment``; only whole parameters can keep theirs."""
        found: Params = {}
        if self._engine is None or self._spec.optimizer == "sgd":
            return found
        from deepspeed.utils import safe_get_full_optimizer_state

        for key in keys:
            parameter = self._parameters[self._by_key[key].name]
            found[f"{key}|step"] = self._step_count(parameter).detach().cpu().clone()
            for moment in _MOMENTS:
                if self._zero_optimizer is None:
                    value = self._inner_optimizer.state[parameter][moment]
                else:
                    value = safe_get_full_optimizer_state(parameter, moment)
                found[f"{key}|{moment}"] = value.detach().cpu().clone().reshape(self._by_key[key].shape)
        return found

    def _sum_over_ranks(self, values: torch.Tensor) -> torch.Tensor:
        if self._ranks.world_size == 1:
            return values
        total = values.to(self.device)
        dist.all_reduce(total)
        return total.cpu()

    def _cuda_devices(self) -> list[torch.device]:
        return [self.device] if self.device.type == "cuda" else []


@dataclass(frozen=True, slots=True)
class _Group:
    """A parameter group: names in the model's order, and the factor of their rate."""

    names: tuple[str, ...]
    lr_scale: float


def _unlabelled(batch: Batch) -> Batch:
    """A row that no loss counts, for a rank that has no row of a small batch."""
    return Batch(
        input_ids=batch.input_ids[:1],
        attention_mask=batch.attention_mask[:1],
        labels=torch.full_like(batch.labels[:1], IGNORE_INDEX),
    )
