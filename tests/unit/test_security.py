"""What docs/security.md promises, as far as it can be tested: no pickle, no code that nobody asked for, nothing that listens."""

from __future__ import annotations

import ast
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from transformers import PreTrainedModel

from fedgraft.data.tokenise import load_tokenizer
from fedgraft.errors import ModelError
from fedgraft.moe.base import cache_base, open_base
from fedgraft.moe.export import load_export
from fedgraft.platform.config import ExecutorConfig
from fedgraft.platform.launch import cluster

ROOT = Path(__file__).parents[2]

MODULES = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "shelve", "marshal", "runpy", "code"}
"""Modules that turn files into code, or objects into files that can."""

CALLS = {
    "torch.load",
    "torch.save",
    "torch.jit.load",
    "torch.hub.load",
    "torch.package.PackageImporter",
    "pandas.read_pickle",
    "yaml.load",
    "yaml.load_all",
    "yaml.unsafe_load",
    "yaml.full_load",
    "yaml.Loader",
    "yaml.CLoader",
    "yaml.FullLoader",
    "yaml.UnsafeLoader",
    "os.system",
    "os.popen",
    "subprocess.getoutput",
    "tempfile.mktemp",
    "ray.cloudpickle",
    "eval",
    "exec",
    "compile",
    "__import__",
}
"""Names that may not be used, by the last two parts."""

ARGUMENTS = {
    ("shell", True),
    ("allow_pickle", True),
    ("trust_remote_code", True),
    ("weights_only", False),
    ("use_safetensors", False),
}

EXCEPTIONS = {
    ("registry.py", "exec_module"): "a method file is code; its name stands in the configuration",
    ("training/sharded.py", "save_checkpoint"): "DeepSpeed's own checkpoints of a pre-training",
    ("training/sharded.py", "load_checkpoint"): "DeepSpeed's own checkpoints of a pre-training",
}
"""The exceptions, each with the reason that docs/security.md gives; a name here is found nowhere else."""


def dotted(node: ast.expr) -> str:
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join([node.id if isinstance(node, ast.Name) else "?", *reversed(parts)])


def findings(source: str, name: str) -> Iterator[str]:
    """Everything in a file that could load or write a pickle, run code from a file, or start a shell."""
    special = {call for _, call in EXCEPTIONS}
    for node in ast.walk(ast.parse(source)):
        where = f"{name}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Import | ast.ImportFrom):
            origin = node.module or "" if isinstance(node, ast.ImportFrom) else ""
            for alias in node.names:
                full = f"{origin}.{alias.name}" if origin else alias.name
                if {full.split(".")[0], alias.name} & MODULES or full in CALLS:
                    yield f"{where}: imports {full}"
        elif isinstance(node, ast.Attribute | ast.Name):
            used = dotted(node)
            if used in CALLS:
                yield f"{where}: uses {used}"
            last = used.rpartition(".")[2]
            if isinstance(node, ast.Attribute) and last in special and (name, last) not in EXCEPTIONS:
                yield f"{where}: uses {last}"
        elif isinstance(node, ast.keyword) and isinstance(node.value, ast.Constant) and (node.arg, node.value.value) in ARGUMENTS:
            yield f"{where}: {node.arg}={node.value.value}"


def test_nothing_in_fedgraft_loads_or_writes_a_pickle_or_runs_what_it_reads() -> None:
    package = ROOT / "fedgraft"
    paths = sorted(package.rglob("*.py"))
    assert len(paths) > 100
    found = [each for path in paths for each in findings(path.read_text(), str(path.relative_to(package)))]
    assert not found, "\n".join(found)
    for (name, call), _ in EXCEPTIONS.items():
        assert call in (package / name).read_text(), f"{name} no longer uses {call}: drop the exception"


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from joblib import load",
        "import torch\ntorch.load('x')",
        "from torch import save",
        "yaml.load(text, Loader=yaml.Loader)",
        "yaml.full_load(text)",
        "eval(text)",
        "subprocess.run('x', shell=True)",
        "numpy.load('x', allow_pickle=True)",
        "AutoModel.from_pretrained(x, trust_remote_code=True)",
        "spec.loader.exec_module(module)",
        "engine.load_checkpoint(folder)",
        "ray.cloudpickle.loads(data)",
    ],
)
def test_the_search_finds_what_it_looks_for(source: str) -> None:
    assert list(findings(source, "cli.py"))


def test_the_exceptions_are_told_in_the_documentation() -> None:
    text = (ROOT / "docs" / "security.md").read_text()
    for name, _ in EXCEPTIONS:
        assert name.rpartition("/")[2] in text


def test_models_are_loaded_without_a_question_on_the_terminal() -> None:
    """Where the flag is not given at all transformers asks the user, and a "y" runs the code."""
    for path in (ROOT / "fedgraft").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and dotted(node.func).endswith("from_pretrained"):
                owner = dotted(node.func).rpartition(".")[0]
                if owner in ("AutoConfig", "AutoTokenizer", "AutoModelForCausalLM"):
                    assert "trust_remote_code" in {keyword.arg for keyword in node.keywords}, f"{path}:{node.lineno}"


class Harm:
    """An object that makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.path),)


@pytest.fixture
def folder(
    tiny_model: Callable[..., PreTrainedModel], save_model: Callable[[PreTrainedModel, Path], Path], tmp_path: Path
) -> Path:
    return save_model(tiny_model("qwen2_moe"), tmp_path / "hf")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.safetensors", "pytorch_model.bin.index.json"])
def test_a_pickled_checkpoint_is_refused_and_never_opened(name: str, folder: Path, tmp_path: Path) -> None:
    harm = tmp_path / "harm"
    (folder / "model.safetensors").unlink()
    pickled = "pytorch_model.bin" if name.endswith(".json") else name
    torch.save({"model.norm.weight": Harm(harm)}, folder / pickled)
    if name.endswith(".json"):
        index = {"metadata": {"total_size": 1}, "weight_map": {"model.norm.weight": pickled}}
        (folder / name).write_text(json.dumps(index))
    with pytest.raises(ModelError, match="cannot be loaded"):
        cache_base(str(folder), "float32", tmp_path / "cache")
    assert not harm.exists()
    shutil.copyfile(folder / pickled, tmp_path / "copy.bin")
    torch.load(tmp_path / "copy.bin", weights_only=False)  # so it would have run something
    assert harm.is_dir()


def test_an_adapter_as_a_pickle_is_refused(tmp_path: Path, folder: Path) -> None:
    harm = tmp_path / "harm"
    export = tmp_path / "export"
    export.mkdir()
    record = {"format": 1, "form": "adapter", "dtype": "float32", "base": str(folder)}
    (export / "export.json").write_text(json.dumps(record))
    (export / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 1, "target_modules": ["q_proj"]}))
    torch.save({"x": Harm(harm)}, export / "adapter_model.bin")
    with pytest.raises(ModelError, match=r"holds no adapter_model\.safetensors"):
        load_export(export)
    assert not harm.exists()


CODE = """
import os
os.makedirs({harm!r}, exist_ok=True)
from transformers import PreTrainedTokenizerFast, Qwen2MoeConfig, Qwen2MoeForCausalLM
class Config(Qwen2MoeConfig):
    pass
class Model(Qwen2MoeForCausalLM):
    config_class = Config
class Tokenizer(PreTrainedTokenizerFast):
    pass
"""


@pytest.fixture
def with_code(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model folder whose configuration, model and tokenizer are classes of a file in it; running it makes ``harm``."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    (folder / "own_code.py").write_text(CODE.format(harm=str(tmp_path / "harm")))
    for name, entries in (
        ("config.json", {"AutoConfig": "own_code.Config", "AutoModelForCausalLM": "own_code.Model"}),
        ("tokenizer_config.json", {"AutoTokenizer": [None, "own_code.Tokenizer"]}),
    ):
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(content | {"auto_map": entries}))
    return folder


def test_code_in_a_model_folder_does_not_run_unless_the_flag_says_so(with_code: Path, tmp_path: Path) -> None:
    harm = tmp_path / "harm"
    base = cache_base(str(with_code), "float32", tmp_path / "cache")
    load_tokenizer(base)
    open_base(base)
    load_tokenizer(with_code)
    assert not harm.exists()
    trusted = cache_base(str(with_code), "float32", tmp_path / "other", trusts_remote_code=True)
    assert harm.is_dir()
    harm.rmdir()
    open_base(trusted)  # replicas run transformers' own class of the family
    load_tokenizer(trusted)
    assert not harm.exists()


def test_a_family_that_only_the_folders_own_code_knows_is_refused_without_running_it(with_code: Path, tmp_path: Path) -> None:
    content = json.loads((with_code / "config.json").read_text())
    (with_code / "config.json").write_text(json.dumps(content | {"model_type": "own_moe"}))
    with pytest.raises(ModelError, match="contains custom code"):
        cache_base(str(with_code), "float32", tmp_path / "cache")
    assert not (tmp_path / "harm").exists()


def test_a_cluster_of_ours_has_no_dashboard(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **options: asked.append(options))
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    with cluster(ExecutorConfig()):
        pass
    with cluster(ExecutorConfig(address="ray://there:10001")):
        pass
    started, joined = asked
    assert started["address"] == "local"  # not whatever cluster last wrote its address into a file here
    assert started["include_dashboard"] is False
    assert "dashboard_host" not in started  # Ray's own default is this machine alone
    assert "include_dashboard" not in joined
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"
