"""A disk that fails at a chosen operation, or at which the process is killed."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

from lora_serve.adapters.store.disk import Disk

GROWING = ("make_folder", "write", "copy", "link")  # operations that need space


class Killed(BaseException):
    """The process is gone: nothing that it would have done afterwards happens."""


class QuickDisk(Disk):
    """Does not wait until anything is on the disk."""

    def write(self, path: Path, data: bytes) -> None:
        with path.open("xb") as file:
            file.write(data)

    def sync(self, path: Path) -> None:
        pass


class FailingDisk(QuickDisk):
    """Raises at operation number `at`, counted from 0; a write is half done by then, and a removal begun.

    Args:
        failure: what to raise; after `Killed` every further operation raises it too.
        full: whether operations that need space keep failing, as on a disk that stays full.
    """

    def __init__(self, at: int, failure: Callable[[], BaseException], *, full: bool = False) -> None:
        self.at, self.failure, self.full = at, failure, full
        self.done = 0

    @property
    def reached(self) -> bool:
        """Whether the chosen operation was tried."""
        return self.done > self.at

    def make_folder(self, path: Path) -> None:
        self._step("make_folder")
        super().make_folder(path)

    def write(self, path: Path, data: bytes) -> None:
        self._step("write", lambda: path.write_bytes(data[: len(data) // 2]))
        super().write(path, data)

    def copy(self, source: Path, target: Path) -> None:
        self._step("copy", lambda: target.write_bytes(source.read_bytes()[:1]))
        super().copy(source, target)

    def link(self, source: Path, target: Path) -> None:
        self._step("link")
        super().link(source, target)

    def sync(self, path: Path) -> None:
        self._step("sync")
        super().sync(path)

    def move(self, source: Path, target: Path) -> None:
        self._step("move")
        super().move(source, target)

    def remove(self, path: Path) -> None:
        self._step("remove", lambda: self._remove_one_file(path))
        super().remove(path)

    def _step(self, kind: str, begin: Callable[[], object] = lambda: None) -> None:
        number = self.done
        self.done += 1
        if number == self.at:
            begin()
            raise self.failure()
        if number > self.at and (isinstance(self.failure(), Killed) or (self.full and kind in GROWING)):
            raise self.failure()

    def _remove_one_file(self, path: Path) -> None:
        if path.is_dir():
            for file in sorted(each for each in path.rglob("*") if each.is_file())[:1]:
                file.unlink()


def no_space() -> OSError:
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def read_only() -> OSError:
    return OSError(errno.EROFS, os.strerror(errno.EROFS))


def disk_error() -> OSError:
    return OSError(errno.EIO, os.strerror(errno.EIO))
