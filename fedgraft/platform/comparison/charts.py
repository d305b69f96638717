"""Which figures a comparison has, and what each of them shows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from fedgraft.platform.comparison import figures
from fedgraft.platform.comparison.figures import Grid, Line, Point
from fedgraft.platform.comparison.keys import is_number, key_text, place_of, short_keys, value_text
from fedgraft.platform.report.style import Chart
from fedgraft.platform.results import QUANTITIES, Quantity

if TYPE_CHECKING:
    from fedgraft.platform.comparison.comparison import Comparison

__all__ = ["MOST_PANELS", "MOST_ROWS", "Skew", "comparison_charts", "heatmap_keys", "label_colours", "skew_of", "varied"]

MOST_PANELS = 9
"""Panels of one figure; further ones are not drawn, and the page says so."""

MOST_ROWS = 40
"""Settings in the figure of clients."""

_LEAST_DISTANCE = 0.01  # of labels; below this, clients of all settings are equally unlike

Skew = tuple[str, str, bool]
"""How unlike clients are: a column of ``settings``, what to call it, and whether it goes on a log scale."""


def comparison_charts(comparison: Comparison) -> list[Chart]:
    """Give the figures that the runs can fill, in the order of the page."""
    found = [
        _heatmap(comparison), _one_key(comparison), _pareto(comparison), _skew(comparison), _clients(comparison),
        _retention(comparison),
    ]  # fmt: skip
    return [chart for chart in found if chart is not None]


def label_colours(comparison: Comparison) -> dict[str, int]:
    """Give each label its colour index: 0 for the untouched base model, the others from 1 on."""
    frame = comparison.runs.drop_duplicates("label")
    trained = [label for label, method in zip(frame["label"], frame["method"], strict=True) if method != "base"]
    return {label: trained.index(label) + 1 if label in trained else 0 for label in frame["label"]}


def varied(comparison: Comparison) -> list[str]:
    """Give the keys that have two values or more among finished settings."""
    return [key for key in comparison.keys if comparison.settings[key].dropna().map(key_text).nunique() > 1]


def heatmap_keys(comparison: Comparison) -> tuple[str, str] | None:
    """Give the two keys of the heatmap: the named ones; else the first two that vary; else the one and the method."""
    if comparison.axes:
        return comparison.axes[0], comparison.axes[1]
    keys = varied(comparison)
    if len(keys) >= 2:
        return keys[0], keys[1]
    if len(keys) == 1 and comparison.settings["label"].nunique() > 1:
        return "method", keys[0]
    return None


def skew_of(comparison: Comparison) -> Skew | None:
    """Say by what settings' clients are unlike: a number under ``data.partition`` that varies, else measured labels."""
    frame = comparison.settings
    for key in varied(comparison):
        numbers = frame[key].dropna()
        if key.startswith("data.partition.") and all(map(is_number, numbers)):
            hint = " (small: clients differ more)" if key.endswith("alpha") else ""
            is_log = float(numbers.min()) > 0 and float(numbers.max()) / float(numbers.min()) >= 10
            return key, f"{key}{hint}", is_log
    distance = frame["label_distance"]
    if distance.max() - distance.min() > _LEAST_DISTANCE:
        return "label_distance", "distance of clients' labels (0: all alike)", False
    return None


def _heatmap(comparison: Comparison) -> Chart | None:
    axes = heatmap_keys(comparison)
    if axes is None:
        return None
    row_key, column_key = axes
    frame = comparison.settings.assign(method=comparison.settings["label"])
    frame = frame[frame[row_key].notna() & frame[column_key].notna()]
    others = [key for key in ("method", *varied(comparison)) if key not in axes and frame[key].map(key_text).nunique() > 1]
    rows, columns = _sorted(frame[row_key]), _sorted(frame[column_key])
    if len(rows) < 2 and len(columns) < 2:
        return None
    short = short_keys(others)
    metric = comparison.metric.name
    grids: dict[str, Grid] = {}
    for name, line in frame.iterrows():
        place = place_of(str(name)).removesuffix(": ")
        told = [line[key] if key == "method" else f"{short[key]} {value_text(line[key])}" for key in others]
        title = ", ".join([*filter(None, [place]), *told])
        grid = grids.setdefault(title, figures.empty_grid(title, len(rows), len(columns)))
        cell = rows.index(key_text(line[row_key])), columns.index(key_text(line[column_key]))
        grid.values[cell], grid.spreads[cell] = line[metric], line[f"{metric}_std"]
    names = {
        key: [value_text(_first(frame[key], text)) for text in texts] for key, texts in ((row_key, rows), (column_key, columns))
    }
    return Chart(
        key="heatmap",
        alt=f"{comparison.metric.title} by {row_key} and {column_key}",
        draw=partial(
            figures.heatmaps,
            grids=list(grids.values())[:MOST_PANELS],
            rows=names[row_key],
            columns=names[column_key],
            xlabel=column_key,
            ylabel=row_key,
            bar=_with_direction(comparison.metric),
            digits=comparison.metric.digits,
            is_lower_better=comparison.metric.is_lower_better,
        ),
    )


def _one_key(comparison: Comparison) -> Chart | None:
    """Where one key varies: a line a method."""
    keys = varied(comparison)
    skew = skew_of(comparison)
    if len(keys) != 1 or (skew is not None and skew[0] == keys[0]):
        return None
    return _line_chart(comparison, "key", keys[0], keys[0], is_log=False)


def _skew(comparison: Comparison) -> Chart | None:
    skew = skew_of(comparison)
    return None if skew is None else _line_chart(comparison, "heterogeneity", skew[0], skew[1], is_log=skew[2])


def _line_chart(comparison: Comparison, key: str, column: str, xlabel: str, *, is_log: bool) -> Chart | None:
    frame = comparison.settings
    frame = frame[frame[column].notna() & frame[comparison.metric.name].notna()]
    is_axis = all(map(is_number, frame[column]))
    texts = _sorted(frame[column])
    apart = [other for other in varied(comparison) if other != column and not _follows(frame, other, column)]
    short = short_keys(apart)
    colours = label_colours(comparison)
    lines: dict[str, Line] = {}
    for name, row in frame.iterrows():
        told = [f"{short[other]} {value_text(row[other])}" for other in apart if not _is_missing(row[other])]
        title = place_of(str(name)) + " ".join([row["label"], *(f"({part})" for part in told)])
        variants = sum(line.colour == colours[row["label"]] for line in lines.values())
        line = lines.setdefault(title, Line(label=title, colour=colours[row["label"]], variant=variants))
        x = float(row[column]) if is_axis else float(texts.index(key_text(row[column])))
        line.points.append((x, float(row[comparison.metric.name]), float(row[f"{comparison.metric.name}_std"])))
    if not lines:
        return None
    ticks = [(float(_first(frame[column], text)) if is_axis else place, value_text(_first(frame[column], text)))
             for place, text in enumerate(texts)]  # fmt: skip
    return Chart(
        key=key,
        alt=f"{comparison.metric.title} against {column} for each method",
        draw=partial(
            figures.lines,
            lines=list(lines.values()),
            xlabel=xlabel,
            ylabel=_with_direction(comparison.metric),
            ticks=ticks if column != "label_distance" and len(ticks) <= 8 else None,
            is_log=is_log,
        ),
    )


def _pareto(comparison: Comparison) -> Chart | None:
    frame = comparison.settings.assign(bytes=comparison.settings["bytes_up"] + comparison.settings["bytes_down"])
    panels = _panels(comparison, frame.assign(bytes_std=math.nan), "bytes", comparison.metric.name)
    if not panels or frame["bytes"].max() <= 0:
        return None
    return Chart(
        key="bytes",
        alt=f"{comparison.metric.title} against bytes sent, with the front of settings that nothing beats in both",
        draw=partial(
            figures.pareto,
            panels=panels,
            ylabel=_with_direction(comparison.metric),
            is_lower_better=comparison.metric.is_lower_better,
        ),
    )


def _retention(comparison: Comparison) -> Chart | None:
    panels = _panels(comparison, comparison.settings, comparison.metric.name, "retention_nll")
    if not panels:
        return None
    retention = next(quantity for quantity in QUANTITIES if quantity.name == "retention_nll")
    return Chart(
        key="retention",
        alt=f"NLL on general text against {comparison.metric.title}",
        draw=partial(
            figures.scatters,
            panels=panels,
            xlabel=_with_direction(comparison.metric),
            ylabel=_with_direction(retention),
        ),
    )


def _panels(comparison: Comparison, frame: pd.DataFrame, x: str, y: str) -> dict[str, list[Point]]:
    """Points by the clients' data: scores on different data have no common front. Panels of one point are left out."""
    colours = label_colours(comparison)
    panels: dict[str, list[Point]] = {}
    for data, found in frame[frame[x].notna() & frame[y].notna()].groupby("data", sort=False):
        if len(found) > 1:
            panels[str(data)] = [
                Point(
                    label=str(row["label"]),
                    colour=colours[row["label"]],
                    x=float(row[x]),
                    y=float(row[y]),
                    x_spread=float(row[f"{x}_std"]),
                    y_spread=float(row[f"{y}_std"]),
                )
                for _, row in found.iterrows()
            ]
    return dict(list(panels.items())[:MOST_PANELS])


def _clients(comparison: Comparison) -> Chart | None:
    colours = label_colours(comparison)
    metric = comparison.metric.name
    rows: list[tuple[str, int, np.ndarray[Any, np.dtype[np.float64]]]] = []
    breaks = []
    for _, block in comparison.settings.groupby("data", sort=False):
        for name, row in block.sort_values(metric, ascending=comparison.metric.is_lower_better).iterrows():
            values = comparison.clients.loc[comparison.clients["setting"] == name, metric].dropna().to_numpy(float)
            if len(values) and len(rows) < MOST_ROWS:
                rows.append((str(name), colours[row["label"]], values))
        breaks.append(len(rows))
    if not rows:
        return None
    return Chart(
        key="clients",
        alt=f"{comparison.metric.title} of each client, by setting",
        draw=partial(figures.client_boxes, rows=rows, breaks=breaks[:-1], xlabel=_with_direction(comparison.metric)),
    )


def _follows(frame: pd.DataFrame, key: str, column: str) -> bool:
    """Whether ``key`` has one value for each value of ``column``, so that it tells no lines apart."""
    texts = frame.assign(_key=frame[key].map(key_text), _column=frame[column].map(key_text))
    return bool((texts.groupby("_column")["_key"].nunique() == 1).all())


def _sorted(column: pd.Series[Any]) -> list[str]:
    """Texts of a column's values: numbers by size, others as they come."""
    values = {key_text(value): value for value in column}
    if all(map(is_number, values.values())):
        return sorted(values, key=lambda text: float(values[text]))
    return list(values)


def _first(column: Sequence[Any] | pd.Series[Any], text: str) -> Any:
    return next(value for value in column if key_text(value) == text)


def _is_missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def _with_direction(quantity: Quantity) -> str:
    return f"{quantity.title} ({'lower' if quantity.is_lower_better else 'higher'} is better)"
