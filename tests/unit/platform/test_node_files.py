"""What a node fetches, once, and what it says where nothing tells it where from."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from fedgraft.data.prepared import MANIFEST_NAME
from fedgraft.errors import ModelError
from fedgraft.platform.node_files import Origin, put_folder, require_seen
from fedgraft.platform.remote import RemoteFolder


@pytest.fixture
def origin(tmp_path: Path) -> Origin:
    store = RemoteFolder(f"file://{tmp_path}/store")
    for name, last in (("base", "base.json"), ("data", MANIFEST_NAME)):
        (tmp_path / name).mkdir()
        (tmp_path / name / last).write_text("{}")
        (tmp_path / name / "model.safetensors").write_bytes(b"weights")
    put_folder(tmp_path / "base", store.child("bases", "qwen-1"), "base.json")
    put_folder(tmp_path / "data", store.child("data", "abc"), MANIFEST_NAME)
    store.child("methods", "exp").write("000/mine.py", b"x = 1\n")
    return Origin(
        base=store.child("bases", "qwen-1"),
        data=store.child("data", "abc"),
        method_files=store.child("methods", "exp"),
        cache=tmp_path / "cache",
    )


def test_a_node_fetches_once_however_many_ask(origin: Origin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetched: list[str] = []
    download = RemoteFolder.download

    def notes(remote: RemoteFolder, name: str, target: Path) -> None:
        fetched.append(name)
        download(remote, name, target)

    monkeypatch.setattr(RemoteFolder, "download", notes)
    found: list[object] = []
    threads = [threading.Thread(target=lambda: found.append(origin.bring())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    base, data = tmp_path / "cache" / "bases" / "qwen-1", tmp_path / "cache" / "data" / "abc"
    assert {each[:2] for each in found} == {(base, data)}  # type: ignore[index]
    assert sorted(path.name for path in base.iterdir()) == ["base.json", "model.safetensors"]
    assert fetched.count("model.safetensors") == 2  # base and data
    (file,) = origin.bring()[2]
    assert (file.name, file.read_text()) == ("mine.py", "x = 1\n")


def test_a_fetch_that_was_cut_off_is_made_again(origin: Origin, tmp_path: Path) -> None:
    base = tmp_path / "cache" / "bases" / "qwen-1"
    base.mkdir(parents=True)
    (base / "model.safetensors").write_bytes(b"wei")  # without base.json, which comes last
    origin.bring()
    assert (base / "model.safetensors").read_bytes() == b"weights"


def test_a_folder_is_put_once(tmp_path: Path, origin: Origin) -> None:
    (tmp_path / "base" / "model.safetensors").write_bytes(b"others")
    put_folder(tmp_path / "base", origin.base, "base.json")
    assert origin.base.read("model.safetensors") == b"weights"


def test_without_a_store_a_node_must_see_the_folders(tmp_path: Path) -> None:
    require_seen((tmp_path,))
    with pytest.raises(ModelError, match="does not see .*/nowhere, which") as caught:
        require_seen((tmp_path, tmp_path / "nowhere"))
    assert "output.storage" in caught.value.hint
