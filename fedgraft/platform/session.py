"""One client's view of its replica while it is hosted: its data, its seeds, its private state."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from fedgraft.data.batches import eval_batches, train_batches
from fedgraft.data.prepared import PreparedData, TokenizedSplit
from fedgraft.errors import UpdateError
from fedgraft.protocols import Engine
from fedgraft.seeding import derive_seed
from fedgraft.types import Batch, Broadcast, ClientTask, EvaluationTask, Group, Params

__all__ = ["ClientSession"]

_CALIBRATION_BATCH = 16


class ClientSession:
    """One client on this replica for one task; see ``fedgraft.protocols.Session``.

    Args:
        task: What it is to do.
        client_id: Which client.
        broadcast: What the server sent to all.
        engine: The replica's, all slots loaded by the worker.
        groups: Group of each slot.
        data: All clients' tokens.
        pad_token_id: Fills short rows.
        run_seed: Every seed of the session derives from it.
        batch_size: Examples of a local step.
    """

    def __init__(
        self,
        task: ClientTask | EvaluationTask,
        client_id: int,
        broadcast: Broadcast,
        *,
        engine: Engine,
        groups: Mapping[str, Group],
        data: PreparedData,
        pad_token_id: int,
        run_seed: int,
        batch_size: int,
    ) -> None:
        self._client_id = client_id
        self._data = data
        self._pad_token_id = pad_token_id
        self._run_seed = run_seed
        self._batch_size = batch_size
        self.engine = engine
        self.task = task
        self.private: Params = {}
        self.diagnostics: dict[str, Any] = {}
        self._broadcast = broadcast
        self.requested: dict[str, str] = {}
        self.received: Params = {key: broadcast.params[task.addresses.get(key, key)] for key in task.keys}
        self.received_extras: Params = {key: broadcast.extras[key] for key in task.extra_keys} | task.extras
        self.groups = groups
        self.scratch: dict[str, Any] = {}

    def add_requested(self, wanted: Mapping[str, str]) -> None:
        """Take what this client asked for out of the broadcast: slots by the server's names.

        Raises:
            UpdateError: The server has no tensor of such a name, or, in training, two slots would hold the same one.
        """
        unknown = [name for name in wanted.values() if name not in self._broadcast.params]
        if unknown:
            raise UpdateError(f"client {self._client_id} asked for {', '.join(unknown[:3])}, which the server does not have")
        if isinstance(self.task, ClientTask):
            held = {key: self.task.addresses.get(key, key) for key in self.task.keys} | dict(wanted)
            twice = sorted(name for name, count in Counter(held.values()).items() if count > 1)
            if twice:
                raise UpdateError(
                    f"client {self._client_id} asked for {', '.join(twice[:3])} in two slots",
                    "what a client holds twice would count twice in the sum",
                )
        self.requested = dict(wanted)
        self.received |= {key: self._broadcast.params[name] for key, name in wanted.items()}

    @property
    def _train(self) -> TokenizedSplit:
        return self._data.split(self._client_id, "train")

    @property
    def num_train_examples(self) -> int:
        """Examples in this client's training split."""
        return len(self._train)

    def seed(self, purpose: str) -> int:
        """A seed for this purpose, client and round."""
        return derive_seed(self._run_seed, purpose, round_idx=self.task.round_idx, client_id=self._client_id)

    def setup_seed(self, purpose: str) -> int:
        """A seed for this purpose and client, the same in every round."""
        return derive_seed(self._run_seed, purpose, client_id=self._client_id)

    def train_batches(self) -> Iterator[Batch]:
        """The batches of this round's local steps."""
        assert isinstance(self.task, ClientTask)
        return train_batches(
            self._train,
            self.task.plan.num_steps,
            self._batch_size,
            self.seed("batches"),
            self._pad_token_id,
        )

    def calibration_batches(self, num_examples: int) -> list[Batch]:
        """Some of the client's training examples, the same ones in every round."""
        # eval_batches sorts by length, so the examples are drawn first, in an order that depends on nothing but the seed.
        generator = torch.Generator().manual_seed(self.setup_seed("calibration"))
        chosen = torch.randperm(len(self._train), generator=generator)[:num_examples].sort().values.tolist()
        return [
            self._train.batch(chosen[start : start + _CALIBRATION_BATCH], self._pad_token_id)
            for start in range(0, len(chosen), _CALIBRATION_BATCH)
        ]

    def validation_batches(self, num_examples: int | None = None) -> list[Batch]:
        """The client's validation examples, or the first ones of them."""
        split = self._data.split(self._client_id, "validation")
        return list(eval_batches(split, _CALIBRATION_BATCH, self._pad_token_id, num_examples))

    def retention_batches(self, num_examples: int) -> list[Batch]:
        """Some of the held-out general set."""
        retention = self._data.retention
        if retention is None:
            return []
        return list(eval_batches(retention, _CALIBRATION_BATCH, self._pad_token_id, num_examples))
