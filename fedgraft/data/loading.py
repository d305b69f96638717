"""From a source to examples: records of local files or of a Hugging Face data set, and what their fields mean."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets

from fedgraft.data.config import FieldMap, Preset, SourceConfig
from fedgraft.data.examples import NO_LABEL, Example, Message, Question
from fedgraft.data.files import Record, read_file, read_folder
from fedgraft.errors import DataError

__all__ = ["detect_preset", "load_records", "source_name", "to_examples", "to_questions"]

_log = logging.getLogger(__name__)

_PRESETS: dict[str, FieldMap] = {
    "dolly": FieldMap(prompt="instruction", context="context", response="response", label="category"),
    "alpaca": FieldMap(prompt="instruction", context="input", response="output"),
    "gsm8k": FieldMap(prompt="question", response="answer"),
}
_MAX_CHARACTERS = 1_000_000
"""Longest text of a field: a torn file may hold all of its records in one, and tokenising that would look like a hang."""

_CUSTOM_HINT = "set preset: custom and name the fields, e.g. fields: {prompt: question, response: answer}"


def source_name(config: SourceConfig) -> str:
    """Name a source for messages and reports: its path, else the data set's name, else the bundled corpus."""
    if config.path is not None:
        return str(config.path)
    if config.name is not None:
        return config.name if config.config_name is None else f"{config.name} ({config.config_name})"
    return "the bundled corpus"


def load_records(config: SourceConfig) -> list[Record]:
    """Load all records of a source, in its own order.

    A path may be a data file, a folder of data files, or a folder that ``datasets`` saved; it wins over a name. Of a plain
    file with a field ``split``, records of another split than ``config.split`` are left out.

    Args:
        config: Has a path or a name.

    Raises:
        DataError: Nothing is there, it cannot be read, or it has no such split.
    """
    if config.path is None:
        return _load_hub(config)
    if config.name is not None:
        _log.warning("data set %s is not used: the path %s wins over the name", config.name, config.path)
    if not config.path.is_dir():
        return _only_split(read_file(config.path), config)
    if (config.path / "dataset_dict.json").is_file() or (config.path / "dataset_info.json").is_file():
        return _load_saved(config.path, config.split)
    return _only_split(read_folder(config.path), config)


def detect_preset(record: Record, source: str) -> Preset:
    """Find the preset that the field names of a record fit.

    Raises:
        DataError: None does; the fields found are listed.
    """
    if isinstance(record.get("messages"), Sequence) and not isinstance(record["messages"], str):
        return "messages"
    names = record.keys()
    if {"instruction", "response"} <= names:
        return "dolly"
    if {"instruction", "output"} <= names:
        return "alpaca"
    if {"question", "answer"} <= names:
        return "gsm8k"
    raise DataError(
        f"{source}: the fields {_listed(record)} fit no preset (dolly: instruction, response; alpaca: instruction, output; "
        "gsm8k: question, answer; messages: messages)",
        _CUSTOM_HINT,
    )


def to_examples(
    records: Sequence[Record],
    *,
    source: str,
    preset: Preset = "auto",
    fields: FieldMap | None = None,
    label_field: str | None = None,
    skip_invalid: bool = False,
) -> list[Example]:
    """Turn records into examples, in the same order.

    Args:
        records: At least one; ``auto`` looks at the first.
        source: For messages.
        preset: What the fields mean. A context is put under the prompt, after an empty line.
        fields: With ``custom`` only.
        label_field: Field of the label, instead of the preset's. A preset's own label is used if the first record has it.
        skip_invalid: Leave out records whose prompt or response is empty.

    Raises:
        DataError: A field is missing or no text, a prompt or response is empty, or nothing is left. Records count from 1.
    """
    if not records:
        raise DataError(f"{source}: there are no records", "check the file and its split")
    chosen = detect_preset(records[0], source) if preset == "auto" else preset
    layout = fields if chosen == "custom" else _PRESETS.get(chosen)
    if label_field is None and layout is not None and (chosen == "custom" or layout.label in records[0]):
        label_field = layout.label
    if chosen == "custom" and layout is not None and layout.context is not None:
        _require(records[0], layout.context, f"{source}, record 1")
    examples: list[Example] = []
    empty: list[int] = []
    for number, record in enumerate(records, start=1):
        place = f"{source}, record {number}"
        label = NO_LABEL if label_field is None else _label(record, label_field, place)
        example = _from_messages(record, label, place) if layout is None else _from_fields(record, layout, label, place)
        if example.prompt.strip() and example.response.strip():
            examples.append(example)
        else:
            empty.append(number)
    if empty and not skip_invalid:
        raise DataError(
            f"{source}: {len(empty)} of {len(records)} records have an empty prompt or response (first: record {empty[0]})",
            "mend them, or leave them out with skip_invalid: true",
        )
    if not examples:
        raise DataError(f"{source}: every one of {len(records)} records has an empty prompt or response", _CUSTOM_HINT)
    return examples


def to_questions(records: Sequence[Record], source: str) -> list[Question]:
    """Turn MMLU-like records {subject, question, choices, answer} into questions, in the same order.

    ``answer`` counts the choices from 0, or is a capital letter; ``subject`` may be missing.

    Raises:
        DataError: A field is missing or wrong, or the number of choices differs between records.
    """
    questions: list[Question] = []
    for number, record in enumerate(records, start=1):
        place = f"{source}, record {number}"
        choices = _require(record, "choices", place)
        if isinstance(choices, str) or not isinstance(choices, Sequence) or len(choices) < 2:
            raise DataError(f"{place}: choices must be a list of two or more texts, got {choices!r}")
        if any(not str(choice).strip() for choice in choices):
            raise DataError(f"{place}: a choice is empty: {list(choices)!r}")
        if questions and len(choices) != len(questions[0].choices):
            raise DataError(
                f"{place}: {len(choices)} choices, but record 1 has {len(questions[0].choices)}",
                "keep questions with the same number of choices",
            )
        questions.append(
            Question(
                question=_text(record, "question", place),
                choices=tuple(str(choice) for choice in choices),
                answer=_answer(_require(record, "answer", place), len(choices), place),
                label=_label(record, "subject", place) if "subject" in record else NO_LABEL,
            )
        )
    return questions


def _load_hub(config: SourceConfig) -> list[Record]:
    if config.name is None:
        raise DataError("there is neither a path nor a name to load records from", "set path or name")
    if config.split is None:
        raise DataError(f"data set {config.name}: no split is given", "set split, e.g. train")
    try:
        loaded = datasets.load_dataset(config.name, config.config_name, split=config.split)
    except Exception as error:  # the hub client raises errors of a dozen libraries
        raise DataError(
            f"data set {source_name(config)}, split {config.split}: cannot be loaded ({type(error).__name__}: {error})",
            "check name, config_name and split; without network give a local copy as path",
        ) from error
    return list(loaded.to_list())


def _load_saved(folder: Path, split: str | None) -> list[Record]:
    try:
        loaded = datasets.load_from_disk(str(folder))
    except Exception as error:  # as above
        raise DataError(
            f"folder {folder}: the saved data set cannot be loaded ({type(error).__name__}: {error})", "save it again"
        ) from error
    if not isinstance(loaded, datasets.DatasetDict):
        return list(loaded.to_list())
    if split not in loaded:
        raise DataError(f"folder {folder} has no split {split!r}; it has {', '.join(map(str, loaded))}", "set split to one")
    return list(loaded[split].to_list())


def _only_split(records: list[Record], config: SourceConfig) -> list[Record]:
    if config.split is None or not all(isinstance(record.get("split"), str) for record in records):
        return records
    kept = [record for record in records if record["split"] == config.split]
    if not kept:
        found = sorted({record["split"] for record in records})
        raise DataError(
            f"{config.path}: no record has split {config.split!r}; found {', '.join(found[:8])}",
            "set split to one of them, or to null to take every record",
        )
    if len(kept) < len(records):
        _log.info("%s: %d of %d records are of split %s", config.path, len(kept), len(records), config.split)
    return kept


def _from_fields(record: Record, layout: FieldMap, label: str, place: str) -> Example:
    prompt = _text(record, layout.prompt, place)
    if layout.context is not None and layout.context in record:
        context = _text(record, layout.context, place)
        prompt = f"{prompt}\n\n{context}" if context.strip() else prompt
    return Example(prompt=prompt, response=_text(record, layout.response, place), label=label)


def _from_messages(record: Record, label: str, place: str) -> Example:
    messages = _require(record, "messages", place)
    if isinstance(messages, str) or not isinstance(messages, Sequence):
        raise DataError(f"{place}: messages must be a list of {{role, content}}, got {type(messages).__name__}")
    turns: list[Message] = []
    for message in messages:
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise DataError(f"{place}: every message needs role and content, got {message!r}")
        turns.append(Message(role=str(message["role"]), content=_text(message, "content", place)))
    while turns and turns[-1].role != "assistant":
        turns.pop()
    if len(turns) < 2 or turns[-2].role != "user":
        raise DataError(
            f"{place}: the last assistant message must follow a user message; the roles are "
            f"{', '.join(turn.role for turn in turns) or 'without assistant'}",
            "leave this chat out, or mend it",
        )
    return Example(prompt=turns[-2].content, response=turns[-1].content, label=label, history=tuple(turns[:-2]))


def _require(record: Record, field: str, place: str) -> Any:
    if field not in record:
        raise DataError(f"{place}: expected a field {field!r}; found {_listed(record)}", _CUSTOM_HINT)
    return record[field]


def _text(record: Record, field: str, place: str) -> str:
    value = _require(record, field, place)
    if value is None:
        return ""
    if isinstance(value, float) and not math.isfinite(value):
        raise DataError(f"{place}: field {field!r} holds {value}, expected text", "where it stands for nothing, write null")
    if isinstance(value, str) and len(value) > _MAX_CHARACTERS:
        raise DataError(
            f"{place}: field {field!r} holds {len(value)} characters, expected at most {_MAX_CHARACTERS}",
            "is a line break or a quote missing? else cut it: far fewer tokens than that are used (data.max_length)",
        )
    if isinstance(value, (str, int, float)):
        return str(value).encode("utf-8", "replace").decode()  # JSON may hold half of a surrogate pair; tokenizers fail on it
    raise DataError(f"{place}: field {field!r} holds a {type(value).__name__}, expected text", _CUSTOM_HINT)


def _label(record: Record, field: str, place: str) -> str:
    label = _text(record, field, place)
    if not label.strip():
        raise DataError(f"{place}: the label field {field!r} is empty", "set label_field to a field that every record has")
    return label


def _answer(value: Any, num_choices: int, place: str) -> int:
    answer = value
    if isinstance(value, str):
        answer = ord(value) - ord("A") if len(value) == 1 and value.isalpha() else -1
        answer = int(value) if value.isdecimal() else answer
    if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < num_choices:
        raise DataError(f"{place}: answer must be 0 to {num_choices - 1} or a capital letter, got {value!r}")
    return answer


def _listed(record: Record) -> str:
    return ", ".join(map(str, record)) or "no fields"
