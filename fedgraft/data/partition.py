"""Sharing examples among clients: pure functions of labels, config, number of clients and seed.

A partition is drawn in two steps. First the shares, a matrix (C, N): which part of class c's examples client n gets. Then
every class's examples, in a seeded order, are cut by its row. So two pools (train and test) can be cut by the same shares.

Shape letters: C classes (labels, sorted), N clients.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedgraft.data.config import (
    DirichletPartition,
    IidPartition,
    NaturalPartition,
    PartitionConfig,
    PathologicalPartition,
    QuantityPartition,
)
from fedgraft.data.examples import NO_LABEL
from fedgraft.errors import DataError
from fedgraft.seeding import derive_seed

__all__ = ["Shares", "assign", "draw_shares", "partition"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Shares:
    """Who gets how much of what.

    ``classes`` are sorted; ``matrix_CN`` is float64, >= 0, its rows sum to 1, or to 0 where a class goes to nobody.
    ``names`` are the clients'. A partition that does not look at labels has the one class ``None``.
    """

    classes: tuple[str | None, ...]
    matrix_CN: NDArray[np.float64]
    names: tuple[str, ...]

    @property
    def num_clients(self) -> int:
        """Number of clients."""
        return len(self.names)


def partition(labels: Sequence[str], config: PartitionConfig, num_clients: int | None, seed: int) -> list[NDArray[np.int64]]:
    """Share one pool of examples among clients: ``draw_shares``, then ``assign``.

    Every index is given at most once. All are given away, but for ``natural`` with fewer clients than labels and
    ``pathological`` with more labels than the clients can hold together.

    Args:
        labels: One for each example.
        config: The kind and its options.
        num_clients: May be ``None`` with ``natural`` only.
        seed: The run's seed.

    Returns:
        For each client its indices, ascending, int64.

    Raises:
        DataError: The labels, the clients and the kind do not go together.
    """
    shares = draw_shares(Counter(labels), config, num_clients, seed)
    return assign(labels, shares, seed, min_examples=getattr(config, "min_examples", 0))


def draw_shares(counts: Mapping[str, int], config: PartitionConfig, num_clients: int | None, seed: int) -> Shares:
    """Draw which client gets which part of each class.

    ``dirichlet``: each class's row is drawn from Dirichlet(alpha, ..., alpha) over the clients (Hsu et al., 2019,
    arXiv:1909.06335, with the roles of class and client as in Yurochkin et al., 2019, arXiv:1905.12022).
    ``pathological``: each client holds ``classes_per_client`` classes, every class is held by as many clients as any other
    (+- 1), and its examples are split evenly over its holders (after McMahan et al., 2017, arXiv:1602.05629, section 3).
    ``natural``: client n gets all of one class; the most frequent ones come first if ``num_clients`` is given, ties by name;
    the clients are ordered by name. ``iid`` and ``quantity`` do not look at labels.

    Args:
        counts: Examples by label.
        config: The kind and its options.
        num_clients: May be ``None`` with ``natural`` only.
        seed: The run's seed.

    Raises:
        DataError: There are no labels but the kind needs them, or there are too few for it.
    """
    classes = tuple(sorted(counts))
    if isinstance(config, (NaturalPartition, DirichletPartition, PathologicalPartition)) and classes in ((), (NO_LABEL,)):
        raise DataError(
            f"partition {config.name} goes by labels, but the examples have none",
            "set data.label_field to a field of the records, or use partition iid or quantity",
        )
    if isinstance(config, NaturalPartition):
        return _natural(counts, num_clients)
    if num_clients is None:
        raise DataError(f"partition {config.name} needs a number of clients", "set data.num_clients")
    rng = np.random.default_rng(derive_seed(seed, "partition/shares"))
    names = tuple(f"client {client}" for client in range(num_clients))
    if isinstance(config, DirichletPartition):
        matrix_CN = rng.dirichlet(np.full(num_clients, config.alpha), size=len(classes))
        return Shares(classes=classes, matrix_CN=matrix_CN, names=names)
    if isinstance(config, PathologicalPartition):
        return Shares(classes=classes, matrix_CN=_pathological(classes, config, num_clients, rng), names=names)
    return Shares(classes=(None,), matrix_CN=_label_free(config, num_clients, rng)[None, :], names=names)


def assign(
    labels: Sequence[str], shares: Shares, seed: int, *, min_examples: int = 0, pool: str = "train"
) -> list[NDArray[np.int64]]:
    """Cut one pool of examples by shares.

    A client below ``min_examples`` is topped up, one example at a time, from the client that has most of the classes that
    the first may hold (those with a share above 0; any class if none of these can spare one).

    Args:
        labels: One for each example of the pool.
        shares: From ``draw_shares``; labels that are not in there go to nobody.
        seed: The run's seed.
        min_examples: Fewest examples a client ends up with.
        pool: Name of the pool; two pools are shuffled independently.

    Returns:
        For each client its indices, ascending, int64.

    Raises:
        DataError: The pool has fewer than ``min_examples`` for each client.
    """
    holdings: list[list[list[int]]] = [[[] for _ in shares.classes] for _ in shares.names]
    by_class: dict[str | None, list[int]] = {name: [] for name in shares.classes}
    for index, label in enumerate(labels):
        key = None if None in by_class else label
        if key in by_class:
            by_class[key].append(index)
    for c, name in enumerate(shares.classes):
        rng = np.random.default_rng(derive_seed(seed, f"partition/{pool}/{name}"))
        order = rng.permutation(np.asarray(by_class[name], dtype=np.int64))
        cuts = np.floor(np.cumsum(shares.matrix_CN[c]) * len(order) + 0.5).astype(np.int64)
        for n, part in enumerate(np.split(order, np.minimum(cuts, len(order)))[:-1]):
            holdings[n][c] = part.tolist()
    _top_up(holdings, shares, min_examples, pool)
    return [np.sort(np.asarray([i for held in client for i in held], dtype=np.int64)) for client in holdings]


def _natural(counts: Mapping[str, int], num_clients: int | None) -> Shares:
    classes = tuple(sorted(counts))
    if num_clients is not None and num_clients > len(classes):
        raise DataError(
            f"partition natural has one client a label: {num_clients} clients were asked for, but there are "
            f"{len(classes)} labels ({', '.join(classes[:8])}{', ...' if len(classes) > 8 else ''})",
            f"set data.num_clients to at most {len(classes)}, or use partition dirichlet",
        )
    chosen = sorted(classes, key=lambda name: (-counts[name], name))[:num_clients]
    names = tuple(sorted(chosen))
    matrix_CN = np.array([[float(name == owner) for owner in names] for name in classes])
    return Shares(classes=classes, matrix_CN=matrix_CN, names=names)


def _pathological(
    classes: tuple[str, ...], config: PathologicalPartition, num_clients: int, rng: np.random.Generator
) -> NDArray[np.float64]:
    if config.classes_per_client > len(classes):
        raise DataError(
            f"partition pathological: {config.classes_per_client} classes per client, but there are {len(classes)} labels",
            f"set data.partition.classes_per_client to at most {len(classes)}",
        )
    held_CN = np.zeros((len(classes), num_clients))
    for n in range(num_clients):
        # The least held classes first, ties at random: no class is ever held by two clients more than another.
        order = np.lexsort((rng.random(len(classes)), held_CN.sum(axis=1)))
        held_CN[order[: config.classes_per_client], n] = 1
    num_holders_C1: NDArray[np.float64] = np.maximum(held_CN.sum(axis=1, keepdims=True), 1)
    return held_CN / num_holders_C1


def _label_free(config: IidPartition | QuantityPartition, num_clients: int, rng: np.random.Generator) -> NDArray[np.float64]:
    if isinstance(config, IidPartition):
        return np.full(num_clients, 1 / num_clients)
    if config.sizes == "dirichlet":
        return rng.dirichlet(np.full(num_clients, config.alpha if config.alpha is not None else 0.5))
    sizes = rng.lognormal(sigma=config.sigma if config.sigma is not None else 1.0, size=num_clients)
    return np.asarray(sizes / sizes.sum(), dtype=np.float64)


def _top_up(holdings: list[list[list[int]]], shares: Shares, min_examples: int, pool: str) -> None:
    total = sum(len(part) for client in holdings for part in client)
    if total < min_examples * len(holdings):
        raise DataError(
            f"the {pool} pool has {total} examples for {len(holdings)} clients, which makes fewer than {min_examples} each",
            "use fewer clients, more examples, or a smaller partition.min_examples",
        )
    held_CN = np.array([[len(part) for part in client] for client in holdings]).T
    for n, client in enumerate(holdings):
        may_hold_C1 = shares.matrix_CN[:, n, None] > 0
        while held_CN[:, n].sum() < min_examples:
            can_give_CN = np.where(held_CN.sum(axis=0) > min_examples, held_CN, 0)
            fitting_CN = np.where(may_hold_C1, can_give_CN, 0)
            choice_CN = fitting_CN if fitting_CN.any() else can_give_CN
            c, donor = divmod(int(choice_CN.argmax()), len(holdings))
            client[c].append(holdings[donor][c].pop())
            held_CN[c, n] += 1
            held_CN[c, donor] -= 1
