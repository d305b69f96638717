"""Every method on Dolly at three degrees of heterogeneity: personal NLL, ROUGE-L, worst client, retention, bytes and seconds.

    python benchmarks/methods.py run --model FOLDER --data dolly15k.jsonl.gz --retention TEXT.txt.gz [--jobs 2] [--only LABEL ...]
    python benchmarks/methods.py write

``run`` trains what has no record yet, a process for each partition, method and seed. It can be stopped and started again, and it
goes on from the records in benchmarks/results/methods-records.json. ``write`` adds the new records to that file, makes
methods.json of it and the tables in methods.md (the reading in words is by hand), and prints a JSON line. Each method's learning
rate is chosen on each seed's validation split from one grid. All numbers are of the last round.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import platform
import sys
import time
from pathlib import Path
from typing import Any

import psutil
from method_records import (
    BUDGET,
    METHODS,
    PARTITIONS,
    Unit,
    base_digest,
    fits,
    keep,
    labels_of,
    load,
    read_new,
    save,
    settings_of,
    units_of,
)
from method_tables import add_earlier, markdown, table_of, tally

import fedgraft
from fedgraft.platform.results import RunResult, client_values, summary

RESULTS = Path(__file__).parent / "results"
RECORDS = RESULTS / "methods-records.json"
_BEGIN, _END = "<!-- tables: begin -->", "<!-- tables: end -->"
_PRELOADED = [
    "fedgraft.tuning.experiment",
    "fedgraft.platform.results",
    "transformers",
    "peft",
    "datasets",
    "rouge_score.rouge_scorer",
]
"""Imported once for all processes: importing takes as long as training some of the methods."""


def overrides(arguments: argparse.Namespace, unit: Unit) -> list[str]:
    """Overrides of the packaged quickstart for one method, partition and seed."""
    settings = settings_of(unit.partition)
    retention = {"path": arguments.retention, **settings.pop("retention")}
    settings["model"] |= {"path": arguments.model}
    settings["data"] |= {"path": arguments.data, "retention": retention}
    options = {key: value for key, value in METHODS[unit.label].items() if key != BUDGET}
    if BUDGET in METHODS[unit.label]:
        settings["federation"]["budgets"] = {BUDGET: [METHODS[unit.label][BUDGET]]}
    settings |= {
        "name": unit.label,
        "tracking.enabled": False,
        "output.report": False,
        "output.folder": str(Path(arguments.runs) / unit.partition),
        "seeds": [unit.seed],
        "compare": {"methods": {unit.label: options}},
    }
    return [f"{key}={json.dumps(value)}" for key, value in settings.items()]


def run_unit(arguments: argparse.Namespace, unit: Unit) -> None:
    """Train one method on one partition with one seed, and keep its numbers. What it prints goes to a log of its own."""
    log = Path(arguments.runs) / "logs" / f"{unit.partition}-{unit.label}-seed-{unit.seed}.txt"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as stream, contextlib.redirect_stdout(stream), contextlib.redirect_stderr(stream):
        result = fedgraft.run(fedgraft.load_config(None, overrides(arguments, unit)))
    run = result.runs[unit.label][0] if isinstance(result, fedgraft.ComparisonResult) else result
    record = _record(unit, run, base_digest(Path(arguments.model))) | {"cpu_seconds": round(time.process_time(), 1)}
    keep(record, Path(arguments.runs) / "records")


def _record(unit: Unit, run: RunResult, base: str) -> dict[str, Any]:
    row = summary(run).iloc[0]
    values = client_values(run)
    last = values[values["round"] == values["round"].max()].sort_values("client_id")
    return {
        **unit._asdict(),
        "options": METHODS[unit.label],
        "rate": run.info["learning_rate"],
        "client_nll": [round(float(value), 6) for value in last["value"]],
        "rouge_l": round(float(row["last_rouge_l"]), 6),
        "retention_nll": round(float(row["last_retention_nll"]), 6),
        "bytes_up": int(row["bytes_up"]),
        "bytes_down": int(row["bytes_down"]),
        "data_fingerprint": run.info["data_fingerprint"][:16],
        "base": base,
        "settings": settings_of(unit.partition),
        "versions": run.info["versions"],
    }


def left_to_run(arguments: argparse.Namespace) -> list[Unit]:
    """Give what was asked for and has no record of these settings, options and base model."""
    base = base_digest(Path(arguments.model))
    known = load(RECORDS) | read_new(Path(arguments.runs) / "records")
    finished = {unit for unit, record in known.items() if fits(record, base)}
    wanted = units_of(arguments.partitions, arguments.only or list(METHODS), arguments.seeds)
    return [unit for unit in wanted if unit not in finished]


def run_all(arguments: argparse.Namespace) -> None:
    """Start one process after another, ``jobs`` at a time; a method that fails is named and the others go on."""
    left = left_to_run(arguments)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    active: dict[Unit, Any] = {}
    failed = []
    while left or active:
        while left and len(active) < arguments.jobs:
            unit = left.pop(0)
            active[unit] = context.Process(target=run_unit, args=(arguments, unit))
            active[unit].start()
        time.sleep(0.5)
        for unit, process in list(active.items()):
            if process.exitcode is not None:
                del active[unit]
                if process.exitcode:
                    failed.append(unit)
                print(f"{' '.join(map(str, unit))}: {'failed' if process.exitcode else 'done'}", flush=True)
    if failed:
        sys.exit(f"failed, with the errors above: {', '.join(' '.join(map(str, unit)) for unit in failed)}")


def write(arguments: argparse.Namespace) -> None:
    """Add the new records to the known ones, and make the tables of those that fit today's settings."""
    known = load(RECORDS) | read_new(Path(arguments.runs) / "records")
    stale = [unit for unit, record in known.items() if not fits(record)]
    for unit in stale:
        print(f"left out: {' '.join(map(str, unit))} was made with other settings or options", file=sys.stderr)
        del known[unit]
    RESULTS.mkdir(exist_ok=True)
    save(known, RECORDS)
    tables = {
        partition: table_of(record for unit, record in known.items() if unit.partition == partition) for partition in PARTITIONS
    }
    path = RESULTS / "methods.json"
    add_earlier(tables, json.loads(path.read_text())["partitions"] if path.is_file() else {})
    tables = {partition: table for partition, table in tables.items() if table}
    machine = f"{psutil.cpu_count()} cores, {psutil.virtual_memory().total / 2**30:.0f} GiB, {platform.machine()}"
    path.write_text(json.dumps({"benchmark": "methods", "machine": machine, "partitions": tables}, indent=1) + "\n")
    text = "\n\n".join(
        f"### {partition}\n\n{markdown(table)}\n\n{tally(table, labels_of(partition))}" for partition, table in tables.items()
    )
    page = RESULTS / "methods.md"
    before, _, rest = page.read_text(encoding="utf-8").partition(_BEGIN)
    page.write_text(f"{before}{_BEGIN}\n\n{text}\n\n{_END}{rest.partition(_END)[2]}", encoding="utf-8")
    nll = {partition: {label: round(row["own_nll"], 4) for label, row in table.items()} for partition, table in tables.items()}
    print(json.dumps({"benchmark": "methods", "own_nll": nll}))


def main() -> None:
    """Read the command line and do what it says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("run", "write"))
    parser.add_argument("--model", help="folder of the base model")
    parser.add_argument("--data", help="databricks-dolly-15k, JSON lines")
    parser.add_argument("--retention", help="general text")
    parser.add_argument("--runs", default="runs/methods", help="where run folders, logs and new records lie")
    parser.add_argument("--jobs", type=int, default=max(1, psutil.cpu_count(logical=False) or 1), help="processes at a time")
    parser.add_argument("--only", nargs="+", choices=sorted(METHODS), help="labels in benchmarks/methods.yaml; all if not given")
    parser.add_argument("--partitions", nargs="+", choices=list(PARTITIONS), default=list(PARTITIONS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    arguments = parser.parse_args()
    if arguments.command == "write":
        write(arguments)
    elif not (arguments.model and arguments.data and arguments.retention):
        parser.error("run needs --model, --data and --retention")
    elif missing := [path for path in (arguments.model, arguments.data, arguments.retention) if not Path(path).exists()]:
        parser.error(f"{missing[0]} does not exist")
    else:
        run_all(arguments)


if __name__ == "__main__":
    main()
