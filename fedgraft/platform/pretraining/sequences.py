"""From sources to sequences: texts are tokenised, each ends with the end token, and all are packed into rows of equal length.

A row may hold the end of one text and the start of the next; attention is not cut between them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import save_file
from transformers import PreTrainedTokenizerBase

from fedgraft.data.corpus import CLIENT_DOMAINS, GENERAL, generate
from fedgraft.data.examples import Example
from fedgraft.data.files import is_text_file, read_file, read_text
from fedgraft.data.loading import load_records, source_name, to_examples
from fedgraft.data.tokenise import encode_all
from fedgraft.errors import DataError
from fedgraft.platform.pretraining.config import PretrainDataConfig
from fedgraft.seeding import derive_seed
from fedgraft.types import Batch

__all__ = ["Document", "Sequences", "batch_of_rows", "document_texts", "pack", "read_documents", "rows_of_step"]

Document: TypeAlias = "str | Example"
"""A plain text, or a prompt with its response, which is put in the tokenizer's chat template as fine-tuning does."""

_DATA_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
_DEFAULT_EXAMPLES = 2000
_PIECE = 1 << 16  # characters that are tokenised at once
_WHOLE = 1 << 40  # tokens: examples are not cut before they are packed


@dataclass(frozen=True, slots=True)
class Sequences:
    """Packed tokens, (N, S) int32; the first ``num_train`` rows are trained on, the others are held out."""

    rows: NDArray[np.int32]
    num_train: int

    @property
    def length(self) -> int:
        """Tokens of a row."""
        return int(self.rows.shape[1])

    def save(self, path: Path) -> None:
        """Write the rows as safetensors."""
        save_file({"train": self.rows[: self.num_train], "held_out": self.rows[self.num_train :]}, path)

    @classmethod
    def load(cls, path: Path) -> Sequences:
        """Read what ``save`` wrote."""
        with safe_open(path, framework="numpy") as stream:
            train, held_out = stream.get_tensor("train"), stream.get_tensor("held_out")
        return cls(rows=np.concatenate([train, held_out]), num_train=len(train))


def read_documents(config: PretrainDataConfig, seed: int) -> list[Document]:
    """Read all texts of a source, in its own order; with ``max_documents`` a random part of them, in that order.

    Raises:
        DataError: There is no text, a file cannot be read, or a record has neither a text nor known fields.
    """
    if config.is_bundled:
        found: list[Document] = list(_bundled(config.examples_per_domain or _DEFAULT_EXAMPLES, seed))
    elif config.path is not None and not _is_saved_dataset(config.path):
        found = [document for path in _files(config.path) for document in _read(path, config)]
    else:
        found = _from_records(load_records(config), config, source_name(config))
    found = [each for each in found if not isinstance(each, str) or each.strip()]
    if not found:
        raise DataError(f"{source_name(config)}: there is no text", "name a file or folder with texts that are not empty")
    if config.max_documents is not None and len(found) > config.max_documents:
        rng = np.random.default_rng(derive_seed(seed, "pretrain/documents"))
        kept = np.sort(rng.choice(len(found), config.max_documents, replace=False))
        found = [found[index] for index in kept]
    return found


def document_texts(documents: Sequence[Document]) -> Iterator[str]:
    """Give the texts that a tokenizer is trained on: a plain text as it is, prompt and response apart."""
    for document in documents:
        if isinstance(document, str):
            yield document
        else:
            yield from (message.content for message in document.history)
            yield document.prompt
            yield document.response


def pack(
    documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase, *, length: int, held_out_fraction: float, seed: int
) -> Sequences:
    """Tokenise documents in random order and cut their stream into rows; tokens that fill no row are left out.

    Args:
        documents: At least one.
        tokenizer: Has an end token, which ends every document.
        length: Tokens of a row, >= 2.
        held_out_fraction: Share of the rows, the last ones, that are held out: at least one row, unless it is 0.
        seed: Decides on the order of documents.

    Raises:
        DataError: There are too few tokens for a row to train on and one to hold out.
    """
    order = np.random.default_rng(derive_seed(seed, "pretrain/order")).permutation(len(documents))
    stream = np.concatenate([np.asarray(ids, dtype=np.int32) for ids in _tokenise([documents[i] for i in order], tokenizer)])
    num_rows = len(stream) // length
    num_held_out = max(1, round(num_rows * held_out_fraction)) if held_out_fraction else 0
    if num_rows - num_held_out < 1:
        raise DataError(
            f"the texts have {len(stream)} tokens: too few for {1 + num_held_out} sequences of {length}",
            "give more text, or lower training.sequence_length",
        )
    return Sequences(rows=stream[: num_rows * length].reshape(num_rows, length), num_train=num_rows - num_held_out)


def rows_of_step(step: int, batch_size: int, num_rows: int, seed: int) -> NDArray[np.int64]:
    """Give the rows of a step's batch: epochs, each in an order of its own, one after another.

    A pure function of its arguments, so that a resumed run goes on with the rows that come next.

    Args:
        step: From 1.
        batch_size: Rows of a step.
        num_rows: Rows there are, >= 1.
        seed: The run's.
    """
    places = np.arange((step - 1) * batch_size, step * batch_size)
    epochs = places // num_rows
    orders = {
        int(epoch): np.random.default_rng(derive_seed(seed, "pretrain/epoch", round_idx=int(epoch))).permutation(num_rows)
        for epoch in np.unique(epochs)
    }
    return np.asarray([orders[int(epoch)][place % num_rows] for place, epoch in zip(places, epochs, strict=True)])


def batch_of_rows(rows: NDArray[np.int32]) -> Batch:
    """Make a batch in which every token is read and predicted."""
    ids = torch.from_numpy(rows.astype(np.int64))
    return Batch(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids.clone())


def _bundled(count: int, seed: int) -> Iterator[Example]:
    for domain in (*CLIENT_DOMAINS, GENERAL):
        for item in generate(domain, "pretrain", count, seed):
            yield Example(prompt=item.prompt, response=item.response)


def _is_saved_dataset(path: Path) -> bool:
    return any((path / name).is_file() for name in ("dataset_dict.json", "dataset_info.json"))


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    found = sorted(each for each in path.iterdir() if each.is_file() and (is_text_file(each) or _is_data_file(each)))
    if not found:
        raise DataError(
            f"folder {path} holds no text",
            f"put files ending in .txt, {', '.join(_DATA_SUFFIXES)} (or these with .gz) into it, or name a file",
        )
    return found


def _is_data_file(path: Path) -> bool:
    return Path(path.name.removesuffix(".gz")).suffix.lower() in _DATA_SUFFIXES


def _read(path: Path, config: PretrainDataConfig) -> list[Document]:
    if is_text_file(path):
        return [read_text(path)]
    records = read_file(path)
    if config.split is not None and "split" in records[0]:
        records = [record for record in records if record.get("split") == config.split]
    return _from_records(records, config, str(path))


def _from_records(records: Sequence[dict[str, object]], config: PretrainDataConfig, source: str) -> list[Document]:
    if not records:
        raise DataError(f"{source}: no record is of split {config.split!r}", "set data.split to null or to a split it has")
    field = config.text_field or ("text" if "text" in records[0] else None)
    if field is None:
        return list(to_examples(records, source=source, skip_invalid=True))
    texts: list[Document] = []
    for number, record in enumerate(records, start=1):
        value = record.get(field)
        if not isinstance(value, str):
            raise DataError(
                f"{source}, record {number}: field {field!r} holds {type(value).__name__}, expected text",
                f"set data.text_field to a field of text; the record has {', '.join(map(str, record)) or 'no field'}",
            )
        texts.append(value.encode("utf-8", "replace").decode())  # half a surrogate pair, which JSON may hold, breaks tokenizers
    return texts


def _tokenise(documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase) -> Iterator[list[int]]:
    end = int(tokenizer.eos_token_id)
    examples = [document for document in documents if not isinstance(document, str)]
    encoded = iter(encode_all(tokenizer, examples, _WHOLE))
    for document in documents:
        if isinstance(document, str):
            pieces = tokenizer(list(_pieces(document)), add_special_tokens=False, verbose=False)["input_ids"]
            ids = [token for piece in pieces for token in piece]
        else:
            ids = next(encoded).input_ids.tolist()
        yield ids if ids and ids[-1] == end else [*ids, end]


def _pieces(text: str) -> Iterator[str]:
    """Cut a long text at ends of lines, because a tokenizer takes a text as a whole."""
    held: list[str] = []
    size = 0
    for line in text.splitlines(keepends=True):
        held.append(line)
        size += len(line)
        if size >= _PIECE:
            yield "".join(held)
            held, size = [], 0
    if held:
        yield "".join(held)
