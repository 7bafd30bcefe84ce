"""The events of a fine-tuning job: a file of JSON lines that only grows, read backwards a page at a time.

An event's id ends with the place of its line, so that a page needs no more than its own part of the file. A line that
was cut short when the process was killed is removed before the next one is written.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import msgspec

from lora_serve.api.fine_tuning.job_records import JobEvent

PREFIX = "ftevent-"
BLOCK = 1 << 14  # bytes that are read at once
MOST_UNWRITTEN = 1000  # events that wait for space on the disk

_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(JobEvent).decode


class EventLog:
    """Events of one job. Methods wait for the disk; they may be called by several threads."""

    def __init__(self, path: Path, job: str) -> None:
        self._path = path
        self._prefix = f"{PREFIX}{job[-10:]}"
        self._lock = threading.Lock()
        self._unwritten: list[JobEvent] = []
        self._size: int | None = None  # bytes of complete lines; None: not known yet

    def add(self, event: JobEvent) -> None:
        """Add an event. It stays in memory while the file cannot be written."""
        with self._lock:
            self._unwritten.append(event)
            try:
                self._write()
            except OSError:
                self._size = None  # a part of the lines may be there
                del self._unwritten[:-MOST_UNWRITTEN]

    def page(self, after: str | None, limit: int) -> tuple[list[tuple[str, JobEvent]], bool]:
        """Up to `limit` events with their ids, newest first, older than `after`; and whether there are more."""
        with self._lock:
            unwritten = [(f"{self._prefix}-{index:x}", event) for index, event in enumerate(self._unwritten)][::-1]
            try:
                end = self._complete_size()
            except OSError:
                end = 0
        found: list[tuple[str, JobEvent]] = []
        if after is not None and not (after.startswith(f"{self._prefix}-")):
            unwritten, end = [], min(end, self._place(after))
        elif after is not None:
            ids = [id_ for id_, _ in unwritten]
            unwritten = unwritten[ids.index(after) + 1 :] if after in ids else []
        found += unwritten[: limit + 1]
        for start, line in self._backwards(end):
            if len(found) > limit:
                break
            found.append((f"{self._prefix}{start:012x}", _decode(line)))
        return found[:limit], len(found) > limit

    def newer(self, after: str | None, limit: int) -> list[tuple[str, JobEvent]]:
        """Up to `limit` events with their ids, oldest first, newer than `after`; only those that are on the disk.

        All of them are newer than an event that does not exist.
        """
        with self._lock:
            end = self._complete_size()
        if not end:
            return []
        found: list[tuple[str, JobEvent]] = []
        with self._path.open("rb") as file:
            if after is not None and self._begins_line(file, after, end):
                file.readline()
            else:
                file.seek(0)
            while file.tell() < end and len(found) < limit:
                found.append((f"{self._prefix}{file.tell():012x}", _decode(file.readline())))
        return found

    def last_step(self) -> int:
        """The step of the newest metrics event; 0 if there is none."""
        return next(self._metrics_backwards(), (0, None))[0]

    def metrics(self) -> list[JobEvent]:
        """All metrics events, oldest first."""
        return [event for _, event in self._metrics_backwards() if event is not None][::-1]

    def _metrics_backwards(self) -> Iterator[tuple[int, JobEvent]]:
        with self._lock:
            unwritten = self._unwritten[::-1]
            end = self._complete_size()
        for event in unwritten:
            if event.type == "metrics" and event.data:
                yield int(event.data["step"]), event
        for _, line in self._backwards(end):
            event = _decode(line)
            if event.type == "metrics" and event.data:
                yield int(event.data["step"]), event

    def _write(self) -> None:
        end = self._complete_size()
        lines = b"".join(_encode(event) + b"\n" for event in self._unwritten)
        with self._path.open("r+b" if self._path.exists() else "xb") as file:
            file.truncate(end)
            file.seek(end)
            file.write(lines)
        self._size = end + len(lines)
        self._unwritten.clear()

    def _complete_size(self) -> int:
        """Bytes of the lines that are complete."""
        if self._size is None:
            if not self._path.exists():
                return 0
            size = self._path.stat().st_size
            with self._path.open("rb") as file:
                self._size = _end_of_last_line(file, size)
        return self._size

    def _backwards(self, end: int) -> Iterator[tuple[int, bytes]]:
        """Lines before a place, the last one first, with the places where they begin."""
        if not end:
            return
        with self._path.open("rb") as file:
            rest = b""  # the beginning of it may be in the block before
            while end:
                start = max(0, end - BLOCK)
                file.seek(start)
                rest = file.read(end - start) + rest
                first = rest.find(b"\n") + 1 if start else 0
                if first or not start:
                    place = start + len(rest)
                    for line in reversed(rest[first:].splitlines(keepends=True)):
                        place -= len(line)
                        yield place, line
                    rest = rest[:first]
                end = start

    def _begins_line(self, file: IO[bytes], id_: str, end: int) -> bool:
        """Whether there is an event of this id, and if so, go to its line."""
        place = self._place(id_)
        if id_ != f"{self._prefix}{place:012x}" or place >= end:
            return False
        file.seek(max(0, place - 1))
        return place == 0 or file.read(1) == b"\n"

    def _place(self, id_: str) -> int:
        try:
            return int(id_.removeprefix(self._prefix), 16) if id_.startswith(self._prefix) else 0
        except ValueError:
            return 0


def _end_of_last_line(file: IO[bytes], size: int) -> int:
    end = size
    while end:
        start = max(0, end - BLOCK)
        file.seek(start)
        found = file.read(end - start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        end = start
    return 0
