"""Who holds which experts: counted by hand."""

from __future__ import annotations

import json
from typing import Any

import pytest

from fedgraft.aggregation.expert_map import ExpertMap
from fedgraft.errors import MethodError

EMPTY = ExpertMap(layers=(1, 3), num_experts=4)


@pytest.fixture
def held() -> ExpertMap:
    """Client 7 has two slots tied to expert 2 of layer 1; client 2 names only layer 3; client 5 holds all."""
    return EMPTY.give({7: {1: (2, 0, 2), 3: (1,)}, 2: {3: (0, 1)}, 5: None})


def test_tied_slots_are_one_expert(held: ExpertMap) -> None:
    assert held.slots(7, 1) == (2, 0, 2)
    assert held.experts(7, 1) == (0, 2)
    assert held.load(1).tolist() == [3, 2, 3, 2]
    assert held.assignment(7) == {1: (0, 2), 3: (1,)}


def test_an_unnamed_layer_is_held_as_a_whole_and_an_unknown_client_holds_nothing(held: ExpertMap) -> None:
    assert held.clients == (2, 5, 7)
    assert held.slots(2, 1) == (0, 1, 2, 3)
    assert held.assignment(2) == {3: (0, 1)}
    assert held.assignment(5) is None
    assert held.slots(4, 1) == ()
    assert held.assignment(4) is None
    assert held.mask(7).int().tolist() == [[1, 0, 1, 0], [0, 1, 0, 0]]
    assert held.mask(4).sum() == 0


def test_load_counts_holders(held: ExpertMap) -> None:
    assert held.load(3).tolist() == [2, 3, 1, 1]
    assert held.load(3, (2, 7)).tolist() == [1, 2, 0, 0]
    assert EMPTY.load(1).tolist() == [0, 0, 0, 0]


def test_what_a_client_is_given_replaces_what_it_had(held: ExpertMap) -> None:
    later = held.give({7: {1: (1,)}})
    assert later.assignment(7) == {1: (1,)}
    assert later.experts(7, 3) == (0, 1, 2, 3)
    assert held.assignment(7) == {1: (0, 2), 3: (1,)}  # a map is a value
    assert later.assignment(2) == held.assignment(2)


def test_it_survives_a_file(held: ExpertMap) -> None:
    written = json.loads(json.dumps(held.to_json()))
    again = ExpertMap.from_json(written)
    assert again == held
    assert again.slots(7, 1) == (2, 0, 2)
    part = ExpertMap.from_json(written, only=(7, 4))
    assert part.clients == (7,)
    assert part.assignment(7) == held.assignment(7)


@pytest.mark.parametrize("value", [None, [], {"layers": [1]}, {"layers": [1], "num_experts": 4, "clients": {"a": {}}}])
def test_other_json_is_refused(value: Any) -> None:
    with pytest.raises(MethodError, match="this is no expert map"):
        ExpertMap.from_json(value)


def test_unknown_layers_and_experts_are_refused(held: ExpertMap) -> None:
    with pytest.raises(MethodError, match="gives client 0 expert 4 of layer 1"):
        EMPTY.give({0: {1: (0, 4)}})
    with pytest.raises(MethodError, match="no layer 2") as caught:
        EMPTY.give({0: {2: (0,)}})
    assert caught.value.hint == "its layers are 1, 3"
    for ask in (lambda: held.slots(7, 0), lambda: held.load(0)):
        with pytest.raises(MethodError, match="no layer 0"):
            ask()
