"""What processes that were killed began to write in an experiment's folder and never renamed."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

__all__ = ["remove_leftovers"]

_SCRATCH = re.compile(r"\.writing-\d+|\.[\w.-]+\.(json|jsonl|yaml|safetensors)\.\d+(\.tmp)?")
"""Checkpoints being written, and files with dot and process id around their name."""


def remove_leftovers(folder: Path) -> list[Path]:
    """Delete scratch files and folders. Nobody may be at work in the folder.

    Returns:
        What was deleted.
    """
    found = [path for path in sorted(folder.rglob("*")) if _SCRATCH.fullmatch(path.name)]
    for path in found:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    return found
