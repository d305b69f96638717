"""Prepared data that the trials of a sweep share: made once for each data section, tokenizer and seed.

<sweep>/data/<hash of data section and tokenizer>/seed-0/
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from fedgraft.data.config import DataConfig
from fedgraft.data.prepare import prepare
from fedgraft.data.prepared import MANIFEST_NAME
from fedgraft.data.tokenise import tokenizer_hash
from fedgraft.tuning.locks import hold

__all__ = ["shared_data"]


def shared_data(config: DataConfig, tokenizer: PreTrainedTokenizerBase, seed: int, root: Path) -> Path:
    """Give the folder of one data section's data for a seed, and make it if no trial has.

    What is there is taken as it is: the source is read once for the whole sweep, so all trials see the same examples
    even if somebody changes the file meanwhile. While one trial prepares, others that want the same data wait.

    Args:
        config: The trial's data section.
        tokenizer: The model's.
        seed: Decides about partition, splits and samples.
        root: The sweep's folder of data.

    Raises:
        DataError: As ``prepare``.
    """
    key = hashlib.sha256(f"{config.model_dump_json()}|{tokenizer_hash(tokenizer)}".encode()).hexdigest()[:16]
    folder = root / key / f"seed-{seed}"
    if not (folder / MANIFEST_NAME).is_file():
        with hold(folder.parent / f"seed-{seed}.lock"):
            if not (folder / MANIFEST_NAME).is_file():
                prepare(config, tokenizer, seed, folder)
    return folder
