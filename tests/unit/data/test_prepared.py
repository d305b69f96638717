from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedgraft.data.config import DataConfig
from fedgraft.data.corpus import CLIENT_DOMAINS
from fedgraft.data.pools import load_pools
from fedgraft.data.prepare import prepare, share_examples
from fedgraft.data.prepared import MANIFEST_NAME, PreparedData, TokenizedSplit
from fedgraft.data.tokenise import load_tokenizer
from fedgraft.errors import DataError
from fedgraft.types import IGNORE_INDEX

SPLITS = ("train", "validation", "test")
SMALL = {"train_per_domain": 24, "test_per_domain": 12, "num_retention": 6, "questions_per_domain": 3}


def make_records(sizes: dict[str, int]) -> list[dict[str, str]]:
    names = [label for label, size in sizes.items() for _ in range(size)]
    return [
        {"instruction": f"{label} {number}", "response": f"r{number} \u00e9", "category": label}
        for number, label in enumerate(names)
    ]


def texts(split: TokenizedSplit) -> list[str]:
    return [split.response_text(index) for index in range(len(split))]


def all_texts(data: PreparedData) -> list[str]:
    return [text for n in range(data.num_clients) for name in SPLITS for text in texts(data.split(n, name))]


@pytest.fixture
def small(write_lines: Callable[..., Path], tokenizer: Any, tmp_path: Path) -> PreparedData:
    path = write_lines(make_records({"cook": 20, "law": 30, "art": 10}))
    return prepare(DataConfig(path=path), tokenizer, 0, tmp_path / "prepared")


def test_natural_clients_and_their_splits(small: PreparedData) -> None:
    assert small.client_names == ("art", "cook", "law")
    sizes = [[len(small.split(n, name)) for name in SPLITS] for n in range(3)]
    assert sizes == [[7, 1, 2], [14, 2, 4], [21, 3, 6]]  # 10 % validation, 20 % test
    assert sorted(all_texts(small)) == sorted(f"r{number} \u00e9" for number in range(60))
    assert small.split(1, "train").label(0) == "cook"
    assert small.retention is None
    assert small.questions is None


def test_a_row_is_what_the_tokenizer_gives(small: PreparedData, tokenizer: Any) -> None:
    split = small.split(2, "test")
    for index in range(len(split)):
        text = split.response_text(index)
        number = text.removeprefix("r").removesuffix(" \u00e9")
        assert tokenizer.decode(split.prompt_ids(index)) == f"<|user|>law {number}\n<|assistant|>"
        assert tokenizer.decode(split.response_ids(index)) == text + "<|end|>"
        assert split.lengths[index] == len(split.prompt_ids(index)) + len(split.response_ids(index))


def test_batches_are_padded_on_the_right_and_learn_the_response(
    write_lines: Callable[..., Path], tokenizer: Any, tmp_path: Path
) -> None:
    long_and_short = [{"instruction": "a", "response": "b" * size, "category": "x"} for size in (1, 4, 2, 3)]
    path = write_lines(long_and_short)
    data = prepare(DataConfig(path=path, bundled={}), tokenizer, 0, tmp_path / "p")
    split = data.split(0, "train")
    batch = split.batch([1, 0], pad_token_id=0)
    user, assistant, end, b = (tokenizer.convert_tokens_to_ids(t) for t in ("<|user|>", "<|assistant|>", "<|end|>", "b"))
    prompt = [user, *tokenizer("a\n")["input_ids"], assistant]
    counts = [len(split.response_text(index)) for index in (1, 0)]
    width = len(prompt) + max(counts) + 1
    for row, count in enumerate(counts):
        padding = width - len(prompt) - count - 1
        assert batch.input_ids[row].tolist() == [*prompt, *[b] * count, end, *[0] * padding]
        assert batch.attention_mask[row].tolist() == [1] * (width - padding) + [0] * padding
        ignored, unpadded = [IGNORE_INDEX] * len(prompt), [b] * count + [end]
        assert batch.labels[row].tolist() == [*ignored, *unpadded, *[IGNORE_INDEX] * padding]
    assert {t.dtype for t in (batch.input_ids, batch.attention_mask, batch.labels)} == {torch.int64}
    assert split.batch([0, 1], 0).num_label_tokens == split.num_response_tokens == sum(counts) + 2


@pytest.mark.parametrize("index", [-1, 7])
def test_an_index_outside_the_split_is_an_error(small: PreparedData, index: int) -> None:
    with pytest.raises(IndexError, match="of a split of 7"):
        small.split(0, "train").batch([index], 0)


@pytest.mark.parametrize("client", [-1, 3])
def test_an_unknown_client_is_an_error(small: PreparedData, client: int) -> None:
    with pytest.raises(DataError, match="has clients 0 to 2"):
        small.split(client, "train")


def test_partition_table_counts_labels(small: PreparedData) -> None:
    table = small.partition_table()
    assert json.loads(json.dumps(table)) == table
    assert table["labels"] == ["art", "cook", "law"]
    assert table["train"] == [[7, 0, 0], [0, 14, 0], [0, 0, 21]]


def test_limits_and_what_they_leave_out(write_lines: Callable[..., Path], tokenizer: Any, tmp_path: Path) -> None:
    records = [*make_records({"a": 30, "b": 20}), {"instruction": "x", "response": "", "category": "a"}]
    config = DataConfig(
        path=write_lines(records),
        skip_invalid=True,
        max_examples=40,
        max_train_examples=5,
        max_validation_examples=1,
        max_test_examples=3,
        num_clients=1,
    )
    data = prepare(config, tokenizer, 0, tmp_path / "p")
    assert [len(data.split(0, name)) for name in SPLITS] == [5, 1, 3]
    assert data.manifest.num_skipped == 1
    assert data.manifest.num_unused == 50 - 9


def test_a_client_with_too_few_examples_is_named(write_lines: Callable[..., Path], tokenizer: Any, tmp_path: Path) -> None:
    path = write_lines(make_records({"a": 3, "b": 2}))
    with pytest.raises(DataError, match=r"client 1 \(b\) got 2 examples.*\n.*num_clients"):
        prepare(DataConfig(path=path), tokenizer, 0, tmp_path / "p")
    assert not (tmp_path / "p").exists()


def test_cut_examples_are_counted(write_lines: Callable[..., Path], tokenizer: Any, tmp_path: Path) -> None:
    records = [{"instruction": "i" * size, "response": "r", "category": "a"} for size in (1, 1, 50)]
    records += [{"instruction": "i", "response": "r" * 60, "category": "a"}]
    data = prepare(DataConfig(path=write_lines(records), max_length=20), tokenizer, 0, tmp_path / "p")
    rows = [getattr(data.manifest.clients[0], name) for name in SPLITS]
    assert sum(part.num_prompts_cut for part in rows) == 2
    assert sum(part.num_responses_cut for part in rows) == 1
    assert "r" * 60 in all_texts(data)  # the reference text stays whole


def test_the_same_inputs_are_not_prepared_twice(
    write_lines: Callable[..., Path], tokenizer: Any, make_tokenizer: Callable[..., Any], tmp_path: Path
) -> None:
    config = DataConfig(path=write_lines(make_records({"a": 20, "b": 20})))
    first = prepare(config, tokenizer, 0, tmp_path / "p")
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "p").iterdir()}
    moved = DataConfig(path=config.path.rename(tmp_path / "moved.jsonl") if config.path else None)
    assert prepare(moved, tokenizer, 0, tmp_path / "p").fingerprint == first.fingerprint
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "p").iterdir()} == written
    others = [
        prepare(moved, tokenizer, 1, tmp_path / "p"),
        prepare(moved.model_copy(update={"max_length": 64}), tokenizer, 0, tmp_path / "p"),
        prepare(moved, make_tokenizer(None), 0, tmp_path / "p"),
    ]
    assert len({first.fingerprint, *(other.fingerprint for other in others)}) == 4
    assert len(list((tmp_path / "p").iterdir())) == 2  # what was replaced is gone


def test_the_same_seed_gives_the_same_bytes(write_lines: Callable[..., Path], tokenizer: Any, tmp_path: Path) -> None:
    path = write_lines(make_records({"a": 40, "b": 50}))
    config = DataConfig(path=path, partition={"name": "dirichlet", "alpha": 0.3}, num_clients=4)
    one, two, other = (prepare(config, tokenizer, seed, tmp_path / f"p{n}") for n, seed in enumerate((5, 5, 6)))
    contents = [(data.folder / data.manifest.tensor_file).read_bytes() for data in (one, two, other)]
    assert contents[0] == contents[1] != contents[2]
    assert one.manifest == two.manifest


def test_another_seed_splits_a_natural_client_otherwise(write_lines: Callable[..., Path], tokenizer: Any, tmp_path: Path) -> None:
    config = DataConfig(path=write_lines(make_records({"a": 40})))
    one, other = (prepare(config, tokenizer, seed, tmp_path / f"p{seed}") for seed in (0, 1))
    assert set(texts(one.split(0, "test"))) != set(texts(other.split(0, "test")))


def test_torn_data_is_named_by_open_and_made_anew_by_prepare(
    small: PreparedData, write_lines: Callable[..., Path], tokenizer: Any
) -> None:
    tensor_file = small.folder / small.manifest.tensor_file
    whole = tensor_file.read_bytes()
    tensor_file.write_bytes(whole[:-10])
    with pytest.raises(DataError, match="cannot be read"):
        PreparedData.open(small.folder)
    path = write_lines(make_records({"cook": 20, "law": 30, "art": 10}))
    prepare(DataConfig(path=path), tokenizer, 0, small.folder)
    assert tensor_file.read_bytes() == whole
    (small.folder / MANIFEST_NAME).write_text("{}")
    with pytest.raises(DataError, match="not what this version"):
        PreparedData.open(small.folder)
    with pytest.raises(DataError, match="holds no prepared data"):
        PreparedData.open(small.folder / "none")


def test_opened_data_is_mapped_not_copied(small: PreparedData) -> None:
    tensor_file = small.folder / small.manifest.tensor_file
    opened = PreparedData.open(small.folder)
    opened.split(0, "train").prompt_ids(0)
    assert str(tensor_file) in Path("/proc/self/maps").read_text()
    opened.split(0, "train").tensors["tokens"].zero_()  # a write by mistake stays in the process
    assert (
        PreparedData.open(small.folder).split(0, "train").prompt_ids(0).tolist() == small.split(0, "train").prompt_ids(0).tolist()
    )


def test_bundled_corpus(tokenizer: Any, tmp_path: Path) -> None:
    data = prepare(DataConfig(bundled=SMALL), tokenizer, 0, tmp_path / "p")
    assert data.client_names == tuple(sorted(CLIENT_DOMAINS))
    assert {tuple(len(data.split(n, name)) for name in SPLITS) for n in range(data.num_clients)} == {(22, 2, 12)}
    assert data.retention is not None
    assert len(data.retention) == 6
    assert data.questions is not None
    assert len(data.questions) == 3 * len(CLIENT_DOMAINS)
    assert data.manifest.num_unused == 0


def test_bundled_test_pool_keeps_the_clients_proportions() -> None:
    config = DataConfig(
        bundled={"train_per_domain": 200, "test_per_domain": 50, "num_retention": 0, "questions_per_domain": 0},
        partition={"name": "dirichlet", "alpha": 0.3},
        num_clients=4,
    )
    pools = load_pools(config, 0)
    assert pools.test is not None
    train_prompts, test_prompts = ({e.prompt for e in pool} for pool in (pools.train, pools.test))
    assert not train_prompts & test_prompts
    for client in share_examples(pools, config, 0):
        held = Counter(example.label for example in client.train + client.validation)
        tested = Counter(example.label for example in client.test)
        for domain in CLIENT_DOMAINS:
            assert abs(held[domain] / 4 - tested[domain]) <= 2
        assert {example.prompt for example in client.test} <= test_prompts


def test_every_client_gets_a_bundled_test_example_however_uneven_the_shares() -> None:
    config = DataConfig(
        bundled={**SMALL, "train_per_domain": 40},
        partition={"name": "dirichlet", "alpha": 0.02, "min_examples": 4},
        num_clients=12,
    )
    for seed in range(5):
        clients = share_examples(load_pools(config, seed), config, seed)
        assert min(len(client.test) for client in clients) == 1


def test_the_corpus_does_not_depend_on_the_runs_seed() -> None:
    config = DataConfig(bundled=SMALL)
    assert load_pools(config, 0).content_hash() == load_pools(config, 1).content_hash()


def test_questions_share_a_prompt_and_end_with_the_end_token(
    write_lines: Callable[..., Path], tokenizer: Any, tmp_path: Path
) -> None:
    asked = [{"subject": "law", "question": f"Q{n}?", "choices": ["no", "yes", "so"], "answer": n} for n in range(3)]
    path = write_lines(make_records({"a": 10}), "data.jsonl")
    config = DataConfig(path=path, questions={"path": write_lines(asked, "questions.jsonl.gz")})
    questions = prepare(config, tokenizer, 0, tmp_path / "p").questions
    assert questions is not None
    assert (len(questions), questions.num_choices, questions.answers.tolist()) == (3, 3, [0, 1, 2])
    assert tokenizer.decode(questions.prompt_ids(1)) == "<|user|>Q1?\n<|assistant|>"
    assert [tokenizer.decode(ids) for ids in questions.choice_ids(1)] == ["no<|end|>", "yes<|end|>", "so<|end|>"]
    assert questions.label(2) == "law"
    batch = questions.batch([2, 0], 0)
    assert batch.num_examples == 6
    scored = [tokenizer.decode(row[row != IGNORE_INDEX]) for row in batch.labels]
    assert scored == ["no<|end|>", "yes<|end|>", "so<|end|>"] * 2
    limited = config.model_copy(update={"questions": config.questions.model_copy(update={"max_questions": 2})})
    kept = prepare(limited, tokenizer, 0, tmp_path / "q").questions
    assert kept is not None
    assert len(kept) == 2


def test_retention_text_is_cut_into_chunks_where_every_token_counts(
    write_lines: Callable[..., Path], tokenizer: Any, tmp_path: Path
) -> None:
    text = tmp_path / "general.txt"
    text.write_text("".join(f"{number:07}\n" for number in range(100)))
    path = write_lines(make_records({"a": 10}))
    config = DataConfig(path=path, max_length=40, retention={"path": text, "max_examples": 7})
    retention = prepare(config, tokenizer, 0, tmp_path / "p").retention
    assert retention is not None
    assert len(retention) == 7
    batch = retention.batch(range(7), 0)
    assert batch.input_ids.shape == (7, 40)
    assert batch.num_label_tokens == 7 * 39 == retention.num_response_tokens
    numbers = [int(tokenizer.decode(row[:7])) for row in batch.input_ids]
    assert numbers == sorted(numbers)
    assert all(number % 5 == 0 for number in numbers)
    assert len(retention.prompt_ids(0)) == 0
    assert retention.response_text(0) == ""


def test_retention_of_examples_has_its_own_source(write_lines: Callable[..., Path], tokenizer: Any, tmp_path: Path) -> None:
    retention_path = write_lines([{"instruction": "g", "output": str(n)} for n in range(5)], "general.jsonl")
    config = DataConfig(path=write_lines(make_records({"a": 10})), retention={"path": retention_path})
    retention = prepare(config, tokenizer, 0, tmp_path / "p").retention
    assert retention is not None
    assert texts(retention) == list("01234")


def test_real_dolly(shared: Path, tmp_path: Path) -> None:
    if not (shared / "models" / "base").is_dir():
        pytest.skip("shared/models/base is not there")
    config = DataConfig(
        path=shared / "data" / "instruct" / "dolly15k.jsonl.gz",
        max_examples=600,
        partition={"name": "dirichlet", "alpha": 0.1, "min_examples": 10},
        num_clients=12,
        retention={"path": shared / "data" / "text" / "wikitext2_test.txt.gz", "max_examples": 8},
        questions={"path": shared / "data" / "eval" / "mmlu.jsonl.gz", "max_questions": 10},
    )
    tokenizer = load_tokenizer(shared / "models" / "base")
    data = prepare(config, tokenizer, 0, tmp_path / "p")
    assert len(all_texts(data)) == 600
    assert data.manifest.num_unused == 15_011 - 600
    assert data.questions is not None
    assert data.questions.num_choices == 4
    totals = np.array([data.partition_table()[name] for name in SPLITS]).sum(axis=(0, 2))
    assert totals.min() >= 10
