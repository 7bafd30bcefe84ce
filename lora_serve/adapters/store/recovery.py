"""Opens a store's folder: checks that it is one, locks it, finishes what was interrupted, and reads its records.

One damaged record, or entry that is not the store's, never keeps the others from being served: damaged records are
reported in the contents, other things are moved to set-aside/.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

import msgspec

from lora_serve.adapters.store.folder import FORMAT, STAGED, StoreFolder
from lora_serve.adapters.store.records import StoreMarker, find_missing, read_version
from lora_serve.adapters.store.scan import StoreContents, check_version, is_first_format, read_marker, scan_store
from lora_serve.adapters.store.upgrade import upgrade_first_format
from lora_serve.errors import StoreUnusable, Unavailable

MOST_SHOWN = 5  # entries in a note


def open_folder(folder: StoreFolder, base: str, model: str, notes: list[str]) -> tuple[IO[bytes], StoreContents]:
    """Open a store, or make an empty or missing folder one. Returns the lock, held until it is closed, and the records.

    Raises: StoreUnusable, Unavailable.
    """
    with _report_unusable(folder.root):
        read_marker(folder)  # before anything is written into what may be somebody's folder
        folder.disk.make_folder(folder.root)
        lock = _take_lock(folder)
        try:
            _prepare(folder, base, model, notes)
            _sweep_staging(folder, notes)
            return lock, _read(folder, notes)
        except BaseException:
            lock.close()
            raise


def _prepare(folder: StoreFolder, base: str, model: str, notes: list[str]) -> None:
    """Create what a store has, the marker first, and check that it is for this base and can be written."""
    marker = read_marker(folder)
    if marker is not None and base and marker.base not in ("", base):
        raise StoreUnusable(
            f"the adapter store {folder.root} is for {marker.model or 'another model'} (fingerprint "
            f"{marker.base[:12]}), not for {model or 'this one'} ({base[:12]}): name another folder with --store"
        )
    folder.disk.make_folder(folder.staging)
    if marker is None and is_first_format(folder):
        upgrade_first_format(folder, StoreMarker(FORMAT, base, model), notes)
    elif marker is None or (base and not marker.base):
        folder.replace_file(folder.marker, msgspec.json.encode(StoreMarker(FORMAT, base, model)))
    for path in (folder.staging, folder.versions, folder.names, folder.aliases, folder.aside):
        folder.disk.make_folder(path)
        if not os.access(path, os.W_OK | os.X_OK):
            raise StoreUnusable(f"the adapter store {folder.root} cannot be used: {path.name} cannot be written")


def _sweep_staging(folder: StoreFolder, notes: list[str]) -> None:
    """Remove unfinished work of this server, except uploads that the API process is still receiving."""
    strays = []
    for path in sorted(folder.staging.iterdir()):
        if not STAGED.fullmatch(path.name) or path.is_symlink():
            strays.append(path)
        elif not _is_locked(path):
            folder.discard(path)
    _set_aside(folder, strays, "unknown in staging", notes)


def _read(folder: StoreFolder, notes: list[str]) -> StoreContents:
    """Read the records; versions that a name misses come back from set-aside/, what has no name goes there."""
    found = scan_store(folder)
    for digest in list(found.damaged):
        kept = sorted(folder.aside.glob(f"versions/{digest}*"), key=lambda path: (not _is_complete(path), path.name))
        if kept and not os.path.lexists(folder.version(digest)):
            folder.disk.move(kept[0], folder.version(digest))
            check_version(folder, digest, found)
            notes.append(f"version {digest[:12]} was taken back from {folder.aside}, since a name refers to it")
    _set_aside(folder, found.unnamed, "versions without a name", notes)
    _set_aside(folder, found.strays, "not the store's", notes)
    return found


def _is_complete(version: Path) -> bool:
    try:
        return not find_missing(version, read_version(version))
    except ValueError:
        return False


def _set_aside(folder: StoreFolder, paths: list[Path], what: str, notes: list[str]) -> None:
    moved, failed = [], []
    for path in paths:
        try:
            folder.set_aside(path)
            moved.append(path.name)
        except OSError as error:
            failed.append(f"{path.name} ({error.strerror})")
    if moved:
        notes.append(f"moved to {folder.aside}, {what}: {_shorten(moved)}")
    if failed:
        notes.append(f"could not be moved to {folder.aside}, {what}: {_shorten(failed)}")


def _shorten(names: list[str]) -> str:
    shown = ", ".join(name[:80] for name in names[:MOST_SHOWN])
    return shown if len(names) <= MOST_SHOWN else f"{shown} and {len(names) - MOST_SHOWN} more"


def _is_locked(path: Path) -> bool:
    """Whether another process has a file or folder locked; False if that cannot be found out."""
    with suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(descriptor)
    return False


def _take_lock(folder: StoreFolder) -> IO[bytes]:
    lock = folder.lock.open("ab")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        raise Unavailable(
            f"another server has the adapter store {folder.root} open; give each its own --store"
        ) from None
    except OSError:
        lock.close()
        raise
    return lock


@contextmanager
def _report_unusable(root: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StoreUnusable(f"the adapter store {root} cannot be used: {error.strerror or error}") from error
