"""The folder of one run: records as JSON lines, facts as JSON, checkpoints; everything a report or a resume reads.

config.yaml          the resolved configuration
run.json             what was run, with which versions, how it ended
metrics.jsonl        one line a round
evaluations.jsonl    one line a metric
ledger.jsonl         bytes by client, direction and group
diagnostics.jsonl    what methods noted: the choice of grafts, how far gates open, routing entropy
hashes.jsonl         one line a round: the server's state, the private states that it wrote; see ``verify``
partition.json       who has what
checkpoints/         the server's state after a round; see ``checkpoint``
clients/             private state of clients; see ``state_store``
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from fedgraft.platform.storage import append_text, sync_file, written_whole

__all__ = ["RECORDS", "RunFolder", "write_json"]

RECORDS = ("metrics", "evaluations", "ledger", "diagnostics", "hashes")
"""Names of the files that grow by lines; every line has a ``round``."""


def write_json(value: Any, path: Path) -> None:
    """Write JSON under a temporary name, flush to disk, then rename.

    Raises:
        StorageError: It cannot be written, e.g. as the disk is full; what was there is as it was.
    """
    with written_whole(path) as scratch:
        scratch.write_text(json.dumps(value, indent=1))


class RunFolder:
    """Reads and writes one run's folder.

    Args:
        path: Made if it is not there.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir(parents=True, exist_ok=True)
        self._unsynced: set[Path] = set()

    @property
    def state_folder(self) -> Path:
        """Private state of the clients."""
        return self.path / "clients"

    @property
    def checkpoint_folder(self) -> Path:
        """Checkpoints of the server's state."""
        return self.path / "checkpoints"

    def records(self) -> list[Path]:
        """Files that a report or a comparison reads, to be stored elsewhere too; those that a run lacks are not there."""
        names = ("config.yaml", "run.json", "partition.json", *(f"{record}.jsonl" for record in RECORDS))
        return [self.path / name for name in names]

    def append(self, record: str, rows: Iterable[Mapping[str, Any]]) -> None:
        """Add lines to one of ``RECORDS``, all of them or none.

        Raises:
            StorageError: They cannot be written, e.g. as the disk is full.
        """
        text = "".join(json.dumps(dict(row)) + "\n" for row in rows)
        path = self.path / f"{record}.jsonl"
        if text or not path.exists():  # a record without lines says that there were none; without a file a run is not complete
            append_text(path, text)
            self._unsynced.add(path)

    def rows(self, record: str) -> Iterator[dict[str, Any]]:
        """Give the lines of one of ``RECORDS``; after ``truncate`` none of them is torn."""
        path = self.path / f"{record}.jsonl"
        for line in path.read_text().splitlines() if path.is_file() else ():
            yield json.loads(line)

    def sync(self) -> None:
        """Flush the lines added since the last call to disk: before a checkpoint, which is all that a run goes on from.

        Raises:
            StorageError: They cannot be written, e.g. as the disk is full.
        """
        for path in sorted(self._unsynced):
            sync_file(path)
        self._unsynced.clear()

    def truncate(self, last_round: int) -> None:
        """Drop the lines of rounds after ``last_round``, and a torn last line: a resumed run writes them again."""
        for record in RECORDS:
            path = self.path / f"{record}.jsonl"
            if not path.is_file():
                continue
            kept = []
            for line in path.read_text().splitlines():
                try:
                    row = json.loads(line)
                except ValueError:
                    break  # torn by a kill; every line after it belongs to a later round
                if row["round"] <= last_round:
                    kept.append(line + "\n")
            with written_whole(path) as scratch:
                scratch.write_text("".join(kept))

    def write_info(self, **fields: Any) -> None:
        """Set fields of ``run.json``; the others stay."""
        write_json(self.read_info() | fields, self.path / "run.json")

    def read_info(self) -> dict[str, Any]:
        """The fields of ``run.json``; empty before the first write."""
        path = self.path / "run.json"
        return json.loads(path.read_text()) if path.is_file() else {}
