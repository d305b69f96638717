"""What is refused on its way out, and bytes by hand."""

from __future__ import annotations

import pytest
import torch

from fedgraft.errors import GroupViolation
from fedgraft.platform.ledger import Entry, describe, entries, num_bytes, refuse_private
from fedgraft.types import FROZEN, PRIVATE, SHARED, Params, TensorInfo, assigned

GROUPS = {"lora": SHARED, "expert": assigned(3, 1), "graft": PRIVATE, "norm": FROZEN}


def test_a_payload_is_described_from_its_own_tensors() -> None:
    payload = {"lora": torch.zeros(2, 3), "expert": torch.zeros(5, dtype=torch.bfloat16)}
    assert describe(payload, GROUPS) == (
        TensorInfo(key="lora", shape=(2, 3), dtype="float32", num_bytes=24, group="shared"),
        TensorInfo(key="expert", shape=(5,), dtype="bfloat16", num_bytes=10, group="assigned"),
    )
    assert describe({"c": torch.zeros((), dtype=torch.float64)}, {}, kind="extras") == (
        TensorInfo(key="c", shape=(), dtype="float64", num_bytes=8, group="extras"),
    )


@pytest.mark.parametrize(("key", "why"), [("graft", "is private"), ("norm", "is frozen"), ("unheard", "is no slot")])
def test_private_frozen_and_unknown_tensors_are_refused(key: str, why: str) -> None:
    with pytest.raises(GroupViolation, match=f"'{key}' {why} .*about to be sent"):
        describe({"lora": torch.zeros(1), key: torch.zeros(1)}, GROUPS)


@pytest.mark.parametrize("kind", ["extras", "statistics"])
def test_a_slot_that_must_not_be_sent_is_refused_as_an_extra_too(kind: str) -> None:
    with pytest.raises(GroupViolation):
        describe({"graft": torch.zeros(1)}, GROUPS, kind=kind)


@pytest.mark.parametrize("kind", ["private", "frozen"])
def test_private_and_frozen_values_are_refused_under_any_name(kind: str) -> None:
    secrets = {"graft": torch.tensor([1.0, 2.0, 3.0]), "closed": torch.full((3,), -torch.inf)}

    def refuse(tensors: Params) -> None:
        refuse_private(tensors, secrets if kind == "private" else {}, secrets if kind == "frozen" else {})

    with pytest.raises(GroupViolation, match=f"'graft' carries the {kind} 'graft'"):
        refuse({"graft": torch.zeros(7)})
    for other in (torch.tensor([1.0, 2.0, 3.0]), torch.tensor([[1.0], [2.0], [3.0]], dtype=torch.float64)):
        with pytest.raises(GroupViolation, match=f"'innocent' carries the {kind} 'graft'"):
            refuse({"fine": torch.zeros(3), "innocent": other})
    refuse({"other": torch.tensor([1.0, 2.0, 3.5]), "flat": torch.full((3,), -torch.inf), "n": torch.tensor(1.0)})


def test_bytes_by_hand() -> None:
    assert num_bytes(torch.zeros(3, 5, dtype=torch.float32)) == 60
    assert num_bytes(torch.zeros(3, 5, dtype=torch.bfloat16)) == 30
    assert num_bytes(torch.zeros(0)) == 0
    assert num_bytes(torch.zeros(10)[::2]) == 20  # values, not storage


def test_entries_sum_by_group() -> None:
    payload = (
        *describe({"lora": torch.zeros(2), "expert": torch.zeros(3)}, GROUPS),
        *describe({"c": torch.zeros(4), "d": torch.zeros(1)}, {}, kind="extras"),
    )
    rows = entries(4, 2, "up", payload, is_retry=True)
    assert rows == [
        Entry(round=4, client_id=2, direction="up", group="assigned", bytes=12, is_retry=True),
        Entry(round=4, client_id=2, direction="up", group="extras", bytes=20, is_retry=True),
        Entry(round=4, client_id=2, direction="up", group="shared", bytes=8, is_retry=True),
    ]
    assert rows[2].as_json() == {
        "round": 4,
        "client_id": 2,
        "direction": "up",
        "group": "shared",
        "bytes": 8,
        "is_retry": True,
    }
    assert entries(1, 0, "down", ()) == []
