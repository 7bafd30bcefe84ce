"""Changes that all replicas of a base must make, as files in a folder that all of them can read.

A replica that starts later, or that a change did not reach, makes them up in their order. A body is on the disk before
any replica is asked to make its change; the change counts once its head is beside it, written to another file and
renamed. What no replica needs any more (`replicas/compaction.py`) is removed.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from urllib.parse import quote

from lora_serve.adapters.store.disk import Disk
from lora_serve.errors import PartlyApplied, ServeError, StorageFull, StoreUnusable
from lora_serve.replicas.compaction import KeptChange, needed_changes
from lora_serve.replicas.forwarding import ForwardedRequest

KEPT_HEADERS = ("content-type", "content-encoding")  # of a change; whose key it was is not kept
HEAD, BODY = ".change", ".body"
OWN_FILE = re.compile(r"(\d{12}\.(?:change|body))(\.[0-9a-f]{32})?")


class ChangeJournal:
    """The changes in one folder, which is made if need be. Raises OSError.

    Args:
        keep_versions: versions of an adapter that a replica keeps, beside those that aliases name.
    """

    def __init__(self, folder: Path, keep_versions: int = 1) -> None:
        self._folder = folder
        self._disk = Disk()
        self._keep_versions = keep_versions
        self._known: dict[str, tuple[tuple[int, int, int], KeptChange]] = {}  # by file name: what it was when read
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Held by whoever makes a change: one after the other, also from several processes. Blocks."""
        handle = os.open(self._folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)

    def begin(self, body: bytes) -> int:
        """Keep the body of a change that is about to be made; returns the change's number. The caller holds the lock.

        Raises: `StorageFull`, `StoreUnusable`: then the change must not be made, as later replicas could not.
        """
        try:
            self._remove_needless()
            number = self._next_number()
            self._write(self._path(number, BODY), body)
        except OSError as error:
            raise not_kept(error) from error
        return number

    def keep(self, number: int, thing: str, request: ForwardedRequest, names: tuple[str, ...] = ()) -> KeptChange:
        """Keep a change that was begun and made. The caller holds the lock. Raises `PartlyApplied`."""
        headers = tuple((name.lower(), value) for name, value in request.headers if name.lower() in KEPT_HEADERS)
        change = KeptChange(number, thing, request.method, request.target, headers, names)
        try:
            self._write(self._path(number, HEAD), json.dumps(asdict(change)).encode())
            self._disk.sync(self._folder)
        except OSError as error:
            raise PartlyApplied(
                f"the change was made, but could not be kept for replicas that start later ({error.strerror}); "
                "send it again",
                retry_after=2,
            ) from error
        with suppress(OSError):  # then the next change does it
            self._remove_needless()
        return change

    def abandon(self, number: int) -> None:
        """Remove what was begun, unless it was kept."""
        if not self._path(number, HEAD).exists():
            with suppress(OSError):  # then the next change removes it
                self._path(number, BODY).unlink(missing_ok=True)

    def read(self) -> list[KeptChange]:
        """All changes, in order. Files that have not changed since are not read again."""
        known = {}
        for entry in os.scandir(self._folder):
            if not entry.name.endswith(HEAD):
                continue
            try:
                status = entry.stat()
                signature = status.st_mtime_ns, status.st_size, status.st_ino
                before = self._known.get(entry.name)
                known[entry.name] = before if before and before[0] == signature else (signature, self._head(entry.name))
            except FileNotFoundError:
                continue
        self._known = known
        return sorted((change for _, change in known.values()), key=lambda change: change.number)

    def body(self, change: KeptChange) -> bytes:
        """The body of a change. Raises `FileNotFoundError` if it is not needed any more."""
        return self._path(change.number, BODY).read_bytes()

    def _head(self, name: str) -> KeptChange:
        fields = json.loads((self._folder / name).read_bytes())
        headers = tuple((key, value) for key, value in fields.pop("headers"))
        return KeptChange(**{**fields, "headers": headers, "names": tuple(fields["names"])})

    def _path(self, number: int, kind: str) -> Path:
        return self._folder / f"{number:012d}{kind}"

    def _next_number(self) -> int:
        """A number that no change had, also none that was not kept: replicas that made it remember its number."""
        path = self._folder / "last"
        last = int(path.read_text() or 0) if path.exists() else 0
        number = max([last, *(change.number for change in self.read())]) + 1
        self._write(path, str(number).encode())
        return number

    def _write(self, path: Path, data: bytes) -> None:
        partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
        try:
            self._disk.write(partial, data)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)

    def _remove_needless(self) -> None:
        """Remove changes that are not needed, heads first, and what writers that were killed have left."""
        needed = needed_changes(self.read(), self._keep_versions)
        kept = {f"{number:012d}{kind}" for number in needed for kind in (HEAD, BODY)}
        for name in sorted(os.listdir(self._folder), key=lambda name: not name.endswith(HEAD)):
            if OWN_FILE.fullmatch(name) and name not in kept:
                (self._folder / name).unlink(missing_ok=True)


def default_journal(base: Path, model: str) -> Path:
    """The folder of the journals of a model if none is given; not that of another one in a folder of the same name."""
    path = Path(model)
    whole = str(path.resolve()) if path.exists() else model  # or it is a hub id
    return base / f"{path.name or 'model'}-{sha256(whole.encode()).hexdigest()[:16]}"


def journal_of(folder: Path, application: str) -> Path:
    """The folder in it for the journal of one application: several may share one."""
    return folder / f"application-{quote(application, safe='')}"


def not_kept(error: OSError) -> ServeError:
    """The error for a change that is not made, since the journal could not keep it."""
    if error.errno in StorageFull.errnos:
        return StorageFull("the disk of the journal of changes is full; nothing was changed")
    return StoreUnusable(f"the journal of changes cannot be written ({error.strerror}); nothing was changed")
