"""One pass over an experiment's folder: base, data, references, replicas, rate searches, runs, records.

A whole experiment is run at one go; a trial of a sweep is the same, brought from rung to rung.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from fedgraft.actors.hosting import JobContext, Pool, PoolOptions
from fedgraft.actors.places import places_by_node
from fedgraft.data.prepare import prepare
from fedgraft.data.prepared import MANIFEST_NAME, PreparedData
from fedgraft.data.tokenise import load_tokenizer
from fedgraft.errors import (
    ConfigError,
    ModelError,
    Problem,
    QuorumError,
    RunInterrupted,
    StorageError,
)
from fedgraft.moe.base import cache_base
from fedgraft.platform.budget_sizes import run_budgets
from fedgraft.platform.bundled_model import ensure_bundled_model
from fedgraft.platform.cache_folder import default_cache
from fedgraft.platform.config import RunConfig
from fedgraft.platform.loading import load_config
from fedgraft.platform.mirror import Mirror
from fedgraft.platform.node_files import Origin, put_folder
from fedgraft.platform.plan import make_plan, this_machine
from fedgraft.platform.progress import Event
from fedgraft.platform.remote import RemoteFolder
from fedgraft.platform.results import read_comparison
from fedgraft.platform.rounds import RoundLoop
from fedgraft.platform.run_folder import RunFolder, write_json
from fedgraft.platform.run_job import RunJob
from fedgraft.platform.run_record import begin_record, describe_model
from fedgraft.platform.run_tags import run_params, run_tags
from fedgraft.platform.storage import is_disk_full, storage_error
from fedgraft.platform.tracking import Tracker, TrackingConfig
from fedgraft.platform.worker import WorkerSpec
from fedgraft.protocols import MethodConfig
from fedgraft.registry import METHODS
from fedgraft.tuning.locks import hold
from fedgraft.tuning.rates import choose_rate, read_choice, validation_loss
from fedgraft.tuning.references import Reference, train_reference
from fedgraft.tuning.shared_data import shared_data
from fedgraft.types import Budget

__all__ = ["Execution", "Outer", "experiment_store", "pool_options"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Outer:
    """The sweep that an experiment is a trial of.

    ``mlflow_run_id`` is the sweep's run, the parent of all; ``name`` and ``trial`` name sweep and trial in MLflow; ``data`` is
    the folder of prepared data that the trials share; ``known`` are bases that this process has opened, by source and dtype.
    """

    mlflow_run_id: str | None
    name: str
    trial: str
    data: Path
    known: dict[tuple[str, str], tuple[Path, dict[str, Any]]]


def experiment_store(config: RunConfig, folder: Path) -> RemoteFolder | None:
    """Where an experiment is kept a second time: in the store, under its folder's name; ``None`` without a store."""
    return None if config.output.storage is None else RemoteFolder(config.output.storage).child(folder.name)


def pool_options(config: RunConfig, replicas: int, *, in_group: bool = False) -> PoolOptions:
    """How a run's replicas are made."""
    return PoolOptions(
        replicas=replicas,
        ranks=config.engine.world_size,
        threads=config.executor.threads,
        gpus_per_replica=config.executor.gpus,
        max_failures=config.federation.max_failures,
        task_timeout_s=config.federation.task_timeout_s,
        start_timeout_s=config.executor.start_timeout_s,
        rank_grace_s=config.executor.rank_grace_s,
        heartbeat_timeout_s=config.executor.heartbeat_s,
        in_group=in_group,
        placement=config.executor.placement,
    )


class Execution:
    """One pass over an experiment's folder: to its end (``run``), or rung by rung (``open``, ``advance``, ``close``).

    Args:
        folder: Of the experiment; holds ``config.yaml``.
        context: Gives the pool, takes events.
        outer: The sweep that it is a trial of, if it is one.
    """

    def __init__(self, folder: Path, context: JobContext, outer: Outer | None = None) -> None:
        self._folder = folder
        self._context = context
        self._outer = outer
        self._config = load_config(folder / "config.yaml")
        self._methods = self._config.methods()
        self._cache = self._config.output.cache or default_cache()
        self._model: dict[str, Any] = {}
        self._references: dict[tuple[str, int], Reference] = {}
        self._data: dict[int, Path] = {}
        self._trackers: dict[tuple[str, int], Tracker] = {}
        self._parent: Tracker | None = None
        self._pool: Pool | None = None
        self._started = time.time()
        self.train_seconds = 0.0
        self._remote = experiment_store(self._config, folder)
        self._mirror = Mirror(folder, self._remote) if self._remote is not None else None
        previous = folder / "comparison.json"
        self._mlflow_run_id = json.loads(previous.read_text()).get("mlflow_run_id") if previous.is_file() else None

    def run(self) -> None:
        """Run what is left; however it ends, ``comparison.json`` says so, unless the disk is full.

        Raises:
            StorageError: A disk is full, whoever met it.
        """
        try:
            self.open()
            self.advance()
            self.finish()
        except Exception as error:
            with _kept_going("comparison.json"):
                self.fail(error)
                self._keep(is_end=True)
            if isinstance(error, OSError) and is_disk_full(error):
                raise storage_error(Path(error.filename or self._folder / "comparison.json"), error) from error
            raise
        finally:
            self.close()

    def open(self) -> None:
        """Get everything ready that runs need: base, data, references, replicas, the parent in MLflow."""
        config = self._config
        self._write_comparison("running")
        self._base_folder = self._base()
        tokenizer = load_tokenizer(self._base_folder)
        for seed in config.seeds:
            self._stage("preparing the data")
            if self._outer is not None:
                self._data[seed] = shared_data(config.data, tokenizer, seed, self._outer.data)
            else:
                self._data[seed] = self._folder / "data" / f"seed-{seed}"
                prepare(config.data, tokenizer, seed, self._data[seed])
        self._put_inputs()
        first = PreparedData.open(self._data[config.seeds[0]])
        self._check_clients(first.num_clients)
        self._train_references(first.num_clients, self._base_folder, self._data)
        options = pool_options(config, self._num_replicas(first.num_clients), in_group=self._outer is not None)
        self._pool = self._context.open_pool(
            options,
            lambda text: self._emit("note", text=text),
        )
        self._emit("plan", total_rounds=self._total_rounds())
        self._stage(f"starting {self._pool.size} replica{'s' if self._pool.size != 1 else ''}")
        if self._outer is None:
            self._parent = self._tracker(
                config.name, run_params(config), run_tags(config, "experiment", self._folder), known=self._mlflow_run_id
            )
            self._mlflow_run_id = self._parent.run_id
        else:
            self._mlflow_run_id = self._outer.mlflow_run_id
        self._write_comparison("running")

    def advance(self, until: int | None = None) -> None:
        """Bring every run to its end, or up to round ``until`` where that comes first; what is there is not done again."""
        assert self._pool is not None, "open() comes first"
        for label, method in self._methods.items():
            for seed in self._config.seeds:
                self._stop_if_asked()
                reference = self._references.get((label, seed))
                if reference is not None:
                    rate = reference.learning_rate
                else:
                    rate = self._search(self._pool, label, method, seed, self._base_folder, self._data[seed])
                self._run(self._pool, label, method, seed, rate, until)

    def finish(self) -> None:
        """Say that all runs are finished, and write the report."""
        self._write_comparison("finished", seconds=time.time() - self._started)
        artifacts = [self._folder / "config.yaml", self._folder / "comparison.json"]
        if self._config.output.report:
            from fedgraft.platform.report import write_report  # Matplotlib takes a second to import

            self._stage("writing the report")
            result = read_comparison(self._folder)
            artifacts.append(write_report(result, self._folder / "report.html"))
        if self._parent is not None:
            self._parent.finish("finished", artifacts)
        self._keep(is_end=True)

    def fail(self, error: Exception) -> None:
        """Say how far it came where an error ended it."""
        status = "stopped" if isinstance(error, RunInterrupted) else "failed"
        self._write_comparison(status)
        if self._parent is not None:
            self._parent.finish(status)

    def _put_inputs(self) -> None:
        """Put what nodes need into the store, before replicas ask for it."""
        if self._remote is None:
            return
        self._stage(f"putting base and data into {self._remote}")
        put_folder(self._base_folder, self._base_store(), "base.json")
        for folder in self._data.values():
            put_folder(folder, self._data_store(folder), MANIFEST_NAME)
        for idx, path in enumerate(self._config.method_files):
            self._method_store().upload(path, f"{idx:03d}/{path.name}")
        self._keep()

    def _base_store(self) -> RemoteFolder:
        """Bases are shared by all experiments of a store."""
        return RemoteFolder(self._config.output.storage or "").child("bases", self._base_folder.name)

    def _data_store(self, folder: Path) -> RemoteFolder:
        return RemoteFolder(self._config.output.storage or "").child("data", PreparedData.open(folder).fingerprint[:16])

    def _method_store(self) -> RemoteFolder:
        return RemoteFolder(self._config.output.storage or "").child("methods", self._folder.name)

    def _origin(self, data: Path) -> Origin | None:
        if self._remote is None:
            return None
        return Origin(
            base=self._base_store(),
            data=self._data_store(data),
            method_files=self._method_store(),
            cache=self._config.output.cache,
        )

    def _keep(self, *, is_end: bool = False) -> None:
        """Bring the copy in the store up to date; at the end the folder gets the clients' states, so that it is whole."""
        if self._mirror is not None:
            self._mirror.put()
            if is_end:
                self._mirror.get_private()

    def close(self) -> None:
        """Give the replicas back."""
        if self._pool is not None:
            self._pool.close()
            self._pool = None

    def _train_references(self, num_clients: int, base: Path, data: Mapping[int, Path]) -> None:
        """Train what is centralised before replicas take the cores."""
        for label, method in self._methods.items():
            if not METHODS.get(method.name).is_centralised:
                continue
            for seed in self._config.seeds:
                self._stop_if_asked()
                folder = self._folder / label / f"seed-{seed}"
                if RunFolder(folder).read_info().get("status") == "finished":
                    continue
                self._stage(f"training {label} on the examples of all clients")
                rate = self._config.training.learning_rate
                job = self._job(label, method, seed, rate, folder, base, data[seed], purpose="run", rounds=0)
                self._references[label, seed] = train_reference(
                    self._config,
                    label,
                    job.worker,
                    num_clients=num_clients,
                    folder=folder,
                    search_folder=self._search_folder(label, seed),
                    on_progress=partial(self._note_progress, label),
                    is_stopping=self._context.is_stopping,
                )

    def _note_progress(self, label: str, step: int, total: int, rate: float) -> None:
        if step == total or step % max(1, total // 4) == 0:
            self._stage(f"{label}: step {step} of {total}, learning rate {rate:g}")

    def _check_clients(self, num_clients: int) -> None:
        wanted = self._config.federation.min_clients
        if wanted > num_clients:
            problem = Problem(
                path="federation.min_clients", value=str(wanted), expected=f"at most {num_clients}, the number of clients"
            )
            raise ConfigError(str(self._folder / "config.yaml"), (problem,))

    def _num_replicas(self, num_clients: int) -> int:
        """As the plan says, which a dry run shows, or as many as a cluster's nodes hold; never more than clients of a round."""
        methods = make_plan(self._config, this_machine()).methods
        planned = min(method.replicas for method in methods)
        if self._config.executor.replicas is not None:
            return planned
        if self._config.executor.kind == "ray" and self._outer is None:
            own = max(method.need.rank.host for method in methods)
            held = places_by_node(pool_options(self._config, 1), own, max(method.need.rank.shared for method in methods))
            planned = planned if held is None else held
        return max(1, min(planned, self._config.federation.cohort_size or num_clients, num_clients))

    def _base(self) -> Path:
        if self._outer is None:
            return self._open_base()
        known, model = self._outer.known, self._config.model
        key = (model.source, model.dtype)
        if key not in known:
            # Trials that start side by side on a node: one of them fetches and writes, the others find it there.
            with hold(self._cache / "bases" / f".{hashlib.sha256(repr(key).encode()).hexdigest()[:16]}.lock"):
                known[key] = (self._open_base(), self._model)
        folder, self._model = known[key]
        return folder

    def _open_base(self) -> Path:
        config = self._config
        source = config.model.source
        if config.model.is_bundled:
            self._stage("pre-training the bundled model (once on this machine)")
            source = str(
                ensure_bundled_model(
                    self._cache,
                    self._on_pretrain,
                )
            )
        self._stage("opening the base model")
        self._model = describe_model(
            source,
            name="the bundled model" if config.model.is_bundled else source,
            trusts_remote_code=config.model.trust_remote_code,
        )
        return cache_base(source, config.model.dtype, self._cache / "bases", trusts_remote_code=config.model.trust_remote_code)

    def _on_pretrain(self, step: int, total: int, loss: float) -> None:
        self._stop_if_asked()
        self._emit("pretrain", step=step, num_steps=total, loss=loss)

    def _stop_if_asked(self) -> None:
        if self._context.is_stopping():
            raise RunInterrupted("stopped between two runs", "it can be resumed")

    def _search(self, pool: Pool, label: str, method: MethodConfig, seed: int, base: Path, data: Path) -> float:
        """Choose a method's learning rate for a seed.

        Every seed has splits of its own, so each chooses by its own validation examples: another seed's may be its test ones.
        """
        search = self._config.rate_search
        if search is None or METHODS.build(method).num_rounds(self._config.federation.rounds) == 0:
            return self._config.training.learning_rate
        rounds = search.rounds

        def try_rate(rate: float, folder: Path) -> float | None:
            self._stop_if_asked()
            job = self._job(label, method, seed, rate, folder, base, data, purpose="search", rounds=rounds)
            return self._try(pool, job, method, seed)

        found = choose_rate(label, search, self._search_folder(label, seed), try_rate)
        self._write_comparison("running")
        if found["is_edge"]:
            self._emit("note", label, text=f"the best learning rate {found['chosen']:g} is at the edge of the grid")
        return float(found["chosen"])

    def _search_folder(self, label: str, seed: int) -> Path:
        return self._folder / "search" / label / f"seed-{seed}"

    def _try(self, pool: Pool, job: RunJob, method: MethodConfig, seed: int) -> float | None:
        """Train with one rate of a search; a try that is over is not made again."""
        record, rate = RunFolder(job.folder), job.learning_rate
        if record.read_info().get("status") != "finished":
            self._emit("run_started", job.label, seed=seed, rounds=job.rounds, learning_rate=rate, purpose="search")
            self._begin_record(job, method, seed)
            error = None
            try:
                self._loop(job, pool, Tracker.start(TrackingConfig(enabled=False), self._folder, job.label, {})).run()
            except (QuorumError, ModelError) as raised:
                error = raised.message
                self._emit("note", job.label, text=f"learning rate {rate:g} is out: {error}")
            record.write_info(status="finished", error=error)
            for part in ("clients", "checkpoints"):
                shutil.rmtree(job.folder / part, ignore_errors=True)
            if isinstance(job.worker.state_folder, RemoteFolder):
                for name in job.worker.state_folder.names():
                    job.worker.state_folder.delete(name)
        return None if record.read_info().get("error") else validation_loss(job.folder)

    def _run(self, pool: Pool, label: str, method: MethodConfig, seed: int, rate: float, until: int | None) -> None:
        """Go on with one run, to its end or up to a round; a run that is over is left alone."""
        folder = self._folder / label / f"seed-{seed}"
        known = RunFolder(folder).read_info()
        if known.get("status") == "finished":
            return
        started = time.time()
        rounds = METHODS.build(method).num_rounds(self._config.federation.rounds)
        self._emit("run_started", label, seed=seed, rounds=rounds, learning_rate=rate, purpose="run")
        job = self._job(label, method, seed, rate, folder, self._base_folder, self._data[seed], purpose="run", rounds=rounds)
        reference = self._references.get((label, seed))
        if reference is not None:
            job = replace(job, start=reference.start)
        self._begin_record(job, method, seed)
        tracker = self._run_tracker(label, method, seed, rate, folder)
        loop = self._loop(job, pool, tracker)
        status, message = "stopped", ""  # what no except clause sees: a second Ctrl-C
        is_over = until is None or until >= rounds
        try:
            loop.run(until)
            status = "finished" if is_over else "stopped"
        except Exception as error:
            status, message = "stopped" if isinstance(error, RunInterrupted) else "failed", str(error)
            tracker.finish(status)
            raise
        finally:
            took = time.time() - started
            self.train_seconds += took - loop.hosting_s
            seconds = float(known.get("seconds", 0.0)) + took
            with _kept_going("run.json") if message else contextlib.nullcontext():
                RunFolder(folder).write_info(status=status, seconds=seconds, error=message or None)
        if not is_over:
            self._write_comparison("stopped")
            return
        tracker.finish("finished", RunFolder(folder).records())
        self._write_comparison("running")
        self._emit("run_finished", label, folder=str(folder), seconds=seconds)

    def _run_tracker(self, label: str, method: MethodConfig, seed: int, rate: float, folder: Path) -> Tracker:
        """The MLflow run of a method and seed: one, however often it is stopped and goes on."""
        if (label, seed) not in self._trackers:
            known = RunFolder(folder).read_info().get("mlflow_run_id")
            name, more = f"{label}/seed-{seed}", {}
            if self._outer is not None:
                name = f"{self._outer.trial}/{name}"
                more = {"sweep": self._outer.name, "trial": self._outer.trial}
            tracker = self._tracker(
                name,
                run_params(self._config, method=method, seed=seed, rate=rate),
                run_tags(self._config, "run", folder, label=label, method=method, seed=seed, more=more),
                known=known,
                parent=self._mlflow_run_id,
            )
            RunFolder(folder).write_info(mlflow_run_id=tracker.run_id)
            self._trackers[label, seed] = tracker
        return self._trackers[label, seed]

    def _job(
        self,
        label: str,
        method: MethodConfig,
        seed: int,
        rate: float,
        folder: Path,
        base: Path,
        data: Path,
        *,
        purpose: Any,
        rounds: int,
    ) -> RunJob:
        config = self._config
        training = config.training
        evaluation = config.evaluation
        if purpose == "search":
            evaluation = evaluation.model_copy(update={"every": max(rounds, 1), "at_start": False})
        worker = WorkerSpec(
            base_folder=base,
            data_folder=data,
            state_folder=self._state_folder(folder),
            method=method.to_options(),
            method_files=tuple(path.resolve() for path in config.method_files),
            run_seed=seed,
            batch_size=config.federation.batch_size,
            train=replace(training.spec(), learning_rate=rate),
            dtype=config.model.dtype,
            engine=config.resolved_engine(),
            timeout_s=config.federation.task_timeout_s,
            threads=config.executor.threads,
            evaluation_batch_size=evaluation.batch_size,
            max_new_tokens=evaluation.max_new_tokens,
            max_generate=evaluation.max_generate,
            origin=self._origin(data),
        )
        return RunJob(
            label=label,
            purpose=purpose,
            folder=folder,
            worker=worker,
            learning_rate=rate,
            rounds=rounds,
            num_clients=PreparedData.open(data).num_clients,
            federation=config.federation,
            evaluation=evaluation,
            checkpoint_every=rounds if purpose == "search" else config.output.checkpoint_every,
            budgets=self._budgets(label, method, seed, PreparedData.open(data).num_clients),
        )

    def _budgets(self, label: str, method: MethodConfig, seed: int, num_clients: int) -> tuple[Budget, ...]:
        source = str(self._folder / "config.yaml")
        return run_budgets(self._config, method, seed=seed, num_clients=num_clients, label=label, source=source)

    def _loop(self, job: RunJob, pool: Pool, tracker: Tracker) -> RoundLoop:
        return RoundLoop(
            job,
            pool,
            tracker=tracker,
            emit=self._context.emit,
            is_stopping=self._context.is_stopping,
            on_checkpoint=self._keep,
        )

    def _state_folder(self, folder: Path) -> Path | RemoteFolder:
        local = RunFolder(folder).state_folder
        return local if self._remote is None else self._remote.child(str(PurePosixPath(local.relative_to(self._folder))))

    def _begin_record(self, job: RunJob, method: MethodConfig, seed: int) -> None:
        begin_record(
            job.folder,
            run_id=f"{self._folder.name}/{job.folder.relative_to(self._folder)}",
            label=job.label,
            method=method,
            seed=seed,
            rate=job.learning_rate,
            model=self._model,
            data=PreparedData.open(job.worker.data_folder),
            config=self._folder / "config.yaml",
        )

    def _write_comparison(self, status: str, **more: Any) -> None:
        """Write what the report reads: labels, runs, chosen rates."""
        config = self._config
        searches = {}
        for label in self._methods:
            by_seed = {seed: found for seed in config.seeds if (found := read_choice(self._search_folder(label, seed)))}
            if by_seed:
                chosen = {str(seed): found["chosen"] for seed, found in by_seed.items()}
                searches[label] = next(iter(by_seed.values())) | {"chosen_by_seed": chosen}
        runs = {
            label: [
                f"{label}/seed-{seed}" for seed in config.seeds if (self._folder / label / f"seed-{seed}" / "run.json").is_file()
            ]
            for label in self._methods
        }
        write_json(
            {
                "labels": list(self._methods),
                "base": next((label for label, method in self._methods.items() if method.name == "base"), None),
                "runs": runs,
                "rate_search": searches,
                "seeds": list(config.seeds),
                "status": status,
                "mlflow_run_id": self._mlflow_run_id,
                **more,
            },
            self._folder / "comparison.json",
        )

    def _tracker(
        self,
        name: str,
        params: Mapping[str, object],
        tags: Mapping[str, str],
        *,
        known: str | None,
        parent: str | None = None,
    ) -> Tracker:
        """Start an MLflow run, or go on with the one that the folder remembers."""
        return Tracker.start(
            self._config.tracking,
            self._config.output.folder.resolve(),
            name,
            params,
            tags,
            parent_run_id=parent,
            run_id=known,
        )

    def _total_rounds(self) -> int:
        config = self._config
        total = 0
        for method in self._methods.values():
            rounds = METHODS.build(method).num_rounds(config.federation.rounds)
            total += rounds * len(config.seeds)
            if rounds and config.rate_search is not None:
                total += config.rate_search.rounds * len(config.rate_search.rates) * len(config.seeds)
        return total

    def _stage(self, text: str) -> None:
        self._emit("stage", text=text)

    def _emit(self, kind: str, label: str = "", **data: object) -> None:
        self._context.emit(Event(kind=kind, label=label, data=data))


@contextlib.contextmanager
def _kept_going(name: str) -> Iterator[None]:
    """While an error is on its way out, a status that cannot be written is said in the log: it must not hide that error."""
    try:
        yield
    except StorageError as error:
        _log.warning("how the run ended is not noted in %s: %s", name, error.message)
