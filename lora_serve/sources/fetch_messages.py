"""What the server and its fetch process tell each other, as JSON lines on the process's standard input and output."""

from __future__ import annotations

import msgspec

from lora_serve.adapter_sources import AdapterLocation
from lora_serve.errors import Failure

LONGEST_LINE = 3500  # bytes, less than what one write to a pipe keeps together


class FetchJob(msgspec.Struct, frozen=True, tag="fetch"):
    """Copy an adapter's files, or its archive under the name `ARCHIVE`, into an empty folder.

    Attributes:
        most: bytes in all.
        seconds: after which no further attempt is begun.
    """

    id: int
    location: AdapterLocation
    folder: str
    most: int
    seconds: float


class CancelFetch(msgspec.Struct, frozen=True, tag="cancel"):
    """End a fetch. What it has written stays."""

    id: int


class FetchProgress(msgspec.Struct, frozen=True, tag="progress"):
    """Bytes received so far, those of failed attempts included, and bytes in all if they are known."""

    id: int
    received: int
    expected: int | None = None


class FetchDone(msgspec.Struct, frozen=True, tag="done"):
    """The files are there. `revision`: the commit of a hub."""

    id: int
    received: int
    revision: str = ""


class FetchFailed(msgspec.Struct, frozen=True, tag="failed"):
    """The adapter could not be fetched. The kind is adapter_not_found only if the source does not have it."""

    id: int
    failure: Failure


ToFetcher = FetchJob | CancelFetch
FromFetcher = FetchProgress | FetchDone | FetchFailed

encode_line = msgspec.json.Encoder().encode
decode_to_fetcher = msgspec.json.Decoder(ToFetcher).decode
decode_from_fetcher = msgspec.json.Decoder(FromFetcher).decode


def line_of(message: ToFetcher | FromFetcher) -> bytes:
    """A message as a line, with its newline."""
    return encode_line(message) + b"\n"
