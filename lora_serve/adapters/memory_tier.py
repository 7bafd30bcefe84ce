"""One tier of memory for adapters: which versions are there, in the order of their last use, and their bytes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from typing import Generic, Protocol, TypeVar


class Sized(Protocol):
    """What a tier holds."""

    @property
    def digest(self) -> str: ...

    @property
    def bytes(self) -> int: ...


T = TypeVar("T", bound=Sized)


class MemoryTier(Generic[T]):
    """Versions in one tier of memory, iterated over from the least to the most recently used (LRU).

    No call but iteration depends on how many there are.

    Attributes:
        bytes: that they take together.
    """

    def __init__(self) -> None:
        self.bytes = 0
        self._versions: OrderedDict[str, tuple[T, int]] = OrderedDict()  # and what it took when it came

    def __len__(self) -> int:
        return len(self._versions)

    def __iter__(self) -> Iterator[T]:
        return (version for version, _ in self._versions.values())

    def __contains__(self, digest: str) -> bool:
        return digest in self._versions

    def add(self, version: T) -> None:
        """Add a version that is not there, as the most recently used one."""
        self._versions[version.digest] = version, version.bytes
        self.bytes += version.bytes

    def remove(self, version: T) -> None:
        """Remove a version that is there."""
        self.bytes -= self._versions.pop(version.digest)[1]

    def touch(self, version: T) -> None:
        """Make a version, if it is there, the most recently used one."""
        if version.digest in self._versions:
            self._versions.move_to_end(version.digest)
