"""The general domain: small everyday facts and stories, which every client's base model knows and may forget.

Its test part has the templates of its pre-training part and held-out combinations of two entities: what is measured is
retention, so it lies in distribution. All its words are of the pre-training part.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping

from fedgraft.data.corpus.domain import Domain, Drawn, Part, Task
from fedgraft.data.corpus.entities import COLOURS, NAMES, WORDS, entries, part_of, wrong_answers

__all__ = ["GENERAL_DOMAIN"]

_PRETRAIN_PERCENT = 85  # of the combinations; the rest is for test

_NAMES, _THINGS = NAMES["pretrain"], WORDS["pretrain"]

_PLACES = entries("park garden market school kitchen forest library river station museum beach village harbour farm")

_ANIMALS = {  # animal: food, sound, home
    "cow": ("grass", "moo", "barn"),
    "dog": ("meat", "woof", "yard"),
    "cat": ("fish", "meow", "house"),
    "duck": ("seeds", "quack", "pond"),
    "sheep": ("hay", "baa", "field"),
    "mouse": ("cheese", "squeak", "hole"),
    "horse": ("oats", "neigh", "stable"),
    "pig": ("roots", "oink", "sty"),
    "bee": ("nectar", "buzz", "hive"),
    "hen": ("corn", "cluck", "coop"),
    "frog": ("flies", "croak", "swamp"),
    "lion": ("deer", "roar", "den"),
    "bird": ("worms", "tweet", "tree"),
    "snake": ("eggs", "hiss", "grassland"),
    "wolf": ("hares", "howl", "woods"),
    "goat": ("leaves", "maa", "hills"),
}
_OPPOSITES = {
    "hot": "cold",
    "big": "small",
    "new": "old",
    "wet": "dry",
    "clean": "dirty",
    "full": "empty",
    "heavy": "light",
    "open": "closed",
    "soft": "hard",
    "long": "short",
    "thick": "thin",
    "cheap": "costly",
}
_WEATHER = {
    "rainy": "an umbrella",
    "sunny": "a parasol",
    "snowy": "a thick wool hood",
    "windy": "a hairband",
    "foggy": "a flashlight",
    "icy": "salt",
}
_JOBS = {
    "nurse": "hospital",
    "cook": "restaurant",
    "teacher": "classroom",
    "farmer": "meadow",
    "baker": "bakery",
    "judge": "court",
    "sailor": "ship",
    "pilot": "plane",
    "miner": "mine",
    "actor": "theatre",
    "vet": "clinic",
    "clerk": "office",
}
_TIMES = ("morning", "evening", "afternoon")
_FOODS = entries("bread soup rice pasta salad cake pie stew porridge jam honey toast")


def _combination(
    kind: str,
    first: tuple[str, ...],
    second: tuple[str, ...],
    tell: Callable[[random.Random, str, str], tuple[Mapping[str, str], str, tuple[str, ...]]],
) -> Callable[[random.Random, Part], Drawn]:
    """Give a draw of two entities whose combination belongs to the part.

    Args:
        kind: Leads the key of the combination.
        first: Choices of the first entity.
        second: Choices of the second.
        tell: Gives slots, answer and wrong answers for a combination.
    """

    def draw(rng: random.Random, part: Part) -> Drawn:
        while True:
            one, two = rng.choice(first), rng.choice(second)
            key = f"{kind}:{one},{two}"
            if one != two and part_of(key, pretrain_percent=_PRETRAIN_PERCENT, train_percent=0) == part:
                break
        slots, answer, wrong = tell(rng, one, two)
        return Drawn(slots=slots, answer=answer, wrong=wrong, entities=(key,))

    return draw


Told = tuple[Mapping[str, str], str, tuple[str, ...]]


def _sentences(rng: random.Random, form: str, right: str, pool: tuple[str, ...]) -> tuple[str, tuple[str, ...]]:
    """Write a sentence about the right value, and three about values of the pool."""
    return form.format(right), tuple(form.format(value) for value in wrong_answers(rng, right, (), pool))


def _tell_story(rng: random.Random, name: str, animal: str) -> Told:
    homes = tuple(facts[2] for facts in _ANIMALS.values())
    form = f"{name} met a {animal}. Then the {animal} went back to its {{}}."
    return {"name": name, "animal": animal}, *_sentences(rng, form, _ANIMALS[animal][2], homes)


def _tell_place(rng: random.Random, name: str, place: str) -> Told:
    return {"name": name, "place": place}, *_sentences(rng, f"{name} is at the {{}}.", place, _PLACES)


def _tell_colour(rng: random.Random, thing: str, colour: str) -> Told:
    slots = {"thing": thing, "colour": colour, "name": rng.choice(_NAMES)}
    return slots, *_sentences(rng, f"The {thing} is {{}}.", colour, COLOURS)


def _tell_opposite(rng: random.Random, thing: str, adjective: str) -> Told:
    slots = {"thing": thing, "adjective": adjective}
    others = tuple(word for word in _OPPOSITES.values() if word != _OPPOSITES[adjective])
    return slots, *_sentences(rng, f"No, the {thing} is {{}}.", _OPPOSITES[adjective], others)


def _tell_food(rng: random.Random, animal: str, place: str) -> Told:
    foods = tuple(facts[0] for facts in _ANIMALS.values())
    return {"animal": animal, "place": place}, *_sentences(rng, f"The {animal} eats {{}}.", _ANIMALS[animal][0], foods)


def _tell_sound(rng: random.Random, name: str, animal: str) -> Told:
    sounds = tuple(facts[1] for facts in _ANIMALS.values())
    return {"name": name, "animal": animal}, *_sentences(rng, f"The {animal} says {{}}.", _ANIMALS[animal][1], sounds)


def _tell_meal(rng: random.Random, name: str, food: str) -> Told:
    return {"name": name, "food": food}, *_sentences(rng, f"{name} eats some {{}}.", food, _FOODS)


def _tell_weather(rng: random.Random, name: str, weather: str) -> Told:
    slots = {"name": name, "weather": weather}
    return slots, *_sentences(rng, f"{name} takes {{}}.", _WEATHER[weather], tuple(_WEATHER.values()))


def _tell_job(rng: random.Random, name: str, job: str) -> Told:
    slots = {"name": name, "job": job}
    return slots, *_sentences(rng, f"{name} works in the {{}}.", _JOBS[job], tuple(_JOBS.values()))


def _tell_greeting(rng: random.Random, name: str, other: str) -> Told:
    time = rng.choice(_TIMES)
    choices = tuple(f"{word} {who}" for word in _TIMES for who in (name, other))
    answer, wrong = _sentences(rng, "Good {}!", f"{time} {other}", choices)
    return {"name": name, "other": other, "time": time}, answer, wrong


def _task(name: str, draw: Callable[[random.Random, Part], Drawn], *templates: str) -> Task:
    return Task(name=name, draw=draw, pretrain=templates, test=templates)


_ANIMAL_NAMES, _ADJECTIVES = tuple(_ANIMALS), tuple(_OPPOSITES)

GENERAL_DOMAIN = Domain(
    name="general",
    style=None,
    plain=("{answer}",),
    tasks=(
        _task(
            "story",
            _combination("story", _NAMES, _ANIMAL_NAMES, _tell_story),
            "Tell a story about {name} and a {animal}.",
            "{name} saw a {animal}. What happened?",
        ),
        _task(
            "place",
            _combination("place", _NAMES, _PLACES, _tell_place),
            "{name} went to the {place}. Where is {name} now?",
            "{name} left home and walked to the {place}. Where is {name}?",
        ),
        _task(
            "colour",
            _combination("colour", _THINGS, COLOURS, _tell_colour),
            "{name} has a {colour} thing, a {thing}. What can you say of the {thing}?",
            "{name} made the {thing} {colour}. How is the {thing} now?",
        ),
        _task(
            "opposite",
            _combination("opposite", _THINGS, _ADJECTIVES, _tell_opposite),
            "Is the {thing} {adjective}?",
            "Do you think that the {thing} is {adjective}?",
        ),
        _task(
            "food",
            _combination("food", _ANIMAL_NAMES, _PLACES, _tell_food),
            "What does the {animal} at the {place} eat?",
            "There is a hungry {animal} at the {place}. What will it have?",
        ),
        _task(
            "sound",
            _combination("sound", _NAMES, _ANIMAL_NAMES, _tell_sound),
            "{name} can hear a {animal}. What does the {animal} say?",
            "{name} plays the {animal}. Which sound is that?",
        ),
        _task(
            "meal",
            _combination("meal", _NAMES, _FOODS, _tell_meal),
            "{name} is hungry and there is {food}. What does {name} do?",
            "{name} likes {food}. What is for dinner?",
        ),
        _task(
            "weather",
            _combination("weather", _NAMES, tuple(_WEATHER), _tell_weather),
            "It is {weather} today. What does {name} take along?",
            "{name} goes out on a {weather} day. With what?",
        ),
        _task(
            "job",
            _combination("job", _NAMES, tuple(_JOBS), _tell_job),
            "The job of {name} is {job}. Where does {name} work?",
            "{name} wants to be a {job}. Where would {name} work?",
        ),
        _task(
            "greeting",
            _combination("greeting", _NAMES, _NAMES, _tell_greeting),
            "{name} meets {other} in the {time}. What does {name} say?",
            "It is {time}. How does {name} greet {other}?",
        ),
    ),
)
