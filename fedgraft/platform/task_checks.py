"""What a method's server half may ask of clients, checked on the driver before anything is sent or summed.

A task, an evaluation task, a cohort or weights that do not fit together would otherwise be every client's failure, late and
far from the method's mistake.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Literal

from fedgraft.errors import BudgetViolation, MethodError
from fedgraft.protocols import Weights
from fedgraft.types import PRIVATE, Assignment, ClientTask, EvaluationTask, Federation, ParamRef, Params, ServerState

__all__ = [
    "check_budget",
    "check_cohort",
    "check_evaluation",
    "check_step",
    "check_task",
    "check_weights",
    "is_held",
    "spread_names",
]


def check_cohort(cohort: Sequence[int], num_clients: int) -> None:
    """Refuse a cohort that a method selected: nobody, somebody twice, or somebody who does not exist.

    Raises:
        MethodError: It names the clients.
    """
    unknown = [client for client in cohort if not 0 <= client < num_clients]
    twice = sorted(client for client, count in Counter(cohort).items() if count > 1)
    if not cohort or unknown or twice:
        what = f"clients {unknown[:3]} that do not exist" if unknown else f"clients {twice[:3]} twice" if twice else "no client"
        raise MethodError(
            f"the method selected {what}; the population is clients 0 to {num_clients - 1}", "select() gives each client once"
        )


def check_task(task: ClientTask, federation: Federation, state: ServerState) -> None:
    """Refuse a task whose keys, addresses, extras and assignment do not fit together, before anything is sent.

    Raises:
        MethodError: A key is no slot or belongs to an expert that the client does not hold, two slots share an address, the
            server has no tensor of such a name or one of another shape, or the assignment names what the model has not.
    """
    whose = f"the task of client {task.client_id}"
    _check_names(whose, task, federation, state)
    names = [task.addresses.get(key, key) for key in task.keys]
    if len(set(names)) != len(names):
        twice = sorted(name for name, count in Counter(names).items() if count > 1)
        raise MethodError(
            f"{whose} puts {', '.join(twice[:3])} into two slots",
            "tie slots on the client: what a client holds twice would count twice in the sum",
        )
    refs = {ref.key: ref for ref in federation.refs}
    alien = [key for key in task.keys if not is_held(refs[key], task.assignment)]
    if alien:
        raise MethodError(
            f"{whose} sends {', '.join(alien[:3])}, which belongs to an expert that its assignment leaves out",
            "a task that changes the assignment must choose its keys by it",
        )
    public = [key for key in task.publishes if key in federation.groups and federation.groups[key] != PRIVATE]
    if public:
        raise MethodError(f"{whose} publishes {', '.join(public[:3])}, which is no private slot", "publishes names private state")


def check_budget(task: ClientTask, federation: Federation, use: Literal["none", "holds", "trains"]) -> None:
    """Refuse a task whose assignment holds more experts than the client's budget: experts a layer times MoE layers, summed.

    A layer that the assignment does not name counts with all of its experts.

    Raises:
        BudgetViolation: It says how many there are and may be.
    """
    limit = None if task.budget is None else task.budget.experts_per_layer
    if use != "holds" or limit is None:
        return
    facts, assignment = federation.facts, task.assignment or {}
    held = sum(len(assignment[layer]) if layer in assignment else facts.num_experts for layer in facts.layers)
    if held > limit * len(facts.layers):
        raise BudgetViolation(
            f"round {task.round_idx}: client {task.client_id} was assigned {held} experts in {len(facts.layers)} layers, and its "
            f"budget is {limit} a layer, {limit * len(facts.layers)} together",
            "assign() must keep to federation.budget(client); layers that it does not name hold all experts",
        )


def check_step(task: ClientTask | EvaluationTask, gradients: Params, experts: Mapping[str, tuple[int, int]], step: int) -> None:
    """Refuse a local step that changes more experts of a layer than the client's budget allows.

    Args:
        task: The client's.
        gradients: Of the slots of routed experts that train, by key.
        experts: Layer and expert of each of them.
        step: From 0.

    Raises:
        BudgetViolation: More experts of a layer than ``experts_per_layer`` have a gradient that is not zero.
    """
    assert isinstance(task, ClientTask)
    assert task.budget is not None
    limit = task.budget.experts_per_layer or 0
    touched: dict[int, set[int]] = {}
    for key, gradient in gradients.items():
        if bool(gradient.any()):
            layer, expert = experts[key]
            touched.setdefault(layer, set()).add(expert)
    for layer, found in touched.items():
        if len(found) > limit:
            raise BudgetViolation(
                f"client {task.client_id}, round {task.round_idx}, local step {step + 1}: {len(found)} experts of layer {layer} "
                f"have a gradient, and the client's budget is {limit} a layer",
                "the method must clear the gradients of the others in after_backward",
            )


def check_evaluation(task: EvaluationTask, federation: Federation, state: ServerState) -> None:
    """Refuse an evaluation task whose keys, addresses, extras and assignment do not fit; slots may share an address.

    Raises:
        MethodError: As ``check_task``.
    """
    whose = "the global model" if task.client_id is None else f"the {task.view} model of client {task.client_id}"
    _check_names(f"the evaluation of {whose}", task, federation, state)


def _check_names(whose: str, task: ClientTask | EvaluationTask, federation: Federation, state: ServerState) -> None:
    if unknown := [key for key in task.keys if key not in federation.groups]:
        raise MethodError(f"{whose} has keys {', '.join(unknown[:3])}, which are no slots of the model", "keys are slots")
    shapes = {ref.key: ref.shape for ref in federation.refs}
    for key in task.keys:
        name = task.addresses.get(key, key)
        if name not in state.params:
            raise MethodError(f"{whose} names {name}, which the server does not have", "addresses are names of state.params")
        if (found := tuple(state.params[name].shape)) != tuple(shapes[key]):
            raise MethodError(f"{whose} puts {name} of shape {found} into {key} of shape {tuple(shapes[key])}")
    if missing := [key for key in task.extra_keys if key not in state.extras]:
        raise MethodError(
            f"{whose} names the extras {', '.join(missing[:3])}, which the server does not have",
            "extra_keys are names of state.extras; tensors for one client alone go into the task's extras",
        )
    _check_assignment(whose, task.assignment, federation)


def _check_assignment(whose: str, assignment: Assignment | None, federation: Federation) -> None:
    facts = federation.facts
    for layer, held in (assignment or {}).items():
        if layer not in facts.layers:
            raise MethodError(
                f"{whose} assigns experts of layer {layer}, which has none",
                f"MoE layers are {', '.join(map(str, facts.layers))}",
            )
        if list(held) != sorted(set(held)) or not all(0 <= expert < facts.num_experts for expert in held):
            raise MethodError(
                f"{whose} assigns experts {list(held)[:8]} of layer {layer}",
                f"name experts 0 to {facts.num_experts - 1} ascending, each once",
            )
        if len(held) < facts.top_k:
            raise MethodError(
                f"{whose} assigns {len(held)} experts of layer {layer}, and a token needs {facts.top_k}",
                f"assign at least {facts.top_k} in every layer",
            )
        if facts.num_groups > 1 and len(held) < facts.num_experts:
            # Groups are scored by their best experts, so a missing one changes which groups are open to a token.
            raise MethodError(
                f"{whose} assigns {len(held)} of {facts.num_experts} experts of layer {layer}, and the routers of this "
                f"{facts.family} model choose among {facts.num_groups} groups of experts first (n_group)",
                "let every client hold all experts, or take a model whose routers choose without groups",
            )


def check_weights(weights: Weights, num_updates: int) -> None:
    """Refuse weights that are not one a client that answered, or that are negative or not finite.

    Raises:
        MethodError: It names them.
    """
    given = {"default": weights.default} | dict(weights.by_key)
    for name, values in given.items():
        if len(values) != num_updates:
            raise MethodError(
                f"weigh() gave {len(values)} weights for {name}, and {num_updates} clients answered",
                "give one weight for each update, in the order of the updates",
            )
        if bad := [value for value in values if not (math.isfinite(value) and value >= 0)]:
            raise MethodError(f"weigh() gave the weight {bad[0]} for {name}", "weights are finite and at least 0")


def spread_names(weights: Weights, name: str) -> tuple[str, ...]:
    """Names that a tensor is summed under."""
    return weights.spread.get(name, (name,))


def is_held(ref: ParamRef, assignment: Assignment | None) -> bool:
    """Whether a client with this assignment holds a slot: all but those of routed experts (and router rows of theirs) that it
    was not assigned, whatever group the method tagged them.
    """
    is_of_expert = ref.part in ("experts", "router") and ref.expert is not None
    if assignment is None or not is_of_expert or ref.layer is None or ref.layer not in assignment:
        return True
    return ref.expert in assignment[ref.layer]
