"""Tokenised examples in one memory-mapped file, so that all replicas of a node share its pages.

A folder holds ``prepared.json`` (``Manifest``) and the safetensors file that it names. Rows are sequences: client by client
train, validation, test, then the retention set, then the questions' choices. Row r has ``tokens[offsets[r]:offsets[r + 1]]``
(int32), its response from ``response_starts[r]`` on, the label ``labels[r]``, and the response's text as UTF-8 in
``texts[text_offsets[r]:text_offsets[r + 1]]``; ``answers`` has one entry a question.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError, safe_open

from fedgraft.errors import DataError
from fedgraft.types import IGNORE_INDEX, Batch

__all__ = [
    "MANIFEST_NAME",
    "TENSOR_NAMES",
    "ClientRows",
    "Manifest",
    "PreparedData",
    "RowRange",
    "SplitName",
    "TokenizedQuestions",
    "TokenizedSplit",
]

MANIFEST_NAME = "prepared.json"
TENSOR_NAMES = ("tokens", "offsets", "response_starts", "labels", "texts", "text_offsets", "answers")

SplitName: TypeAlias = Literal["train", "validation", "test"]


class RowRange(BaseModel):
    """Rows ``start`` to ``stop`` (not included), and how many of them lost tokens of the prompt or of the response."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    start: int
    stop: int
    num_prompts_cut: int
    num_responses_cut: int
    histogram: dict[str, int]


class ClientRows(BaseModel):
    """Where a client's examples are; ``name`` is its label where the partition is natural."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    train: RowRange
    validation: RowRange
    test: RowRange


class Manifest(BaseModel):
    """What ``prepared.json`` says.

    ``fingerprint`` is a hash of ``inputs``, which decide about every row. ``num_unused`` counts examples that went to no
    client (left out by the partition or by a limit), ``num_skipped`` records that were not valid.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: Literal[1] = 1
    fingerprint: str
    inputs: dict[str, str]
    source: str
    tensor_file: str
    labels: tuple[str, ...]
    clients: tuple[ClientRows, ...]
    retention: RowRange | None
    questions: RowRange | None
    num_choices: int
    num_unused: int
    num_skipped: int


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizedSplit:
    """Some rows of the file: one split of a client, the retention set, or the questions' choices.

    Indices count from 0 within the split. ``label_names`` are the names of the set's labels.
    """

    tensors: dict[str, torch.Tensor]
    start: int
    stop: int
    label_names: tuple[str, ...]

    def __len__(self) -> int:
        return self.stop - self.start

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each example, shape (len,)."""
        return np.diff(self.tensors["offsets"][self.start : self.stop + 1].numpy())

    @property
    def num_response_tokens(self) -> int:
        """Tokens of the split that the loss counts: a chunk's first one, which nothing predicts, is not among them."""
        starts = self.tensors["response_starts"][self.start : self.stop].numpy()
        return int((self.lengths - np.maximum(starts, 1)).sum())

    def batch(self, indices: Sequence[int] | NDArray[np.int64], pad_token_id: int) -> Batch:
        """Put examples into a batch, in this order, padded on the right to the longest of them.

        Args:
            indices: At least one.
            pad_token_id: Fills ``input_ids``; the mask is 0 there and the label ``IGNORE_INDEX``.

        Raises:
            IndexError: An index is outside the split.
        """
        rows = [self._row(int(index)) for index in indices]
        spans = [self._span(row) for row in rows]
        shape = (len(rows), max(stop - start for start, stop in spans))
        input_ids = torch.full(shape, pad_token_id, dtype=torch.int64)
        attention_mask = torch.zeros(shape, dtype=torch.int64)
        labels = torch.full(shape, IGNORE_INDEX, dtype=torch.int64)
        for place, (row, (start, stop)) in enumerate(zip(rows, spans, strict=True)):
            length = stop - start
            response_start = int(self.tensors["response_starts"][row])
            input_ids[place, :length] = self.tensors["tokens"][start:stop]
            attention_mask[place, :length] = 1
            labels[place, response_start:length] = input_ids[place, response_start:length]
        return Batch(input_ids=input_ids, attention_mask=attention_mask, labels=labels)

    def prompt_ids(self, index: int) -> torch.Tensor:
        """Token ids of a prompt, (P,) int64, ready to generate from; empty for a chunk of text."""
        row = self._row(index)
        start, _ = self._span(row)
        return self.tensors["tokens"][start : start + int(self.tensors["response_starts"][row])].long()

    def response_ids(self, index: int) -> torch.Tensor:
        """Token ids of a response with its end token, (R,) int64."""
        row = self._row(index)
        start, stop = self._span(row)
        return self.tensors["tokens"][start + int(self.tensors["response_starts"][row]) : stop].long()

    def response_text(self, index: int) -> str:
        """The reference response as it was given, whole; empty for a chunk of text."""
        row = self._row(index)
        start, stop = (int(value) for value in self.tensors["text_offsets"][row : row + 2])
        return self.tensors["texts"][start:stop].numpy().tobytes().decode()

    def label(self, index: int) -> str:
        """The label of an example."""
        return self.label_names[int(self.tensors["labels"][self._row(index)])]

    def _row(self, index: int) -> int:
        if not 0 <= index < len(self):
            raise IndexError(f"example {index} of a split of {len(self)}")
        return self.start + index

    def _span(self, row: int) -> tuple[int, int]:
        start, stop = (int(value) for value in self.tensors["offsets"][row : row + 2])
        return start, stop


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizedQuestions:
    """Multiple choice questions; a choice is judged as a response to the question.

    ``choices`` has ``num_choices`` rows a question, one after another, all with the question as prompt. ``answers`` (Q,)
    int64 count them from 0.
    """

    choices: TokenizedSplit
    answers: torch.Tensor
    num_choices: int

    def __len__(self) -> int:
        return int(self.answers.shape[0])

    def batch(self, indices: Sequence[int] | NDArray[np.int64], pad_token_id: int) -> Batch:
        """Put questions into a batch of ``len(indices) * num_choices`` rows; labels are the choices' tokens with the end."""
        rows = [int(index) * self.num_choices + choice for index in indices for choice in range(self.num_choices)]
        return self.choices.batch(rows, pad_token_id)

    def prompt_ids(self, index: int) -> torch.Tensor:
        """Token ids of a question, (P,) int64, as cut for its first choice."""
        return self.choices.prompt_ids(index * self.num_choices)

    def choice_ids(self, index: int) -> tuple[torch.Tensor, ...]:
        """Token ids of each choice with the end token, (R,) int64."""
        first = index * self.num_choices
        return tuple(self.choices.response_ids(row) for row in range(first, first + self.num_choices))

    def label(self, index: int) -> str:
        """Subject or domain of a question."""
        return self.choices.label(index * self.num_choices)


class PreparedData:
    """A prepared folder, opened for reading. Opening maps the file; pages are read when they are used.

    The mapping is private: a write by mistake stays in the process. Do not pickle one; open the folder again.
    """

    def __init__(self, folder: Path, manifest: Manifest, tensors: dict[str, torch.Tensor]) -> None:
        self.folder = folder
        self.manifest = manifest
        self._tensors = tensors

    @classmethod
    def open(cls, folder: Path) -> PreparedData:
        """Open what ``prepare`` wrote.

        Raises:
            DataError: The folder holds no prepared data, or it is torn.
        """
        path = folder / MANIFEST_NAME
        hint = "delete the folder and prepare the data again"
        try:
            manifest = Manifest.model_validate_json(path.read_bytes())
        except OSError as error:
            raise DataError(f"folder {folder} holds no prepared data ({error})", "prepare the data first") from error
        except ValidationError as error:
            raise DataError(f"{path} is not what this version of fedgraft writes ({error})", hint) from error
        try:
            with safe_open(folder / manifest.tensor_file, framework="pt") as stored:
                tensors = {name: stored.get_tensor(name) for name in TENSOR_NAMES}
        except (OSError, SafetensorError) as error:
            raise DataError(f"{folder / manifest.tensor_file} cannot be read ({error})", hint) from error
        return cls(folder, manifest, tensors)

    @property
    def fingerprint(self) -> str:
        """Hash of everything that decided about the data; equal ones mean equal tokens."""
        return self.manifest.fingerprint

    @property
    def num_clients(self) -> int:
        """Number of clients."""
        return len(self.manifest.clients)

    @property
    def client_names(self) -> tuple[str, ...]:
        """Names of the clients: their label where the partition is natural."""
        return tuple(client.name for client in self.manifest.clients)

    def split(self, client_id: int, name: SplitName) -> TokenizedSplit:
        """Give one split of a client.

        Raises:
            DataError: There is no such client.
        """
        if not 0 <= client_id < self.num_clients:
            raise DataError(f"there is no client {client_id}; the data has clients 0 to {self.num_clients - 1}")
        rows: RowRange = getattr(self.manifest.clients[client_id], name)
        return self._rows(rows)

    @property
    def retention(self) -> TokenizedSplit | None:
        """The held-out general set, if there is one."""
        return None if self.manifest.retention is None else self._rows(self.manifest.retention)

    @property
    def questions(self) -> TokenizedQuestions | None:
        """The multiple choice questions, if there are any."""
        if self.manifest.questions is None:
            return None
        choices = self._rows(self.manifest.questions)
        return TokenizedQuestions(choices=choices, answers=self._tensors["answers"], num_choices=self.manifest.num_choices)

    def partition_table(self) -> dict[str, list[str] | list[list[int]]]:
        """Count examples by client and label, for the report.

        Returns:
            JSON values: ``clients`` (N names), ``labels`` (C names), and for ``train``, ``validation`` and ``test`` N rows of
            C counts.
        """
        clients = self.manifest.clients
        rows = [row for client in clients for row in (client.train, client.validation, client.test)]
        labels = sorted({label for row in rows for label in row.histogram})
        table: dict[str, list[str] | list[list[int]]] = {"clients": list(self.client_names), "labels": labels}
        for name in ("train", "validation", "test"):
            histograms = [getattr(client, name).histogram for client in clients]
            table[name] = [[histogram.get(label, 0) for label in labels] for histogram in histograms]
        return table

    def _rows(self, rows: RowRange) -> TokenizedSplit:
        return TokenizedSplit(tensors=self._tensors, start=rows.start, stop=rows.stop, label_names=self.manifest.labels)
