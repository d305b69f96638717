"""The launcher's files: Ray's own check of its YAMLs, KubeRay's published field names, and a shell's of the Slurm script."""

from __future__ import annotations

import copy
import re
import shlex
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

import fedgraft

ROOT = Path(__file__).parents[2]
RAY_YAMLS = ("cluster.yaml", "clusters/on_premise.yaml")

# Field names of ray.io/v1, from the operator's ray-operator/apis/ray/v1/{rayjob,raycluster}_types.go.
RAY_JOB = {
    "activeDeadlineSeconds",
    "backoffLimit",
    "rayClusterSpec",
    "submitterPodTemplate",
    "metadata",
    "clusterSelector",
    "submitterConfig",
    "managedBy",
    "deletionStrategy",
    "entrypoint",
    "runtimeEnvYAML",
    "jobId",
    "submissionMode",
    "entrypointResources",
    "entrypointNumCpus",
    "entrypointNumGpus",
    "ttlSecondsAfterFinished",
    "shutdownAfterJobFinishes",
    "suspend",
    "schedule",
}
RAY_CLUSTER = {
    "headGroupSpec",
    "workerGroupSpecs",
    "rayVersion",
    "enableInTreeAutoscaling",
    "autoscalerOptions",
    "headServiceAnnotations",
    "suspend",
}
HEAD_GROUP = {"serviceType", "headService", "enableIngress", "rayStartParams", "template"}
WORKER_GROUP = {
    "groupName",
    "replicas",
    "minReplicas",
    "maxReplicas",
    "numOfHosts",
    "rayStartParams",
    "template",
    "scaleStrategy",
}


def _load(name: str) -> Any:
    return yaml.safe_load((ROOT / name).read_text())


@pytest.mark.parametrize("name", RAY_YAMLS)
def test_rays_own_check_takes_the_file_and_no_other_key(name: str) -> None:
    config = _load(name)
    validate_config(prepare_config(copy.deepcopy(config)))
    with pytest.raises(jsonschema.ValidationError, match="max_wokers"):
        validate_config(prepare_config(config | {"max_wokers": 2}))


@pytest.mark.parametrize("name", RAY_YAMLS)
def test_the_repository_is_mounted_and_installed_with_the_tested_versions(name: str) -> None:
    config = _load(name)
    ((target, source),) = config["file_mounts"].items()
    assert source == "."
    home = target.replace("/home/ubuntu", "~")
    assert any(f"-c {home}/constraints.txt -e {home}" in command for command in config["setup_commands"])
    head, worker = (" ".join(config[f"{kind}_start_ray_commands"]) for kind in ("head", "worker"))
    assert "--dashboard-host=127.0.0.1" in head  # nobody else reaches it
    assert "$RAY_HEAD_IP:6379" in worker
    assert "--port=6379" in head


def test_the_cloud_cluster_scales_within_its_limits_and_has_gpus() -> None:
    config = _load("cluster.yaml")
    workers = {name: node for name, node in config["available_node_types"].items() if name != config["head_node_type"]}
    assert sum(node["max_workers"] for node in workers.values()) == config["max_workers"]
    assert all(node["resources"]["GPU"] >= 1 for node in workers.values())
    assert "autoscaling-config" in " ".join(config["head_start_ray_commands"])


@pytest.mark.parametrize("name", [*RAY_YAMLS, "clusters/kuberay.yaml"])
def test_a_file_begins_with_commands_whose_files_exist(name: str) -> None:
    head = [line[2:] for line in (ROOT / name).read_text().splitlines() if line.startswith("# ")]
    named = [word for line in head for word in shlex.split(line.replace("'", "")) if word.endswith((".yaml", ".py", ".sh"))]
    assert name in named
    assert all((ROOT / word).is_file() for word in named), named


def test_the_ray_job_has_the_operators_field_names() -> None:
    job = _load("clusters/kuberay.yaml")
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    spec = job["spec"]
    cluster = spec["rayClusterSpec"]
    assert spec.keys() <= RAY_JOB
    assert cluster.keys() <= RAY_CLUSTER
    assert cluster["headGroupSpec"].keys() <= HEAD_GROUP
    for group in cluster["workerGroupSpecs"]:
        assert group.keys() <= WORKER_GROUP
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    # What is required there.
    assert {"rayStartParams", "template"} <= cluster["headGroupSpec"].keys()
    assert all(
        {"groupName", "minReplicas", "maxReplicas", "rayStartParams", "template"} <= g.keys() for g in cluster["workerGroupSpecs"]
    )
    assert all(isinstance(value, str) for value in cluster["headGroupSpec"]["rayStartParams"].values())
    assert isinstance(yaml.safe_load(spec["runtimeEnvYAML"])["env_vars"], dict)


def test_the_ray_job_runs_what_is_there_on_the_ray_that_is_pinned() -> None:
    spec = _load("clusters/kuberay.yaml")["spec"]
    command, verb, path, *overrides = shlex.split(spec["entrypoint"])
    assert (command, verb) == ("fedgraft", "run")
    config = fedgraft.load_config(str(ROOT / path), overrides)
    mounts = {
        mount["mountPath"]
        for group in (spec["rayClusterSpec"]["headGroupSpec"], *spec["rayClusterSpec"]["workerGroupSpecs"])
        for container in group["template"]["spec"]["containers"]
        for mount in container["volumeMounts"]
    }
    assert all(any(str(path).startswith(mount) for mount in mounts) for path in (config.output.folder, config.output.cache))
    pinned = re.search(r"^ray==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert pinned is not None
    assert spec["rayClusterSpec"]["rayVersion"] == pinned[1] == version("ray")


def test_the_slurm_script_is_a_script_and_its_command_is_ours() -> None:
    script = ROOT / "clusters" / "slurm.sh"
    subprocess.run(["bash", "-n", str(script)], check=True)
    text = script.read_text()
    assert 'fedgraft" run "$@"' in text
    assert "RAY_AUTH_MODE=token" in text


@pytest.mark.slow
def test_submit_hands_everything_to_the_command(tmp_path: Path) -> None:
    """The script as ``ray submit`` runs it, in another folder, with a configuration that only the repository has."""
    (tmp_path / "fedgraft").symlink_to(ROOT)
    (tmp_path / "elsewhere").mkdir()
    command = [sys.executable, str(ROOT / "examples" / "submit.py"), "--config", "examples/dolly_flex.yaml", "federation.rouns=3"]
    environment = {"HOME": str(tmp_path), "PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path / "elsewhere", env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "federation.rouns" in done.stderr
    assert "Traceback" not in done.stderr
