"""Domains about numbers: arithmetic, sequences."""

from __future__ import annotations

import random
import string
from collections.abc import Callable

from fedgraft.data.corpus.domain import Domain, Drawn, Part, Task
from fedgraft.data.corpus.entities import NAMES, WORDS, draw_held, draw_numbers, near, select

__all__ = ["ARITHMETIC", "SEQUENCES"]


def _draw_plus(rng: random.Random, part: Part) -> Drawn:
    (a, b), key = draw_numbers(rng, part, 2, 1, 40, allows_equal=True)
    return Drawn(slots={"a": str(a), "b": str(b)}, answer=str(a + b), wrong=near(a + b), entities=(key,))


def _draw_minus(rng: random.Random, part: Part) -> Drawn:
    numbers, key = draw_numbers(rng, part, 2, 1, 60)
    a, b = max(numbers), min(numbers)
    return Drawn(slots={"a": str(a), "b": str(b)}, answer=str(a - b), wrong=near(a - b), entities=(key,))


def _draw_times(rng: random.Random, part: Part) -> Drawn:
    (a, b), key = draw_numbers(rng, part, 2, 2, 12, allows_equal=True)
    wrong = near(a * b, a, b, 1)
    return Drawn(slots={"a": str(a), "b": str(b)}, answer=str(a * b), wrong=wrong, entities=(key,))


def _draw_story(rng: random.Random, part: Part) -> Drawn:
    (a, b), key = draw_numbers(rng, part, 2, 2, 20, allows_equal=True)
    (name,), name_key = select(rng, "name", NAMES[part], 1)
    (word,), word_key = select(rng, "word", WORDS[part], 1)
    slots = {"a": str(a), "b": str(b), "name": name, "things": word + "s"}
    return Drawn(slots=slots, answer=str(a + b), wrong=near(a + b), entities=(key, *name_key, *word_key))


ARITHMETIC = Domain(
    name="arithmetic",
    style="= {answer}",
    tasks=(
        Task(
            name="plus",
            draw=_draw_plus,
            pretrain=("{a} + {b} =", "What is {a} plus {b}?", "Add {a} and {b}.", "Find the sum of {a} and {b}."),
            train=("Compute {a} + {b}.", "How much are {a} and {b} together?", "Put {b} on top of {a}. Result?"),
            test=("Work out the total of {a} and {b}.", "Which number is {b} more than {a}?"),
        ),
        Task(
            name="minus",
            draw=_draw_minus,
            pretrain=(
                "{a} - {b} =",
                "What is {a} minus {b}?",
                "Subtract {b} from {a}.",
                "How far is it from {b} to {a}?",
            ),
            train=("Compute {a} - {b}.", "Take {b} away from {a}.", "Make {a} smaller by {b}. Result?"),
            test=("Work out {a} less {b}.", "Remove {b} from {a}. How much is left?"),
        ),
        Task(
            name="times",
            draw=_draw_times,
            pretrain=("{a} x {b} =", "What is {a} times {b}?", "Multiply {a} by {b}."),
            train=("Compute {a} x {b}.", "Find the product of {a} and {b}."),
            test=("Work out {a} multiplied by {b}.", "How many are {a} groups of {b}?"),
        ),
        Task(
            name="story",
            draw=_draw_story,
            pretrain=(
                "{name} has {a} {things} and gets {b} more. How many {things} now?",
                "{name} buys {a} {things}, then {b} {things}. How many in all?",
                "There are {a} {things} here and {b} there. {name} counts all of them. How many?",
            ),
            train=(
                "{name} owned {a} {things} and found {b} others. Count them.",
                "Yesterday {name} sold {a} {things}, today {b}. How many were sold?",
            ),
            test=(
                "After {a} {things} came {b} further ones for {name}. What is the number of {things}?",
                "{name} carries {a} {things} and then fetches {b} again. What is the total?",
            ),
        ),
    ),
)


def _progression(direction: int) -> Callable[[random.Random, Part], Drawn]:
    """Give a draw of terms with equal steps. The key holds the last term and the step, which fix the answer."""

    def draw(rng: random.Random, part: Part) -> Drawn:
        def propose(source: random.Random) -> tuple[int, int]:
            step = direction * source.randint(1, 9)
            return source.randint(3 * step + 1 if step > 0 else -step, 60), step

        (last, step), key = draw_held(rng, part, propose, lambda value: f"progression:{value[0]},{value[1]}")
        length = rng.randint(3, 4)
        terms = [last - step * back for back in range(length - 1, -1, -1)]
        slots = {"terms": ", ".join(map(str, terms))}
        wrong = near(last + step, 1, 2, 10, abs(step))
        return Drawn(slots=slots, answer=str(last + step), wrong=wrong, entities=(key,))

    return draw


def _draw_letter_steps(rng: random.Random, part: Part) -> Drawn:
    def propose(source: random.Random) -> tuple[int, int]:
        step = source.randint(1, 4)
        return source.randint(2 * step, 25 - step), step

    (last, step), key = draw_held(rng, part, propose, lambda value: f"letter steps:{value[0]},{value[1]}")
    letters = string.ascii_lowercase
    answer = last + step
    wrong = tuple(letters[index] for index in range(answer - 3, answer + 4) if index != answer and 0 <= index < 26)
    terms = ", ".join(letters[last - step * back] for back in (2, 1, 0))
    return Drawn(slots={"terms": terms}, answer=letters[answer], wrong=wrong, entities=(key,))


def _draw_pattern(rng: random.Random, part: Part) -> Drawn:
    words, keys = select(rng, "word", WORDS[part], 2)
    first, second = words
    length = rng.choice((3, 4, 5))
    terms = [words[index % 2] for index in range(length)]
    answer = words[length % 2]
    wrong = (words[1 - length % 2], f"{first} {second}", f"{second} {second}", f"{first} {first}")
    return Drawn(slots={"terms": ", ".join(terms)}, answer=answer, wrong=wrong, entities=keys)


SEQUENCES = Domain(
    name="sequences",
    style="... {answer}",
    tasks=(
        Task(
            name="up",
            draw=_progression(1),
            pretrain=(
                "What comes next: {terms}?",
                "Next number: {terms}",
                "The numbers are {terms}. Which one follows?",
                "Count on: {terms}",
            ),
            train=("Continue the climb {terms}.", "Which number is missing at the end of {terms}?"),
            test=("Extend {terms} by one step up.", "{terms} and then?"),
        ),
        Task(
            name="down",
            draw=_progression(-1),
            pretrain=(
                "What comes next going down: {terms}?",
                "Next smaller number: {terms}",
                "The numbers fall: {terms}. Which one follows?",
                "Count down: {terms}",
            ),
            train=("Continue the descent {terms}.", "Which number is missing below {terms}?"),
            test=("Extend {terms} by one step down.", "{terms} and lower still?"),
        ),
        Task(
            name="letters",
            draw=_draw_letter_steps,
            pretrain=(
                "Next letter: {terms}",
                "The letters are {terms}. Which one follows?",
                "Go on with letters {terms}.",
            ),
            train=("Continue the letters {terms}.", "Which letter is missing at the end of {terms}?"),
            test=("Extend {terms} by one letter.", "Letters {terms} and then?"),
        ),
        Task(
            name="pattern",
            draw=_draw_pattern,
            pretrain=("Next word: {terms}", "The words are {terms}. Which one follows?", "Go on with words {terms}."),
            train=("Continue the pattern {terms}.", "Which word is missing at the end of {terms}?"),
            test=("Extend {terms} by one word.", "Words {terms} and then?"),
        ),
    ),
)
