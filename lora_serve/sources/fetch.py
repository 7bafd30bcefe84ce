"""Copy one adapter out of a source: sizes and hashes checked, again with backoff where that may help, and in time.

Runs in a process of its own (`fetch_process.py`). Errors name the source and what happened, never a URL, a header or
what a library says: these may contain credentials.
"""

from __future__ import annotations

import hashlib
import os
import random
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

from lora_serve.adapter_files import ADAPTER_FILES, describe_missing
from lora_serve.adapter_sources import AdapterLocation
from lora_serve.adapters import archive
from lora_serve.errors import AdapterInvalid, AdapterNotFound, ServeError, StorageFull, TooLarge, Unavailable
from lora_serve.names import ARCHIVE, CONFIG, WEIGHTS
from lora_serve.sources.fetch_messages import FetchDone, FetchJob
from lora_serve.sources.remote_files import RemoteFile, RemoteFiles

ATTEMPTS = 5
FIRST_PAUSE = 0.5  # seconds; twice as long after each attempt
CPU_SHARE = 0.25  # of a core: the rest of the time this waits, since steps compute on all cores

Report = Callable[[int, int | None], None]  # bytes received, and bytes in all if known
OpenFiles = Callable[[AdapterLocation], RemoteFiles]


class Incomplete(Exception):
    """What was received is not what the source announced."""


def fetch(job: FetchJob, report: Report, open_files: OpenFiles | None = None) -> FetchDone:
    """Copy an adapter into `job.folder`. Raises the ServeError that says why it cannot be had."""
    location, folder = job.location, Path(job.folder)
    deadline = time.monotonic() + job.seconds
    counter = _Counter(job.most, report)
    for attempt in range(1, ATTEMPTS + 1):
        try:
            if location.scheme == "file":
                return FetchDone(job.id, _copy_local(location, folder, job.most))
            revision = _copy(open_files or open_remote, location, folder, counter)
            return FetchDone(job.id, counter.received, revision)
        except FileNotFoundError:
            raise AdapterNotFound(f"source {location.source} does not have it", param="source") from None
        except (AdapterInvalid, AdapterNotFound, TooLarge):
            raise
        except Exception as error:
            if isinstance(error, OSError) and error.errno in StorageFull.errnos:
                raise StorageFull("the disk of the adapter store is full") from None
            reason = describe_failure(error)
            pause = FIRST_PAUSE * 2 ** (attempt - 1) * random.uniform(0.5, 1.0)
            if attempt == ATTEMPTS or is_final(error) or time.monotonic() + pause > deadline:
                tries = f" ({attempt} attempts)" if attempt > 1 else ""
                raise Unavailable(
                    f"source {location.source} cannot be read: {reason}{tries}", param="source", retry_after=30
                ) from None
        time.sleep(pause)
        _empty(folder)
        counter.begin()
    raise AssertionError("the last attempt returns or raises")


def open_remote(location: AdapterLocation) -> RemoteFiles:
    """The files of an adapter. Imports what reads them."""
    match location.scheme:
        case "s3" | "gs":
            from lora_serve.sources.object_files import ObjectFiles

            return ObjectFiles(location)
        case "hf":
            from lora_serve.sources.hub_files import HubFiles

            return HubFiles(location)
        case _:
            from lora_serve.sources.web_files import WebFiles

            return WebFiles(location)


def describe_failure(error: Exception) -> str:
    """What happened, without anything that a library or a server says."""
    if isinstance(error, Incomplete | ServeError):
        return str(error)
    if (status := _status(error)) is not None:
        return f"HTTP {status}"
    if isinstance(error, PermissionError):
        return "access is refused"
    if isinstance(error, TimeoutError):
        return "it does not answer in time"
    causes = [error, error.__cause__, getattr(error, "os_error", None)]
    number = next((each.errno for each in causes if isinstance(each, OSError) and (each.errno or 0) > 0), 0)
    return os.strerror(number) if number else type(error).__name__


def is_final(error: Exception) -> bool:
    """Whether trying again would not help."""
    status = _status(error)
    if status is not None:
        return 400 <= status < 500 and status not in (408, 425, 429)
    return isinstance(error, ServeError | PermissionError) or type(error).__name__.startswith("NoCredentials")


def _status(error: Exception) -> int | None:
    """The HTTP status that a library's error is about."""
    found = getattr(error, "status", None) or getattr(getattr(error, "response", None), "status_code", None)
    return found if isinstance(found, int) else None


def _copy(open_files: OpenFiles, location: AdapterLocation, folder: Path, counter: _Counter) -> str:
    """Copy the files once; returns the revision. Raises whatever goes wrong."""
    files = open_files(location)
    listed = files.list()
    wanted = {name: file for name, file in listed.items() if name in (ARCHIVE, *ADAPTER_FILES)}
    if not location.is_archive and not {CONFIG, WEIGHTS} <= wanted.keys():
        if CONFIG not in wanted:
            raise FileNotFoundError(location.place)
        raise _incomplete(location, listed)
    if not wanted:
        raise FileNotFoundError(location.place)
    sizes = [file.size for file in wanted.values()]
    counter.expect(sum(size or 0 for size in sizes) if None not in sizes else None)
    for name, file in wanted.items():
        try:
            _copy_file(files, file, folder / name, counter)
        except Exception as error:
            # Some web servers refuse what they do not have.
            missing = isinstance(error, FileNotFoundError) or (file.size is None and _status(error) == 403)
            if missing and file.size is None and name not in (ARCHIVE, CONFIG, WEIGHTS):
                continue
            if missing and name == WEIGHTS:
                raise _incomplete(location, [CONFIG]) from None
            raise
    if any(file.tag for file in wanted.values()) and files.list() != listed:
        raise Incomplete("it changed while it was read")
    return files.revision


def _incomplete(location: AdapterLocation, names: Collection[str]) -> AdapterInvalid:
    return AdapterInvalid(f"source {location.source}: {describe_missing(names)}", param="source")


def _copy_file(files: RemoteFiles, file: RemoteFile, target: Path, counter: _Counter) -> None:
    hashed = hashlib.sha256()
    size = 0
    blocks: AbstractContextManager[Iterator[bytes]] = files.read(file)
    with blocks as received:
        first = next(received, b"")  # before there is a file: it may be missing
        target.parent.mkdir(exist_ok=True)
        with target.open("xb") as written:
            block = first
            while block:
                size += len(block)
                counter.count(len(block))
                if file.size is not None and size > file.size:
                    break
                hashed.update(block)
                written.write(block)
                block = next(received, b"")
    if file.size is not None and size != file.size:
        raise Incomplete(f"{target.name} has other than the announced {file.size:,} bytes")
    if file.sha256 and hashed.hexdigest() != file.sha256:
        raise Incomplete(f"{target.name} does not have the announced SHA-256")


def _copy_local(location: AdapterLocation, folder: Path, most: int) -> int:
    """Copy from a folder on this machine, links resolved, if nothing leads out of the source's."""
    root = Path(location.root).resolve()
    if location.is_archive:
        path = Path(location.place).resolve()
        if not path.is_relative_to(root) or not path.is_file():
            raise FileNotFoundError(location.place)
        archive.copy_file(path, folder / ARCHIVE, most)
    else:
        place = Path(location.place)
        if not place.resolve().is_relative_to(root) or not place.is_dir():
            raise FileNotFoundError(location.place)
        archive.copy(place, folder, [root], most)
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _empty(folder: Path) -> None:
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()


class _Counter:
    """Bytes received: within the limit in each attempt, reported in all; slows down what takes much CPU time."""

    def __init__(self, most: int, report: Report) -> None:
        self._most, self._report = most, report
        self._attempt = self.received = 0
        self._used = time.process_time()

    def begin(self) -> None:
        """Begin another attempt."""
        self._attempt = 0

    def expect(self, size: int | None) -> None:
        """The source announces this many bytes. Raises TooLarge."""
        if size is not None and size > self._most:
            raise TooLarge(f"the adapter is larger than {self._most:,} bytes", param="source")
        self._report(self.received, size)

    def count(self, size: int) -> None:
        """A block has arrived. Raises TooLarge."""
        self._attempt += size
        self.received += size
        if self._attempt > self._most:
            raise TooLarge(f"the adapter is larger than {self._most:,} bytes", param="source")
        self._report(self.received, None)
        used = time.process_time()
        time.sleep(min(1.0, (used - self._used) * (1 / CPU_SHARE - 1)))
        self._used = time.process_time()
