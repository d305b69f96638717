from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fedgraft.data.config import DataConfig, FieldMap, QuestionsConfig, RetentionConfig
from fedgraft.data.examples import NO_LABEL, Example, Message, Question
from fedgraft.data.files import read_file, read_text
from fedgraft.data.loading import detect_preset, load_records, to_examples, to_questions
from fedgraft.errors import DataError

RECORDS = [{"instruction": "Say, loudly", "output": "a\nb"}, {"instruction": "Two", "output": "\u00fc"}]


@pytest.mark.parametrize("name", ["r.jsonl", "r.jsonl.gz", "r.json", "r.json.gz", "r.csv", "r.csv.gz", "r.parquet"])
def test_every_kind_of_file_gives_the_same_records(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist(RECORDS), path)
    else:
        if "csv" in name:
            text = 'instruction,output\n"Say, loudly","a\nb"\nTwo,\u00fc\n'
        elif "jsonl" in name:
            text = "\n".join(map(json.dumps, RECORDS)) + "\n\n"
        else:
            text = json.dumps(RECORDS)
        path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    assert load_records(DataConfig(path=path)) == RECORDS


def test_a_folder_gives_its_files_in_order(tmp_path: Path) -> None:
    (tmp_path / "b.jsonl").write_text('{"n": 3}\n')
    (tmp_path / "a.json").write_text('[{"n": 1}, {"n": 2}]')
    (tmp_path / "notes.md").write_text("not data")
    assert load_records(DataConfig(path=tmp_path)) == [{"n": 1}, {"n": 2}, {"n": 3}]


def test_a_folder_without_data_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "notes.md").write_text("not data")
    with pytest.raises(DataError, match="holds no data file"):
        load_records(DataConfig(path=tmp_path))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.jsonl", None, "does not exist"),
        ("empty.jsonl", b"", "holds no records"),
        ("empty.json", b"", "holds no records"),
        ("bad.jsonl", b'{"a": 1}\n{"a": \n', "line 2: not JSON"),
        ("list.jsonl", b"[1, 2]\n", "line 1: a JSON list"),
        ("object.json", b'{"a": 1}', "expected a list of objects"),
        ("torn.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 1000, mtime=0)[:-12], "cannot be read to its end"),
        ("plain.jsonl.gz", b'{"a": 1}\n', "cannot be read to its end"),
        ("latin.jsonl", b'{"a": "\xfc"}\n', "UnicodeDecodeError"),
        ("torn.parquet", b"PAR1xxxx", "cannot be read to its end"),
        ("ragged.csv", b"a,b\n1,2\n3\n", "record 2: it has not as many values"),
        ("data.xml", b"<a/>", "of unknown kind"),
    ],
)
def test_bad_files_are_named_with_the_place(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        read_file(path)
    assert str(path) in str(caught.value)


def test_empty_text_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(" \n")
    with pytest.raises(DataError, match="is empty"):
        read_text(tmp_path / "a.txt")


def test_records_of_another_split_are_left_out(write_lines: Callable[..., Path]) -> None:
    path = write_lines([{"n": 1, "split": "train"}, {"n": 2, "split": "test"}, {"n": 3, "split": "train"}])
    assert [record["n"] for record in load_records(DataConfig(path=path))] == [1, 3]
    assert [record["n"] for record in load_records(DataConfig(path=path, split=None))] == [1, 2, 3]
    with pytest.raises(DataError, match="found test, train"):
        load_records(DataConfig(path=path, split="dev"))


def test_saved_data_sets_are_read(tmp_path: Path) -> None:
    train, test = datasets.Dataset.from_list(RECORDS), datasets.Dataset.from_list(RECORDS[:1])
    train.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": train, "test": test}).save_to_disk(tmp_path / "two")
    assert load_records(DataConfig(path=tmp_path / "one")) == RECORDS
    assert load_records(DataConfig(path=tmp_path / "two")) == RECORDS
    assert load_records(RetentionConfig(path=tmp_path / "two")) == RECORDS[:1]
    with pytest.raises(DataError, match="has no split 'dev'; it has train, test"):
        load_records(DataConfig(path=tmp_path / "two", split="dev"))


def test_a_name_goes_through_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "train.jsonl").write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    assert load_records(DataConfig(name=str(folder))) == RECORDS
    with pytest.raises(DataError, match=r"split dev: cannot be loaded"):
        load_records(DataConfig(name=str(folder), split="dev"))


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        (
            {"instruction": "Sum up", "context": "Text.", "response": "T", "category": "summ"},
            Example(prompt="Sum up\n\nText.", response="T", label="summ"),
        ),
        ({"instruction": "Hi", "context": "", "response": "Ho"}, Example(prompt="Hi", response="Ho")),
        ({"instruction": "Hi", "input": "x", "output": "y"}, Example(prompt="Hi\n\nx", response="y")),
        ({"question": "1+1?", "answer": "#### 2"}, Example(prompt="1+1?", response="#### 2")),
        ({"question": "1+1?", "answer": 2}, Example(prompt="1+1?", response="2")),
        (
            {
                "messages": [
                    {"role": "system", "content": "Be kind."},
                    {"role": "user", "content": "a"},
                    {"role": "assistant", "content": "b"},
                    {"role": "user", "content": "c"},
                ]
            },
            Example(prompt="a", response="b", history=(Message(role="system", content="Be kind."),)),
        ),
    ],
)
def test_presets_are_found_by_field_names(record: dict[str, Any], expected: Example) -> None:
    assert to_examples([record], source="s") == [expected]


def test_custom_fields_and_label_field() -> None:
    record = {"q": "Q", "a": "A", "c": "C", "kind": "k", "site": 7}
    fields = FieldMap(prompt="q", response="a", context="c", label="kind")
    assert to_examples([record], source="s", preset="custom", fields=fields) == [
        Example(prompt="Q\n\nC", response="A", label="k")
    ]
    plain = FieldMap(prompt="q", response="a")
    labelled = to_examples([record], source="s", preset="custom", fields=plain, label_field="site")
    assert labelled == [Example(prompt="Q", response="A", label="7")]
    misspelt = FieldMap(prompt="q", response="a", context="ctx")
    with pytest.raises(DataError, match="expected a field 'ctx'"):
        to_examples([record], source="s", preset="custom", fields=misspelt)


@pytest.mark.parametrize(
    ("records", "options", "message"),
    [
        ([{"text": "x"}], {}, "the fields text fit no preset"),
        ([{"instruction": "a", "response": "b"}, {"instruction": "a"}], {}, r"record 2: expected a field 'response'"),
        ([{"instruction": "a", "response": ["b"]}], {}, "holds a list, expected text"),
        ([{"instruction": "a", "response": "b"}], {"label_field": "topic"}, "expected a field 'topic'; found instruction"),
        ([{"instruction": "a", "response": "b", "t": None}], {"label_field": "t"}, "label field 't' is empty"),
        ([{"messages": [{"role": "user", "content": "a"}]}], {}, "must follow a user message"),
        ([{"messages": [{"role": "user"}]}], {}, "needs role and content"),
        ([], {}, "there are no records"),
    ],
)
def test_records_that_do_not_fit_are_named(records: list[Any], options: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        to_examples(records, source="s", **options)


def test_empty_responses_are_refused_or_skipped() -> None:
    records = [{"instruction": str(n), "output": "" if n in (3, 5) else None if n == 6 else "x"} for n in range(8)]
    with pytest.raises(DataError, match=r"3 of 8 records .*first: record 4"):
        to_examples(records, source="s")
    kept = to_examples(records, source="s", skip_invalid=True)
    assert [example.prompt for example in kept] == ["0", "1", "2", "4", "7"]
    with pytest.raises(DataError, match="every one"):
        to_examples(records[3:4], source="s", skip_invalid=True)


def test_half_a_surrogate_pair_becomes_text_that_can_be_encoded(write_lines: Callable[..., Path]) -> None:
    path = write_lines([{"question": "a \ud800 b", "answer": "c"}])
    (example,) = to_examples(load_records(DataConfig(path=path)), source="s")
    assert example.prompt == "a ? b"


def test_questions() -> None:
    records = [
        {"subject": "law", "question": "Q?", "choices": ["a", "b"], "answer": 1},
        {"question": "R?", "choices": ["c", 4], "answer": "A"},
    ]
    assert to_questions(records, "s") == [
        Question(question="Q?", choices=("a", "b"), answer=1, label="law"),
        Question(question="R?", choices=("c", "4"), answer=0, label=NO_LABEL),
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answer": 4}, "answer must be 0 to 3"),
        ({"answer": "E"}, "answer must be"),
        ({"answer": True}, "answer must be"),
        ({"choices": "abcd"}, "list of two or more"),
        ({"choices": ["a", "b", "c", " "]}, "a choice is empty"),
        ({"choices": ["a", "b", "c"], "answer": 0}, "3 choices, but record 1 has 4"),
    ],
)
def test_bad_questions_are_refused(change: dict[str, Any], message: str) -> None:
    record = {"subject": "law", "question": "Q?", "choices": ["a", "b", "c", "d"], "answer": 1}
    with pytest.raises(DataError, match=message):
        to_questions([record, {**record, **change}], "s")


@pytest.mark.parametrize(
    ("name", "preset", "count", "label"),
    [
        ("dolly15k", "dolly", 15_011, "general_qa"),
        ("gsm8k", "gsm8k", 7_473, NO_LABEL),
        ("codealpaca_part", "alpaca", 6_550, NO_LABEL),
    ],
)
def test_real_sets(shared: Path, name: str, preset: str, count: int, label: str) -> None:
    config = DataConfig(path=shared / "data" / "instruct" / f"{name}.jsonl.gz")
    records = load_records(config)
    assert detect_preset(records[0], name) == preset
    examples = to_examples(records, source=name, skip_invalid=True)
    assert len(examples) == count  # from the sets' README; two empty answers in CodeAlpaca
    assert examples[0].label == label


def test_real_questions(shared: Path) -> None:
    records = load_records(QuestionsConfig(path=shared / "data" / "eval" / "mmlu.jsonl.gz"))
    questions = to_questions(records, "mmlu")
    assert len(questions) == 14_042
    assert len({question.label for question in questions}) == 57
