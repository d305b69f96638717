"""From examples to token ids: the prompt in the tokenizer's chat template, then the response, which is what is learnt."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from fedgraft.data.examples import Example, Message
from fedgraft.errors import DataError

__all__ = ["TokenSequence", "chunk_text", "encode", "encode_all", "load_tokenizer", "pad_token_id", "render", "tokenizer_hash"]

_ALPACA_HEAD = "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
_TEXT_PIECE = 1 << 16


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenSequence:
    """Tokens of one example: ``input_ids`` (S,) int32, of which those from ``response_start`` on count for the loss.

    ``num_prompt_cut`` and ``num_response_cut`` are the tokens that did not fit.
    """

    input_ids: NDArray[np.int32]
    response_start: int
    num_prompt_cut: int = 0
    num_response_cut: int = 0


def load_tokenizer(folder: Path | str) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model folder (or a name of the hub).

    Raises:
        DataError: There is none, or it has no end-of-sequence token.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    except Exception as error:  # transformers raises whatever its backend does
        raise DataError(
            f"no tokenizer can be loaded from {folder} ({type(error).__name__}: {error})",
            "name a model folder that holds tokenizer.json and tokenizer_config.json",
        ) from error
    if tokenizer.eos_token_id is None:
        raise DataError(f"the tokenizer of {folder} has no end-of-sequence token", "set eos_token in tokenizer_config.json")
    return tokenizer


def pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Give the token to pad with: the tokenizer's own, else its end token. Masked positions never count."""
    token_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return int(token_id)


def encode(tokenizer: PreTrainedTokenizerBase, example: Example, max_length: int) -> TokenSequence:
    """Tokenise one example; see ``encode_all``."""
    return encode_all(tokenizer, [example], max_length)[0]


def encode_all(tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], max_length: int) -> list[TokenSequence]:
    """Tokenise examples. Prompt and response are tokenised apart, so a prompt's ids are those that generation starts from.

    A prompt loses its oldest tokens where both together are longer than ``max_length``; it keeps at least one token (the
    first response token is predicted from it), and only then a response loses its last tokens.

    Args:
        tokenizer: With or without chat template; see ``render``.
        examples: Any number.
        max_length: Tokens, >= 2.

    Raises:
        DataError: The chat template does not fit; see ``render``.
    """
    if not examples:
        return []
    prompts, responses = render(tokenizer, examples)
    prefix = [] if tokenizer.chat_template else _leading_tokens(tokenizer)
    prompt_ids = _tokenise(tokenizer, prompts)
    response_ids = _tokenise(tokenizer, responses)
    return [_join(prefix + prompt, response, max_length) for prompt, response in zip(prompt_ids, response_ids, strict=True)]


def render(tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example]) -> tuple[list[str], list[str]]:
    """Give the texts of prompts and of responses as the model sees them.

    With a chat template: the prompt is the template of the user's turns with the generation prompt, the response is the
    rest, up to the end token; what the template puts behind that (a line break, say) is left out. Without one: the plain
    template of Alpaca (https://github.com/tatsu-lab/stanford_alpaca), with the turns of a chat as a transcript, and the
    end token after the response.

    Raises:
        DataError: The prompt of a chat is no prefix of the whole, or the template fails.
    """
    if not tokenizer.chat_template:
        return [_plain_prompt(example) for example in examples], [e.response + tokenizer.eos_token for e in examples]
    chats = [_chat(example) for example in examples]
    try:
        prompts = tokenizer.apply_chat_template(chats, tokenize=False, add_generation_prompt=True)
        wholes = tokenizer.apply_chat_template(
            [[*chat, {"role": "assistant", "content": example.response}] for chat, example in zip(chats, examples, strict=True)],
            tokenize=False,
        )
    except Exception as error:  # a template is a program: it raises what it likes
        raise DataError(
            f"the tokenizer's chat template refuses the examples ({type(error).__name__}: {error})",
            "check that it knows the roles of the messages (some templates know no system turn)",
        ) from error
    responses = []
    for example, prompt, whole in zip(examples, prompts, wholes, strict=True):
        if not whole.startswith(prompt):
            raise DataError(
                f"the chat template of the tokenizer writes a prompt that is no prefix of the whole chat:\n{prompt!r}\n{whole!r}",
                "use a tokenizer whose template ends the prompt just before the answer (see add_generation_prompt)",
            )
        responses.append(_until_end(whole[len(prompt) :], example.response, tokenizer.eos_token))
    return prompts, responses


def chunk_text(tokenizer: PreTrainedTokenizerBase, text: str, max_length: int) -> list[TokenSequence]:
    """Cut plain text into chunks of ``max_length`` tokens, where every token counts; a last, shorter one is left out.

    Raises:
        DataError: The text has fewer than two tokens.
    """
    pieces: list[str] = []
    held: list[str] = []
    size = 0
    for line in text.splitlines(keepends=True):
        held.append(line)
        size += len(line)
        if size >= _TEXT_PIECE:
            pieces.append("".join(held))
            held, size = [], 0
    pieces.append("".join(held))
    ids = np.concatenate([np.asarray(piece, dtype=np.int32) for piece in _tokenise(tokenizer, pieces)])
    if len(ids) < 2:
        raise DataError(f"a text of {len(ids)} tokens is too short to be judged", "give a longer one")
    if len(ids) < max_length:
        return [TokenSequence(input_ids=ids, response_start=0)]
    starts = range(0, len(ids) - max_length + 1, max_length)
    return [TokenSequence(input_ids=ids[start : start + max_length], response_start=0) for start in starts]


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of what decides about token ids: vocabulary, merges, special tokens, chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        content: dict[str, Any] = {"vocabulary": tokenizer.get_vocab(), "class": type(tokenizer).__name__}
    else:
        content = json.loads(backend.to_str())
        content.pop("padding", None)  # set and unset by calls
        content.pop("truncation", None)
    content["chat_template"] = tokenizer.chat_template
    content["end"] = [tokenizer.eos_token_id, pad_token_id(tokenizer)]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _chat(example: Example) -> list[dict[str, str]]:
    turns = (*example.history, Message(role="user", content=example.prompt))
    return [{"role": turn.role, "content": turn.content} for turn in turns]


def _plain_prompt(example: Example) -> str:
    transcript = "".join(f"### {turn.role.capitalize()}:\n{turn.content}\n\n" for turn in example.history)
    return f"{_ALPACA_HEAD}{transcript}### Instruction:\n{example.prompt}\n\n### Response:\n"


def _until_end(rest: str, response: str, end_token: str) -> str:
    if end_token in rest:
        return rest[: rest.rindex(end_token) + len(end_token)]
    # The template ends a turn with another marker than the tokenizer's end token, or with none.
    rest = rest.rstrip()
    return rest + end_token if rest.endswith(response.strip()) else rest


def _leading_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    ids = tokenizer("")["input_ids"]
    return [int(ids[0])] if len(ids) > 0 and ids[0] == tokenizer.bos_token_id else []


def _tokenise(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False)
    return list(encoded["input_ids"])


def _join(prompt: list[int], response: list[int], max_length: int) -> TokenSequence:
    kept_prompt = prompt[-max(1, max_length - len(response)) :]
    kept_response = response[: max_length - len(kept_prompt)]
    return TokenSequence(
        input_ids=np.asarray(kept_prompt + kept_response, dtype=np.int32),
        response_start=len(kept_prompt),
        num_prompt_cut=len(prompt) - len(kept_prompt),
        num_response_cut=len(response) - len(kept_response),
    )
