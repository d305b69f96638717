"""What lies at a path that a user gave, without an exception for odd ones: no home, too long, zero bytes, not searchable."""

from __future__ import annotations

import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel

from fedgraft.platform.validation import Found, KeyPath, show_value

__all__ = ["Place", "look_up", "unknown_homes"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """What was found at a path. ``reason`` says why it could not be looked up; empty where it could, also if nothing is there."""

    path: Path
    kind: Literal["file", "folder", "other", "nothing"]
    reason: str = ""


def look_up(given: str | Path) -> Place:
    """Find out what a path names; ``~`` is the home folder, and links are followed."""
    path = Path(given)
    try:
        path = path.expanduser()
        mode = path.stat().st_mode
    except RuntimeError as error:
        return Place(path=path, kind="nothing", reason=_as_words(error))
    except (FileNotFoundError, NotADirectoryError):
        return Place(path=path, kind="nothing")
    except (OSError, ValueError) as error:
        return Place(path=path, kind="nothing", reason=_as_words(error))
    kind: Literal["file", "folder", "other"] = "file" if stat.S_ISREG(mode) else "folder" if stat.S_ISDIR(mode) else "other"
    return Place(path=path, kind=kind)


def unknown_homes(value: Any, path: KeyPath = ()) -> Iterator[Found]:
    """Find the paths in a tree of configuration whose ``~`` or ``~user`` stands for no folder."""
    if isinstance(value, BaseModel):
        for name, item in value:
            yield from unknown_homes(item, (*path, name))
    elif isinstance(value, dict):
        for name, item in value.items():
            yield from unknown_homes(item, (*path, name))
    elif isinstance(value, tuple):
        for idx, item in enumerate(value):
            yield from unknown_homes(item, (*path, idx))
    elif isinstance(value, Path) and value.parts[:1] and value.parts[0].startswith("~"):
        try:
            value.expanduser()
        except RuntimeError as error:
            expected = "a path whose home folder is known"
            yield Found(path=path, value=show_value(str(value)), expected=expected, hint=_as_words(error))


def _as_words(error: Exception) -> str:
    text = (error.strerror or "") if isinstance(error, OSError) else str(error)
    return (text or type(error).__name__).rstrip(".").lower()
