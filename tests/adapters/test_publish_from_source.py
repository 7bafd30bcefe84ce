"""Publishing what came from a source: archives, an expected version, and names that an admin took away."""

from __future__ import annotations

import tarfile
import uuid
from pathlib import Path
from typing import Any

import pytest
from registry_harness import RegistryHarness

from lora_serve.errors import AdapterExists, AdapterInvalid
from lora_serve.messages import Inspect, Publish


def packed(harness: RegistryHarness, seed: int = 0) -> Path:
    """A folder in staging with an archive of an adapter, as fetching leaves it."""
    folder = harness.store.staging / f"upload-{uuid.uuid4().hex}"
    folder.mkdir()
    with tarfile.open(folder / "archive", "w:gz") as archive:
        archive.add(harness.upload(seed), "run/output")
    return folder


def publish(harness: RegistryHarness, folder: Path, **more: Any) -> Any:
    return harness.run(lambda done: harness.operations.publish(Publish("poet", str(folder), **more), done))


def test_an_archive_is_the_version_that_its_files_are(harness: RegistryHarness) -> None:
    digest = harness.publish("upload", seed=3).versions[0].digest
    found = harness.run(lambda done: harness.operations.inspect(Inspect(str(packed(harness, 3))), done))
    assert found.digest == digest
    assert publish(harness, packed(harness, 3)).versions[0].digest == digest
    left = [path for path in harness.store.staging.iterdir() if (path / "archive").exists()]
    assert left == []


def test_a_file_called_archive_in_somebodys_folder_is_none(harness: RegistryHarness, tmp_path: Path) -> None:
    folder = harness.upload(0).rename(tmp_path / "mine")
    (folder / "archive").write_bytes(b"mine")
    publish(harness, folder)
    assert (folder / "archive").read_bytes() == b"mine"


def test_an_archive_that_is_none_is_refused(harness: RegistryHarness) -> None:
    folder = packed(harness)
    (folder / "archive").write_bytes(b"PK no zip")
    with pytest.raises(AdapterInvalid, match="the zip cannot be read"):
        publish(harness, folder)


def test_only_the_expected_version_is_published(harness: RegistryHarness) -> None:
    digest = harness.publish("upload", seed=3).versions[0].digest
    with pytest.raises(AdapterInvalid, match=f"this is version {digest}, not 0000") as error:
        publish(harness, packed(harness, 3), digest="0000")
    assert error.value.param == "digest"
    assert publish(harness, packed(harness, 3), digest=digest[:12]).versions[0].digest == digest


def test_a_name_that_an_admin_unlisted_is_known(harness: RegistryHarness) -> None:
    harness.publish("poet", seed=1)
    harness.run(lambda done: harness.operations.unload("poet", done))
    with pytest.raises(AdapterExists):
        publish(harness, packed(harness), unless_known=True)
    assert publish(harness, packed(harness)).name == "poet"  # an upload lists it again
