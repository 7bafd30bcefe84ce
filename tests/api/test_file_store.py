"""Files on disk: whose they are, their bytes, when they expire, and what is left after a failure at any operation."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import msgspec
import pytest
from failing_disk import FailingDisk, Killed, QuickDisk, disk_error, no_space, read_only

from lora_serve.adapters.store.disk import Disk
from lora_serve.api.fine_tuning import file_store
from lora_serve.api.fine_tuning.file_store import DamagedFile, FileStore, StoredFile, UnknownFile
from lora_serve.errors import StorageFull, StoreUnusable, TooLarge, Unavailable

NEVER = 10**9


class Clock:
    """Unix time that only tests move on."""

    def __init__(self) -> None:
        self.now = 1e9

    def __call__(self) -> float:
        self.now += 1e-3
        return self.now


CLOCK = Clock()


def make(root: Path, disk: Disk | None = None, quota: int = 1000, clock: Callable[[], float] = CLOCK) -> FileStore:
    return FileStore(lambda: root / "files", quota, clock, disk or QuickDisk())


def add(store: FileStore, root: Path, content: bytes = b"data", tenant: str = "a", **more: int) -> StoredFile:
    staged = root / f"staged{time.monotonic_ns()}"
    staged.mkdir(parents=True)
    (staged / "content").write_bytes(content)
    return store.add(
        staged,
        tenant=tenant,
        filename="x.jsonl",
        purpose="fine-tune",
        sha256=hashlib.sha256(content).hexdigest(),
        kind="chat",
        expires_after=more.get("expires_after"),
    )


def contents(store: FileStore, tenant: str = "a") -> list[bytes]:
    """What all files of a tenant contain, oldest first; asserts that none is damaged."""
    assert not any(map(store.is_damaged, store.list(tenant)))
    return [store.path(file).read_bytes() for file in store.list(tenant)]


def test_files_outlast_the_server_and_are_in_the_order_of_their_uploads(tmp_path: Path) -> None:
    store = make(tmp_path)
    files = [add(store, tmp_path, content) for content in (b"1", b"2", b"3")]
    assert store.list("a") == files
    again = make(tmp_path)
    assert again.list("a") == files
    assert contents(again) == [b"1", b"2", b"3"]
    again.delete(files[1].id, "a")
    assert contents(make(tmp_path)) == [b"1", b"3"]


def test_a_file_is_its_tenant_s_alone(tmp_path: Path) -> None:
    store = make(tmp_path)
    file = add(store, tmp_path, tenant="a")
    assert store.list("b") == []
    for refused in (store.find, store.read, store.delete):
        with pytest.raises(UnknownFile):
            refused(file.id, "b")
        with pytest.raises(UnknownFile):
            refused("../../secret", "a")
    assert store.find(file.id, "a") == file


def test_a_file_that_is_deleted_while_it_is_read_is_read_to_its_end(tmp_path: Path) -> None:
    store = make(tmp_path)
    file, content = store.read(add(store, tmp_path).id, "a")
    store.delete(file.id, "a")
    with content:
        assert content.read() == b"data"


def test_the_quota_counts_files_and_what_is_being_received(tmp_path: Path) -> None:
    store = make(tmp_path, quota=100)
    file = add(store, tmp_path, b"x" * 40)
    with store.reserve("a") as grow:
        grow(50)
        with store.reserve("a") as other, pytest.raises(TooLarge):
            other(11)
        with store.reserve("b") as of_b:
            of_b(100)
    with store.reserve("a") as grow:
        grow(60)
        with pytest.raises(TooLarge):
            grow(1)
    again = make(tmp_path, quota=100)
    again.open()
    with again.reserve("a") as grow, pytest.raises(TooLarge):
        grow(61)
    again.delete(file.id, "a")
    with again.reserve("a") as grow:
        grow(100)


def test_the_number_of_files_is_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_store, "MOST_FILES", 2)
    store = make(tmp_path)
    add(store, tmp_path)
    add(store, tmp_path)
    add(store, tmp_path, tenant="b")
    with pytest.raises(TooLarge):
        add(store, tmp_path)


def test_a_file_expires_also_while_the_server_is_down(tmp_path: Path) -> None:
    clock = Clock()
    store = make(tmp_path, clock=clock)
    file = add(store, tmp_path, expires_after=3600)
    kept = add(store, tmp_path)
    store.close()
    assert file.expires_at == file.created_at + 3600
    clock.now += 3590
    assert store.list("a") == [file, kept]
    clock.now += 20
    again = make(tmp_path, clock=clock)
    for each in (store, again):
        assert each.list("a") == [kept]
        with pytest.raises(UnknownFile):
            each.find(file.id, "a")
    assert [path.name for path in (tmp_path / "files").iterdir()] == [kept.id]


def test_a_file_expires_if_nobody_asks(tmp_path: Path) -> None:
    store = make(tmp_path, clock=time.time)
    file = add(store, tmp_path, expires_after=1)
    limit = time.monotonic() + 10
    while (tmp_path / "files" / file.id).exists() and time.monotonic() < limit:
        time.sleep(0.02)
    assert [*(tmp_path / "files").iterdir()] == []
    store.close()


def test_a_damaged_file_is_told_and_others_are_there(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = make(tmp_path)
    short, gone, unreadable, whole = [add(store, tmp_path) for _ in range(4)]
    store.path(short).write_bytes(b"d")
    store.path(gone).unlink()
    (tmp_path / "files" / unreadable.id / "file.json").write_bytes(b"{")
    (tmp_path / "files" / "somebody's").mkdir()
    again = make(tmp_path)
    assert again.list("a") == [short, gone, whole]
    assert [again.is_damaged(file) for file in (short, gone, whole)] == [True, True, False]
    for file in (short, gone):
        with pytest.raises(DamagedFile):
            again.read(file.id, "a")
        again.delete(file.id, "a")
    assert unreadable.id in caplog.text
    assert sorted(path.name for path in (tmp_path / "files").iterdir()) == sorted(
        [unreadable.id, whole.id, "somebody's"]
    )


def test_a_record_of_another_file_is_not_believed(tmp_path: Path) -> None:
    store = make(tmp_path)
    file = add(store, tmp_path)
    moved = msgspec.structs.replace(file, id=f"file-{'0' * 26}")
    (tmp_path / "files" / file.id / "file.json").write_bytes(msgspec.json.encode(moved))
    assert make(tmp_path).list("a") == []


def test_before_the_folder_is_known_the_server_is_starting() -> None:
    store = FileStore(lambda: None, 1)
    with pytest.raises(Unavailable):
        store.list("a")
    store.open_at_start({"a"})


def test_files_of_keys_that_there_are_no_more_are_told_at_start(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file, _ = add(make(tmp_path), tmp_path, tenant="a@01"), add(make(tmp_path), tmp_path, tenant="b")
    make(tmp_path).open_at_start({"a@01", "b"})
    assert caplog.text == ""
    make(tmp_path).open_at_start({"a@02", "b"})
    assert "files of training data of keys that there are no more, which no key sees: 1 with 4 bytes" in caplog.text
    assert file.id in caplog.text


def test_threads_may_add_read_and_delete_at_once(tmp_path: Path) -> None:
    store = make(tmp_path, quota=10**6)
    failures: list[BaseException] = []

    def work(number: int) -> None:
        tenant = f"t{number % 2}"
        try:
            for round_ in range(25):
                with store.reserve(tenant) as grow:
                    grow(4)
                    add(store, tmp_path / str(number), tenant=tenant)
                with suppress(UnknownFile):
                    _, content = store.read(store.list(tenant)[0].id, tenant)
                    with content:
                        assert content.read() == b"data"
                with suppress(UnknownFile):
                    if round_ % 3:
                        store.delete(store.list(tenant)[0].id, tenant)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    for tenant in ("t0", "t1"):
        assert contents(make(tmp_path), tenant) == contents(store, tenant)
        assert store._used[tenant] == 4 * len(store.list(tenant))


# --- failures --------------------------------------------------------------------------------------------------------


def change_with_failure(root: Path, change: str, disk: FailingDisk) -> BaseException | None:
    """A store with one file, to which another is added, or whose file is deleted, on a disk that fails."""
    store = make(root)
    first = add(store, root, b"first")
    store = make(root, disk)
    try:
        if change == "add":
            add(store, root, b"second")
        else:
            store.delete(first.id, "a")
    except BaseException as error:
        return error
    return None


@pytest.mark.parametrize("change", ["add", "delete"])
@pytest.mark.parametrize("failure", [Killed, no_space, read_only, disk_error])
def test_a_failure_at_any_operation_leaves_the_old_state_or_the_new_one(
    tmp_path: Path, change: str, failure: Callable[[], BaseException]
) -> None:
    old, new = [b"first"], [b"first", b"second"] if change == "add" else []
    for at in range(NEVER):
        root = tmp_path / str(at)
        disk = FailingDisk(at, failure)
        error = change_with_failure(root, change, disk)
        found = contents(make(root))
        assert found in (old, new)
        if error is None:
            assert found == new
        elif not isinstance(error, Killed):
            assert isinstance(error, StorageFull if failure is no_space else StoreUnusable)
        left = {path.name for path in (root / "files").iterdir()}
        assert left == {file.id for file in make(root).list("a")}, "the next start removes what was interrupted"
        if not disk.reached:
            assert at >= 3
            return
