"""The tables of benchmarks/methods.py: means and spreads over seeds, and each method's difference to FedAvg."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

__all__ = ["add_earlier", "difference", "markdown", "table_of", "tally", "verdict"]

REFERENCE = "fedavg"
COLUMNS = {
    "own_nll": ("own NLL", 3),
    "difference_to_fedavg": ("minus FedAvg", 3),
    "difference_error": ("+- error", 3),
    "verdict": ("to FedAvg", None),
    "worst_nll": ("worst client", 3),
    "rouge_l": ("ROUGE-L", 3),
    "retention_nll": ("retention", 3),
    "mb_up": ("MB up", 2),
    "mb_down": ("MB down", 2),
    "cpu_seconds": ("CPU s", 0),
    "seeds": ("seeds", None),
    "rates": ("rates", None),
}


def table_of(records: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Make a partition's rows, by label, of its records."""
    by_label: dict[str, list[Mapping[str, Any]]] = {}
    for record in sorted(records, key=lambda record: int(record["seed"])):
        by_label.setdefault(record["label"], []).append(record)
    _check_data(by_label)
    reference = {record["seed"]: record for record in by_label.get(REFERENCE, [])}
    return {label: _row(label, found, reference) for label, found in by_label.items()}


def _check_data(by_label: Mapping[str, list[Mapping[str, Any]]]) -> None:
    """Refuse to compare what was trained on different examples or bases."""
    seen: dict[int, set[tuple[str, str]]] = {}
    for records in by_label.values():
        for record in records:
            seen.setdefault(record["seed"], set()).add((record["data_fingerprint"], record["base"]))
    mixed = sorted(seed for seed, found in seen.items() if len(found) > 1)
    if mixed:
        raise SystemExit(f"records of seed {mixed[0]} were made from different data or bases: run one of them again")


def _row(label: str, records: list[Mapping[str, Any]], reference: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    nll = [statistics.fmean(record["client_nll"]) for record in records]
    seconds = [record["cpu_seconds"] for record in records if record["cpu_seconds"] is not None]
    row = {
        "method": records[0]["options"]["name"],
        "options": records[0]["options"],
        "seeds": [record["seed"] for record in records],
        "num_seeds": len(records),
        "own_nll": statistics.fmean(nll),
        "own_nll_std": statistics.stdev(nll) if len(nll) > 1 else None,
        "worst_nll": statistics.fmean(max(record["client_nll"]) for record in records),
        "rouge_l": statistics.fmean(record["rouge_l"] for record in records),
        "retention_nll": statistics.fmean(record["retention_nll"] for record in records),
        "mb_up": statistics.fmean(record["bytes_up"] for record in records) / 1e6,
        "mb_down": statistics.fmean(record["bytes_down"] for record in records) / 1e6,
        "cpu_seconds": statistics.fmean(seconds) if seconds else None,
        "rates": [record["rate"] for record in records],
    }
    pairs = [
        [own - other for own, other in zip(record["client_nll"], reference[record["seed"]]["client_nll"], strict=True)]
        for record in records
        if record["seed"] in reference
    ]
    if label == REFERENCE or not pairs:
        return row
    mean, error = difference(pairs)
    more = {"difference_to_fedavg": mean, "difference_error": error, "num_pairs": len(pairs), "verdict": verdict(mean, error)}
    return row | more


def difference(pairs: list[list[float]]) -> tuple[float, float]:
    """Give the mean of paired differences and its standard error.

    Args:
        pairs: Differences by seed and client, at least two clients and as many of each seed.

    Returns:
        The mean, and the larger of two errors: over clients, each averaged over seeds, and, with several seeds, over seeds, each
        averaged over clients. Clients of a seed share a model, and seeds share categories, so either alone may be too small.
    """
    clients = [statistics.fmean(of_client) for of_client in zip(*pairs, strict=True)]
    error = statistics.stdev(clients) / math.sqrt(len(clients))
    if len(pairs) > 1:
        error = max(error, statistics.stdev(statistics.fmean(seed) for seed in pairs) / math.sqrt(len(pairs)))
    return statistics.fmean(clients), error


def verdict(mean: float, error: float) -> str:
    """Say ``tie`` where a difference of NLL is within two standard errors, else ``win`` (lower) or ``loss``."""
    if abs(mean) <= 2 * error:
        return "tie"
    return "win" if mean < 0 else "loss"


def add_earlier(tables: dict[str, dict[str, Any]], before: Mapping[str, Mapping[str, Any]]) -> None:
    """Keep the rows that an earlier version made without records, where there are fewer seeds with records.

    Their error is over all pairs of client and seed at once, and so is their verdict.
    """
    for partition, rows in before.items():
        for label, row in rows.items():
            now = tables.setdefault(partition, {}).get(label)
            if row.get("is_earlier") and (now is None or now["num_seeds"] < row["num_seeds"]):
                compared = (
                    {"verdict": verdict(row["difference_to_fedavg"], row["difference_error"])}
                    if "difference_error" in row
                    else {}
                )
                tables[partition][label] = dict(row) | compared


def markdown(table: Mapping[str, Mapping[str, Any]]) -> str:
    """Write rows as a table, the best difference to FedAvg first; what cannot be compared comes last."""
    rows = [["method", *(title for title, _ in COLUMNS.values())]]
    for label, row in sorted(table.items(), key=lambda item: _order(*item)):
        name_of_row = f"{label} (earlier)" if row.get("is_earlier") else label
        rows.append([name_of_row, *(_cell(row.get(name), digits) for name, (_, digits) in COLUMNS.items())])
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def tally(table: Mapping[str, Mapping[str, Any]], asked: Iterable[str]) -> str:
    """Say in a line how many methods win, tie and lose against FedAvg, and which of those asked for are not there."""
    counts = Counter(row["verdict"] for row in table.values() if "verdict" in row)
    missing = [label for label in asked if label not in table]
    told = ", ".join(f"{counts[name]} {title}" for name, title in (("win", "better"), ("tie", "tied"), ("loss", "worse")))
    return f"Against FedAvg: {told}. Not run: {', '.join(missing) or 'none'}."


def _order(label: str, row: Mapping[str, Any]) -> float:
    return 0.0 if label == REFERENCE else float(row.get("difference_to_fedavg", math.inf))


def _cell(value: Any, digits: int | None) -> str:
    if value is None:
        return "-"
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return ", ".join("-" if each is None else f"{each:g}" for each in value)
    return f"{value:.{digits}f}"
