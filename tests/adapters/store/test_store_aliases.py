"""Aliases in the store: records that survive, damaged ones that are told, and versions that their names keep."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from store_files import listing, publish

from lora_serve.adapters.store.records import AliasRecord, NameRecord, TargetRecord
from lora_serve.adapters.store.store import Store
from lora_serve.errors import AdapterBusy, BadRequest


def two_versions(store: Store) -> tuple[str, str]:
    """Digests of an older version of `a`, which its record has no more, and of the newest."""
    old = publish(store, "a", "old")
    return old, publish(store, "a", "new")


def test_an_alias_survives_and_its_names_keep_what_it_names(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    old, new = two_versions(store)
    record = AliasRecord([TargetRecord("a", old, 95.0), TargetRecord("a")], "header:X-Session", 7.0)
    store.set_alias("prod", record)
    assert store.names()["a"].versions == [new, old]
    third = publish(store, "a", "third")  # with a record of this version alone
    assert store.names()["a"].versions == [third, old]
    with pytest.raises(AdapterBusy):
        store.drop(old)
    store.drop(new)
    store.close()
    again = Store(tmp_path / "store")
    assert (again.aliases(), again.notes) == ({"prod": record}, [])
    assert again.names()["a"].versions == [third, old]
    again.remove_alias("prod")
    again.set_name("a", NameRecord([third]))
    again.drop(old)
    assert again.aliases() == {}
    again.close()


def test_a_store_of_a_release_without_aliases_opens(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    publish(store, "a", "of a")
    store.close()
    shutil.rmtree(tmp_path / "store" / "aliases")
    again = Store(tmp_path / "store")
    assert (again.aliases(), list(again.names()), again.notes) == ({}, ["a"], [])
    again.set_alias("prod", AliasRecord([TargetRecord("a")]))
    again.close()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "is empty"),
        ('{"checksum": "0", "content": {"targets": []}}', "has been altered: its checksum does not fit"),
        ("{", "is truncated or not JSON"),
    ],
)
def test_a_damaged_alias_is_told_and_keeps_all_versions_until_it_is_replaced(
    tmp_path: Path, content: str, reason: str
) -> None:
    store = Store(tmp_path / "store")
    old, new = two_versions(store)
    store.set_alias("prod", AliasRecord([TargetRecord("a", old)]))
    store.close()
    (tmp_path / "store" / "aliases" / "prod.json").write_text(content)
    again = Store(tmp_path / "store")
    assert again.unreadable_aliases() == {"prod": f"prod.json {reason}"}
    assert again.broken == {}
    again.set_name("a", NameRecord([new]))
    assert again.names()["a"].versions == [new, old]
    again.set_alias("prod", AliasRecord([TargetRecord("a")]))
    assert again.unreadable_aliases() == {}
    again.set_name("a", NameRecord([new]))
    assert again.names()["a"].versions == [new]
    assert (tmp_path / "store" / "set-aside" / "aliases" / "prod.json").read_text() == content
    again.close()


def test_a_damaged_alias_can_be_removed_and_what_is_no_alias_is_set_aside(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    store.close()
    for name in ("prod.json", "notes.txt"):
        (tmp_path / "store" / "aliases" / name).write_text("mine")
    again = Store(tmp_path / "store")
    again.remove_alias("prod")
    again.remove_alias("prod")
    assert listing(tmp_path / "store" / "set-aside") == {"aliases/prod.json", "aliases/notes.txt"}
    for name in ("..", "a/b", ""):
        with pytest.raises(BadRequest):
            again.set_alias(name, AliasRecord([TargetRecord("a")]))
        with pytest.raises(BadRequest):
            again.remove_alias(name)
    again.close()


def test_a_record_that_names_something_unsafe_is_damaged(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    for number, target in enumerate((TargetRecord("../a"), TargetRecord("a", "../b"))):
        store.set_alias(f"prod{number}", AliasRecord([target]))
    store.set_alias("prod2", AliasRecord([]))
    store.close()
    again = Store(tmp_path / "store")
    assert again.unreadable_aliases() == {f"prod{n}": f"prod{n}.json names no adapter" for n in range(3)}
    again.close()
