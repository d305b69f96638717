"""The sections on how well the methods did and what it cost."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd

from fedgraft.platform.report import figures
from fedgraft.platform.report.parts import (
    Cell,
    Section,
    Subject,
    Table,
    drawings,
    duration_text,
    fixed,
    lines,
    rounds_text,
)
from fedgraft.platform.report.style import readable_bytes
from fedgraft.platform.results import (
    QUANTITIES,
    ComparisonResult,
    RunResult,
    client_values,
    is_choice_informative,
    last_round,
    rank,
    round_values,
)

__all__ = ["OUTCOME_SECTIONS"]

_RANKED = {
    "personal_nll": ("client", "nll"),
    "token_accuracy": ("client", "token_accuracy"),
    "rouge_l": ("client", "rouge_l"),
    "retention_nll": ("retention", "nll"),
}


def _summary_section(subject: Subject) -> Section:
    words = []
    tables = [_summary_table(subject, "last", "At the last evaluated round")]
    if any(subject.table["best_rounds"] != subject.table["last_rounds"]):
        tables.append(_summary_table(subject, "best", "At each method's best round by NLL on own text"))
        words = [
            "The best round is picked by the measure that is shown (on validation examples, where there are any), "
            "so its numbers flatter a little."
        ]
    if len(subject.runs) > 1:
        words.insert(0, "Tinted: best of a column. Outlined: within two standard errors of it. Click a heading to sort.")
    warnings = []
    if is_choice_informative(subject.result) is False:
        warnings.append("Choice accuracy tells nothing here: the untouched model is within two standard errors of chance.")
    return Section(key="summary", title="Summary", words=tuple(words), warnings=tuple(warnings), tables=tuple(tables))


def _summary_table(subject: Subject, at: str, caption: str) -> Table:
    frame = subject.table
    shown = [quantity for quantity in QUANTITIES if frame[f"{at}_{quantity.name}"].notna().any()]
    ties = {
        name: set(ranks.index[ranks["outcome"] == "tie"])
        for name, (task, metric) in _RANKED.items()
        if at == "last" and len(ranks := rank(subject.result, task, metric))
    }
    columns = [("method", ""), ("round", "")]
    columns += [(quantity.title, "lower is better" if quantity.is_lower_better else "higher is better") for quantity in shown]
    best = {
        quantity.name: fixed(
            frame[f"{at}_{quantity.name}"].min() if quantity.is_lower_better else frame[f"{at}_{quantity.name}"].max(),
            3,
        )
        for quantity in shown
    }
    rows = []
    for label, row in frame.iterrows():
        cells = [
            Cell(text=str(label), colour=subject.colours[str(label)]),
            Cell(text=rounds_text(row[f"{at}_rounds"]), is_number=True),
        ]
        for quantity in shown:
            text = fixed(row[f"{at}_{quantity.name}"], 3)
            spread = row[f"{at}_{quantity.name}_std"]
            mark = ""
            is_silent = quantity.name == "choice_accuracy" and row["choice_informative"] is False
            is_flat = frame[f"{at}_{quantity.name}"].round(3).nunique() < 2  # nobody wins where all are alike
            if len(frame) > 1 and not is_silent and not is_flat:
                is_tie = label in ties.get(quantity.name, ())
                mark = "win" if text == best[quantity.name] and text != "-" else "tie" if is_tie else ""
            cells.append(Cell(text=text, spread="" if pd.isna(spread) else fixed(spread, 3), mark=mark, is_number=True))
        rows.append(tuple(cells))
    return Table(caption=caption, columns=tuple(columns), rows=tuple(rows))


def _learning_section(subject: Subject) -> Section | None:
    charts = []
    own = lines(subject, lambda run: round_values(run)["personal_nll"])
    if own:
        charts.append(
            figures.curves(
                "nll",
                "NLL on clients' own text by round and method",
                own,
                title="NLL on clients' own text",
                level=_level(subject),
            )
        )
    train = lines(subject, lambda run: run.metrics.set_index("round")["train_loss"].astype(float))
    if train:
        charts.append(figures.curves("train", "Training loss by round and method", train, title="Training loss"))
    if not charts:
        return None
    several = int(subject.table["num_seeds"].max()) > 1
    words = ("Means over clients. " + ("Bands: one standard deviation over seeds." if several else ""),)
    return Section(key="learning", title="Learning curves", words=words, figures=drawings(charts))


def _level(subject: Subject) -> figures.Curve | None:
    if subject.base is None or subject.base in subject.trained:
        return None
    value = float(subject.table["last_personal_nll"][subject.base])
    if math.isnan(value):
        return None
    return figures.Curve(label=subject.base, colour=0, x=[0.0], y=[value])


def _client_section(subject: Subject) -> Section | None:
    ids = sorted(subject.names)
    values: dict[str, tuple[int, list[float]]] = {}
    for label, runs in subject.runs.items():
        columns = [_at_last(run) for run in runs]
        means = pd.concat(columns, axis=1).mean(axis=1).reindex(ids)
        if means.notna().any():
            values[label] = (subject.colours[label], means.tolist())
    if len(subject.runs) == 1 and subject.base is None:
        rows = client_values(subject.first)
        before = rows[rows["round"] == 0].set_index("client_id")["value"].reindex(ids)
        if before.notna().any():
            values = {"before training": (0, before.tolist()), **values}
    if not values or not ids:
        return None
    names = [subject.names[idx] for idx in ids]
    chart = figures.client_dots(
        "clients", "NLL on own text for each client and method", names, values, title="NLL on own text, last round"
    )
    columns_out = (("client", ""), *((label, "lower is better") for label in values))
    rows_out = []
    for place, name in enumerate(names):
        numbers = [numbers[place] for _, numbers in values.values()]
        low = fixed(float(np.nanmin(numbers)), 3) if np.isfinite(numbers).any() else ""
        cells = [Cell(text=name)]
        for number in numbers:
            text = fixed(number, 3)
            cells.append(Cell(text=text, is_number=True, mark="win" if text == low and len(values) > 1 else ""))
        rows_out.append(tuple(cells))
    table = Table(caption="NLL on own text, last round", columns=columns_out, rows=tuple(rows_out), is_folded=True)
    return Section(key="clients", title="Clients", figures=drawings([chart]), tables=(table,))


def _at_last(run: RunResult) -> pd.Series[float]:
    rows = client_values(run)
    return rows[rows["round"] == last_round(run)].set_index("client_id")["value"]


def _tradeoff_section(subject: Subject) -> Section | None:
    frame = subject.table[["last_personal_nll", "last_retention_nll"]].dropna()
    charts = []
    if len(frame) > 1:
        points = {
            str(label): (subject.colours[str(label)], float(row["last_personal_nll"]), float(row["last_retention_nll"]))
            for label, row in frame.iterrows()
        }
        charts.append(
            figures.scatter(
                "tradeoff", "Retention NLL against NLL on own text, by method", points,
                xlabel="NLL on clients' own text (left is better)", ylabel="NLL on general text (down is better)",
                title="What personalising costs elsewhere",
            )
        )  # fmt: skip
    curves = lines(subject, lambda run: round_values(run)["retention_nll"])
    if curves:
        charts.append(figures.curves("retention", "Retention NLL by round and method", curves, title="NLL on general text"))
    if not charts:
        return None
    words = ["Retention is measured on general text that no client trained on, with the personal models where there are any."]
    if len(frame) > 1:
        words.insert(0, "Left: lower left is best.")
    return Section(key="tradeoff", title="Personalisation and retention", words=(" ".join(words),), figures=drawings(charts))


def _cost_section(subject: Subject) -> Section:
    frame = subject.table
    traffic = {
        str(label): (subject.colours[str(label)], float(row["bytes_up"]), float(row["bytes_down"]))
        for label, row in frame.iterrows()
        if label != subject.base
    }
    charts = []
    if any(up + down > 0 for _, up, down in traffic.values()):
        title = "Bytes of the whole run, all clients (log scale)"
        charts = [figures.byte_bars("bytes", "Bytes sent up and down by method, log scale", traffic, title=title)]
    groups: dict[str, dict[tuple[str, str], float]] = {}
    for label, runs in subject.trained.items():
        sums = pd.concat([run.ledger for run in runs]).groupby(["direction", "group"], as_index=False)["bytes"].sum()
        keys = zip(sums["direction"], sums["group"], strict=True)
        groups[label] = dict(zip(keys, sums["bytes"] / len(runs), strict=True))
    kinds = sorted({kind for found in groups.values() for kind in found}, key=lambda kind: (kind[0] != "up", kind[1]))
    columns = [("method", ""), ("time", ""), ("learning rate", ""), *((f"{group}, {way}", "") for way, group in kinds)]
    rows = []
    for name, row in frame.iterrows():
        label = str(name)
        rate = "-" if pd.isna(row["learning_rate"]) else f"{row['learning_rate']:.3g}"
        found = groups.get(label, {})
        amounts = [readable_bytes(found[kind]) if kind in found else "-" for kind in kinds]
        texts = [duration_text(row["seconds"]), rate, *amounts]
        head = Cell(text=label, colour=subject.colours[label])
        rows.append((head, *(Cell(text=text, is_number=True) for text in texts)))
    table = Table(caption="Time, rate, and bytes by group", columns=tuple(columns), rows=tuple(rows), is_small=len(kinds) <= 2)
    return Section(key="cost", title="Cost", figures=drawings(charts), tables=(table,))


def _rates_section(subject: Subject) -> Section | None:
    search = subject.result.rate_search if isinstance(subject.result, ComparisonResult) else {}
    if not search:
        return None
    rates = sorted({float(rate) for found in search.values() for rate in found["rates"]})
    rows, edges = [], []
    for label, found in search.items():
        by_rate = {float(rate): value for rate, value in zip(found["rates"], found["validation_nll"], strict=True)}
        cells = [Cell(text=label, colour=subject.colours.get(label))]
        for rate in rates:
            value = by_rate.get(rate)
            is_chosen = rate == float(found["chosen"])
            text = "-" if value is None else fixed(float(value), 3)
            cells.append(Cell(text=text, is_number=True, mark="win" if is_chosen else ""))
        rows.append(
            (
                *cells,
                Cell(text=f"{float(found['chosen']):.3g}", is_number=True, mark="warn" if found.get("is_edge") else ""),
            )
        )
        if found.get("is_edge"):
            edges.append(
                f"{label}: the chosen rate {float(found['chosen']):.3g} is at the edge of its grid; a better one may lie outside."
            )
    num_rounds = sorted({int(found["rounds"]) for found in search.values() if "rounds" in found})
    words = (
        (f"Validation NLL after {', '.join(map(str, num_rounds))} rounds, for each rate tried; the chosen one is marked.",)
        if num_rounds
        else ()
    )
    if any(len(found.get("chosen_by_seed", {})) > 1 for found in search.values()):
        listed = (
            f"{label} {', '.join(f'{rate:.3g}' for rate in found.get('chosen_by_seed', {}).values())}"
            for label, found in search.items()
        )
        words = (*words, f"The table is of the first seed. Each seed chooses on its own validation split: {'; '.join(listed)}.")
    table = Table(
        caption="Validation NLL by learning rate",
        columns=(("method", ""), *((f"{rate:.3g}", "lower is better") for rate in rates), ("chosen", "")),
        rows=tuple(rows),
    )
    return Section(key="rates", title="Learning rates", words=words, warnings=tuple(edges), tables=(table,))


OUTCOME_SECTIONS = (
    _summary_section,
    _learning_section,
    _client_section,
    _tradeoff_section,
    _cost_section,
    _rates_section,
)
"""In the order of the page; each gives ``None`` where there is nothing to show."""
