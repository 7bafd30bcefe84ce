"""What is removed from a shared store: old files that the catalog does not name, and nothing else."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from failing_disk import QuickDisk
from memory_objects import MemoryBucket, MemoryObjects

from lora_serve.adapters.shared.catalog import publish_version
from lora_serve.adapters.shared.cleaning import clean
from lora_serve.adapters.shared.folder_objects import FolderObjects
from lora_serve.adapters.shared.shared_objects import SharedObjects
from lora_serve.adapters.shared.shared_store import SharedStore
from lora_serve.adapters.store.records import describe_folder
from lora_serve.cli import main
from lora_serve.errors import StoreUnusable, Unavailable
from lora_serve.precondition import ANYTHING


def publish(objects: SharedObjects, folder: Path, content: bytes) -> None:
    """Publish an adapter of this content, which nobody looks into here, as the only version of poet."""
    folder.mkdir(exist_ok=True)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (folder / name).write_bytes(content)
    shared, record = SharedStore(objects, "base", "model"), describe_folder(folder)
    version = shared.upload(folder, record)
    shared.change(publish_version("poet", record.digest, version, replace=True, precondition=ANYTHING, keep=1))


def test_only_what_is_old_and_not_needed_is_removed(tmp_path: Path) -> None:
    bucket = MemoryBucket()
    objects = MemoryObjects(bucket)
    for content in (b"1", b"2", b"3", b"2"):  # the second one is uploaded twice
        publish(objects, tmp_path / "adapter", content)
        bucket.now += 100
    removed: list[str] = []
    assert clean(objects, 250, remove=False, found=removed.append) == 4
    assert clean(objects, 250, remove=True, found=removed.append) == 4
    assert removed[:4] == removed[4:]
    assert len(bucket.contents) == 4  # the third one is not old enough yet
    bucket.now += 1000
    clean(objects, 250, remove=True, found=removed.append)
    catalog = SharedStore(objects, "base", "model").read()
    assert {tuple(key.split("/")[1:3]) for key in bucket.contents} == catalog.uploads
    objects.away = True
    with pytest.raises(Unavailable):
        clean(objects, 250, remove=True, found=removed.append)


def test_the_command_cleans_a_folder_that_has_a_catalog(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "shared"
    root.mkdir()
    objects = FolderObjects(root, QuickDisk())
    with pytest.raises(StoreUnusable, match="there is no catalog"):
        clean(objects, 0, remove=True, found=print)
    for content in (b"1", b"2"):
        publish(objects, tmp_path / "adapter", content)
    (root / "unfinished" / "left").write_bytes(b"by who was killed")
    url = f"file://{root}"
    assert main(["store", "clean-shared", url]) == 0
    assert f"0 files removed from {url}" in capsys.readouterr().out
    for path in root.rglob("*"):
        os.utime(path, (1, 1))
    assert main(["store", "clean-shared", url, "--dry-run"]) == 0
    assert f"3 files would be removed from {url}" in capsys.readouterr().out
    assert main(["store", "clean-shared", url]) == 0
    assert f"3 files removed from {url}" in capsys.readouterr().out
    assert len([path for path in (root / "contents").rglob("*") if path.is_file()]) == 2
    assert main(["store", "clean-shared", "s3:/x"]) == 2
    assert "is not file:///FOLDER or s3://BUCKET/PREFIX" in capsys.readouterr().err
