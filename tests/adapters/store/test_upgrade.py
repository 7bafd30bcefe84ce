"""Stores of format 1, as the first released version wrote them, are upgraded when they are opened."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from first_format import A, B, make_first_format
from store_files import listing

from lora_serve.adapters.store.records import NameRecord, describe_folder
from lora_serve.adapters.store.store import Store
from lora_serve.errors import StoreUnusable


@pytest.fixture
def root(tmp_path: Path) -> Path:
    make_first_format(tmp_path / "store")
    return tmp_path / "store"


def test_names_and_files_are_kept_under_the_digests_of_the_files(root: Path) -> None:
    digests = {old: describe_folder(root / "versions" / old).digest for old in (A, B)}
    store = Store(root, base="1" * 64, model="llama")
    assert store.names() == {
        "a": NameRecord([digests[A]]),
        "also-a": NameRecord([digests[A]]),
        "b": NameRecord([digests[B]], source="signature"),
    }
    assert store.broken == {}
    for digest in digests.values():
        store.verify(digest)
        assert store.version(digest).created == 1700000000.5
        assert not store.lowered(digest).exists()
    assert (store.folder(digests[A]) / "README.md").read_text() == "card"
    assert "the adapter store was upgraded from format 1: 2 versions" in store.notes
    store.close()
    assert {path.name for path in (root / "versions").iterdir()} == set(digests.values())
    assert listing(root / "set-aside") == set()
    assert json.loads((root / "lora-serve-store.json").read_text())["base"] == "1" * 64
    again = Store(root, base="1" * 64)
    assert again.names().keys() == {"a", "also-a", "b"}
    assert again.notes == []
    again.close()


def test_two_versions_of_the_same_files_become_one(root: Path) -> None:
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        (root / "versions" / B / file).write_bytes((root / "versions" / A / file).read_bytes())
    store = Store(root)
    assert len({record.versions[0] for record in store.names().values()}) == 1
    assert store.broken == {}
    store.close()


def test_an_empty_store_is_upgraded(tmp_path: Path) -> None:
    for folder in ("names", "versions", "staging"):
        (tmp_path / "store" / folder).mkdir(parents=True)
    (tmp_path / "store" / "lock").touch()
    Store(tmp_path / "store").close()
    assert (tmp_path / "store" / "lora-serve-store.json").exists()


def test_a_version_without_weights_breaks_its_names_only(root: Path) -> None:
    (root / "versions" / A / "adapter_model.safetensors").unlink()
    store = Store(root)
    assert store.broken.keys() == {"a", "also-a"}
    store.verify(store.names()["b"].versions[0])
    assert any(f"version {A[:12]} could not be upgraded" in note for note in store.notes)
    store.close()
    assert (root / "versions" / A / "adapter_config.json").exists()


def test_a_damaged_record_breaks_its_name_only(root: Path) -> None:
    (root / "names" / "a.json").write_text("")
    (root / "versions" / B / "meta.json").write_text("{")
    store = Store(root)
    assert store.broken.keys() == {"a"}
    store.verify(store.names()["also-a"].versions[0])
    store.verify(store.names()["b"].versions[0])
    store.close()


def test_a_version_without_a_name_and_unknown_files_are_set_aside(root: Path) -> None:
    (root / "names" / "b.json").unlink()
    (root / "versions" / A / "notes.txt").write_text("mine")
    (root / "staging" / "mine").write_text("mine too")
    store = Store(root)
    assert store.names().keys() == {"a", "also-a"}
    store.close()
    aside = root / "set-aside"
    assert {"mine", "mine too", "of b"} <= {(aside / path).read_text() for path in listing(aside)}


@pytest.mark.parametrize("stray", ["README", "versions/readme", "names/a.txt", ".git"])
def test_a_folder_that_is_only_similar_is_refused(root: Path, stray: str) -> None:
    (root / stray).write_text("mine")
    before = listing(root)
    with pytest.raises(StoreUnusable, match="is not an adapter store"):
        Store(root)
    assert listing(root) == before
