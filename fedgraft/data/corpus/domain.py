"""What a domain of the corpus is made of: tasks that draw entities and know the answer, and templates for each part."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

__all__ = ["PARTS", "SHARED", "Domain", "Drawn", "Part", "Task"]

Part = Literal["pretrain", "train", "test"]
"""Pre-training; client training (its validation split is cut from it later); client test."""

PARTS: tuple[Part, ...] = ("pretrain", "train", "test")

SHARED = "shared"
"""Stands for the part in the template ids of a domain whose parts share their templates."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Drawn:
    """The content of one example before it is put into words.

    ``slots`` fill a prompt template of the task. ``wrong`` holds at least three distinct answers other than ``answer``
    that someone could plausibly give. ``entities`` are the canonical keys that belong to one part only.
    """

    slots: Mapping[str, str]
    answer: str
    wrong: tuple[str, ...]
    entities: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """One kind of question of a domain: ``draw`` gives its content from the entities of a part.

    The three tuples are prompt templates, filled by ``str.format`` with the slots that ``draw`` gives.
    """

    name: str
    draw: Callable[[random.Random, Part], Drawn]
    pretrain: tuple[str, ...] = ()
    train: tuple[str, ...] = ()
    test: tuple[str, ...] = ()

    def templates(self, part: Part) -> tuple[str, ...]:
        """Give the prompt templates of a part, in the order their ids count."""
        return {"pretrain": self.pretrain, "train": self.train, "test": self.test}[part]


@dataclass(frozen=True, kw_only=True, slots=True)
class Domain:
    """A subject with its tasks and its ways to answer.

    ``plain`` are the forms of a pre-training response; a template always has the same one, so that the form can be
    learned. ``style`` is the one form of train and test, found nowhere in pre-training; ``None`` for a domain whose
    test part looks like its pre-training part.
    """

    name: str
    tasks: tuple[Task, ...]
    style: str | None
    plain: tuple[str, ...] = ("{answer}", "It is {answer}.", "The answer is {answer}.")

    def response(self, part: Part, template_index: int, answer: str) -> str:
        """Put an answer into the form that belongs to the part and the template."""
        is_plain = self.style is None or part == "pretrain"
        form = self.plain[template_index % len(self.plain)] if is_plain else self.style
        assert form is not None
        return form.format(answer=answer)

    def template_id(self, task: Task, part: Part, template_index: int) -> str:
        """Name a template: ``domain/task/part/index``, where the part reads ``shared`` if the templates are."""
        return f"{self.name}/{task.name}/{SHARED if self.style is None else part}/{template_index}"
