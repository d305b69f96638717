"""What workers train: a job builds the model and gives the batches; ``ray_train`` runs any job on the ranks of a TorchTrainer."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from fedgraft.errors import ModelError
from fedgraft.platform.pretraining.sequences import Sequences, batch_of_rows, rows_of_step
from fedgraft.seeding import derive_seed
from fedgraft.training.sharded import ShardedSpec
from fedgraft.types import Batch

__all__ = ["PretrainJob", "TrainingJob"]


class TrainingJob(Protocol):
    """Something to train with the shared loop. It travels to every worker, so it holds paths and numbers, no tensors."""

    @property
    def spec(self) -> ShardedSpec:
        """How to train."""
        ...

    @property
    def keeps_trained_only(self) -> bool:
        """Whether ``finish`` gets only the weights that were trained."""
        ...

    def open(self) -> None:
        """Open files, once in each worker, before anything else is asked."""
        ...

    def build(self) -> nn.Module:
        """Give the model on the CPU, the same in every worker; what asks for a gradient is trained."""
        ...

    def batch(self, step: int) -> Batch:
        """Give all workers' rows of a step, from 1; a pure function of the step."""
        ...

    def held_out(self) -> Iterator[Batch]:
        """Give what the model is judged on at the end; may be nothing."""
        ...

    def finish(self, weights: dict[str, torch.Tensor]) -> None:
        """Store the trained weights; called in the first worker only."""
        ...


@dataclass(slots=True)
class PretrainJob:
    """Pre-training of a whole model on packed sequences.

    ``folder`` has ``config.json``, ``tokenizer/`` and ``sequences.safetensors``; the model is written to ``target``.
    """

    spec: ShardedSpec
    folder: Path
    target: Path
    _sequences: Sequences | None = None
    keeps_trained_only = False

    def open(self) -> None:
        """Read the sequences."""
        self._sequences = Sequences.load(self.folder / "sequences.safetensors")

    def build(self) -> nn.Module:
        """Give the model with its start weights, in float32."""
        config = AutoConfig.from_pretrained(self.folder, trust_remote_code=False)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(self.spec.seed, "pretrain/init"))
            model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        return model

    def batch(self, step: int) -> Batch:
        """Give the packed rows of a step."""
        found = self._opened()
        return batch_of_rows(found.rows[rows_of_step(step, self.spec.batch_size, found.num_train, self.spec.seed)])

    def held_out(self) -> Iterator[Batch]:
        """Give the held-out rows, batch by batch."""
        found = self._opened()
        for start in range(found.num_train, len(found.rows), self.spec.batch_size):
            yield batch_of_rows(found.rows[start : start + self.spec.batch_size])

    def finish(self, weights: dict[str, torch.Tensor]) -> None:
        """Write a Hugging Face folder: configuration, weights, tokenizer."""
        config = AutoConfig.from_pretrained(self.folder, trust_remote_code=False)
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, self.spec.dtype))
        lost = model.load_state_dict(weights, strict=False).missing_keys
        model.tie_weights()
        tied = {name for name, _ in model.named_parameters(remove_duplicate=False)} - dict(model.named_parameters()).keys()
        if set(lost) - tied:
            raise ModelError(f"the trained weights lack {', '.join(sorted(set(lost) - tied)[:3])}")
        if not all(math.isfinite(float(parameter.detach().float().sum())) for parameter in model.parameters()):
            raise ModelError("the trained weights are not finite", "lower training.learning_rate")
        transformers_logging.disable_progress_bar()
        model.save_pretrained(self.target)
        AutoTokenizer.from_pretrained(self.folder / "tokenizer", trust_remote_code=False).save_pretrained(self.target)

    def _opened(self) -> Sequences:
        assert self._sequences is not None, "open() comes first"
        return self._sequences

    def __getstate__(self) -> Any:
        return (self.spec, self.folder, self.target)

    def __setstate__(self, state: Any) -> None:
        self.spec, self.folder, self.target = state
        self._sequences = None
