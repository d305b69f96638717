"""An experiment: one or several methods on the same clients, rounds, steps and seeds, each at its own learning rate.

A learning rate is chosen per method from one grid, by the mean NLL of the personal models on the clients' validation splits; the
test split is never looked at. One rate for all methods misleads: where LoRA is best, full-expert training breaks down.

    <output.folder>/<name>-<time>/
        config.yaml  comparison.json  report.html
        data/seed-0/                  tokenised examples
        <label>/seed-0/               one run; see ``fedgraft.platform.run_folder``
        search/<label>/seed-0/lr-0.003/   one try of a rate
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from fedgraft.actors.hosting import JobContext
from fedgraft.actors.places import check_places
from fedgraft.errors import (
    CheckpointError,
    ClusterError,
    ConfigError,
    FedgraftError,
    Problem,
    QuorumError,
    RunInterrupted,
    StorageError,
)
from fedgraft.platform.config import RunConfig
from fedgraft.platform.fitting import is_cluster
from fedgraft.platform.launch import cluster, cluster_gpus, is_joined, is_of_job, launch
from fedgraft.platform.leftovers import remove_leftovers
from fedgraft.platform.loading import dump_config, load_config
from fedgraft.platform.mirror import Mirror, fetch_experiment
from fedgraft.platform.plan import make_plan, this_machine
from fedgraft.platform.progress import Event
from fedgraft.platform.remote import RemoteFolder, is_uri
from fedgraft.platform.results import ComparisonResult, RunResult, read_comparison
from fedgraft.platform.storage import written_whole
from fedgraft.tuning.execution import Execution, experiment_store, pool_options
from fedgraft.tuning.locks import hold

__all__ = ["Experiment", "bring_back", "new_folder", "open_folder", "read_result", "resumable", "run", "with_address"]

_OTHER_S = 60.0
"""Longest wait for another driver in the same folder: that of a command that was killed lives on for seconds."""


def run(
    config: RunConfig | None = None,
    *,
    resume: Path | str | None = None,
    address: str | None = None,
    on_event: Callable[[Event], None] | None = None,
) -> RunResult | ComparisonResult:
    """Run an experiment from start to finish, or go on with one.

    Args:
        config: What to run, as ``load_config`` gives it; ``None`` only with ``resume``.
        resume: Folder of an experiment that was stopped or killed, or its URI in a store, from which it is fetched into
            ``runs``; finished runs in it are not run again.
        address: Ray cluster to join, instead of ``executor.address``.
        on_event: Gets events while it runs, in this process.

    Returns:
        The run, or for several methods or seeds the comparison, as read back from its folder.

    Raises:
        FedgraftError: With what to do next; what is finished stays in the folder.
    """
    notify = on_event or (lambda event: None)
    with ExitStack() as stack:
        folder, config = open_folder(config, resume, address, stack, notify)
        with resumable(folder):
            launch(Experiment(str(folder), config.output.storage), config.executor, notify)
            bring_back(folder, config)
        return read_result(folder, notify)


def open_folder(
    config: RunConfig | None,
    resume: Path | str | None,
    address: str | None,
    stack: ExitStack,
    notify: Callable[[Event], None],
    *,
    check: Callable[[RunConfig], object] | None = None,
) -> tuple[Path, RunConfig]:
    """Make the folder of an experiment, or open that of one to go on with; gives its configuration, too.

    Args:
        config, resume, address: As of ``run``. The address is not written down: it is this start's.
        stack: Keeps the cluster joined that the run is for: what it has is looked at before anything is made.
        notify: Gets what was worked out, and where the folder will not stay.
        check: Called with the configuration before anything is made.

    Raises:
        FedgraftError: There is nothing to run, it cannot fit, or the folder cannot be made.
    """
    if resume is not None:
        if is_uri(str(resume)):
            resume = fetch_experiment(str(resume), Path("runs"))
        folder = Path(resume).resolve()
        if not (folder / "config.yaml").is_file():
            raise CheckpointError(f"{folder} holds no config.yaml", "name the folder of an experiment, e.g. runs/quickstart-...")
        config = load_config(folder / "config.yaml")
    elif config is None:
        raise FedgraftError("nothing to run: neither a config nor a folder to resume was given")
    here = config if address is None else with_address(config, address)
    if check is not None:
        check(here)
    here = _settled(here, stack, notify)
    if resume is None:
        config = _with_address(here, config.executor.address)
        folder = new_folder(config.output.folder, config.name)
        with written_whole(folder / "config.yaml") as scratch:
            scratch.write_text(dump_config(config.absolute()))
        store = experiment_store(config, folder)
        if store is not None:
            Mirror(folder, store).put()
    if is_of_job(folder):
        text = f"{folder} lies in the job's temporary copy of its working directory: give output.folder a path that stays"
        notify(Event(kind="note", data={"text": text}))
    return folder, here


def _settled(config: RunConfig, stack: ExitStack, notify: Callable[[Event], None]) -> RunConfig:
    """The configuration with what was left open for this machine or cluster to decide; refuses what neither can give.

    Raises:
        ConfigError: It cannot fit.
        ClusterError: The cluster has not enough of something, or cannot be joined.
    """
    gpus = None
    has_cluster = config.executor.kind == "ray" and (is_cluster(config) or is_joined())
    if has_cluster:
        stack.enter_context(cluster(config.executor))
        gpus = cluster_gpus(config)
    plan = make_plan(config, this_machine(), gpus)
    plan.require_fit()
    if plan.gpus:
        notify(Event(kind="note", data={"text": plan.gpus}))
    if has_cluster:
        check_places(pool_options(plan.settled, config.executor.replicas or 1))
    return plan.settled


def bring_back(folder: Path, config: RunConfig) -> None:
    """Make the command's folder like the store's copy, where the driver ran on another node and went on there."""
    store = experiment_store(config, folder)
    if store is not None:
        mirror = Mirror(folder, store)
        if mirror.get():
            mirror.get_private()


def with_address(config: RunConfig, address: str) -> RunConfig:
    """The same run on a cluster that is named now.

    Raises:
        ConfigError: It is not for a cluster.
    """
    if config.executor.kind == "in_process":
        problem = Problem(path="executor.kind", value="in_process", expected="ray, where a cluster's address is given")
        raise ConfigError("--address", (problem,))
    return _with_address(config, address)


def _with_address(config: RunConfig, address: str | None) -> RunConfig:
    return config.model_copy(update={"executor": config.executor.model_copy(update={"address": address})})


@contextmanager
def resumable(folder: Path) -> Iterator[None]:
    """Say how to go on in whatever error ends an experiment that can be resumed."""
    try:
        yield
    except RunInterrupted as error:
        raise RunInterrupted(error.message, f"go on with: fedgraft run --resume {folder}") from None
    except (QuorumError, ClusterError, StorageError) as error:
        options = "" if isinstance(error, StorageError) else f"options are in {folder}/config.yaml; "
        hint = f"{error.hint}; {options}go on with: fedgraft run --resume {folder}"
        raise type(error)(error.message, hint) from None
    except KeyboardInterrupt:
        raise RunInterrupted("stopped at once", f"go on with: fedgraft run --resume {folder}") from None


def read_result(folder: Path, notify: Callable[[Event], None]) -> RunResult | ComparisonResult:
    """Read a finished experiment back, and say where it lies."""
    result = read_comparison(folder)
    report = folder / "report.html"
    notify(Event(kind="done", data={"folder": str(folder), "report": str(report) if report.is_file() else ""}))
    only = list(result.runs.values())
    return only[0][0] if len(only) == 1 and len(only[0]) == 1 else result


@dataclass(frozen=True, slots=True)
class Experiment:
    """The job of an experiment, as the driver runs it. It carries only its folder: the configuration is read there.

    So a user's own method never has to travel between processes; its file is named in the configuration. A driver on a node that
    does not have the folder, or an older state of it, first gets it from ``storage``.
    """

    folder: str
    storage: str | None = None

    def __call__(self, context: JobContext) -> None:
        """Run everything that is not finished yet, and write the report.

        Raises:
            FedgraftError: Another process is at work in this folder.
        """
        folder = Path(self.folder)
        if self.storage is not None:
            Mirror(folder, RemoteFolder(self.storage).child(folder.name)).get()
        # The configuration is there before anything else and is never written again, so it serves as the lock's file, too.
        with hold(folder / "config.yaml", timeout_s=_OTHER_S, busy=f"another process is at work in {folder}"):
            remove_leftovers(folder)
            Execution(folder, context).run()


def new_folder(root: Path, name: str) -> Path:
    """Make the folder of an experiment or a sweep: its name and the time, and a number where two start in one second.

    Raises:
        FedgraftError: It cannot be written.
    """
    root = root.resolve()
    stem = f"{name}-{datetime.now():%Y%m%d-%H%M%S}"
    for number in range(1000):
        folder = root / (stem if number == 0 else f"{stem}-{number}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            raise FedgraftError(
                f"cannot make the run folder {folder}: {error}", "set output.folder to a folder you can write"
            ) from error
        return folder
    raise FedgraftError(f"too many runs called {stem} in {root}", "set name to something else")
