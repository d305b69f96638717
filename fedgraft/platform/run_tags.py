"""What MLflow is told of a run beside its metrics: tags to find it by, and its configuration as parameters.

Tags begin with ``fedgraft.``: ``kind`` (``experiment``, ``run`` or ``sweep``), ``method``, ``dataset``, ``model``, ``seed``,
``label``, ``folder``, ``version.<package>``; a sweep adds ``sweep``, ``trial`` and ``stopped_early``. Parameters have the
key paths of the resolved configuration (``data.partition.alpha``, ``method.name``), so that MLflow's compare view, its
parallel coordinates and its search speak of what stands in the YAML file.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from fedgraft.platform.config import RunConfig
from fedgraft.platform.run_record import package_versions
from fedgraft.protocols import MethodConfig

__all__ = ["Kind", "run_params", "run_tags"]

Kind = Literal["experiment", "run", "sweep"]

_BUNDLED = "bundled"
_LEFT_OUT = {"compare", "seeds", "tracking"}
"""Of other runs (``compare``, ``seeds``), or about MLflow itself (its address may hold a password)."""


def run_tags(
    config: RunConfig,
    kind: Kind,
    folder: Path,
    *,
    label: str | None = None,
    method: MethodConfig | None = None,
    seed: int | None = None,
    more: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """Give the tags of a run in MLflow.

    Args:
        config: Names data set and model.
        kind: ``run`` for one method and seed, ``experiment`` or ``sweep`` for what stands over it.
        folder: Where it lies; ``fedgraft compare`` reads it there if it still does.
        label: What tables call the method; runs only.
        method: Runs only.
        seed: Runs only.
        more: Further tags without the prefix, such as ``{"sweep": "alpha-20260101-120000", "trial": "0003"}``.
    """
    tags: dict[str, str] = {
        "kind": kind,
        "dataset": _source(config.data.path, config.data.name),
        "model": _source(config.model.path, config.model.name),
        "folder": str(folder),
    }
    if label is not None:
        tags["label"] = label
    if method is not None:
        tags["method"] = method.name
    if seed is not None:
        tags["seed"] = str(seed)
    tags |= {f"version.{package}": version for package, version in package_versions().items()}
    return {f"fedgraft.{key}": value for key, value in (tags | dict(more or {})).items()}


def run_params(
    config: RunConfig, *, method: MethodConfig | None = None, seed: int | None = None, rate: float | None = None
) -> dict[str, Any]:
    """Give a run's parameters, nested as the configuration is; MLflow gets them by key path.

    Args:
        config: The resolved configuration.
        method: The run's method; it stands under ``method`` also where the configuration compares several. ``None``: of
            the whole experiment or sweep, with all its methods.
        seed: The run's seed, under ``seed``.
        rate: The learning rate it is trained with, under ``training.learning_rate``: a search may have chosen it.
    """
    tree: dict[str, Any] = config.model_dump(mode="json")
    tree.pop("tracking")
    if method is None:
        return {key: value for key, value in tree.items() if value is not None}
    params = {key: value for key, value in tree.items() if key not in _LEFT_OUT and value is not None}
    params["method"] = method.model_dump(mode="json")
    params["seed"] = seed
    if rate is not None:
        params["training"] = params["training"] | {"learning_rate": rate}
    return params


def _source(path: Path | None, name: str | None) -> str:
    """A folder's or file's name without its endings, or the name on the hub."""
    if path is not None:
        return path.name.split(".")[0] or str(path)
    return name or _BUNDLED
