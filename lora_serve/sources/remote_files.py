"""The files of an adapter in a source: what there is, and how it is read.

A kind of source is a class with these methods. Their errors are those of its library, of which `fetch.py` makes ours. A
missing file or folder is a FileNotFoundError, everywhere.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec

from lora_serve.adapter_sources import options_variable
from lora_serve.errors import Unavailable

BLOCK = 1 << 20  # bytes that are passed on at once
CONNECT_SECONDS, READ_SECONDS = 10, 30


@dataclass(frozen=True)
class RemoteFile:
    """A file in a source.

    Attributes:
        path: as the source names it.
        size: in bytes; None if the source does not say.
        tag: differs if the content does; empty if the source has none.
        sha256: of the content; empty if the source does not say.
    """

    path: str
    size: int | None = None
    tag: str = ""
    sha256: str = ""


class RemoteFiles(Protocol):
    """One adapter in a source.

    Attributes:
        revision: the commit that is read; empty if the source has none.
    """

    revision: str

    def list(self) -> dict[str, RemoteFile]:
        """Files of the adapter's folder by their path in it, or its archive as `ARCHIVE`; not from a cache."""

    def read(self, file: RemoteFile) -> AbstractContextManager[Iterator[bytes]]:
        """The content in blocks. Fewer bytes may come than there should be, or more."""


def read_options(source: str) -> dict[str, Any]:
    """The options of a source in the environment. Raises Unavailable if they are not a JSON object."""
    variable = options_variable(source)
    try:
        return msgspec.json.decode(os.environ.get(variable, "{}"), type=dict[str, Any])
    except msgspec.DecodeError:
        raise Unavailable(f"{variable} is not a JSON object") from None
