"""The figures of a run's report, given back as SVG text for an HTML page; ``style`` says how they look."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ParamSpec

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator
from matplotlib.transforms import ScaledTranslation, Transform

from fedgraft.platform.report.style import (
    MARKERS,
    PAGE,
    SEQUENTIAL,
    colour_bar,
    new_figure,
    page_svg,
    plain,
    readable_bytes,
    short,
    spread_out,
)

__all__ = [
    "Curve",
    "bubbles",
    "byte_bars",
    "client_dots",
    "curves",
    "heatmap",
    "layer_dots",
    "scatter",
    "usage_maps",
]

_P = ParamSpec("_P")

_WIDTH = PAGE.narrow
_INK, _MUTED, _GRID, _PAPER, _METHODS = PAGE.ink, PAGE.muted, PAGE.grid, PAGE.paper, PAGE.methods


@dataclass(frozen=True, kw_only=True, slots=True)
class Curve:
    """A line with its spread: ``spread`` is drawn as a band of one deviation on both sides where it is given."""

    label: str
    colour: int
    x: Sequence[float]
    y: Sequence[float]
    spread: Sequence[float] | None = None


def _styled(draw: Callable[_P, str]) -> Callable[_P, str]:
    """Draw with the style above: matplotlib reads its settings when each part of a figure is made."""

    @functools.wraps(draw)
    def styled(*args: _P.args, **kwargs: _P.kwargs) -> str:
        with matplotlib.rc_context(PAGE.settings()):
            return draw(*args, **kwargs)

    return styled


@_styled
def curves(key: str, alt: str, lines: Sequence[Curve], *, title: str, xlabel: str = "round", level: Curve | None = None) -> str:
    """Draw lines over rounds, each named at its right end.

    Args:
        key: Makes the ids of the SVG unlike those of other figures on the page.
        alt: Read out instead of the figure.
        lines: At least one.
        title: Says what the y axis is.
        xlabel: Under the x axis.
        level: A dashed line across, such as the base model; its first y counts.
    """
    figure, axes = new_figure(_WIDTH, 3.2)
    ends: list[tuple[float, str, int]] = []
    for line in lines:
        colour = _METHODS[line.colour]
        x, y = np.asarray(line.x, float), np.asarray(line.y, float)
        marker = MARKERS[line.colour] if len(x) <= 30 else ""
        axes.plot(x, y, color=colour, lw=1.8, marker=marker, ms=4, mec=_PAPER, mew=0.6, zorder=3)
        if line.spread is not None:
            band = np.nan_to_num(np.asarray(line.spread, float))
            axes.fill_between(x, y - band, y + band, color=colour, alpha=0.15, lw=0)
        ends.append((float(y[-1]), line.label, line.colour))
    if level is not None:
        axes.axhline(level.y[0], color=_METHODS[level.colour], lw=1.3, ls=(0, (4, 3)), zorder=2)
        ends.append((float(level.y[0]), level.label, level.colour))
    axes.set_title(title)
    axes.set_xlabel(xlabel)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    axes.grid(axis="x", visible=False)
    axes.margins(x=0.02)
    _name_ends(axes, max(float(line.x[-1]) for line in lines), ends)
    return page_svg(figure, key, alt)


@_styled
def client_dots(
    key: str, alt: str, clients: Sequence[str], values: Mapping[str, tuple[int, Sequence[float]]], *, title: str
) -> str:
    """Draw one row a client with a dot for each method, and the span between the outer ones.

    Args:
        key: See ``curves``.
        alt: See ``curves``.
        clients: Names, drawn from the top.
        values: By label: colour and one value a client, NaN where there is none.
        title: Says what the x axis is.
    """
    figure, axes = new_figure(_WIDTH * 1.9, 1.1 + 0.3 * len(clients))
    rows = np.arange(len(clients))
    table = np.array([value for _, value in values.values()], float)
    for row in rows:
        present = table[:, row][np.isfinite(table[:, row])]
        if len(present):
            axes.plot([present.min(), present.max()], [row, row], color=_GRID, lw=3, solid_capstyle="round", zorder=1)
    for label, (colour, numbers) in values.items():
        axes.plot(
            numbers, rows, ls="", marker=MARKERS[colour], ms=8, color=_METHODS[colour], mec=_PAPER, mew=0.8,
            label=plain(label), zorder=3,
        )  # fmt: skip
    axes.set_yticks(rows, [short(name, 24) for name in clients], color=_INK)
    axes.set_ylim(len(clients) - 0.5, -0.5)
    axes.grid(axis="y", visible=False)
    axes.set_title(title)
    if len(values) > 1:
        figure.legend(loc="outside lower left", ncols=min(6, len(values)), frameon=False, handletextpad=0.2, columnspacing=1.2)
    return page_svg(figure, key, alt)


@_styled
def scatter(key: str, alt: str, points: Mapping[str, tuple[int, float, float]], *, xlabel: str, ylabel: str, title: str) -> str:
    """Draw named points: by label, colour, x and y."""
    figure, axes = new_figure(_WIDTH, 3.6)
    for colour, x, y in points.values():
        axes.plot([x], [y], ls="", marker=MARKERS[colour], ms=9, color=_METHODS[colour], mec=_PAPER, mew=1, zorder=3)
    axes.margins(x=0.12, y=0.15)
    axes.set_title(title)
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    middle = float(np.mean(axes.get_xlim()))
    for label, (colour, x, y), shift in _apart(axes, points):
        is_left = x > middle
        axes.annotate(
            plain(label), (x, y), xytext=(-9 if is_left else 9, shift), textcoords="offset points", va="center",
            ha="right" if is_left else "left", color=_METHODS[colour], weight="bold", size=8.5, zorder=4,
        )  # fmt: skip
    return page_svg(figure, key, alt)


@_styled
def byte_bars(key: str, alt: str, traffic: Mapping[str, tuple[int, float, float]], *, title: str) -> str:
    """Draw bytes up and down on a log scale: by label, colour, up and down."""
    figure, axes = new_figure(_WIDTH, 1.1 + 0.55 * len(traffic))
    numbers = [value for _, up, down in traffic.values() for value in (up, down) if value > 0]
    low, high = min(numbers), max(numbers)
    for row, (colour, up, down) in enumerate(traffic.values()):
        for shift, value, word, alpha in ((-0.19, up, "up", 1.0), (0.19, down, "down", 0.55)):
            if value > 0:
                axes.barh(row + shift, value, height=0.34, left=0, color=_METHODS[colour], alpha=alpha, lw=0, zorder=2)
                text = f"{readable_bytes(value)} {word}"
                axes.annotate(
                    text,
                    (value, row + shift),
                    xytext=(4, 0),
                    textcoords="offset points",
                    va="center",
                    size=8,
                    color=_MUTED,
                )
        if up <= 0 and down <= 0:
            axes.annotate("nothing sent", (low / 3, row), xytext=(4, 0), textcoords="offset points", va="center", size=8)
    axes.set_xscale("log")
    axes.set_xlim(low / 3, high * 1.5)
    first, last = int(np.ceil(np.log2(low / 3) / 10)), int(np.log2(high * 1.5) / 10)
    ticks = [2.0 ** (10 * power) for power in range(first, last + 1)]
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: readable_bytes(value)))
    axes.set_yticks(range(len(traffic)), [short(label, 24) for label in traffic], color=_INK)
    axes.set_ylim(len(traffic) - 0.45, -0.55)
    axes.grid(axis="y", visible=False)
    axes.set_title(title)
    return page_svg(figure, key, alt)


@_styled
def heatmap(
    key: str,
    alt: str,
    values: np.ndarray[tuple[int, int], np.dtype[np.float64]],
    texts: Sequence[Sequence[str]],
    *,
    rows: Sequence[str],
    columns: Sequence[str],
    title: str,
    xlabel: str,
    bar: str,
) -> str:
    """Draw a table of coloured cells with a text in each.

    Args:
        key: See ``curves``.
        alt: See ``curves``.
        values: Shape (rows, columns); the colour. NaN stays empty.
        texts: What is written in the cells.
        rows: Names on the left.
        columns: Names under the figure.
        title: Of the figure.
        xlabel: Under the columns.
        bar: Says what the colour is.
    """
    width = max(_WIDTH, min(11.6, 2.0 + 0.5 * len(columns)))
    figure, axes = new_figure(width, 1.5 + 0.3 * len(rows))
    finite = values[np.isfinite(values)]
    low, high = (float(finite.min()), float(finite.max())) if len(finite) else (0.0, 1.0)
    high = high if high > low else low + 1.0
    mesh = axes.pcolormesh(values, cmap=SEQUENTIAL, vmin=low, vmax=high, edgecolor=_PAPER, lw=1.2)
    for row, line in enumerate(texts):
        for column, text in enumerate(line):
            value = values[row, column]
            if np.isfinite(value):
                is_dark = (value - low) / (high - low) > 0.5
                colour = "#ffffff" if is_dark else "#16202b"
                axes.text(column + 0.5, row + 0.5, text, ha="center", va="center", color=colour, size=8)
    axes.set_xticks(np.arange(len(columns)) + 0.5, columns)
    axes.set_yticks(np.arange(len(rows)) + 0.5, [short(name, 24) for name in rows], color=_INK)
    axes.set_ylim(len(rows), 0)
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    axes.set_xlabel(xlabel)
    axes.set_title(title)
    colour_bar(figure, mesh, axes, bar)
    return page_svg(figure, key, alt)


@_styled
def layer_dots(
    key: str,
    alt: str,
    layers: Sequence[int],
    own: Sequence[float],
    general: Sequence[float] | None,
    *,
    colour: int,
    title: str,
) -> str:
    """Draw a value a layer on clients' own text (filled) and, joined with it, on general text (hollow) where there is any."""
    figure, axes = new_figure(_WIDTH, 2.9)
    x = np.arange(len(layers))
    main = _METHODS[colour]
    axes.plot(x, own, ls="", marker="o", ms=6.5, color=main, label="clients' own text", zorder=3)
    if general is not None:
        for position, first, second in zip(x, own, general, strict=True):
            axes.plot([position, position], [first, second], color=_GRID, lw=3, solid_capstyle="round", zorder=1)
        axes.plot(x, general, ls="", marker="o", ms=6, mfc=_PAPER, mec=main, mew=1.6, label="general text", zorder=3)
    step = max(1, len(layers) // 16)
    axes.set_xticks(x[::step], [str(layer) for layer in layers[::step]])
    axes.set_xlabel("layer")
    axes.set_ylim(bottom=0)
    axes.grid(axis="x", visible=False)
    axes.set_title(title)
    figure.legend(loc="outside lower left", ncols=2, frameon=False, handletextpad=0.2)
    return page_svg(figure, key, alt)


@_styled
def usage_maps(
    key: str,
    alt: str,
    maps: Sequence[tuple[str, np.ndarray[tuple[int, int], np.dtype[np.float64]]]],
    *,
    layers: Sequence[int],
    title: str,
) -> str:
    """Draw layers x experts maps side by side on one colour scale: 1 means as many tokens as an even split gives.

    Args:
        key: See ``curves``.
        alt: See ``curves``.
        maps: Name and values of shape (L, E), multiples of the even share.
        layers: The model's layer numbers, L of them.
        title: Over all maps.
    """
    figure = Figure(figsize=(_WIDTH, 1.3 + min(3.4, 0.2 * len(layers))), layout="constrained")
    panels = np.atleast_1d(figure.subplots(1, len(maps), sharey=True))
    high = max(2.0, *(float(np.nanmax(values)) for _, values in maps))
    for axes, (name, values) in zip(panels, maps, strict=True):
        image = axes.imshow(values, cmap=SEQUENTIAL, vmin=0, vmax=high, aspect="auto", interpolation="none")
        axes.set_title(name, color=_MUTED, size=9)
        axes.set_xlabel("expert")
        axes.grid(visible=False)
        axes.spines[:].set_visible(False)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        step = max(1, len(layers) // 12)
        axes.set_yticks(np.arange(len(layers))[::step], [str(layer) for layer in layers[::step]])
    figure.suptitle(short(title, 60), x=0.02, ha="left", size=10)
    panels[0].set_ylabel("layer")
    colour_bar(figure, image, list(panels), "x even share")
    return page_svg(figure, key, alt)


@_styled
def bubbles(
    key: str,
    alt: str,
    counts: np.ndarray[tuple[int, int], np.dtype[np.float64]],
    *,
    rows: Sequence[str],
    columns: Sequence[str],
    title: str,
) -> str:
    """Draw a circle for each row and column whose area goes with the count, which is written beside it."""
    longest = max(len(short(name, 18)) for name in columns)
    is_turned = longest * len(columns) > 52
    width = _WIDTH if len(columns) <= 8 else min(11.6, 2.4 + 0.5 * len(columns))
    figure, axes = new_figure(width, 1.1 + 0.42 * len(rows) + (0.055 * longest if is_turned else 0))
    biggest = max(float(counts.max()), 1.0)
    y, x = np.nonzero(counts)
    axes.scatter(x, y, s=380 * counts[y, x] / biggest, color=_METHODS[1], alpha=0.45, lw=0, zorder=2)
    for row, column in zip(y, x, strict=True):
        axes.text(column, row, f"{counts[row, column]:.0f}", ha="center", va="center", size=7.5, zorder=3)
    axes.set_xticks(
        range(len(columns)), [short(name, 18) for name in columns],
        rotation=40 if is_turned else 0, ha="right" if is_turned else "center", rotation_mode="anchor" if is_turned else None,
    )  # fmt: skip
    axes.set_yticks(range(len(rows)), [short(name, 24) for name in rows], color=_INK)
    axes.set_xlim(-0.6, len(columns) - 0.4)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.spines[:].set_visible(False)
    axes.grid(visible=False)
    axes.hlines(np.arange(len(rows)) + 0.5, -0.6, len(columns) - 0.4, color=_GRID, lw=0.7, zorder=1)
    axes.set_title(title)
    return page_svg(figure, key, alt)


def _name_ends(axes: Axes, x: float, ends: Sequence[tuple[float, str, int]]) -> None:
    """Write each line's name at its right end, moved up or down until no two overlap."""
    low, high = axes.get_ylim()
    gap = (high - low) * 0.075
    ordered = sorted(ends)
    heights = spread_out([end[0] for end in ordered], gap)
    for (y, label, colour), height in zip(ordered, heights, strict=True):
        axes.annotate(
            plain(short(label, 22)), (x, y), xytext=(x, height), textcoords=_right_of(axes), va="center",
            color=_METHODS[colour], weight="bold", size=8.5, annotation_clip=False,
        )  # fmt: skip
    axes.set_ylim(min(low, heights[0] - gap / 2), max(high, heights[-1] + gap / 2))


def _right_of(axes: Axes) -> Transform:
    """Give data coordinates, 7 points to the right."""
    return axes.transData + ScaledTranslation(7 / 72, 0, axes.figure.dpi_scale_trans)


def _apart(axes: Axes, points: Mapping[str, tuple[int, float, float]]) -> Iterator[tuple[str, tuple[int, float, float], float]]:
    """Give each point with the points of height by which its name has to move."""
    low, high = axes.get_ylim()
    per_unit = 190 / (high - low)
    ordered = sorted(points.items(), key=lambda item: item[1][2])
    heights = spread_out([point[2] * per_unit for _, point in ordered], 12.0)
    for (label, point), height in zip(ordered, heights, strict=True):
        yield label, point, height - point[2] * per_unit
