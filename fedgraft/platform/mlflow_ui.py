"""Starts MLflow's own user interface on the store that runs were tracked in, and ends it without a process left.

The server that shows the interface is a whole tracking server, so other processes can track to its address, too.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import yaml

from fedgraft.errors import FedgraftError, ResultsError
from fedgraft.platform.loading import load_config
from fedgraft.platform.results import read_json
from fedgraft.platform.tracking import ARTIFACTS, DATABASE, hide_password

__all__ = ["HOST", "Server", "Store", "find_store", "serve"]

HOST = "127.0.0.1"
"""Nobody outside of this machine is served: MLflow asks for no password."""

_START_S = 120.0
_STOP_S = 10.0
_LEVELS = 5  # from a run's folder up to the runs folder: sweep, trials, trial, label, seed


@dataclass(frozen=True, kw_only=True, slots=True)
class Store:
    """A store of MLflow's: its URI, and where files go that are tracked through the server (``None``: MLflow decides)."""

    uri: str
    artifacts: Path | None = None

    @property
    def is_server(self) -> bool:
        """Whether it is a tracking server, which has an interface of its own."""
        return self.uri.startswith(("http://", "https://"))

    @property
    def shown(self) -> str:
        """The URI without a password."""
        return hide_password(self.uri)


@dataclass(frozen=True, slots=True)
class Server:
    """A server that answers at ``address``; ``wait`` returns never but by an error or an interrupt."""

    address: str
    process: subprocess.Popen[bytes]

    def wait(self) -> None:
        """Wait as long as it runs.

        Raises:
            FedgraftError: It ended by itself.
        """
        code = self.process.wait()
        raise FedgraftError(f"MLflow's server at {self.address} ended by itself, with code {code}", "start it again")


def find_store(target: Path | None) -> Store:
    """Find the store that is meant.

    Args:
        target: The runs folder or any folder in it, or a configuration, whose ``tracking.uri`` or ``output.folder`` counts.
            ``None``: ``MLFLOW_TRACKING_URI``, else the folder ``runs``.

    Raises:
        ResultsError: There is no database.
        ConfigError: The configuration is wrong.
    """
    if target is None:
        uri = os.environ.get("MLFLOW_TRACKING_URI")
        return _store(uri) if uri else _in_folder(Path("runs"), "run fedgraft first, or name a runs folder or a configuration")
    if target.is_dir():
        return _in_folder(target, "name the runs folder, a folder in it, or a configuration")
    if not target.exists():
        raise ResultsError(f"{target} does not exist", "name the runs folder, a folder in it, or a configuration")
    return _of_config(target)


def _in_folder(folder: Path, hint: str) -> Store:
    """What was tracked elsewhere says where; else the database of the folder or of one above it."""
    place = folder.resolve()
    uri = _recorded(place)
    if uri:
        return _store(uri)
    for level in (place, *list(place.parents)[:_LEVELS]):
        if (level / DATABASE).is_file():
            return _store(f"sqlite:///{level / DATABASE}")
    uri = os.environ.get("MLFLOW_TRACKING_URI")
    if uri:
        return _store(uri)
    raise ResultsError(f"no MLflow database: {place / DATABASE} does not exist", hint)


def _store(uri: str) -> Store:
    """A store; files that are tracked through its server go beside the database, where those of fedgraft's own runs lie."""
    path = Path(uri.removeprefix("sqlite:///")).resolve() if uri.startswith("sqlite:///") else None
    return Store(uri=uri, artifacts=None if path is None else path.parent / ARTIFACTS)


def _recorded(folder: Path) -> str | None:
    """The address in the record of a sweep, or in the configuration of a run or experiment; read as it is: no code is run."""
    if (folder / "sweep.json").is_file():
        found = read_json(folder / "sweep.json").get("tracking_uri")
        return str(found) if found else None
    path = folder / "config.yaml"
    if not path.is_file():
        return None
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ResultsError(f"{path} is not YAML: {error}", "name the runs folder instead") from error
    found = (tree.get("tracking") or {}).get("uri") if isinstance(tree, dict) else None
    return str(found) if found else None


def _of_config(path: Path) -> Store:
    config = load_config(path, checks_files=False)
    if not config.tracking.enabled:
        raise ResultsError(f"{path}: tracking.enabled is false, so nothing was tracked", "name another configuration or folder")
    uri = config.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI")
    return _store(uri) if uri else _in_folder(config.output.folder, f"run {path} first")


@contextmanager
def serve(store: Store, port: int) -> Iterator[Server]:
    """Run MLflow's server on loopback while the context is open.

    Args:
        store: Not a server itself.
        port: 1 to 65535.

    Yields:
        The server; it answers already.

    Raises:
        ResultsError: The port is taken.
        FedgraftError: The server ended or did not answer; the end of what it said is in the message.
    """
    _check_port(port)
    address = f"http://{HOST}:{port}"
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", store.uri, "--host", HOST, "--port", str(port)]
    command += ["--workers", "1"]
    if store.artifacts is not None:
        command += ["--artifacts-destination", store.artifacts.as_uri()]
    environment = {**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true"}
    environment.pop("MLFLOW_TRACKING_URI", None)  # it may be this very address
    with tempfile.TemporaryDirectory(prefix="fedgraft-ui-") as scratch, (Path(scratch) / "log").open("w+b") as log:
        process = subprocess.Popen(
            command, cwd=scratch, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            _wait(process, address, Path(log.name))
            yield Server(address, process)
        finally:
            _end(process)


def _check_port(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server does: a closed connection may linger
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise ResultsError(f"--port {port} on {HOST} cannot be used: {error.strerror}", "give another with --port") from None


def _wait(process: subprocess.Popen[bytes], address: str, log: Path) -> None:
    started = time.monotonic()
    while not _answers(address):
        if process.poll() is not None or time.monotonic() - started > _START_S:
            what = "ended at once" if process.poll() is not None else f"did not answer within {_START_S:.0f} s"
            said = log.read_text(errors="replace").strip().splitlines()[-5:]
            raise FedgraftError(
                f"MLflow's server {what}; it said: {hide_password(' | '.join(said))}",
                "check the store with: mlflow doctor, or start it by hand: mlflow ui",
            )
        time.sleep(0.3)


def _answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/health", timeout=5):
            return True
    except OSError:  # refused, reset, timed out, an HTTP error: not up yet
        return False


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the server and everything that it started, in whatever group that is by now."""
    try:
        family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    except psutil.NoSuchProcess:
        family = []
    for signum in (signal.SIGTERM, signal.SIGKILL):
        for member in family:
            with contextlib.suppress(psutil.NoSuchProcess):  # it ended by itself
                member.send_signal(signum)
        _, family = psutil.wait_procs(family, timeout=_STOP_S)
    process.wait(_STOP_S)
