"""What the benchmarks of the round path host instead of a language model: anything with named tensors, under the real round loop.

A hosted object speaks the protocol of ``fedgraft.platform.worker.ClientWorker``; data are prepared folders in fedgraft's own
format, of clients with some examples each. Imported by the benchmarks beside it, which are run as scripts.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import statistics
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, Self, TypeAlias

import numpy as np
import psutil
import torch
from measuring import ray_of_its_own
from safetensors.numpy import save_file

from fedgraft.actors.hosting import Pool, PoolOptions
from fedgraft.actors.local import LocalPool
from fedgraft.actors.pool import RayPool
from fedgraft.data.prepared import MANIFEST_NAME, ClientRows, Manifest, RowRange
from fedgraft.platform.config import EvaluationConfig, FederationConfig
from fedgraft.platform.ledger import describe
from fedgraft.platform.progress import Event
from fedgraft.platform.rounds import RoundLoop
from fedgraft.platform.run_job import RunJob
from fedgraft.platform.tracking import Tracker
from fedgraft.platform.worker import WorkerSpec
from fedgraft.protocols import TrainSpec
from fedgraft.types import (
    SHARED,
    Broadcast,
    ClientTask,
    ClientUpdate,
    EvaluationReply,
    EvaluationTask,
    ModelFacts,
    ParamRef,
    Params,
    ServerState,
    Weighted,
)

__all__ = [
    "FOREVER",
    "Hosted",
    "PeakMemory",
    "Timed",
    "interleaved",
    "job_of",
    "machine",
    "pool_of",
    "print_record",
    "ratio",
    "ray_of_its_own",
    "run_rounds",
    "versions",
    "write_data",
]

MIB = 2**20
Rows: TypeAlias = np.ndarray[Any, Any]
FOREVER = 1_000_000
"""More rounds than any benchmark runs: nothing is judged at the end of a measured part."""


class Hosted(ABC):
    """Speaks a worker's protocol for some tensors; subclasses train.

    Args:
        params: Start values.
        num_examples: Of every client.
    """

    def __init__(self, params: Params, num_examples: int) -> None:
        self._params = params
        self._num_examples = num_examples
        self._groups = dict.fromkeys(params, SHARED)

    def describe(self) -> dict[str, Any]:
        """Facts for the run, as of a model with one MoE layer of one expert."""
        refs = tuple(ParamRef(key=key, name=key, part="other", shape=tuple(value.shape)) for key, value in self._params.items())
        facts = ModelFacts(
            family="none",
            layers=(0,),
            num_experts=1,
            top_k=1,
            hidden_size=1,
            expert_size=1,
            num_layers=1,
            attention=(),
            norm_topk_prob=False,
        )
        return {"groups": self._groups, "refs": refs, "facts": facts, "frozen_hash": "none", "device": "cpu"}

    def initial_params(self) -> Params:
        """Start values."""
        return self._params

    @abstractmethod
    def train(self, task: ClientTask, broadcast: Broadcast) -> tuple[Params, float]:
        """Give a client's deltas and its loss."""

    def update(self, task: ClientTask, broadcast: Broadcast) -> tuple[ClientUpdate, Params]:
        """One client's round."""
        started = time.perf_counter()
        delta, loss = self.train(task, broadcast)
        update = ClientUpdate(
            client_id=task.client_id,
            round_idx=task.round_idx,
            num_examples=self._num_examples,
            num_steps=task.plan.num_steps,
            expert_tokens=torch.zeros(1, 1, dtype=torch.int64),
            metrics={"train_loss": Weighted(total=loss, weight=1.0)},
            payload=describe(delta, self._groups),
            seconds=time.perf_counter() - started,
        )
        return update, delta

    def evaluate(self, task: EvaluationTask, broadcast: Broadcast) -> tuple[EvaluationReply, None]:
        """Nothing is judged."""
        return EvaluationReply(rows=()), None


def write_data(
    folder: Path, num_clients: int, num_examples: int, tokens: Callable[[int], np.ndarray[Any, Any]] | None = None
) -> Path:
    """Write a prepared folder.

    Args:
        folder: Where; a folder is made in it.
        num_clients: Clients, all with ``num_examples`` training examples and one to be judged with.
        num_examples: At least one.
        tokens: Gives a client's training rows, (num_examples, S); without it rows are empty.
    """
    target = folder / f"data-{num_clients}-{num_examples}"
    target.mkdir()
    rows: list[Rows] = []
    clients = []
    for client in range(num_clients):
        first = len(rows)
        own = np.zeros((num_examples, 0), dtype=np.int32) if tokens is None else tokens(client).astype(np.int32)
        rows += [*own, own[0], own[0]]
        spans = [(first, first + num_examples), (first + num_examples, first + num_examples + 1)]
        spans.append((spans[1][1], spans[1][1] + 1))
        train, validation, test = (
            RowRange(start=a, stop=b, num_prompts_cut=0, num_responses_cut=0, histogram={"all": b - a}) for a, b in spans
        )
        clients.append(ClientRows(name=str(client), train=train, validation=validation, test=test))
    offsets = np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.int64)
    save_file(
        {
            "tokens": np.concatenate([*rows, np.zeros(1, dtype=np.int32)]).astype(np.int32),
            "offsets": offsets,
            "response_starts": np.zeros(len(rows), dtype=np.int32),
            "labels": np.zeros(len(rows), dtype=np.int32),
            "texts": np.zeros(0, dtype=np.uint8),
            "text_offsets": np.zeros(len(rows) + 1, dtype=np.int64),
            "answers": np.zeros(0, dtype=np.int64),
        },
        target / "rows.safetensors",
    )
    inputs = {"benchmark": f"{num_clients} clients of {num_examples}"}
    manifest = Manifest(
        fingerprint=hashlib.sha256(json.dumps(inputs).encode()).hexdigest(),
        inputs=inputs,
        source="made up",
        tensor_file="rows.safetensors",
        labels=("all",),
        clients=tuple(clients),
        retention=None,
        questions=None,
        num_choices=0,
        num_unused=0,
        num_skipped=0,
    )
    (target / MANIFEST_NAME).write_text(manifest.model_dump_json())
    return target


def job_of(
    folder: Path,
    data: Path,
    spec_class: type[WorkerSpec],
    *,
    num_clients: int,
    cohort: int,
    checkpoint_every: int = FOREVER,
    **more: Any,
) -> RunJob:
    """A run of FedAvg that is never judged: what ``spec_class.build`` makes is hosted."""
    fields: dict[str, Any] = {
        "base_folder": data,
        "data_folder": data,
        "state_folder": folder / "clients",
        "method": {"name": "fedavg"},
        "method_files": (),
        "run_seed": 0,
        "batch_size": 1,
        "train": TrainSpec(learning_rate=0.1),
    }
    return RunJob(
        label="benchmark",
        purpose="run",
        folder=folder,
        worker=spec_class(**(fields | more)),
        learning_rate=0.1,
        rounds=FOREVER,
        num_clients=num_clients,
        federation=FederationConfig(rounds=FOREVER, cohort_size=cohort, local_steps=1),
        evaluation=EvaluationConfig(every=FOREVER, at_start=False, generate="never", choices="never"),
        checkpoint_every=checkpoint_every,
    )


@dataclass
class Timed:
    """A run that goes on by parts; ``ends`` are the times (``time.perf_counter``) at which rounds had been recorded."""

    job: RunJob
    pool: Pool
    tracker: Tracker = field(default_factory=lambda: Tracker(None, "", None))
    ends: list[float] = field(default_factory=list)
    cpu_ends: list[float] = field(default_factory=list)

    @property
    def cpu(self) -> list[float]:
        """processor seconds of this thread for each round but the first of the last part."""
        return [after - before for before, after in zip(self.cpu_ends, self.cpu_ends[1:], strict=False)]

    def note(self, event: Event) -> None:
        """Take the time of a round's event."""
        if event.kind == "round":
            self.ends.append(time.perf_counter())
            self.cpu_ends.append(time.thread_time())


def run_rounds(timed: Timed, until: int) -> tuple[ServerState, list[float]]:
    """Run a job up to a round; gives the state and the seconds of its rounds but the first of this part."""
    timed.ends.clear()
    timed.cpu_ends.clear()
    loop = RoundLoop(timed.job, timed.pool, tracker=timed.tracker, emit=timed.note, is_stopping=lambda: False)
    state = loop.run(until)
    return state, [after - before for before, after in zip(timed.ends, timed.ends[1:], strict=False)]


def pool_of(replicas: int) -> Pool:
    """A pool of actors, or this process for 0."""
    return RayPool(PoolOptions(replicas=replicas)) if replicas else LocalPool(PoolOptions(replicas=1))


def interleaved(parts: dict[str, Callable[[], float]], repeats: int) -> dict[str, dict[str, Any]]:
    """Call every part in turn, ``repeats`` times; gives median and all values by name: what else runs hits all of them alike."""
    found: dict[str, list[float]] = {name: [] for name in parts}
    for _ in range(repeats):
        for name, part in parts.items():
            found[name].append(part())
    return {name: {"median": statistics.median(values), "all": values} for name, values in found.items()}


def ratio(found: dict[str, dict[str, Any]], name: str, base: str) -> float:
    """Median of the ratios of two parts of ``interleaved``, turn by turn: what slows one turn slows both."""
    pairs = zip(found[name]["all"], found[base]["all"], strict=True)
    return round(statistics.median(value / other for value, other in pairs), 3)


class PeakMemory:
    """The most private memory (USS), MiB, that this process took while this was open; a thread looks every ``every_s``."""

    def __init__(self, every_s: float = 0.05) -> None:
        self.private = 0.0
        self._every_s = every_s
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *raised: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        own = psutil.Process()
        while True:
            self.private = max(self.private, own.memory_full_info().uss / MIB)
            if self._ended.wait(self._every_s):
                return


def machine() -> str:
    """This machine in words."""
    return f"{psutil.cpu_count()} cores, {psutil.virtual_memory().total / 2**30:.0f} GiB, {platform.machine()}"


def versions(*names: str) -> dict[str, str]:
    """Versions of packages."""
    return {name: metadata.version(name) for name in names}


def print_record(parser: argparse.ArgumentParser, run: Callable[..., dict[str, Any]]) -> None:
    """Run a benchmark with the options given, print its JSON line, and keep it where ``--out`` says."""
    parser.add_argument("--out", type=Path)
    given = vars(parser.parse_args())
    out = given.pop("out")
    record = json.dumps(run(**given))
    if out is not None:
        out.write_text(record + "\n")
    print(record)
