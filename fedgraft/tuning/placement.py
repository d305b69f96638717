"""Whether the nodes of a cluster have room for a trial, so that one that never fits is refused instead of waited for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fedgraft.errors import ClusterError
from fedgraft.tuning.sweep_loading import PlannedTrial

__all__ = ["bundles_text", "has_room", "require_room"]

_SLACK = 1e-9


def has_room(bundles: Sequence[Mapping[str, float]], nodes: Sequence[Mapping[str, float]]) -> bool:
    """Whether all bundles fit on the nodes together, each bundle on one node.

    Bundles of one trial are alike but for its first one, so filling node after node finds a place where there is one.
    """
    free = [dict(node) for node in nodes]
    for bundle in sorted((each for each in bundles if each), key=lambda each: sorted(each.items()), reverse=True):
        for node in free:
            if all(node.get(kind, 0.0) + _SLACK >= wanted for kind, wanted in bundle.items()):
                for kind, wanted in bundle.items():
                    node[kind] -= wanted
                break
        else:
            return False
    return True


def require_room(trials: Sequence[PlannedTrial], nodes: Sequence[Mapping[str, float]]) -> None:
    """Refuse trials that the nodes could not run even one at a time.

    Args:
        trials: What is to be run.
        nodes: All resources of each node, whoever uses them now.

    Raises:
        ClusterError: With what the first such trial wants, and what the nodes have.
    """
    wrong = [trial for trial in trials if not has_room(trial.bundles, nodes)]
    if not wrong:
        return
    listed = "; ".join(_text(node) for node in nodes)
    raise ClusterError(
        f"{len(wrong)} of {len(trials)} trials find no place: {wrong[0].trial_id} ({wrong[0].label}) wants "
        f"{bundles_text(wrong[0].bundles)}, each on one node; the nodes have: {listed}",
        "lower executor.replicas, executor.threads, engine.world_size, executor.gpus_per_replica or resources.gpus_per_trial, "
        "or join a larger cluster (resources.address)",
    )


def bundles_text(bundles: Sequence[Mapping[str, float]]) -> str:
    """Bundles in words: ``2 x (1 CPU, 0.5 GPU)``."""
    counted: dict[str, int] = {}
    for bundle in bundles:
        if bundle:
            counted[_text(bundle)] = counted.get(_text(bundle), 0) + 1
    return " and ".join(f"{count} x ({text})" for text, count in counted.items())


def _text(resources: Mapping[str, float]) -> str:
    return ", ".join(f"{resources.get(kind, 0.0):g} {kind}" for kind in ("CPU", "GPU") if kind in resources) or "nothing"
