"""The adapter store on disk: immutable versions in folders named by digest, and records that map names to versions.

    versions/<digest>/   the PEFT files as they came, and meta.json
    names/<name>.json    the digest that a name refers to; replaced atomically
    staging/             unfinished uploads and publishes; emptied when the store is opened

A version is written and synced in staging, then moved into place by one rename; a name changes by one rename. So
`kill -9` at any moment leaves the old state or the new one. Methods may block, and are not thread-safe.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import msgspec

from lora_serve.adapters.traits import Traits
from lora_serve.errors import AdapterInvalid, StorageFull, Unavailable
from lora_serve.names import CARD, CONFIG, MODULES, POOLING, WEIGHTS


class Meta(msgspec.Struct, frozen=True):
    """Metadata of a version, known without reading its weights.

    `created` in seconds since the epoch, `rank` the largest, `modules` the number of adapted modules, `elements` the
    number of elements in memory, `vectors` how many of these are in float32 whatever the serving dtype.
    """

    created: float
    rank: int
    modules: int
    elements: int
    file_bytes: int
    report: dict[str, Any]
    traits: Traits = Traits()
    vectors: int = 0

    def bytes(self, itemsize: int) -> int:
        """Bytes in memory at a serving dtype of `itemsize` bytes, without alignment."""
        return (self.elements - self.vectors) * itemsize + 4 * self.vectors


class Record(msgspec.Struct, frozen=True):
    """The version that a name refers to.

    `source`: the folder that it is a copy of; of one published at start, the folder's signature. Empty for an upload.
    """

    digest: str
    created: float
    source: str = ""


class Store:
    """A folder of adapters, opened by one process at a time.

    Raises: Unavailable if another process has it open.
    """

    def __init__(self, root: Path) -> None:
        self._versions, self._names, self._staging = root / "versions", root / "names", root / "staging"
        for folder in (self._versions, self._names, self._staging):
            folder.mkdir(parents=True, exist_ok=True)
        self._lock = (root / "lock").open("ab")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.close()
            raise Unavailable("another server has the adapter store open; give each its own --store") from None
        for leftover in self._staging.iterdir():
            _remove(leftover)
        named = {record.digest for record in self.names().values()}
        for version in self._versions.iterdir():
            if version.name not in named:
                _remove(version)

    def close(self) -> None:
        """Let another process open the store; closing twice is harmless."""
        self._lock.close()

    def names(self) -> dict[str, Record]:
        """All names, read from disk."""
        found = {}
        for path in sorted(self._names.glob("*.json")):
            found[path.name.removesuffix(".json")] = msgspec.json.decode(path.read_bytes(), type=Record)
        return found

    def meta(self, digest: str) -> Meta:
        return msgspec.json.decode((self._versions / digest / "meta.json").read_bytes(), type=Meta)

    def folder(self, digest: str) -> Path:
        """The folder of a version's PEFT files, which never change."""
        return self._versions / digest

    def is_staged(self, folder: Path) -> bool:
        """Whether a folder is in the store's staging, so that publishing may move its files."""
        return folder.resolve().is_relative_to(self._staging.resolve())

    def publish(self, name: str, folder: Path, digest: str, meta: Meta, source: str = "") -> Record:
        """Store the PEFT files of `folder` as version `digest`, and let `name` refer to it.

        Files in the store's staging are moved, others copied. Raises StorageFull, without effect.
        """
        record = Record(digest, time.time(), source)
        with _report_full_disk():
            if not (self._versions / digest).exists():
                self._add_version(folder, digest, meta)
            else:  # the same content, perhaps with another configuration
                meta = msgspec.structs.replace(meta, created=self.meta(digest).created)
                self._write(self._versions / digest / "meta.json", msgspec.json.encode(meta))
            self._write(self._names / f"{name}.json", msgspec.json.encode(record))
        return record

    def unpublish(self, name: str) -> None:
        """Remove a name; its version stays until `drop`."""
        (self._names / f"{name}.json").unlink(missing_ok=True)
        _sync(self._names)

    def drop(self, digest: str) -> None:
        """Delete a version: rename it into staging, then remove it, so that a half-deleted version is never visible."""
        trash = self._staging / f"{digest}.{time.monotonic_ns()}"
        with suppress(FileNotFoundError):
            (self._versions / digest).rename(trash)
        shutil.rmtree(trash, ignore_errors=True)

    def _add_version(self, folder: Path, digest: str, meta: Meta) -> None:
        staged = Path(tempfile.mkdtemp(dir=self._staging))
        try:
            for name in (CONFIG, WEIGHTS, CARD, MODULES, POOLING):
                if (folder / name).is_file():
                    (staged / name).parent.mkdir(exist_ok=True)
                    _copy_or_move(folder / name, staged / name, move=self.is_staged(folder))
            (staged / "meta.json").write_bytes(msgspec.json.encode(meta))
            for path in (*staged.rglob("*"), staged):
                _sync(path)
            staged.rename(self._versions / digest)
            _sync(self._versions)
        finally:
            shutil.rmtree(staged, ignore_errors=True)

    def _write(self, path: Path, data: bytes) -> None:
        descriptor, temporary = tempfile.mkstemp(dir=self._staging)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(descriptor)
            Path(temporary).rename(path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
        _sync(path.parent)


def _copy_or_move(source: Path, target: Path, *, move: bool) -> None:
    if source.is_symlink():
        raise AdapterInvalid(f"{source.name} is a link")
    if move:
        source.rename(target)
    else:
        shutil.copyfile(source, target)


def _remove(path: Path) -> None:
    """Remove a folder and its content, or a file (an unfinished name is a file)."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def _report_full_disk() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StorageFull("the disk of the adapter store is full; nothing was changed") from error
        raise


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
