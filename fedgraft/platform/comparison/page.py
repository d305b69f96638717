"""A comparison's report: words, tables and figures as one HTML file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from fedgraft.platform.comparison.charts import (
    MOST_PANELS,
    MOST_ROWS,
    comparison_charts,
    heatmap_keys,
    label_colours,
    skew_of,
)
from fedgraft.platform.comparison.keys import label_of, short_keys, value_text
from fedgraft.platform.comparison.words import baseline_words, p_text, pair_words, status_words
from fedgraft.platform.report.page import Page, write_file
from fedgraft.platform.report.parts import Cell, Section, Table, drawings, fixed, rounds_text
from fedgraft.platform.report.style import Chart, colour_of, readable_bytes
from fedgraft.platform.results import QUANTITIES, Quantity

if TYPE_CHECKING:
    from fedgraft.platform.comparison.comparison import Comparison

__all__ = ["write_page"]

_MARKS = {"better": "win", "worse": "warn"}


def write_page(comparison: Comparison, path: Path) -> Path:
    """Write the report.

    Raises:
        FedgraftError: The file cannot be written.
    """
    charts = {chart.key: chart for chart in comparison_charts(comparison)}
    sections = [_summary(comparison), _tests(comparison)]
    sections += [
        _figure(charts.get(key), key, title, words)
        for key, title, words in (
            ("heatmap", "Two keys", _heatmap_words(comparison)),
            ("key", "One key", "Means over clients and seeds; bars are one deviation over seeds."),
            ("bytes", "Quality against bytes", _panel_words("Up and down, all clients and rounds.")),
            ("heterogeneity", "Quality against heterogeneity", _skew_words(comparison)),
            ("clients", "Clients", _client_words(comparison)),
            ("retention", "Retention against personalisation", _panel_words(
                "Lower left is best. Retention is measured on general text that no client trained on.")),
        )
    ]  # fmt: skip
    sections.append(_left_out(comparison))
    page = Page(
        title=_title(comparison),
        facts=_facts(comparison),
        verdict=_verdict(comparison),
        sections=[section for section in sections if section is not None],
    )
    return write_file(page, path)


def _title(comparison: Comparison) -> str:
    labels = comparison.settings["label"].nunique()
    methods = f"{labels} methods" if labels > 1 else str(comparison.settings["label"].iloc[0])
    count = len(comparison.settings)
    return methods if count == labels else f"{methods}, {count} settings"


def _facts(comparison: Comparison) -> list[tuple[str, str]]:
    runs = comparison.runs
    counts = runs["status"].value_counts()
    seeds = sorted({int(seed) for seed in runs["seed"].dropna()})
    return [
        ("Methods", ", ".join(dict.fromkeys(runs["label"]))),
        ("Compared", ", ".join(dict.fromkeys(runs["source"]))),
        *([("Keys", ", ".join(comparison.keys))] if comparison.keys else []),
        ("Seeds" if len(seeds) > 1 else "Seed", ", ".join(map(str, seeds))),
        ("Runs", ", ".join(f"{count} {status_words(str(status))}" for status, count in counts.items())),
        ("Judged by", _direction(comparison.metric)),
    ]


def _verdict(comparison: Comparison) -> list[str]:
    metric, frame = comparison.metric, comparison.settings
    lines = []
    word = "Lowest" if metric.is_lower_better else "Highest"
    blocks = [(str(data), block) for data, block in frame.groupby("data", sort=False) if len(block) > 1]
    for data, block in blocks[:MOST_PANELS]:
        column = block[metric.name].dropna()
        if not len(column):
            continue
        name = str(column.idxmin() if metric.is_lower_better else column.idxmax())
        where = f" with {data}" if data else ""
        spread = float(block[f"{metric.name}_std"][name])
        deviation = "" if pd.isna(spread) else f" \u00b1 {spread:.{metric.digits}f} over seeds"
        lines.append(f"{word} {metric.title}{where}: {name}, {column[name]:.{metric.digits}f}{deviation}.")
    tests = comparison.tests
    if len(tests):
        found = [
            f"{outcome}: {_listed(tests.loc[tests['outcome'] == outcome, 'setting'])}"
            for outcome in ("better", "worse", "not told apart")
            if (tests["outcome"] == outcome).any()
        ]
        what = baseline_words(comparison)
        lines.append(f"{what[0].upper()}{what[1:]}: {'; '.join(found) or 'none was possible'}.")
        refused = tests.loc[tests["outcome"] == "refused", "setting"]
        if len(refused):
            lines.append(f"Not tested: {_listed(refused)}; the reasons stand below.")
    lines += [f"{note[0].upper()}{note[1:]}." for note in comparison.notes]
    if len(comparison.left_out):
        counts = comparison.left_out["status"].value_counts()
        what = ", ".join(f"{count} {status_words(str(status))}" for status, count in counts.items())
        lines.append(f"In no average: {what}; listed at the end.")
    return lines


def _listed(names: pd.Series[Any]) -> str:
    shown = [str(name) for name in names[:8]]
    return ", ".join(shown) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def _summary(comparison: Comparison) -> Section:
    frame = comparison.settings
    colours = label_colours(comparison)
    keys = [key for key in comparison.keys if frame[key].map(value_text).nunique() > 1]
    short = short_keys(keys)
    shown = [quantity for quantity in QUANTITIES if frame[quantity.name].notna().any()]
    columns = [("method", ""), *((short[key], "") for key in keys), ("seeds", ""), ("round", "")]
    columns += [(quantity.title, "lower is better" if quantity.is_lower_better else "higher is better") for quantity in shown]
    columns.append(("bytes", "lower is better"))
    rows = []
    for _, block in frame.groupby("data", sort=False):
        best = {quantity.name: _best(block, quantity) for quantity in shown}
        for name, row in block.iterrows():
            cells = [Cell(text=label_of(str(name), row["label"]), colour=_colour(colours[row["label"]]))]
            cells += [Cell(text=value_text(row[key]), is_number=True) for key in keys]
            cells += [
                Cell(text=str(row["num_seeds"]), is_number=True),
                Cell(text=rounds_text(row["last_rounds"]), is_number=True),
            ]
            for quantity in shown:
                text, spread = fixed(row[quantity.name], quantity.digits), row[f"{quantity.name}_std"]
                is_best = len(block) > 1 and text == best[quantity.name] != ""
                spread_text = "" if pd.isna(spread) else fixed(spread, quantity.digits)
                cells.append(Cell(text=text, spread=spread_text, mark="win" if is_best else "", is_number=True))
            cells.append(Cell(text=readable_bytes(row["bytes_up"] + row["bytes_down"]), is_number=True))
            rows.append(tuple(cells))
    table = Table(caption="Last score, means over seeds", columns=tuple(columns), rows=tuple(rows), is_long=True)
    words = ("Tinted: best of a column on the same clients. Every number is of the last judged round. Click a heading to sort.",)
    return Section(key="summary", title="Settings", words=words, tables=(table,))


def _best(block: pd.DataFrame, quantity: Quantity) -> str:
    """Text of the best value; empty where all are alike, so nobody wins."""
    texts = block[quantity.name].dropna().map(lambda value: fixed(value, quantity.digits))
    if texts.nunique() < 2:
        return ""
    column = block[quantity.name]
    return fixed(column.min() if quantity.is_lower_better else column.max(), quantity.digits)


def _tests(comparison: Comparison) -> Section | None:
    tests = comparison.tests
    if not len(tests):
        return None
    digits = comparison.metric.digits
    columns = (
        ("setting", ""), ("against", ""), ("difference", "of means"), ("95 % interval", ""), ("pairs", "clients x seeds"),
        ("seeds better", ""), ("p Wilcoxon", "by Holm"), ("p t-test", "by Holm"), ("p over seeds", "uncorrected"),
        ("outcome", ""),
    )  # fmt: skip
    rows = []
    for _, row in tests.iterrows():
        head = (Cell(text=str(row["setting"])), Cell(text=str(row["baseline"])))
        if row["outcome"] == "refused":
            rows.append((*head, *(Cell(text="-", is_number=True) for _ in range(7)), Cell(text=f"no test: {row['reason']}")))
            continue
        texts = (
            f"{row['difference']:+.{digits}f}",
            f"{row['low']:+.{digits}f} to {row['high']:+.{digits}f}",
            str(row["num_pairs"]),
            f"{row['seeds_better']} of {row['num_seeds']}",
            p_text(row["wilcoxon_holm"]),
            p_text(row["t_holm"]),
            p_text(row["seed_p"]),
        )
        outcome = Cell(text=str(row["outcome"]), mark=_MARKS.get(row["outcome"], ""))
        rows.append((*head, *(Cell(text=text, is_number=True) for text in texts), outcome))
    table = Table(caption=f"Differences in {comparison.metric.title}", columns=columns, rows=tuple(rows), is_long=True)
    what = baseline_words(comparison)
    words = (f"{what[0].upper()}{what[1:]}. {'. '.join(line[0].upper() + line[1:] for line in pair_words(tests))}.",)
    return Section(key="tests", title="Paired tests", words=words, tables=(table,))


def _figure(chart: Chart | None, key: str, title: str, words: str) -> Section | None:
    if chart is None:
        return None
    return Section(key=key, title=title, words=(words,), figures=drawings([chart.svg()]))


def _heatmap_words(comparison: Comparison) -> str:
    axes = heatmap_keys(comparison)
    where = f"{axes[0]} and {axes[1]}; " if axes else ""
    return (
        f"{where}a map for each of what else differs, at most {MOST_PANELS} (choose the keys with --keys). Means over clients "
        "and seeds, with the deviation over seeds; darker is better; empty: nothing finished there."
    )


def _skew_words(comparison: Comparison) -> str:
    skew = skew_of(comparison)
    bars = "Means over clients and seeds; bars are one deviation over seeds."
    if skew is not None and skew[0] == "label_distance":
        return f"{bars} Heterogeneity is measured: how far a client's shares of labels are from everybody's (total variation)."
    return f"{bars} Each place on the axis has other clients, so what is compared there is the order of methods."


def _client_words(comparison: Comparison) -> str:
    more = len(comparison.settings) - MOST_ROWS
    cut = f" The first {MOST_ROWS} settings; {more} are not shown." if more > 0 else ""
    return f"A dot is a client with a seed; the box spans the middle half of them, the line is the median.{cut}"


def _panel_words(words: str) -> str:
    panels = f"A panel for each data of clients on which several settings finished, at most {MOST_PANELS}"
    return f"{words} {panels}; bars are one deviation over seeds."


def _left_out(comparison: Comparison) -> Section | None:
    left = comparison.left_out
    if not len(left):
        return None
    metric = comparison.metric
    columns = (("setting", ""), ("seed", ""), ("status", ""), ("rounds", ""), (f"last {metric.title}", ""), ("why", ""))
    rows = tuple(
        (
            Cell(text=str(row["setting"])),
            Cell(text="-" if pd.isna(row["seed"]) else str(row["seed"]), is_number=True),
            Cell(text=status_words(row["status"]), mark="warn" if row["status"] == "failed" else ""),
            Cell(text=f"{row['rounds_done']} of {row['rounds']}" if row["rounds"] else "-", is_number=True),
            Cell(text=fixed(row[metric.name], metric.digits), is_number=True),
            Cell(text=row["error"].splitlines()[0] if row["error"] else ""),
        )
        for _, row in left.iterrows()
    )
    table = Table(caption="In no average", columns=columns, rows=rows)
    words = ("A trial that did not end as planned is in no table, figure or test above, whatever its last score is.",)
    return Section(key="left-out", title="Not finished", words=words, tables=(table,))


def _colour(index: int) -> int:
    return colour_of(index - 1) if index else 0


def _direction(quantity: Quantity) -> str:
    return f"{quantity.title} ({'lower' if quantity.is_lower_better else 'higher'} is better)"
