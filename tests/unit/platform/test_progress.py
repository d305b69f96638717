"""Displays: what a line says, what is left out, and that an event with missing fields breaks nothing."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from fedgraft.platform.progress import Display, Event, LineDisplay, LiveDisplay, bytes_text, describe, make_display

KINDS = ["stage", "pretrain", "plan", "run_started", "round", "evaluation", "failure", "run_finished", "note", "done", "new"]

RUN = [
    Event(kind="stage", data={"text": "opening the base model"}),
    Event(kind="plan", data={"total_rounds": 4}),
    Event(kind="run_started", label="flex", data={"seed": 0, "rounds": 2, "learning_rate": 0.003, "purpose": "search"}),
    Event(
        kind="round",
        label="flex",
        data={"round": 1, "train_loss": 2.34567, "bytes_up": 2048, "bytes_down": 1048576, "seconds": 1.25},
    ),
    Event(kind="evaluation", label="flex", data={"round": 1, "nll": 1.5, "worst_nll": 2.25, "retention_nll": float("nan")}),
    Event(kind="failure", label="flex", data={"client_id": 3, "stage": "train", "error": "UpdateError: [bold]x[/bold]"}),
    Event(kind="run_finished", label="flex", data={"folder": "runs/a", "seconds": 150.0}),
    Event(kind="done", data={"folder": "runs/a", "report": "runs/a/report.html"}),
]


def lines(events: list[Event], quiet: bool = False) -> list[str]:
    stream = io.StringIO()
    with make_display(Console(file=stream, width=40), quiet) as display:
        for event in events:
            display(event)
    return stream.getvalue().splitlines()


def screen(events: list[Event]) -> str:
    """What a terminal got, with all that was drawn over."""
    stream = io.StringIO()
    console = Console(
        file=stream, width=110, force_terminal=True, color_system=None, legacy_windows=False, _environ={"TERM": "xterm"}
    )
    with make_display(console) as display:
        assert isinstance(display, LiveDisplay)
        for event in events:
            display(event)
    return stream.getvalue()


def test_lines_say_what_happened_without_wrapping_or_markup() -> None:
    assert lines(RUN) == [
        "opening the base model",
        "4 rounds in all",
        "flex: rate search, seed 0, 2 rounds, learning rate 0.003",
        "flex: round 1/2, train loss 2.346, up 2.0 KiB, down 1.0 MiB, 1.2 s",
        "flex: after round 1: own NLL 1.5, worst client 2.25, retention NLL nan",
        "flex: client 3 failed at train: UpdateError: [bold]x[/bold]",
        "flex: finished in 2.5 min: runs/a",
        "done: runs/a; report runs/a/report.html",
    ]


def test_quiet_keeps_failures_notes_and_the_end() -> None:
    shown = lines([*RUN, Event(kind="note", label="flex", data={"text": "at the edge"})], quiet=True)
    assert shown == [
        "flex: client 3 failed at train: UpdateError: [bold]x[/bold]",
        "done: runs/a; report runs/a/report.html",
        "flex: at the edge",
    ]


def test_a_long_pretraining_gives_few_lines_and_its_last_step() -> None:
    steps = [Event(kind="pretrain", data={"step": step, "num_steps": 500, "loss": 5 / step}) for step in range(1, 501)]
    shown = lines(steps)
    assert 8 <= len(shown) <= 12
    assert shown[-1] == "pre-training: step 500 of 500, loss 0.01"


def test_a_terminal_shows_bars_and_the_latest_numbers_of_each_method() -> None:
    more = [
        Event(kind="run_started", label="base", data={"rounds": 0}),
        Event(kind="evaluation", label="base", data={"round": 0, "nll": 3.125}),
    ]
    drawn = screen([*RUN, *more]).splitlines()
    assert any("all rounds" in line and "1/4" in line for line in drawn)
    last = [line for line in drawn if line.lstrip().startswith("flex ")][-1]
    assert last.split() == ["flex", "1/2", "2.346", "1.5", "2.25", "nan", "2.0", "KiB", "1.0", "MiB"]
    assert any("base" in line and "3.125" in line for line in drawn)
    assert any("client 3 failed at train: UpdateError: [bold]x[/bold]" in line for line in drawn)


def test_bytes_of_a_method_add_up_over_rounds_and_start_anew_with_a_run() -> None:
    rounds = [Event(kind="round", label="a", data={"round": i, "rounds": 2, "bytes_up": 1024}) for i in (1, 2)]
    start = Event(kind="run_started", label="a", data={"rounds": 2, "purpose": "run"})
    assert "2.0 KiB" in screen(rounds)
    after = screen([*rounds, start, rounds[0]]).splitlines()
    assert [line for line in after if line.lstrip().startswith("a ")][-1].split()[-2:] == ["1.0", "KiB"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "data",
    [
        {},
        dict.fromkeys(
            ("step", "num_steps", "round", "rounds", "total_rounds", "train_loss", "bytes_up", "text", "seconds"), None
        ),
        dict.fromkeys(("step", "num_steps", "round", "rounds", "total_rounds", "train_loss", "bytes_up", "text"), "word"),
        dict.fromkeys(("step", "num_steps", "round", "rounds", "total_rounds", "train_loss", "bytes_up", "nll"), float("nan")),
        dict.fromkeys(("step", "num_steps", "round", "rounds", "total_rounds", "learning_rate", "bytes_down"), 0),
    ],
)
def test_missing_or_strange_fields_break_nothing(kind: str, data: dict[str, Any]) -> None:
    event = Event(kind=kind, label="x", data=data)
    assert all(isinstance(line, str) for line in lines([event, event]))
    screen([event, event])


def test_unknown_kinds_say_nothing() -> None:
    assert describe(Event(kind="new", data={"text": "x"})) == ""
    assert lines([Event(kind="new")]) == []


def test_the_terminal_is_given_back_when_the_run_fails() -> None:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=80, _environ={"TERM": "xterm"})

    def fail() -> None:
        with make_display(console) as display:
            display(RUN[0])
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert stream.getvalue().endswith("\x1b[?25h"), "the cursor must be shown again"


def test_where_there_is_no_terminal_lines_are_shown() -> None:
    assert isinstance(make_display(Console(file=io.StringIO())), LineDisplay)
    dumb = Console(file=io.StringIO(), force_terminal=True, _environ={"TERM": "dumb"})
    assert isinstance(make_display(dumb), LineDisplay)
    quiet: Display = make_display(Console(file=io.StringIO(), force_terminal=True, _environ={"TERM": "xterm"}), quiet=True)
    assert isinstance(quiet, LineDisplay)


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 KiB"),
        (1536, "1.5 KiB"),
        (150 * 2**20, "150 MiB"),
        (2.5 * 2**30, "2.5 GiB"),
        (-1, "?"),
    ],
)
def test_bytes_are_written_with_three_digits(count: float, text: str) -> None:
    assert bytes_text(count) == text
