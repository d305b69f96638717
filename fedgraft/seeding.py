"""Seeds: every random number of a run comes from ``(run_seed, purpose, round, client)``."""

from __future__ import annotations

import hashlib

__all__ = ["SERVER", "derive_seed"]

SERVER = -1
"""Stands for the client in seeds of things that belong to the server or to the whole run."""


def derive_seed(run_seed: int, purpose: str, *, round_idx: int = 0, client_id: int = SERVER) -> int:
    """Give the seed of one purpose in one round for one client.

    Args:
        run_seed: The run's seed, >= 0.
        purpose: What the numbers are for, e.g. ``"batches"``; two purposes never share a stream.
        round_idx: Round, from 1; 0 for what happens before the first.
        client_id: Client, from 0, or ``SERVER``.

    Returns:
        An integer in [0, 2**63): a hash, so it does not depend on the process, the worker or the order of calls.
    """
    text = f"{run_seed}|{purpose}|{round_idx}|{client_id}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1
