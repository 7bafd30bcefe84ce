"""Changes that all replicas of a base must make, as files in a folder that all of them can read.

The last change of each thing (an adapter, whether it is pinned) is kept, whole, so that a replica that starts later, or
that a change did not reach, makes it up. A change is written to a new file that is then renamed, so that a reader finds
the one before or this one.
"""

from __future__ import annotations

import fcntl
import json
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from lora_serve.replicas.forwarding import ForwardedRequest, Headers

KEPT_HEADERS = ("content-type", "content-encoding")  # of a change; whose key it was is not kept
SUFFIX = ".change"


@dataclass(frozen=True)
class KeptChange:
    """One change in the journal.

    Attributes:
        number: changes are made in this order.
        thing: what it is about, as a path; a later change of the same thing replaces it.
    """

    id: str
    number: int
    thing: str
    method: str
    target: str
    headers: Headers = ()

    def request(self, body: bytes) -> ForwardedRequest:
        """The request that makes the change."""
        return ForwardedRequest(self.method, self.target, self.headers, body, change=self.id)


def new_change_id() -> str:
    """An id for a change that is about to be made."""
    return uuid.uuid4().hex


class ChangeJournal:
    """The changes in one folder, which is made if need be."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
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

    def write(self, thing: str, request: ForwardedRequest) -> KeptChange:
        """Keep a change that was made. The caller holds the lock."""
        number = max((change.number for change in self.read()), default=0) + 1
        headers = tuple((name.lower(), value) for name, value in request.headers if name.lower() in KEPT_HEADERS)
        change = KeptChange(request.change, number, thing, request.method, request.target, headers)
        path = self._folder / f"{sha256(thing.encode()).hexdigest()[:32]}{SUFFIX}"
        partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
        try:
            with partial.open("xb") as file:
                file.write(json.dumps(vars(change)).encode() + b"\n" + request.body)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
        return change

    def read(self) -> list[KeptChange]:
        """All changes, in order. Files that have not changed since are not read again."""
        known = {}
        for entry in os.scandir(self._folder):
            if not entry.name.endswith(SUFFIX):
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
        """The body of a change. Raises `FileNotFoundError` if another one has taken its place."""
        for name, (_, known) in self._known.items():
            if known.id == change.id:
                head, _, body = (self._folder / name).read_bytes().partition(b"\n")
                if json.loads(head)["id"] == change.id:
                    return body
        raise FileNotFoundError(change.thing)

    def _head(self, name: str) -> KeptChange:
        with (self._folder / name).open("rb") as file:
            fields = json.loads(file.readline())
        headers = tuple((key, value) for key, value in fields.pop("headers"))
        return KeptChange(**fields, headers=headers)
