"""Multipart forms, read piece by piece with bounded memory and passed to whoever writes their parts to disk."""

from __future__ import annotations

import asyncio
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, ClassVar

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import ClientDisconnect, Request

from lora_serve.api.error_handlers import LONGEST_NAME, UNKNOWN, InvalidField
from lora_serve.errors import BadRequest, TooLarge

if TYPE_CHECKING:
    from python_multipart.multipart import MultipartCallbacks

PAUSE = 0.008  # seconds at least after each batch while requests run
IDLE_SHARE = 3  # times as long as a batch took: an upload gets a quarter of one processor
FORM_SLACK = 1 << 20  # bytes of boundaries, headers and fields in a form
LONGEST_FIELD = 4096
LONGEST_BOUNDARY = 70  # RFC 2046


class Form(ABC):
    """The parts of a form as they arrive. Methods run in a thread, one call at a time, and may raise `BadRequest`.

    Attributes:
        batch: bytes that a thread is given at once; fewer, the more is done with each.

    Args:
        most: bytes of its files.
    """

    batch: ClassVar[int] = 1 << 18

    def __init__(self, most: int) -> None:
        self.most = most
        self._received = 0
        self._ended = False
        self._header = [bytearray(), bytearray()]
        self._disposition = b""

    @abstractmethod
    def begin_part(self, field: str, file_name: str) -> None:
        """A part begins; `file_name` is empty for one that is no file."""

    @abstractmethod
    def part_data(self, piece: memoryview) -> None:
        """A piece of the part's content."""

    @abstractmethod
    def end_part(self) -> None:
        """The part is complete, or the form broke off; in that case it may also be called without a part."""

    def callbacks(self) -> MultipartCallbacks:
        return {
            "on_part_begin": self._begin,
            "on_part_data": lambda data, start, end: self.part_data(memoryview(data)[start:end]),
            "on_part_end": self.end_part,
            "on_header_field": lambda data, start, end: self._more_header(0, data[start:end]),
            "on_header_value": lambda data, start, end: self._more_header(1, data[start:end]),
            "on_header_end": self._header_end,
            "on_headers_finished": self._headers_finished,
            "on_end": self._end,
        }

    def take(self, parser: MultipartParser, batch: bytes) -> None:
        """Parse a batch of the body."""
        self._received += len(batch)
        if self._received > self.most + FORM_SLACK:
            raise too_large(self.most)
        parser.write(batch)

    def check_complete(self) -> None:
        """Raise `BadRequest` if the form's last boundary has not arrived."""
        if not self._ended:
            raise BadRequest("the multipart form is cut off")

    def _begin(self) -> None:
        self._disposition = b""

    def _more_header(self, which: int, data: bytes) -> None:
        self._header[which] += data
        if len(self._header[which]) > LONGEST_FIELD:
            raise BadRequest("a header in the multipart form is too long")

    def _header_end(self) -> None:
        if self._header[0].lower() == b"content-disposition":
            self._disposition = bytes(self._header[1])
        self._header = [bytearray(), bytearray()]

    def _headers_finished(self) -> None:
        _, options = parse_options_header(self._disposition)
        self.begin_part(*(_decoded(options.get(name, b"")) for name in (b"name", b"filename")))

    def _end(self) -> None:
        self._ended = True


async def receive_form(request: Request, form: Form, is_busy: Callable[[], bool]) -> None:
    """Pass the multipart body of a request to `form`.

    Args:
        is_busy: whether requests run, whose compute threads an upload must leave most of the processor.

    Raises: `BadRequest`, `TooLarge`, and what the form raises.
    """
    boundary = _boundary(request)
    announced = request.headers.get("Content-Length", "")
    if announced.isdigit() and (len(announced) > 18 or int(announced) > form.most + FORM_SLACK):
        raise too_large(form.most)
    parser = MultipartParser(boundary, form.callbacks())
    try:
        try:
            async for batch in _batches(request, form.batch):
                begun = time.monotonic()
                await asyncio.to_thread(form.take, parser, batch)
                if is_busy():
                    await asyncio.sleep(max(PAUSE, IDLE_SHARE * (time.monotonic() - begun)))
        finally:
            form.end_part()
    except ClientDisconnect:
        raise BadRequest("the upload was cut off") from None
    except FormParserError as error:
        raise BadRequest("the multipart form cannot be read") from error
    form.check_complete()


def unknown_field(field: str) -> InvalidField:
    """The error for a part that a form does not have."""
    name = field[:LONGEST_NAME]
    return InvalidField(f"unknown parameter: {name}", param=name, problem=UNKNOWN)


def too_large(most: int) -> TooLarge:
    return TooLarge(f"the upload is larger than {most:,} bytes")


def _decoded(name: bytes) -> str:
    """A name in a part's header, in which browsers encode these three characters and no others (WHATWG)."""
    text = name.decode(errors="replace")
    return text.replace("%22", '"').replace("%0D", "\r").replace("%0A", "\n")


def _boundary(request: Request) -> bytes:
    kind, options = parse_options_header(request.headers.get("Content-Type"))
    boundary = options.get(b"boundary")
    if kind != b"multipart/form-data" or not boundary:
        raise BadRequest("an upload must be sent as multipart/form-data")
    if len(boundary) > LONGEST_BOUNDARY:
        raise BadRequest(f"the form's boundary has {len(boundary)} bytes; at most {LONGEST_BOUNDARY} are allowed")
    return boundary


async def _batches(request: Request, size: int) -> AsyncIterator[bytes]:
    batch = bytearray()
    async for chunk in request.stream():
        batch += chunk
        if len(batch) >= size:
            yield bytes(batch)
            batch.clear()
    yield bytes(batch)
