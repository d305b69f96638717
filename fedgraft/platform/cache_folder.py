"""Where everything reusable lies on a machine."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["default_cache"]


def default_cache() -> Path:
    """Give the folder that everything reusable is kept in: $FEDGRAFT_CACHE, $XDG_CACHE_HOME/fedgraft or ~/.cache/fedgraft.

    An empty variable counts as not set; so does a relative $XDG_CACHE_HOME (https://specifications.freedesktop.org/basedir).
    """
    own = os.environ.get("FEDGRAFT_CACHE", "")
    if own:
        return Path(own).expanduser().absolute()
    shared = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (shared if shared.is_absolute() else Path.home() / ".cache") / "fedgraft"
