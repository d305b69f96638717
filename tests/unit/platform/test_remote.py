"""Folders that a URI names: on a disk, and in a store that fsspec opens."""

from __future__ import annotations

import uuid
from pathlib import Path

import pytest
from pyarrow import fs

from fedgraft.errors import StorageError
from fedgraft.platform.remote import RemoteFolder, is_uri


@pytest.fixture(params=["file", "memory"])
def remote(request: pytest.FixtureRequest, tmp_path: Path) -> RemoteFolder:
    """An empty store; that of the memory is this process's own, so it gets a name of its own."""
    return RemoteFolder(f"file://{tmp_path}/store" if request.param == "file" else f"memory://{uuid.uuid4().hex}/store")


def test_files_are_put_got_listed_and_deleted(remote: RemoteFolder, tmp_path: Path) -> None:
    folder = remote.child("a", "b")
    assert folder.names() == []
    assert not folder.has("one")
    folder.write("one", b"first")
    folder.write("one", b"second")
    (tmp_path / "local").write_bytes(b"third")
    folder.upload(tmp_path / "local", "below/two")
    assert folder.names() == ["below/two", "one"]
    assert remote.names() == ["a/b/below/two", "a/b/one"]
    assert folder.read("one") == b"second"
    folder.download("below/two", tmp_path / "new" / "place")
    assert (tmp_path / "new" / "place").read_bytes() == b"third"
    folder.delete("one")
    folder.delete("one")
    assert folder.names() == ["below/two"]


def test_what_is_missing_is_named(remote: RemoteFolder, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="store/x/nothing cannot be read"):
        remote.child("x").read("nothing")
    with pytest.raises(StorageError, match="nothing cannot be fetched"):
        remote.download("nothing", tmp_path / "target")
    assert not list(tmp_path.glob("**/*target*"))


def test_a_disk_never_shows_half_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    remote = RemoteFolder(f"file://{tmp_path}")
    remote.write("one", b"old")

    class Full:
        def read(self, size: int = -1) -> bytes:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr("fedgraft.platform.remote.shutil.copyfileobj", lambda source, target, size: Full().read())
    (tmp_path / "local").write_bytes(b"new")
    with pytest.raises(StorageError, match="one cannot be written.*No space left"):
        remote.upload(tmp_path / "local", "one")
    assert remote.read("one") == b"old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["local", "one"]


def test_options_of_a_uri_stay_with_the_store() -> None:
    remote = RemoteFolder("s3://bucket/runs?region=eu-central-1").child("one")
    assert str(remote) == "s3://bucket/runs/one"
    assert remote.uri.endswith("?region=eu-central-1")
    assert is_uri(remote.uri)
    assert not is_uri("/mnt/runs")


def test_s3_is_opened_with_its_options() -> None:
    opened, path = RemoteFolder("s3://bucket/runs?endpoint_override=127.0.0.1:1&scheme=http&region=x").child("one")._open("f")
    assert isinstance(opened, fs.S3FileSystem)
    assert (path, opened.region) == ("bucket/runs/one/f", "x")
