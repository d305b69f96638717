"""The engine for models that one device or one process cannot train: DeepSpeed's ZeRO over the ranks of a replica.

All ranks do the same things in the same order, each on its own rows of every batch; gradients are averaged over them, so a step
is the step of the whole batch. ZeRO shards optimiser state (stage 1), gradients too (2), parameters too (3). Below stage 3 the
frozen base stays where it is mapped, shared by all processes of a node; stage 3 copies each rank's share into private memory.

Values travel between slots and DeepSpeed through a float32 copy of the slots on the CPU and ``MasterWeights``.
"""

from __future__ import annotations

import hashlib
import logging
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import distributed as dist
from torch import nn

from fedgraft.errors import ModelError, ReplicaError, UpdateError
from fedgraft.moe.families import model_facts
from fedgraft.moe.hashing import add_tensor
from fedgraft.moe.sharding import gathered
from fedgraft.moe.slots import add_slots, frozen_names, initial_params
from fedgraft.protocols import Objective, Terms, TrainResult, TrainSpec
from fedgraft.training.deepspeed_model import DeepSpeedRoot, let_inputs_require_gradients
from fedgraft.training.expert_parallel import finish_settings, refuse_expert_parallel, spread_experts, spread_tensors
from fedgraft.training.master_weights import MasterWeights
from fedgraft.training.ranks import Ranks
from fedgraft.training.step import RoutingCounter, part_loss, part_of_batch, require_labels, to_device
from fedgraft.types import IGNORE_INDEX, Batch, ParamRef, Params, Slots, Weighted

__all__ = ["DeepSpeedEngine", "SlotPolicy", "refuse_slots"]

_log = logging.getLogger(__name__)


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
            "set engine.stage to 0, 1 or 2, or method.mode to additive or convex",
        )


class DeepSpeedEngine:
    """A model with slots, sharded over this replica's ranks; see ``fedgraft.protocols.Engine`` for what it promises.

    Args:
        model: A frozen HF causal LM; it gains the slots. The same in every rank; on the CPU in stage 3, where each rank moves its
            share alone to its device, else on this rank's device.
        slots: What the method needs.
        run_seed: Start values of the slots depend on it, and on nothing else.
        settings: DeepSpeed's, as ``fedgraft.training.config.deepspeed_settings`` gives them.
        spec: The optimiser; its learning rate is replaced by that of each training.
        ranks: This process's place; its process group is open.
        device: Of this rank.
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
        device: Literal["cpu", "cuda"],
        policy: Callable[[ParamRef], SlotPolicy],
    ) -> None:
        stage = int(settings["zero_optimization"]["stage"])
        refuse_slots(slots, stage)
        if (section := settings.get("expert_parallel")) is not None:
            refuse_expert_parallel(model.config, slots, size=section["autoep_size"], stage=stage)
        self.model = model
        self.facts = model_facts(model.config)
        self.device = torch.device("cuda", torch.cuda.current_device()) if device == "cuda" else torch.device("cpu")
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
            let_inputs_require_gradients(self.model)
            self._shard_weights()
            _log.warning(
                "ZeRO stage 3: each rank copies its share of the model (%.0f MB of %.0f MB) into private memory; replicas of a "
                "node no longer share the base. Stages 0 to 2 do.",
                size / ranks.world_size / 1e6,
                size / 1e6,
            )
        self._engine: Any = None
        self._masters: MasterWeights | None = None
        self._has_gradients = False
        if section is not None:
            spread_experts(model, section["autoep_size"])
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
                add_tensor(digest, name, parameter)
        return digest.hexdigest()

    def _push(self, names: Iterable[str]) -> None:
        """Write values into DeepSpeed's live weights and masters; slots that never train have a live weight only."""
        wanted = list(names)
        if not wanted:
            return
        if self._masters is None:
            for name in wanted:
                self._parameters[name].data.copy_(self._values[name])
            return
        self._masters.write({name: self._values[name] for name in wanted})
        if self._is_narrow:
            # Of all trained slots: writing some refreshes the masters of all, rounded.
            self._masters.write_exactly({name: self._values[name] for name in self._trained})

    def _pull(self, names: Iterable[str]) -> None:
        """Read trained values back from the masters."""
        if self._masters is not None:
            for name in names:
                self._values[name].copy_(self._masters.read(name).reshape(self._values[name].shape))

    # ---- training

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
        """Train the slots of ``keys`` on this rank's rows of every batch; everything else stays as it is.

        Optimiser, weight decay, clipping and factors of the rate are those the engine was built with.
        """
        self._require_own_spec(spec)
        if self._has_gradients:
            self._start_afresh()
        wanted = set(keys)
        untouched = self.read(ref.key for ref in self.refs if ref.name in self._trained and ref.key not in wanted)
        losses: list[float] = []
        num_examples = num_label_tokens = 0
        self._begin(spec, optimizer_state or {})
        self.model.train()
        try:
            with torch.random.fork_rng(devices=self._cuda_devices()), RoutingCounter(self.model) as counter:
                torch.manual_seed(seed + self._ranks.rank)  # dropout of different rows must differ between ranks
                for step, batch in enumerate(batches):
                    losses.append(self._backward(batch, spec.num_parts, counter, (terms, objective), step))
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
        except RuntimeError as error:
            if isinstance(error, dist.DistError) or "/gloo/" in str(error):
                raise ReplicaError(f"rank {self._ranks.rank} lost the others: {error}") from error
            raise
        finally:
            self.model.eval()
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

    def _backward(
        self, batch: Batch, num_parts: int, counter: RoutingCounter, hooks: tuple[Terms | None, Objective | None], step: int
    ) -> float:
        """Run this rank's parts of a batch; give the whole batch's mean loss, the same in every rank."""
        world, count = self._ranks.world_size, require_labels(batch, step)
        mean = torch.zeros((), dtype=torch.float64)
        for index in range(num_parts):
            rows = part_of_batch(batch, self._ranks.rank * num_parts + index, world * num_parts)
            # Every rank runs as many passes: under ZeRO 3 weights come together only when all ask for them.
            part = to_device(rows if rows is not None else _unlabelled(batch), self.device)
            counter.attend(part, counts=rows is not None)

            def compute(part: Batch = part) -> tuple[torch.Tensor, torch.Tensor]:
                return part_loss(self.model, part, count if world * num_parts > 1 else None, *hooks)

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
        full: dict[str, torch.Tensor] = {}
        found: Params = {}
        for key in keys:
            ref = self._by_key[key]
            if ref.name not in full:
                gradient = None if self._masters is None else self._masters.read_gradient(ref.name)
                shape = self._values[ref.name].shape
                full[ref.name] = torch.zeros(shape) if gradient is None else gradient.float().cpu().reshape(shape)
            found[key] = ref.view(full[ref.name]).clone()
        return found

    def write_gradients(self, gradients: Params) -> None:
        """Replace the gradients of these slots."""
        names = list(dict.fromkeys(self._by_key[key].name for key in gradients))
        siblings = [ref.key for ref in self.refs if ref.name in set(names)]
        full: Params = {}
        for key, value in (self.read_gradients(siblings) | gradients).items():
            ref = self._by_key[key]
            whole = full.setdefault(ref.name, torch.zeros(self._values[ref.name].shape))
            ref.view(whole).copy_(value)
        for name in names:
            if self._masters is not None:
                self._masters.write_gradient(name, full[name])

    def own_share(self, items: Sequence[Any]) -> Sequence[Any]:
        """Every ``world_size``-th item; all of them where weights or tokens travel between ranks in every pass."""
        return items if self._is_in_step else items[self._ranks.rank :: self._ranks.world_size]

    def add_up(self, values: Mapping[str, Weighted]) -> dict[str, Weighted]:
        """Sum over the ranks, in float64."""
        if self._is_in_step or not values:
            return dict(values)
        sums = self._sum_over_ranks(torch.tensor([[each.total, each.weight] for each in values.values()], dtype=torch.float64))
        return {name: Weighted(total=total, weight=weight) for name, (total, weight) in zip(values, sums.tolist(), strict=True)}

    @property
    def _is_in_step(self) -> bool:
        return self._stage == 3 or "expert_parallel" in self._settings

    def close(self) -> None:
        """Let go of DeepSpeed's engine; its hooks leave the model."""
        if self._engine is not None:
            self._let_go()

    # ---- DeepSpeed

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
                model=DeepSpeedRoot(self.model),
                model_parameters=[parameter for group in groups for parameter in group["params"]],  # type: ignore[attr-defined]
                optimizer=optimizer,
                config=finish_settings(self._settings, self.model),
                dist_init_required=False,
            )
        for name in spread_tensors(self.model):
            self._parameters.pop(name, None)  # the whole experts; this rank's part took their place
        names = [group.names for group in self._groups]
        self._masters = MasterWeights(self._engine, self._parameters, names, self._stage, is_leader=self.is_leader)

    def _shard_weights(self) -> None:
        """Cut every parameter into shares before DeepSpeed's engine would move the whole model to the device."""
        from deepspeed.runtime.zero import Init

        dtype = torch.bfloat16 if self._is_narrow else torch.float32
        Init(module=self.model, config_dict_or_path=self._settings, dtype=dtype)
        for name, buffer in self.model.named_buffers():
            owner, _, last = name.rpartition(".")
            setattr(self.model.get_submodule(owner), last, buffer.to(self.device))

    def _start_afresh(self) -> None:
        """Build DeepSpeed's engine anew after a step that broke off: its gradient buffers may hold half of one.

        Done when the next training begins, when whatever the broken step held in memory is free.
        """
        if self._engine is None:
            return
        if self._stage == 3:
            raise ReplicaError("a local step broke off, and sharded weights (ZeRO stage 3) cannot be set up again in one process")
        self._let_go()
        for parameter in self._parameters.values():
            parameter.grad = None
        try:
            self._initialise()
        except Exception as error:  # whatever it is, this process has no engine any more
            raise ReplicaError(f"DeepSpeed could not be set up again: {error}") from error
        self._has_gradients = False
        self._push(self._trained)

    def _let_go(self) -> None:
        """Destroy DeepSpeed's engine, once.

        It destroys itself once more when it is collected, whenever that is, and would then unlink the parameters from the masters
        of an engine that was built meanwhile.
        """
        self._engine.destroy()
        self._engine.optimizer = None
        self._engine = self._masters = None

    def _require_own_spec(self, spec: TrainSpec) -> None:
        own = self._spec
        for name in ("optimizer", "weight_decay", "max_grad_norm"):
            if getattr(spec, name) != getattr(own, name):
                raise ModelError(
                    f"the DeepSpeed engine was built with {name} {getattr(own, name)!r} and asked to train with "
                    f"{getattr(spec, name)!r}",
                    "build another engine",
                )

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
        if self._masters is None:
            return
        self._masters.begin([spec.learning_rate * group.lr_scale for group in self._groups])
        for name, value in moments.items():
            key, _, moment = name.partition("|")
            self._masters.write_moment(self._by_key[key].name, moment, value)

    def _read_moments(self, keys: Sequence[str]) -> Params:
        """Moments as ``key|moment``; only whole parameters can keep theirs."""
        if self._masters is None:
            return {}
        found: Params = {}
        for key in keys:
            ref = self._by_key[key]
            for moment, value in self._masters.read_moments(ref.name).items():
                found[f"{key}|{moment}"] = value if moment == "step" else value.reshape(ref.shape)
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
