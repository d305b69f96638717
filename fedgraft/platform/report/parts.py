"""What the sections of the report are made of: cells, tables, drawings, the subject, and how numbers are written."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import pandas as pd
from markupsafe import Markup

from fedgraft.platform.report import figures
from fedgraft.platform.results import ComparisonResult, RunResult

__all__ = [
    "Cell",
    "Drawing",
    "Section",
    "Subject",
    "Table",
    "count_text",
    "drawings",
    "duration_text",
    "fixed",
    "lines",
    "rounds_text",
]


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """One cell: ``mark`` is ``win``, ``tie``, ``warn`` or empty; ``colour`` a method's colour; ``spread`` over seeds."""

    text: str
    mark: str = ""
    spread: str = ""
    colour: int | None = None
    is_number: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """Rows of cells. Columns are title and hint; a folded table is opened by a click, a small one stands by a figure.

    A table of more than twelve rows is folded, too, unless it is meant to be long.
    """

    caption: str
    columns: tuple[tuple[str, str], ...]
    rows: tuple[tuple[Cell, ...], ...]
    is_folded: bool = False
    is_small: bool = False
    is_long: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Drawing:
    """SVG that stands in the page as it is; a wide one takes the whole width."""

    svg: Markup
    is_wide: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Section:
    """A heading with what stands under it. ``key`` is its anchor."""

    key: str
    title: str
    words: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    figures: tuple[Drawing, ...] = ()
    tables: tuple[Table, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Subject:
    """What is reported on, a run seen as a comparison of one."""

    result: RunResult | ComparisonResult
    runs: Mapping[str, tuple[RunResult, ...]]
    colours: Mapping[str, int]
    base: str | None
    table: pd.DataFrame
    trained: Mapping[str, tuple[RunResult, ...]] = field(default_factory=dict)

    @property
    def first(self) -> RunResult:
        """The run that names model, clients and partition: the first that trained, else the first."""
        return next(iter((self.trained or self.runs).values()))[0]

    @property
    def names(self) -> dict[int, str]:
        """Client names by id."""
        return self.first.client_names


def fixed(value: float, digits: int) -> str:
    """Write a number with ``digits`` decimals; ``-`` for NaN."""
    return "-" if pd.isna(value) else f"{value:.{digits}f}"


def rounds_text(rounds: tuple[int, ...]) -> str:
    """Write the rounds of several seeds: ``6`` or ``6-8``."""
    found = sorted({each for each in rounds if each >= 0})
    return "-" if not found else str(found[0]) if len(found) == 1 else f"{found[0]}-{found[-1]}"


def count_text(value: float) -> str:
    """Write a large count in words: ``21.3 million``."""
    for size, unit in ((1e9, "billion"), (1e6, "million")):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:,.0f}"


def duration_text(seconds: float) -> str:
    """Write a time: ``20 s``, ``12 min``, ``3 h 05 min``."""
    if pd.isna(seconds):
        return "-"
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def lines(subject: Subject, pick: Callable[[RunResult], pd.Series[float]]) -> list[figures.Curve]:
    """Give one curve a method over its seeds, where it has at least two rounds."""
    lines = []
    for label, runs in subject.trained.items():
        table = pd.concat([pick(run) for run in runs], axis=1).dropna(how="all").sort_index()
        if len(table) < 2:
            continue
        lines.append(
            figures.Curve(
                label=label,
                colour=subject.colours[label],
                x=[float(value) for value in table.index],
                y=table.mean(axis=1).tolist(),
                spread=table.std(axis=1).tolist() if len(runs) > 1 else None,
            )
        )
    return lines


def drawings(charts: list[str]) -> tuple[Drawing, ...]:
    """Take SVG text of ``figures`` as HTML: matplotlib escaped what came from files."""
    widths = [re.search(r"--natural:(\d+)", chart) for chart in charts]
    return tuple(
        Drawing(svg=Markup(chart), is_wide=width is not None and int(width[1]) > 450)
        for chart, width in zip(charts, widths, strict=True)
    )
