"""Which clients take part in a round: a pure function of seed and round."""

from __future__ import annotations

import numpy as np

from fedgraft.seeding import derive_seed

__all__ = ["sample_cohort"]


def sample_cohort(run_seed: int, round_idx: int, num_clients: int, cohort_size: int | None) -> tuple[int, ...]:
    """Draw a cohort without replacement, every client alike.

    Args:
        run_seed: The run's seed.
        round_idx: The round, from 1.
        num_clients: Clients of the population.
        cohort_size: Clients to draw; ``None``, or at least as many as there are: everybody.

    Returns:
        Client ids, ascending.
    """
    if cohort_size is None or cohort_size >= num_clients:
        return tuple(range(num_clients))
    generator = np.random.default_rng(derive_seed(run_seed, "cohort", round_idx=round_idx))
    return tuple(sorted(int(i) for i in generator.choice(num_clients, size=cohort_size, replace=False)))
