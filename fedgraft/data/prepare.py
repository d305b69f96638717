"""Preparing a run's data: load, share among clients, split, tokenise, and write it down for the replicas to map."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file
from transformers import PreTrainedTokenizerBase

from fedgraft.data.config import DataConfig
from fedgraft.data.examples import NO_LABEL, Example
from fedgraft.data.partition import assign, draw_shares
from fedgraft.data.pools import Pools, load_pools, sample
from fedgraft.data.prepared import MANIFEST_NAME, ClientRows, Manifest, PreparedData, RowRange
from fedgraft.data.tokenise import TokenSequence, chunk_text, encode_all, tokenizer_hash
from fedgraft.errors import DataError
from fedgraft.seeding import derive_seed

__all__ = ["ClientExamples", "prepare", "share_examples"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class ClientExamples:
    """One client's examples by split, each in a seeded order."""

    name: str
    train: list[Example]
    validation: list[Example]
    test: list[Example]


def prepare(config: DataConfig, tokenizer: PreTrainedTokenizerBase, run_seed: int, folder: Path) -> PreparedData:
    """Make the data of a run and open it. What the folder already holds is used if its inputs were the same.

    The manifest is renamed into place last, so the folder holds either the old data or the new, whole.

    Args:
        config: The run's data section.
        tokenizer: The model's.
        run_seed: Decides about partition, splits and samples.
        folder: Made if missing.

    Raises:
        DataError: The data cannot be read or shared as asked, or a client would have an empty split.
    """
    pools = load_pools(config, run_seed)
    inputs = {
        "config": _hash(config.model_dump_json(exclude={"path": True, "retention": {"path"}, "questions": {"path"}})),
        "examples": pools.content_hash(),
        "run_seed": str(run_seed),
        "tokenizer": tokenizer_hash(tokenizer),
    }
    fingerprint = _hash(json.dumps(inputs, sort_keys=True))
    previous = _open_previous(folder)
    if previous is not None and previous.fingerprint == fingerprint:
        _log.info("%s already holds this data", folder)
        return previous
    clients = share_examples(pools, config, run_seed)
    rows = _tokenise(pools, clients, tokenizer, config, run_seed)
    tensor_file = f"tokens-{fingerprint[:16]}.safetensors"
    held = [rows.ranges[n, name] for n in range(len(clients)) for name in ("train", "validation", "test")]
    num_cut = sum(part.num_prompts_cut for part in held), sum(part.num_responses_cut for part in held)
    if any(num_cut):
        _log.warning("%d prompts and %d responses were cut to %d tokens", *num_cut, config.max_length)
    num_loaded = pools.num_left_out + len(pools.train) + len(pools.test or [])
    manifest = Manifest(
        fingerprint=fingerprint,
        inputs=inputs,
        source=pools.source,
        tensor_file=tensor_file,
        labels=tuple(rows.labels),
        clients=tuple(
            ClientRows(
                name=client.name,
                train=rows.ranges[n, "train"],
                validation=rows.ranges[n, "validation"],
                test=rows.ranges[n, "test"],
            )
            for n, client in enumerate(clients)
        ),
        retention=rows.ranges.get((-1, "retention")),
        questions=rows.ranges.get((-1, "questions")),
        num_choices=len(pools.questions[0].choices) if pools.questions else 0,
        num_unused=num_loaded - sum(part.stop - part.start for part in held),
        num_skipped=pools.num_skipped,
    )
    folder.mkdir(parents=True, exist_ok=True)
    answers = np.asarray([question.answer for question in pools.questions], dtype=np.int64)
    _write(folder, manifest, {**rows.tensors(), "answers": answers})
    if previous is not None and previous.manifest.tensor_file != tensor_file:
        (folder / previous.manifest.tensor_file).unlink(missing_ok=True)
    return PreparedData.open(folder)


def share_examples(pools: Pools, config: DataConfig, run_seed: int) -> list[ClientExamples]:
    """Share the pools among clients and split each client's part.

    Without a test pool a client's examples, shuffled, are cut into test, validation and train; with one (the bundled
    corpus) the test pool is shared by the same proportions, and the client's part of the train pool is cut into two.

    Raises:
        DataError: The partition is impossible, or a client has too few examples for one in each split.
    """
    labels = [example.label for example in pools.train]
    shares = draw_shares(Counter(labels), config.partition, config.num_clients, run_seed)
    floor = getattr(config.partition, "min_examples", 0)
    train_parts = assign(labels, shares, run_seed, min_examples=floor)
    test_parts: list[NDArray[np.int64]] | None = None
    if pools.test is not None:
        test_labels = [example.label for example in pools.test]
        test_parts = assign(test_labels, shares, run_seed, min_examples=min(floor, 1), pool="test")
    clients = []
    for n, name in enumerate(shares.names):
        held = _shuffled(pools.train, train_parts[n], run_seed, "data/split/train", n)
        if pools.test is None or test_parts is None:
            num_test = max(1, round(len(held) * config.test_fraction))
            test, held_rest = held[:num_test], held[num_test:]
        else:
            test, held_rest = _shuffled(pools.test, test_parts[n], run_seed, "data/split/test", n), held
        num_validation = max(1, round(len(held) * config.validation_fraction))
        client = ClientExamples(
            name=name,
            train=held_rest[num_validation:][: config.max_train_examples],
            validation=held_rest[:num_validation][: config.max_validation_examples],
            test=test[: config.max_test_examples],
        )
        if not (client.train and client.validation and client.test):
            raise DataError(
                f"client {n} ({name}) got {len(held)} examples"
                + (f" and {len(test)} of the test pool" if pools.test is not None else "")
                + ", too few for one in each of train, validation and test",
                "use fewer clients (data.num_clients), more examples, or a less uneven partition "
                "(a larger alpha or min_examples)",
            )
        clients.append(client)
    return clients


@dataclass(kw_only=True, slots=True)
class _Rows:
    """Rows as they are collected; ``ranges`` by (client or -1, name of the set)."""

    sequences: list[TokenSequence] = field(default_factory=list)
    texts: list[bytes] = field(default_factory=list)
    label_ids: list[int] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    ranges: dict[tuple[int, str], RowRange] = field(default_factory=dict)

    def add(self, key: tuple[int, str], sequences: list[TokenSequence], texts: list[str], labels: list[str]) -> None:
        start = len(self.sequences)
        self.sequences += sequences
        self.texts += [text.encode() for text in texts]
        self.label_ids += [self.labels.setdefault(label, len(self.labels)) for label in labels]
        self.ranges[key] = RowRange(
            start=start,
            stop=start + len(sequences),
            num_prompts_cut=sum(sequence.num_prompt_cut > 0 for sequence in sequences),
            num_responses_cut=sum(sequence.num_response_cut > 0 for sequence in sequences),
            histogram=dict(sorted(Counter(labels).items())),
        )

    def tensors(self) -> dict[str, NDArray[np.generic]]:
        return {
            "tokens": np.concatenate([sequence.input_ids for sequence in self.sequences]),
            "offsets": _offsets([len(sequence.input_ids) for sequence in self.sequences]),
            "response_starts": np.asarray([sequence.response_start for sequence in self.sequences], dtype=np.int32),
            "labels": np.asarray(self.label_ids, dtype=np.int32),
            "texts": np.frombuffer(b"".join(self.texts), dtype=np.uint8),
            "text_offsets": _offsets([len(text) for text in self.texts]),
        }


def _tokenise(
    pools: Pools, clients: list[ClientExamples], tokenizer: PreTrainedTokenizerBase, config: DataConfig, run_seed: int
) -> _Rows:
    sets: list[tuple[tuple[int, str], list[Example]]] = []
    for n, client in enumerate(clients):
        sets += [((n, "train"), client.train), ((n, "validation"), client.validation), ((n, "test"), client.test)]
    if pools.retention:
        sets.append(((-1, "retention"), pools.retention))
    if pools.questions:
        choices = [
            Example(prompt=question.question, response=choice, label=question.label)
            for question in pools.questions
            for choice in question.choices
        ]
        sets.append(((-1, "questions"), choices))
    # One call for all of them: a fast tokenizer is fast in large batches only.
    sequences = encode_all(tokenizer, [example for _, examples in sets for example in examples], config.max_length)
    rows = _Rows()
    for key, examples in sets:
        start = len(rows.sequences)
        rows.add(
            key,
            sequences[start : start + len(examples)],
            [example.response for example in examples],
            [example.label for example in examples],
        )
    if pools.retention_text is not None:
        chunks = chunk_text(tokenizer, pools.retention_text, config.max_length)
        kept = sample(chunks, config.retention.max_examples, derive_seed(run_seed, "data/retention"))
        rows.add((-1, "retention"), kept, [""] * len(kept), [NO_LABEL] * len(kept))
    return rows


def _shuffled(pool: list[Example], indices: NDArray[np.int64], run_seed: int, purpose: str, client_id: int) -> list[Example]:
    rng = np.random.default_rng(derive_seed(run_seed, purpose, client_id=client_id))
    return [pool[index] for index in rng.permutation(indices)]


def _offsets(sizes: list[int]) -> NDArray[np.int64]:
    return np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(sizes, dtype=np.int64)])


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _open_previous(folder: Path) -> PreparedData | None:
    if not (folder / MANIFEST_NAME).exists():
        return None
    try:
        return PreparedData.open(folder)
    except DataError as error:
        _log.warning("prepared data is made anew: %s", error.message)
        return None


def _write(folder: Path, manifest: Manifest, tensors: dict[str, NDArray[np.generic]]) -> None:
    temporary = folder / f".{manifest.tensor_file}.{os.getpid()}.tmp"
    try:
        save_file(tensors, temporary)
        temporary.replace(folder / manifest.tensor_file)
        temporary.write_text(manifest.model_dump_json(indent=1) + "\n", encoding="utf-8")
        temporary.replace(folder / MANIFEST_NAME)
    finally:
        temporary.unlink(missing_ok=True)
