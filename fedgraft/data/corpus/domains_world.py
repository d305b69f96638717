"""Domains about the world: dates, units."""

from __future__ import annotations

import datetime
import random
from collections.abc import Callable

from fedgraft.data.corpus.domain import Domain, Drawn, Part, Task
from fedgraft.data.corpus.entities import draw_held, entries, near

__all__ = ["DATES", "UNITS"]

_COMMON_YEAR, _LEAP_YEAR = 2023, 2024  # dates of the corpus have no year: the answer must be the same in both

_MONTHS = entries("January February March April May June July August September October November December")
_WEEKDAYS = entries("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")


def _write(date: datetime.date) -> str:
    return f"{date.day} {_MONTHS[date.month - 1]}"


def _shift(date: datetime.date, days: int) -> str:
    return _write(date + datetime.timedelta(days=days))


def _draw_date(rng: random.Random, part: Part, shifts: range) -> tuple[datetime.date, int, str]:
    """Draw a date and a number of days that lead to the same date in every year."""

    def propose(source: random.Random) -> tuple[datetime.date, int]:
        while True:
            date = datetime.date(_COMMON_YEAR, 1, 1) + datetime.timedelta(days=source.randrange(365))
            days = source.choice(shifts)
            if _shift(date, days) == _shift(date.replace(year=_LEAP_YEAR), days):
                return date, days

    (date, days), key = draw_held(rng, part, propose, lambda value: f"date:{_write(value[0])}")
    return date, days, key


def _later(shifts: range) -> Callable[[random.Random, Part], Drawn]:
    """Give a draw of a date and another some days from it; earlier ones for negative shifts."""

    def draw(rng: random.Random, part: Part) -> Drawn:
        date, days, key = _draw_date(rng, part, shifts)
        wrong = tuple(_shift(date, days + error) for error in (-2, -1, 1, 2))
        slots = {"date": _write(date), "days": str(abs(days))}
        return Drawn(slots=slots, answer=_shift(date, days), wrong=wrong, entities=(key,))

    return draw


def _draw_short(rng: random.Random, part: Part) -> Drawn:
    date, _, key = _draw_date(rng, part, range(1))
    wrong = tuple(_shift(date, error) for error in (-31, -1, 1, 31))
    slots = {"day": str(date.day), "month": str(date.month)}
    return Drawn(slots=slots, answer=_write(date), wrong=wrong, entities=(key,))


def _draw_weekday(rng: random.Random, part: Part) -> Drawn:
    date, days, key = _draw_date(rng, part, range(1, 7))
    today = rng.randrange(7)
    wrong = tuple(_shift(date, days + error) for error in (-2, -1, 1, 7))
    slots = {"date": _write(date), "today": _WEEKDAYS[today], "target": _WEEKDAYS[(today + days) % 7]}
    return Drawn(slots=slots, answer=_shift(date, days), wrong=wrong, entities=(key,))


DATES = Domain(
    name="dates",
    style="Date: {answer}",
    tasks=(
        Task(
            name="after",
            draw=_later(range(1, 2)),
            pretrain=(
                "Which day comes after {date}?",
                "Today is {date}. What date is tomorrow?",
                "The day after {date}:",
            ),
            train=("One day on from {date}?", "{date} ends tonight. Which date starts?"),
            test=("Give the date that follows {date}.", "We fell asleep on {date} and woke up on what date?"),
        ),
        Task(
            name="before",
            draw=_later(range(-1, 0)),
            pretrain=(
                "Which day comes before {date}?",
                "Today is {date}. What date was yesterday?",
                "The day before {date}:",
            ),
            train=("One day back from {date}?", "{date} starts now. Which date just ended?"),
            test=("Give the date that leads up to {date}.", "We woke up on {date} and fell asleep on what date?"),
        ),
        Task(
            name="later",
            draw=_later(range(2, 10)),
            pretrain=(
                "What date is {days} days after {date}?",
                "Today is {date}. What date is it in {days} days?",
                "{date} plus {days} days:",
            ),
            train=("Add {days} days to {date}.", "Ordered on {date}, sent {days} days later. Sent when?"),
            test=("Move {date} forward by {days} days.", "Start on {date} and wait {days} days. Where are you?"),
        ),
        Task(
            name="earlier",
            draw=_later(range(-9, -1)),
            pretrain=(
                "What date is {days} days before {date}?",
                "Today is {date}. What date was it {days} days ago?",
                "{date} minus {days} days:",
            ),
            train=("Take {days} days off {date}.", "Sent on {date}, ordered {days} days earlier. Ordered when?"),
            test=("Move {date} back by {days} days.", "It is {date} after a wait of {days} days. When did it start?"),
        ),
        Task(
            name="short",
            draw=_draw_short,
            pretrain=("Write {day}/{month} as a date.", "Which date is {day}.{month}.?", "Day {day} of month {month}:"),
            train=("Spell out the short date {day}-{month}.", "Read {day}/{month} in full."),
            test=("Short form {day}.{month}. What is the long form?", "Expand {day}/{month} into words."),
        ),
        Task(
            name="weekday",
            draw=_draw_weekday,
            pretrain=(
                "{date} is a {today}. What date is the next {target}?",
                "Today is {today}, {date}. Which date is {target}?",
                "If {today} is {date}, then {target} is what date?",
            ),
            train=(
                "From {today}, {date}, go on to {target}.",
                "Diary: {today} {date}. The party is on {target}. Give its date.",
            ),
            test=(
                "It is {today}, {date}. When will {target} come round?",
                "Week of {today} {date}: find the coming {target}.",
            ),
        ),
    ),
)

_METRIC = (
    ("km", "m", 1000),
    ("m", "cm", 100),
    ("cm", "mm", 10),
    ("kg", "g", 1000),
    ("t", "kg", 1000),
    ("l", "ml", 1000),
    ("g", "mg", 1000),
    ("euro", "cent", 100),
)
_COUNTED = (
    ("weeks", "days", 7),
    ("days", "hours", 24),
    ("hours", "minutes", 60),
    ("minutes", "seconds", 60),
    ("years", "months", 12),
    ("dozens", "single items", 12),
    ("gross", "dozens", 12),
)
_Units = tuple[tuple[str, str, int], ...]


def _conversion(units: _Units, high: int, *, is_upward: bool) -> Callable[[random.Random, Part], Drawn]:
    """Give a draw of an amount in two units. The key names the amount in the larger one, whatever is asked."""

    def draw(rng: random.Random, part: Part) -> Drawn:
        def propose(source: random.Random) -> tuple[int, tuple[str, str, int]]:
            return source.randint(2, high), source.choice(units)

        (amount, (large, small, factor)), key = draw_held(
            rng, part, propose, lambda value: f"quantity:{value[0]} {value[1][0]} in {value[1][1]}"
        )
        given, source, asked, target = (
            (amount * factor, small, amount, large) if is_upward else (amount, large, amount * factor, small)
        )
        errors = near(asked, 1, 2) if is_upward else near(asked, factor, 2 * factor)
        wrong = tuple(f"{value} {target}" for value in (asked * 10, *errors))
        slots = {"given": str(given), "source": source, "target": target}
        return Drawn(slots=slots, answer=f"{asked} {target}", wrong=wrong, entities=(key,))

    return draw


UNITS = Domain(
    name="units",
    style="{answer} exactly",
    tasks=(
        Task(
            name="metric_down",
            draw=_conversion(_METRIC, 200, is_upward=False),
            pretrain=(
                "How many {target} are {given} {source}?",
                "{given} {source} in {target}:",
                "Convert {given} {source} to {target}.",
                "Write {given} {source} with {target}.",
            ),
            train=("Express {given} {source} in {target}.", "The label reads {given} {source}. Print it in {target}."),
            test=("State {given} {source} using {target}.", "Rewrite {given} {source} with the unit {target}."),
        ),
        Task(
            name="metric_up",
            draw=_conversion(_METRIC, 200, is_upward=True),
            pretrain=(
                "How many {target} make {given} {source}?",
                "{given} {source} as {target}:",
                "Change {given} {source} to {target}.",
                "Say {given} {source} with the larger unit {target}.",
            ),
            train=(
                "Express as {target} the amount {given} {source}.",
                "The scale shows {given} {source}. Print this as {target}.",
            ),
            test=("State using {target} what {given} {source} is.", "Rewrite with {target} the size {given} {source}."),
        ),
        Task(
            name="counted_down",
            draw=_conversion(_COUNTED, 30, is_upward=False),
            pretrain=(
                "How many {target} are there in {given} {source}?",
                "{given} {source} counted in {target}:",
                "Turn {given} {source} into {target}.",
            ),
            train=("Break {given} {source} into {target}.", "A plan lasts {given} {source}, or how many {target}?"),
            test=(
                "Split {given} {source} up as {target}.",
                "Over {given} {source} you count which number of {target}?",
            ),
        ),
        Task(
            name="counted_up",
            draw=_conversion(_COUNTED, 30, is_upward=True),
            pretrain=(
                "How many {target} do {given} {source} fill?",
                "{given} {source} grouped as {target}:",
                "Collect {given} {source} into {target}.",
            ),
            train=("Gather {given} {source} into {target}.", "All of {given} {source} amount to how many {target}?"),
            test=(
                "Pack {given} {source} up as {target}.",
                "With {given} {source} you complete which number of {target}?",
            ),
        ),
    ),
)
