"""What the chaos benchmark runs: a random MoE model of a few thousand parameters, eight clients, and the command in a process.

Imported by the benchmark beside it and by ``tests/chaos``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from chaos_monkey import Monkey
from chaos_watch import Watch
from tiny_model import write_tiny_model

import fedgraft

__all__ = ["METHODS", "NUM_CLIENTS", "ChaosError", "Command", "Material", "make_material", "run_alone", "run_under"]

NUM_CLIENTS = 8
METHODS: dict[str, dict[str, Any]] = {
    "fedavg": {"name": "fedavg", "adapter": {"rank": 2}},
    "flex": {"name": "flex", "adapter": {"rank": 2}, "calibration_examples": 8, "persist_optimizer": True},
}
"""What is run under kills: shared tensors only; and private state with the optimiser's moments kept between rounds."""

_MAX_UNPROVOKED = 2
"""Ends that no strike explains, as when Ray does not come up on a machine that is too busy; they are resumed and told."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Material:
    """A model's folder and the files of examples; ``folder`` is where runs and the cache go, too."""

    folder: Path
    model: Path
    clients: Path
    general: Path

    def config(
        self, name: str, *, rounds: int, methods: Mapping[str, Any], executor: Mapping[str, Any], **parts: Any
    ) -> dict[str, Any]:
        """The configuration of an experiment in a runs folder of its own; ``parts`` are further sections."""
        fields = {"prompt": "q", "response": "a"}
        return {
            "name": name,
            "model": {"path": str(self.model)},
            "data": {
                "path": str(self.clients),
                "preset": "custom",
                "fields": fields | {"label": "kind"},
                "max_length": 32,
                "retention": {"path": str(self.general), "preset": "custom", "fields": fields},
            },
            "compare": {"methods": dict(methods)},
            "training": {"learning_rate": 0.01},
            "federation": {"rounds": rounds, "local_steps": 2, "batch_size": 4, "max_failures": 10} | parts.pop("federation", {}),
            "evaluation": {"every": 5, "at_start": False, "generate": "never", "choices": "never"},
            "executor": dict(executor),
            "output": {"folder": str(self.folder / name), "cache": str(self.folder / "cache"), "report": False},
        } | parts


def make_material(folder: Path) -> Material:
    """Write the model with its tokenizer, and the examples: 12 to 19 of each client, each with its own words."""
    write_tiny_model(folder / "model")
    lines = [
        {"q": f"{chr(97 + client)}{i}: {client * i % 7}", "a": f"{chr(97 + client) * (1 + i % 4)}", "kind": f"client {client}"}
        for client in range(NUM_CLIENTS)
        for i in range(12 + client)
    ]
    general = [{"q": f"say {i}", "a": f"word {i}"} for i in range(6)]
    for name, rows in (("clients.jsonl", lines), ("general.jsonl", general)):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Material(folder=folder, model=folder / "model", clients=folder / "clients.jsonl", general=folder / "general.jsonl")


class Command:
    """``fedgraft run`` in a process of its own: started with a configuration, or with the folder that it is to go on with.

    Args:
        config: Written beside the runs.
        log: Gets what all its starts print.
        ray_folder: Where its Ray clusters keep their sessions. The path must be short: sockets lie in it.
    """

    def __init__(self, config: Mapping[str, Any], log: Path, ray_folder: Path) -> None:
        self._ray_folder = ray_folder
        self.runs = Path(config["output"]["folder"])
        self.runs.mkdir(parents=True, exist_ok=True)
        self._config = self.runs.with_suffix(".yaml")
        self._config.write_text(yaml.safe_dump(dict(config)))
        self._log = log
        self.starts = 0

    @property
    def folder(self) -> Path | None:
        """The experiment's folder, once it is there."""
        found = [path.parent for path in self.runs.glob("*/config.yaml")]
        return found[0] if found else None

    def last_words(self, lines: int = 20) -> str:
        """The end of what it printed."""
        return "\n".join(self._log.read_text(errors="replace").splitlines()[-lines:])

    def start(self) -> subprocess.Popen[bytes]:
        """Start it, or go on with what an earlier start began."""
        self.starts += 1
        what = [str(self._config)] if self.folder is None else ["--resume", str(self.folder)]
        clean = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "MLFLOW_"))}
        # A folder of its own for Ray: no other cluster of this machine can be joined by mistake, and nothing stays in /tmp/ray.
        # Ray's workers are nice (15) by default: on a machine that is busy they would take minutes to start.
        clean |= {"RAY_TMPDIR": str(self._ray_folder), "RAY_worker_niceness": "0", "OMP_NUM_THREADS": "1"}
        with self._log.open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "fedgraft", "run", *what],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=clean,
                start_new_session=True,
            )


def run_alone(material: Material, name: str, **parts: Any) -> Path:
    """Run an experiment undisturbed in this process, as ``Material.config`` describes it; gives its folder."""
    return fedgraft.run(fedgraft.load_config(material.config(name, executor={"kind": "in_process"}, **parts))).folder


class ChaosError(Exception):
    """A run that could not be brought to its end, and what it printed last."""


def run_under(command: Command, monkey: Monkey, *, limit_s: float) -> list[int]:
    """Run the command to its end under a monkey, and start it again with ``--resume`` whenever it ends early.

    Whoever calls this ends what is left of the monkey's herd: after a run that came to its end there should be nobody.

    Returns:
        Exit codes of all starts; a negative one is the signal that ended it.

    Raises:
        ChaosError: It ended early more than twice though nothing had been done to it, or is not over after ``limit_s``.
    """
    watch = Watch(command.runs)
    codes: list[int] = []
    deadline = time.monotonic() + limit_s
    try:
        process, strikes = command.start(), 0
        monkey.herd.lead(process.pid)
        looked = time.monotonic()
        while True:
            for change in watch.read(0.02):
                monkey.see(change)
            monkey.see(None)
            if time.monotonic() > looked + 0.2:
                monkey.herd.refresh()
                looked = time.monotonic()
            if time.monotonic() > deadline:
                raise ChaosError(f"not over after {limit_s:.0f} s, last strike: {monkey.strikes[-1:]}\n{command.last_words()}")
            code = process.poll()
            if code is None:
                continue
            codes.append(code)
            if code == 0:
                return codes
            if len(monkey.strikes) + len(monkey.missed) == strikes:
                monkey.unprovoked.append(f"ended with {code}: {command.last_words(5)}")
                if len(monkey.unprovoked) > _MAX_UNPROVOKED:
                    raise ChaosError(f"ended with {code} though nothing had been done to it\n{command.last_words()}")
            strikes = len(monkey.strikes) + len(monkey.missed)
            process = command.start()
            monkey.restarted()
            monkey.herd.lead(process.pid)
    finally:
        watch.close()
