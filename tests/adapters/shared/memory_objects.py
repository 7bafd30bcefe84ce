"""A shared store in memory, as several replicas reach it: it may go away, lose answers, or let another one go first."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path

from lora_serve.adapters.shared.shared_objects import (
    ListedFile,
    ObjectConflict,
    ObjectsUnreachable,
    StoredObject,
)


class MemoryBucket:
    """What is stored, for all replicas.

    Attributes:
        history: contents of the catalog, one after the other.
    """

    def __init__(self) -> None:
        self.objects: dict[str, tuple[bytes, str]] = {}
        self.contents: dict[str, bytes] = {}
        self.modified: dict[str, float] = {}
        self.history: list[bytes] = []
        self.now = 0.0
        self._tags = 0

    def write(self, key: str, data: bytes) -> str:
        self._tags += 1
        self.objects[key] = data, f'"{self._tags}"'
        if key == "catalog.json":
            self.history.append(data)
        return self.objects[key][1]


class MemoryObjects:
    """How one replica reaches a bucket.

    Attributes:
        away: whether nothing is reached.
        unreliable: share of changes whose answer is lost, made or not.
        before_change: called before the condition of a change is looked at.
    """

    def __init__(self, bucket: MemoryBucket, chosen: random.Random | None = None) -> None:
        self.bucket = bucket
        self.away = False
        self.unreliable = 0.0
        self.before_change: Callable[[], None] = lambda: None
        self._chosen = chosen or random.Random(0)

    def read(self, key: str, known: str = "") -> StoredObject | None:
        self._reach()
        found = self.bucket.objects.get(key)
        if found is None:
            return None
        return StoredObject(None if found[1] == known else found[0], found[1])

    def create(self, key: str, data: bytes) -> str:
        return self._change(key, data, None)

    def replace(self, key: str, data: bytes, tag: str) -> str:
        return self._change(key, data, tag)

    def remove(self, key: str) -> None:
        self._reach()
        self.bucket.objects.pop(key, None)

    def upload(self, key: str, path: Path) -> None:
        self._reach()
        assert key not in self.bucket.contents, "content never changes"
        self.bucket.contents[key] = path.read_bytes()
        self.bucket.modified[key] = self.bucket.now

    def download(self, key: str, path: Path, size: int) -> None:
        self._reach()
        if key not in self.bucket.contents:
            raise FileNotFoundError(key)
        path.write_bytes(self.bucket.contents[key][:size])

    def files(self, folder: str) -> Iterator[ListedFile]:
        self._reach()
        for key in sorted(self.bucket.contents):
            if key.startswith(f"{folder}/"):
                yield ListedFile(key, self.bucket.modified[key])

    def remove_file(self, key: str) -> None:
        self._reach()
        self.bucket.contents.pop(key, None)

    def _change(self, key: str, data: bytes, tag: str | None) -> str:
        self._reach()
        self.before_change()
        found = self.bucket.objects.get(key)
        if (None if found is None else found[1]) != tag:
            raise ObjectConflict(key)
        if self._chosen.random() < self.unreliable:
            if self._chosen.random() < 0.5:
                self.bucket.write(key, data)
            raise ObjectsUnreachable("the answer was lost")
        return self.bucket.write(key, data)

    def _reach(self) -> None:
        if self.away:
            raise ObjectsUnreachable("it is away")
