"""The documentation says what the code says: pages of methods are current, links lead somewhere, the tutorial runs."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

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
