"""The same work in fedgraft, in Flower, in pfl-research and by hand, side by side on this machine.

    python benchmarks/peers.py --envs FOLDER --set-up               makes the peers' environments, then measures
    python benchmarks/peers.py --envs FOLDER --workloads a --turns 3

Flower and pfl-research get virtual environments of their own under FOLDER (``--set-up`` makes those that are missing: pip, a few
GB and minutes). Workload A is that of ``overhead.py`` (100 clients, 20 drawn a round), B that of ``workload_b.py`` (16 clients, 8
drawn). Every framework is a process, or a tree of processes, that is started in turn, ``--turns`` times, one thread a process.

Which clients are drawn differs between frameworks, so what they compute is compared where all clients take part in each of three
rounds: the peers' parameters must be the plain loop's to 1e-5. fedgraft draws its batches and its start by its own seeds, and is
held to the same bound by ``overhead.py`` and ``workload_b.py`` against a plain loop that sees them.

For every framework: ``round_s``, median over all turns without first rounds; ``over_plain``, the median of the turns' ratios;
``start_s`` from the start of the process to the end of round 1; ``pss_mib``, the most memory of its process tree. One JSON line
on stdout.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from hosted import machine
from measuring import peak_pss
from peer_work import STARTED

HERE = Path(__file__).parent
ENVIRONMENTS = {
    "flower": ("torch==2.13.0", "flwr[simulation]==1.41.0", "transformers", "peft"),
    "pfl": ("torch==2.13.0", "pfl[pytorch]==0.6.0", "transformers", "peft"),
}
WORKLOADS = {"a": {"clients": 100, "cohort": 20, "rounds": 20}, "b": {"clients": 16, "cohort": 8, "rounds": 3}}
FRAMEWORKS = ("plain", "fedgraft", "fedgraft-2", "flower", "pfl", "pfl-2")
TOLERANCE = 1e-5


def set_up(folder: Path) -> None:
    """Make the environments that are missing."""
    for name, packages in ENVIRONMENTS.items():
        home = folder / name
        if not (home / "done").is_file():
            subprocess.run([sys.executable, "-m", "venv", "--clear", str(home)], check=True)
            subprocess.run([str(home / "bin" / "pip"), "install", "--quiet", *packages], check=True)
            (home / "done").touch()


def command_of(framework: str, envs: Path) -> list[str]:
    """How a framework is started."""
    name = framework.split("-")[0]
    if name == "fedgraft":
        return [sys.executable, str(HERE / "peers.py"), "--part", framework]
    if name == "plain":
        return [sys.executable, str(HERE / "peer_work.py")]
    home = envs / name / "bin"
    if framework == "pfl-2":
        return [str(home / "torchrun"), "--nproc_per_node=2", str(HERE / "peer_pfl.py")]
    return [str(home / "python"), str(HERE / f"peer_{name}.py")]


def start(framework: str, envs: Path, folder: Path, **asked: Any) -> dict[str, Any]:
    """Run a framework once and watch its memory."""
    out = folder / f"{framework}.json"
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "FLWR_TELEMETRY_ENABLED": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "PEERS_GIVEN": json.dumps(asked | {"out": str(out)}),
        STARTED: repr(time.time()),
    }
    if not framework.startswith("fedgraft"):
        environment.pop("PYTHONPATH", None)
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command_of(framework, envs), stdout=log, stderr=log, env=environment, cwd=HERE)
        pss = peak_pss(process.pid, lambda: process.poll() is None)
        if process.wait() or not out.is_file():
            log.seek(0)
            raise SystemExit(f"{framework} ended with {process.returncode}:\n{log.read()[-3000:]}")
    found: dict[str, Any] = json.loads(out.read_text())
    out.unlink()
    return found | {"pss_mib": pss / 2**20}


def run_fedgraft(framework: str) -> None:
    """fedgraft's part, in this process."""
    asked = json.loads(os.environ["PEERS_GIVEN"])
    replicas = 2 if framework == "fedgraft-2" else 0
    with tempfile.TemporaryDirectory(prefix="fedgraft-peers-") as name:
        ends, params = (_fedgraft_a if asked["workload"] == "a" else _fedgraft_b)(Path(name), asked, replicas)
    out = Path(asked["out"])
    np.savez(out.with_suffix(".npz"), **{key: value.numpy() for key, value in params.items()})
    started = float(os.environ[STARTED])
    out.write_text(json.dumps({"start_s": ends[0] - started, "round_s": [after - before for before, after in pairwise(ends)]}))


def _fedgraft_a(folder: Path, asked: dict[str, Any], replicas: int) -> tuple[list[float], dict[str, Any]]:
    from contextlib import nullcontext

    import hosted
    import overhead
    from ray import cloudpickle

    data = hosted.write_data(folder, asked["clients"], overhead.EXAMPLES)
    job = hosted.job_of(folder / "run", data, overhead.PerceptronSpec, num_clients=asked["clients"], cohort=asked["cohort"])
    for module in (overhead, hosted):
        cloudpickle.register_pickle_by_value(module)
    with hosted.ray_of_its_own(replicas) if replicas else nullcontext():
        timed = hosted.Timed(job, hosted.pool_of(replicas))
        shift = time.time() - time.perf_counter()
        state, _ = hosted.run_rounds(timed, asked["rounds"])
        timed.pool.close()
    return [end + shift for end in timed.ends], state.params


def _fedgraft_b(folder: Path, asked: dict[str, Any], replicas: int) -> tuple[list[float], dict[str, Any]]:
    import workload_b

    # The base and the data are there before a user's run begins; they are made by the caller.
    del folder
    return workload_b.run_fedgraft(Path(asked["prepared"]), asked["rounds"], replicas=replicas, cohort=asked.get("at_once"))


def check(frameworks: Sequence[str], envs: Path, folder: Path, workload: str) -> dict[str, float]:
    """Largest difference of the peers' parameters to the plain loop's where everybody takes part."""
    cohort = WORKLOADS[workload]["cohort"]
    apart = {}
    peers = [name for name in frameworks if not name.startswith("fedgraft")]
    for name in peers:
        start(name, envs, folder, workload=workload, clients=cohort, cohort=cohort, rounds=3)
        found, plain = (np.load(folder / f"{each}.npz") for each in (name, "plain"))
        assert sorted(found.files) == sorted(plain.files)
        apart[name] = max(float(np.abs(found[key] - plain[key]).max()) for key in plain.files)
    assert max(apart.values()) <= TOLERANCE, f"workload {workload}: parameters differ from the plain loop's: {apart}"
    return apart


def measure(
    frameworks: Sequence[str], envs: Path, folder: Path, workload: str, turns: int, at_once: int | None
) -> dict[str, Any]:
    """All frameworks in turn."""
    asked: dict[str, Any] = {"workload": workload, **WORKLOADS[workload]}
    if workload == "b":
        import workload_b

        prepared = folder / "prepared"
        prepared.mkdir()
        workload_b.prepare(prepared)
        asked |= {"prepared": str(prepared), "at_once": at_once}
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in frameworks}
    for _ in range(turns):
        for name in frameworks:
            found[name].append(start(name, envs, folder, **asked))
            print(json.dumps({"workload": workload, "framework": name, **found[name][-1]}), file=sys.stderr)
    seconds = {name: [statistics.median(each["round_s"]) for each in runs] for name, runs in found.items()}
    return {
        name: {
            "round_s": round(statistics.median(seconds[name]), 5),
            "over_plain": round(statistics.median(a / b for a, b in zip(seconds[name], seconds["plain"], strict=True)), 3),
            "start_s": round(statistics.median(each["start_s"] for each in runs), 2),
            "pss_mib": round(max(each["pss_mib"] for each in runs)),
        }
        for name, runs in found.items()
    }


def run(*, envs: Path, workloads: Sequence[str], frameworks: Sequence[str], turns: int, at_once: int | None) -> dict[str, Any]:
    """Both workloads."""
    rows: dict[str, Any] = {}
    for workload in workloads:
        with tempfile.TemporaryDirectory(prefix="fedgraft-peers-") as name:
            apart = check(frameworks, envs, Path(name), workload)
            rows[workload] = {"largest_difference": apart} | measure(frameworks, envs, Path(name), workload, turns, at_once)
    return {
        "benchmark": "peers",
        "machine": machine(),
        "environments": ENVIRONMENTS,
        "features": {"fedgraft": ["records", "state_hash"], "checkpoints": False, "tracking": False, "evaluation": False},
        "clients_at_once": at_once or 1,
        "turns": turns,
        "workloads": rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--envs", type=Path, help="folder of the peers' environments")
    parser.add_argument("--set-up", action="store_true", help="make those that are missing")
    parser.add_argument("--workloads", nargs="+", choices=sorted(WORKLOADS), default=sorted(WORKLOADS))
    parser.add_argument("--frameworks", nargs="+", choices=FRAMEWORKS, default=FRAMEWORKS)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument(
        "--cohort", type=int, dest="at_once", help="clients that fedgraft trains at once (engine.clients_at_once)"
    )
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    if given.part is not None:
        run_fedgraft(given.part)
        return
    if given.envs is None:
        parser.error("--envs names the folder of the peers' environments")
    if "plain" not in given.frameworks:
        parser.error("the plain loop is what the others are compared with: name it too")
    if given.set_up:
        set_up(given.envs.resolve())
    record = json.dumps(
        run(
            envs=given.envs.resolve(),
            workloads=given.workloads,
            frameworks=given.frameworks,
            turns=given.turns,
            at_once=given.at_once,
        )
    )
    if given.out is not None:
        given.out.write_text(record + "\n")
    print(record)


if __name__ == "__main__":
    main()
