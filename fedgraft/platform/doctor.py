"""Looks at this machine and says what is missing for a run, and what to do about it."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import urlopen

import psutil
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from rich.table import Table
from rich.text import Text

from fedgraft.platform.cache_folder import default_cache
from fedgraft.platform.plan import free_memory, usable_cores
from fedgraft.platform.progress import bytes_text

__all__ = ["Check", "Status", "check_table", "examine", "has_failed"]

Status: TypeAlias = Literal["ok", "warn", "fail"]

_GIB = 2**30
_LEAST_FREE = {"warn": 2 * _GIB, "fail": 200 * 2**20}
_RAY_TIMEOUT_S = 120.0
_STORE_TIMEOUT_S = 5.0
_RAY_TRIAL = """
import ray
ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
assert ray.get(ray.remote(lambda: 41 + 1).remote()) == 42
ray.shutdown()
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """One thing that was looked at: what was found, and what to do (empty where nothing is)."""

    name: str
    status: Status
    found: str
    advice: str = ""


def examine(*, full: bool = False, runs: Path | str = "runs") -> list[Check]:
    """Check packages, cores, memory, disks, GPUs, the compiler, Ray and MLflow.

    Args:
        full: Also start and stop a local Ray, which takes some seconds; else Ray is only imported.
        runs: Folder that runs will lie in. Nothing is made there.

    Returns:
        The checks, in the order of a table. A check that itself breaks is a failed check.
    """
    runs = Path(runs)
    found: list[Check] = []
    for make in (
        check_python,
        check_packages,
        check_machine,
        lambda: check_folders(runs),
        check_gpus,
        check_compiler,
        lambda: check_ray(full=full),
        lambda: check_tracking(runs),
    ):
        try:
            found += make()
        except Exception as error:
            name = getattr(make, "__name__", "check").removeprefix("check_")
            found.append(Check(name=name, status="fail", found=f"{type(error).__name__}: {error}", advice="report this as a bug"))
    return found


def has_failed(checks: list[Check]) -> bool:
    """Whether a check failed, so that a run could not work."""
    return any(check.status == "fail" for check in checks)


def check_table(checks: list[Check]) -> Table:
    """Draw the checks for a terminal."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for title in ("", "check", "found", "what to do"):
        table.add_column(title, overflow="fold")
    styles = {"ok": "green", "warn": "yellow", "fail": "bold red"}
    for check in checks:
        table.add_row(Text(check.status, style=styles[check.status]), Text(check.name), Text(check.found), Text(check.advice))
    return table


def check_python() -> list[Check]:
    """Compare this Python with the range that the installed package asks for."""
    wanted = importlib.metadata.metadata("fedgraft")["Requires-Python"] or ""
    version = platform.python_version()
    is_right = SpecifierSet(wanted).contains(version, prereleases=True)
    advice = "" if is_right else f"make an environment with Python {wanted}"
    return [Check(name="Python", status="ok" if is_right else "fail", found=version, advice=advice)]


def check_packages() -> list[Check]:
    """Compare each package that fedgraft needs with its tested range; extras are left out."""
    checks = []
    for text in importlib.metadata.requires("fedgraft") or []:
        requirement = Requirement(text)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            checks.append(check_package(requirement))
    return checks


def check_package(requirement: Requirement) -> Check:
    """Compare one installed package with a requirement."""
    install = f"pip install '{requirement.name}{requirement.specifier}'"
    try:
        version = importlib.metadata.version(requirement.name)
    except importlib.metadata.PackageNotFoundError:
        return Check(name=requirement.name, status="fail", found="not installed", advice=install)
    if requirement.specifier.contains(version, prereleases=True):
        return Check(name=requirement.name, status="ok", found=version)
    return Check(name=requirement.name, status="warn", found=f"{version}, tested with {requirement.specifier}", advice=install)


def check_machine() -> list[Check]:
    """Count cores and free memory, those of the container where it has less than the machine."""
    cores, free = usable_cores(), free_memory()
    memory: Status = "ok" if free >= 3 * _GIB else "warn" if free >= _GIB else "fail"
    checks = [
        Check(
            name="cores",
            status="ok" if cores >= 2 else "warn",
            found=str(cores),
            advice="" if cores >= 2 else "runs work, one replica at a time",
        ),
        Check(
            name="memory",
            status=memory,
            found=f"{bytes_text(free)} free of {bytes_text(psutil.virtual_memory().total)}",
            advice="" if memory == "ok" else "close other programs, or set executor.replicas=1; a replica takes about 0.6 GiB",
        ),
    ]
    shared = Path("/dev/shm")
    if shared.is_dir():
        room = shutil.disk_usage(shared).free
        is_enough = room >= 256 * 2**20
        advice = "" if is_enough else "Ray uses slower files instead; in a container give it --shm-size=1g"
        found = f"{bytes_text(room)} free"
        checks.append(Check(name="shared memory", status="ok" if is_enough else "warn", found=found, advice=advice))
    return checks


def check_folders(runs: Path) -> list[Check]:
    """Check room and write access where runs, the cache and temporary files lie."""
    temporary = Path(tempfile.gettempdir())
    return [
        check_folder("runs folder", runs, "set output.folder"),
        check_folder("cache folder", default_cache(), "set output.cache, or the environment variable FEDGRAFT_CACHE"),
        check_folder("temporary folder", temporary, "set the environment variable TMPDIR"),
    ]


def check_folder(name: str, folder: Path, setting: str) -> Check:
    """Check that a folder can be written to, or be made, and has room. Leaves nothing behind."""
    place = folder.expanduser().absolute()
    if place.exists() and not place.is_dir():
        return Check(name=name, status="fail", found=f"{place} is a file", advice=f"{setting} to a folder")
    while not place.exists():
        place = place.parent
    try:
        with tempfile.NamedTemporaryFile(dir=place, prefix=".fedgraft-doctor-") as file:
            file.write(b"x")
            file.flush()
    except OSError as error:
        found = f"{folder}: {place} cannot be written to ({error.strerror})"
        return Check(name=name, status="fail", found=found, advice=f"{setting} to a folder that you may write to")
    free = shutil.disk_usage(place).free
    status: Status = "fail" if free < _LEAST_FREE["fail"] else "warn" if free < _LEAST_FREE["warn"] else "ok"
    advice = "" if status == "ok" else f"make room, or {setting} to a folder on another disk"
    return Check(name=name, status=status, found=f"{folder}, {bytes_text(free)} free", advice=advice)


def check_gpus() -> list[Check]:
    """List the GPUs that PyTorch can use; none is fine, one that PyTorch cannot see is not."""
    import torch  # heavy, and only this check needs it

    if torch.cuda.is_available():
        devices = [torch.cuda.get_device_properties(idx) for idx in range(torch.cuda.device_count())]
        names = ", ".join(f"{device.name} ({bytes_text(device.total_memory)})" for device in devices)
        return [Check(name="GPUs", status="ok", found=names)]
    if shutil.which("nvidia-smi") and any(Path("/dev").glob("nvidia[0-9]*")):
        advice = "install a build of torch for CUDA, see the README, and check that the driver is new enough for it"
        return [Check(name="GPUs", status="warn", found=f"a GPU that torch {torch.__version__} cannot use", advice=advice)]
    return [Check(name="GPUs", status="ok", found="none; everything runs on the CPU")]


def check_compiler() -> list[Check]:
    """Look for a C++ compiler: DeepSpeed builds its optimisers with it when they are first used."""
    found = next((path for name in ("c++", "g++", "clang++") if (path := shutil.which(name))), None)
    if found is not None:
        return [Check(name="C++ compiler", status="ok", found=found)]
    advice = "needed by the DeepSpeed engine only: install g++ (Debian: apt install g++)"
    return [Check(name="C++ compiler", status="warn", found="none", advice=advice)]


def check_ray(*, full: bool = False, environment: Mapping[str, str] = os.environ) -> list[Check]:
    """Check that Ray can be imported (``full``: started), which cluster is joined, and whether an old one still runs."""
    command = [sys.executable, "-c", _RAY_TRIAL if full else "import ray"]
    error = run_within(command, _RAY_TIMEOUT_S)
    what = "a local Ray starts and stops" if full else "can be imported"
    if error:
        advice = "see that nothing blocks local ports and that memory is free; else set executor.kind=in_process"
        checks = [Check(name="Ray", status="fail", found=error, advice=advice)]
    else:
        advice = "" if full else "fedgraft doctor --full also starts it"
        checks = [Check(name="Ray", status="ok", found=what, advice=advice)]
    address = environment.get("RAY_ADDRESS")
    if address:
        advice = "unset RAY_ADDRESS to have runs start a Ray of their own"
        checks.append(Check(name="RAY_ADDRESS", status="warn", found=f"runs join {address}", advice=advice))
    left = list(ray_processes())
    if left and not address:
        shown = ", ".join(f"{name} ({pid})" for pid, name in left[:4])
        advice = "if no run of yours is going on: ray stop"
        checks.append(Check(name="Ray processes", status="warn", found=f"{len(left)} are running: {shown}", advice=advice))
    return checks


def ray_processes() -> Iterator[tuple[int, str]]:
    """Find this user's processes of a Ray cluster's core."""
    user = psutil.Process().username()
    for process in psutil.process_iter(["pid", "name", "username"]):
        if process.info["username"] == user and process.info["name"] in ("raylet", "gcs_server"):
            yield process.info["pid"], process.info["name"]


def run_within(command: list[str], seconds: float) -> str:
    """Run a command in a session of its own and end all of it at the limit; give what went wrong, or nothing."""
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"} | {"RAY_USAGE_STATS_ENABLED": "0"}
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
    )
    try:
        _, errors = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return f"gave no answer in {seconds:g} s"
    lines = [line for line in errors.splitlines() if line.strip()]
    return "" if process.returncode == 0 else (lines[-1] if lines else f"ended with exit code {process.returncode}")


def check_tracking(runs: Path, environment: Mapping[str, str] = os.environ) -> list[Check]:
    """Check that MLflow's store can be reached and written to: a server, a database file, or a folder."""
    uri = environment.get("MLFLOW_TRACKING_URI") or ""
    if not uri:
        return [_check_sqlite(runs / "mlflow.db", f"{runs / 'mlflow.db'} (default)")]
    parts = urlsplit(uri)
    shown = re.sub(r"//[^/@]*@", "//***@", uri)
    if parts.scheme in ("http", "https"):
        return [_check_server(uri, shown)]
    if parts.scheme == "sqlite":
        return [_check_sqlite(Path(uri.partition(":///")[2]), shown)]
    if parts.scheme in ("", "file"):
        folder = check_folder("MLflow", Path(parts.path if parts.scheme else uri), "set MLFLOW_TRACKING_URI")
        return [folder]
    if parts.hostname and parts.port:
        return [_check_port(parts.hostname, parts.port, shown)]
    return [Check(name="MLflow", status="warn", found=f"{shown}: not checked", advice="try it with: mlflow experiments search")]


def _check_server(uri: str, shown: str) -> Check:
    advice = "start the server, mend MLFLOW_TRACKING_URI, or set tracking.enabled=false"
    try:
        with urlopen(f"{uri.rstrip('/')}/health", timeout=_STORE_TIMEOUT_S) as reply:
            return Check(name="MLflow", status="ok", found=f"{shown} answers ({reply.status})")
    except HTTPError as error:
        # A server that asks for credentials, or a proxy without this page, is there.
        return Check(name="MLflow", status="ok", found=f"{shown} answers ({error.code})")
    except (URLError, OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        return Check(name="MLflow", status="fail", found=f"{shown}: {reason}", advice=advice)


def _check_port(host: str, port: int, shown: str) -> Check:
    try:
        with socket.create_connection((host, port), timeout=_STORE_TIMEOUT_S):
            return Check(name="MLflow", status="ok", found=f"{shown}: {host}:{port} can be reached")
    except OSError as error:
        advice = "start the database, mend MLFLOW_TRACKING_URI, or set tracking.enabled=false"
        return Check(name="MLflow", status="fail", found=f"{shown}: {error}", advice=advice)


def _check_sqlite(path: Path, shown: str) -> Check:
    """Ask for the write lock of a database that is there; else its folder must be writable."""
    if not path.exists():
        folder = check_folder("MLflow", path.parent, "set MLFLOW_TRACKING_URI")
        if folder.status == "fail":
            return folder
        return Check(name="MLflow", status=folder.status, found=f"{shown}, made by the first run", advice=folder.advice)
    try:
        with contextlib.closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=rw", uri=True, timeout=2.0)) as database:
            database.execute("BEGIN IMMEDIATE")
            database.rollback()
    except sqlite3.Error as error:
        advice = "end the process that holds it, mend its access rights, or set MLFLOW_TRACKING_URI to another store"
        return Check(name="MLflow", status="fail", found=f"{shown}: {error}", advice=advice)
    return Check(name="MLflow", status="ok", found=f"{shown} can be written to")
