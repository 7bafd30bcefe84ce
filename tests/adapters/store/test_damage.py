"""A damaged store: one broken adapter is listed with its reason, the others are served, and nothing foreign is lost."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
from store_files import listing, publish

from lora_serve.adapters.store.folder import StoreFolder
from lora_serve.adapters.store.records import NameRecord, VersionRecord, describe_folder, read_sealed, seal
from lora_serve.adapters.store.scan import scan_store
from lora_serve.adapters.store.store import Store
from lora_serve.errors import AdapterBroken, StoreUnusable

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Path]:
    """A store with the names `a` and `b`."""
    store = Store(tmp_path / "store")
    publish(store, "a", "of a")
    publish(store, "b", "of b")
    store.close()
    yield tmp_path / "store"
    os.chmod(tmp_path / "store", 0o755)


def version_folder(root: Path, name: str = "a") -> Path:
    return root / "versions" / scan_store(StoreFolder(root)).names[name].versions[0]


def edit_record(path: Path, edit: Callable[[dict[str, object]], object]) -> None:
    record = json.loads(path.read_text())
    edit(record["content"])
    path.write_text(json.dumps(record))


# --- damage that is seen when the store is opened --------------------------------------------------------------------


def empty_name(root: Path) -> None:
    (root / "names" / "a.json").write_text("")


def zeroed_name(root: Path) -> None:
    """As some file systems leave a file after a power cut."""
    (root / "names" / "a.json").write_bytes(b"\0" * 200)


def truncated_name(root: Path) -> None:
    path = root / "names" / "a.json"
    path.write_text(path.read_text()[:-20])


def edited_name(root: Path) -> None:
    other = version_folder(root, "b").name
    edit_record(root / "names" / "a.json", lambda content: content.update(versions=[other]))


def older_name(root: Path) -> None:
    (root / "names" / "a.json").write_text(json.dumps({"digest": "a" * 64, "created": 1.5, "source": ""}))


def binary_name(root: Path) -> None:
    (root / "names" / "a.json").write_bytes(b"\xff\xfe\x00")


def empty_version(root: Path) -> None:
    (version_folder(root) / "version.json").write_text("")


def truncated_version(root: Path) -> None:
    path = version_folder(root) / "version.json"
    path.write_text(path.read_text()[:40])


def edited_version(root: Path) -> None:
    edit_record(version_folder(root) / "version.json", lambda content: content.update(created=0.0))


def contradictory_version(root: Path) -> None:
    """Other weights, with a record and a checksum that fit them."""
    path = version_folder(root) / "version.json"
    (path.parent / WEIGHTS).write_text("other")
    files = describe_folder(path.parent).files
    record = read_sealed(path, VersionRecord)
    path.write_bytes(seal(msgspec.structs.replace(record, files=files)))


def older_version(root: Path) -> None:
    path = version_folder(root) / "version.json"
    path.write_text(json.dumps({"created": 1.5, "rank": 4, "modules": 1, "elements": 8}))


def no_version(root: Path) -> None:
    (version_folder(root) / "version.json").unlink()


def pipe_for_version(root: Path) -> None:
    """Opening it would wait for ever."""
    (version_folder(root) / "version.json").unlink()
    os.mkfifo(version_folder(root) / "version.json")


def swapped_versions(root: Path) -> None:
    """The files of another version under this one's digest."""
    folder, other = version_folder(root), version_folder(root, "b")
    for path in other.rglob("*"):
        if path.is_file():
            (folder / path.relative_to(other)).write_bytes(path.read_bytes())


def missing_folder(root: Path) -> None:
    version_folder(root).rename(root.parent / "elsewhere")


def file_for_folder(root: Path) -> None:
    folder = version_folder(root)
    folder.rename(root.parent / "elsewhere")
    folder.write_text("")


def missing_weights(root: Path) -> None:
    (version_folder(root) / WEIGHTS).unlink()


def truncated_weights(root: Path) -> None:
    (version_folder(root) / WEIGHTS).write_text("o")


def linked_weights(root: Path) -> None:
    path = version_folder(root) / WEIGHTS
    path.rename(root.parent / "weights")
    path.symlink_to(root.parent / "weights")


SEEN_AT_OPENING = {
    empty_name: "a.json is empty",
    zeroed_name: "a.json is empty",
    truncated_name: "a.json is truncated or not JSON",
    edited_name: "a.json has been altered: its checksum does not fit",
    older_name: "a.json is not of the format that this version of lora-serve writes",
    binary_name: "a.json is truncated or not JSON",
    empty_version: "version.json is empty",
    truncated_version: "version.json is truncated or not JSON",
    edited_version: "version.json has been altered: its checksum does not fit",
    contradictory_version: "version.json contradicts itself",
    older_version: "version.json is not of the format that this version of lora-serve writes",
    no_version: "version.json is missing",
    pipe_for_version: "version.json is not a file of at most 16,777,216 bytes",
    swapped_versions: "version.json is of another version",
    missing_folder: "its folder is missing",
    file_for_folder: "its folder is missing",
    missing_weights: f"{WEIGHTS} is missing",
    truncated_weights: f"{WEIGHTS} has 1 bytes instead of 4",
    linked_weights: f"{WEIGHTS} is not a regular file",
}


@pytest.mark.parametrize("damage", SEEN_AT_OPENING)
def test_a_damaged_adapter_is_listed_with_its_reason_and_the_others_are_served(
    root: Path, damage: Callable[[Path], None]
) -> None:
    damage(root)
    store = Store(root)
    assert store.broken == {"a": SEEN_AT_OPENING[damage]}
    (b,) = store.names()["b"].versions
    store.verify(b)
    if "a" in store.names():  # its record is readable
        (a,) = store.names()["a"].versions
        reason = SEEN_AT_OPENING[damage].replace("(", "\\(")
        with pytest.raises(AdapterBroken, match=f"version {a[:12]} of adapter a is broken in the store: {reason}"):
            store.version(a)
        with pytest.raises(AdapterBroken):
            store.verify(a)
    store.close()


@pytest.mark.parametrize("damage", SEEN_AT_OPENING)
def test_publishing_again_repairs_a_damaged_adapter(root: Path, damage: Callable[[Path], None]) -> None:
    damage(root)
    damaged = {path.read_bytes() for path in (root / "names").iterdir()}
    store = Store(root)
    digest = publish(store, "a", "of a")
    assert store.broken == {}
    kept = {path.read_bytes() for folder in ("names", "set-aside/names") for path in (root / folder).glob("*")}
    assert kept >= damaged
    store.verify(digest)
    store.close()
    again = Store(root)
    assert again.broken == {}
    assert again.names()["a"] == NameRecord([digest])
    again.verify(digest)
    again.close()


@pytest.mark.parametrize("damage", SEEN_AT_OPENING)
def test_a_damaged_adapter_can_be_removed_and_the_store_opened_again(
    root: Path, damage: Callable[[Path], None]
) -> None:
    damage(root)
    store = Store(root)
    record = store.names().get("a")
    store.remove_name("a")
    if record is not None:
        store.drop(record.versions[0])
    assert store.broken == {}
    store.close()
    again = Store(root)
    assert again.names().keys() == {"b"}
    assert again.broken == {}
    again.close()


# --- damage that only hashing finds ----------------------------------------------------------------------------------


def flipped_bit(root: Path) -> None:
    path = version_folder(root) / WEIGHTS
    data = bytearray(path.read_bytes())
    data[1] ^= 4
    path.write_bytes(data)


def edited_alpha(root: Path) -> None:
    (version_folder(root) / "adapter_config.json").write_text('{"lora_alpha": 9}')


def edited_readme(root: Path) -> None:
    (version_folder(root) / "README.md").write_text("drac")


@pytest.mark.parametrize(
    ("damage", "file"),
    [(flipped_bit, WEIGHTS), (edited_alpha, "adapter_config.json"), (edited_readme, "README.md")],
)
def test_altered_files_are_found_when_they_are_hashed_and_repaired_by_publishing(
    root: Path, damage: Callable[[Path], None], file: str
) -> None:
    damage(root)
    store = Store(root)
    assert store.broken == {}
    (digest,) = store.names()["a"].versions
    with pytest.raises(AdapterBroken, match=f"{file} has been altered"):
        store.verify(digest)
    store.mark_broken("a", "it has been altered")
    store.set_name("a", NameRecord([digest], pinned=True))
    assert store.broken == {"a": "it has been altered"}
    publish(store, "c", "of a")
    store.verify(digest)
    assert store.broken == {}
    store.close()
    assert len([*(root / "set-aside" / "versions").iterdir()]) == 1


def test_a_broken_mark_ends_when_the_name_gets_another_version(root: Path) -> None:
    store = Store(root)
    store.mark_broken("a", "reason")
    store.set_name("a", store.names()["b"])
    assert store.broken == {}
    store.set_name("a", NameRecord(["0" * 64]))
    assert store.broken == {"a": "its folder is missing"}
    store.close()


def test_a_record_that_was_only_laid_out_anew_is_not_damaged(root: Path) -> None:
    for path in (root / "names" / "a.json", version_folder(root) / "version.json"):
        path.write_text(json.dumps(json.loads(path.read_text()), indent=8, sort_keys=True))
    store = Store(root)
    assert store.broken == {}
    store.close()


def test_a_damaged_older_version_does_not_break_the_name(root: Path) -> None:
    store = Store(root)
    (a,), (b,) = (store.names()[name].versions for name in "ab")
    store.set_name("b", NameRecord([b, a]))
    store.close()
    (root / "versions" / a / WEIGHTS).unlink()
    again = Store(root)
    assert again.broken.keys() == {"a"}
    again.verify(b)
    with pytest.raises(AdapterBroken):
        again.version(a)
    again.close()


# --- what is not the store's -----------------------------------------------------------------------------------------


def test_what_others_put_into_the_store_is_set_aside_not_deleted(root: Path, tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "precious").write_text("precious")
    (root / "names" / "a.json~").write_text("stray 1")
    (root / "names" / "c.json").mkdir()
    (root / "names" / "c.json" / "x").write_text("stray 2")
    (root / "names" / ".hidden.json").write_text("stray 3")
    (root / "names" / "d.json").symlink_to(tmp_path / "outside" / "precious")
    (root / "versions" / "backup").mkdir()
    (root / "versions" / "backup" / "x").write_text("stray 4")
    (root / "versions" / "note.txt").write_text("stray 5")
    (root / "versions" / ("f" * 64)).symlink_to(tmp_path / "outside")
    (root / "staging" / "upload-of-mine").mkdir()
    (root / "staging" / "upload-of-mine" / "x").write_text("stray 6")
    (root / "staging" / f"upload-{'0' * 32}").symlink_to(tmp_path / "outside")
    store = Store(root)
    assert store.names().keys() == {"a", "b"}
    assert store.broken == {}
    assert listing(store.staging) == set()
    store.close()
    aside = root / "set-aside"
    found = {(aside / path).read_text() for path in listing(aside) if not (aside / path).is_dir()}
    assert found == {f"stray {n}" for n in range(1, 7)} | {"precious"}
    assert (tmp_path / "outside" / "precious").read_text() == "precious"
    assert any("a.json~" in note and str(aside) in note for note in store.notes)


def test_what_others_put_into_a_version_is_set_aside_when_the_version_is_deleted(root: Path) -> None:
    folder = version_folder(root)
    (folder / "notes.txt").write_text("mine")
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "notes.txt").write_text("mine too")
    store = Store(root)
    store.remove_name("a")
    store.drop(folder.name)
    store.close()
    aside = root / "set-aside"
    assert {(aside / path).read_text() for path in listing(aside)} == {"mine", "mine too"}
    assert not folder.exists()


def test_things_of_one_name_are_set_aside_beside_each_other(root: Path) -> None:
    for content in ("1", "2", "3"):
        (root / "names" / "notes.txt").write_text(content)
        Store(root).close()
    assert {path.read_text() for path in (root / "set-aside" / "names").iterdir()} == {"1", "2", "3"}


def test_a_partial_restore_loses_nothing(root: Path, tmp_path: Path) -> None:
    """A name's record is gone for one start, and comes back from a backup."""
    backup = (root / "names" / "a.json").rename(tmp_path / "a.json")
    store = Store(root)
    assert store.names().keys() == {"b"}
    assert any("versions without a name" in note for note in store.notes)
    store.close()
    backup.rename(root / "names" / "a.json")
    again = Store(root)
    assert again.broken == {}
    again.verify(again.names()["a"].versions[0])
    again.close()


def test_of_two_set_aside_versions_the_undamaged_one_comes_back(root: Path, tmp_path: Path) -> None:
    digest = version_folder(root).name
    (root / "versions" / digest / WEIGHTS).write_text("cut")
    store = Store(root)
    publish(store, "a", "of a")
    store.remove_name("a")
    store.close()
    Store(root).close()
    assert len([*(root / "set-aside" / "versions").iterdir()]) == 2
    again = Store(root)
    again.set_name("a", NameRecord([digest]))
    again.close()
    last = Store(root)
    assert last.broken == {}
    last.verify(digest)
    last.close()


def test_files_beside_the_stores_own_are_left_where_they_are(root: Path) -> None:
    (root / "README").write_text("where this comes from")
    (root / "lost+found").mkdir()
    store = Store(root)
    assert store.notes == []
    store.close()
    assert (root / "README").exists()


# --- folders that cannot be a store ----------------------------------------------------------------------------------


def test_somebodys_folder_is_refused_and_stays_as_it_is(tmp_path: Path) -> None:
    for name in ("thesis.tex", "versions/note", "names/x.json", "staging/x", ".git/config"):
        root = tmp_path / name.replace("/", "-")
        (root / name).parent.mkdir(parents=True)
        (root / name).write_text("mine")
        with pytest.raises(StoreUnusable, match="is not an adapter store and not empty") as refused:
            Store(root)
        assert str(root) in refused.value.message
        assert listing(root) == {name}


@pytest.mark.parametrize("content", ["", "{", "[]", '{"format": "x"}', '{"base": ""}'])
def test_a_damaged_marker_is_refused_with_the_way_out(root: Path, content: str) -> None:
    (root / "lora-serve-store.json").write_text(content)
    with pytest.raises(StoreUnusable, match=f"damaged lora-serve-store.json.*lora-serve store import {root}"):
        Store(root)


def test_a_store_of_a_later_format_is_refused(root: Path) -> None:
    (root / "lora-serve-store.json").write_text('{"format": 3, "whatever": []}')
    with pytest.raises(StoreUnusable, match="has format 3"):
        Store(root)


def test_an_empty_volume_becomes_a_store(tmp_path: Path) -> None:
    (tmp_path / "volume" / "lost+found").mkdir(parents=True)
    store = Store(tmp_path / "volume")
    publish(store, "a", "of a")
    store.close()


@pytest.mark.parametrize(
    ("folder", "reason"),
    [("file", "Not a directory"), ("file/store", "Not a directory"), ("x" * 300, "File name too long")],
)
def test_an_impossible_folder_is_refused_in_one_line(tmp_path: Path, folder: str, reason: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreUnusable) as refused:
        Store(tmp_path / folder)
    assert refused.value.message == f"the adapter store {tmp_path / folder} cannot be used: {reason}"


@pytest.mark.parametrize("part", ["", "names", "versions", "staging"])
def test_a_folder_without_permission_is_refused_in_one_line(root: Path, part: str) -> None:
    (root / "lock").unlink()
    os.chmod(root / part, 0o555)
    if os.access(root / part, os.W_OK):
        pytest.skip("permissions do not bind this user")
    with pytest.raises(StoreUnusable, match=f"the adapter store {root} cannot be used"):
        Store(root)
    os.chmod(root / part, 0o755)


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs a file system that cannot be written")
def test_a_read_only_file_system_is_refused_in_one_line() -> None:
    with pytest.raises(StoreUnusable, match="the adapter store /proc/store cannot be used: "):
        Store(Path("/proc/store"))
