"""Domains about words and records: word games, lookup."""

from __future__ import annotations

import random
import string

from fedgraft.data.corpus.domain import Domain, Drawn, Part, Task
from fedgraft.data.corpus.entities import COLOURS, NAMES, PLACES, WORDS, near, select, wrong_answers

__all__ = ["LOOKUP", "WORD_GAMES"]


def _draw_end(rng: random.Random, part: Part, position: int) -> Drawn:
    (word,), keys = select(rng, "word", WORDS[part], 1)
    answer = word[position]
    wrong = wrong_answers(rng, answer, word, string.ascii_lowercase)
    return Drawn(slots={"word": word}, answer=answer, wrong=wrong, entities=keys)


def _draw_first(rng: random.Random, part: Part) -> Drawn:
    return _draw_end(rng, part, 0)


def _draw_last(rng: random.Random, part: Part) -> Drawn:
    return _draw_end(rng, part, -1)


def _draw_plural(rng: random.Random, part: Part) -> Drawn:
    (word,), keys = select(rng, "word", WORDS[part], 1)
    wrong = (word, word + "es", word + "en", word + "ses")
    return Drawn(slots={"word": word}, answer=word + "s", wrong=wrong, entities=keys)


def _draw_twice(rng: random.Random, part: Part) -> Drawn:
    (word, other), keys = select(rng, "word", WORDS[part], 2)
    wrong = (word, f"{word} {word} {word}", f"{word} {other}", f"{other} {other}")
    return Drawn(slots={"word": word}, answer=f"{word} {word}", wrong=wrong, entities=keys[:1])


def _draw_join(rng: random.Random, part: Part) -> Drawn:
    (word, other), keys = select(rng, "word", WORDS[part], 2)
    wrong = (other + word, word + word, other + other, f"{word} {other}")
    return Drawn(slots={"word": word, "other": other}, answer=word + other, wrong=wrong, entities=keys)


def _draw_swap(rng: random.Random, part: Part) -> Drawn:
    (word, other), keys = select(rng, "word", WORDS[part], 2)
    wrong = (f"{word} {other}", f"{word} {word}", f"{other} {other}", other + word)
    return Drawn(slots={"word": word, "other": other}, answer=f"{other} {word}", wrong=wrong, entities=keys)


def _draw_starting(rng: random.Random, part: Part) -> Drawn:
    while True:
        words, keys = select(rng, "word", WORDS[part], 3)
        if len({word[0] for word in words}) == len(words):
            break
    answer = rng.choice(words)
    unlike = [word for word in WORDS[part] if word[0] != answer[0]]
    wrong = wrong_answers(rng, answer, words, unlike)
    slots = {"letter": answer[0], "items": ", ".join(words)}
    return Drawn(slots=slots, answer=answer, wrong=wrong, entities=keys)


WORD_GAMES = Domain(
    name="word_games",
    style="<{answer}>",
    tasks=(
        Task(
            name="first",
            draw=_draw_first,
            pretrain=("What is the first letter of {word}?", "First letter of {word}:", "How does {word} start?"),
            train=("Name the letter at the front of {word}.", "Which letter opens {word}?"),
            test=("Say the initial of {word}.", "With which letter does one begin {word}?"),
        ),
        Task(
            name="last",
            draw=_draw_last,
            pretrain=("What is the last letter of {word}?", "Last letter of {word}:", "How does {word} end?"),
            train=("Name the letter at the back of {word}.", "Which letter closes {word}?"),
            test=("Say the final letter of {word}.", "With which letter does one finish {word}?"),
        ),
        Task(
            name="plural",
            draw=_draw_plural,
            pretrain=("What is the plural of {word}?", "One {word}, two what?", "Plural of {word}:"),
            train=("Turn {word} into many.", "There is more than one {word}. Write it."),
            test=("Give the form of {word} for several.", "Not just one {word} but seven what?"),
        ),
        Task(
            name="twice",
            draw=_draw_twice,
            pretrain=("Say {word} two times.", "Write {word} twice.", "Repeat {word}:"),
            train=("Double the word {word}.", "Echo {word} once after itself."),
            test=("Call out {word} and then the same again.", "Print a pair of {word}."),
        ),
        Task(
            name="join",
            draw=_draw_join,
            pretrain=(
                "Join {word} and {other}.",
                "Make one word of {word} and {other}.",
                "{word} + {other} as a word:",
            ),
            train=("Glue {other} behind {word}.", "Merge {word} with {other}."),
            test=("Build a compound from {word} and {other}.", "Attach {other} to the end of {word}."),
        ),
        Task(
            name="swap",
            draw=_draw_swap,
            pretrain=(
                "Swap {word} and {other}.",
                "Write {word} {other} the other way round.",
                "Reverse: {word} {other}",
            ),
            train=("Let {word} and {other} trade seats.", "Flip the two words {word} {other}."),
            test=("Exchange {word} with {other}.", "Read the words {word} {other} backwards."),
        ),
        Task(
            name="starting",
            draw=_draw_starting,
            pretrain=(
                "Which word starts with {letter}: {items}?",
                "Find the word with {letter} in front: {items}",
                "Words: {items}. Which one has {letter} as first letter?",
            ),
            train=("Among {items}, name the one that opens with {letter}.", "Pick the {letter} word from {items}."),
            test=("Of {items}, say the one whose initial is {letter}.", "Choose from {items} by the initial {letter}."),
        ),
    ),
)


def _record(
    rng: random.Random,
    rows: tuple[list[str], list[str]],
    pool: tuple[str, ...],
    entities: tuple[str, ...],
) -> Drawn:
    """Ask for the value of one of the rows ``(keys, values)``; wrong answers are the other values, then the pool."""
    keys, values = rows
    asked = rng.randrange(len(keys))
    slots = {f"k{index}": key for index, key in enumerate(keys)} | {f"v{index}": v for index, v in enumerate(values)}
    wrong = wrong_answers(rng, values[asked], values, pool)
    return Drawn(slots=slots | {"q": keys[asked]}, answer=values[asked], wrong=wrong, entities=entities)


def _draw_colour(rng: random.Random, part: Part) -> Drawn:
    words, keys = select(rng, "word", WORDS[part], 3)
    return _record(rng, (words, rng.sample(COLOURS, 3)), COLOURS, keys)


def _draw_home(rng: random.Random, part: Part) -> Drawn:
    names, keys = select(rng, "name", NAMES[part], 2)
    places, place_keys = select(rng, "place", PLACES[part], 2)
    return _record(rng, (names, places), PLACES[part], keys + place_keys)


def _draw_price(rng: random.Random, part: Part) -> Drawn:
    words, keys = select(rng, "word", WORDS[part], 3)
    prices = [str(price) for price in rng.sample(range(2, 40), 3)]
    return _record(rng, (words, prices), near(int(rng.choice(prices))), keys)


def _draw_owner(rng: random.Random, part: Part) -> Drawn:
    names, keys = select(rng, "name", NAMES[part], 2)
    words, word_keys = select(rng, "word", WORDS[part], 2)
    return _record(rng, (words, names), NAMES[part], keys + word_keys)


LOOKUP = Domain(
    name="lookup",
    style="Found {answer} on record",
    tasks=(
        Task(
            name="colour",
            draw=_draw_colour,
            pretrain=(
                "The {k0} is {v0}, the {k1} is {v1}, the {k2} is {v2}. What colour is the {q}?",
                "{k0} {v0}, {k1} {v1}, {k2} {v2}. Colour of {q}?",
                "One {v0} {k0}, one {v1} {k1} and one {v2} {k2}. Which colour does the {q} have?",
            ),
            train=(
                "Paint shop: {k0} in {v0}, {k1} in {v1}, {k2} in {v2}. Look up {q}.",
                "Colours on file: {k0} = {v0}; {k1} = {v1}; {k2} = {v2}. Check {q}.",
            ),
            test=(
                "We painted the {k0} {v0}, the {k1} {v1}, the {k2} {v2}. How does the {q} look?",
                "Stock by shade, {v0}: {k0}, {v1}: {k1}, {v2}: {k2}. Shade for {q}?",
            ),
        ),
        Task(
            name="home",
            draw=_draw_home,
            pretrain=(
                "{k0} lives in {v0}. {k1} lives in {v1}. Where does {q} live?",
                "{k0}: {v0}. {k1}: {v1}. City of {q}?",
                "{k0} is from {v0} and {k1} is from {v1}. Where is {q} from?",
            ),
            train=(
                "Address book: {k0}, {v0}; {k1}, {v1}. Look up {q}.",
                "Letters to {k0} go to {v0}, to {k1} they go to {v1}. Where to for {q}?",
            ),
            test=(
                "{v0} is home to {k0}, {v1} to {k1}. In which city is {q} at home?",
                "To visit {k0} take the train to {v0}, to visit {k1} the one to {v1}. Destination for {q}?",
            ),
        ),
        Task(
            name="price",
            draw=_draw_price,
            pretrain=(
                "Prices: {k0} {v0}, {k1} {v1}, {k2} {v2}. What is the price of the {q}?",
                "The {k0} costs {v0}, the {k1} {v1}, the {k2} {v2}. What does the {q} cost?",
                "{k0} {v0}, {k1} {v1}, {k2} {v2}. Price of {q}?",
            ),
            train=(
                "Catalogue: {k0} at {v0}, {k1} at {v1}, {k2} at {v2}. Look up {q}.",
                "Shelf counts, {k0}: {v0}; {k1}: {v1}; {k2}: {v2}. Check {q}.",
            ),
            test=(
                "Pay {v0} for the {k0}, {v1} for the {k1}, {v2} for the {k2}. How much for the {q}?",
                "Menu of goods: {v0} {k0}, {v1} {k1}, {v2} {k2}. Amount asked for the {q}?",
            ),
        ),
        Task(
            name="owner",
            draw=_draw_owner,
            pretrain=(
                "{v0} has the {k0}. {v1} has the {k1}. Who has the {q}?",
                "{v0}: {k0}. {v1}: {k1}. Owner of {q}?",
                "The {k0} is for {v0} and the {k1} is for {v1}. Who gets the {q}?",
            ),
            train=(
                "Lost and kept: {k0} by {v0}, {k1} by {v1}. Look up {q}.",
                "{v0} signed for the {k0}, {v1} for the {k1}. Check who took the {q}.",
            ),
            test=(
                "{k0} belongs to {v0}, {k1} belongs to {v1}. Whose {q} is it?",
                "We lent {v0} the {k0} and {v1} the {k1}. Ask whom for the {q}?",
            ),
        ),
    ),
)
