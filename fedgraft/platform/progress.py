"""What a run tells while it runs: events, and displays that show them on a terminal or as plain lines.

Kinds of events and what their ``data`` may hold (a display takes what is there and misses nothing that is not):

    stage         text
    pretrain      step, num_steps, loss
    plan          total_rounds
    run_started   seed, rounds, learning_rate, purpose ("search" or "run")
    round         round, rounds, train_loss, bytes_up, bytes_down, seconds
    evaluation    round, nll, worst_nll, retention_nll, rouge_l
    failure       client_id, stage, error
    run_finished  folder, seconds
    note          text
    done          folder, report
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

__all__ = ["Display", "Event", "LineDisplay", "LiveDisplay", "bytes_text", "make_display"]

_PRETRAIN_LINES = 10  # plain lines that a pre-training gives, however many steps it has
_MAX_ROWS = 12  # methods in the live table


@dataclass(frozen=True, kw_only=True)
class Event:
    """One thing that happened. ``kind`` says which fields ``data`` has; ``label`` is the method's, or empty."""

    kind: str
    label: str = ""
    data: Mapping[str, object] = field(default_factory=dict)


def bytes_text(count: float) -> str:
    """Write a number of bytes with three digits or fewer: ``1.2 MiB``; negative and non-finite ones as ``?``."""
    if not math.isfinite(count) or count < 0:
        return "?"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if count < 1000 or unit == "TiB":
            break
        count /= 1024
    return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"


class Display(ABC):
    """Takes events, as a context manager that is also a callable. An event it does not know is left out."""

    def __init__(self) -> None:
        self._rounds: dict[str, object] = {}

    def __enter__(self) -> Self:
        """Begin to show."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Leave the terminal as it was found."""

    def __call__(self, event: Event) -> None:
        """Show one event."""
        if event.kind == "run_started":
            self._rounds[event.label] = event.data.get("rounds")
        elif event.kind == "round" and "rounds" not in event.data and event.label in self._rounds:
            event = replace(event, data={**event.data, "rounds": self._rounds[event.label]})
        self.show(event)

    @abstractmethod
    def show(self, event: Event) -> None:
        """Show one event, of a round with the number of rounds that its run has."""


class LineDisplay(Display):
    """One plain line for each event that matters; the choice for log files and notebooks.

    Args:
        console: Where lines go; they are never wrapped or coloured.
        quiet: Only notes, failures and the end.
    """

    def __init__(self, console: Console, quiet: bool = False) -> None:
        super().__init__()
        self._console = console
        self._quiet = quiet
        self._pretrain_shown = -1

    def show(self, event: Event) -> None:
        """Print the event's line, if it has one."""
        if self._quiet and event.kind not in ("failure", "note", "done"):
            return
        if event.kind == "pretrain" and not self._is_due(event.data):
            return
        text = describe(event)
        if text:
            self._console.print(Text(text), soft_wrap=True)

    def _is_due(self, data: Mapping[str, object]) -> bool:
        step, total = _number(data, "step"), _number(data, "num_steps")
        tenth = int(_PRETRAIN_LINES * step / total) if total > 0 and step == step else 0
        is_due = tenth != self._pretrain_shown
        self._pretrain_shown = tenth
        return is_due


class LiveDisplay(Display):
    """Bars, the state of every method so far, and the last lines of what matters; for a terminal.

    Args:
        console: A terminal.
    """

    def __init__(self, console: Console) -> None:
        super().__init__()
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left:"),
            TimeRemainingColumn(),
        )
        self._progress = Progress(*columns, console=console, auto_refresh=False)
        self._bars: dict[str, TaskID] = {}
        self._stage = "starting"
        self._rows: dict[str, _Row] = {}
        self._live = Live(console=console, get_renderable=self._render, refresh_per_second=4)

    def __enter__(self) -> Self:
        """Take over the lower part of the terminal."""
        self._live.start(refresh=True)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Leave the last state standing."""
        self._live.stop()

    def show(self, event: Event) -> None:
        """Update bars and table; print what should stay."""
        data = event.data
        if event.kind in ("stage", "run_started"):
            self._stage = describe(event)
        elif event.kind == "pretrain":
            self._set_bar("pre-training", _number(data, "step"), _number(data, "num_steps"))
        elif event.kind == "plan":
            self._set_bar("all rounds", 0, _number(data, "total_rounds"))
        elif event.kind == "round":
            self._stage = self._phase(event)
            if "all rounds" in self._bars:
                self._progress.advance(self._bars["all rounds"])
        elif event.kind in ("failure", "note", "done"):
            self._live.console.print(Text(describe(event), style="yellow" if event.kind == "failure" else ""))
        if event.kind in ("run_started", "round", "evaluation", "run_finished"):
            self._row(event).take(event)

    def _phase(self, event: Event) -> str:
        row = self._row(event)
        return f"{event.label}: {row.phase} round {_whole(event.data, 'round')} of {_whole(event.data, 'rounds')}"

    def _row(self, event: Event) -> _Row:
        return self._rows.setdefault(event.label, _Row())

    def _set_bar(self, name: str, done: float, total: float) -> None:
        if not (math.isfinite(done) and math.isfinite(total)):
            return
        if name not in self._bars:
            self._bars[name] = self._progress.add_task(name, total=total)
        self._progress.update(self._bars[name], completed=done, total=total)

    def _render(self) -> RenderableType:
        parts: list[RenderableType] = [Text(self._stage, style="bold"), self._progress]
        if self._rows:
            table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
            for title in ("method", "round", "train loss", "own NLL", "worst client", "retention", "up", "down"):
                table.add_column(title, justify="left" if title == "method" else "right", style=None, header_style="dim")
            for label, row in list(self._rows.items())[-_MAX_ROWS:]:
                table.add_row(Text(label), *row.cells())
            parts.append(table)
        return Group(*parts)


@dataclass(slots=True)
class _Row:
    """The latest numbers of one method."""

    phase: str = "round"
    numbers: dict[str, float] = field(default_factory=dict)

    def take(self, event: Event) -> None:
        if event.kind == "run_started":
            purpose = event.data.get("purpose")
            self.phase = f"search at rate {_figure(event.data, 'learning_rate')}," if purpose == "search" else "run,"
            self.numbers.clear()
        for name in ("round", "rounds", "train_loss", "nll", "worst_nll", "retention_nll"):
            if name in event.data:
                self.numbers[name] = _number(event.data, name)
        for name in ("bytes_up", "bytes_down"):
            if event.kind == "round" and name in event.data:
                self.numbers[name] = self.numbers.get(name, 0.0) + _number(event.data, name)

    def cells(self) -> list[str]:
        numbers = self.numbers
        shown = [f"{_whole(numbers, 'round')}/{_whole(numbers, 'rounds')}"]
        shown += [_figure(numbers, name) for name in ("train_loss", "nll", "worst_nll", "retention_nll")]
        return shown + [bytes_text(numbers[name]) if name in numbers else "" for name in ("bytes_up", "bytes_down")]


def describe(event: Event) -> str:
    """Say an event in one line of plain text; empty for one that has nothing to say."""
    data, kind = event.data, event.kind
    about = f"{event.label}: " if event.label else ""
    if kind in ("stage", "note"):
        return f"{about}{data.get('text', '')}" if data.get("text") else ""
    if kind == "pretrain":
        return f"pre-training: step {_whole(data, 'step')} of {_whole(data, 'num_steps')}, loss {_figure(data, 'loss')}"
    if kind == "plan":
        return f"{_whole(data, 'total_rounds')} rounds in all"
    if kind == "run_started":
        purpose = "rate search" if data.get("purpose") == "search" else "run"
        return (
            f"{about}{purpose}, seed {data.get('seed', '?')}, {_whole(data, 'rounds')} rounds, "
            f"learning rate {_figure(data, 'learning_rate')}"
        )
    if kind == "round":
        return (
            f"{about}round {_whole(data, 'round')}/{_whole(data, 'rounds')}, train loss {_figure(data, 'train_loss')}, "
            f"up {bytes_text(_number(data, 'bytes_up'))}, down {bytes_text(_number(data, 'bytes_down'))}, "
            f"{_seconds(data)}"
        )
    if kind == "evaluation":
        names = {"nll": "own NLL", "worst_nll": "worst client", "retention_nll": "retention NLL", "rouge_l": "ROUGE-L"}
        found = [f"{title} {_figure(data, name)}" for name, title in names.items() if data.get(name) is not None]
        return f"{about}after round {_whole(data, 'round')}: {', '.join(found)}" if found else ""
    if kind == "failure":
        return f"{about}client {data.get('client_id', '?')} failed at {data.get('stage', '?')}: {data.get('error', '?')}"
    if kind == "run_finished":
        return f"{about}finished in {_seconds(data)}{_at(data, 'folder')}"
    if kind == "done":
        return f"done{_at(data, 'folder')}{_at(data, 'report', '; report ')}"
    return ""


def make_display(console: Console, quiet: bool = False) -> Display:
    """Give the display that fits: a live one on a terminal, else plain lines; ``quiet`` keeps failures, notes and the end.

    Use it as a context manager, and call it with events inside.
    """
    if quiet or not console.is_terminal or console.is_dumb_terminal:
        return LineDisplay(console, quiet)
    return LiveDisplay(console)


def _number(data: Mapping[str, object], name: str) -> float:
    value = data.get(name)
    return float(value) if isinstance(value, int | float) else math.nan


def _whole(data: Mapping[str, object], name: str) -> str:
    value = _number(data, name)
    return str(int(value)) if math.isfinite(value) else "?"


def _figure(data: Mapping[str, object], name: str) -> str:
    value = _number(data, name)
    return f"{value:.4g}" if name in data and value == value else ("nan" if isinstance(data.get(name), float) else "?")


def _seconds(data: Mapping[str, object]) -> str:
    value = _number(data, "seconds")
    if not math.isfinite(value):
        return "? s"
    return f"{value:.1f} s" if value < 120 else f"{value / 60:.1f} min"


def _at(data: Mapping[str, object], name: str, before: str = ": ") -> str:
    return f"{before}{data[name]}" if data.get(name) is not None else ""
