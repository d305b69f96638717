"""Every method on Dolly at three degrees of heterogeneity: personal NLL, ROUGE-L, worst client, retention, bytes and seconds.

    python benchmarks/methods.py run --model FOLDER --data dolly15k.jsonl.gz --retention TEXT.txt.gz [--jobs 2] [--only LABEL ...]
    python benchmarks/methods.py write

``run`` trains what is not finished yet, one process a method and partition; it can be stopped and started again. ``write`` makes
benchmarks/results/methods.json of what is there, puts the tables into methods.md (its reading in words is by hand), and prints a
JSON line. Each method's learning rate is chosen on each seed's validation split from one grid. All numbers are of the last round.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import yaml

import fedgraft
from fedgraft.platform.results import client_values, summary

RESULTS = Path(__file__).parent / "results"
PARTITIONS: dict[str, dict[str, Any]] = {
    "pathological": {"name": "natural"},
    "dirichlet-0.1": {"name": "dirichlet", "alpha": 0.1},
    "dirichlet-1.0": {"name": "dirichlet", "alpha": 1.0},
}
"""How Dolly's eight categories are shared by eight clients; pathological: one category each."""

METHODS: dict[str, dict[str, Any]] = yaml.safe_load((Path(__file__).parent / "methods.yaml").read_text())
BUDGET = "experts_per_layer"
_BEGIN, _END = "<!-- tables: begin -->", "<!-- tables: end -->"
COLUMNS = {
    "own_nll": ("own NLL", 3),
    "own_nll_std": ("+- seeds", 3),
    "difference_to_fedavg": ("minus FedAvg", 3),
    "difference_error": ("+- clients x seeds", 3),
    "worst_nll": ("worst client", 3),
    "rouge_l": ("ROUGE-L", 3),
    "retention_nll": ("retention", 3),
    "mb_up": ("MB up", 2),
    "mb_down": ("MB down", 2),
    "seconds": ("s a run", 0),
    "num_seeds": ("seeds", 0),
    "rates": ("rates", None),
}


def settings(arguments: argparse.Namespace, partition: str, label: str) -> list[str]:
    """Overrides of the packaged quickstart for one method and partition."""
    options = {key: value for key, value in METHODS[label].items() if key != BUDGET}
    budget = f", budgets: {{{BUDGET}: [{METHODS[label][BUDGET]}]}}" if BUDGET in METHODS[label] else ""
    return [
        f"name={label}",
        f"model.path={arguments.model}",
        "model.dtype=float32",
        f"data={{path: {arguments.data}, preset: dolly, num_clients: 8, max_length: 80, max_train_examples: 160, "
        f"max_validation_examples: 16, max_test_examples: 24, partition: {json.dumps(PARTITIONS[partition])}, "
        f"retention: {{path: {arguments.retention}, max_examples: 8}}}}",
        f"federation={{rounds: 4, local_steps: 5, batch_size: 4{budget}}}",
        "rate_search={rates: [0.001, 0.003, 0.01], rounds: 1}",
        "evaluation={every: 4, at_start: false, generate: end, max_generate: 6, max_new_tokens: 20, choices: never, "
        "global_view: false, batch_size: 16}",
        "executor={kind: in_process, threads: 1}",
        "tracking.enabled=false",
        "output.report=false",
        f"output.folder={arguments.runs}/{partition}",
        f"seeds={json.dumps(seeds_of(arguments, partition))}",
        f"compare={{methods: {{{label}: {json.dumps(options)}}}}}",
    ]


def seeds_of(arguments: argparse.Namespace, partition: str) -> list[int]:
    """Three seeds, or as many as asked for, on the pathological partition; ``other_seeds`` on the others."""
    return list(range(arguments.seeds if partition == "pathological" else arguments.other_seeds))


def is_finished(arguments: argparse.Namespace, partition: str, label: str) -> bool:
    """Whether there are numbers of this very configuration: others are made anew."""
    path = record_path(arguments, partition, label)
    return path.is_file() and json.loads(path.read_text())["settings"] == settings(arguments, partition, label)


def record_path(arguments: argparse.Namespace, partition: str, label: str) -> Path:
    """Where the numbers of a finished run of this method lie."""
    return Path(arguments.runs) / "records" / partition / f"{label}.json"


def run_one(arguments: argparse.Namespace) -> None:
    """Train one method on one partition, and keep its numbers."""
    partition, label = arguments.one
    started = time.perf_counter()
    result = fedgraft.run(fedgraft.load_config(None, settings(arguments, partition, label)))
    runs = result.runs[label] if isinstance(result, fedgraft.ComparisonResult) else (result,)
    row = summary(result).loc[label].to_dict()
    by_seed = {}
    for run in runs:
        values = client_values(run)
        last = values[values["round"] == values["round"].max()]
        by_seed[str(run.info["seed"])] = {
            str(client): value for client, value in zip(last["client_id"], last["value"], strict=True)
        }
    record = {
        "method": METHODS[label]["name"],
        "options": METHODS[label],
        "seeds": [run.info["seed"] for run in runs],
        "summary": {key: value for key, value in row.items() if isinstance(value, int | float)},
        "rates": [run.info.get("learning_rate") for run in runs],
        "client_nll": by_seed,
        "diagnostics": [_diagnostics(run) for run in runs],
        "wall_seconds": time.perf_counter() - started,
        "settings": settings(arguments, partition, label),
        "versions": runs[0].info["versions"],
    }
    path = record_path(arguments, partition, label)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")


def _diagnostics(run: Any) -> list[dict[str, Any]]:
    """What the method noted in the last round that it noted something, by kind."""
    frame = run.diagnostics[run.diagnostics["kind"] != "routing"]
    found = []
    for kind, rows in frame.groupby("kind"):
        last = rows[rows["round"] == rows["round"].max()]
        found.append({"kind": kind, "round": int(last["round"].max()), "values": list(last["values"])[:8]})
    return found


def run_all(arguments: argparse.Namespace) -> None:
    """Start one process after another, ``jobs`` at a time; a method that fails is named and the others go on."""
    labels = arguments.only or list(METHODS)
    wanted = [(partition, label) for partition in arguments.partitions for label in labels]
    left = [pair for pair in wanted if not is_finished(arguments, *pair)]
    active: dict[tuple[str, str], subprocess.Popen[bytes]] = {}
    failed = []
    while left or active:
        while left and len(active) < arguments.jobs:
            pair = left.pop(0)
            log = Path(arguments.runs) / "logs" / f"{pair[0]}-{pair[1]}.txt"
            log.parent.mkdir(parents=True, exist_ok=True)
            with log.open("wb") as stream:
                active[pair] = subprocess.Popen(
                    [sys.executable, __file__, *sys.argv[1:], "--one", *pair], stdout=stream, stderr=subprocess.STDOUT
                )
        time.sleep(0.5)
        for pair, process in list(active.items()):
            if process.poll() is not None:
                del active[pair]
                if process.returncode:
                    failed.append(pair)
                print(f"{pair[0]} {pair[1]}: {'failed' if process.returncode else 'done'}", flush=True)
    if failed:
        sys.exit(f"failed: {', '.join(' '.join(pair) for pair in failed)}; see {arguments.runs}/logs")


def write(arguments: argparse.Namespace) -> None:
    """Make the record and the tables of every finished method."""
    tables: dict[str, dict[str, Any]] = {}
    versions: dict[str, Any] = {}
    for partition in PARTITIONS:
        records = {
            label: json.loads(record_path(arguments, partition, label).read_text())
            for label in METHODS
            if record_path(arguments, partition, label).is_file()
        }
        common = {tuple(each for each in record["settings"] if _is_common(each)) for record in records.values()}
        if len(common) > 1:
            sys.exit(f"the records of {partition} were made under different settings; run them again")
        if records:
            versions = next(iter(records.values()))["versions"]
            tables[partition] = {label: _row(record, records.get("fedavg")) for label, record in records.items()}
    machine = f"{psutil.cpu_count()} cores, {psutil.virtual_memory().total / 2**30:.0f} GiB, {platform.machine()}"
    result = {"benchmark": "methods", "machine": machine, "versions": versions, "partitions": tables}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "methods.json").write_text(json.dumps(result, indent=1) + "\n")
    text = "\n\n".join(f"### {partition}\n\n{_markdown(table)}" for partition, table in tables.items())
    page = RESULTS / "methods.md"
    before, _, rest = page.read_text(encoding="utf-8").partition(_BEGIN)
    page.write_text(f"{before}{_BEGIN}\n\n{text}\n\n{_END}{rest.partition(_END)[2]}", encoding="utf-8")
    nll = {partition: {label: round(row["own_nll"], 4) for label, row in table.items()} for partition, table in tables.items()}
    print(json.dumps({"benchmark": "methods", "own_nll": nll}))


def _is_common(override: str) -> bool:
    """Whether a setting must be the same for all methods: all but names, seeds (the tables count them), options and budgets."""
    return not override.startswith(("name=", "seeds=", "compare=", "federation=", "output.folder="))


def _row(record: dict[str, Any], fedavg: dict[str, Any] | None) -> dict[str, Any]:
    found = record["summary"]
    row = {
        "method": record["method"],
        "options": record["options"],
        "num_seeds": len(record["seeds"]),
        "own_nll": found["last_personal_nll"],
        "own_nll_std": found.get("last_personal_nll_std"),
        "worst_nll": found.get("last_worst_client_nll"),
        "rouge_l": found.get("last_rouge_l"),
        "retention_nll": found.get("last_retention_nll"),
        "mb_up": found["bytes_up"] / 1e6,
        "mb_down": found["bytes_down"] / 1e6,
        "seconds": found["seconds"],
        "rates": record["rates"],
    }
    if fedavg is not None and record["client_nll"] != fedavg["client_nll"]:
        pairs = [
            value - fedavg["client_nll"][seed][client]
            for seed, clients in record["client_nll"].items()
            for client, value in clients.items()
            if client in fedavg["client_nll"].get(seed, {})
        ]
        row["difference_to_fedavg"] = statistics.fmean(pairs)
        row["difference_error"] = statistics.stdev(pairs) / math.sqrt(len(pairs))
    return row


def _markdown(table: dict[str, Any]) -> str:
    rows = [["method", *(title for title, _ in COLUMNS.values())]]
    for label, row in sorted(table.items(), key=lambda item: item[1]["own_nll"]):
        rows.append([label, *(_cell(row.get(name), digits) for name, (_, digits) in COLUMNS.items())])
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def _cell(value: Any, digits: int | None) -> str:
    if isinstance(value, list):
        return ", ".join("-" if each is None else f"{each:g}" for each in value)
    return "-" if value is None or math.isnan(value) else f"{value:.{digits}f}"


def main() -> None:
    """Read the command line and do what it says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("run", "write"))
    parser.add_argument("--model", help="folder of the base model")
    parser.add_argument("--data", help="databricks-dolly-15k, JSON lines")
    parser.add_argument("--retention", help="general text")
    parser.add_argument("--runs", default="runs/methods", help="where run folders, logs and numbers lie")
    parser.add_argument("--jobs", type=int, default=max(1, psutil.cpu_count(logical=False) or 1), help="processes at a time")
    parser.add_argument("--only", nargs="+", choices=sorted(METHODS), help="labels in benchmarks/methods.yaml; all if not given")
    parser.add_argument("--partitions", nargs="+", choices=list(PARTITIONS), default=list(PARTITIONS))
    parser.add_argument("--seeds", type=int, default=3, help="seeds on the pathological partition")
    parser.add_argument("--other-seeds", type=int, default=1, help="seeds on the other partitions")
    parser.add_argument("--one", nargs=2, metavar=("PARTITION", "LABEL"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.command == "write":
        write(arguments)
    elif not (arguments.model and arguments.data and arguments.retention):
        parser.error("run needs --model, --data and --retention")
    elif arguments.one:
        run_one(arguments)
    else:
        run_all(arguments)


if __name__ == "__main__":
    main()
