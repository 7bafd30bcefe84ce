"""A shared store in a folder that several machines mount, such as of NFS, without locks.

An object is a folder with a file for each of its generations: 000000000007 is the one after 000000000006, and the
highest number is the object. Who changes it links a complete file to the next number, which succeeds for one of those
who try. The latest generations are kept; older ones are removed, lowest first, and the highest never is. So if a
number was free only because its generation had been removed, there are higher ones, which who took it then sees.
"""

from __future__ import annotations

import errno
import os
import re
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lora_serve.adapters.shared.shared_objects import (
    UNFINISHED,
    ListedFile,
    ObjectConflict,
    ObjectsUnreachable,
    OutcomeUnknown,
    StoredObject,
)
from lora_serve.adapters.store.disk import Disk
from lora_serve.errors import StorageFull, StoreUnusable

KEPT_GENERATIONS = 32
NO_LINKS = (errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP, errno.EMLINK)
BLOCK = 1 << 20  # bytes that are copied at once
_NUMBER = re.compile(r"\d{12}")


class FolderObjects:
    """A shared store in a folder, which must exist: where a share is not mounted, no other store must begin."""

    def __init__(self, root: Path, disk: Disk | None = None) -> None:
        self._root = root
        self._disk = disk or Disk()

    def __repr__(self) -> str:
        return f"<FolderObjects {self._root}>"

    def read(self, key: str, known: str = "") -> StoredObject | None:
        with self._reaching():
            while newest := self._newest(key):
                tag = str(newest)
                if tag == known:
                    return StoredObject(None, tag)
                try:
                    return StoredObject(self._generation(key, newest).read_bytes(), tag)
                except FileNotFoundError:  # so many have followed meanwhile that it was removed
                    if self._newest(key) == newest:
                        raise
            return None

    def create(self, key: str, data: bytes) -> str:
        with self._reaching():
            if self._newest(key):
                raise ObjectConflict(key)
            return self._add(key, 1, data)

    def replace(self, key: str, data: bytes, tag: str) -> str:
        with self._reaching():
            return self._add(key, int(tag) + 1, data)

    def remove(self, key: str) -> None:
        with self._reaching():
            self._disk.remove(self._root / key)

    def upload(self, key: str, path: Path) -> None:
        with self._reaching():
            target, partial = self._root / key, self._new_path()
            try:
                self._disk.copy(path, partial)
                self._disk.sync(partial)
                self._disk.make_folder(target.parent)
                self._disk.move(partial, target)
            except BaseException:
                with suppress(OSError):
                    partial.unlink(missing_ok=True)
                raise
            for parent in (target.parent, target.parent.parent):
                self._disk.sync(parent)

    def download(self, key: str, path: Path, size: int) -> None:
        with self._reaching(missing=True):
            opened = (self._root / key).open("rb")
        with opened, path.open("xb") as target:
            while size > 0:
                with self._reaching():
                    block = opened.read(min(size, BLOCK))
                if not block:
                    return
                target.write(block)
                size -= len(block)

    def files(self, folder: str) -> Iterator[ListedFile]:
        with self._reaching():
            for parent, _, names in os.walk(self._root / folder):
                for name in names:
                    path = Path(parent, name)
                    with suppress(FileNotFoundError):
                        yield ListedFile(path.relative_to(self._root).as_posix(), path.stat().st_mtime)

    def remove_file(self, key: str) -> None:
        with self._reaching():
            path = self._root / key
            path.unlink(missing_ok=True)
            for parent in path.relative_to(self._root).parents[:-2]:  # not the uppermost folder
                with suppress(OSError):  # there are others in it
                    (self._root / parent).rmdir()

    def _add(self, key: str, number: int, data: bytes) -> str:
        """Add a generation, if there is none of this number or a higher one."""
        target, partial = self._generation(key, number), self._new_path()
        self._disk.make_folder(target.parent)
        self._disk.write(partial, data)
        try:
            self._link(partial, target)
        finally:
            partial.unlink(missing_ok=True)
        self._disk.sync(target.parent)
        newest = self._newest(key)
        if newest != number:  # others followed at once, or the number was one that had been removed
            raise OutcomeUnknown(key)
        for old in self._numbers(key):
            if old <= newest - KEPT_GENERATIONS:
                self._generation(key, old).unlink(missing_ok=True)
        return str(number)

    def _link(self, partial: Path, target: Path) -> None:
        """Give a file its name, unless it is taken. Not `Disk.link`, which copies where there are no links."""
        try:
            os.link(partial, target)
        except FileExistsError:
            # NFS may repeat a request whose answer was lost: then the first one took it.
            if not os.path.samefile(partial, target):
                raise ObjectConflict(target.name) from None
        except OSError as error:
            if error.errno in NO_LINKS:
                raise StoreUnusable("the shared store cannot be used: its file system has no hard links") from error
            raise

    def _generation(self, key: str, number: int) -> Path:
        return self._root / key / f"{number:012d}"

    def _newest(self, key: str) -> int:
        """Number of the newest generation; 0 if there is none."""
        return max(self._numbers(key), default=0)

    def _numbers(self, key: str) -> list[int]:
        try:
            return [int(name) for name in os.listdir(self._root / key) if _NUMBER.fullmatch(name)]
        except FileNotFoundError:
            os.listdir(self._root)  # if that is missing, nobody knows
            return []

    def _new_path(self) -> Path:
        """An unused path for a file that is being written; its folder exists."""
        os.listdir(self._root)
        self._disk.make_folder(self._root / UNFINISHED)
        return self._root / UNFINISHED / uuid.uuid4().hex

    @contextmanager
    def _reaching(self, *, missing: bool = False) -> Iterator[None]:
        """What the file system raises, as the interface says. `missing`: whether a file may be missing."""
        try:
            yield
        except OSError as error:
            if error.errno in StorageFull.errnos:
                raise StorageFull("the shared store is full; nothing was changed") from error
            if missing and isinstance(error, FileNotFoundError) and self._root.is_dir():
                raise
            raise ObjectsUnreachable(error.strerror or str(error)) from error
