"""Telling a method's gates which tokens of a coming forward pass are prompt: what a model may look at before it answers.

A gate that weighs whole examples must not see their responses. The passes that train, judge and decode announce their prompts
here; a gate watches, and sets its weights before the pass begins.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeAlias

import torch
from torch import nn

__all__ = ["PromptWatcher", "announce_prompts", "watch_prompts"]

PromptWatcher: TypeAlias = Callable[[torch.Tensor, torch.Tensor], None]
"""Called with ``input_ids`` (B, S) and ``is_prompt`` (B, S), bool, true where a token is read and is no response."""

_WATCHERS = "fedgraft_prompt_watchers"


def announce_prompts(model: nn.Module, input_ids: torch.Tensor, is_prompt: torch.Tensor) -> None:
    """Tell all watchers of a model what it is about to read, row by row in the order of the pass."""
    for watcher in list(getattr(model, _WATCHERS, [])):
        watcher(input_ids, is_prompt)


@contextmanager
def watch_prompts(model: nn.Module, watcher: PromptWatcher) -> Iterator[None]:
    """Call ``watcher`` before every pass of the model that trains, judges or begins to decode; not for a token's own step."""
    if not hasattr(model, _WATCHERS):
        setattr(model, _WATCHERS, [])
    watchers: list[PromptWatcher] = getattr(model, _WATCHERS)
    watchers.append(watcher)
    try:
        yield
    finally:
        watchers.remove(watcher)
