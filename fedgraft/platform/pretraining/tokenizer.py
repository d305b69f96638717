"""The tokenizer of a pre-training: a byte-level BPE trained on its texts, or one that is taken from a folder."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from fedgraft.data.tokenise import load_tokenizer
from fedgraft.errors import DataError
from fedgraft.platform.bundled_model import CHAT_TEMPLATE, SPECIAL_TOKENS

__all__ = ["MIN_VOCABULARY", "take_tokenizer", "train_tokenizer"]

MIN_VOCABULARY = 256 + len(SPECIAL_TOKENS)
"""Fewest tokens of a byte-level vocabulary: every byte, and the special tokens of the chat template."""


def train_tokenizer(texts: Iterable[str], vocab_size: int, max_length: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE with the chat template of the bundled model; digits stand alone.

    Args:
        texts: What merges are counted on.
        vocab_size: At least ``MIN_VOCABULARY``. Short texts may not have enough pairs to fill it.
        max_length: The model's positions, written into the tokenizer.
    """
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    pad, bos, end, *roles = SPECIAL_TOKENS
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=pad,
        bos_token=bos,
        eos_token=end,
        additional_special_tokens=roles,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=max_length,
    )


def take_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a folder.

    Raises:
        DataError: There is no such folder, or no tokenizer in it.
    """
    if not folder.is_dir():
        raise DataError(f"tokenizer.path {folder} is no folder", "name a folder with tokenizer.json and tokenizer_config.json")
    return load_tokenizer(folder)
