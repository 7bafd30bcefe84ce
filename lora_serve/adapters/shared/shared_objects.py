"""The interface of a shared store: small objects that are changed by compare-and-swap, and files that never change.

`folder_objects.py` implements it over a folder, `bucket_objects.py` over a bucket. Methods block, may be called from
any thread, and raise `ObjectsUnreachable` where the store cannot be reached, or does not do what it is asked.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, Protocol

CATALOG = "catalog.json"  # key of the object that all replicas follow
CONTENTS = "contents"  # folder of the versions' files: contents/DIGEST/UPLOAD/NAME
PROBES = "probes"  # folder of objects that are made to see what the store does
UNFINISHED = "unfinished"  # folder of files that are being written, in a store that is a folder


class ObjectsUnreachable(Exception):
    """The store cannot be reached, or refuses; whether a change was made is not known. The message says why."""


class ObjectConflict(Exception):
    """An object is not, or no more, what a change of it was made from; nothing was changed."""


class OutcomeUnknown(Exception):
    """Whether a change was made is not known, though the store can be reached: look at the object."""


class StoredObject(NamedTuple):
    """An object's content, and the tag that a change of it has to name. `data` is None where the tag was known."""

    data: bytes | None
    tag: str


class ListedFile(NamedTuple):
    """A file in the store; `modified` in seconds, by the store's own clock."""

    key: str
    modified: float


class SharedObjects(Protocol):
    """A shared store. Keys are relative paths, with / between their segments."""

    def read(self, key: str, known: str = "") -> StoredObject | None:
        """An object; None if there is none. Its content is left out if its tag is `known`."""

    def create(self, key: str, data: bytes) -> str:
        """Make an object; returns its tag. Raises ObjectConflict if there is one, OutcomeUnknown."""

    def replace(self, key: str, data: bytes, tag: str) -> str:
        """Change an object whose tag is `tag`; returns the new one. Raises ObjectConflict, OutcomeUnknown."""

    def remove(self, key: str) -> None:
        """Remove an object, if there."""

    def upload(self, key: str, path: Path) -> None:
        """Store a file under a key that nobody else uses. Raises StorageFull."""

    def download(self, key: str, path: Path, size: int) -> None:
        """Copy the first `size` bytes of a file to a new one. Raises FileNotFoundError; OSError of the local disk."""

    def files(self, folder: str) -> Iterator[ListedFile]:
        """The files whose keys begin with `folder`/."""

    def remove_file(self, key: str) -> None:
        """Remove a file, if there."""
