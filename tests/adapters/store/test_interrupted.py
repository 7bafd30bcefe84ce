"""A store whose disk fails, or whose process is killed, at any operation: the old state or the new one, never another.

Each test repeats a change with the failure one operation later, until the change is complete before the failure.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import store_files
from failing_disk import FailingDisk, Killed, QuickDisk, disk_error, no_space, read_only
from first_format import make_first_format
from store_files import listing, publish, stage

from lora_serve.adapters.store.folder import StoreFolder
from lora_serve.adapters.store.records import AliasRecord, NameRecord, TargetRecord
from lora_serve.adapters.store.scan import scan_store
from lora_serve.adapters.store.store import Store
from lora_serve.errors import ServeError, StorageFull, StoreUnusable

NEVER = 10**9
ERRORS = {no_space: StorageFull, read_only: StoreUnusable, disk_error: StoreUnusable}


def publish_new(store: Store) -> None:
    """A new version, which no other name has."""
    publish(store, "a", "new")


def publish_known(store: Store) -> None:
    """The version of another name, with another lowered form."""
    publish(store, "a", "of b", lowered="other")


def remove(store: Store) -> None:
    digest = store.names()["a"].versions[0]
    store.remove_name("a")
    store.drop(digest)


def pin(store: Store) -> None:
    store.set_name("a", NameRecord(store.names()["a"].versions, pinned=True))


def replace_lowered(store: Store) -> None:
    store.replace_lowered(store.names()["a"].versions[0], stage(store, lowered="other"))


def add_alias(store: Store) -> None:
    store.set_alias("prod", alias_of(store, "a"))


def change_alias(store: Store) -> None:
    store.set_alias("also", alias_of(store, "b"))


def alias_of(store: Store, name: str) -> AliasRecord:
    (digest,) = store.names()[name].versions[:1]
    return AliasRecord([TargetRecord(name, digest, 2.0), TargetRecord("a")], "user", 5.0)


def repair(store: Store) -> None:
    publish(store, "a", "of a")


CHANGES = [publish_new, publish_known, remove, pin, replace_lowered, add_alias, change_alias]


def make_store(root: Path) -> None:
    store = Store(root, disk=QuickDisk())
    publish(store, "a", "of a")
    publish(store, "b", "of b")
    store.set_alias("also", AliasRecord([TargetRecord("b")], created=4.0))
    store.close()


def make_damaged(root: Path) -> None:
    """A store in which the weights of `a` are shorter than they were."""
    make_store(root)
    digest = scan_store(StoreFolder(root)).names["a"].versions[0]
    (root / "versions" / digest / "adapter_model.safetensors").write_text("cut")


def state(root: Path) -> tuple[object, ...]:
    """What a server would serve: aliases, and names with the content of their newest version; checked by hashing."""
    store = Store(root, disk=QuickDisk())
    assert store.broken == {}
    assert store.unreadable_aliases() == {}
    found: list[object] = [store.aliases()]
    for name, record in sorted(store.names().items()):
        for digest in record.versions:
            store.verify(digest)
        found.append((name, record, (store.folder(record.versions[0]) / "adapter_model.safetensors").read_text()))
    for alias in store.aliases().values():
        for target in alias.targets:
            assert not target.version or target.version in store.names()[target.name].versions
    assert listing(store.staging) == set()
    store.close()
    return tuple(found)


def contents(folder: Path, *, without: str = "nothing") -> dict[str, str]:
    """Text of all files below a folder, except those in folders of the name `without`."""
    return {path: (folder / path).read_text() for path in listing(folder) if f"/{without}/" not in path}


def without_dates(files: dict[str, str]) -> dict[str, str]:
    return {path: re.sub(r'"(created|checksum)": .*', "", content) for path, content in files.items()}


def complete(root: Path, change: Callable[[Store], None]) -> tuple[tuple[object, ...], tuple[object, ...]]:
    """The states before and after an undisturbed change."""
    make_store(root)
    before = state(root)
    store = Store(root, disk=QuickDisk())
    change(store)
    store.close()
    return before, state(root)


def attempts(
    tmp_path: Path, make: Callable[[Path], None], change: Callable[[Store], None], disk: Callable[[int], FailingDisk]
) -> Iterator[tuple[Path, Store, BaseException | None]]:
    """Try a change on a fresh store, with the failure at each of its operations: folder, store and what was raised."""
    for number in range(1000):
        root = tmp_path / f"{number}"
        make(root)
        opening = FailingDisk(NEVER, no_space)
        Store(root, disk=opening).close()
        failing = disk(opening.done + number)
        store = Store(root, disk=failing)
        error: BaseException | None = None
        try:
            change(store)
        except (ServeError, Killed) as raised:
            error = raised
        if failing.reached:
            yield root, store, error
        store.close()
        if not failing.reached:
            assert error is None
            assert number > 2
            return
    raise AssertionError("the change never ends")


# --- changes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", CHANGES)
def test_killed_at_any_operation_the_old_state_or_the_new_one_is_found(
    tmp_path: Path, change: Callable[[Store], None]
) -> None:
    both = complete(tmp_path / "complete", change)
    seen = []
    for root, store, _ in attempts(tmp_path, make_store, change, lambda at: FailingDisk(at, Killed)):
        store.close()
        seen.append(state(root))
    assert {str(each) for each in seen} == {str(each) for each in both}


@pytest.mark.parametrize("full", [False, True], ids=["once", "for good"])
@pytest.mark.parametrize("failure", ERRORS)
@pytest.mark.parametrize("change", CHANGES)
def test_a_failing_disk_is_reported_and_changes_nothing(
    tmp_path: Path, change: Callable[[Store], None], failure: Callable[[], OSError], full: bool
) -> None:
    before, after = complete(tmp_path / "complete", change)
    make_store(tmp_path / "unchanged")
    # A version that another name has may get its new lowered form before the name is written.
    ignored = "lowered" if change is publish_known else "nothing"
    unchanged = contents(tmp_path / "unchanged" / "versions", without=ignored)
    for root, store, error in attempts(tmp_path, make_store, change, lambda at: FailingDisk(at, failure, full=full)):
        if error is not None:
            assert type(error) is ERRORS[failure]
            assert str(root) not in str(error)  # it is sent to clients
        on_disk = scan_store(StoreFolder(root))
        assert store.names() == on_disk.names
        assert on_disk.broken() == store.broken == {}
        name_was_removed = change is remove and "a" not in store.names()  # then only the version could not be
        if error is not None and not name_was_removed:
            assert without_dates(contents(root / "versions", without=ignored)) == without_dates(unchanged)
        assert not [path for path in listing(root / "staging") if path.startswith("write-")]
        assert listing(root / "set-aside") == set()
        store.close()
        assert state(root) == (before if error is not None and not name_was_removed else after)
        again = Store(root, disk=QuickDisk())
        publish(again, "c", "later")
        again.close()


@pytest.mark.parametrize("failure", [Killed, no_space])
def test_interrupted_a_repair_leaves_the_damaged_version_or_the_whole_one(
    tmp_path: Path, failure: Callable[[], BaseException]
) -> None:
    for root, store, error in attempts(tmp_path, make_damaged, repair, lambda at: FailingDisk(at, failure)):
        if isinstance(error, StorageFull) and store.broken:  # not when only the name could not be written
            assert listing(root / "set-aside") == set()
        store.close()
        again = Store(root, disk=QuickDisk())
        if not again.broken:
            again.verify(again.names()["a"].versions[0])
        assert again.broken in ({}, {"a": "adapter_model.safetensors has 3 bytes instead of 4"})
        again.close()
        kept = {(root / path).read_text() for path in listing(root) if path.endswith("model.safetensors")}
        assert kept >= {"cut", "of b"}


@pytest.mark.parametrize("failure", [Killed, no_space])
def test_an_alias_whose_removal_is_interrupted_is_there_or_gone(
    tmp_path: Path, failure: Callable[[], BaseException]
) -> None:
    both = complete(tmp_path / "complete", lambda store: store.remove_alias("also"))
    seen = []
    for number in range(2):  # the removal, and waiting for the disk
        root = tmp_path / f"{number}"
        make_store(root)
        opening = FailingDisk(NEVER, no_space)
        Store(root, disk=opening).close()
        failing = FailingDisk(opening.done + number, failure)
        store = Store(root, disk=failing)
        with suppress(Killed, StorageFull):
            store.remove_alias("also")
        assert failing.reached
        store.close()
        seen.append(state(root))
    assert seen == [*both]


# --- opening ---------------------------------------------------------------------------------------------------------


def interrupted_openings(
    tmp_path: Path, make: Callable[[Path], None], failure: Callable[[], BaseException]
) -> Iterator[Path]:
    """Open a fresh store with the failure at each operation, and check what is said."""
    for number in range(1000):
        root = tmp_path / f"{number}"
        make(root)
        failing = FailingDisk(number, failure)
        said = ""
        try:
            Store(root, disk=failing).close()
        except StoreUnusable as error:
            said = error.message
        except Killed:
            pass
        if said:
            assert said == f"the adapter store {root} cannot be used: {os.strerror(failure().errno)}"  # type: ignore[attr-defined]
        yield root
        if not failing.reached:
            return
    raise AssertionError("the opening never ends")


@pytest.mark.parametrize("failure", [Killed, no_space, read_only])
@pytest.mark.parametrize("make", [lambda root: None, make_store, make_first_format], ids=["new", "store", "format 1"])
def test_an_interrupted_opening_is_done_again(
    tmp_path: Path, make: Callable[[Path], None], failure: Callable[[], BaseException]
) -> None:
    make(tmp_path / "complete")
    undisturbed = state(tmp_path / "complete")
    for root in interrupted_openings(tmp_path, make, failure):
        assert state(root) == undisturbed


def make_untidy(root: Path) -> None:
    """A store with a version that has no name, and files that somebody put there."""
    make_store(root)
    store = Store(root, disk=QuickDisk())
    store.remove_name("a")
    store.close()
    (root / "names" / "notes.txt").write_text("mine")
    (root / "staging" / "mine").write_text("mine too")


@pytest.mark.parametrize("failure", [Killed, no_space, read_only])
def test_setting_aside_can_be_interrupted_without_loss(tmp_path: Path, failure: Callable[[], BaseException]) -> None:
    for root in interrupted_openings(tmp_path, make_untidy, failure):
        _, (name, *_) = state(root)
        assert name == "b"
        aside = root / "set-aside"
        assert {(aside / path).read_text() for path in listing(aside)} >= {"mine", "mine too", "of a"}


# --- a process that is really killed ---------------------------------------------------------------------------------

WRITER = """
    import sys
    from pathlib import Path
    sys.path[:0] = [sys.argv[2]]
    from store_files import publish
    from lora_serve.adapters.store.store import Store
    store = Store(Path(sys.argv[1]))
    print("go", flush=True)
    for round in range(100000):
        before = store.names().get("a")
        publish(store, "a", str(round))
        if before is not None and before != store.names()["a"]:
            store.drop(before.versions[0])
"""


def test_kill_9_at_any_moment_leaves_a_complete_version(tmp_path: Path) -> None:
    seen = set()
    for moment in range(6):
        process = subprocess.Popen(
            [
                sys.executable,
                "-c",
                textwrap.dedent(WRITER),
                str(tmp_path / "store"),
                str(Path(store_files.__file__).parent),
            ],
            stdout=subprocess.PIPE,
        )
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(0.02 + 0.017 * moment)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
        found = state(tmp_path / "store")
        assert len(found) <= 2
        seen.add(str(found))
    assert len(seen) > 1
