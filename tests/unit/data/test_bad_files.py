"""Data files that lie: whatever is in them, preparing ends with the data or with one error that names the file and the place."""

from __future__ import annotations

import gzip
import io
import json
import random
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from transformers import PreTrainedTokenizerFast

from fedgraft.data.config import DataConfig
from fedgraft.data.prepare import prepare
from fedgraft.data.prepared import PreparedData
from fedgraft.errors import DataError

GOOD = [{"instruction": f"do {i}", "response": f"done {i}", "category": "ab"[i % 2]} for i in range(24)]


def lines(rows: list[Any]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def each(**fields: Any) -> bytes:
    return lines([{**row, **fields} for row in GOOD])


def parquet(**columns: Any) -> bytes:
    stream = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"instruction": ["a"] * 24, "response": ["b"] * 24} | columns), stream)
    return stream.getvalue()


def load(path: Path, content: bytes, tokenizer: PreTrainedTokenizerFast, **options: Any) -> PreparedData:
    path.write_bytes(content)
    config = DataConfig.model_validate({"path": path, "max_length": 48} | options)
    return prepare(config, tokenizer, 0, path.parent / "prepared")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", each().replace(b'"b"', b"NaN"), "record 2: field 'category' holds nan, expected text"),
        ("a.jsonl", each(response=float("inf")), "record 1: field 'response' holds inf"),
        ("a.parquet", parquet(category=[float("nan")] * 24), "holds nan"),
        ("a.jsonl", each(instruction="x" * 1_000_001), "holds 1000001 characters, expected at most 1000000"),
        ("a.jsonl", b'{"a": ' + b"[" * 10_000 + b"\n", "line 1: not JSON \\(maximum recursion"),
        ("a.json", b"[" * 10_000, "the file: not JSON \\(maximum recursion"),
        ("a.jsonl", b'{"a": ' + b"9" * 6000 + b"}\n", "not JSON \\(Exceeds the limit"),
        ("a.parquet", parquet(category=pyarrow.array([2**60] * 24, pyarrow.timestamp("us"))), "OverflowError"),
        ("a.parquet", each(), "cannot be read to its end"),
        ("a.csv", parquet(), "cannot be read to its end"),
        ("a.parquet.gz", gzip.compress(parquet()), "cannot be read to its end"),
        ("a.jsonl.gz", gzip.compress(gzip.compress(each())), "cannot be read to its end"),
        ("a.jsonl.gz", gzip.compress(each())[:-8] + b"12345678", "CRC"),
        ("a.jsonl", each(category=[1]), "holds a list, expected text"),
        ("a.jsonl", each() + b'{"x": 1}\n', "record 25: expected a field 'category'; found x"),
        ("a.jsonl", b"\0" * 100, "line 1: not JSON"),
        ("a.jsonl", each().decode().encode("utf-16"), "UnicodeDecodeError"),
    ],
)
def test_what_is_wrong_is_one_error(
    tmp_path: Path, byte_tokenizer: PreTrainedTokenizerFast, name: str, content: bytes, said: str
) -> None:
    with pytest.raises(DataError, match=said) as caught:
        load(tmp_path / name, content, byte_tokenizer)
    assert str(tmp_path / name) in caught.value.message
    assert len(str(caught.value)) < 600
    assert caught.value.hint


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv"])
def test_the_mark_that_windows_puts_first_is_no_text(tmp_path: Path, byte_tokenizer: PreTrainedTokenizerFast, name: str) -> None:
    rows = [",".join(GOOD[0])] + [",".join(row.values()) for row in GOOD]
    content = each() if name == "a.jsonl" else "\r\n".join(rows).encode()
    assert load(tmp_path / name, b"\xef\xbb\xbf" + content, byte_tokenizer).client_names == ("a", "b")


def test_a_spoilt_file_gives_data_or_one_error(tmp_path: Path, byte_tokenizer: PreTrainedTokenizerFast) -> None:
    contents = {
        "a.jsonl": each(),
        "a.json": json.dumps(GOOD).encode(),
        "a.csv": "\n".join([",".join(GOOD[0])] + [",".join(row.values()) for row in GOOD]).encode(),
        "a.parquet": parquet(category=["a", "b"] * 12),
        "a.jsonl.gz": gzip.compress(each(), mtime=0),
    }
    rng = random.Random(0)
    refused = 0
    for _ in range(100):
        name = rng.choice(list(contents))
        content = bytearray(contents[name])
        for _ in range(rng.choice((1, 1, 3, 10))):
            at = rng.randrange(len(content))
            size = rng.choice((1, 1, 4, 40))
            way = rng.randrange(3)
            if way == 0:
                content[at : at + size] = rng.randbytes(size)
            elif way == 1 and len(content) > size + 1:
                del content[at : at + size]
            else:
                content[at:at] = content[: rng.choice((1, 30))]
        try:
            load(tmp_path / name, bytes(content), byte_tokenizer)
        except DataError:
            refused += 1
    assert 30 < refused < 100
