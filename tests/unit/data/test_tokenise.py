from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedgraft.data.config import DataConfig
from fedgraft.data.examples import Example, Message
from fedgraft.data.loading import load_records, to_examples
from fedgraft.data.tokenise import (
    chunk_text,
    encode,
    encode_all,
    load_tokenizer,
    pad_token_id,
    render,
    tokenizer_hash,
)
from fedgraft.errors import DataError

HI = Example(prompt="Hi", response="Yo!")


def test_the_response_ends_with_the_end_token(tokenizer: Any) -> None:
    sequence = encode(tokenizer, HI, 64)
    ids = sequence.input_ids.tolist()
    assert tokenizer.decode(ids[: sequence.response_start]) == "<|user|>Hi\n<|assistant|>"
    assert tokenizer.decode(ids[sequence.response_start :]) == "Yo!<|end|>"
    assert sequence.input_ids.dtype == np.int32
    assert (sequence.num_prompt_cut, sequence.num_response_cut) == (0, 0)


def test_joined_ids_are_those_of_the_whole_chat(tokenizer: Any) -> None:
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo!"}]
    whole = tokenizer(tokenizer.apply_chat_template(chat, tokenize=False), add_special_tokens=False)["input_ids"]
    newline = tokenizer("\n")["input_ids"]
    assert encode(tokenizer, HI, 64).input_ids.tolist() + newline == whole


def test_history_comes_before_the_prompt(tokenizer: Any) -> None:
    history = (
        Message(role="system", content="S"),
        Message(role="user", content="a"),
        Message(role="assistant", content="b"),
    )
    prompts, responses = render(tokenizer, [Example(prompt="c", response="d", history=history)])
    assert prompts == ["<|system|>S\n<|user|>a\n<|assistant|>b<|end|>\n<|user|>c\n<|assistant|>"]
    assert responses == ["d<|end|>"]


def test_without_chat_template_the_plain_one_is_used(make_tokenizer: Callable[..., Any]) -> None:
    prompts, responses = render(make_tokenizer(None), [HI])
    assert prompts[0].endswith("### Instruction:\nHi\n\n### Response:\n")
    assert responses == ["Yo!<|end|>"]


@pytest.mark.parametrize(
    ("ending", "expected"),
    [
        ("{{ eos_token }}\n", "Yo!<|end|>"),
        ("<im_end>\n", "Yo!<im_end>"),  # a base model's end token may differ from the template's marker
        ("\n", "Yo!<|end|>"),
        ("", "Yo!<|end|>"),
    ],
)
def test_every_response_has_an_end(make_tokenizer: Callable[..., Any], ending: str, expected: str) -> None:
    template = (
        "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}"
        + "{% if m['role'] == 'assistant' %}"
        + ending
        + "{% endif %}{% endfor %}"
        + "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    assert render(make_tokenizer(template), [HI]) == (["[user]Hi[assistant]"], [expected])


def test_a_template_whose_prompt_is_no_prefix_is_refused(make_tokenizer: Callable[..., Any]) -> None:
    template = "{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(DataError, match="no prefix"):
        render(make_tokenizer(template), [HI])


def test_a_template_that_refuses_a_role_is_named(make_tokenizer: Callable[..., Any]) -> None:
    template = "{{ raise_exception('no system turn') }}"
    with pytest.raises(DataError, match="no system turn"):
        render(make_tokenizer(template), [HI])


@pytest.mark.parametrize(
    ("max_length", "prompt", "response"),
    [
        (9, "<|user|>Hi\n<|assistant|>", "Yo!<|end|>"),
        (8, "Hi\n<|assistant|>", "Yo!<|end|>"),
        (5, "<|assistant|>", "Yo!<|end|>"),
        (4, "<|assistant|>", "Yo!"),
        (2, "<|assistant|>", "Y"),
    ],
)
def test_prompts_are_cut_first_and_from_the_left(tokenizer: Any, max_length: int, prompt: str, response: str) -> None:
    sequence = encode(tokenizer, HI, max_length)
    ids = sequence.input_ids.tolist()
    assert tokenizer.decode(ids[: sequence.response_start]) == prompt
    assert tokenizer.decode(ids[sequence.response_start :]) == response
    assert len(ids) == max_length
    assert sequence.num_prompt_cut + sequence.num_response_cut == 9 - max_length


def test_text_is_cut_into_whole_chunks(tokenizer: Any) -> None:
    text = "".join(f"line {number}\n" for number in range(20_000))  # more than one piece
    chunks = chunk_text(tokenizer, text, 100)
    assert len(chunks) == len(text) // 100
    assert {len(chunk.input_ids) for chunk in chunks} == {100}
    assert {chunk.response_start for chunk in chunks} == {0}
    assert tokenizer.decode(np.concatenate([chunk.input_ids for chunk in chunks])) == text[: len(chunks) * 100]
    (short,) = chunk_text(tokenizer, "abc", 100)
    assert len(short.input_ids) == 3
    with pytest.raises(DataError, match="too short"):
        chunk_text(tokenizer, "a", 100)


def test_tokenizer_hash_sees_vocabulary_and_template(tokenizer: Any, make_tokenizer: Callable[..., Any]) -> None:
    before = tokenizer_hash(tokenizer)
    tokenizer(["a", "bcd"], padding=True, truncation=True, max_length=2)
    assert tokenizer_hash(tokenizer) == before == tokenizer_hash(make_tokenizer())
    assert tokenizer_hash(make_tokenizer(None)) != before


def test_padding_falls_back_to_the_end_token(make_tokenizer: Callable[..., Any]) -> None:
    tokenizer = make_tokenizer()
    assert pad_token_id(tokenizer) == 0
    tokenizer.pad_token = None
    assert pad_token_id(tokenizer) == 1


def test_a_folder_without_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no tokenizer can be loaded from"):
        load_tokenizer(tmp_path)


def test_real_tokenizer_and_dolly(shared: Path) -> None:
    folder = shared / "models" / "base"
    if not folder.is_dir():
        pytest.skip("shared/models/base is not there")
    tokenizer = load_tokenizer(folder)
    sequence = encode(tokenizer, HI, 64)
    assert tokenizer.decode(sequence.input_ids) == "<|user|>\nHi\n<|assistant|>\nYo!<|end|>"
    assert sequence.input_ids[-1] == tokenizer.eos_token_id
    source = DataConfig(path=shared / "data" / "instruct" / "dolly15k.jsonl.gz")
    examples = to_examples(load_records(source)[:3_000], source="dolly")
    started = time.perf_counter()
    sequences = encode_all(tokenizer, examples, 256)
    assert time.perf_counter() - started < 20  # about 1 s on two idle cores
    assert all(sequence.input_ids[-1] == tokenizer.eos_token_id for sequence in sequences if not sequence.num_response_cut)
    for number in (0, 1_000, 2_999):  # batches change nothing
        assert encode(tokenizer, examples[number], 256).input_ids.tolist() == sequences[number].input_ids.tolist()
