"""Do the processes of a run stay as large as they were? Memory, open files and threads over hundreds of rounds.

    python benchmarks/leaks.py                              fedavg and flex, 240 rounds each, 5 to 15 minutes on 2 cores
    python benchmarks/leaks.py --rounds 60 --methods flex

A random Qwen2-MoE of two layers is written into a temporary folder, and ``python -m fedgraft run`` runs it as a user would: a
driver actor, two replicas, MLflow in SQLite, a checkpoint after every round and an evaluation after every twentieth. This process
only watches: every few rounds it reads of the command, of the driver and of each replica

    uss, pss    private and proportional memory;
    files       open file descriptors;
    threads;

and of the raylet ``store``, the pages of the object store that were ever touched: objects that nobody frees make it grow.

Rounds of a method before ``--warmup`` do not count. Of the rest, ``slope`` is the growth of USS in MiB per 100 rounds (least
squares), ``start`` and ``end`` are means over the first and last fifth. ``holds`` says whether every slope is at most
``LIMIT_MIB`` and whether nobody ends with more open files than it had; the exit code is 1 where it does not. One JSON line on
stdout.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import yaml
from tiny_model import write_tiny_model

LIMIT_MIB = 1.0
"""Most growth of private memory, MiB per 100 rounds, that counts as none: allocators and records of one line a round."""

MIB = 2**20
ACTORS = {"driver": "ray::Driver", "replica": "ray::Rank"}


def config_of(folder: Path, methods: Sequence[str], rounds: int) -> dict[str, Any]:
    """A run whose rounds are as short as can be, with everything on that may hold on to something."""
    return {
        "name": "leaks",
        "model": {"path": str(write_tiny_model(folder / "model"))},
        "data": {
            "num_clients": 4,
            "max_length": 24,
            "bundled": {"train_per_domain": 8, "test_per_domain": 2, "num_retention": 2, "questions_per_domain": 0},
        },
        "compare": {"methods": {name: {"name": name} for name in methods}},
        "federation": {"rounds": rounds, "local_steps": 1, "batch_size": 2},
        "evaluation": {"every": 20, "at_start": False, "max_new_tokens": 2},
        "executor": {"kind": "ray", "replicas": 2},
        "output": {"folder": str(folder / "runs"), "cache": str(folder / "cache")},
    }


def processes_of(command: psutil.Process) -> dict[str, psutil.Process]:
    """The processes of a run by what they are; replicas are numbered by process id, so that a new one gets a new row."""
    found = {"command": command}
    for child in command.children(recursive=True):
        try:
            title = " ".join(child.cmdline())
        except psutil.Error:
            continue  # it has just ended
        if title.startswith(ACTORS["driver"]):
            found["driver"] = child
        elif title.startswith(ACTORS["replica"]):
            found[f"replica-{child.pid}"] = child
        elif "raylet/raylet" in title:
            found["raylet"] = child
    return found


def sizes_of(process: psutil.Process) -> dict[str, float]:
    """Memory in MiB, open files and threads of one process now."""
    memory = process.memory_full_info()
    return {
        "uss": memory.uss / MIB,
        "pss": memory.pss / MIB,
        "files": process.num_fds(),
        "threads": process.num_threads(),
    }


def store_of(raylet: psutil.Process) -> float:
    """MiB of the object store's mapping that the raylet has touched."""
    return float(sum(each.rss for each in raylet.memory_maps() if "plasma" in each.path)) / MIB


def watch(command: subprocess.Popen[bytes], runs: Path, every: int) -> Iterator[dict[str, Any]]:
    """Sample a run each time ``every`` more rounds are done, until its command ends; rounds are counted for each method."""
    process, last = psutil.Process(command.pid), ("", -every)
    while command.poll() is None:
        time.sleep(0.2)
        at = _progress(runs)
        if at is None or (at[0] == last[0] and at[1] < last[1] + every):
            continue
        last = at
        found = processes_of(process)
        try:
            row: dict[str, Any] = {"method": at[0], "round": at[1], "seconds": round(time.monotonic(), 2)}
            row |= {name: sizes_of(each) for name, each in found.items() if name != "raylet"}
            if "raylet" in found:
                row["store"] = store_of(found["raylet"])
        except psutil.Error:
            continue  # one of them ended meanwhile: the run is over, or a replica was replaced
        yield row


def _progress(runs: Path) -> tuple[str, int] | None:
    """The method that writes at the moment, and how many rounds it has done."""
    records = sorted(runs.glob("*/*/seed-0/metrics.jsonl"), key=lambda path: path.stat().st_mtime)
    if not records:
        return None
    return records[-1].parts[-3], records[-1].read_bytes().count(b"\n")


def growth(samples: Sequence[dict[str, Any]], method: str, name: str, warmup: int) -> dict[str, Any] | None:
    """What one process grew by while one method ran, after the warm-up; ``None``: fewer than five samples."""
    rows = [row for row in samples if row["method"] == method and row["round"] > warmup and name in row]
    if len(rows) < 5:
        return None
    rounds = np.array([row["round"] for row in rows], dtype=float)
    fifth = max(1, len(rows) // 5)
    if name == "store":
        sizes = np.array([row[name] for row in rows])
        return {"rounds": int(rounds[-1] - rounds[0]), **_line(rounds, sizes, fifth)}
    found: dict[str, Any] = {"rounds": int(rounds[-1] - rounds[0])}
    found |= _line(rounds, np.array([row[name]["uss"] for row in rows]), fifth)
    found["pss_slope"] = _line(rounds, np.array([row[name]["pss"] for row in rows]), fifth)["slope"]
    for kind in ("files", "threads"):
        values = [int(row[name][kind]) for row in rows]
        found[kind] = {"start": max(values[:fifth]), "end": min(values[-fifth:]), "most": max(values)}
    return found


def _line(rounds: Any, values: Any, fifth: int) -> dict[str, float]:
    slope = float(np.polyfit(rounds, values, 1)[0])
    return {
        "slope": round(100 * slope, 3),
        "start": round(float(values[:fifth].mean()), 2),
        "end": round(float(values[-fifth:].mean()), 2),
    }


def judge(table: dict[str, dict[str, Any]]) -> list[str]:
    """Say what grew: one line for each process and method that broke a limit."""
    broken = []
    for method, by_name in table.items():
        for name, row in by_name.items():
            if row["slope"] > LIMIT_MIB:
                broken.append(f"{method}: {name} grows by {row['slope']} MiB per 100 rounds (limit {LIMIT_MIB:g})")
            if "files" in row and row["files"]["end"] > row["files"]["start"]:
                broken.append(f"{method}: {name} has {row['files']['end']} open files, {row['files']['start']} after the warm-up")
    return broken


def run(methods: Sequence[str], *, rounds: int, every: int, warmup: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Run, watch and judge; gives the record and the samples."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="fedgraft-leaks-") as name:
        folder = Path(name)
        path = folder / "config.yaml"
        path.write_text(yaml.safe_dump(config_of(folder, methods, rounds)))
        environment = os.environ | {"RAY_USAGE_STATS_ENABLED": "0"}
        environment.pop("RAY_ADDRESS", None)
        log = folder / "log.txt"
        with log.open("wb") as stream:
            command = subprocess.Popen(
                [sys.executable, "-m", "fedgraft", "run", str(path)], stdout=stream, stderr=stream, env=environment
            )
            try:
                samples = []
                for row in watch(command, folder / "runs", every):
                    samples.append(row)
                    print(f"{row['method']} round {row['round']}", file=sys.stderr)
            finally:
                if command.poll() is None:
                    command.terminate()
                code = command.wait(60)
        if code != 0:
            raise SystemExit(f"the run ended with exit code {code}:\n{log.read_text()[-3000:]}")
    names = list(dict.fromkeys(key for row in samples for key in row if key not in ("method", "round", "seconds")))
    table = {
        method: {name: found for name in names if (found := growth(samples, method, name, warmup)) is not None}
        for method in methods
    }
    broken = judge(table)
    record = {
        "benchmark": "leaks",
        "machine": f"{psutil.cpu_count()} cores, {psutil.virtual_memory().total / 2**30:.0f} GiB, {platform.machine()}",
        "versions": {name: metadata.version(name) for name in ("torch", "transformers", "ray", "mlflow")},
        "rounds": rounds,
        "warmup": warmup,
        "seconds": round(time.monotonic() - started, 1),
        "limit_mib_per_100_rounds": LIMIT_MIB,
        "growth": table,
        "broken": broken,
        "holds": not broken,
    }
    return record, samples


def plot(samples: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw each process's private memory over its start, and its open files, over all rounds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (memory, files) = pyplot.subplots(2, 1, figsize=(7, 5), sharex=True, layout="constrained")
    names = [key for key in samples[-1] if key not in ("method", "round", "seconds", "store")]
    for name in names:
        rows = [row for row in samples if name in row]
        at = [place for place, row in _placed(samples) if name in row]
        label = name.split("-")[0] if name.startswith("replica") else name
        memory.plot(at, [row[name]["uss"] - rows[0][name]["uss"] for row in rows], label=label)
        files.plot(at, [row[name]["files"] for row in rows], label=label)
    memory.set_ylabel("private memory\nover the first sample, MiB")
    files.set_ylabel("open files")
    files.set_xlabel("rounds, one method after another")
    memory.legend(fontsize=8)
    figure.savefig(path, dpi=90)
    pyplot.close(figure)


def _placed(samples: Sequence[dict[str, Any]]) -> list[tuple[int, dict[str, Any]]]:
    """Every sample with the number of rounds that were done before it, of earlier methods too."""
    placed, before, last = [], 0, samples[0]
    for row in samples:
        if row["method"] != last["method"]:
            before += last["round"]
        placed.append((before + row["round"], row))
        last = row
    return placed


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=["fedavg", "flex"], metavar="NAME", help="one after another")
    parser.add_argument("--rounds", type=int, default=240, help="rounds of each method")
    parser.add_argument("--every", type=int, default=4, help="rounds between samples")
    parser.add_argument("--warmup", type=int, default=60, help="rounds of each method that do not count")
    parser.add_argument("--out", type=Path, help="also write the record to this file")
    parser.add_argument("--samples", type=Path, help="write every sample to this file, one JSON object a line")
    parser.add_argument("--plot", type=Path, help="draw the samples into this PNG")
    given = parser.parse_args(arguments)
    if not 0 <= given.warmup < given.rounds or given.every < 1:
        parser.error(
            f"--rounds {given.rounds} --warmup {given.warmup} --every {given.every}: expected warmup < rounds, every >= 1"
        )
    record, samples = run(given.methods, rounds=given.rounds, every=given.every, warmup=given.warmup)
    print(json.dumps(record))
    if given.out is not None:
        given.out.write_text(json.dumps(record, indent=1) + "\n")
    if given.samples is not None:
        given.samples.write_text("".join(json.dumps(row) + "\n" for row in samples))
    if given.plot is not None:
        plot(samples, given.plot)
    for line in record["broken"]:
        print(line, file=sys.stderr)
    return 0 if record["holds"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
