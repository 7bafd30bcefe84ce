"""Uploads of training data: a multipart form streamed to disk and checked line by line on the way."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

from lora_serve.adapters.store.disk import Disk
from lora_serve.api.fine_tuning.example_lines import CheckedLines, LineChecker
from lora_serve.api.fine_tuning.file_store import CONTENT, FINE_TUNE
from lora_serve.api.multipart import LONGEST_FIELD, Form, too_large, unknown_field
from lora_serve.errors import BadRequest

LONGEST_FILENAME = 255  # characters
ANCHOR, SECONDS = "expires_after[anchor]", "expires_after[seconds]"
SHORTEST_EXPIRY, LONGEST_EXPIRY = 3600, 30 * 24 * 3600  # seconds


@dataclass(frozen=True)
class ReceivedFile:
    """Valid training data in a folder of its own, as `FileStore.add` takes it.

    Attributes:
        expires_after: seconds; None to keep it until it is deleted.
    """

    folder: Path
    filename: str
    sha256: str
    expires_after: int | None
    checked: CheckedLines


class FileForm(Form):
    """The form of `POST /v1/files`.

    Args:
        folder: a new one, for the file.
        most: bytes of the file.
        reserve: counts bytes before they are written, and raises `TooLarge`.
    """

    batch = 1 << 15  # checking it takes a millisecond

    def __init__(self, folder: Path, most: int, reserve: Callable[[int], None]) -> None:
        super().__init__(most)
        folder.mkdir()
        self._folder, self._reserve = folder, reserve
        self._fields: dict[str, bytes] = {}
        self._filename: str | None = None
        self._open: IO[bytes] | None = None
        self._size = 0  # bytes of the file so far
        self._digest = hashlib.sha256()
        self._lines = LineChecker()
        self._field = ""

    def begin_part(self, field: str, file_name: str) -> None:
        self._field = field
        match field:
            case "purpose" | "expires_after[anchor]" | "expires_after[seconds]":
                if field in self._fields:
                    raise BadRequest(f"{field} was sent twice", param=field)
                self._fields[field] = b""
            case "file":
                if self._filename is not None:
                    raise BadRequest("send one file only", param="file")
                self._filename = _plain_name(file_name)
                self._check_fields(whole=False)
                self._open = (self._folder / CONTENT).open("xb")
            case _:
                raise unknown_field(field)

    def part_data(self, piece: memoryview) -> None:
        if self._field != "file":
            self._fields[self._field] += piece
            if len(self._fields[self._field]) > LONGEST_FIELD:
                raise BadRequest(f"{self._field} is too long", param=self._field)
        elif self._open is not None:
            self._size += len(piece)
            if self._size > self.most:
                raise too_large(self.most)
            self._lines.feed(bytes(piece))
            if not self._lines.invalid:  # otherwise the file is refused, when its mistakes have been counted
                self._reserve(len(piece))
                self._digest.update(piece)
                self._open.write(piece)

    def end_part(self) -> None:
        if self._open is not None:
            self._open.close()
            self._open = None

    def finish(self) -> ReceivedFile:
        """The file, once the form is complete. Raises `BadRequest`, `InvalidExamples`."""
        self._check_fields(whole=True)
        if self._filename is None:
            raise BadRequest("missing parameter: file", param="file")
        checked = self._lines.finish()
        checked.raise_if_invalid()
        Disk().sync(self._folder / CONTENT)
        return ReceivedFile(self._folder, self._filename, self._digest.hexdigest(), self._expires_after(), checked)

    def _check_fields(self, *, whole: bool) -> None:
        """Check the fields that have been sent, before the file is received, and again when there are no more."""
        purpose = self._fields.get("purpose")
        if purpose is None and whole:
            raise BadRequest("missing parameter: purpose", param="purpose")
        if purpose is not None and purpose != FINE_TUNE.encode():
            raise BadRequest(f"this server keeps files of purpose {FINE_TUNE} only", param="purpose")
        if whole or {ANCHOR, SECONDS} <= self._fields.keys():
            self._expires_after()

    def _expires_after(self) -> int | None:
        anchor, seconds = self._fields.get(ANCHOR), self._fields.get(SECONDS)
        if anchor is None and seconds is None:
            return None
        if anchor != b"created_at":
            raise BadRequest("expires_after[anchor] must be created_at", param=ANCHOR)
        if (
            seconds is None
            or not (seconds.isdigit() and len(seconds) < 10)
            or not SHORTEST_EXPIRY <= int(seconds) <= LONGEST_EXPIRY
        ):
            raise BadRequest(
                f"expires_after[seconds] must be a number from {SHORTEST_EXPIRY} to {LONGEST_EXPIRY}", param=SECONDS
            )
        return int(seconds)


def _plain_name(file_name: str) -> str:
    """A file's name without folders and unprintable characters. Raises `BadRequest` if there is none."""
    name = PurePosixPath(file_name.replace("\\", "/")).name
    name = "".join(letter if letter.isprintable() else "_" for letter in name)[:LONGEST_FILENAME]
    if not name:
        raise BadRequest("file must be sent as a file, with a file name", param="file")
    return name
