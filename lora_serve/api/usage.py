"""Usage: requests and tokens by key, adapter and day (UTC), kept in an SQLite file.

Written by a thread of its own, in the order of `add`, so that no request waits for the disk. If the process is killed,
what the thread had not written yet is lost: a few milliseconds' worth. A file that was deleted or replaced while it was
open is noticed at the next write or read: the one that is there now is opened, or made.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sqlite3
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, date, datetime
from pathlib import Path
from typing import NamedTuple

from lora_serve.errors import StoreUnusable

SUFFIXES = ("", "-wal", "-shm")  # of an SQLite database that is open, its write-ahead log, and the index of that
MOST_UNWRITTEN = 10_000  # requests; while the disk does not write, further ones are not counted

_Identity = tuple[int, int] | None

log = logging.getLogger(__name__)

SCHEMA = """
create table if not exists usage (
    day text not null, key text not null, adapter text not null,
    requests integer not null, prompt_tokens integer not null, completion_tokens integer not null,
    primary key (day, key, adapter)
) without rowid
"""
ADD = """
insert into usage values (?, ?, ?, 1, ?, ?) on conflict do update set
    requests = requests + 1,
    prompt_tokens = prompt_tokens + excluded.prompt_tokens,
    completion_tokens = completion_tokens + excluded.completion_tokens
"""
SUM = """
select coalesce(sum(requests), 0), coalesce(sum(prompt_tokens), 0), coalesce(sum(completion_tokens), 0) from usage
"""
READ = """
select * from usage where day between ? and ? and (?3 is null or key = ?3) and (?4 is null or adapter = ?4)
order by day, key, adapter limit ?5
"""


class DayUsage(NamedTuple):
    """What one key used of one adapter on one day; `key` and `adapter` are empty without keys and for the base."""

    day: str
    key: str
    adapter: str
    requests: int
    prompt_tokens: int
    completion_tokens: int


class UsageRecords:
    """The usage of a server.

    Args:
        path: returns the file, which is made if need be; None while it is not known, and then nothing is kept.
        today: the current day in UTC.
    """

    def __init__(
        self, path: Callable[[], Path | None], today: Callable[[], date] = lambda: datetime.now(UTC).date()
    ) -> None:
        self._path, self._today = path, today
        self._thread = ThreadPoolExecutor(1, "usage")
        self._connection: sqlite3.Connection | None = None
        self._files: dict[str, _Identity] = {}  # what is open: the database, its log and the index of that
        self._lock = threading.Lock()
        self._unwritten: list[tuple[str, str, str, int, int]] = []
        self._submitted = self._failed = False

    def add(self, key: str, adapter: str, prompt_tokens: int, completion_tokens: int) -> None:
        """Count a request. Does not wait, and does not fail."""
        with self._lock:
            if len(self._unwritten) < MOST_UNWRITTEN:
                self._unwritten.append((self._today().isoformat(), key, adapter, prompt_tokens, completion_tokens))
            submit = not self._submitted
            self._submitted = True
        if submit:
            try:
                self._thread.submit(self._write)
            except RuntimeError:  # closed: this is one of the last requests
                self._write()

    async def read(
        self, first: date, last: date, key: str | None = None, adapter: str | None = None, limit: int = 10_000
    ) -> list[DayUsage]:
        """Usage of some days, by day, key and adapter; `key`, `adapter`: of this one only. Raises StoreUnusable."""

        def read() -> list[DayUsage]:
            self._write()
            try:
                connection = self._open()
                if connection is None:
                    return []
                rows: Sequence[tuple[str, str, str, int, int, int]] = connection.execute(
                    READ, (first.isoformat(), last.isoformat(), key, adapter, limit)
                ).fetchall()
            except (sqlite3.Error, OSError) as error:
                raise StoreUnusable(f"usage cannot be read at the moment: {error}") from error
            return [DayUsage(*row) for row in rows]

        return await asyncio.get_running_loop().run_in_executor(self._thread, read)

    def close(self) -> None:
        """Write what is left."""

        def close() -> None:
            self._write()
            self._close()

        self._thread.submit(close)
        self._thread.shutdown()

    def _write(self) -> None:
        with self._lock:
            added, self._unwritten = self._unwritten, []
            self._submitted = False
        if not added:
            return
        try:
            # What was written to a file that was taken away meanwhile is written again, to the one that is there.
            while (connection := self._open()) is not None:
                with connection:
                    connection.executemany(ADD, added)
                if self._is_in_place():
                    break
            self._failed = False
        except (sqlite3.Error, OSError) as error:
            with self._lock:  # again with what comes next
                self._unwritten = [*added, *self._unwritten][:MOST_UNWRITTEN]
            if not self._failed:
                log.error("usage cannot be written at the moment: %s", error)
            self._failed = True

    def _open(self) -> sqlite3.Connection | None:
        """The connection to the file that is there now; None while its path is not known."""
        if self._connection is not None and not self._is_in_place():
            self._say_what_is_gone(self._connection)
            self._close()
            self._remove_left()
        if self._connection is None and (path := self._path()) is not None:
            connection = sqlite3.connect(path)
            try:
                connection.execute("pragma journal_mode = wal")
                connection.execute("pragma synchronous = normal")
                connection.execute(SCHEMA)
            except sqlite3.Error:
                connection.close()
                raise
            self._connection = connection
            self._files = {name: _identity(Path(name)) for name in (f"{path}{suffix}" for suffix in SUFFIXES)}
        return self._connection

    def _close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _is_in_place(self) -> bool:
        """Whether the open file is the one at its path."""
        path = self._path()
        return path is None or _identity(path) == self._files.get(str(path))

    def _remove_left(self) -> None:
        """Remove what SQLite leaves of a file that is gone: it would apply that log to the file that is there now."""
        for name, identity in list(self._files.items())[1:]:
            if identity is not None and _identity(Path(name)) == identity:
                os.unlink(name)

    def _say_what_is_gone(self, connection: sqlite3.Connection) -> None:
        """Log what a file that was deleted or replaced had counted, so that nothing is lost silently."""
        try:
            requests, prompt, completion = connection.execute(SUM).fetchone()
            held = f"it had {requests} requests, {prompt} prompt tokens and {completion} completion tokens"
        except sqlite3.Error as error:
            held = f"what it had cannot be read: {error}"
        log.warning("the usage file was deleted or replaced while it was open (%s); the one there now is used", held)


def _identity(path: Path) -> _Identity:
    """Device and inode of a file; None if there is none."""
    try:
        status = os.stat(path)
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino
