"""What the data is made of before it becomes tokens: examples to learn from and questions to choose an answer to."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["NO_LABEL", "Example", "Message", "Question"]

NO_LABEL = "all"
"""The label of every example of a set that has none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Message:
    """One turn of a chat: ``role`` is ``system``, ``user``, ``assistant`` or whatever the tokenizer's template knows."""

    role: str
    content: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    """One instruction with its answer. Only the response counts for the loss.

    ``prompt`` is the last user turn; ``history`` the turns before it, oldest first (empty outside chats). ``label`` is what
    a partition goes by, ``NO_LABEL`` where the set has none.
    """

    prompt: str
    response: str
    label: str = NO_LABEL
    history: tuple[Message, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """A question with two or more possible answers; ``answer`` counts them from 0; ``label`` is its subject or domain."""

    question: str
    choices: tuple[str, ...]
    answer: int
    label: str = NO_LABEL
