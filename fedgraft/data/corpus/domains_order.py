"""Domains about order: sorting, comparison."""

from __future__ import annotations

import itertools
import random
import string

from fedgraft.data.corpus.domain import Domain, Drawn, Part, Task
from fedgraft.data.corpus.entities import NAMES, WORDS, draw_held, draw_numbers, near, select, wrong_answers

__all__ = ["COMPARISON", "SORTING"]


def _ordered(items: list[str], shown: list[str], key: tuple[str, ...]) -> Drawn:
    answer = ", ".join(items)
    orders = (", ".join(order) for order in itertools.permutations(items))
    wrong = tuple(order for order in orders if order != answer)
    return Drawn(slots={"items": ", ".join(shown)}, answer=answer, wrong=wrong, entities=key)


def _draw_rising(rng: random.Random, part: Part) -> Drawn:
    numbers, key = draw_numbers(rng, part, 3, 1, 60)
    return _ordered([str(number) for number in sorted(numbers)], [str(number) for number in numbers], (key,))


def _draw_falling(rng: random.Random, part: Part) -> Drawn:
    numbers, key = draw_numbers(rng, part, 3, 1, 60)
    items = [str(number) for number in sorted(numbers, reverse=True)]
    return _ordered(items, [str(number) for number in numbers], (key,))


def _draw_letters(rng: random.Random, part: Part) -> Drawn:
    letters, key = draw_held(
        rng,
        part,
        lambda source: source.sample(string.ascii_lowercase, 3),
        lambda shown: "letters:" + ",".join(sorted(shown)),
    )
    return _ordered(sorted(letters), letters, (key,))


def _draw_alphabet(rng: random.Random, part: Part) -> Drawn:
    words, keys = select(rng, "word", WORDS[part], 3)
    return _ordered(sorted(words), words, keys)


SORTING = Domain(
    name="sorting",
    style="[{answer}]",
    tasks=(
        Task(
            name="rising",
            draw=_draw_rising,
            pretrain=(
                "Sort the numbers {items}.",
                "Sort from small to large: {items}",
                "Smallest to largest of {items}?",
            ),
            train=("Arrange {items} so that they grow.", "Line up {items}, the smallest first."),
            test=("Put {items} into rising order.", "List {items} beginning with the least."),
        ),
        Task(
            name="falling",
            draw=_draw_falling,
            pretrain=(
                "Sort {items} downwards.",
                "Sort from large to small: {items}",
                "Largest to smallest of {items}?",
            ),
            train=("Arrange {items} so that they shrink.", "Line up {items}, the largest first."),
            test=("Put {items} into falling order.", "List {items} beginning with the greatest."),
        ),
        Task(
            name="letters",
            draw=_draw_letters,
            pretrain=("Sort the letters {items}.", "Sort from a to z: {items}", "Letters {items} in order?"),
            train=("Arrange the letters {items}.", "Line up {items} as the letters come."),
            test=("Put the letters {items} into their order.", "List the letters {items} as they are taught."),
        ),
        Task(
            name="alphabet",
            draw=_draw_alphabet,
            pretrain=("Sort the words {items}.", "Sort by alphabet: {items}", "Words {items} in order?"),
            train=("Arrange the words {items}.", "Line up {items} as in an index."),
            test=("Put the words {items} into order.", "List {items} as a dictionary would."),
        ),
    ),
)


def _draw_larger(rng: random.Random, part: Part) -> Drawn:
    numbers, key = draw_numbers(rng, part, 2, 1, 99)
    answer = max(numbers)
    wrong = (str(min(numbers)), *near(answer, 1, 10))
    return Drawn(slots={"a": str(numbers[0]), "b": str(numbers[1])}, answer=str(answer), wrong=wrong, entities=(key,))


def _draw_largest(rng: random.Random, part: Part) -> Drawn:
    numbers, key = draw_numbers(rng, part, 3, 1, 99)
    answer = max(numbers)
    wrong = wrong_answers(rng, str(answer), map(str, numbers), near(answer))
    slots = {"items": ", ".join(map(str, numbers))}
    return Drawn(slots=slots, answer=str(answer), wrong=wrong, entities=(key,))


def _draw_more(rng: random.Random, part: Part) -> Drawn:
    numbers, key = draw_numbers(rng, part, 2, 2, 60)
    names, name_keys = select(rng, "name", NAMES[part], 2)
    (word,), word_keys = select(rng, "word", WORDS[part], 1)
    answer = names[numbers.index(max(numbers))]
    slots = {"x": names[0], "y": names[1], "a": str(numbers[0]), "b": str(numbers[1]), "things": word + "s"}
    wrong = wrong_answers(rng, answer, names, NAMES[part])
    return Drawn(slots=slots, answer=answer, wrong=wrong, entities=(key, *name_keys, *word_keys))


def _draw_chain(rng: random.Random, part: Part) -> Drawn:
    names, keys = select(rng, "name", NAMES[part], 3)
    slots = dict(zip("xyz", names, strict=True))  # x is ahead of y, y ahead of z
    wrong = wrong_answers(rng, names[0], names, NAMES[part])
    return Drawn(slots=slots, answer=names[0], wrong=wrong, entities=keys)


COMPARISON = Domain(
    name="comparison",
    style="{answer} wins!",
    tasks=(
        Task(
            name="larger",
            draw=_draw_larger,
            pretrain=("Which is larger, {a} or {b}?", "Larger of {a} and {b}:", "Is {a} or {b} the bigger number?"),
            train=("Compare {a} against {b}.", "Name the greater of {a} and {b}."),
            test=("{a} meets {b}. Which one is higher?", "Say which number exceeds the other: {a}, {b}"),
        ),
        Task(
            name="largest",
            draw=_draw_largest,
            pretrain=("Which is the largest of {items}?", "Largest of {items}:", "What is the maximum of {items}?"),
            train=("Compare all of {items}.", "Name the greatest among {items}."),
            test=("{items} line up. Which one is the highest?", "Say which number exceeds all others: {items}"),
        ),
        Task(
            name="more",
            draw=_draw_more,
            pretrain=(
                "{x} has {a} {things}, {y} has {b}. Who has more?",
                "{x}: {a} {things}. {y}: {b} {things}. Who has the most?",
                "Who has more {things}, {x} with {a} or {y} with {b}?",
            ),
            train=(
                "{x} collected {a} {things} and {y} collected {b}. Who leads?",
                "Compare {x} ({a} {things}) against {y} ({b} {things}).",
            ),
            test=(
                "With {a} {things} for {x} and {b} for {y}, who is ahead?",
                "{y} made {b} {things} while {x} made {a}. Whose count is higher?",
            ),
        ),
        Task(
            name="chain",
            draw=_draw_chain,
            pretrain=(
                "{x} is taller than {y}. {y} is taller than {z}. Who is the tallest?",
                "{y} is older than {z}. {x} is older than {y}. Who is the oldest?",
                "{x} is faster than {y} and {y} is faster than {z}. Who is the fastest?",
            ),
            train=(
                "{y} runs behind {x}, and {z} runs behind {y}. Who leads?",
                "{x} weighs more than {y}, {y} weighs more than {z}. Name the heaviest.",
            ),
            test=(
                "{z} scored less than {y}, and {y} less than {x}. Who came top?",
                "{x} beat {y} at chess, {y} beat {z}. Who seems the strongest?",
            ),
        ),
    ),
)
