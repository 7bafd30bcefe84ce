"""A watched folder: what is added, changed and removed, half-written folders, and what is said, once."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path, PurePath
from typing import Any

import pytest
from peft_folders import write
from registry_harness import RegistryHarness

from lora_serve.adapters import folder_watch
from lora_serve.adapters.folder_watch import FolderScanner, FolderWatch
from lora_serve.adapters.workers import Workers
from lora_serve.errors import ServeError, StorageFull
from lora_serve.messages import AliasTarget, DeleteAlias, Publish, PutAlias


class Watched:
    """A watched folder of a server, scanned when the test says so."""

    def __init__(self, root: Path, store: Path) -> None:
        self.root = root
        self.harness = RegistryHarness(store)
        self._scanner = FolderScanner(root)
        first = self._scanner.scan()
        assert first is not None
        self.notes = self.harness.publish_folders(root)
        self._running = 0
        self.watch = FolderWatch(root, self, self.harness.residency, first)  # type: ignore[arg-type]

    def publish(self, operation: Publish, done: Any) -> None:
        try:
            self.harness.operations.publish(operation, self._counted(done))
        except ServeError:
            self._running -= 1
            raise

    def delete(self, name: str, done: Any) -> None:
        self.harness.operations.delete(name, self._counted(done))

    def _counted(self, done: Any) -> Any:
        """`done`, while which is awaited an operation runs."""

        def ended(result: Any) -> None:
            self._running -= 1
            done(result)

        self._running += 1
        return ended

    def scan(self, times: int = 2) -> None:
        for _ in range(times):
            self.watch.handle(self._scanner.scan())
            self.harness.wait_until(lambda: not self._running)

    def write(self, name: str, seed: int = 0, **config: Any) -> Path:
        return write(self.root / name, self.harness.tensors(seed), **config)

    @property
    def digests(self) -> dict[str, str]:
        return {info.name: info.versions[0].digest for info in self.harness.operations.describe_some("")}

    def close(self) -> None:
        self.harness.registry.close()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "adapters"
    root.mkdir()
    write(root / "first", RegistryHarness.tensors(0))
    return root


@pytest.fixture
def watched(root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> Any:
    caplog.set_level(logging.INFO)
    watched = Watched(root, tmp_path)
    yield watched
    watched.close()


def test_what_is_added_changed_and_removed_is_followed(watched: Watched, caplog: pytest.LogCaptureFixture) -> None:
    before = watched.digests
    watched.write("second", 1)
    watched.scan()
    assert watched.digests.keys() == {"first", "second"}
    shutil.rmtree(watched.root / "first")
    watched.write("first", 2)
    watched.scan(3)
    assert watched.digests["first"] != before["first"]
    shutil.rmtree(watched.root / "second")
    watched.scan()
    assert watched.digests.keys() == {"first"}
    assert [record.getMessage().split(" as ")[0] for record in caplog.records] == [
        "adapter second is published",
        "adapter first is published",
        "adapter second is unpublished: it is no longer in the folder",
    ]


def test_nothing_is_done_while_nothing_changes(
    watched: Watched, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched.scan(3)
    assert caplog.records == []
    scan = FolderScanner(watched.root).scan()
    with monkeypatch.context() as patch:
        patch.delattr(PurePath, "__truediv__")  # handling a scan makes no path for each name: there may be many
        watched.watch.handle(scan)


def test_a_folder_that_is_being_written_is_left_alone(watched: Watched, caplog: pytest.LogCaptureFixture) -> None:
    whole = watched.write("../later", 1)
    content = (whole / "adapter_model.safetensors").read_bytes()
    folder = watched.root / "later"
    folder.mkdir()
    shutil.copy(whole / "adapter_config.json", folder)
    for part in (100, 1000, len(content)):
        (folder / "adapter_model.safetensors").write_bytes(content[:part])
        watched.scan(1)
        assert "later" not in watched.digests
    assert caplog.records == []
    watched.scan(1)
    assert "later" in watched.digests


def test_a_truncated_adapter_is_said_once_and_tried_again_when_it_changes(
    watched: Watched, caplog: pytest.LogCaptureFixture
) -> None:
    folder = watched.write("poet", 1)
    weights = folder / "adapter_model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:1000])
    watched.scan(6)
    assert "poet" not in watched.digests
    (record,) = caplog.records
    assert record.getMessage().startswith("poet is not served: ")
    weights.write_bytes(content)
    watched.scan()
    assert "poet" in watched.digests


def test_a_full_disk_is_said_once_and_the_adapter_tried_again(
    watched: Watched, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder_watch, "TRY_AGAIN", 3)
    publish = watched.harness.operations.publish

    def full(operation: Publish, done: Any) -> None:
        done(StorageFull("the disk of the adapter store is full"))

    monkeypatch.setattr(watched.harness.operations, "publish", full)
    watched.write("poet", 1)
    watched.scan(9)
    assert [record.getMessage() for record in caplog.records] == [
        "poet is not served: the disk of the adapter store is full"
    ]
    monkeypatch.setattr(watched.harness.operations, "publish", publish)
    watched.scan(6)
    assert "poet" in watched.digests


def test_a_folder_with_the_name_of_an_alias_is_published_once_the_alias_is_gone(
    watched: Watched, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder_watch, "TRY_AGAIN", 3)
    harness = watched.harness
    harness.run(lambda done: harness.operations.aliases.put(PutAlias("poet", [AliasTarget("first")]), done))
    watched.write("poet", 1)
    watched.scan(9)
    assert [record.getMessage().split(":")[0] for record in caplog.records] == ["poet is not served"]
    harness.run(lambda done: harness.operations.aliases.delete(DeleteAlias("poet"), done))
    watched.scan(6)
    assert "poet" in watched.digests


def test_a_name_cannot_write_lines_of_the_log(watched: Watched, caplog: pytest.LogCaptureFixture) -> None:
    (watched.root / "a\nadapter poet is published").mkdir()
    watched.scan()
    (record,) = caplog.records
    assert "\n" not in record.getMessage()


def test_what_is_no_adapter_is_said_once(watched: Watched, caplog: pytest.LogCaptureFixture) -> None:
    (watched.root / "notes").mkdir()
    (watched.root / ".hidden").mkdir()
    (watched.root / "file.txt").write_text("")
    watched.write("bad name")
    watched.write("nested/deeper/run", 1)
    watched.scan(4)
    assert sorted(record.getMessage() for record in caplog.records) == [
        "bad name is not served: a name is 1 to 64 letters, digits, '.', '_' or '-', a letter or digit first",
        "nested is not served: the adapter is further inside, in deeper/run; put it where it is seen",
        "notes is not served: adapter_config.json is missing",
    ]


def test_a_folder_that_cannot_be_read_stays_as_it_is_and_the_others_are_followed(
    watched: Watched, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refused by hand: root reads everything."""
    forbidden, stat = {"first", "private"}, Path.stat

    def refuse(path: Path, **given: Any) -> Any:
        if path.parent.name in forbidden:
            raise PermissionError(13, "Permission denied", str(path))
        return stat(path, **given)

    monkeypatch.setattr(Path, "stat", refuse)
    (watched.root / "private").mkdir()
    watched.write("second", 1)
    watched.scan(4)
    assert watched.digests.keys() == {"first", "second"}
    lines = [f"{name} is not followed: it cannot be read: Permission denied" for name in ("first", "private")]
    assert [record.getMessage() for record in caplog.records if "cannot" in record.getMessage()] == lines
    assert watched.harness.publish_folders(watched.root) == [  # as at start
        f"{name} is not published: it cannot be read: Permission denied" for name in ("first", "private")
    ]
    forbidden.clear()
    shutil.rmtree(watched.root / "first")
    watched.scan(3)
    assert watched.digests.keys() == {"second"}


def test_a_folder_that_vanishes_during_a_scan_is_passed_over(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = watched.root / "gone"
    gone.mkdir()
    real = FolderScanner._describe

    def vanish(self: Any, folder: Path) -> Any:
        if folder == gone:
            gone.rmdir()
        return real(self, folder)

    monkeypatch.setattr(FolderScanner, "_describe", vanish)
    scan = FolderScanner(watched.root).scan()
    assert scan is not None
    assert scan.keys() == {"first"}


def test_only_what_came_from_the_folder_is_unpublished(watched: Watched) -> None:
    watched.harness.publish("uploaded", seed=3)
    watched.harness.publish("first", seed=4, replace=True)  # an upload over the folder's
    shutil.rmtree(watched.root / "first")
    watched.scan(3)
    assert watched.digests.keys() == {"uploaded", "first"}


def test_what_vanished_while_the_server_was_down_is_unpublished(watched: Watched, root: Path, tmp_path: Path) -> None:
    watched.write("second", 1)
    watched.scan()
    watched.harness.publish("uploaded", seed=3)
    watched.close()
    shutil.rmtree(root / "first")
    again = Watched(root, tmp_path)
    assert again.digests.keys() == {"first", "second", "uploaded"}
    again.scan()
    assert again.digests.keys() == {"second", "uploaded"}
    again.close()


def test_a_share_that_is_not_mounted_unpublishes_nothing(
    watched: Watched, root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root.rename(tmp_path / "elsewhere")
    watched.scan(3)
    root.mkdir()
    watched.scan(3)
    assert watched.digests.keys() == {"first"}
    assert [record.getMessage() for record in caplog.records] == [
        f"{root} cannot be read; its adapters stay as they are"
    ]
    watched.close()
    again = Watched(root, tmp_path)  # still not mounted
    again.scan(3)
    assert again.digests.keys() == {"first"}
    again.close()


def test_an_adapter_that_an_admin_deleted_stays_deleted_until_its_folder_changes(watched: Watched) -> None:
    watched.harness.run(lambda done: watched.harness.operations.delete("first", done))
    watched.scan(3)
    assert watched.digests == {}
    shutil.rmtree(watched.root / "first")
    watched.write("first", 5)
    watched.scan(3)
    assert watched.digests.keys() == {"first"}


def test_work_is_repeated_until_the_workers_are_closed() -> None:
    workers, found = Workers(lambda: None, compilers=1), []
    workers.repeat(lambda: 7, found.append, 0.001)
    while len(found) < 3:
        workers.poll(timeout=1.0)
    workers.close()
    assert set(found) == {7}
