"""Does a run that is killed again and again end with the bits of one that never was? One JSON line says so.

    python benchmarks/chaos.py [--minutes 20] [--seeds 0 1 2] [--out benchmarks/results/chaos.json]

Runs ``fedgraft run`` as a user does, on a random model of a few thousand parameters with eight clients, each run with a Ray
cluster of its own, and kills its processes from outside: at seeded times and at named points, each known to have hit before it
counts. Whenever the command ends, it is started again with ``--resume``. At the end ``fedgraft.verify`` holds the run against
an undisturbed one in one process, and MLflow's tables, the run's folder and the list of processes are looked through. Before
that, runs without kills are compared: in one process, also with clients in reverse order, and with 1, 2 and 4 replicas.

Exit code 1: something differs, is lost or is left over, or a run could not be brought to its end. Linux only.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from chaos_agreement import compare_executors
from chaos_checks import examine
from chaos_experiment import METHODS, NUM_CLIENTS, ChaosError, Command, Material, make_material, run_alone, run_under
from chaos_monkey import EARLY, KINDS, Monkey
from chaos_processes import Herd

__all__ = ["Record", "main", "strike_at"]

_AGENTS_S = 90.0
"""Longest wait for what is left: two small agents of Ray look for a head that was killed for a minute before they go, too."""
TWO_RANKS = {"name": "deepspeed", "world_size": 2, "device": "cpu"}


@dataclass(slots=True)
class Record:
    """What all trials came to."""

    kills: Counter[str] = field(default_factory=Counter)
    too_late: Counter[str] = field(default_factory=Counter)
    recovery: dict[str, list[float]] = field(default_factory=dict)
    starts: int = 0
    unprovoked: list[str] = field(default_factory=list)
    rounds: int = 0
    tensors: int = 0
    private_states: int = 0
    wrong: dict[str, list[str]] = field(
        default_factory=lambda: {
            name: [] for name in ("differences", "lost_rounds", "tracking", "left_files", "processes", "unfinished")
        }
    )

    def add(self, name: str, trial: Mapping[str, Any]) -> None:
        """Take in what ``strike_at`` gave."""
        for strike in trial["strikes"]:
            self.kills[strike.kind] += 1
            self.recovery.setdefault(strike.kind, []).append(strike.recovered_s)
        self.too_late += Counter(trial["too_late"])
        self.starts += len(trial["codes"])
        self.unprovoked += [f"{name}: {what}" for what in trial["unprovoked"]]
        for kind, found in trial["wrong"].items():
            self.wrong[kind] += [f"{name}: {what}" for what in found]
        for kind in ("rounds", "tensors", "private_states"):
            setattr(self, kind, getattr(self, kind) + trial[kind])

    def as_json(self) -> dict[str, Any]:
        """The record as it is printed."""
        return {
            "kills": dict(sorted(self.kills.items())),
            "kills_too_late": dict(sorted(self.too_late.items())),
            "median_recovery_s": {kind: round(statistics.median(found), 1) for kind, found in sorted(self.recovery.items())},
            "starts_of_the_command": self.starts,
            "ends_without_a_kill": self.unprovoked,
            "rounds_compared": self.rounds,
            "tensors_hashed": self.tensors,
            "private_states_hashed": self.private_states,
            "rounds_lost": len(self.wrong["lost_rounds"]),
            "bits_different": len(self.wrong["differences"]),
            "wrong": {kind: found for kind, found in self.wrong.items() if found},
        }


def strike_at(
    material: Material,
    reference: Path,
    config: Mapping[str, Any],
    kinds: Sequence[str],
    *,
    seed: int,
    limit_s: float,
) -> dict[str, Any]:
    """Run one experiment under a monkey, then look at what it left.

    Args:
        material: Where it runs.
        reference: Folder of the undisturbed experiment.
        config: With an output folder that no other one has.
        kinds: What is done to it, in this order.
        seed: Decides waits and victims.
        limit_s: Longest time for all of it.
    """
    log = material.folder / f"{config['name']}.log"
    with tempfile.TemporaryDirectory(prefix="fgc", ignore_cleanup_errors=True) as ray_folder:
        command = Command(config, log, Path(ray_folder))
        herd = Herd(ray_folder)
        monkey = Monkey(herd, kinds, random.Random(seed))
        wrong: dict[str, list[str]] = {}
        codes: list[int] = []
        try:
            codes = run_under(command, monkey, limit_s=limit_s)
            wrong["processes"] = herd.survivors(_AGENTS_S)
        except ChaosError as error:
            wrong["unfinished"] = [str(error)]
        finally:
            herd.end()
    looked_at = {"rounds": 0, "tensors": 0, "private_states": 0}
    if "unfinished" not in wrong and command.folder is not None:
        found = examine(command.folder, reference)
        told = found.as_json()
        wrong |= {kind: list(told[kind]) for kind in ("differences", "lost_rounds", "tracking", "left_files")}
        looked_at = {kind: told[kind] for kind in looked_at}
    strikes = monkey.survived
    too_late = monkey.missed + [strike.kind for strike in monkey.strikes if strike.recovered_s is None]
    told_of = {"strikes": strikes, "too_late": too_late, "unprovoked": monkey.unprovoked, "codes": codes}
    return told_of | {"wrong": wrong, "folder": command.folder, **looked_at}


def main() -> None:
    """Run what time allows and print the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20.0, help="No trial begins after this time.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--kinds", nargs="+", choices=sorted(KINDS), default=sorted(KINDS))
    parser.add_argument("--limit-s", type=float, default=1800.0, help="Longest time for one trial.")
    parser.add_argument("--no-agreement", action="store_true", help="Leave out the runs without kills.")
    parser.add_argument("--no-ranks", action="store_true", help="Leave out the trial with replicas of two ranks.")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "chaos.json")
    arguments = parser.parse_args()
    started = time.monotonic()

    def has_time() -> bool:
        return time.monotonic() - started < 60 * arguments.minutes

    record, agreement, seeds = Record(), {}, []
    with tempfile.TemporaryDirectory(prefix="chaos-") as scratch:
        material = make_material(Path(scratch))
        if not arguments.no_agreement:
            agreement = compare_executors(material)
        reference = run_alone(material, "undisturbed", rounds=arguments.rounds, methods=METHODS)
        for seed in arguments.seeds:
            if not has_time():
                break
            kinds = random.Random(seed).sample(arguments.kinds, len(arguments.kinds))
            kinds.sort(key=lambda kind: kind not in EARLY)  # a stable sort: the others stay in their order
            config = chaos_config(material, f"chaos-{seed}", arguments.rounds)
            record.add(f"seed {seed}", strike_at(material, reference, config, kinds, seed=seed, limit_s=arguments.limit_s))
            seeds.append(seed)
        if not arguments.no_ranks and has_time():
            record.add("two ranks", _strike_at_ranks(material, arguments.limit_s))
    told = {
        "benchmark": "chaos",
        "clients": NUM_CLIENTS,
        "rounds": arguments.rounds,
        "methods": sorted(METHODS),
        "seeds": seeds,
        "agreement": agreement,
        **record.as_json(),
        "minutes": round((time.monotonic() - started) / 60, 1),
    }
    arguments.out.write_text(json.dumps(told, indent=1) + "\n")
    print(json.dumps(told))
    if told["wrong"] or any(agreement.values()):
        sys.exit(1)


def chaos_config(material: Material, name: str, rounds: int) -> dict[str, Any]:
    """The experiment that is struck: two replicas, short limits, so that what hangs is found soon."""
    executor = {"kind": "ray", "replicas": 2}
    return material.config(name, rounds=rounds, methods=METHODS, executor=executor, federation={"task_timeout_s": 20.0})


def _strike_at_ranks(material: Material, limit_s: float) -> dict[str, Any]:
    """Replicas of two ranks under DeepSpeed: one rank of one dies at its task. The undisturbed run has the same ranks."""
    methods = {"flex": METHODS["flex"]}
    executor = {"kind": "ray", "replicas": 1, "rank_grace_s": 20.0}
    configs = [
        material.config(name, rounds=4, methods=methods, executor=executor, engine=TWO_RANKS) for name in ("ranks", "chaos-ranks")
    ]
    with tempfile.TemporaryDirectory(prefix="fgc", ignore_cleanup_errors=True) as ray_folder:
        undisturbed = Command(configs[0], material.folder / "ranks.log", Path(ray_folder))
        herd = Herd(ray_folder)
        try:
            run_under(undisturbed, Monkey(herd, (), random.Random(0)), limit_s=limit_s)
        finally:
            herd.end()
    assert undisturbed.folder is not None
    trial = strike_at(material, undisturbed.folder, configs[1], ["replica_at_work"], seed=0, limit_s=limit_s)
    for strike in trial["strikes"]:
        strike.kind = "rank_at_work"
    return trial


if __name__ == "__main__":
    main()
