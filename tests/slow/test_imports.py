"""What a replica and a driver import before they do anything: each of these costs every process half a second and more."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow
LATE = {
    "fedgraft.platform.worker": [
        "scipy",
        "rouge_score",
        "nltk",
        "peft",
        "deepspeed",
        "transformers.models.qwen2_moe.modeling_qwen2_moe",
        "matplotlib",
    ],
    "fedgraft.tuning.experiment": [
        "scipy",
        "rouge_score",
        "mlflow",
        "matplotlib",
        "transformers.models.qwen2_moe.modeling_qwen2_moe",
        "ray.train",
    ],
}


@pytest.mark.parametrize("module", LATE)
def test_what_few_need_is_imported_late(module: str) -> None:
    script = f"import sys, {module}; print([name for name in {LATE[module]} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300, check=True)
    assert done.stdout.strip() == "[]"
