"""The adapter store: names, versions and their files, over restarts; one process at a time."""

from __future__ import annotations

import fcntl
import json
import os
import uuid
from pathlib import Path

import pytest
from failing_disk import QuickDisk
from store_files import digest_of, listing, publish, stage

from lora_serve.adapters.store.records import NameRecord, describe_folder
from lora_serve.adapters.store.store import Store
from lora_serve.errors import AdapterBroken, AdapterBusy, AdapterInvalid, BadRequest, StoreUnusable, Unavailable

VERSION_FILES = {"version.json", "adapter_config.json", "adapter_model.safetensors", "README.md", "lowered/flat.bin"}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "store"


class WatchedDisk(QuickDisk):
    """Notes which paths are waited for."""

    def __init__(self) -> None:
        super().__init__()
        self.synced: set[Path] = set()

    def sync(self, path: Path) -> None:
        if self._waits:
            self.synced.add(path)


def test_a_version_that_was_stored_without_waiting_is_waited_for_when_it_is_to_last(root: Path) -> None:
    disk = WatchedDisk()
    store = Store(root, disk=disk)
    for name, durable in (("own", False), ("kept", True)):
        disk.synced.clear()
        staged = stage(store)
        version = describe_folder(staged)
        store.publish(name, staged, version, NameRecord([version.digest]), durable=durable)
        folder = store.folder(version.digest)
        found = {path for path in folder.rglob("*") if path in disk.synced}
        assert found == ({*folder.rglob("*")} if durable else set())
        assert (folder.parent in disk.synced) == durable
    store.close()


# --- versions and names ----------------------------------------------------------------------------------------------


def test_a_published_version_survives_a_restart(root: Path) -> None:
    store = Store(root)
    digest = publish(store, "a", "weights")
    store.close()
    again = Store(root)
    assert again.names() == {"a": NameRecord([digest])}
    assert again.version(digest).digest == digest
    assert (again.folder(digest) / "adapter_model.safetensors").read_text() == "weights"
    assert (again.lowered(digest) / "flat.bin").read_text() == "lowered weights"
    again.verify(digest)
    assert again.broken == {}
    again.close()
    assert listing(root / "versions") == {f"{digest}/{name}" for name in VERSION_FILES}


def test_everything_about_a_name_survives_a_restart(root: Path) -> None:
    store = Store(root)
    first, second = publish(store, "a", "first"), publish(store, "b", "second")
    record = NameRecord([second, first], source="somewhere", pinned=True, unlisted=True)
    store.set_name("a", record)
    store.close()
    again = Store(root)
    assert again.names() == {"a": record, "b": NameRecord([second])}
    again.close()


def test_a_digest_depends_on_configuration_and_weights_not_on_the_readme(root: Path) -> None:
    store = Store(root)
    plain = digest_of(store)
    assert digest_of(store, readme="other") == plain
    assert digest_of(store, alpha=9) != plain
    assert digest_of(store, weights="other") != plain
    pooled = stage(store)
    (pooled / "1_Pooling").mkdir()
    (pooled / "1_Pooling" / "config.json").write_text("{}")
    assert describe_folder(pooled).digest != plain
    store.close()


def test_files_in_a_subfolder_are_kept_and_files_of_no_use_are_not(root: Path) -> None:
    store = Store(root)
    staged = stage(store)
    (staged / "1_Pooling").mkdir()
    (staged / "1_Pooling" / "config.json").write_text("{}")
    (staged / "1_Pooling" / "other").write_text("")
    (staged / "tokenizer.json").write_text("{}")
    version = describe_folder(staged, vocabulary="v")
    store.publish("a", staged, version, NameRecord([version.digest]))
    assert listing(store.folder(version.digest)) == VERSION_FILES | {"1_Pooling/config.json"}
    store.close()
    again = Store(root)
    assert again.version(version.digest) == version
    again.verify(version.digest)
    again.close()


def test_publishing_known_files_keeps_the_version_and_replaces_its_lowered_form(root: Path) -> None:
    store = Store(root)
    digest = publish(store, "a", "weights")
    before = store.version(digest)
    assert publish(store, "b", "weights", lowered="other") == digest
    assert store.version(digest) == before
    assert (store.lowered(digest) / "flat.bin").read_text() == "other"
    assert listing(store.staging) == set()
    store.close()


def test_a_vocabulary_that_comes_with_a_later_upload_is_noted(root: Path) -> None:
    store = Store(root)
    publish(store, "a", "weights")
    staged = stage(store, "weights")
    version = describe_folder(staged, vocabulary="v")
    store.publish("a", staged, version, NameRecord([version.digest]))
    publish(store, "a", "weights")
    store.close()
    again = Store(root)
    assert again.version(version.digest).vocabulary == "v"
    again.close()


def test_the_lowered_form_can_be_replaced(root: Path) -> None:
    store = Store(root)
    digest = publish(store, "a", "weights")
    staged = store.stage()
    (staged / "lowered").mkdir()
    (staged / "lowered" / "new.bin").write_text("new")
    store.replace_lowered(digest, staged)
    assert listing(store.lowered(digest)) == {"new.bin"}
    assert listing(store.staging) | listing(root / "set-aside") == set()
    store.verify(digest)
    store.close()


def test_a_removed_name_and_a_dropped_version_leave_nothing(root: Path) -> None:
    store = Store(root)
    digest = publish(store, "a", "weights")
    with pytest.raises(AdapterBusy):
        store.drop(digest)
    store.remove_name("a")
    store.remove_name("a")
    store.drop(digest)
    store.drop(digest)
    assert store.names() == {}
    with pytest.raises(AdapterBroken):
        store.version(digest)
    store.close()
    assert listing(root) == {"lora-serve-store.json", "lock"}


def test_a_version_that_an_older_entry_of_a_name_refers_to_is_not_dropped(root: Path) -> None:
    store = Store(root)
    first, second = publish(store, "a", "first"), publish(store, "b", "second")
    store.set_name("b", NameRecord([second, first]))
    store.remove_name("a")
    with pytest.raises(AdapterBusy):
        store.drop(first)
    store.close()


@pytest.mark.parametrize("name", ["", "../a", "a/b", ".a", "a" * 65, "a\n"])
def test_an_invalid_name_reaches_no_file(root: Path, name: str) -> None:
    store = Store(root)
    digest = publish(store, "a", "weights")
    before = listing(root)
    for act in (
        lambda: store.set_name(name, NameRecord([digest])),
        lambda: store.remove_name(name),
        lambda: publish(store, name, "weights"),
    ):
        with pytest.raises(BadRequest):
            act()
    assert listing(root) - listing(root / "staging") >= before
    assert set(store.names()) == {"a"}
    store.close()


# --- folders that are published --------------------------------------------------------------------------------------


def test_only_staged_folders_are_published(root: Path, tmp_path: Path) -> None:
    store = Store(root)
    outside = stage(store).rename(tmp_path / "outside")
    assert not store.is_staged(outside)
    assert not store.is_staged(store.staging)
    assert not store.is_staged(store.staging / ".." / "versions")
    assert store.is_staged(store.staging / "upload" / "adapter")
    version = describe_folder(outside)
    with pytest.raises(ValueError, match="staged"):
        store.publish("a", outside, version, NameRecord([version.digest]))
    assert outside.is_dir()
    store.close()


def test_links_pipes_and_missing_files_are_refused(root: Path, tmp_path: Path) -> None:
    store = Store(root)
    (tmp_path / "secret").write_text("{}")
    for name in ("adapter_config.json", "adapter_model.safetensors", "README.md"):
        staged = stage(store)
        (staged / name).unlink()
        (staged / name).symlink_to(tmp_path / "secret")
        with pytest.raises(AdapterInvalid, match=f"{name} is a link"):
            describe_folder(staged)
        (staged / name).unlink()
        os.mkfifo(staged / name)
        with pytest.raises(AdapterInvalid, match=f"{name} is not a regular file"):
            describe_folder(staged)
        if name != "README.md":
            (staged / name).unlink()
            with pytest.raises(AdapterInvalid, match=f"{name} is missing"):
                describe_folder(staged)
    staged = stage(store)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "config.json").write_text("{}")
    (staged / "1_Pooling").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(AdapterInvalid, match="1_Pooling is a link"):
        describe_folder(staged)
    store.close()


def test_files_that_change_before_they_are_published_are_refused(root: Path) -> None:
    store = Store(root)
    staged = stage(store)
    version = describe_folder(staged)
    (staged / "adapter_model.safetensors").write_text("longer than before")
    with pytest.raises(AdapterInvalid, match="changed"):
        store.publish("a", staged, version, NameRecord([version.digest]))
    assert store.names() == {}
    store.close()


# --- opening ---------------------------------------------------------------------------------------------------------


def test_one_process_at_a_time_has_a_store_open(root: Path) -> None:
    store = Store(root)
    with pytest.raises(Unavailable, match="another server"):
        Store(root)
    store.close()
    store.close()
    Store(root).close()


def test_a_store_is_for_one_base(root: Path) -> None:
    Store(root, base="1" * 64, model="llama").close()
    Store(root, base="1" * 64, model="llama, renamed").close()
    Store(root).close()
    with pytest.raises(
        StoreUnusable, match=r"is for llama \(fingerprint 111111111111\), not for qwen \(222222222222\)"
    ):
        Store(root, base="2" * 64, model="qwen")
    marker = json.loads((root / "lora-serve-store.json").read_text())
    assert marker == {"format": 2, "base": "1" * 64, "model": "llama"}


def test_a_store_that_was_made_without_a_base_is_for_the_first_that_opens_it(root: Path) -> None:
    Store(root).close()
    Store(root, base="1" * 64, model="llama").close()
    with pytest.raises(StoreUnusable, match="llama"):
        Store(root, base="2" * 64, model="qwen")


def test_unfinished_uploads_are_swept(root: Path) -> None:
    store = Store(root)
    store.stage()
    (store.staging / f"upload-{uuid.uuid4().hex}" / "adapter").mkdir(parents=True)
    store.close()
    again = Store(root)
    assert listing(again.staging) == set()
    assert not list((root / "set-aside").iterdir())
    assert again.notes == []
    again.close()


def test_an_upload_that_is_still_received_is_not_swept(root: Path) -> None:
    """The engine is restarted while the API process goes on."""
    store = Store(root)
    upload = store.staging / f"upload-{uuid.uuid4().hex}"
    upload.mkdir()
    (upload / "file").write_text("half")
    lock = os.open(upload, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_SH)
    store.close()
    Store(root).close()
    assert (upload / "file").exists()
    os.close(lock)
    Store(root).close()
    assert not upload.exists()
