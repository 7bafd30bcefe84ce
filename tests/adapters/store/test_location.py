"""The default store follows the base's fingerprint, and adapters kept elsewhere are pointed out."""

from __future__ import annotations

from pathlib import Path

import pytest
from first_format import make_first_format

from lora_serve.adapters.store.location import default_store_folder, describe_other_stores
from lora_serve.adapters.store.store import Store

BASE, OTHER = "1" * 64, "2" * 64


@pytest.fixture(autouse=True)
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    return tmp_path / "data" / "lora-serve"


def test_a_store_is_named_by_model_and_fingerprint(data: Path, tmp_path: Path) -> None:
    (tmp_path / "my base!").mkdir()
    assert default_store_folder("someone/base-1.5", BASE) == data / "stores" / "base-1.5-111111111111"
    assert default_store_folder(str(tmp_path / "my base!"), BASE) == data / "stores" / "my-base-111111111111"
    assert default_store_folder("...", BASE) == data / "stores" / "model-111111111111"


def test_a_renamed_model_keeps_its_store(data: Path) -> None:
    folder = default_store_folder("someone/base", BASE)
    Store(folder, base=BASE).close()
    assert default_store_folder("/mnt/renamed", BASE) == folder
    assert default_store_folder("/mnt/renamed", OTHER) == data / "stores" / "renamed-222222222222"
    renamed = folder.rename(folder.with_name("whatever"))
    assert default_store_folder("someone/base", BASE) == renamed


def test_what_is_not_a_store_does_not_disturb(data: Path) -> None:
    (data / "stores" / "notes").mkdir(parents=True)
    (data / "stores" / "notes" / "x").write_text("")
    (data / "stores" / "x").write_text("")
    (data / "stores" / "damaged").mkdir()
    (data / "stores" / "damaged" / "lora-serve-store.json").write_text("")
    assert default_store_folder("base", BASE) == data / "stores" / "base-111111111111"


def test_other_stores_of_the_base_are_pointed_out(data: Path, tmp_path: Path) -> None:
    chosen = default_store_folder("base", BASE)
    Store(chosen, base=BASE).close()
    Store(data / "stores" / "second", base=BASE).close()
    Store(data / "stores" / "other", base=OTHER).close()
    (note,) = describe_other_stores("base", BASE, chosen)
    assert str(data / "stores" / "second") in note
    assert f"lora-serve store import {data / 'stores' / 'second'} --store {chosen}" in note


@pytest.mark.parametrize("local", [True, False])
def test_the_folder_of_an_earlier_version_of_lora_serve_is_pointed_out(data: Path, tmp_path: Path, local: bool) -> None:
    (tmp_path / "base").mkdir()
    model = str(tmp_path / "base") if local else "someone/base"
    earlier = data / f"{'base' if local else 'someone--base'}-0123abcd"
    chosen = default_store_folder(model, BASE)
    assert describe_other_stores(model, BASE, chosen) == []
    make_first_format(earlier)
    make_first_format(earlier.with_name("unrelated-12345678"))
    (note,) = describe_other_stores(model, BASE, chosen)
    assert str(earlier) in note
