"""A shared store in a folder: changes race without a loss, late writers are found out, and nothing begins elsewhere."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest
from failing_disk import QuickDisk

from lora_serve.adapters.shared.folder_objects import KEPT_GENERATIONS, FolderObjects
from lora_serve.adapters.shared.shared_objects import (
    ObjectConflict,
    ObjectsUnreachable,
    OutcomeUnknown,
    SharedObjects,
)
from lora_serve.adapters.shared.store_probe import check_preconditions
from lora_serve.errors import StorageFull, StoreUnusable


@pytest.fixture
def folder(tmp_path: Path) -> FolderObjects:
    return FolderObjects(tmp_path, QuickDisk())


def add_all(objects: SharedObjects, ids: Iterable[str]) -> None:
    """Add ids to a list, each until it is there: again whenever somebody was faster."""
    for id in ids:
        while True:
            found = objects.read("list")
            assert found is not None
            assert found.data is not None
            if id in found.data.decode().split():
                break
            with suppress(ObjectConflict, OutcomeUnknown):
                objects.replace("list", found.data + f"{id} ".encode(), found.tag)


def test_writers_that_race_lose_nothing(folder: FolderObjects, tmp_path: Path) -> None:
    folder.create("list", b"")
    ids = [[f"{writer}.{number}" for number in range(15)] for writer in range(6)]
    with ThreadPoolExecutor(6) as writers:
        for each in [writers.submit(add_all, FolderObjects(tmp_path, QuickDisk()), own) for own in ids]:
            each.result()
    found = folder.read("list")
    assert found is not None
    assert found.data is not None
    assert sorted(found.data.decode().split()) == sorted(id for own in ids for id in own)
    assert len(os.listdir(tmp_path / "list")) <= KEPT_GENERATIONS + 6
    assert folder.read("list", found.tag) == (None, found.tag)


def test_one_of_those_who_begin_an_object_does(tmp_path: Path) -> None:
    def begin(number: int) -> bool:
        try:
            FolderObjects(tmp_path, QuickDisk()).create("object", str(number).encode())
        except ObjectConflict:
            return False
        return True

    with ThreadPoolExecutor(8) as writers:
        assert sum(writers.map(begin, range(8))) == 1


def test_who_was_away_for_long_does_not_change_what_is_there(folder: FolderObjects) -> None:
    """Its next number is free again, since that generation was removed."""
    tag = first = folder.create("object", b"0")
    for number in range(1, KEPT_GENERATIONS + 5):
        tag = folder.replace("object", str(number).encode(), tag)
    with pytest.raises(OutcomeUnknown):
        folder.replace("object", b"late", first)
    found = folder.read("object")
    assert found is not None
    assert (found.data, found.tag) == (str(KEPT_GENERATIONS + 4).encode(), tag)
    assert folder.replace("object", b"next", tag)


def test_a_request_that_was_repeated_by_the_file_system_counts_once(
    folder: FolderObjects, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = os.link

    def twice(source: Path, target: Path) -> None:
        link(source, target)
        raise FileExistsError(17, "File exists")

    tag = folder.create("object", b"0")
    monkeypatch.setattr(os, "link", twice)
    assert folder.replace("object", b"1", tag) == "2"


def test_no_store_begins_where_the_share_is_not_mounted(tmp_path: Path) -> None:
    away = FolderObjects(tmp_path / "share")
    changes: tuple[Callable[[], object], ...] = (
        lambda: away.read("object"),
        lambda: away.create("object", b""),
        lambda: away.upload("contents/a/b/c", Path(__file__)),
    )
    for change in changes:
        with pytest.raises(ObjectsUnreachable, match="No such file"):
            change()
    assert not (tmp_path / "share").exists()


def test_files_come_and_go_whole(folder: FolderObjects, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(bytes(range(256)) * 5000)
    folder.upload("contents/digest/upload/1_Pooling/config.json", source)
    folder.download("contents/digest/upload/1_Pooling/config.json", tmp_path / "copy", source.stat().st_size)
    assert (tmp_path / "copy").read_bytes() == source.read_bytes()
    folder.download("contents/digest/upload/1_Pooling/config.json", tmp_path / "part", 1000)
    assert (tmp_path / "part").read_bytes() == source.read_bytes()[:1000]
    assert [each.key for each in folder.files("contents")] == ["contents/digest/upload/1_Pooling/config.json"]
    with pytest.raises(FileNotFoundError):
        folder.download("contents/digest/upload/missing", tmp_path / "none", 1)
    folder.remove_file("contents/digest/upload/1_Pooling/config.json")
    assert list((tmp_path / "contents").iterdir()) == []
    assert list((tmp_path / "unfinished").iterdir()) == []


def test_a_full_store_is_said_and_nothing_stays(tmp_path: Path) -> None:
    class Full(QuickDisk):
        def copy(self, source: Path, target: Path) -> None:
            target.write_bytes(b"half")
            raise OSError(28, "No space left on device")

    with pytest.raises(StorageFull, match="the shared store is full"):
        FolderObjects(tmp_path, Full()).upload("contents/a/b/c", Path(__file__))
    assert list((tmp_path / "unfinished").iterdir()) == []


def test_a_folder_passes_the_probe_and_one_without_hard_links_is_refused(
    folder: FolderObjects, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_preconditions(folder)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]

    def none(source: Path, target: Path) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", none)
    with pytest.raises(StoreUnusable, match="has no hard links"):
        check_preconditions(folder)
