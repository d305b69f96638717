"""A process's place among the ranks of its replica."""

from __future__ import annotations

import pytest

from fedgraft.errors import ClusterError
from fedgraft.training.ranks import this_rank

PLACE = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"}


@pytest.fixture
def _place(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in PLACE.items():
        monkeypatch.setenv(name, value)


@pytest.mark.usefixtures("_place")
def test_a_rank_is_told_its_place() -> None:
    found = this_rank(2)
    assert (found.rank, found.world_size, found.is_leader) == (1, 2, False)


@pytest.mark.usefixtures("_place")
def test_one_process_alone_does_not_wait_for_what_another_launcher_left() -> None:
    found = this_rank(1)
    assert (found.rank, found.world_size, found.is_leader) == (0, 1, True)


@pytest.mark.usefixtures("_place")
@pytest.mark.parametrize("missing", sorted(PLACE))
def test_several_ranks_that_were_not_told_their_place_are_refused(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(missing)
    with pytest.raises(ClusterError, match=rf"{missing}=\(not set\)"):
        this_rank(2)


@pytest.mark.usefixtures("_place")
def test_another_number_of_ranks_is_refused() -> None:
    with pytest.raises(ClusterError, match="a replica of 3 ranks was not told its place: RANK=1, WORLD_SIZE=2"):
        this_rank(3)
