"""Experiments that go on without the command that began them. A run's id is the name of its folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from fedgraft.errors import FedgraftError
from fedgraft.platform import detached
from fedgraft.platform.config import ExecutorConfig, RunConfig
from fedgraft.platform.detached import Detached, find_cluster
from fedgraft.platform.progress import Event
from fedgraft.platform.results import ComparisonResult, RunResult
from fedgraft.tuning.experiment import Experiment, open_folder, read_result, resumable
from fedgraft.tuning.locks import hold

__all__ = ["RunStatus", "attach", "detach", "status", "stop"]


@dataclass(frozen=True, kw_only=True, slots=True)
class RunStatus:
    """One run as ``status`` finds it.

    ``status`` of one that a driver on the cluster has: ``running``, ``stopping`` (after this round), ``over`` (just ended) or
    ``silent`` (its driver does not answer). Of another one it is what its folder says: ``running`` (by a command), ``finished``,
    ``stopped``, ``failed``, or ``cut off`` (it was running, and nobody is at work in its folder). ``progress`` is its last round
    or stage in words.
    """

    run_id: str
    status: str
    progress: str = ""
    begun: str = ""
    folder: str = ""


def detach(
    config: RunConfig | None = None,
    *,
    resume: Path | str | None = None,
    address: str | None = None,
    on_event: Callable[[Event], None] | None = None,
) -> str:
    """Begin an experiment on a running cluster, or go on with one, and leave it to the cluster.

    Args:
        config, resume, address: As of ``fedgraft.run``; without an address, that of ``executor.address`` or ``RAY_ADDRESS``.
        on_event: Gets what is said before it begins.

    Returns:
        The run's id, for ``attach`` and ``stop``.

    Raises:
        ClusterError: There is no running cluster, or the run is under way already.
        FedgraftError: As of ``fedgraft.run``, whatever can be said before it begins.
    """
    with ExitStack() as stack:
        folder, config = open_folder(
            config, resume, address, stack, on_event or (lambda event: None), check=lambda found: find_cluster(found.executor)
        )
        facts = {"folder": str(folder), "begun": f"{datetime.now():%Y-%m-%d %H:%M}"}
        stack.enter_context(resumable(folder))
        detached.begin(folder.name, Experiment(str(folder), config.output.storage), find_cluster(config.executor), facts)
    return folder.name


def attach(
    run_id: str, *, address: str | None = None, on_event: Callable[[Event], None] | None = None
) -> RunResult | ComparisonResult | None:
    """Follow a run that was left to the cluster until it is over; its events come from the beginning.

    Returns:
        As ``fedgraft.run``; ``None`` where its folder is not to be seen from here.

    Raises:
        FedgraftError: Whatever ended the run.
        ClusterError: No such run is under way.
        RunInterrupted: Ctrl-C here; the run goes on.
    """
    notify = on_event or (lambda event: None)
    facts: dict[str, Any] = {}
    detached.follow(run_id, _executor(address), notify, facts.update)
    folder = Path(facts["folder"])
    if (folder / "comparison.json").is_file():
        return read_result(folder, notify)
    notify(Event(kind="note", data={"text": f"finished; its folder {folder} is not to be seen from this machine"}))
    return None


def stop(
    run_id: str, *, address: str | None = None, is_at_once: bool = False, on_event: Callable[[Event], None] | None = None
) -> Path | None:
    """End a run that was left to the cluster, after the round that it is in, or at once; it can be resumed.

    Returns:
        Its folder; ``None`` where a driver that was ended at once did not say.

    Raises:
        ClusterError: No such run is under way.
        FedgraftError: It ended by another error.
    """
    facts = detached.stop(run_id, _executor(address), on_event or (lambda event: None), is_at_once=is_at_once)
    return Path(facts["folder"]) if "folder" in facts else None


def status(*, address: str | None = None, runs: Path | None = None) -> list[RunStatus]:
    """List runs: those that were left to a cluster, and those in a folder of runs.

    Args:
        address: The cluster; ``None``: ``RAY_ADDRESS``.
        runs: Folder of runs to list, too; ``None``: none.

    Raises:
        ClusterError: No cluster is named, or it cannot be joined.
    """
    found = {each.name: _live(each) for each in detached.list_detached(_executor(address))}
    for path in sorted(runs.glob("*/comparison.json")) if runs is not None else ():
        if path.parent.name not in found:
            found[path.parent.name] = _from_folder(path)
    return list(found.values())


def _executor(address: str | None) -> ExecutorConfig:
    return find_cluster(ExecutorConfig(address=address))


def _live(found: Detached) -> RunStatus:
    facts: Mapping[str, Any] = found.about.facts if found.about is not None else {}
    events = found.about.events if found.about is not None else ()
    return RunStatus(
        run_id=found.name,
        status=found.status,
        progress=_progress(events),
        begun=str(facts.get("begun", "")),
        folder=str(facts.get("folder", "")),
    )


def _progress(events: tuple[Event, ...]) -> str:
    """The last round in words, else the last stage."""
    last = {event.kind: event for event in events}
    at = last.get("round")
    if at is not None:
        return f"{at.label}: round {at.data.get('round', '?')} of {at.data.get('rounds', '?')}"
    return str(last["stage"].data.get("text", "")) if "stage" in last else ""


def _from_folder(path: Path) -> RunStatus:
    try:
        said = str(json.loads(path.read_text()).get("status", "unknown"))
    except (OSError, ValueError, AttributeError):
        said = "unreadable"
    if said == "running":
        try:
            with hold(path.with_name("config.yaml"), timeout_s=0):
                said = "cut off"
        except FedgraftError:
            pass  # somebody is at work in it
    return RunStatus(run_id=path.parent.name, status=said, folder=str(path.parent))
