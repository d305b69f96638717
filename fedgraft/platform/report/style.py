"""How figures look: on a page, where colours follow its light and dark scheme, and in a paper, where they are fixed.

On a page colours are CSS variables (``--ink``, ``--m0``, ...). Matplotlib cannot write those, so each is drawn as a
stand-in colour that no palette has, and replaced in the text; text stays text. In a paper letters are drawn as outlines, so
that a figure looks alike wherever it is put. Two calls with the same data give the same bytes of SVG.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from fedgraft.errors import FedgraftError

__all__ = [
    "MARKERS",
    "NUM_COLOURS",
    "PAGE",
    "SEQUENTIAL",
    "Chart",
    "Look",
    "colour_bar",
    "colour_of",
    "new_figure",
    "page_svg",
    "paper_look",
    "plain",
    "readable_bytes",
    "short",
    "spread_out",
    "write_chart",
]

NUM_COLOURS = 8
"""Method colours of the page's style sheet: ``--m0`` is the base model's grey, ``--m1`` to ``--m7`` are for methods."""

MARKERS = ("s", "o", "D", "^", "v", "P", "X", "h")
SEQUENTIAL = LinearSegmentedColormap.from_list("fedgraft", ["#f3f0e6", "#a9cfd0", "#4a90a8", "#1f5078", "#142447"])

_DPI = 300


@dataclass(frozen=True, kw_only=True, slots=True)
class Look:
    """Colours and sizes of a figure.

    Attributes:
        ink: Of names and numbers.
        muted: Of axes.
        grid: Of lines behind the data.
        paper: What lies behind; it edges the marks.
        methods: ``NUM_COLOURS`` of them.
        narrow: Inches that a small figure is wide.
        wide: Inches that a large one is wide.
        size: Of the letters, in points.
        is_page: Text stays text, and the background is left out.
    """

    ink: str
    muted: str
    grid: str
    paper: str
    methods: tuple[str, ...]
    narrow: float
    wide: float
    size: float
    is_page: bool

    def settings(self) -> dict[str, Any]:
        """Give matplotlib's settings, for ``matplotlib.rc_context``."""
        return {
            "svg.fonttype": "none" if self.is_page else "path",
            "svg.hashsalt": "fedgraft",
            "font.family": ["DejaVu Sans"],
            "font.size": self.size,
            "text.color": self.ink,
            "figure.facecolor": "none" if self.is_page else self.paper,
            "axes.facecolor": "none",
            "axes.edgecolor": self.muted,
            "axes.labelcolor": self.muted,
            "axes.titlecolor": self.ink,
            "axes.titlelocation": "left",
            "axes.titlesize": self.size + 1.0,
            "axes.titlepad": 8.0,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.linewidth": 0.8,
            "axes.grid": True,
            "axes.axisbelow": True,
            "grid.color": self.grid,
            "grid.linewidth": 0.7,
            "xtick.color": self.muted,
            "ytick.color": self.muted,
            "xtick.major.size": 0.0,
            "ytick.major.size": 0.0,
            "xtick.minor.size": 0.0,
            "ytick.minor.size": 0.0,
            "axes.unicode_minus": False,
        }

    def colour(self, index: int) -> str:
        """Give the colour of the method at ``index``; 0 is the base model, and past ``NUM_COLOURS`` they repeat."""
        return self.methods[colour_of(index - 1) if index else 0]

    def mark(self, index: int) -> dict[str, Any]:
        """Give marker options of ``Axes.plot`` for a method: those whose colours repeat have hollow marks."""
        colour = self.colour(index)
        is_hollow = index >= NUM_COLOURS
        return {
            "marker": MARKERS[index % len(MARKERS)],
            "color": colour,
            "mfc": self.paper if is_hollow else colour,
            "mec": colour if is_hollow else self.paper,
            "mew": 1.5 if is_hollow else 0.8,
        }


PAGE = Look(
    ink="#010203",
    muted="#010204",
    grid="#010205",
    paper="#010206",
    methods=tuple(f"#0203{idx:02x}" for idx in range(NUM_COLOURS)),
    narrow=5.6,  # 403 points, so that text stays readable when a phone scales the figure to its width
    wide=10.6,
    size=9.0,
    is_page=True,
)
"""On an HTML page."""

_VARIABLES = {PAGE.ink: "--ink", PAGE.muted: "--muted", PAGE.grid: "--grid", PAGE.paper: "--paper"} | {
    colour: f"--m{idx}" for idx, colour in enumerate(PAGE.methods)
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Chart:
    """A figure that can be drawn on a page and for a paper.

    Attributes:
        key: Its name in a page and its file's name.
        alt: Read out instead of the figure.
        draw: Makes it with a look.
    """

    key: str
    alt: str
    draw: Callable[[Look], Figure]

    def svg(self) -> str:
        """Draw it for a page."""
        with matplotlib.rc_context(PAGE.settings()):
            return page_svg(self.draw(PAGE), self.key, self.alt)


def paper_look(width: float) -> Look:
    """Give the look of figures in print: Okabe and Ito's colours on white, letters of 8 points.

    Args:
        width: Inches of a figure over the whole text; a small one is half as wide. At least 4, so that letters fit.
    """
    return Look(
        ink="#1b222b",
        muted="#454d57",
        grid="#e3e5e4",
        paper="#ffffff",
        methods=("#6c7480", "#0072b2", "#c75000", "#00855f", "#b3578c", "#a87800", "#2f93c4", "#3a3a3a"),
        narrow=max(width / 2, 3.3),
        wide=width,
        size=8.0,
        is_page=False,
    )


def write_chart(chart: Chart, folder: Path, width: float) -> tuple[Path, Path]:
    """Write a figure for a paper: ``<key>.svg`` with letters as outlines, and ``<key>.png`` with 300 dots an inch.

    Args:
        chart: What to draw.
        folder: Made where missing; files of the same name are replaced.
        width: See ``paper_look``.

    Raises:
        FedgraftError: The folder cannot be written.
    """
    look = paper_look(width)
    svg, png = folder / f"{chart.key}.svg", folder / f"{chart.key}.png"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with matplotlib.rc_context(look.settings()), warnings.catch_warnings():
            _ignore_missing_glyphs()
            figure = chart.draw(look)
            FigureCanvasSVG(figure).print_svg(svg, metadata={"Date": None})
            figure.set_dpi(_DPI)
            FigureCanvasAgg(figure).print_png(png)
    except OSError as error:
        raise FedgraftError(f"writing figures to {folder}: {error}", "give a folder that can be written") from error
    return svg, png


def colour_of(index: int, *, is_base: bool = False) -> int:
    """Give the colour index of the method at ``index`` in the comparison's order; past seven methods they repeat."""
    return 0 if is_base else 1 + index % (NUM_COLOURS - 1)


def readable_bytes(count: float) -> str:
    """Write a number of bytes with a unit: ``1.5 MiB``."""
    size, units = float(count), ("B", "KiB", "MiB", "GiB", "TiB")
    for unit in units:
        if size < 1024 or unit == units[-1]:
            return f"{size:.0f} B" if unit == "B" else f"{size:.3g} {unit}" if size < 1000 else f"{size:.0f} {unit}"
        size /= 1024
    raise AssertionError("unreachable")


def new_figure(width: float, height: float) -> tuple[Figure, Axes]:
    """Make a figure of one part, in inches."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def colour_bar(figure: Figure, image: ScalarMappable, axes: Axes | list[Axes], label: str) -> None:
    """Say beside the axes what a map's colours mean."""
    bar = figure.colorbar(image, ax=axes, pad=0.02, aspect=18, shrink=0.9)
    bar.outline.set_visible(False)
    bar.set_label(label)
    bar.ax.grid(visible=False)
    bar.locator = MaxNLocator(nbins=4)


def spread_out(heights: Sequence[float], gap: float) -> list[float]:
    """Move ascending heights apart to at least ``gap``, keeping each group centred on where it was."""
    groups: list[tuple[float, int]] = []  # centre, members
    for height in heights:
        centre, count = height, 1
        while groups and centre - groups[-1][0] < gap * (count + groups[-1][1]) / 2:
            other, members = groups.pop()
            centre = (centre * count + other * members) / (count + members)
            count += members
        groups.append((centre, count))
    return [centre + gap * (place - (count - 1) / 2) for centre, count in groups for place in range(count)]


def short(text: str, limit: int) -> str:
    """Cut a name to ``limit`` letters, ready for matplotlib."""
    text = " ".join(text.split())
    return plain(text if len(text) <= limit else f"{text[: limit - 3]}...")


def plain(text: str) -> str:
    """Keep matplotlib from reading ``$`` as mathematics and a leading ``_`` as "not in the legend"."""
    text = text.replace("\\$", "$").replace("$", "\\$")
    return f"\u200b{text}" if text.startswith("_") else text


def page_svg(figure: Figure, key: str, alt: str) -> str:
    """Write the figure: ids made the page's own, stand-in colours made CSS variables, size left to the page."""
    buffer = io.StringIO()
    with warnings.catch_warnings():
        _ignore_missing_glyphs()
        FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    used = set(re.findall(r"(?:url\(#|href=\"#)([^)\"]+)", text))
    text = re.sub(r' id="([^"]+)"', lambda found: f' id="{key}-{found[1]}"' if found[1] in used else "", text)
    text = re.sub(r"(url\(#|href=\"#)", rf"\g<1>{key}-", text)
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, f"var({variable})")
    head = text[: text.index(">")]
    box = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', head)
    assert box is not None
    label = escape(alt, quote=True)
    start = f'<svg viewBox="0 0 {box[1]} {box[2]}" role="img" aria-label="{label}" style="--natural:{float(box[1]):.0f}"'
    names = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return re.sub(r"\n\s*", "\n", f"{start} {names}{text[len(head) :]}")


def _ignore_missing_glyphs() -> None:
    """A name in a script that the measuring font lacks; the browser has a font for it."""
    warnings.filterwarnings("ignore", message="Glyph .* missing from font")
