"""Training of a whole model, or of those of its parameters that ask for gradients, by several ranks under DeepSpeed's ZeRO.

All ranks do the same things in the same order, each on its own rows of every batch. The loss of a batch is one mean over all its
tokens, wherever they lie, so that the number of ranks only changes the order of sums. A step depends on its number and its batch,
and on nothing that came before but weights and moments: training that stops and goes on takes the same steps.

Who starts the ranks is not said here; see ``fedgraft.training.ranks``.
"""

from __future__ import annotations

import hashlib
import json
import math
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist
from torch import nn

from fedgraft.errors import CheckpointError, ModelError
from fedgraft.moe.sharding import gathered
from fedgraft.seeding import derive_seed
from fedgraft.training.balance import RouterBalance
from fedgraft.training.config import EngineConfig, deepspeed_settings
from fedgraft.training.deepspeed_model import DeepSpeedRoot, let_inputs_require_gradients
from fedgraft.training.pretrain import PretrainSpec, learning_rate_at, parameter_groups
from fedgraft.training.ranks import Ranks
from fedgraft.training.step import part_of_batch, response_loss, to_device
from fedgraft.types import IGNORE_INDEX, Batch

__all__ = ["ShardedSpec", "ShardedTraining", "StepReport", "check_checkpoint"]

_STATE = "state"  # DeepSpeed's own folder in a checkpoint


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardedSpec:
    """How ranks train together.

    ``training`` has steps, rates and weights (its ``prompt_weight`` is not used: labels say what counts). ``batch_size``
    counts rows over all ranks; each rank takes its share in ``num_parts`` passes. ``zero_stage`` is 0 to 3, ``dtype``
    ``float32`` or ``bfloat16`` (with float32 masters, from stage 1 on).
    """

    training: PretrainSpec
    batch_size: int
    num_parts: int = 1
    zero_stage: int = 1
    dtype: str = "float32"
    seed: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class StepReport:
    """What a step gave, the same in every rank.

    ``loss`` is the mean cross-entropy over the batch's label tokens (nats); ``balance`` the router's load-balancing loss (K at
    perfect balance), NaN where it has no weight; ``grad_norm`` the gradient's norm before clipping; ``num_tokens`` are the
    batch's, padding left out.
    """

    step: int
    loss: float
    balance: float
    learning_rate: float
    grad_norm: float
    num_tokens: int


class ShardedTraining:
    """A model in training, spread over the ranks.

    Args:
        model: An HF causal LM of a known family on this rank's device, with the same weights in every rank. Parameters that
            ask for no gradient stay as they are.
        spec: How to train.
        ranks: This process's place; its process group is open, and every rank makes this object.

    Raises:
        ModelError: Nothing of the model asks for a gradient.
    """

    def __init__(self, model: nn.Module, spec: ShardedSpec, ranks: Ranks) -> None:
        self.model = model
        self.spec = spec
        self.ranks = ranks
        self.device = next(model.parameters()).device
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise ModelError("there is nothing to train: no parameter of the model asks for a gradient")
        aux = spec.training.router_aux_weight
        self._balance = RouterBalance(model, self._sum) if aux else None
        self._engine = self._initialise()

    def step(self, step: int, batch: Batch) -> StepReport:
        """Take one step on a batch.

        Args:
            step: Number of the step, from 1; decides the rate and what dropout drops.
            batch: All ranks' rows, the same in every rank, at least one label token; on any device.

        Raises:
            ModelError: The loss is not finite; in every rank alike.
        """
        spec, count = self.spec, batch.num_label_tokens
        rate = learning_rate_at(step, spec.training)
        for group in self._engine.optimizer.param_groups:
            group["lr"] = rate
        self.model.train()
        totals = torch.zeros(2, dtype=torch.float64)
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(derive_seed(spec.seed, "sharded/dropout", round_idx=step, client_id=self.ranks.rank))
            for index in range(spec.num_parts):
                part = self._part(batch, index)
                loss, balance = self._engine(lambda part=part: self._losses(part, count))
                found = self._sum(torch.stack([loss.detach(), balance.detach()]).double()).cpu()
                totals += found
                if not torch.isfinite(found).all():
                    raise ModelError(f"the loss of step {step} is {float(found[0])}", "lower training.learning_rate")
                # DeepSpeed averages over ranks, while the shares of parts and ranks add up.
                self._engine.set_gradient_accumulation_boundary(index == spec.num_parts - 1)
                total = loss + spec.training.router_aux_weight * balance
                self._engine.backward(total * self.ranks.world_size, scale_wrt_gas=False)
        whole_norm = self._norm_of_whole_gradients() if spec.zero_stage == 0 else None
        self._engine.step()
        self.model.eval()
        norm = whole_norm if whole_norm is not None else self._engine.get_global_grad_norm()
        return StepReport(
            step=step,
            loss=float(totals[0]),
            balance=float(totals[1]) if self._balance is not None else math.nan,
            learning_rate=rate,
            grad_norm=float(norm),
            num_tokens=int(batch.attention_mask.sum()),
        )

    def score(self, batch: Batch) -> float:
        """Give the sum of the cross-entropy over a batch's label tokens (nats), from all ranks; the model is left as it is."""
        count, total = batch.num_label_tokens, torch.zeros(1, dtype=torch.float64)
        with torch.no_grad():
            for index in range(self.spec.num_parts):
                part = self._part(batch, index)
                loss, _ = self._engine(lambda part=part: response_loss(self.model, part, count))
                total += self._sum(loss.double().reshape(1)).cpu()
        return float(total) * count

    def save(self, folder: Path, step: int) -> None:
        """Write this rank's files of a checkpoint; those of all ranks, in one folder, make it whole.

        ``state/`` is DeepSpeed's own (PyTorch's pickle format); ``rank-<r>.json`` has the step and a SHA-256 of each file.
        """
        with _without_compiler_warnings():
            self._engine.save_checkpoint(str(folder), tag=_STATE, save_latest=False, exclude_frozen_parameters=True)
        mine = {
            path.relative_to(folder).as_posix(): _digest(path)
            for path in sorted(folder.rglob("*"))
            if path.is_file() and path.suffix == ".pt"
        }
        record = {"step": step, "world_size": self.ranks.world_size, "zero_stage": self.spec.zero_stage, "files": mine}
        (folder / f"rank-{self.ranks.rank}.json").write_text(json.dumps(record, indent=1))

    def load(self, folder: Path) -> int:
        """Take over a checkpoint of as many ranks; give its step.

        DeepSpeed's files are pickles, which can run code: load what you wrote yourself.

        Raises:
            CheckpointError: It is torn, or belongs to another number of ranks or another ZeRO stage.
        """
        step = check_checkpoint(folder, world_size=self.ranks.world_size, zero_stage=self.spec.zero_stage)
        with _without_compiler_warnings():
            self._engine.load_checkpoint(str(folder), tag=_STATE, load_module_strict=False)
        return step

    def weights(self, *, trained_only: bool = False) -> dict[str, torch.Tensor] | None:
        """Give all weights and stored buffers on the CPU in the first rank, ``None`` in the others; tied ones once.

        Every rank must ask. ``trained_only`` leaves out what asked for no gradient, and buffers.
        """
        found: dict[str, torch.Tensor] = {}
        for name, parameter in self.model.named_parameters():
            if trained_only and not parameter.requires_grad:
                continue
            with gathered([parameter]):
                if self.ranks.is_leader:
                    found[name] = parameter.detach().to("cpu", copy=True)
        stored = set(self.model.state_dict())
        for name, buffer in self.model.named_buffers():
            if self.ranks.is_leader and name in stored and not trained_only:
                found[name] = buffer.detach().to("cpu", copy=True)
        return found if self.ranks.is_leader else None

    def close(self) -> None:
        """Let go of DeepSpeed's engine; its hooks leave the model."""
        if self._balance is not None:
            self._balance.close()
        self._engine.destroy()

    def _losses(self, part: Batch, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """This part's share of the batch's mean loss, and of its load-balancing loss."""
        if self._balance is None:
            loss, _ = response_loss(self.model, part, count)
            return loss, torch.zeros_like(loss)
        self._balance.attend(part)
        loss, _ = response_loss(self.model, part, count)
        return loss, self._balance.share() / self.spec.num_parts

    def _part(self, batch: Batch, index: int) -> Batch:
        """This rank's rows in one pass. Every rank makes as many passes: sharded weights come together only when all ask."""
        parts = self.spec.num_parts
        # Ranks side by side in each pass, so that a pass has the same rows however many ranks share it.
        part = part_of_batch(batch, index * self.ranks.world_size + self.ranks.rank, self.ranks.world_size * parts)
        if part is None:
            unlabelled = torch.full_like(batch.labels[:1], IGNORE_INDEX)
            part = Batch(input_ids=batch.input_ids[:1], attention_mask=batch.attention_mask[:1], labels=unlabelled)
        return to_device(part, self.device)

    def _norm_of_whole_gradients(self) -> torch.Tensor:
        """DeepSpeed tells the norm only where it shards."""
        gradients = [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]
        norms = [torch.linalg.vector_norm(gradient.float()) for gradient in gradients]
        whole: torch.Tensor = torch.linalg.vector_norm(torch.stack(norms))
        return whole

    def _sum(self, values: torch.Tensor) -> torch.Tensor:
        total = values.detach().clone()
        if self.ranks.world_size > 1:
            dist.all_reduce(total)
        return total

    def _initialise(self) -> Any:
        import deepspeed  # 3 s and 75 MB that only a rank pays

        spec = self.spec
        config = EngineConfig(
            name="deepspeed",
            world_size=self.ranks.world_size,
            gradient_accumulation_steps=spec.num_parts,
            stage=spec.zero_stage,
        )
        clip = spec.training.max_grad_norm
        settings = deepspeed_settings(config, batch_size=spec.batch_size, dtype=spec.dtype, max_grad_norm=clip)
        groups = [group for group in parameter_groups(self.model, spec.training.weight_decay) if group["params"]]
        optimizer = torch.optim.AdamW(groups, lr=spec.training.learning_rate, betas=spec.training.betas, eps=1e-8)
        if spec.zero_stage == 3:
            let_inputs_require_gradients(self.model)
        with _without_compiler_warnings():
            engine, *_ = deepspeed.initialize(
                model=DeepSpeedRoot(self.model),
                model_parameters=[parameter for group in groups for parameter in group["params"]],
                optimizer=optimizer,
                config=settings,
                dist_init_required=False,
            )
        return engine


def check_checkpoint(folder: Path, *, world_size: int, zero_stage: int) -> int:
    """Check that the files of all ranks are there with the bytes that were written; give the step.

    Raises:
        CheckpointError: They are not, or the checkpoint belongs to another number of ranks or another ZeRO stage.
    """
    steps = set()
    for rank in range(world_size):
        path = folder / f"rank-{rank}.json"
        try:
            record = json.loads(path.read_text())
            steps.add(int(record["step"]))
            made_by = (record["world_size"], record["zero_stage"])
            digests = {name: (_digest(folder / name), digest) for name, digest in record["files"].items()}
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise CheckpointError(f"checkpoint {folder} is not whole: {path.name}: {error}", "go on from an older one") from error
        if made_by != (world_size, zero_stage):
            raise CheckpointError(
                f"checkpoint {folder} was made by {made_by[0]} workers at ZeRO stage {made_by[1]}, these are {world_size} at "
                f"stage {zero_stage}",
                "go on with the same numbers",
            )
        for name, (found, expected) in digests.items():
            if found != expected:
                raise CheckpointError(f"checkpoint file {folder / name} has checksum {found[:12]}, expected {expected[:12]}")
    if len(steps) != 1:
        raise CheckpointError(f"checkpoint {folder} holds files of steps {sorted(steps)}", "go on from an older one")
    return steps.pop()


def _digest(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _without_compiler_warnings() -> Any:
    """DeepSpeed imports PyTorch's compiler, which warns of its own deprecations."""
    return warnings.catch_warnings(action="ignore", category=DeprecationWarning)
