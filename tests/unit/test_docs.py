"""The documentation says what the code says: pages of methods are current, links lead somewhere, the tutorial runs."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from transformers import Qwen2MoeConfig

from fedgraft.errors import ConfigError
from fedgraft.platform.catalogue import list_methods
from fedgraft.platform.loading import load_config
from fedgraft.registry import METHODS, load_method_file

ROOT = Path(__file__).parents[2]
TEXTS = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *(ROOT / "benchmarks").rglob("*.md")])


@pytest.fixture(scope="module")
def writer() -> ModuleType:
    spec = importlib.util.spec_from_file_location("write_method_pages", ROOT / "docs" / "write_method_pages.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_method_has_a_current_page(writer: ModuleType) -> None:
    texts = writer.pages()
    found = {path.name: path.read_text() for path in (ROOT / "docs" / "methods").glob("*.md")}
    assert sorted(found) == sorted(texts), "run python docs/write_method_pages.py"
    stale = [name for name, text in texts.items() if found[name] != text]
    assert not stale, "run python docs/write_method_pages.py"


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_to_files(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", path.read_text()):
        if not target.startswith(("http://", "https://")):
            assert (path.parent / target).exists(), target


# ---- the tutorial


@pytest.fixture
def tutorial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, dict[str, Any]]:
    """The tutorial's Python file, and its configuration as it stands."""
    blocks = re.findall(r"```(\w+)\n(.*?)```", (ROOT / "docs" / "own-method.md").read_text(), flags=re.DOTALL)
    code = next(text for kind, text in blocks if kind == "python")
    config: dict[str, Any] = yaml.safe_load(next(text for kind, text in blocks if kind == "yaml"))
    assert len(code.splitlines()) < 50
    path = tmp_path / "surprise.py"
    path.write_text(code)
    assert config["method_files"] == [path.name]
    monkeypatch.setattr(METHODS, "_classes", dict(METHODS._classes))
    return path, config


def test_the_tutorials_method_trains_and_weighs_by_loss(
    tutorial: tuple[Path, dict[str, Any]], make_job: Callable[..., Any], run_job: Callable[..., Any]
) -> None:
    load_method_file(tutorial[0])
    ran = run_job(make_job({"name": "surprise", "power": 2.0}))
    assert len(ran.pool.replies) == 9
    for round_idx in (1, 2, 3):
        sent = [update for _, update, _ in ran.pool.replies if update.round_idx == round_idx]
        weights = METHODS.parse({"name": "surprise", "power": 2.0}).weigh(ran.state, sent).default
        losses = [float(update.statistics["loss"]) for update in sent]
        assert weights == pytest.approx([update.num_examples * loss**2 for update, loss in zip(sent, losses, strict=True)])
        assert len({round(loss, 6) for loss in losses}) == 3
    charged = {row["group"]: row["bytes"] for row in ran.rows("ledger") if row["direction"] == "up"}
    assert charged["statistics"] == 4


def test_with_power_0_the_tutorials_method_is_fedavg(
    tutorial: tuple[Path, dict[str, Any]], make_job: Callable[..., Any], run_job: Callable[..., Any], assert_same_bits: Any
) -> None:
    load_method_file(tutorial[0])
    expected = run_job(make_job({"name": "fedavg"}))
    found = run_job(make_job({"name": "surprise", "power": 0.0}))
    assert_same_bits(found.state.params, expected.state.params)


def test_the_tutorials_configuration_loads_and_refuses_a_misspelt_option(tutorial: tuple[Path, dict[str, Any]]) -> None:
    path, config = tutorial
    config["method_files"] = [str(path)]
    assert list(load_config(config).methods()) == ["fedavg", "surprise"]
    config["compare"]["methods"]["surprise"] = {"name": "surprise", "powr": 2.0}
    with pytest.raises(ConfigError, match="powr") as caught:
        load_config(config)
    assert "power" in str(caught.value)


def test_an_installed_packages_method_is_found(
    tutorial: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "site" / "my_package"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "surprise.py").write_text(tutorial[0].read_text())
    metadata = tmp_path / "site" / "my_package-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: my-package\nVersion: 1.0\n")
    text = (ROOT / "docs" / "own-method.md").read_text()
    entry = re.search(r'entry-points\."(.+)"\]\n(.+) = "(.+)"', text)
    assert entry is not None
    (metadata / "entry_points.txt").write_text(f"[{entry[1]}]\n{entry[2]} = {entry[3]}\n")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    assert "surprise" not in METHODS.names()
    assert "surprise" in {info.name for info in list_methods()}
    monkeypatch.delitem(sys.modules, "my_package.surprise")


# ---- scaling


@pytest.fixture(scope="module")
def scaling() -> ModuleType:
    spec = importlib.util.spec_from_file_location("write_scaling", ROOT / "docs" / "write_scaling.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclass looks its own module up
    spec.loader.exec_module(module)
    return module


def test_the_scaling_page_is_current(scaling: ModuleType) -> None:
    assert scaling.page() == (ROOT / "docs" / "scaling.md").read_text(), "run python docs/write_scaling.py"


def test_what_the_scaling_page_multiplies_is_what_a_plan_of_that_size_says(scaling: ModuleType) -> None:
    """Bytes and GPU seconds of a client are taken from a round of ten, and hold for a round of a thousand."""
    small = Qwen2MoeConfig(
        hidden_size=64, num_hidden_layers=2, num_experts=4, num_attention_heads=4, num_key_value_heads=4, vocab_size=500
    )
    ten, thousand = (
        scaling.Sized(name="small", plan=scaling.plan_of(small, clients, cohort))
        for clients, cohort in ((10, 10), (100_000, 1_000))
    )
    assert thousand.method.run_bytes == 2 * 1_000 * ten.method.bytes_per_round
    assert thousand.plan.seconds * thousand.busy / 1_000 == pytest.approx(ten.gpu_seconds, rel=1e-9)
    assert thousand.private_bytes == ten.private_bytes > 0
