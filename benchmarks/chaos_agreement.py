"""The same configuration on other executors and in another order of arrival, without kills: how many bits differ."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import ray
from chaos_experiment import METHODS, Material, make_material, run_alone

import fedgraft
from fedgraft.actors.hosting import Finished, JobContext, PoolOptions
from fedgraft.actors.local import LocalPool
from fedgraft.platform.loading import dump_config
from fedgraft.tuning.experiment import Experiment

__all__ = ["AGREEING", "PARTS", "ROUNDS", "BackwardPool", "compare_executors", "make_material", "run_alone", "run_backward"]

_EXPERTS: dict[str, Any] = {"lora": ["attention", "experts"], "adapter": {"rank": 2}}
AGREEING: dict[str, dict[str, Any]] = {
    "flex": METHODS["flex"],
    "scaffold": {"name": "scaffold", "adapter": {"rank": 2}},
    "fedmoe": {"name": "fedmoe", "warmup_rounds": 1, **_EXPERTS},
    "hfedmoe": {"name": "hfedmoe", **_EXPERTS},
}
"""Private state; extras beside the parameters; sub-models that the server assigns; sub-models that clients ask for."""
ROUNDS = 3
PARTS: dict[str, Any] = {
    "rounds": ROUNDS,
    "methods": AGREEING,
    "federation": {"cohort_size": 5, "budgets": {"experts_per_layer": [2, 3, 4]}},
    "tracking": {"enabled": False},
    "engine": {"clients_at_once": 2},  # flex and scaffold share passes; the other two fall back to one client after another
}
"""What is the same wherever it runs."""


class BackwardPool(LocalPool):
    """Runs the calls of a map from the last to the first: clients arrive in the opposite order."""

    def map(self, name: str, items: Sequence[Any], shared: Any, **how: Any) -> Iterator[Finished]:
        """See ``fedgraft.actors.hosting.Pool``."""
        for index in reversed(range(len(items))):
            value, handle = getattr(self._hosted, name)(items[index], shared)
            yield Finished(index=index, value=value, handle=handle)


def run_backward(config: dict[str, Any]) -> Path:
    """Run an experiment in this process with clients in reverse order; gives its folder."""
    folder = Path(config["output"]["folder"]) / "backward"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(dump_config(fedgraft.load_config(config).absolute()))

    def open_pool(options: PoolOptions, *_: Any) -> BackwardPool:
        return BackwardPool(options)

    Experiment(str(folder))(JobContext(emit=lambda event: None, open_pool=open_pool, is_stopping=lambda: False))
    return folder


def compare_executors(material: Material, replicas: Sequence[int] = (1, 2, 4)) -> dict[str, list[str]]:
    """Differences from the run in one process, by how it was run; each list is empty where there are none."""
    reference = run_alone(material, "agree", **PARTS)
    backward = run_backward(material.config("agree-backward", executor={"kind": "in_process"}, **PARTS))
    found = {"arrival in reverse": _differences(reference, backward)}
    with tempfile.TemporaryDirectory(prefix="fgc", ignore_cleanup_errors=True) as ray_folder:
        ray.init("local", num_cpus=max(replicas), include_dashboard=False, log_to_driver=False, _temp_dir=ray_folder)
        try:
            for count in replicas:
                config = material.config(f"agree-{count}", executor={"kind": "ray", "replicas": count}, **PARTS)
                folder = fedgraft.run(fedgraft.load_config(config)).folder
                found[f"{count} replica{'s' if count > 1 else ''}"] = _differences(reference, folder)
        finally:
            ray.shutdown()
    return found


def _differences(reference: Path, folder: Path) -> list[str]:
    return [str(difference) for difference in fedgraft.verify(reference, folder).differences]
