"""Choosing a rate: the lowest validation loss wins, what broke down is out, and a search is made once."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedgraft.errors import QuorumError
from fedgraft.platform.config import RateSearchConfig
from fedgraft.tuning.rates import choose_rate, read_choice

SEARCH = RateSearchConfig(rates=(0.001, 0.003, 0.01), rounds=2)


@pytest.mark.parametrize(
    ("losses", "chosen", "is_edge"),
    [
        ((3.0, 2.0, 2.5), 0.003, False),
        ((1.0, 2.0, 3.0), 0.001, True),
        ((3.0, 2.0, 1.0), 0.01, True),
        ((2.0, 2.0, 2.0), 0.001, True),
        ((3.0, None, None), 0.001, True),
        ((None, 5.0, None), 0.003, False),
    ],
)
def test_the_lowest_loss_wins(tmp_path: Path, losses: tuple[float | None, ...], chosen: float, is_edge: bool) -> None:
    given = dict(zip(SEARCH.rates, losses, strict=True))
    found = choose_rate("flex", SEARCH, tmp_path / "search", lambda rate, folder: given[rate])
    assert (found["chosen"], found["is_edge"], found["validation_nll"]) == (chosen, is_edge, list(losses))
    assert read_choice(tmp_path / "search") == found


def test_a_search_that_is_over_is_not_made_again(tmp_path: Path) -> None:
    tried: list[float] = []

    def try_rate(rate: float, folder: Path) -> float:
        assert folder == tmp_path / f"lr-{rate:g}"
        tried.append(rate)
        return rate

    first = choose_rate("flex", SEARCH, tmp_path, try_rate)
    assert choose_rate("flex", SEARCH, tmp_path, try_rate) == first
    assert tried == [0.001, 0.003, 0.01]


def test_a_grid_that_breaks_down_everywhere_is_an_error_and_not_remembered(tmp_path: Path) -> None:
    with pytest.raises(QuorumError, match=r"flex: training broke down at every rate of the grid \(0.001, 0.003, 0.01\)"):
        choose_rate("flex", SEARCH, tmp_path, lambda rate, folder: None)
    assert read_choice(tmp_path) == {}
