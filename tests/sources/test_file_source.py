"""Adapters in a folder of the server, from which no link leads out."""

from __future__ import annotations

from pathlib import Path

import pytest
from adapter_bytes import FILES, MANY, PACKED, WANTED
from fetching import Fetching

from lora_serve.errors import AdapterInvalid, AdapterNotFound, TooLarge


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for folder in ("adapters/poet", "others/private"):
        for name, content in MANY.items():
            path = tmp_path / folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    (tmp_path / "adapters" / "packed.tar.gz").write_bytes(PACKED)
    return tmp_path / "adapters"


def test_a_folder_is_copied(root: Path, tmp_path: Path) -> None:
    source = Fetching(f"s=file://{root}", tmp_path / "to")
    assert source.get().received == sum(map(len, WANTED.values()))
    assert source.files == WANTED


def test_an_archive_is_copied(root: Path, tmp_path: Path) -> None:
    source = Fetching(f"s=file://{root}", tmp_path / "to")
    source.get("packed.tar.gz")
    assert source.files == {"archive": PACKED}


def test_a_name_may_be_in_the_middle_of_a_segment(root: Path, tmp_path: Path) -> None:
    (root / "lora-poet-v1").symlink_to(root / "poet")
    (root / "lora-out-v1").symlink_to(tmp_path / "others" / "private")
    (root / "lora-packed.tar.gz").write_bytes(PACKED)
    source = Fetching(f"s=file://{root}/lora-{{name}}-v1", tmp_path / "to")
    source.get()
    assert source.files == WANTED
    with pytest.raises(AdapterNotFound):
        source.get("out")
    source = Fetching(f"s=file://{root}/lora-{{name}}.tar.gz", tmp_path / "to")
    source.get("packed")
    assert source.files == {"archive": PACKED}


def test_links_inside_are_followed_and_others_are_not(root: Path, tmp_path: Path) -> None:
    (root / "alias").symlink_to(root / "poet")
    (root / "out").symlink_to(tmp_path / "others" / "private")
    (root / "half").mkdir()
    for name in FILES:
        (root / "half" / name).symlink_to(tmp_path / "others" / "private" / name)
    (root / "out.tar.gz").symlink_to("/etc/passwd")
    source = Fetching(f"s=file://{root}", tmp_path / "to")
    source.get("alias")
    assert source.files == WANTED
    for name in ("out", "out.tar.gz", "nobody"):
        with pytest.raises(AdapterNotFound):
            source.get(name)
    with pytest.raises(AdapterInvalid, match="is a link that leads out"):
        source.get("half")


def test_a_large_adapter_is_not_copied(root: Path, tmp_path: Path) -> None:
    for name in ("poet", "packed.tar.gz"):
        with pytest.raises(TooLarge):
            Fetching(f"s=file://{root}", tmp_path / "to", most=1000).get(name)
