"""The step benchmark at its smallest size: what it counts, that its checks can fail, and what it does without."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"
QUICK = ["--device", "cpu", "--steps", "2", "--repeats", "1", "--length", "16", "--experts-implementation", "eager"]


@pytest.fixture
def gpu_check(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("gpu_check")


@pytest.fixture
def client_step(gpu_check: ModuleType) -> ModuleType:
    return importlib.import_module("client_step")


@pytest.mark.slow
def test_one_json_line_with_four_variants_that_agree(
    gpu_check: ModuleType, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = tmp_path / "record.json"
    assert gpu_check.main([*QUICK[:-1], "auto", "--repeats", "2", "--out", str(out)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1
    record = json.loads(lines[0])
    assert json.loads(out.read_text()) == record
    assert set(record["experts_ms"]) == {"grouped_mm", "eager"}
    assert record["experts_implementation"] in record["experts_ms"]
    assert set(record["variants"]) == {"fedgraft_lora", "peft_lora", "fedgraft_flex", "peft_graft"}
    for name, figures in record["variants"].items():
        assert figures["num_steps"] == 4, name  # two measured clients of two steps
        assert figures["tokens_per_s"] == pytest.approx(2 * 16 / (figures["step_ms"] / 1e3), rel=1e-3)
        flops = record["counts"]["lora" if "lora" in name else "graft"]["flops_per_step"]
        mfu = flops / (figures["step_ms"] / 1e3) / record["peak_flops"]
        assert figures["mfu"] == pytest.approx(mfu, abs=1e-4)
        assert figures["peak_bytes"] >= figures["start_bytes"] > 0
    for name in ("fedgraft_lora", "fedgraft_flex"):
        assert record["variants"][name]["aba"] == {"device_repeats_itself": True, "same_slots": True, "same_loss": True}
        assert record["variants"][name]["trains_again_to_same_bits"]
    # Else the graft would do nothing, and agreeing on it would mean nothing.
    assert record["variants"]["fedgraft_flex"]["losses"][0] != record["variants"]["fedgraft_lora"]["losses"][0]


def test_flops_are_those_of_a_count_by_hand(client_step: ModuleType, gpu_check: ModuleType) -> None:
    size = client_step.Size(
        hidden=8,
        layers=3,
        experts=5,
        top_k=2,
        expert_hidden=4,
        shared_hidden=6,
        heads=2,
        vocabulary=11,
        batch=3,
        length=10,
        steps=1,
    )
    setting = client_step.Setting(
        size=size, device=torch.device("cpu"), dtype=torch.float32, repeats=1, train=gpu_check.TrainSpec(learning_rate=1e-3)
    )
    attention = 4 * 8 * 8 + 3 * 8  # Qwen2 has biases on queries, keys and values
    block = 5 * 8 + 2 * (3 * 8 * 4) + 3 * 8 * 6 + 8  # router, two of five experts, the shared expert and its gate
    active = 3 * (attention + block + 2 * 8) + 8  # with the norms
    tokens, labels = 3 * 10, 3 * 5
    by_hand = tokens * (4 * active + 6 * 7 + 6 * 3 * 10 * 8) + labels * 4 * 8 * 11
    found = client_step.count_flops(setting, {"x": torch.zeros(7)})
    assert found["parameters"] == active + 3 * 3 * (3 * 8 * 4) + 2 * 8 * 11
    assert found == {"parameters": found["parameters"], "active_body": active, "trained": 7, "flops_per_step": by_hand}


@pytest.mark.slow
def test_a_wrong_graft_and_a_client_that_leaves_something_behind_are_found(
    gpu_check: ModuleType, client_step: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = client_step.PlainGraft.forward

    def twice(self: Any, x_BSD: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = 2 * right(self, x_BSD) - self.block(x_BSD)
        return output

    def hosts_only_what_is_shared(self: Any) -> Any:
        before = self.engine.read(self.private)
        start = host(self)
        if self.name == "A" and hosted:
            self.engine.load(before)
        hosted.append(self.name)
        return start

    host, hosted = client_step.Client.host, []
    monkeypatch.setattr(client_step.PlainGraft, "forward", twice)
    monkeypatch.setattr(client_step.Client, "host", hosts_only_what_is_shared)
    assert gpu_check.main(QUICK) == 1
    printed = capsys.readouterr()
    assert "graft: the trained graft differ by" in printed.err
    assert "fedgraft_flex: hosting A, B, A does not give A again" in printed.err
    assert "lora: " not in printed.err
    assert json.loads(printed.out)["failed"] == printed.err.splitlines()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--batch", "0"], "expected a whole number of at least 1, got '0'"),
        (["--hidden", "65"], "expected a multiple of 2 * heads = 8"),
        (["--top-k", "9"], "top-k <= experts"),
        (["--device", "gpu"], "expected cpu, cuda or cuda:N"),
        (["--out", "/nowhere/at/all.json"], "the folder /nowhere/at does not exist"),
    ],
)
def test_bad_input_is_refused_with_what_to_do(
    gpu_check: ModuleType, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    with pytest.raises(SystemExit) as stopped:
        gpu_check.main(arguments)
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.slow
def test_it_runs_where_ray_and_the_platform_s_other_packages_are_missing() -> None:
    missing = ["ray", "mlflow", "deepspeed", "datasets", "pandas", "matplotlib", "pyarrow", "rouge_score", "typer"]
    start = (
        f"import runpy, sys; sys.modules.update(dict.fromkeys({missing})); sys.argv = ['gpu_check.py', *sys.argv[2:]]; "
        f"sys.path.insert(0, {str(BENCHMARKS)!r}); runpy.run_path({str(BENCHMARKS / 'gpu_check.py')!r}, run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-c", start, "--", *QUICK], capture_output=True, text=True, timeout=120, cwd="/", check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["failed"] == []
