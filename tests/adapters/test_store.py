"""The adapter store: a version is complete or absent, whatever happens."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from peft_folders import BASE, tensors, write

from lora_serve.adapters.checkpoint import read
from lora_serve.adapters.publisher import Publisher
from lora_serve.adapters.store import Store
from lora_serve.errors import AdapterExists, StorageFull, TooLarge, Unavailable


def publisher(store: Store, most: int = 1 << 20) -> Publisher:
    return Publisher(store, BASE, max_bytes=1 << 20, most_elements=most)


def files(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()} - {"lock"}


def test_a_published_folder_survives_a_restart(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    published = publisher(store).publish("a", write(tmp_path / "a"), replace=False)
    store.close()
    again = Store(tmp_path / "store")
    assert again.names() == {"a": published.record}
    assert again.meta(published.record.digest) == published.meta
    read(again.folder(published.record.digest), max_bytes=1 << 20)
    again.close()


def test_publishing_removes_a_staged_folder_and_keeps_one_elsewhere(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    staged = write(tmp_path / "store" / "staging" / "x")
    publisher(store).publish("a", staged, replace=False)
    assert not staged.exists()
    outside = write(tmp_path / "b", tensors(1))
    publisher(store).publish("b", outside, replace=False)
    assert outside.exists()
    store.close()


def test_the_same_content_is_one_version(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    first = publisher(store).publish("a", write(tmp_path / "a"), replace=False)
    second = publisher(store).publish("b", write(tmp_path / "b", lora_dropout=0.5), replace=False)
    assert first.record.digest == second.record.digest
    assert len([*(tmp_path / "store" / "versions").iterdir()]) == 1
    store.close()


def test_a_taken_name_is_refused_unless_replace_is_set(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    shared = publisher(store)
    shared.publish("a", write(tmp_path / "a"), replace=False)
    with pytest.raises(AdapterExists):
        shared.publish("a", write(tmp_path / "b", tensors(1)), replace=False)
    shared.publish("a", write(tmp_path / "b", tensors(1)), replace=True)
    store.close()


def test_an_adapter_larger_than_the_host_cache_is_refused(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    with pytest.raises(TooLarge):
        publisher(store, most=10).publish("a", write(tmp_path / "a"), replace=False)
    assert store.names() == {}
    store.close()


def test_a_version_that_got_a_name_again_is_not_deleted(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    shared = publisher(store)
    version = shared.publish("a", write(tmp_path / "a"), replace=False).record.digest
    shared.unpublish("a")
    shared.publish("b", write(tmp_path / "a"), replace=False)
    shared.drop(version)
    assert store.folder(version).exists()
    shared.unpublish("b")
    shared.drop(version)
    assert files(tmp_path / "store") == set()
    store.close()


def test_a_store_can_be_opened_by_one_server_only(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with pytest.raises(Unavailable, match="another server"):
        Store(tmp_path)
    store.close()


class FullStore(Store):
    """A store whose disk is full when a name is written."""

    def _write(self, path: Path, data: bytes) -> None:
        raise OSError(errno.ENOSPC, "no space")


def test_a_full_disk_leaves_the_old_version_in_place(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    before = publisher(store).publish("a", write(tmp_path / "a"), replace=False)
    store.close()
    full = FullStore(tmp_path / "store")
    with pytest.raises(StorageFull):
        publisher(full).publish("a", write(tmp_path / "b", tensors(1)), replace=True)
    assert full.names() == {"a": before.record}
    full.close()


def test_opening_the_store_removes_unfinished_work_only(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    kept = publisher(store).publish("a", write(tmp_path / "a"), replace=False).record.digest
    store.close()
    (tmp_path / "store" / "staging" / "upload").mkdir()
    (tmp_path / "store" / "versions" / "nameless").mkdir()
    Store(tmp_path / "store").close()
    assert files(tmp_path / "store") == {
        "names/a.json",
        *(f"versions/{kept}/{name}" for name in ("adapter_config.json", "adapter_model.safetensors", "meta.json")),
    }


WRITER = """
    import sys
    from pathlib import Path
    sys.path[:0] = [sys.argv[2]]
    from peft_folders import BASE, tensors, write
    from lora_serve.adapters.publisher import Publisher
    from lora_serve.adapters.store import Store
    root = Path(sys.argv[1])
    store = Store(root / "store")
    publisher = Publisher(store, BASE, max_bytes=1 << 20, most_elements=1 << 20)
    print("go", flush=True)
    for round in range(100000):
        before = store.names().get("a")
        publisher.publish("a", write(root / "store" / "staging" / "up", tensors(round)), replace=True)
        if before is not None and before.digest != store.names()["a"].digest:
            publisher.drop(before.digest)
"""


def test_kill_9_at_any_moment_leaves_a_complete_version(tmp_path: Path) -> None:
    seen = set()
    for moment in range(6):
        process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(WRITER), str(tmp_path), str(Path(__file__).parent)],
            stdout=subprocess.PIPE,
        )
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(0.03 + 0.017 * moment)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
        store = Store(tmp_path / "store")
        for record in store.names().values():
            checkpoint = read(store.folder(record.digest), max_bytes=1 << 20)
            assert len(checkpoint.tensors) == 6
            store.meta(record.digest)
            seen.add(record.digest)
        assert len(store.names()) <= 1
        assert not any((tmp_path / "store" / "staging").iterdir())
        store.close()
    assert seen
