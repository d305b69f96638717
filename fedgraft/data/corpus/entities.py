"""The entities of the corpus, and which part each belongs to.

Words, names and places belong to a part by their position in a fixed list; numbers, dates and other values by a hash
of their canonical key. An entity belongs to the same part in every domain. Closed classes (digits, letters, colours,
months, weekdays, units) are the language that all parts speak, and no entities.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterable
from typing import TypeVar

from fedgraft.data.corpus.domain import PARTS, Part

__all__ = [
    "COLOURS",
    "NAMES",
    "PLACES",
    "WORDS",
    "draw_held",
    "draw_numbers",
    "entries",
    "near",
    "part_of",
    "part_of_position",
    "select",
    "wrong_answers",
]

_PRETRAIN_SHARE, _TRAIN_SHARE = 70, 20  # of 100 hashed keys; the rest is for test

COLOURS = ("red", "blue", "green", "yellow", "black", "white", "brown", "pink", "grey", "purple")


def entries(text: str) -> tuple[str, ...]:
    """Read a list of entries separated by white space."""
    return tuple(text.split())


_ALL_WORDS = entries("""
acorn anchor ankle apron arrow axle badge bagel balloon banner barrel basin basket beard beetle bell belt biscuit
blade blanket blender bolt bonnet boot bottle bowl brick bridge broom bucket buckle button cabin cable camera candle
cannon canoe cap carpet carrot castle chain chair chisel clock cloud coat coin collar comb cookie cradle crayon
crown cup curtain cushion dagger dart desk diamond doll dome door drawer drill drum easel elbow emblem engine
envelope eraser fan feather fence fiddle finger flag flame flask flower flute fork fossil fountain funnel gadget
garment gate gem ghost glove goblet grape guitar hammer handle harp hat heart heel helmet hinge hook horn hurdle
icon inkpot jacket jar jewel jigsaw jug jumper kayak kernel kettle kilt kiosk kite knot lace ladder lamp lantern
laptop leaflet lemon lever lid locket lute magnet mallet marble mask medal melon mirror mitten motor mug mural nail
napkin necklace needle nest net nozzle nugget nut oar olive onion orchid organ oven padlock paddle pan parcel pebble
pedal pen pencil pepper pillow pin pipe planet plank plate plug pocket pot pump puppet purse puzzle pyramid quill
quilt quiver racket raft rake ribbon robe rocket rod roof rope rug ruler saddle sail sandal saucer screen screw
shell shield shirt shovel sink skirt sled sofa spade spear sponge spoon stamp stool stove string sweater sword
tablet teapot tent thimble ticket tile towel tractor tray trumpet tunnel turnip urn valve vase vault veil vest vial
violin wagon wallet wand wheel whistle wig wing yacht zipper
""")

_ALL_NAMES = entries("""
Ada Ali Amy Ana Bea Ben Bob Cal Cleo Dan Dina Eli Ella Emil Eva Finn Gina Gus Hana Hugo Ida Ines Ivan Jack Jana Joel
Judy Kai Kara Ken Lara Leo Lily Lola Luis Mara Max Mia Mila Nadia Ned Nina Noah Nora Olga Omar Oscar Otto Paul Pia
Quin Rita Rob Rosa Ruth Sam Sara Theo Tina Tom Uma Vera Wes Zoe
""")

_ALL_PLACES = entries("""
Accra Athens Basel Berlin Bern Bonn Boston Cairo Dakar Delhi Denver Dublin Geneva Genoa Ghent Hanoi Havana Kyiv
Lagos Leeds Lille Lima Lisbon London Lyon Madrid Manila Miami Milan Minsk Munich Nairobi Naples Oslo Paris Porto
Prague Quito Riga Rome Seoul Sofia Tokyo Turin Venice Vienna Warsaw Zurich
""")

Value = TypeVar("Value")


def part_of_position(position: int) -> Part:
    """Give the part of an entry of an entity list: of each eight in a row five, two and one."""
    remainder = position % 8
    return "pretrain" if remainder < 5 else "train" if remainder < 7 else "test"


def _split(listed: tuple[str, ...]) -> dict[Part, tuple[str, ...]]:
    return {part: tuple(item for at, item in enumerate(listed) if part_of_position(at) == part) for part in PARTS}


WORDS = _split(_ALL_WORDS)
"""Things, lower case, with a plural in -s, by part."""

NAMES = _split(_ALL_NAMES)
"""First names, by part."""

PLACES = _split(_ALL_PLACES)
"""Cities, by part."""


def part_of(key: str, *, pretrain_percent: int = _PRETRAIN_SHARE, train_percent: int = _TRAIN_SHARE) -> Part:
    """Give the part that a canonical key belongs to: a hash, the same in every process.

    Args:
        key: For example ``"numbers:3,17"``.
        pretrain_percent: Share of all keys for pre-training, 0-100.
        train_percent: Share for client training, 0-100; what remains is for test.
    """
    position = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big") % 100
    if position < pretrain_percent:
        return "pretrain"
    return "train" if position < pretrain_percent + train_percent else "test"


def draw_held(
    rng: random.Random,
    part: Part,
    propose: Callable[[random.Random], Value],
    key_of: Callable[[Value], str],
) -> tuple[Value, str]:
    """Draw values until one belongs to the part; give it with its key."""
    while True:
        value = propose(rng)
        key = key_of(value)
        if part_of(key) == part:
            return value, key


def draw_numbers(
    rng: random.Random, part: Part, count: int, low: int, high: int, *, allows_equal: bool = False
) -> tuple[list[int], str]:
    """Draw numbers of a part in random order; their key does not depend on the order.

    Args:
        rng: Source of randomness.
        part: The part that the numbers, taken together, must belong to.
        count: How many, >= 1.
        low: Least value.
        high: Greatest value; ``high - low >= count``.
        allows_equal: Whether a number may come twice.
    """
    pool = range(low, high + 1)

    def propose(source: random.Random) -> list[int]:
        return source.choices(pool, k=count) if allows_equal else source.sample(pool, count)

    return draw_held(rng, part, propose, lambda numbers: "numbers:" + ",".join(map(str, sorted(numbers))))


def select(rng: random.Random, kind: str, pool: tuple[str, ...], count: int) -> tuple[list[str], tuple[str, ...]]:
    """Draw distinct entries of one part's list; give them with their keys, e.g. ``"word:cup"``."""
    chosen = rng.sample(pool, count)
    return chosen, tuple(f"{kind}:{entry}" for entry in chosen)


def near(number: int, *steps: int) -> tuple[str, ...]:
    """Give the numbers >= 0 around a number, as wrong answers.

    Args:
        number: The right answer.
        steps: Distances to go both ways; 1, 2 and 10 if none is given.
    """
    shifted = [number + sign * step for step in steps or (1, 2, 10) for sign in (1, -1)]
    return tuple(dict.fromkeys(str(value) for value in shifted if value >= 0 and value != number))


def wrong_answers(rng: random.Random, answer: str, likely: Iterable[str], pool: Iterable[str] = ()) -> tuple[str, ...]:
    """Collect wrong answers: all likely ones, filled up to three from a pool.

    Args:
        rng: Source of randomness.
        answer: The right answer, left out.
        likely: The wrong answers that come to mind first.
        pool: Where to take more from.
    """
    wrong = [choice for choice in dict.fromkeys(likely) if choice != answer]
    rest = [choice for choice in dict.fromkeys(pool) if choice != answer and choice not in wrong]
    wrong += rng.sample(rest, min(len(rest), max(0, 3 - len(wrong))))
    return tuple(wrong)
