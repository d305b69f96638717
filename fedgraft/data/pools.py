"""Everything that a run's data section names, loaded but not yet shared among clients: pools of examples."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from fedgraft.data.config import DataConfig, QuestionsConfig, RetentionConfig
from fedgraft.data.corpus import CLIENT_DOMAINS, GENERAL, Part, corpus_fingerprint, generate, generate_questions
from fedgraft.data.examples import Example, Question
from fedgraft.data.files import is_text_file, read_text
from fedgraft.data.loading import load_records, source_name, to_examples, to_questions
from fedgraft.seeding import derive_seed

__all__ = ["Pools", "load_pools", "sample"]

_CORPUS_SEED = 0  # the bundled corpus is one data set: a run's seed shares it out, and does not change its texts

Item = TypeVar("Item")


@dataclass(frozen=True, kw_only=True, slots=True)
class Pools:
    """Examples before they are shared out.

    ``train`` is for clients' training and validation; ``test`` for their test splits, or ``None`` if these come out of
    ``train`` too. ``retention_text`` is set instead of ``retention`` if the held-out general set is plain text.
    ``num_left_out`` counts examples beyond ``max_examples``, ``num_skipped`` records that were not valid.
    """

    source: str
    train: list[Example]
    test: list[Example] | None
    retention: list[Example]
    retention_text: str | None
    questions: list[Question]
    num_left_out: int
    num_skipped: int

    def content_hash(self) -> str:
        """SHA-256 of all texts and labels, in order."""
        digest = hashlib.sha256()
        for pool in (self.train, self.test or [], self.retention):
            for example in pool:
                turns = [[turn.role, turn.content] for turn in example.history]
                digest.update(json.dumps([example.prompt, example.response, example.label, turns]).encode())
            digest.update(b"\n")
        digest.update(json.dumps(self.retention_text).encode())
        for question in self.questions:
            digest.update(json.dumps([question.question, question.choices, question.answer, question.label]).encode())
        return digest.hexdigest()


def load_pools(config: DataConfig, run_seed: int) -> Pools:
    """Load or generate all examples, the retention set and the questions.

    Args:
        config: The run's data section.
        run_seed: Draws what is kept where there is a limit.

    Raises:
        DataError: A source cannot be read, or a record does not fit.
    """
    retention, retention_text = _load_retention(config, run_seed)
    questions = _load_questions(config, run_seed)
    test: list[Example] | None = None
    num_left_out = num_skipped = 0
    if config.is_bundled:
        train = _generate_domains("train", config.bundled.train_per_domain)
        test = _generate_domains("test", config.bundled.test_per_domain)
        source = f"{source_name(config)} {corpus_fingerprint()[:12]}"
    else:
        source = source_name(config)
        records = load_records(config)
        loaded = to_examples(
            records,
            source=source,
            preset=config.preset,
            fields=config.fields,
            label_field=config.label_field,
            skip_invalid=config.skip_invalid,
        )
        train = sample(loaded, config.max_examples, derive_seed(run_seed, "data/subset"))
        num_left_out, num_skipped = len(loaded) - len(train), len(records) - len(loaded)
    return Pools(
        source=source,
        train=train,
        test=test,
        retention=retention,
        retention_text=retention_text,
        questions=questions,
        num_left_out=num_left_out,
        num_skipped=num_skipped,
    )


def sample(items: Sequence[Item], limit: int | None, seed: int) -> list[Item]:
    """Draw at most ``limit`` items without replacement (all if ``None``); they keep their order."""
    if limit is None or limit >= len(items):
        return list(items)
    kept = np.sort(np.random.default_rng(seed).permutation(len(items))[:limit])
    return [items[index] for index in kept]


def _load_retention(config: DataConfig, run_seed: int) -> tuple[list[Example], str | None]:
    retention: RetentionConfig = config.retention
    examples: list[Example] = []
    if retention.is_given:
        if retention.path is not None and is_text_file(retention.path):
            return [], read_text(retention.path)
        examples = to_examples(
            load_records(retention), source=source_name(retention), preset=retention.preset, fields=retention.fields
        )
    elif config.is_bundled and config.bundled.num_retention > 0:
        examples = _generate(GENERAL, "test", config.bundled.num_retention)
    return sample(examples, retention.max_examples, derive_seed(run_seed, "data/retention")), None


def _load_questions(config: DataConfig, run_seed: int) -> list[Question]:
    chosen: QuestionsConfig = config.questions
    questions: list[Question] = []
    if chosen.is_given:
        questions = to_questions(load_records(chosen), source_name(chosen))
    elif config.is_bundled and config.bundled.questions_per_domain > 0:
        questions = [
            Question(question=item.question, choices=tuple(item.choices), answer=item.answer, label=item.domain)
            for domain in CLIENT_DOMAINS
            for item in generate_questions(
                domain, config.bundled.questions_per_domain, derive_seed(_CORPUS_SEED, f"corpus/{domain}/questions")
            )
        ]
    return sample(questions, chosen.max_questions, derive_seed(run_seed, "data/questions"))


def _generate_domains(part: Part, count: int) -> list[Example]:
    return [example for domain in CLIENT_DOMAINS for example in _generate(domain, part, count)]


def _generate(domain: str, part: Part, count: int) -> list[Example]:
    items = generate(domain, part, count, derive_seed(_CORPUS_SEED, f"corpus/{domain}/{part}"))
    return [Example(prompt=item.prompt, response=item.response, label=item.domain) for item in items]
