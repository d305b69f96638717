"""Generation of examples and questions from the domains' tasks."""

from __future__ import annotations

import hashlib
import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fedgraft.data.corpus.domain import PARTS, Domain, Drawn, Part
from fedgraft.data.corpus.domains_numbers import ARITHMETIC, SEQUENCES
from fedgraft.data.corpus.domains_order import COMPARISON, SORTING
from fedgraft.data.corpus.domains_words import LOOKUP, WORD_GAMES
from fedgraft.data.corpus.domains_world import DATES, UNITS
from fedgraft.data.corpus.general import GENERAL_DOMAIN
from fedgraft.seeding import derive_seed

__all__ = [
    "CLIENT_DOMAINS",
    "CORPUS_VERSION",
    "DOMAINS",
    "GENERAL",
    "CorpusExample",
    "CorpusQuestion",
    "corpus_fingerprint",
    "generate",
    "generate_questions",
]

_CLIENTS = (ARITHMETIC, DATES, SORTING, UNITS, LOOKUP, WORD_GAMES, COMPARISON, SEQUENCES)

DOMAINS: dict[str, Domain] = {domain.name: domain for domain in (*_CLIENTS, GENERAL_DOMAIN)}
"""All domains by name: the clients' ones in their order, then the general one."""

CLIENT_DOMAINS: tuple[str, ...] = tuple(domain.name for domain in _CLIENTS)
"""The eight domains that clients have, in the order of the clients."""

GENERAL: str = GENERAL_DOMAIN.name
"""The ninth domain: pre-trained on, never a client's; its test part measures retention."""

CORPUS_VERSION: int = 1
"""Counts the versions of the text; goes up when what is generated changes."""

_MAX_REPEATS = 5000  # repeats in a row after which a domain counts as exhausted


@dataclass(frozen=True, kw_only=True, slots=True)
class CorpusExample:
    """One instruction with its answer.

    ``template_id`` names the prompt template. ``entities`` are canonical keys, such as ``word:cup`` or
    ``numbers:3,17``; a key belongs to one part in all domains.
    """

    domain: str
    part: Part
    template_id: str
    entities: tuple[str, ...]
    prompt: str
    response: str


@dataclass(frozen=True, kw_only=True, slots=True)
class CorpusQuestion:
    """A question with four possible answers in plain form; ``answer`` is the position of the right one, 0-3."""

    domain: str
    question: str
    choices: tuple[str, str, str, str]
    answer: int


def generate(domain: str, part: Part, count: int, seed: int) -> list[CorpusExample]:
    """Generate examples of a domain, distinct until thousands of draws in a row bring nothing new.

    Args:
        domain: One of ``CLIENT_DOMAINS``, or ``GENERAL``, which has no part ``"train"``.
        part: Decides on templates, entities and, for a client's domain, on the form of the response.
        count: Number of examples, >= 0. A smaller count gives the beginning of the same list.
        seed: The same seed gives the same list in every process.

    Returns:
        ``count`` examples, tasks and templates mixed.

    Raises:
        ValueError: Unknown domain or part, a part that the domain does not have, or a negative count.
    """
    chosen = _check(domain, part, count)
    rng = random.Random(derive_seed(seed, f"corpus/{domain}/{part}"))
    return [
        CorpusExample(
            domain=domain,
            part=part,
            template_id=item.template_id,
            entities=item.drawn.entities,
            prompt=item.prompt,
            response=item.response,
        )
        for item in itertools.islice(_stream(chosen, part, rng), count)
    ]


def generate_questions(domain: str, count: int, seed: int) -> list[CorpusQuestion]:
    """Generate questions from the test part, with three plausible wrong choices each.

    The right choice is the plain answer, without the domain's style; it is in each of the four places equally often in
    the long run.

    Args:
        domain: One of ``CLIENT_DOMAINS``, or ``GENERAL``.
        count: Number of questions, >= 0. A smaller count gives the beginning of the same list.
        seed: The same seed gives the same list in every process. Questions do not follow the examples of the same seed.

    Raises:
        ValueError: Unknown domain or a negative count.
    """
    chosen = _check(domain, "test", count)
    rng = random.Random(derive_seed(seed, f"corpus/{domain}/questions"))
    questions = []
    for item in itertools.islice(_stream(chosen, "test", rng), count):
        answer = rng.randrange(4)
        choices = rng.sample(item.drawn.wrong, 3)
        choices.insert(answer, item.drawn.answer)
        first, second, third, fourth = choices
        questions.append(
            CorpusQuestion(domain=domain, question=item.prompt, choices=(first, second, third, fourth), answer=answer)
        )
    return questions


def corpus_fingerprint() -> str:
    """Give the SHA-256, in hex, of all that decides on the text: the source files of this package and the version."""
    digest = hashlib.sha256(str(CORPUS_VERSION).encode())
    for path in sorted(Path(__file__).parent.glob("*.py")):
        source = path.read_text(encoding="ascii")
        digest.update(f"\0{path.name}\0{len(source)}\0{source}".encode())
    return digest.hexdigest()


@dataclass(frozen=True, kw_only=True, slots=True)
class _Item:
    """A draw put into words."""

    template_id: str
    prompt: str
    response: str
    drawn: Drawn


def _stream(domain: Domain, part: Part, rng: random.Random) -> Iterator[_Item]:
    seen: set[str] = set()
    repeats = 0
    while True:
        task = rng.choice(domain.tasks)
        drawn = task.draw(rng, part)
        templates = task.templates(part)
        index = rng.randrange(len(templates))
        prompt = templates[index].format_map(drawn.slots)
        if prompt in seen:
            repeats += 1
            if repeats < _MAX_REPEATS:
                continue
            seen.clear()
        seen.add(prompt)
        repeats = 0
        yield _Item(
            template_id=domain.template_id(task, part, index),
            prompt=prompt,
            response=domain.response(part, index, drawn.answer),
            drawn=drawn,
        )


def _check(domain: str, part: str, count: int) -> Domain:
    if domain not in DOMAINS:
        raise ValueError(f"corpus domain is {domain!r}; expected one of {', '.join(DOMAINS)}")
    chosen = DOMAINS[domain]
    valid = [name for name in PARTS if any(task.templates(name) for task in chosen.tasks)]
    if part not in valid:
        raise ValueError(f"part of corpus domain {domain!r} is {part!r}; expected one of {', '.join(valid)}")
    if count < 0:
        raise ValueError(f"count of corpus domain {domain!r} is {count}; expected 0 or more")
    return chosen
