"""A reply that does not fit its task is a named failure; nothing of it reaches the average."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from fedgraft.actors.hosting import Finished, PoolOptions
from fedgraft.actors.local import LocalPool
from fedgraft.errors import MethodError, QuorumError
from fedgraft.platform.rounds import RoundLoop
from fedgraft.platform.run_folder import RunFolder
from fedgraft.platform.task_checks import check_weights
from fedgraft.platform.tracking import Tracker
from fedgraft.protocols import Weights
from fedgraft.types import ClientUpdate, Params

Maker = Callable[..., Any]
SCAFFOLD = {"name": "scaffold", "adapter": {"rank": 2, "alpha": 4.0}}
Change = Callable[[ClientUpdate, Params], tuple[ClientUpdate, Params]]


class Tampering(LocalPool):
    """Changes what client 1 replies, after its worker has made it: what a broken network or plugin would."""

    def __init__(self, change: Change, *, twice: bool = False) -> None:
        super().__init__(PoolOptions(replicas=1))
        self.change = change
        self.twice = twice

    def map(self, name: str, items: Sequence[Any], shared: Any, **how: Any) -> Iterator[Finished]:
        for finished in super().map(name, items, shared):
            value, handle = finished.value, finished.handle
            if isinstance(value, ClientUpdate) and value.client_id == 1:
                value, handle = self.change(value, handle)
            yield replace(finished, value=value, handle=handle)
            if self.twice and isinstance(value, ClientUpdate) and value.client_id == 1:
                yield replace(finished, value=value, handle={key: tensor + 1 for key, tensor in handle.items()})


def _run(job: Any, pool: LocalPool, events: list[Any] | None = None) -> Any:
    emit = (lambda event: None) if events is None else events.append
    return RoundLoop(job, pool, tracker=Tracker(None, "", None), emit=emit, is_stopping=lambda: False).run()


def _some_key(tensors: Params) -> str:
    return sorted(key for key in tensors if not key.startswith("extras/"))[0]


def _not_finite(update: ClientUpdate, tensors: Params) -> tuple[ClientUpdate, Params]:
    key = _some_key(tensors)
    bad = tensors[key].clone()
    bad.reshape(-1)[0] = float("nan")
    return update, tensors | {key: bad}


def _infinite_extra(update: ClientUpdate, tensors: Params) -> tuple[ClientUpdate, Params]:
    key = sorted(key for key in tensors if key.startswith("extras/"))[0]
    return update, tensors | {key: torch.full_like(tensors[key], float("inf"))}


def _left_out(update: ClientUpdate, tensors: Params) -> tuple[ClientUpdate, Params]:
    return update, {key: value for key, value in tensors.items() if key != _some_key(tensors)}


def _smuggled(update: ClientUpdate, tensors: Params) -> tuple[ClientUpdate, Params]:
    return update, tensors | {"lm_head.weight": torch.ones(2)}


def _other_shape(update: ClientUpdate, tensors: Params) -> tuple[ClientUpdate, Params]:
    key = _some_key(tensors)
    return update, tensors | {key: tensors[key][:1]}


def _other_dtype(update: ClientUpdate, tensors: Params) -> tuple[ClientUpdate, Params]:
    key = _some_key(tensors)
    return update, tensors | {key: tensors[key].double()}


def _announced(**fields: Any) -> Change:
    """Change how the first parameter is announced."""

    def change(update: ClientUpdate, tensors: Params) -> tuple[ClientUpdate, Params]:
        first, *others = update.payload
        return replace(update, payload=(replace(first, **fields), *others)), tensors

    return change


def _of(**fields: Any) -> Change:
    return lambda update, tensors: (replace(update, **fields), tensors)


BAD: dict[str, tuple[Change, str]] = {
    "nan": (_not_finite, "has values that are not finite"),
    "infinite extra": (_infinite_extra, "has values that are not finite"),
    "left out": (_left_out, "not those that were announced"),
    "smuggled": (_smuggled, "not those that were announced: lm_head.weight"),
    "other shape": (_other_shape, r"has shape \(1, .* announced were"),
    "other dtype": (_other_dtype, "dtype float64, announced were .* float32"),
    "announced shape": (_announced(shape=(7, 7)), r"has shape \(7, 7\), sent was"),
    "announced dtype": (_announced(dtype="int64"), "has dtype int64, expected one of"),
    "announced name": (_announced(key="nobody"), "not sent to this client: nobody"),
    "too large": (_announced(num_bytes=2**40), r"bytes, and at most \d+ are taken \(federation.max_update_bytes\)"),
    "wrong round": (_of(round_idx=9), "the reply is of client 1 in round 9"),
    "wrong client": (_of(client_id=2), "the reply is of client 2 in round"),
    "statistic": (_of(statistics={"s": torch.tensor([float("nan")])}), "the statistic s has values that are not finite"),
    "counts": (_of(expert_tokens=torch.zeros(1, 1, dtype=torch.int64)), "expert_tokens has shape"),
    "negative": (_of(num_examples=-1), "counts -1 examples"),
}


@pytest.mark.parametrize("kind", sorted(BAD))
def test_what_is_bad_is_a_failure_and_the_others_average_as_without_it(make_job: Maker, kind: str) -> None:
    change, said = BAD[kind]
    job = replace(make_job(SCAFFOLD), rounds=1)
    events: list[Any] = []
    state = _run(job, Tampering(change), events)
    failures = RunFolder(job.folder).read_info()["failures"]
    assert [(f["client_id"], f["round_idx"], f["stage"]) for f in failures] == [(1, 1, "reply")]
    assert [event.data["client_id"] for event in events if event.kind == "failure"] == [1]
    assert re.search(said, failures[0]["error"]), failures[0]["error"]
    # Expected: the same round where client 1 is never there at all.
    alone = replace(make_job(SCAFFOLD), rounds=1)
    gone = Tampering(lambda update, tensors: (None, tensors))  # type: ignore[arg-type, return-value]
    expected = _run(alone, gone)
    for kind_of in ("params", "extras"):
        for key, value in getattr(expected, kind_of).items():
            assert torch.equal(getattr(state, kind_of)[key], value), key


def test_a_second_reply_of_a_client_is_named_and_the_first_one_counts(make_job: Maker) -> None:
    job = replace(make_job(SCAFFOLD), rounds=1)
    state = _run(job, Tampering(lambda update, tensors: (update, tensors), twice=True))
    (failure,) = RunFolder(job.folder).read_info()["failures"]
    assert (failure["client_id"], failure["error"]) == (1, "the client's reply came twice; the first one counts")
    expected = _run(replace(make_job(SCAFFOLD), rounds=1), LocalPool(PoolOptions(replicas=1)))
    assert all(torch.equal(state.params[key], value) for key, value in expected.params.items())


def test_a_limit_of_the_users_own(make_job: Maker) -> None:
    job = replace(make_job(SCAFFOLD, federation={"max_update_bytes": 100}), rounds=1)
    with pytest.raises(QuorumError, match=r"at most 100 are taken \(federation.max_update_bytes\)"):
        _run(job, LocalPool(PoolOptions(replicas=1)))


def test_bad_tensors_count_against_the_quorum(make_job: Maker) -> None:
    job = replace(make_job(SCAFFOLD, federation={"min_clients": 3}), rounds=1)
    with pytest.raises(QuorumError, match="2 of 3 clients answered.*not finite"):
        _run(job, Tampering(_not_finite))


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_weights_that_are_no_weights_are_the_methods_fault(value: float) -> None:
    with pytest.raises(MethodError, match=r"weigh\(\) gave the weight .* for w"):
        check_weights(Weights(default=(1.0, 1.0), by_key={"w": (1.0, value)}), 2)
