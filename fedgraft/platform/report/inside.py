"""The sections on what went on inside: grafts, gates, routing, data, failures, checks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from fedgraft.platform.report import figures
from fedgraft.platform.report.parts import Cell, Section, Subject, Table, drawings, fixed, lines
from fedgraft.platform.results import RunResult, client_values, failure_counts

__all__ = ["INSIDE_SECTIONS"]

_MAX_FAILURES = 100
"""Failures that are listed one by one; all are counted."""


def _graft_section(subject: Subject) -> Section | None:
    choices, tables = _graft_choices(subject)
    gates = _graft_gates(subject)
    words = []
    if choices:
        words.append("Choice: at 1 or more, the grafted expert does no better than writing nothing.")
    if gates:
        words.append("Gate: means over clients, last measurement; it should open wider on the clients' own text.")
    if not words:
        return None
    charts = drawings([*choices, *gates])
    return Section(key="grafts", title="Grafts", words=(" ".join(words),), figures=charts, tables=tuple(tables))


def _graft_choices(subject: Subject) -> tuple[list[str], list[Table]]:
    charts: list[str] = []
    tables: list[Table] = []
    for label, runs in subject.trained.items():
        entries = _diagnostics(runs[0], "graft_choice")
        if not entries or "experts" not in entries[0][1]:  # grafts may be no expert's copy
            continue
        layers = [int(layer) for layer in entries[0][1]["layers"]]
        clients = [client for client, _ in entries]
        ratio = np.full((len(clients), len(layers)), math.nan)
        texts: list[list[str]] = []
        rows = []
        for place, (client, values) in enumerate(entries):
            texts.append([])
            for layer in range(len(layers)):
                chosen = _as_list(values["experts"][layer])
                texts[-1].append(",".join(str(expert) for expert in chosen))
                loss, zero = _chosen_loss(values, layer, chosen), float(values["zero_loss"][layer])
                ratio[place, layer] = loss / zero if zero else math.nan
                correlation = (values.get("rank_correlation_with_usage") or [None] * len(layers))[layer]
                rows.append(
                    (
                        Cell(text=subject.names.get(client, str(client))),
                        Cell(text=str(layers[layer]), is_number=True),
                        Cell(text=texts[-1][-1], is_number=True),
                        Cell(text=fixed(loss, 4), is_number=True, mark="warn" if loss > zero else ""),
                        Cell(text=fixed(zero, 4), is_number=True),
                        Cell(text="-" if correlation is None else fixed(float(correlation), 2), is_number=True),
                    )
                )
        charts.append(
            figures.heatmap(
                f"choice-{len(charts)}", f"Expert grafted by {label} for each client and layer", ratio, texts,
                rows=[subject.names.get(client, str(client)) for client in clients], columns=[str(layer) for layer in layers],
                title=f"{label}: the expert grafted (number) and its loss", xlabel="layer", bar="loss / loss of a zero output",
            )
        )  # fmt: skip
        tables.append(
            Table(
                caption=f"{label}: loss of the grafted expert beside that of a zero output",
                columns=(
                    ("client", ""), ("layer", ""), ("expert", ""), ("loss", "lower is better"), ("zero output", ""),
                    ("rank correlation with usage", ""),
                ),
                rows=tuple(rows),
            )
        )  # fmt: skip
    return charts, tables


def _graft_gates(subject: Subject) -> list[str]:
    charts: list[str] = []
    for label, runs in subject.trained.items():
        entries = _diagnostics(runs[0], "graft_gate", is_last=True)
        if not entries:
            continue
        own = np.nanmean([values["mean_open_own"] for _, values in entries], axis=0)
        measured = [values["mean_open_retention"] for _, values in entries if values["mean_open_retention"]]
        general = np.nanmean(measured, axis=0).tolist() if measured else None  # a run may have no general text
        layers = _layers(runs[0], len(own))
        charts.append(
            figures.layer_dots(
                f"gate-{len(charts)}", f"Mean opening of the graft gate of {label} by layer", layers,
                own.tolist(), general,
                colour=subject.colours[label], title=f"{label}: mean opening of the graft gate",
            )
        )  # fmt: skip
    return charts


def _routing_section(subject: Subject) -> Section | None:
    charts: list[str] = []
    for label, runs in subject.trained.items():
        metrics = runs[0].metrics
        if "expert_tokens" not in metrics:
            continue
        rows = metrics[metrics["expert_tokens"].notna()]
        if not len(rows):
            continue
        picked = [rows.iloc[0], rows.iloc[-1]] if len(rows) > 1 else [rows.iloc[0]]
        maps = []
        for row in picked:
            tokens = np.atleast_2d(np.asarray(row["expert_tokens"], float))
            sums = tokens.sum(axis=1, keepdims=True)
            maps.append((f"round {row['round']}", tokens * tokens.shape[1] / np.where(sums > 0, sums, 1)))
        charts.append(
            figures.usage_maps(
                f"usage-{len(charts)}", f"Tokens by layer and expert of {label}, first and last round", maps,
                layers=_layers(runs[0], len(maps[0][1])), title=label,
            )
        )  # fmt: skip
    entropy = lines(subject, _entropy)
    if entropy:
        charts.append(figures.curves("entropy", "Routing entropy by round and method", entropy, title="Routing entropy"))
    if not charts:
        return None
    words = ("Tokens of local training that each expert got, summed over the cohort. 1 is an even share; darker is more.",)
    return Section(key="routing", title="Use of experts", words=words, figures=drawings(charts))


def _entropy(run: RunResult) -> pd.Series[float]:
    values = client_values(run, "client", "routing_entropy").groupby("round")["value"].mean()
    if len(values):
        return values
    rows = run.diagnostics[run.diagnostics["kind"] == "routing"]
    means = [float(np.nanmean(entry["entropy"])) for entry in rows["values"]]
    return pd.Series(means, index=rows["round"].astype(int), dtype=float).groupby(level=0).mean()


def _partition_section(subject: Subject) -> Section | None:
    clients = subject.first.partition.get("clients") or []
    labels = [str(label) for label in subject.first.partition.get("labels") or []]
    counts = np.array([[float(client.get("train", {}).get(label, 0)) for label in labels] for client in clients])
    if not counts.size:
        return None
    names = [str(client.get("name", client.get("client_id"))) for client in clients]
    chart = figures.bubbles(
        "partition",
        "Training examples by client and label",
        counts,
        rows=names,
        columns=labels,
        title="Training examples by client and label",
    )
    splits = ("train", "validation", "test")
    rows = tuple(
        (
            Cell(text=name),
            *(Cell(text=str(sum((client.get(split) or {}).values())), is_number=True) for split in splits),
        )
        for name, client in zip(names, clients, strict=True)
    )
    table = Table(
        caption="Examples by client",
        columns=(("client", ""), *((split, "") for split in splits)),
        rows=rows,
        is_small=True,
    )
    return Section(key="partition", title="Who has which data", figures=drawings([chart]), tables=(table,))


def _failures_section(subject: Subject) -> Section | None:
    failures = [
        (label, failure) for label, runs in subject.runs.items() for run in runs for failure in run.info.get("failures") or ()
    ]
    ends = [
        f"{label}, seed {run.info.get('seed')}: {run.status}, not finished."
        for label, runs in subject.runs.items()
        for run in runs
        if run.status != "finished"
    ]
    if not failures and not ends:
        return None
    tables = (_failure_counts(subject), _failure_list(subject, failures)) if failures else ()
    return Section(key="failures", title="Failures", warnings=tuple(ends), tables=tables)


def _failure_counts(subject: Subject) -> Table:
    """How often each client gave no update, by the stage at which it failed."""
    rows = [
        (
            Cell(text=label, colour=subject.colours[label]),
            Cell(text=subject.names.get(int(row["client_id"]), str(row["client_id"]))),
            Cell(text=str(row["stage"])),
            Cell(text=str(row["rounds"]), is_number=True),
        )
        for label, runs in subject.runs.items()
        for row in failure_counts(runs).to_dict("records")
    ]
    columns = (("method", ""), ("client", ""), ("stage", ""), ("rounds", ""))
    return Table(caption="Rounds in which a client gave no update, over all seeds", columns=columns, rows=tuple(rows))


def _failure_list(subject: Subject, failures: Sequence[tuple[str, Mapping[str, Any]]]) -> Table:
    rows = [
        (
            Cell(text=label, colour=subject.colours[label]),
            Cell(text=str(failure.get("round_idx", "-")), is_number=True),
            Cell(text=subject.names.get(failure.get("client_id", -1), str(failure.get("client_id")))),
            Cell(text=str(failure.get("stage", "-"))),
            Cell(text=str(failure.get("error", "-"))),
        )
        for label, failure in failures[:_MAX_FAILURES]
    ]
    columns = (("method", ""), ("round", ""), ("client", ""), ("stage", ""), ("error", ""))
    more = f"; the first {_MAX_FAILURES} of {len(failures)}" if len(failures) > _MAX_FAILURES else ""
    return Table(caption=f"Clients that gave no update in a round{more}", columns=columns, rows=tuple(rows))


def _checks_section(subject: Subject) -> Section | None:
    words, warnings = [], []
    checked = [
        (label, run)
        for label, runs in subject.runs.items()
        for run in runs
        if run.info.get("frozen_hash_start") and run.info.get("frozen_hash_end")
    ]
    changed = [
        f"{label}, seed {run.info.get('seed')}"
        for label, run in checked
        if run.info["frozen_hash_start"] != run.info["frozen_hash_end"]
    ]
    if checked and not changed:
        count = len(checked)
        runs_text = f"all {count} runs" if count > 1 else "the run"
        words.append(f"Frozen parameters: the same hash before and after training in {runs_text}.")
    warnings += [f"Frozen parameters changed: {name}. The hash at the end is not the hash at the start." for name in changed]
    versions = subject.first.info.get("versions") or {}
    if versions:
        words.append("Versions: " + ", ".join(f"{name} {version}" for name, version in sorted(versions.items())) + ".")
    if not (words or warnings):
        return None
    return Section(key="checks", title="Checks and versions", words=tuple(words), warnings=tuple(warnings))


def _diagnostics(run: RunResult, kind: str, *, is_last: bool = False) -> list[tuple[int, Mapping[str, Any]]]:
    """Give each client's first (or last) entry of a kind, by client id."""
    rows = run.diagnostics[(run.diagnostics["kind"] == kind) & run.diagnostics["client_id"].notna()]
    rows = rows.sort_values("round").drop_duplicates("client_id", keep="last" if is_last else "first")
    pairs = zip(rows["client_id"].astype(int), rows["values"], strict=True)
    return sorted(((int(client), values) for client, values in pairs), key=lambda pair: pair[0])


def _layers(run: RunResult, count: int) -> list[int]:
    layers = [int(layer) for layer in (run.info.get("model") or {}).get("layers") or ()]
    return layers if len(layers) == count else list(range(count))


def _chosen_loss(values: Mapping[str, Any], layer: int, chosen: list[int]) -> float:
    """Give the chosen experts' mean loss, NaN without any; ``loss`` may list all experts of a layer or the chosen ones."""
    if not chosen:
        return math.nan
    losses = _as_list(values["loss"][layer])
    if len(losses) > len(chosen):
        losses = [losses[expert] for expert in chosen]
    return float(np.mean(losses))


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list) else [value]


INSIDE_SECTIONS = (
    _graft_section,
    _routing_section,
    _partition_section,
    _failures_section,
    _checks_section,
)
"""In the order of the page; each gives ``None`` where there is nothing to show."""
