"""The in-process pool: one replica, this process, one call after another. The reference, and the debugger's friend."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from fedgraft.actors.hosting import Fetch, Finished, ItemOf, LostResult, Note, PoolOptions

__all__ = ["LocalPool"]


class LocalPool:
    """See ``fedgraft.actors.hosting.Pool``. Errors are not caught here: a debugger should see them.

    Args:
        options, note: Only for the same signature as the pool of actors; one replica is all there is.
    """

    size = 1
    inline_bytes = sys.maxsize
    """Every result is here already."""

    def __init__(self, options: PoolOptions, note: Note | None = None) -> None:
        self._hosted: Any = None

    def host(self, factory: Callable[[], Any]) -> None:
        """Build the hosted object in this process."""
        hosted, self._hosted = self._hosted, None
        if hasattr(hosted, "close"):
            hosted.close()
        self._hosted = factory()

    def call(self, name: str) -> list[Any]:
        """Run a method without arguments."""
        return [getattr(self._hosted, name)()]

    def share(self, value: Any) -> Any:
        """Nothing to do: the value is here."""
        return value

    def map(
        self,
        name: str,
        items: Sequence[Any],
        shared: Any,
        *,
        group: int = 1,
        homes: Sequence[int] | None = None,
        may_move: bool = True,
        last: tuple[str, Sequence[Any]] | None = None,
    ) -> Iterator[Finished]:
        """Run the items in order."""
        calls = [(name, item) for item in items]
        if last is not None:
            calls += [(last[0], item) for item in last[1]]
        for index, (called, item) in enumerate(calls):
            value, handle = getattr(self._hosted, called)(item, shared)
            yield Finished(index=index, value=value, handle=handle)

    def apply(
        self,
        function: Callable[[Any, Fetch], tuple[Any, Any]],
        items: Sequence[Any],
        handles: Sequence[Sequence[Any]],
        *,
        homes: Sequence[int] | None = None,
    ) -> Iterator[Finished]:
        """Run the items in order."""
        for index, (item, held) in enumerate(zip(items, handles, strict=True)):
            asked = 0

            def fetch(place: int, held: Sequence[Any] = held) -> Any:
                nonlocal asked
                asked = place
                return self.fetch(held[place])

            try:
                value, handle = function(item, fetch)
            except LostResult as error:
                yield Finished(index=index, error=str(error), lost=(asked,))
            else:
                yield Finished(index=index, value=value, handle=handle)

    def fetch(self, handle: Any) -> Any:
        """Nothing to do: the handle is the value."""
        return handle.handle[handle.place] if isinstance(handle, ItemOf) else handle

    def close(self) -> None:
        """Let go of the hosted object."""
        hosted, self._hosted = self._hosted, None
        if hasattr(hosted, "end"):
            hosted.end()
