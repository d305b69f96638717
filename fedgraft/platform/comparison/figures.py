"""Draws a comparison's figures, for a page and for a paper: a look gives colours, letters and inches."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullFormatter, NullLocator
from numpy.typing import NDArray

from fedgraft.platform.report.style import SEQUENTIAL, Look, colour_bar, new_figure, plain, readable_bytes, short

__all__ = ["Grid", "Line", "Point", "client_boxes", "empty_grid", "front", "heatmaps", "lines", "pareto", "scatters"]

_DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (5, 1.5, 1, 1.5)))


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """A setting in a plane; spreads are deviations over seeds, NaN with one seed."""

    label: str
    colour: int
    x: float
    y: float
    x_spread: float
    y_spread: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """Points (x, y, deviation) of one method; its ``variant`` is dashed unlike the method's others."""

    label: str
    colour: int
    variant: int
    points: list[tuple[float, float, float]] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True, slots=True)
class Grid:
    """A heatmap's cells, shape (rows, columns), NaN where nothing was run."""

    title: str
    values: NDArray[np.float64]
    spreads: NDArray[np.float64]


def empty_grid(title: str, rows: int, columns: int) -> Grid:
    """Give a grid without values yet."""
    return Grid(title=title, values=np.full((rows, columns), math.nan), spreads=np.full((rows, columns), math.nan))


def heatmaps(
    look: Look,
    *,
    grids: Sequence[Grid],
    rows: Sequence[str],
    columns: Sequence[str],
    xlabel: str,
    ylabel: str,
    bar: str,
    digits: int,
    is_lower_better: bool,
) -> Figure:
    """Draw one map a grid on a common scale, darker where better, with the number in each cell.

    Args:
        look: Colours and sizes.
        grids: At least one.
        rows: Names of the rows, from the top; the grids have as many.
        columns: Names of the columns.
        xlabel: What the columns are.
        ylabel: What the rows are.
        bar: What the colour is.
        digits: Of the numbers.
        is_lower_better: Turns the colours.
    """
    figure, panels = _panels(look, len(grids), 0.55 * len(rows) + 0.75, most=2 if len(columns) > 4 else 3)
    finite = np.concatenate([grid.values[np.isfinite(grid.values)] for grid in grids])
    low, high = (float(finite.min()), float(finite.max())) if len(finite) else (0.0, 1.0)
    high = high if high > low else low + 1.0
    cmap = SEQUENTIAL.reversed() if is_lower_better else SEQUENTIAL
    for place, (axes, grid) in enumerate(zip(panels, grids, strict=True)):
        mesh = axes.pcolormesh(grid.values, cmap=cmap, vmin=low, vmax=high, edgecolor=look.paper, lw=1.2)
        for row, column in np.argwhere(np.isfinite(grid.values)):
            value, spread = float(grid.values[row, column]), float(grid.spreads[row, column])
            text = f"{value:.{digits}f}" + ("" if math.isnan(spread) else f"\n\u00b1{spread:.{digits}f}")
            red, green, blue, _ = mesh.cmap(mesh.norm(value))
            is_dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.52  # as bright as the eye sees it
            colour = "#ffffff" if is_dark else "#16202b"
            axes.text(column + 0.5, row + 0.5, text, ha="center", va="center", color=colour, size=look.size - 1.5)
        axes.set_xticks(np.arange(len(columns)) + 0.5, [short(name, 12) for name in columns])
        is_left = place % panels[0].get_gridspec().ncols == 0
        axes.set_yticks(np.arange(len(rows)) + 0.5, [short(name, 20) for name in rows] if is_left else [""] * len(rows))
        axes.set_ylim(len(rows), 0)
        axes.grid(visible=False)
        axes.spines[:].set_visible(False)
        axes.set_title(short(grid.title, 44), size=look.size)
    figure.supxlabel(plain(xlabel), size=look.size, color=look.muted)
    figure.supylabel(plain(ylabel), size=look.size, color=look.muted)
    colour_bar(figure, mesh, panels, bar.replace(" (", "\n("))
    return figure


def lines(
    look: Look,
    *,
    lines: Sequence[Line],
    xlabel: str,
    ylabel: str,
    ticks: Sequence[tuple[float, str]] | None,
    is_log: bool,
) -> Figure:
    """Draw a line a method with the deviation over seeds as bars.

    Args:
        look: Colours and sizes.
        lines: At least one; a line of one point is a mark.
        xlabel: Under the x axis.
        ylabel: Beside the y axis.
        ticks: Places and names on the x axis; ``None``: numbers.
        is_log: The x axis.
    """
    figure, axes = new_figure(look.wide, look.wide * 0.36)
    for line in lines:
        x, y, spread = np.array(sorted(line.points)).T
        axes.errorbar(
            x, y, yerr=np.nan_to_num(spread) if np.isfinite(spread).any() else None, label=short(line.label, 44),
            ls=_DASHES[line.variant % len(_DASHES)], lw=1.6, ms=6, capsize=2.5, elinewidth=1, zorder=3, **look.mark(line.colour),
        )  # fmt: skip
    if is_log:
        axes.set_xscale("log")
        axes.xaxis.set_minor_formatter(NullFormatter())
    if ticks is not None:
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xticks([place for place, _ in ticks], [short(name, 14) for _, name in ticks])
    axes.set_xlabel(plain(xlabel))
    axes.set_ylabel(ylabel)
    axes.grid(axis="x", visible=False)
    figure.legend(loc="outside right upper", frameon=False, handlelength=3)
    return figure


def pareto(look: Look, *, panels: Mapping[str, Sequence[Point]], ylabel: str, is_lower_better: bool) -> Figure:
    """Draw quality against bytes, a panel for each data, and the front: settings that no other beats in both."""
    figure, found = _panels(look, len(panels), look.wide * 0.3)
    nothing = min((point.x for points in panels.values() for point in points if point.x > 0), default=1.0) / 4
    for axes, (title, points) in zip(found, panels.items(), strict=True):
        shown = [(max(point.x, nothing), point.y) for point in points]
        best = front(shown, is_lower_better)
        axes.step([x for x, _ in best], [y for _, y in best], where="post", color=look.muted, lw=1.2, ls=(0, (4, 2)), zorder=2)
        for point, (x, y) in zip(points, shown, strict=True):
            _mark(axes, look, point, x, y, with_x=False)
        axes.set_xscale("log")
        axes.set_title(short(title, 40), size=look.size)
    high = max(max(point.x, nothing) for points in panels.values() for point in points)
    has_nothing = any(point.x <= 0 for points in panels.values() for point in points)
    ticks = _byte_ticks(nothing * 4, high, most=int(figure.get_figwidth() / found[0].get_gridspec().ncols / 0.9))
    for axes in found:
        axes.set_xlim(nothing / 1.8 if has_nothing else nothing * 2.5, high * 1.8)
        axes.xaxis.set_major_locator(FixedLocator([nothing, *ticks] if has_nothing else ticks))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(
            FuncFormatter(lambda value, _: "none" if value <= nothing * 1.01 else readable_bytes(value))
        )
    _label(found, "bytes up and down, whole run", ylabel)
    front_line = Line2D([], [], color=look.muted, lw=1.2, ls=(0, (4, 2)), label="front: beaten in both by nothing")
    _legend(figure, look, panels, front_line)
    return figure


def scatters(look: Look, *, panels: Mapping[str, Sequence[Point]], xlabel: str, ylabel: str) -> Figure:
    """Draw settings in a plane, a panel for each data, with deviations over seeds."""
    figure, found = _panels(look, len(panels), look.wide * 0.3)
    for axes, (title, points) in zip(found, panels.items(), strict=True):
        for point in points:
            _mark(axes, look, point, point.x, point.y, with_x=True)
        axes.margins(0.1)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=5))
        axes.set_title(short(title, 40), size=look.size)
    _label(found, xlabel, ylabel)
    _legend(figure, look, panels)
    return figure


def client_boxes(
    look: Look, *, rows: Sequence[tuple[str, int, NDArray[np.float64]]], breaks: Sequence[int], xlabel: str
) -> Figure:
    """Draw a row a setting: every client and seed a dot, a box from quartile to quartile, a line at the median.

    Args:
        look: Colours and sizes.
        rows: Name, colour index and values, from the top.
        breaks: Rows before which a line is drawn: other clients' data begin there.
        xlabel: What the values are.
    """
    figure, axes = new_figure(look.wide, 0.75 + 0.27 * len(rows))
    for row, (_, index, values) in enumerate(rows):
        colour = look.colour(index)
        quarter, median, three_quarters = np.quantile(values, [0.25, 0.5, 0.75])
        axes.barh(row, three_quarters - quarter, left=quarter, height=0.62, color=colour, alpha=0.25, lw=0, zorder=2)
        axes.plot([median, median], [row - 0.31, row + 0.31], color=colour, lw=2, solid_capstyle="butt", zorder=3)
        heights = row + 0.16 * (np.arange(len(values)) % 3 - 1)  # so that dots of one value stay two
        axes.plot(np.sort(values), heights, ls="", marker="o", ms=3.2, mfc=colour, mec="none", alpha=0.75, zorder=4)
    for place in breaks:
        axes.axhline(place - 0.5, color=look.muted, lw=0.6)
    axes.set_yticks(range(len(rows)), [short(name, 40) for name, _, _ in rows], color=look.ink)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel(xlabel)
    return figure


def front(points: Sequence[tuple[float, float]], is_lower_better: bool) -> list[tuple[float, float]]:
    """Give the points that no other point beats: none has as few bytes and a better value; by ascending bytes."""
    sign = 1.0 if is_lower_better else -1.0
    found: list[tuple[float, float]] = []
    for x, y in sorted(points, key=lambda point: (point[0], sign * point[1])):
        if not found or sign * y < sign * found[-1][1]:
            found.append((x, y))
    return found


def _panels(look: Look, count: int, height: float, most: int = 3) -> tuple[Figure, list[Axes]]:
    """Make ``count`` panels, at most ``most`` beside each other; a single one is not as wide as the page."""
    columns = min(count, most)
    lines = math.ceil(count / columns)
    width = look.wide * (0.62 if columns == 1 else 0.85 if columns == 2 else 1.0)
    figure = Figure(figsize=(width, height * lines + 0.5), layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False).flatten()
    for axes in grid[count:]:
        axes.remove()
    return figure, list(grid[:count])


def _mark(axes: Axes, look: Look, point: Point, x: float, y: float, *, with_x: bool) -> None:
    axes.errorbar(
        [x], [y], yerr=None if math.isnan(point.y_spread) else point.y_spread,
        xerr=point.x_spread if with_x and not math.isnan(point.x_spread) else None,
        ls="", ms=7, capsize=2, elinewidth=0.9, zorder=3, **look.mark(point.colour),
    )  # fmt: skip


def _label(panels: Sequence[Axes], xlabel: str, ylabel: str) -> None:
    """Name the axes where a reader looks for it: below the lowest panels, and left of the first ones."""
    columns = panels[0].get_gridspec().ncols
    for place, axes in enumerate(panels):
        if place + columns >= len(panels):
            axes.set_xlabel(xlabel)
        if place % columns == 0:
            axes.set_ylabel(ylabel)


def _legend(figure: Figure, look: Look, panels: Mapping[str, Sequence[Point]], *more: Line2D) -> None:
    labels = {point.label: point.colour for points in panels.values() for point in points}
    marks = [Line2D([], [], ls="", ms=7, label=short(label, 30), **look.mark(index)) for label, index in labels.items()]
    handles = [*marks, *more]
    columns = max(1, min(len(handles), int(figure.get_figwidth() / 1.7)))
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False, handletextpad=0.4, columnspacing=1.2)


def _byte_ticks(low: float, high: float, most: int) -> list[float]:
    """Powers of two, at most ``most`` (two or more)."""
    first, last = math.ceil(math.log2(low / 1.6)), math.floor(math.log2(high * 1.6))
    step = max(1, math.ceil((last - first + 1) / max(2, min(most, 5))))
    return [2.0**power for power in range(first, last + 1, step)]
