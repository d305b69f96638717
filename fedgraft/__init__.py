"""Personalised federated fine-tuning of Mixture-of-Experts language models, simulated on Ray.

    import fedgraft

    config = fedgraft.load_config("examples/dolly_flex.yaml", ["federation.rounds=3"])
    result = fedgraft.run(config)
    result.evaluations      # a data frame; result.folder and result.report name the artifacts

What this module offers is imported when it is first used: ``import fedgraft`` alone costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedgraft.moe.export import load_export
    from fedgraft.platform.catalogue import MethodInfo
    from fedgraft.platform.catalogue import list_methods as methods
    from fedgraft.platform.comparison import Comparison, compare
    from fedgraft.platform.config import RunConfig
    from fedgraft.platform.doctor import examine
    from fedgraft.platform.export import Export, export
    from fedgraft.platform.loading import load_config
    from fedgraft.platform.plan import make_plan
    from fedgraft.platform.pretraining.command import PretrainOutcome, pretrain_model
    from fedgraft.platform.pretraining.config import PretrainConfig
    from fedgraft.platform.pretraining.loading import load_pretrain_config
    from fedgraft.platform.progress import Event
    from fedgraft.platform.results import ComparisonResult, RunResult, read_comparison, read_run
    from fedgraft.platform.verify import Verification, verify
    from fedgraft.protocols import Method, MethodConfig
    from fedgraft.registry import METHODS
    from fedgraft.tuning.detached_runs import RunStatus, attach, detach, status, stop
    from fedgraft.tuning.experiment import run
    from fedgraft.tuning.sweep import SweepResult, sweep
    from fedgraft.tuning.sweep_loading import load_sweep
    from fedgraft.tuning.sweep_plan import plan_sweep

__all__ = [
    "METHODS",
    "Comparison",
    "ComparisonResult",
    "Event",
    "Export",
    "Method",
    "MethodConfig",
    "MethodInfo",
    "PretrainConfig",
    "PretrainOutcome",
    "RunConfig",
    "RunResult",
    "RunStatus",
    "SweepResult",
    "Verification",
    "attach",
    "compare",
    "detach",
    "examine",
    "export",
    "load_config",
    "load_export",
    "load_pretrain_config",
    "load_sweep",
    "make_plan",
    "methods",
    "plan_sweep",
    "pretrain_model",
    "read_comparison",
    "read_run",
    "run",
    "status",
    "stop",
    "sweep",
    "verify",
]

_HOMES = {
    "METHODS": "fedgraft.registry",
    "Comparison": "fedgraft.platform.comparison",
    "ComparisonResult": "fedgraft.platform.results",
    "Event": "fedgraft.platform.progress",
    "Export": "fedgraft.platform.export",
    "Method": "fedgraft.protocols",
    "MethodConfig": "fedgraft.protocols",
    "MethodInfo": "fedgraft.platform.catalogue",
    "PretrainConfig": "fedgraft.platform.pretraining.config",
    "PretrainOutcome": "fedgraft.platform.pretraining.command",
    "RunConfig": "fedgraft.platform.config",
    "RunResult": "fedgraft.platform.results",
    "RunStatus": "fedgraft.tuning.detached_runs",
    "SweepResult": "fedgraft.tuning.sweep",
    "Verification": "fedgraft.platform.verify",
    "attach": "fedgraft.tuning.detached_runs",
    "compare": "fedgraft.platform.comparison",
    "detach": "fedgraft.tuning.detached_runs",
    "examine": "fedgraft.platform.doctor",
    "export": "fedgraft.platform.export",
    "load_config": "fedgraft.platform.loading",
    "load_export": "fedgraft.moe.export",
    "load_pretrain_config": "fedgraft.platform.pretraining.loading",
    "load_sweep": "fedgraft.tuning.sweep_loading",
    "make_plan": "fedgraft.platform.plan",
    "methods": "fedgraft.platform.catalogue",
    "plan_sweep": "fedgraft.tuning.sweep_plan",
    "pretrain_model": "fedgraft.platform.pretraining.command",
    "read_comparison": "fedgraft.platform.results",
    "read_run": "fedgraft.platform.results",
    "run": "fedgraft.tuning.experiment",
    "status": "fedgraft.tuning.detached_runs",
    "stop": "fedgraft.tuning.detached_runs",
    "sweep": "fedgraft.tuning.sweep",
    "verify": "fedgraft.platform.verify",
}

_NAMES = {"methods": "list_methods"}  # a public name that is another one at home


def __getattr__(name: str) -> Any:
    """Import a public name from its home."""
    if name not in _HOMES:
        raise AttributeError(f"module 'fedgraft' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(_HOMES[name]), _NAMES.get(name, name))


def __dir__() -> list[str]:
    return sorted(__all__)
