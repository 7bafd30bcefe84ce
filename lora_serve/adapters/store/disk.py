"""The file operations that the adapter store changes its folder with; each is atomic, except `write` and `remove`.

They are one class so that tests can let each of them fail, or end the process at it.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class Disk:
    """The file system. All methods raise OSError.

    Args:
        waits: whether `write` and `sync` wait for the disk; without, what is written survives the end of processes, and
            not that of the machine.
    """

    _waits = True

    def __init__(self, *, waits: bool = True) -> None:
        self._waits = waits

    @contextmanager
    def waiting(self, waits: bool) -> Iterator[None]:
        """Wait for the disk meanwhile, or do not. For the only thread that uses this object."""
        before, self._waits = self._waits, self._waits and waits
        try:
            yield
        finally:
            self._waits = before

    def make_folder(self, path: Path) -> None:
        """Create a folder and its parents, if missing."""
        path.mkdir(parents=True, exist_ok=True)

    def write(self, path: Path, data: bytes) -> None:
        """Write a new file and wait until its content is on the disk; a failure may leave a part of it."""
        with path.open("xb") as file:
            file.write(data)
            file.flush()
            if self._waits:
                os.fsync(file.fileno())

    def copy(self, source: Path, target: Path) -> None:
        """Copy a file; a failure may leave a part of it."""
        shutil.copyfile(source, target, follow_symlinks=False)

    def link(self, source: Path, target: Path) -> None:
        """Give a file a second name, or copy it where the file system has no hard links."""
        try:
            os.link(source, target, follow_symlinks=False)
        except (PermissionError, NotImplementedError):
            self.copy(source, target)

    def sync(self, path: Path) -> None:
        """Wait until a file's content, or a folder's list of entries, is on the disk."""
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            if self._waits:
                os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def move(self, source: Path, target: Path) -> None:
        """Rename a file, over an existing one, or a folder."""
        source.rename(target)

    def remove(self, path: Path) -> None:
        """Remove a file, or a folder with its content; nothing happens if it is missing."""
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
