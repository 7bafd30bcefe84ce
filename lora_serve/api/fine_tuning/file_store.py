"""Files of `/v1/files` on disk, in the adapter store's folder; each belongs to the key that uploaded it.

files/<id>/content      as it was uploaded
files/<id>/file.json    its record

A file appears by one rename of a folder that is already on the disk, and is deleted by removing its record first. What
a killed process left is therefore either a complete file or a folder without a record, which is removed at the next
start. Ids begin with the time, so their order is that of the uploads.
"""

from __future__ import annotations

import logging
import os
import re
import secrets
import shutil
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import msgspec

from lora_serve.adapters.store.disk import Disk
from lora_serve.errors import ServeError, StorageFull, StoreUnusable, TooLarge, Unavailable

CONTENT, RECORD = "content", "file.json"
ID = re.compile(r"file-[0-9a-f]{26}")
MOST_FILES = 1000  # of one key, which are listed in one response
MOST_TOLD = 10  # files in one line of the log
LATEST_CHECK = 3600.0  # seconds until files are looked at again that may have expired
FINE_TUNE = "fine-tune"  # purpose of training data

log = logging.getLogger(__name__)


class UnknownFile(ServeError):
    """There is no such file, or it is another key's."""

    kind = "file_not_found"


class DamagedFile(ServeError):
    """A file's content on disk is not what was uploaded."""

    kind = "file_damaged"


class StoredFile(msgspec.Struct, frozen=True):
    """A file and whose it is.

    Attributes:
        tenant: whose it is, as `Caller.owner` says: the key's name and a hash of the key; empty without keys.
        sha256: of the content, in hex.
        created_at, expires_at: Unix time in seconds.
        kind: of the examples, if it is training data.
        examples: how many there are.
    """

    id: str
    tenant: str
    filename: str
    purpose: str
    bytes: int
    sha256: str
    created_at: int
    expires_at: int | None = None
    kind: str | None = None
    examples: int = 0


class FileStore:
    """The files of all tenants. Methods wait for the disk; they may be called by several threads.

    Args:
        root: returns the folder, which is made if need be; None while it is not known.
        quota: bytes of all files of one tenant.
        clock: Unix time in seconds.

    Raises: every method `Unavailable` while the folder is not known, `StoreUnusable` if it cannot be read or written,
        `StorageFull` if the disk is full.
    """

    def __init__(
        self,
        root: Callable[[], Path | None],
        quota: int,
        clock: Callable[[], float] = time.time,
        disk: Disk | None = None,
    ) -> None:
        self._root, self._quota, self._clock = root, quota, clock
        self._disk = disk or Disk()
        self._lock = threading.RLock()
        self._opened = False
        self._files: dict[str, StoredFile] = {}
        self._used: defaultdict[str, int] = defaultdict(int)  # bytes by tenant, those being received included
        self._timer: threading.Timer | None = None

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {len(self._files)} files>"

    def open(self) -> None:
        """Read the records, and remove what was interrupted. Done once; other methods do it if need be."""
        with self._lock, _disk_errors():
            if self._opened:
                return
            folder = self._folder()
            self._disk.make_folder(folder)
            for path in sorted(folder.iterdir()):
                if ID.fullmatch(path.name) and not path.is_symlink():
                    self._open_file(path)
            self._opened = True
            self._wait_for_expiry()

    def open_at_start(self, known: Container[str]) -> None:
        """Open the store when the server starts, so that files expire also if nobody asks for any.

        Args:
            known: all tenants that there are; files of others are named in the log.
        """
        try:
            self.open()
        except ServeError as error:
            log.error("files of training data: %s", error.message)
            return
        with self._lock:
            lost = [file for file in self._files.values() if file.tenant not in known]
        if lost:
            log.warning(
                "files of training data of keys that there are no more, which no key sees: %d with %s bytes: %s",
                len(lost),
                f"{sum(file.bytes for file in lost):,}",
                ", ".join([file.id for file in lost[:MOST_TOLD]] + ["…"] * (len(lost) > MOST_TOLD)),
            )

    def close(self) -> None:
        """End the thread that waits for files to expire."""
        with self._lock:
            if self._timer is not None:
                self._timer.cancel()

    def list(self, tenant: str) -> list[StoredFile]:
        """A tenant's files, oldest first."""
        with self._current():
            return sorted((file for file in self._files.values() if file.tenant == tenant), key=lambda file: file.id)

    def find(self, id_: str, tenant: str) -> StoredFile:
        """A tenant's file. Raises `UnknownFile`."""
        with self._current():
            file = self._files.get(id_)
            if file is None or file.tenant != tenant:
                raise UnknownFile(f"file {id_[:100]} does not exist", param="file_id")
            return file

    def path(self, file: StoredFile) -> Path:
        """Where its content is, until it is deleted."""
        return self._folder() / file.id / CONTENT

    def is_damaged(self, file: StoredFile) -> bool:
        """Whether its content is missing or has another size."""
        try:
            return self.path(file).stat().st_size != file.bytes
        except OSError:
            return True

    def read(self, id_: str, tenant: str) -> tuple[StoredFile, IO[bytes]]:
        """A tenant's file, opened: readable even if it is deleted then. Raises `UnknownFile`, `DamagedFile`."""
        file = self.find(id_, tenant)
        with _disk_errors():
            try:
                content = self.path(file).open("rb")
            except FileNotFoundError:
                self.find(id_, tenant)  # deleted meanwhile
                raise _damaged(file) from None
        if os.fstat(content.fileno()).st_size != file.bytes:
            content.close()
            raise _damaged(file)
        return file, content

    @contextmanager
    def reserve(self, tenant: str) -> Iterator[Callable[[int], None]]:
        """Count bytes against a tenant's quota while a file is received, by a function that raises `TooLarge`."""
        reserved = 0

        def grow(count: int) -> None:
            nonlocal reserved
            with self._lock:
                if self._used[tenant] + count > self._quota:
                    raise TooLarge(
                        f"the files of this key would have more than {self._quota:,} bytes; delete others first",
                        param="file",
                    )
                self._used[tenant] += count
                reserved += count

        try:
            yield grow
        finally:
            with self._lock:
                self._used[tenant] -= reserved

    def add(
        self,
        staged: Path,
        *,
        tenant: str,
        filename: str,
        purpose: str,
        sha256: str,
        expires_after: int | None = None,
        kind: str | None = None,
        examples: int = 0,
    ) -> StoredFile:
        """Keep a new file.

        Args:
            staged: a folder on the same file system that contains nothing but `content`, which is on the disk. It is
                moved.
            expires_after: seconds.

        Raises: `TooLarge` if the tenant has too many files.
        """
        now = self._clock()
        size = (staged / CONTENT).stat().st_size
        with self._current(), _disk_errors():
            if sum(file.tenant == tenant for file in self._files.values()) >= MOST_FILES:
                raise TooLarge(f"a key may have {MOST_FILES:,} files; delete others first", param="file")
            id_ = f"file-{int(now * 1e6):014x}{secrets.token_hex(6)}"
            expires_at = None if expires_after is None else int(now) + expires_after
            file = StoredFile(
                id_, tenant, filename, purpose, size, sha256, int(now), expires_at, kind=kind, examples=examples
            )
            self._disk.write(staged / RECORD, msgspec.json.encode(file))
            self._disk.sync(staged)
            self._disk.move(staged, self._folder() / id_)
            self._files[id_] = file
            self._used[tenant] += size
            try:
                self._disk.sync(self._folder())
            except OSError as error:
                log.error("file %s is kept and may be lost if the machine stops now: %s", id_, error)
            if expires_at is not None:
                self._wait_for_expiry()
            return file

    def delete(self, id_: str, tenant: str) -> StoredFile:
        """Delete a tenant's file. Raises `UnknownFile`."""
        with self._current():
            file = self.find(id_, tenant)
            with _disk_errors():
                self._remove(file)
            return file

    # --- on disk -----------------------------------------------------------------------------------------------------

    def _folder(self) -> Path:
        root = self._root()
        if root is None:
            raise Unavailable("the server is starting", retry_after=5)
        return root

    def _open_file(self, path: Path) -> None:
        try:
            file = msgspec.json.decode((path / RECORD).read_bytes(), type=StoredFile)
        except FileNotFoundError:  # its deletion was interrupted
            shutil.rmtree(path, ignore_errors=True)
        except (OSError, ValueError) as error:
            log.error("%s of %s cannot be read and is left alone: %s", RECORD, path, error)
        else:
            if file.id == path.name:
                self._files[file.id] = file
                self._used[file.tenant] += file.bytes
            else:
                log.error("%s of %s is of another file and is left alone", RECORD, path)

    def _remove(self, file: StoredFile) -> None:
        """Delete a file. Once the record is gone, it is deleted, and the next start removes what could not be."""
        folder = self._folder() / file.id
        self._disk.remove(folder / RECORD)
        del self._files[file.id]
        self._used[file.tenant] -= file.bytes
        try:
            self._disk.sync(folder)
            self._disk.remove(folder)
        except OSError as error:
            log.error("what is left of file %s cannot be removed now: %s", file.id, error)

    # --- expiry ------------------------------------------------------------------------------------------------------

    @contextmanager
    def _current(self) -> Iterator[None]:
        """Hold the lock over files that have not expired."""
        with self._lock:
            self.open()
            self._expire()
            yield

    def _expire(self) -> None:
        """Delete the files whose time has come."""
        now = self._clock()
        for file in [each for each in self._files.values() if each.expires_at is not None and each.expires_at <= now]:
            try:
                self._remove(file)
            except OSError as error:
                log.error("file %s has expired and cannot be deleted: %s", file.id, error)
                self._files.pop(file.id, None)  # not shown any more; the next start tries again

    def _wait_for_expiry(self) -> None:
        """Look again when the next file expires, even if nobody asks for any."""
        self.close()
        times = [file.expires_at for file in self._files.values() if file.expires_at is not None]
        if times:
            wait = min(LATEST_CHECK, max(0.0, min(times) - self._clock()))
            self._timer = threading.Timer(wait, self._expire_unasked)
            self._timer.daemon = True
            self._timer.start()

    def _expire_unasked(self) -> None:
        with self._lock:
            self._expire()
            self._wait_for_expiry()


def _damaged(file: StoredFile) -> DamagedFile:
    return DamagedFile(f"file {file.id} is damaged on the server's disk; upload it again", param="file_id")


@contextmanager
def _disk_errors() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in StorageFull.errnos:
            raise StorageFull("the disk for files is full") from error
        raise StoreUnusable(f"files cannot be read or written at the moment: {error.strerror or error}") from error
